"""Models as PyTorch files: torchvision's names in a safetensors file, and in its metadata the description."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from advtransfer import storage
from advtransfer.foreign import parse_json
from advtransfer.models import Model, ModelSpec, ResNet
from advtransfer.models.bundle import check_spec
from advtransfer.torch_checkpoint.layout import brief, layout
from advtransfer.torch_reader import CheckpointError

_KEY = "advtransfer"  # of the file's metadata: a JSON object with these fields of a ModelSpec
_FIELDS = ("mean", "std", "norm", "eps", "image_size", "class_names")


def export_torch_state_dict(model: Model, path: str | Path | None = None) -> dict[str, np.ndarray]:
    """A model's weights by torchvision's names, as torchvision's and timm's ResNets load them (strict=True).

    Those networks take images that are normalised with `model.spec.mean` and `model.spec.std`. A network with
    a CIFAR stem gets torchvision's names too, but torchvision has no such network.

    Args:
        model: a model.
        path: a safetensors file to write, whole or not at all. With the metadata that it gets,
            `import_torch_checkpoint` makes the same model of it.

    Returns:
        float32 arrays, convolutions [O, I, H, W] and the head [out, in], and int64 zeros for
        num_batches_tracked, in torchvision's order. Of a model that was imported without a head, no fc.

    Raises:
        ValueError: `path` does not end in .safetensors.
    """
    tensors = torch_tensors(model.module, model.variables)
    if not model.spec.has_head:
        tensors = {name: array for name, array in tensors.items() if not name.startswith("fc.")}
    if path is not None:
        path = Path(path).absolute()
        if path.suffix != ".safetensors" or path.is_dir():
            raise ValueError(f"{path} does not end in .safetensors, the format that it is written in")
        path.parent.mkdir(parents=True, exist_ok=True)
        fields = {field: getattr(model.spec, field) for field in _FIELDS}
        metadata = {"architecture": model.spec.architecture, _KEY: json.dumps(fields, default=float)}
        metadata["format"] = "pt"  # what transformers and timm ask for
        storage.write(path, safetensors.numpy.save(tensors, metadata))
    return tensors


def torch_tensors(module: ResNet, variables: dict[str, Any]) -> dict[str, np.ndarray]:
    """The variables of a network as `export_torch_state_dict` gives them."""
    tensors = {}
    for name, entry in layout(module).items():
        array = variables
        for key in entry.path:
            array = array[key]
        array = np.asarray(array, np.float32)
        if entry.path[-1] == "kernel":
            array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
        tensors[name] = np.array(array, order="C")
        if name.endswith(".running_var"):
            tensors[name.replace("running_var", "num_batches_tracked")] = np.zeros((), np.int64)
    return tensors


def parse_metadata(
    metadata: dict[str, str], architecture: str, num_classes: int, has_head: bool
) -> dict[str, Any]:
    """The fields of a `ModelSpec` that `export_torch_state_dict` wrote; {}: another program wrote the file.

    Raises:
        CheckpointError: they have been changed since.
    """
    if _KEY not in metadata:
        return {}
    try:
        fields = parse_json(metadata[_KEY])
        found = {field: fields[field] for field in ("norm", "image_size")} | {"eps": float(fields["eps"])}
        found |= {field: tuple(map(float, fields[field])) for field in ("mean", "std")}
        found["class_names"] = tuple(fields["class_names"]) if has_head else ()
        check_spec(ModelSpec(architecture, num_classes, **found))
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise CheckpointError(f"its metadata are damaged: {brief(error)}: export it again") from error
    return found
