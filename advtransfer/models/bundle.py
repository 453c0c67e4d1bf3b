"""A model on disk: a folder with `model.json` and an Orbax tree of variables, and nothing else to know."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from importlib import metadata
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jax.typing import DTypeLike
from jaxtyping import PyTree

from advtransfer import foreign, hub, storage
from advtransfer.arrays import AnyArray, Variables
from advtransfer.data import resize
from advtransfer.foreign import AnyPath
from advtransfer.models.resnet import ResNet, create_module, init_variables
from advtransfer.norms import NORMS

_SPEC_FILE, _VARIABLES = "model.json", "variables"
_FORMAT = 2  # of 1, the description has no SHA-256 of its own
_MAX_SIDE, _MAX_CLASSES = 8192, 10**6


@dataclasses.dataclass(frozen=True, repr=False)
class ModelSpec:
    """What a model is, beside its weights."""

    architecture: str  # a key of ARCHITECTURES
    num_classes: int
    image_size: int  # pixels; what it was trained at
    mean: tuple[float, ...]  # of the normalisation inside the network
    std: tuple[float, ...]
    norm: str = "none"  # threat model of its adversarial training: "none", "l2" or "linf"
    eps: float = 0.0  # its radius, pixel units
    class_names: tuple[str, ...] = ()
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)  # where it comes from
    versions: dict[str, str] = dataclasses.field(default_factory=dict)  # of what wrote it

    @property
    def has_head(self) -> bool:
        """Whether its logits mean anything: not if it was imported from a file without a head."""
        return self.provenance.get("head") != "new"

    def __repr__(self) -> str:
        """Short: of long names and of nested facts there is the beginning, or the keys."""
        parts = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, dict):
                text = "{" + ", ".join(value) + "}"
            elif field.name == "class_names" and len(value) > 5:
                text = f"({', '.join(map(repr, value[:3]))}, … {len(value) - 3:,} more)"
            else:
                text = repr(value)
            parts.append(f"{field.name}={text}")
        return f"ModelSpec({', '.join(parts)})"


def check_spec(spec: ModelSpec) -> None:
    """Raises a ValueError, which names the field, unless every field is what `ModelSpec` says."""

    def is_whole(value: Any, largest: int) -> bool:
        return type(value) is int and 1 <= value <= largest

    def are_numbers(values: Any) -> bool:
        known = type(values) is tuple and all(type(x) in (int, float) for x in values)
        return known and len(values) == 3 and all(math.isfinite(x) for x in values)

    names, robust = spec.class_names, spec.norm in NORMS[1:]
    for field, is_good, expected in (
        ("architecture", isinstance(spec.architecture, str), "the name of a network"),
        ("num_classes", is_whole(spec.num_classes, _MAX_CLASSES), "a whole number, 1 or more"),
        ("image_size", is_whole(spec.image_size, _MAX_SIDE), f"a whole number of pixels, 1 to {_MAX_SIDE:,}"),
        ("mean", are_numbers(spec.mean) and all(0 <= x <= 1 for x in spec.mean), "three numbers in [0, 1]"),
        ("std", are_numbers(spec.std) and all(0 < x <= 1 for x in spec.std), "three numbers in (0, 1]"),
        ("norm", spec.norm in NORMS, f"one of {', '.join(NORMS)}"),
        (
            "eps",
            type(spec.eps) in (int, float) and (0 < spec.eps < math.inf if robust else spec.eps == 0),
            f"positive, as norm is {spec.norm}" if robust else f"0, as norm is {spec.norm}",
        ),
        (
            "class_names",
            names == ()
            or (
                (type(names) is tuple and all(type(name) is str for name in names))
                and len({*names}) == len(names) == spec.num_classes
            ),
            f"{spec.num_classes} different names, or none",
        ),
        ("provenance", isinstance(spec.provenance, dict), "an object"),
        ("versions", isinstance(spec.versions, dict), "an object"),
    ):
        if not is_good:
            value = str(getattr(spec, field))
            raise ValueError(f"{field} is {value[:100]}; expected {expected}")


class Model(NamedTuple):
    """A network with its weights."""

    module: ResNet
    variables: Variables  # float32
    spec: ModelSpec

    def __repr__(self) -> str:
        count = sum(np.size(x) for x in jax.tree.leaves(self.variables.get("params")))
        return f"Model({count:,} parameters, {self.spec!r})"


def logits_fn(model: Model) -> Partial:
    """images [N, H, W, 3] in [0, 1] -> float32 logits [N, classes], in evaluation mode.

    Images of another size than the model's, `spec.image_size`, are resized to it first, as they were when it
    was trained. `model.module.apply` takes them as they are.

    The result is a pytree whose leaves are the weights, so a jitted function takes it as an argument.
    """
    return Partial(_apply, _Static(model.module, model.spec.image_size), model.variables)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
    """A module as part of a pytree's structure: equal modules share a compiled program."""

    module: ResNet
    image_size: int


def _apply(static: _Static, variables: Variables, images: AnyArray) -> Any:
    return static.module.apply(variables, resize(images, static.image_size))


def compute_dtype(name: str) -> np.dtype:
    """The type that a network computes in, by its name: "auto" is bfloat16 where accelerators have units for
    it, and float32 on a CPU."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def digest(variables: Variables) -> str:
    """SHA-256 of the weights: of every leaf's path, shape and float32 bytes, in the order of their paths."""
    sha = hashlib.sha256()
    for path, leaf in sorted(_named_leaves(variables).items()):
        array = np.ascontiguousarray(leaf, np.float32)
        sha.update(f"{path}{array.shape}".encode())
        sha.update(array.data)
    return sha.hexdigest()


def identity(model: Model) -> str:
    """SHA-256 of what decides a model's outputs: weights, architecture, normalisation, compute type."""
    spec = model.spec
    dtype = jnp.dtype(model.module.dtype).name
    parts = (spec.architecture, spec.image_size, spec.mean, spec.std, dtype, digest(model.variables))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def save_model(model: Model, folder: str | AnyPath, *, overwrite: bool = False) -> None:
    """Writes a model folder, whole or not at all: it is made beside `folder`, then renamed. At an address
    `model.json` goes last, and a folder without it is not a model.

    Package versions and the SHA-256 of weights and description are recorded; `spec.provenance` is the
    caller's.

    Raises:
      ValueError: `folder` exists and `overwrite` is not set, or it holds something else than a model; a
        description or weights that `load_model` would refuse.
    """
    path = storage.to_path(folder)
    storage.recover(path)
    check_spec(model.spec)
    described = storage.is_file(path / _SPEC_FILE)
    if path.exists() and not (described or _is_half_an_upload(path)):
        raise ValueError(
            f"{folder} exists and is not a model folder, so it is not overwritten: choose another"
        )
    if described and not overwrite:
        raise ValueError(f"{folder} exists already: choose another folder, or pass overwrite=True")
    variables = jax.tree.map(lambda x: np.asarray(x, np.float32), model.variables)
    if problem := _problem(variables):
        raise ValueError(f"the model is not saved: {problem}")
    fields = dataclasses.asdict(dataclasses.replace(model.spec, versions=package_versions()))
    fields = {"format": _FORMAT, **fields, "sha256": digest(variables)}
    text = json.dumps(fields | {"description_sha256": _hash(fields)}, indent=2)
    with storage.new_folder(path, last=_SPEC_FILE) as new:
        storage.save_tree(new / _VARIABLES, variables)
        (new / _SPEC_FILE).write_text(text + "\n")


def load_model(folder: str | AnyPath, *, dtype: DTypeLike | None = None) -> Model:
    """Reads a model folder.

    Args:
      folder: what `save_model` wrote, or a workdir with such a folder called `model`; or the name of a
        repository of the Hugging Face hub with these files, hf:OWNER/NAME[@REVISION] (see `push_to_hub`).
      dtype: the type that the network computes in; None: float32.

    Raises:
      ValueError: no model folder, or none that the hub gives; an unknown architecture; weights that cannot
        be read, do not fit the architecture (every missing, unexpected and wrongly shaped name is listed) or
        are not those written.
    """
    if str(folder).startswith("hf:"):
        folder = hub.fetch_folder(str(folder), (_SPEC_FILE, f"{_VARIABLES}/*"))
    path = _find(folder)
    spec, sha256 = _read(path)
    module = create_module(
        spec.architecture,
        num_classes=spec.num_classes,
        mean=spec.mean,
        std=spec.std,
        dtype=dtype or jnp.float32,
    )
    expected = jax.eval_shape(lambda: init_variables(module, jax.random.key(0), spec.image_size))
    try:
        stored = storage.tree_shapes(path / _VARIABLES)
        _check_fit(stored, expected, path)  # before as much memory is taken as the files ask for
        variables = storage.load_tree(path / _VARIABLES, stored)
    except _Misfit as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # Orbax, TensorStore and the file system each raise their own
        raise ValueError(f"the weights in {folder} cannot be read ({storage.reason(error)})") from error
    if digest(variables) != sha256:
        raise ValueError(f"the weights in {folder} are damaged: their SHA-256 is not model.json's")
    if problem := _problem(variables):
        raise ValueError(f"the weights in {folder} are not those of a network: {problem}")
    return Model(module, jax.tree.map(jnp.asarray, variables), spec)


def _find(folder: str | AnyPath) -> AnyPath:
    path = storage.to_path(folder)
    for candidate in (path, path / "model"):
        storage.recover(candidate)
        if storage.is_file(candidate / _SPEC_FILE):
            return candidate
    if not path.exists():
        raise ValueError(f"{str(folder)!r} is not a model folder: it does not exist")
    below = [] if storage.is_address(path) else sorted(path.glob(f"*/*/{_SPEC_FILE}"))
    below += [] if storage.is_address(path) else sorted(path.glob(f"*/*/model/{_SPEC_FILE}"))
    hint = f"; there are models in it: {', '.join(str(x.parent) for x in below[:3])}" if below else ""
    if storage.is_file(path):
        raise ValueError(
            f"{str(folder)!r} is a file, not a model folder: import_torch_checkpoint reads those"
        )
    raise ValueError(f"{str(folder)!r} is not a model folder: it has no {_SPEC_FILE}{hint}")


def _is_half_an_upload(folder: AnyPath) -> bool:
    """Whether all there is are weights that a killed process has sent to an address."""
    return storage.is_address(folder) and {path.name for path in folder.iterdir()} == {_VARIABLES}


def _read(folder: AnyPath) -> tuple[ModelSpec, str]:
    path = folder / _SPEC_FILE
    try:
        fields = foreign.read_json(path)
        written = fields.pop("format")
        if written not in (1, _FORMAT):
            raise ValueError("it was written by another version of advtransfer")
        is_unchanged = written == 1 or fields.pop("description_sha256") == _hash(
            {"format": written, **fields}
        )
        sha256 = fields.pop("sha256")
        for name in ("mean", "std", "class_names"):
            if type(fields[name]) is list:
                fields[name] = tuple(fields[name])
        spec = ModelSpec(**fields)
        check_spec(spec)
        if not is_unchanged:
            raise ValueError(
                "it was changed since it was written; to change what it says, save the model anew: "
                "at.save_model(model._replace(spec=dataclasses.replace(model.spec, ...)), folder)"
            )
        return spec, sha256
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        said = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is not a model description: {said}") from error


def _hash(fields: dict[str, Any]) -> str:
    """SHA-256 of what a description says, in whatever layout."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _problem(variables: PyTree) -> str:
    """What a network cannot have, "" if there is nothing of the kind."""
    for name, leaf in _named_leaves(variables).items():
        if not np.isfinite(leaf).all():
            return f"{name} holds values that are not finite"
        if name.startswith("batch_stats/") and name.endswith("/var") and np.min(leaf, initial=0) < 0:
            return f"{name} holds negative variances"
    return ""


class _Misfit(ValueError):
    """Weights of other names, shapes or types than the architecture's."""


def _check_fit(stored: PyTree, expected: PyTree, folder: AnyPath) -> None:
    have, want = _named_leaves(stored), _named_leaves(expected)
    problems = [f"missing {name}" for name in want if name not in have]
    problems += [f"unexpected {name}" for name in have if name not in want]
    for name in (name for name in want if name in have):
        if have[name].shape != want[name].shape:
            problems.append(f"{name} has shape {have[name].shape}, not {want[name].shape}")
        elif have[name].dtype != want[name].dtype:
            problems.append(f"{name} is {have[name].dtype}, not {want[name].dtype}")
    if problems:
        raise _Misfit(f"the weights in {folder} do not fit: {'; '.join(problems)}")


def _named_leaves(tree: PyTree) -> dict[str, Any]:
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
