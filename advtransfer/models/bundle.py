"""A model on disk: a folder with `model.json` and an Orbax tree of variables, and nothing else to know."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from advtransfer import storage
from advtransfer.models.resnet import ResNet, create_module, init_variables

_SPEC_FILE, _VARIABLES = "model.json", "variables"
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """What a model is, beside its weights."""

    architecture: str  # a key of ARCHITECTURES
    num_classes: int
    image_size: int  # pixels; what it was trained at
    mean: tuple[float, ...]  # of the normalisation inside the network
    std: tuple[float, ...]
    norm: str = "none"  # threat model of its adversarial training: none | l2 | linf
    eps: float = 0.0  # its radius, pixel units
    class_names: tuple[str, ...] = ()
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)  # where it comes from
    versions: dict[str, str] = dataclasses.field(default_factory=dict)  # of what wrote it


class Model(NamedTuple):
    """A network with its weights."""

    module: ResNet
    variables: dict[str, Any]  # {"params", "batch_stats"}, float32
    spec: ModelSpec


def logits_fn(model: Model) -> Partial:
    """images [N, H, W, 3] in [0, 1] -> float32 logits [N, classes], in evaluation mode.

    The result is a pytree whose leaves are the weights, so a jitted function takes it as an argument.
    """
    return Partial(_apply, _Static(model.module), model.variables)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
    """A module as part of a pytree's structure: equal modules share a compiled program."""

    module: ResNet


def _apply(static: _Static, variables: Any, images: jax.Array) -> jax.Array:
    return static.module.apply(variables, images)


def digest(variables: Any) -> str:
    """SHA-256 of the weights: of every leaf's path, shape and float32 bytes, in the order of their paths."""
    sha = hashlib.sha256()
    for path, leaf in sorted(_named_leaves(variables).items()):
        array = np.ascontiguousarray(leaf, np.float32)
        sha.update(f"{path}{array.shape}".encode())
        sha.update(array)
    return sha.hexdigest()


def identity(model: Model) -> str:
    """SHA-256 of what decides a model's outputs: weights, architecture, normalisation, compute type."""
    spec = model.spec
    dtype = jnp.dtype(model.module.dtype).name
    parts = (spec.architecture, spec.image_size, spec.mean, spec.std, dtype, digest(model.variables))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def save_model(model: Model, folder: str | Path, *, overwrite: bool = False) -> None:
    """Writes a model folder, whole or not at all: it is made beside `folder`, then renamed. At an address
    `model.json` goes last, and a folder without it is no model.

    Package versions and the SHA-256 of the weights are recorded; `spec.provenance` is the caller's.

    Raises:
      ValueError: `folder` exists and `overwrite` is not set, or it holds something else than a model.
    """
    folder = storage.to_path(folder)
    described = storage.is_file(folder / _SPEC_FILE)
    if folder.exists() and not (described or _is_half_an_upload(folder)):
        raise ValueError(f"{folder} exists, is no model folder and is not overwritten: choose another")
    if described and not overwrite:
        raise ValueError(f"{folder} exists already: choose another folder, or pass overwrite=True")
    variables = jax.tree.map(lambda x: np.asarray(x, np.float32), model.variables)
    spec = dataclasses.asdict(dataclasses.replace(model.spec, versions=package_versions()))
    text = json.dumps({"format": _FORMAT, **spec, "sha256": digest(variables)}, indent=2)
    with storage.new_folder(folder, last=_SPEC_FILE) as new:
        storage.save_tree(new / _VARIABLES, variables)
        (new / _SPEC_FILE).write_text(text + "\n")


def load_model(folder: str | Path, *, dtype: Any = None) -> Model:
    """Reads a model folder.

    Args:
      folder: what `save_model` wrote, or a workdir with such a folder called `model`.
      dtype: the type that the network computes in; None: float32.

    Raises:
      ValueError: no model folder; an unknown architecture; weights that cannot be read, do not fit the
        architecture (every missing, unexpected and wrongly shaped name is listed) or are not those written.
    """
    folder = _find(folder)
    spec, sha256 = _read(folder)
    module = create_module(
        spec.architecture,
        num_classes=spec.num_classes,
        mean=spec.mean,
        std=spec.std,
        dtype=dtype or jnp.float32,
    )
    try:
        variables = storage.load_tree(folder / _VARIABLES)
    except Exception as error:  # Orbax, TensorStore and the file system each raise their own
        raise ValueError(f"the weights in {folder} cannot be read ({storage.reason(error)})") from error
    expected = jax.eval_shape(lambda: init_variables(module, jax.random.key(0), spec.image_size))
    _check_fit(variables, expected, folder)
    if digest(variables) != sha256:
        raise ValueError(f"the weights in {folder} are damaged: their SHA-256 is not model.json's")
    return Model(module, jax.tree.map(jnp.asarray, variables), spec)


def _find(folder: str | Path) -> Path:
    path = storage.to_path(folder)
    for candidate in (path, path / "model"):
        if storage.is_file(candidate / _SPEC_FILE):
            return candidate
    raise ValueError(f"{str(folder)!r} is no model folder: it has no {_SPEC_FILE}")


def _is_half_an_upload(folder: Path) -> bool:
    """Whether all there is are weights that a killed process has sent to an address."""
    return storage.is_address(folder) and {path.name for path in folder.iterdir()} == {_VARIABLES}


def _read(folder: Path) -> tuple[ModelSpec, str]:
    path = folder / _SPEC_FILE
    try:
        fields = json.loads(path.read_text())
        if fields.pop("format") != _FORMAT:
            raise ValueError("it was written by another version of advtransfer")
        sha256 = fields.pop("sha256")
        for name in ("mean", "std", "class_names"):
            fields[name] = tuple(fields[name])
        return ModelSpec(**fields), sha256
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no model description: {error}") from error


def _check_fit(variables: Any, expected: Any, folder: Path) -> None:
    have = {name: x.shape for name, x in _named_leaves(variables).items()}
    want = {name: x.shape for name, x in _named_leaves(expected).items()}
    problems = [f"missing {name}" for name in want if name not in have]
    problems += [f"unexpected {name}" for name in have if name not in want]
    problems += [
        f"{name} has shape {have[name]}, not {want[name]}"
        for name in want
        if name in have and have[name] != want[name]
    ]
    if problems:
        raise ValueError(f"the weights in {folder} do not fit: {'; '.join(problems)}")


def _named_leaves(tree: Any) -> dict[str, Any]:
    return {
        "/".join(str(entry.key) for entry in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def package_versions() -> dict[str, str]:
    """Versions of advtransfer and of the packages that its results depend on."""
    found = {}
    for package in ("advtransfer", "jax", "flax", "optax", "orbax-checkpoint", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # run from a checkout, not installed
            continue
    return found
