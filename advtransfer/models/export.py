"""A model as one file that runs without this package: StableHLO by jax.export."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import export as jax_export
from jaxtyping import Array, Float, UInt8

from advtransfer import storage
from advtransfer.arrays import AnyArray
from advtransfer.data import resize, to_float
from advtransfer.foreign import AnyPath
from advtransfer.models.bundle import Model, package_versions

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
INPUTS = ("uint8", "float", "normalised")
_PROGRAM = Path(__file__).parent / "classify.py"


def export(
    model: Model,
    path: str | AnyPath,
    *,
    inputs: str = "uint8",
    image_size: int = 0,
    batch_size: int = 0,
    temperature: float = 0.0,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
) -> AnyPath:
    """Writes a network with its weights as StableHLO; beside it, as JSON, what its user has to know, and a
    program that classifies image files.

    jax.export.deserialize(bytearray(open(path, "rb").read())).call(images) runs it, with the packages jax and
    flatbuffers, and compiles it for each new shape. The program, `python PATH.py FILE ...`, needs Pillow too,
    and reads images as stage=predict does. JAX reads the file for at least six months after the version that
    wrote it (https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees).

    Args:
      model: with a head.
      path: of the file; the others are called PATH.json and PATH.py.
      inputs: what the file takes as images [N, S, S, 3]: "uint8", 0 to 255; "float", float32 in [0, 1]; or
        "normalised", float32 after the model's mean and standard deviation, which are then not in the file.
      image_size: S, in pixels; 0: any, or the model's own of normalised images. Other images than of the
        model's size are resized inside the file, as `resize` does.
      batch_size: N; 0: any.
      temperature: positive: the file gives probabilities, softmax(logits / temperature); 0: logits.
      platforms: that the file runs on, of "cpu", "cuda", "rocm" and "tpu".

    Returns:
      The path of the file.

    Raises:
      ValueError: a model without a head, or options that are not as above.
    """
    spec, file = model.spec, storage.to_path(path)
    _check(model, file, inputs, image_size, batch_size, temperature, platforms)
    side, module = image_size, model.module
    if inputs == "normalised":
        side = spec.image_size
        module = module.clone(mean=(0.0,) * 3, std=(1.0,) * 3)

    def call(images: UInt8[AnyArray, "n h w 3"] | Float[AnyArray, "n h w 3"]) -> Float[Array, "n classes"]:
        if inputs != "normalised":
            images = resize(images if inputs == "float" else to_float(images), spec.image_size)
        logits = jnp.asarray(module.apply(model.variables, images))
        return jax.nn.softmax(logits / temperature, axis=-1) if temperature else logits

    n, s = batch_size or "n", side or "s"
    shape = jax_export.symbolic_shape(f"{n}, {s}, {s}, 3")
    dtype = jnp.uint8 if inputs == "uint8" else jnp.float32
    made = jax_export.export(jax.jit(call), platforms=list(platforms))(jax.ShapeDtypeStruct(shape, dtype))
    content = bytes(made.serialize())
    described = {
        "architecture": spec.architecture,
        "images": f"{dtype.dtype} [{batch_size or 'N'}, {side or 'S'}, {side or 'S'}, 3], "
        + {"uint8": "0 to 255", "float": "in [0, 1]", "normalised": "(x in [0, 1] - mean) / std"}[inputs],
        "output": f"float32 [{batch_size or 'N'}, {spec.num_classes}], "
        + (f"probabilities, with a temperature of {temperature:g}" if temperature else "logits"),
        "num_classes": spec.num_classes,
        "batch_size": batch_size,
        "mean": spec.mean,
        "std": spec.std,
        "image_size": spec.image_size,
        "class_names": spec.class_names,
        "temperature": temperature,
        "inputs": inputs,
        # How photographs become squares; None: cropped unless all of them are squares of one size.
        "crop": spec.provenance.get("data", {}).get("crop"),
        "view": spec.provenance.get("data", {}).get("view", "natural"),
        "platforms": list(platforms),
        "load": f"jax.export.deserialize(bytearray(open({file.name!r}, 'rb').read())).call(images)",
        "sha256": hashlib.sha256(content).hexdigest(),
        "versions": package_versions(),
    }
    storage.make_folder(file.parent)
    storage.write(file, content)
    storage.write(file.parent / f"{file.name}.json", json.dumps(described, indent=2) + "\n")
    storage.write(file.parent / f"{file.name}.py", _PROGRAM.read_text("utf-8"))
    return file


def _check(
    model: Model,
    path: AnyPath,
    inputs: str,
    image_size: int,
    batch_size: int,
    temperature: float,
    platforms: Sequence[str],
) -> None:
    spec = model.spec
    if not spec.has_head:
        raise ValueError("this model was imported without a head, so it has no classes: fine-tune it first")
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file, such as {path / 'model.stablehlo'}")
    if inputs not in INPUTS:
        raise ValueError(f"inputs={inputs!r} is not one of {', '.join(INPUTS)}")
    if inputs == "normalised" and image_size not in (0, spec.image_size):
        raise ValueError(
            f"image_size={image_size}: normalised images are not resized in the file: leave it away, or pass "
            f"{spec.image_size}, the model's own"
        )
    if min(image_size, batch_size) < 0:
        raise ValueError("image_size and batch_size are numbers of pixels and images, or 0: any")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature}: pass a positive number, or 0 for logits")
    if not platforms or not {*platforms} <= {*PLATFORMS}:
        raise ValueError(f"platforms={platforms!r} are not some of {', '.join(PLATFORMS)}")
