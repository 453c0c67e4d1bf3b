"""PyTorch checkpoints to models and back, without PyTorch."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from advtransfer.models import IMAGENET_MEAN, IMAGENET_STD, Model, ModelSpec, ResNet, create_module
from advtransfer.torch_checkpoint.catalogue import KnownModel, find_known
from advtransfer.torch_checkpoint.hub import fetch
from advtransfer.torch_checkpoint.layout import infer_architecture, layout, misfits
from advtransfer.torch_checkpoint.metadata import (
    Metadata,
    check_normalisation,
    check_threat_model,
    make_metadata,
    parse_metadata,
)
from advtransfer.torch_checkpoint.reader import CheckpointError, Tensor, file_sha256, open_checkpoint
from advtransfer.torch_checkpoint.state_dict import Network, check_copies, find_network


class Checkpoint(NamedTuple):
    """A network read from a file, and what the file says of it."""

    variables: dict[str, Any]  # {"params", "batch_stats"} of float32, as a `ResNet` has them
    architecture: str
    num_classes: int
    mean: tuple[float, ...] | None  # of the normaliser in the file
    std: tuple[float, ...] | None
    claims: dict[str, int | float]  # epoch, accuracies
    format: str
    stubs: tuple[str, ...]  # names of what the pickle wanted to run, and was not run
    wrapping: str  # what stood around the names of the weights
    metadata: Metadata | None  # of a file that `export_torch_state_dict` wrote


def import_torch_checkpoint(
    path: str | Path,
    architecture: str | None = None,
    num_classes: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    *,
    norm: str | None = None,
    eps: float | None = None,
    image_size: int | None = None,
    sha256: str | None = None,
    dtype: Any = None,
) -> Model:
    """Makes a model of the ResNet in a PyTorch file. PyTorch is not needed and no code of the file is run.

    What is not given is taken from the file or, for a file of a known name, from the table of known models.
    `spec.provenance` says where everything came from.

    Args:
        path: a zip (since 2020), legacy (before) or safetensors file, or hf:REPO/FILE[@revision].
        architecture: a key of `ARCHITECTURES` that it must be; None: told from the names and shapes.
        num_classes: what its head must have; None: whatever it has.
        mean: per channel, of the normalisation of images in [0, 1]; None: that of the file or the table,
            otherwise ImageNet's for a network with a 7×7 stem.
        std: as `mean`; both or neither.
        norm: threat model of its training, none | l2 | linf; None: the table's, otherwise none.
        eps: its radius, pixel units (4 / 255 rather than 4).
        image_size: pixels; None: the table's, otherwise 224, or 32 for a network with a CIFAR stem.
        sha256: the file's, or at least its first eight digits; None: the table's, or the eight digits
            that torchvision puts into the file's name.
        dtype: the type that the network computes in; None: float32.

    Returns:
        A model whose variables are float32, whatever type the file has.

    Raises:
        CheckpointError: no such file, a damaged one, one with another hash, or no network of the family, with
            the missing, unexpected and wrongly shaped names.
        ValueError: arguments that contradict each other, or an unknown architecture.
    """
    _check_arguments(mean, std, norm, eps, sha256)
    fetched = fetch(str(path)) if str(path).startswith("hf:") else None
    path, repo = (fetched.path, fetched.repo) if fetched else (Path(path), "")
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    actual = file_sha256(path)
    _check_hash(path, actual, sha256, find_known(path.name, repo=repo))
    found = read_variables(path, architecture, num_classes, put=_to_jax)
    known = find_known(path.name, actual, repo)
    if known and (known.architecture != found.architecture or known.sha256 not in ("", actual)):
        known = None  # another file that happens to have the name
    module = create_module(found.architecture, num_classes=found.num_classes)
    mean, std, normalisation = _choose_normalisation(path, mean, std, found, known, module)
    norm, eps, threat_model = _choose_threat_model(norm, eps, found, known)
    metadata = found.metadata
    provenance = {
        "file": path.name,
        "sha256": actual,
        "format": found.format,
        "stubs": list(found.stubs),
        "wrapping": found.wrapping,
        "claims": found.claims,
        "normalisation": normalisation,
        "threat_model": threat_model,
    }
    if known:
        fields = ("dataset", "accuracy", "licence", "source")
        provenance["published"] = {field: getattr(known, field) for field in fields}
    if fetched:
        provenance["hub"] = {"repo": fetched.repo, "file": fetched.file, "revision": fetched.revision}
    spec = ModelSpec(
        architecture=found.architecture,
        num_classes=found.num_classes,
        image_size=image_size or _image_size(found, known, module),
        mean=mean,
        std=std,
        norm=norm,
        eps=eps,
        class_names=metadata.class_names if metadata else (),
        provenance=provenance,
    )
    module = module.clone(mean=mean, std=std, dtype=dtype or jnp.float32)
    return Model(module, found.variables, spec)


def read_variables(
    path: str | Path,
    architecture: str | None = None,
    num_classes: int | None = None,
    *,
    put: Callable[[np.ndarray], Any] = np.ascontiguousarray,
) -> Checkpoint:
    """Reads the ResNet in a PyTorch file into numpy arrays.

    Arguments and errors are those of `import_torch_checkpoint`; hashes and the table are not looked at. `put`
    moves each array to where it shall be before the next is read, so that one at most is in memory twice.
    """
    path = Path(path)
    with open_checkpoint(path) as contents:
        try:
            network = find_network(contents)
            architecture, module = _match(network, architecture, num_classes)
            check_copies(network)
            return Checkpoint(
                variables=_read_tensors(network.tensors, module, put),
                architecture=architecture,
                num_classes=module.num_classes,
                mean=network.mean,
                std=network.std,
                claims=network.claims,
                format=contents.format,
                stubs=contents.stubs,
                wrapping=network.wrapping,
                metadata=parse_metadata(contents.metadata),
            )
        except CheckpointError as error:
            if str(error).startswith(f"{path}: "):
                raise
            raise CheckpointError(f"{path}: {error}") from error


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
        num_batches_tracked, in torchvision's order.

    Raises:
        ValueError: `path` is a folder.
    """
    tensors = torch_tensors(model.module, model.variables)
    if path is not None:
        _write(tensors, model.spec, Path(path).absolute())
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


def _write(tensors: dict[str, np.ndarray], spec: ModelSpec, path: Path) -> None:
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file, such as {path / 'model.safetensors'}")
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new{os.getpid()}")
    try:
        new.write_bytes(safetensors.numpy.save(tensors, make_metadata(spec)))
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def _match(network: Network, architecture: str | None, num_classes: int | None) -> tuple[str, ResNet]:
    """The architecture that the tensors fit, with its module; or the whole difference."""
    name = architecture or infer_architecture(network.tensors)
    head = network.tensors.get("fc.weight")
    size = head.shape[0] if head is not None and len(head.shape) == 2 else 0
    module = create_module(name, num_classes=num_classes or size or 1000)
    problems = misfits(network.tensors, network.strays, module)
    if not problems:
        return name, module
    if architecture:
        try:
            problems.append(f"they look like those of {infer_architecture(network.tensors)}")
        except CheckpointError as error:
            problems.append(str(error))
    raise CheckpointError(
        f"the weights do not fit {name} with {module.num_classes} classes: {'; '.join(problems)}"
    )


def _read_tensors(
    tensors: dict[str, Tensor], module: ResNet, put: Callable[[np.ndarray], Any]
) -> dict[str, Any]:
    variables: dict[str, Any] = {}
    for name, entry in layout(module).items():
        tensor = tensors[name]
        if not tensor.dtype.startswith(("float", "bfloat")):
            raise CheckpointError(
                f"{name} is {tensor.dtype}, no float: save the network before it is quantised"
            )
        with np.errstate(over="ignore"):
            array = tensor.read().astype(np.float32, copy=False)
        if not np.isfinite(array).all():
            raise CheckpointError(f"{name} holds {'NaN' if np.isnan(array).any() else 'infinity'}")
        if entry.path[-1] == "kernel":
            array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
        folder = variables
        for key in entry.path[:-1]:
            folder = folder.setdefault(key, {})
        folder[entry.path[-1]] = put(array)
    return variables


def _image_size(found: Checkpoint, known: KnownModel | None, module: ResNet) -> int:
    if found.metadata or known:
        return (found.metadata or known).image_size
    return 32 if module.cifar_stem else 224


def _to_jax(array: np.ndarray) -> jax.Array:
    """Copies it to the default device; on a CPU only once, as XLA takes over memory aligned to 64 bytes."""
    memory = np.empty(array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    aligned = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    aligned[...] = array
    return jax.device_put(aligned)


def _check_arguments(mean: Any, std: Any, norm: str | None, eps: float | None, sha256: str | None) -> None:
    if (mean is None) != (std is None):
        raise ValueError("pass both mean= and std=, or neither")
    if mean is not None:
        check_normalisation(mean, std)
    check_threat_model(norm, eps)
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{8,64}", sha256):
        raise ValueError(f"sha256={sha256!r} must be 8 to 64 hexadecimal digits")


def _check_hash(path: Path, actual: str, asked: str | None, known: KnownModel | None) -> None:
    """Compares the file with what was asked for or, failing that, with what its name promises."""
    torchvision = re.search(r"-([0-9a-f]{8})\.pth$", path.name)
    if asked:
        expected, where = asked.lower(), "the right place"
    elif known and known.sha256:
        expected, where = known.sha256, known.source
    elif torchvision:
        expected, where = torchvision[1], "its publisher"
    else:
        return
    if not actual.startswith(expected):
        raise CheckpointError(
            f"{path} is not the published file: its SHA-256 starts with {actual[:8]}, published is "
            f"{expected[:8]}: download it again from {where}, or pass sha256= if another file is meant"
        )


def _choose_normalisation(
    path: Path, mean: Any, std: Any, found: Checkpoint, known: KnownModel | None, module: ResNet
) -> tuple[tuple[float, ...], tuple[float, ...], str]:
    """(mean, std, where they come from)."""
    imagenet = (None, None) if module.cifar_stem else (IMAGENET_MEAN, IMAGENET_STD)
    options = {
        "argument": (mean, std),
        "file": (found.mean, found.std),
        "metadata": (found.metadata.mean, found.metadata.std) if found.metadata else (None, None),
        "table": (known.mean, known.std) if known else (None, None),
        "ImageNet": imagenet,
    }
    for origin, (m, s) in options.items():
        if m is not None and s is not None:
            try:
                check_normalisation(m, s)
            except ValueError as error:
                raise CheckpointError(f"{path}: {error}: pass mean= and std=") from error
            return tuple(map(float, m)), tuple(map(float, s)), origin
    raise CheckpointError(f"{path} does not say how its images are normalised: pass mean= and std=")


def _choose_threat_model(
    norm: str | None, eps: float | None, found: Checkpoint, known: KnownModel | None
) -> tuple[str, float, str]:
    """(norm, eps, where they come from)."""
    if norm is not None:
        return norm, float(eps or 0), "argument"
    if found.metadata:
        return found.metadata.norm, found.metadata.eps, "metadata"
    if known:
        return known.norm, known.eps, "table"
    return "none", 0.0, "unknown"
