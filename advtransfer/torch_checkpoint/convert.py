"""PyTorch checkpoints to models, without PyTorch."""

from __future__ import annotations

import logging
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
from advtransfer.torch_checkpoint.layout import brief, infer_architecture, is_inside, layout, misfits
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

_MAX_LEFT_OUT = 20  # entries
_log = logging.getLogger(__name__)


class Checkpoint(NamedTuple):
    """A network read from a file, and what the file says of it."""

    variables: dict[str, Any]  # {"params", "batch_stats"} of float32, as a `ResNet` has them
    architecture: str
    num_classes: int
    has_head: bool  # otherwise its head is of zeros and has one class
    left_out: tuple[str, ...]  # what stands beside it in the file: modules, and other networks
    unknown_normaliser: str  # the name of a tensor beside it that has one number a channel; "": none has
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
    weights: str | None = None,
    dtype: Any = None,
) -> Model:
    """Makes a model of the ResNet in a PyTorch file. PyTorch is not needed and no code of the file is run.

    What is not given is taken from the file or, for a file of a known name, from the table of known models.
    `spec.provenance` says where everything came from, and under "left_out" what of the file was not taken. A
    head that is not torchvision's `fc` is not: the model gets one of zeros with one class, "head" is
    "new" there, and `spec.has_head` is False. A transfer makes its own head anyway.

    Args:
        path: a zip (since 2020), legacy (before) or safetensors file, or hf:REPO/FILE[@revision].
        architecture: a key of `ARCHITECTURES` that it must be; None: told from the names and shapes.
        num_classes: what its head must have; None: whatever it has, if it has one.
        mean: per channel, of the normalisation of images in [0, 1]; None: that of the file or the table,
            otherwise ImageNet's for a network with a 7×7 stem.
        std: as `mean`; both or neither.
        norm: threat model of its training, none | l2 | linf; None: the table's, otherwise none.
        eps: its radius, pixel units (4 / 255 rather than 4).
        image_size: pixels; None: the table's, otherwise 224, or 32 for a network with a CIFAR stem.
        sha256: the file's, or at least its first eight digits; None: the table's, or the eight digits
            that torchvision puts into the file's name.
        weights: which of several networks in the file, such as "state_dict" or "student", by its key or its
            names' prefix; None: the only one, or that whose name says that it is an average (EMA).
        dtype: the type that the network computes in; None: float32.

    Returns:
        A model whose variables are float32, whatever type the file has.

    Raises:
        CheckpointError: no such file, a damaged one, one with another hash, or no network of the family, with
            the missing, unexpected and wrongly shaped names, or several that differ, with their names.
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
        found = _read(file, architecture, num_classes, _to_jax, weights or "")
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
        "weights": "argument" if weights else "file",
        "head": "file" if found.has_head else "new",
        "left_out": list(found.left_out),
        "claims": found.claims,
        "normalisation": normalisation,
        # Names and shapes do not tell strides, dilation, blurring or other activations.
        "forward_pass": "metadata" if metadata else "table" if known else "assumed",
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
        class_names=metadata.class_names if metadata and found.has_head else (),
        provenance=provenance,
    )
    remarks = [f"left out: {', '.join(found.left_out)}"] if found.left_out else []
    if not found.has_head:
        remarks.append(
            "no fc.weight and fc.bias that fit: a new head, cannot be evaluated, can be fine-tuned"
        )
    if remarks:
        _log.warning("%s: %s", path, "; ".join(remarks))
    module = module.clone(mean=mean, std=std, dtype=dtype or jnp.float32)
    return Model(module, found.variables, spec)


def read_variables(
    path: str | Path,
    architecture: str | None = None,
    num_classes: int | None = None,
    *,
    put: Callable[[np.ndarray], Any] = np.ascontiguousarray,
    weights: str = "",
) -> Checkpoint:
    """Reads the ResNet in a PyTorch file into numpy arrays.

    Arguments and errors are those of `import_torch_checkpoint`; hashes and the table are not looked at. `put`
    moves each array to where it shall be before the next is read, so that one at most is in memory twice.
    """
    with open_file(path) as file:
        return _read(file, architecture, num_classes, put, weights)


def _read(
    file: File,
    architecture: str | None,
    num_classes: int | None,
    put: Callable[[np.ndarray], Any],
    weights: str,
) -> Checkpoint:
    contents = read_contents(file)
    try:
        network = find_network(contents, weights)
        architecture, module, has_head = _match(network.tensors, architecture, num_classes)
        check_copies(network)
        beside = _beside(network, has_head)
        per_channel = [brief(n) for n, t in beside.items() if t.shape in ((3, 1, 1), (1, 3, 1, 1))]
        return Checkpoint(
            variables=_read_tensors(network.tensors, module, has_head, put),
            architecture=architecture,
            num_classes=module.num_classes,
            has_head=has_head,
            left_out=_left_out(network, beside),
            unknown_normaliser=per_channel[0] if per_channel and network.mean is None else "",
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


def _match(
    tensors: dict[str, Tensor], architecture: str | None, num_classes: int | None
) -> tuple[str, ResNet, bool]:
    """The architecture that the tensors fit, its module, and whether they have a head; or the difference."""
    name = architecture or infer_architecture(tensors)
    size = num_classes or _head_size(tensors)
    module = create_module(name, num_classes=size or 1)
    features = layout(module)["fc.weight"].shape[1]
    has_head = num_classes is not None or (size > 0 and tensors["fc.weight"].shape[1] == features)
    problems = misfits(tensors, module, head=has_head)
    if not problems:
        return name, module if has_head else module.clone(num_classes=1), has_head
    if has_head and not misfits(tensors, module, head=False):
        problems.append("without num_classes it is imported without a head")
    if architecture:
        try:
            problems.append(f"they look like those of {infer_architecture(tensors)}")
        except CheckpointError as error:
            problems.append(str(error))
    classes = f" with {size} classes" if size else ""
    raise CheckpointError(f"the weights do not fit {name}{classes}: {'; '.join(problems)}")


def _head_size(tensors: dict[str, Tensor]) -> int:
    """The classes of a head that is one linear layer with a bias; 0: there is none."""
    weight, bias = tensors.get("fc.weight"), tensors.get("fc.bias")
    is_linear = weight is not None and bias is not None and len(weight.shape) == 2
    return weight.shape[0] if is_linear and bias.shape == weight.shape[:1] else 0


def _beside(network: Network, has_head: bool) -> dict[str, Tensor]:
    """What stands in the state dict beside the network that is taken, by whole names."""
    head = ("fc.weight", "fc.bias") if has_head else ()
    behind = {network.prefix + n: t for n, t in network.tensors.items() if not is_inside(n) and n not in head}
    return behind | network.strays


def _left_out(network: Network, beside: dict[str, Tensor]) -> tuple[str, ...]:
    """The modules beside the network, by their first part that is none of its prefix, and other networks."""
    modules: dict[str, int] = {}
    prefix = network.prefix.split(".")[:-1]
    for name in beside:
        parts = name.split(".")
        shared = next((i for i, part in enumerate(prefix) if parts[i : i + 1] != [part]), len(prefix))
        module = ".".join(parts[: shared + 1])
        modules[module] = modules.get(module, 0) + 1
    tensors = [f"{brief(name)} ({n} tensor{'s' * (n > 1)})" for name, n in modules.items()]
    others = [f"the network under {wrapping}, which weights= can name" for wrapping in network.others]
    found = others + tensors
    more = [f"{len(found) - _MAX_LEFT_OUT} more"] if len(found) > _MAX_LEFT_OUT else []
    return (*found[:_MAX_LEFT_OUT], *more)


def _read_tensors(
    tensors: dict[str, Tensor], module: ResNet, has_head: bool, put: Callable[[np.ndarray], Any]
) -> dict[str, Any]:
    variables: dict[str, Any] = {}
    for name, entry in layout(module).items():
        if has_head or is_inside(name):
            array = _read_tensor(name, tensors[name])
        else:
            array = np.zeros(entry.shape, np.float32)
        if entry.path[-1] == "kernel":
            array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
        folder = variables
        for key in entry.path[:-1]:
            folder = folder.setdefault(key, {})
        folder[entry.path[-1]] = put(array)
    return variables


def _read_tensor(name: str, tensor: Tensor) -> np.ndarray:
    """A tensor as float32, of torch's shape."""
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
    return array


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
        if origin == "ImageNet" and found.unknown_normaliser:
            raise CheckpointError(
                f"{path}: {found.unknown_normaliser} has a number for each channel, which may normalise the "
                "images in an unknown way: import it with mean and std"
            )
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
