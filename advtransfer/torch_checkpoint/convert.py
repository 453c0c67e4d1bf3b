"""PyTorch checkpoints to models, without PyTorch."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from advtransfer.models import IMAGENET_MEAN, IMAGENET_STD, Model, ModelSpec, ResNet, create_module
from advtransfer.torch_checkpoint.catalogue import KnownModel, find_known
from advtransfer.torch_checkpoint.hub import fetch
from advtransfer.torch_checkpoint.layout import infer_architecture, layout, misfits
from advtransfer.torch_checkpoint.metadata import (
    Metadata,
    check_normalisation,
    check_threat_model,
    parse_metadata,
)
from advtransfer.torch_checkpoint.reader import (
    CheckpointError,
    File,
    Tensor,
    check_format,
    file_sha256,
    open_file,
    read_contents,
)
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
    _check_arguments(mean, std, norm, eps, image_size, sha256)
    fetched = fetch(str(path)) if str(path).startswith("hf:") else None
    path, repo = (fetched.path, fetched.repo) if fetched else (Path(path), "")
    if blurred := re.search(r"resnet(aa|blur)[0-9]+", f"{repo}/{path.name}"):
        raise CheckpointError(f"{path}: {blurred[0]} blurs before it subsamples, which no ResNet here does")
    with open_file(path) as file:
        check_format(file)  # before all of it is read
        actual = file_sha256(file)
        _check_hash(path, actual, sha256, find_known(path.name, repo=repo))
        found = _read(file, architecture, num_classes, _to_jax)
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
    with open_file(path) as file:
        return _read(file, architecture, num_classes, put)


def _read(
    file: File, architecture: str | None, num_classes: int | None, put: Callable[[np.ndarray], Any]
) -> Checkpoint:
    contents = read_contents(file)
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
        if str(error).startswith(f"{file.path}: "):
            raise
        raise CheckpointError(f"{file.path}: {error}") from error


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
                f"{name} is {tensor.dtype}, no real float: save the network before it was converted"
            )
        with np.errstate(over="ignore"):
            array = tensor.read().astype(np.float32, copy=False)
        if not np.isfinite(array).all():
            raise CheckpointError(f"{name} holds {'NaN' if np.isnan(array).any() else 'infinity'}")
        if name.endswith(".running_var") and array.min(initial=0) < 0:
            raise CheckpointError(f"{name} holds a negative variance")
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


def _check_arguments(
    mean: Any, std: Any, norm: str | None, eps: float | None, image_size: int | None, sha256: str | None
) -> None:
    if (mean is None) != (std is None):
        raise ValueError("pass both mean= and std=, or neither")
    if mean is not None:
        check_normalisation(mean, std)
    check_threat_model(norm, eps)
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size={image_size} must be a positive number of pixels")
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{8,64}", sha256):
        raise ValueError(f"sha256={sha256!r} must be 8 to 64 hexadecimal digits")


def _check_hash(path: Path, actual: str, asked: str | None, known: KnownModel | None) -> None:
    """Compares the file with what was asked for or, failing that, with what is published under its name."""
    if asked:
        if not actual.startswith(asked.lower()):
            raise CheckpointError(f"{path} has the SHA-256 {actual}, not {asked} as asked for")
        return
    torchvision = re.search(r"-([0-9a-f]{8})\.pth$", path.name)
    expected = known and (known.sha256 or (torchvision and torchvision[1]))
    if expected and not actual.startswith(expected):
        raise CheckpointError(
            f"{path} is not the published file: its SHA-256 starts with {actual[:8]}, published is "
            f"{expected[:8]}: download it again from {known.source}, or pass sha256= if another file is meant"
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
                raise CheckpointError(f"{path}: {error}: import it with mean and std") from error
            return tuple(map(float, m)), tuple(map(float, s)), origin
    raise CheckpointError(f"{path} does not say how its images are normalised: import it with mean and std")


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
