"""Import of PyTorch checkpoints as models, without PyTorch."""

from __future__ import annotations

import logging
import re
from collections import ChainMap, Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, SupportsFloat

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.typing import DTypeLike

from advtransfer.arrays import AnyArray, Variables
from advtransfer.models import IMAGENET_MEAN, IMAGENET_STD, Model, ModelSpec, ResNet, create_module
from advtransfer.models.bundle import check_spec
from advtransfer.norms import check_radius
from advtransfer.torch_checkpoint.catalogue import KnownModel, fetch, find_known
from advtransfer.torch_checkpoint.export import parse_metadata
from advtransfer.torch_checkpoint.layout import brief, infer_architecture, is_inside, layout, misfits
from advtransfer.torch_checkpoint.state_dict import Network, check_copies, find_network
from advtransfer.torch_reader import (
    CheckpointError,
    Contents,
    File,
    Tensor,
    file_format,
    open_file,
    read_contents,
)

_MAX_LEFT_OUT = 20  # entries
_IMAGENET: dict[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
_log = logging.getLogger(__name__)


class Checkpoint(NamedTuple):
    """A network read from a file, with the information that the file gives about it."""

    variables: Variables  # of `module`, float32
    architecture: str
    module: ResNet
    has_head: bool  # if False, the head is all zeros with one class
    left_out: tuple[str, ...]  # other modules and networks in the file
    unknown_normaliser: str  # an unrecognised tensor with one value per channel; "": none
    network: Network
    contents: Contents
    metadata: dict[str, Any]  # fields of the `ModelSpec` in files of `export_torch_state_dict`


def import_torch_checkpoint(
    path: str | Path,
    architecture: str | None = None,
    num_classes: int | None = None,
    mean: Iterable[SupportsFloat] | None = None,
    std: Iterable[SupportsFloat] | None = None,
    *,
    norm: str | None = None,
    eps: float | None = None,
    image_size: int | None = None,
    sha256: str | None = None,
    weights: str | None = None,
    dtype: DTypeLike | None = None,
) -> Model:
    """Imports the ResNet in a PyTorch file. Needs no PyTorch and runs no code from the file.

    What is not given is taken from the file or, if the file is a known one, from the table of known models.
    `spec.provenance` records the origin of each value and, under "left_out", the unused contents of the file.
    A head other than torchvision's `fc` is not imported: the model then has a head of zeros with one class,
    `spec.has_head` is False, and "head" is "new" in the provenance. A transfer replaces the head anyway.

    Args:
        path: a zip (since 2020), legacy (before) or safetensors file, or hf:REPO/FILE[@revision].
        architecture: a key of `ARCHITECTURES`; None: inferred from names and shapes.
        num_classes: required size of the head; None: that of the file, which may have no head.
        mean, std: per channel, for normalising images in [0, 1]; both or neither. Where nothing says them,
            ImageNet's if the network has a 7×7 stem.
        norm, eps: threat model of its training, none | l2 | linf, and its radius in pixel units (4 / 255
            rather than 4). Where nothing says them, none.
        image_size: pixels. Where nothing says it, 224, or 32 with a CIFAR stem.
        sha256: required hash of the file, or at least its first eight digits; None: that of the table, or the
            eight digits in the file names of torchvision.
        weights: which of several networks in the file, by its key or the prefix of its names, such as
            "state_dict" or "student"; None: the only one, or one that is named as an average (EMA).
        dtype: the type that the network computes in; None: float32. Its variables are float32 in any case.

    Raises:
        CheckpointError: the file does not exist, is damaged or has another hash; it contains no supported
            network (the message lists missing, unexpected and misshapen tensors), or several that differ.
        ValueError: inconsistent arguments, or an unknown architecture.
    """
    given = _check_arguments(mean, std, norm, eps, image_size, sha256)
    fetched = fetch(str(path)) if str(path).startswith("hf:") else None
    path, repo = (fetched.path, fetched.repo) if fetched else (Path(path), "")
    if blurred := re.search(r"resnet(aa|blur)[0-9]+", f"{repo}/{path.name}"):
        raise CheckpointError(f"{path}: {blurred[0]} blurs before subsampling, which is not supported")
    with open_file(path) as file:
        file_format(file)  # before the whole file is read for its hash
        actual = file.sha256()
        _check_hash(path.name, actual, sha256, find_known(path.name, repo=repo))
        found = read_network(file, architecture, num_classes, weights or "", put=_to_jax)
        known = find_known(path.name, actual, repo)
        if known and (known.architecture != found.architecture or known.sha256 not in ("", actual)):
            known = None  # an unrelated file of the same name
        provenance = {
            "file": path.name,
            "sha256": actual,
            "format": found.contents.format,
            "stubs": list(found.contents.stubs),
            "wrapping": found.network.wrapping,
            "weights": "argument" if weights else "file",
            "head": "file" if found.has_head else "new",
            "left_out": list(found.left_out),
            "claims": found.network.claims,
            # Strides, dilation, blurring and activations cannot be inferred from names and shapes.
            "forward_pass": "metadata" if found.metadata else "table" if known else "assumed",
        }
        if known:
            fields = ("dataset", "accuracy", "licence", "source")
            provenance["published"] = {field: getattr(known, field) for field in fields}
        if fetched:
            provenance["hub"] = {"repo": fetched.repo, "file": fetched.file, "revision": fetched.revision}
        spec = _make_spec(given, found, known, provenance)
    remarks = [f"left out: {', '.join(found.left_out)}"] if found.left_out else []
    if not found.has_head:
        remarks.append(
            "no matching fc.weight and fc.bias: with its new head the model can be fine-tuned, not evaluated"
        )
    if remarks:
        _log.warning("%s: %s", path, "; ".join(remarks))
    module = found.module.clone(mean=spec.mean, std=spec.std, dtype=dtype or jnp.float32)
    return Model(module, found.variables, spec)


def read_network(
    file: File,
    architecture: str | None = None,
    num_classes: int | None = None,
    weights: str = "",
    put: Callable[[np.ndarray], AnyArray] = np.ascontiguousarray,
) -> Checkpoint:
    """Reads the ResNet in an open file; arguments and errors are those of `import_torch_checkpoint`.

    Each array is passed through `put` before the next one is read, so at most one is in memory twice.
    """
    contents = read_contents(file)
    network = find_network(contents, weights)
    architecture, module, has_head = _match(network.tensors, architecture, num_classes)
    check_copies(network)
    head = ("fc.weight", "fc.bias") if has_head else ()
    unused = {network.prefix + n: t for n, t in network.tensors.items() if not is_inside(n) and n not in head}
    unused |= network.strays
    per_channel = [brief(n) for n, t in unused.items() if t.shape in ((3, 1, 1), (1, 3, 1, 1))]
    return Checkpoint(
        variables=_read_tensors(network.tensors, module, has_head, put),
        architecture=architecture,
        module=module,
        has_head=has_head,
        left_out=_left_out(network, unused),
        unknown_normaliser=per_channel[0] if per_channel and network.mean is None else "",
        network=network,
        contents=contents,
        metadata=parse_metadata(contents.metadata, architecture, module.num_classes, has_head),
    )


def _match(
    tensors: dict[str, Tensor], architecture: str | None, num_classes: int | None
) -> tuple[str, ResNet, bool]:
    """The architecture of the tensors, its module, and whether they include a head."""
    name = architecture or infer_architecture(tensors)
    size = num_classes or _head_size(tensors)
    module = create_module(name, num_classes=size or 1)
    has_head = num_classes is not None or (size > 0 and tensors["fc.weight"].shape[1] == module.num_features)
    problems = misfits(tensors, module, head=has_head)
    if not problems:
        return name, module if has_head else module.clone(num_classes=1), has_head
    if has_head and not misfits(tensors, module, head=False):
        problems.append("it can be imported without a head by leaving out num_classes")
    if architecture:
        try:
            problems.append(f"they match {infer_architecture(tensors)}")
        except CheckpointError as error:
            problems.append(str(error))
    classes = f" with {size} classes" if size else ""
    raise CheckpointError(f"the weights do not fit {name}{classes}: {'; '.join(problems)}")


def _head_size(tensors: dict[str, Tensor]) -> int:
    """The number of classes of a head that is one linear layer with bias; 0: no such head."""
    weight, bias = tensors.get("fc.weight"), tensors.get("fc.bias")
    is_linear = weight is not None and bias is not None and len(weight.shape) == 2
    return weight.shape[0] if is_linear and bias.shape == weight.shape[:1] else 0


def _left_out(network: Network, unused: dict[str, Tensor]) -> tuple[str, ...]:
    """The other networks, and the modules of `unused` by the first part of their names outside the prefix."""
    modules = Counter[str]()
    prefix = network.prefix.split(".")[:-1]
    for name in unused:
        parts = name.split(".")
        shared = next((i for i, part in enumerate(prefix) if parts[i : i + 1] != [part]), len(prefix))
        modules[".".join(parts[: shared + 1])] += 1
    tensors = [f"{brief(name)} ({n} tensor{'s' * (n > 1)})" for name, n in modules.items()]
    found = [f"the network under {wrapping} (selected by weights=)" for wrapping in network.others] + tensors
    more = [f"{len(found) - _MAX_LEFT_OUT} more"] if len(found) > _MAX_LEFT_OUT else []
    return (*found[:_MAX_LEFT_OUT], *more)


def _read_tensors(
    tensors: dict[str, Tensor], module: ResNet, has_head: bool, put: Callable[[np.ndarray], AnyArray]
) -> Variables:
    found = {}
    for name, entry in layout(module).items():
        if has_head or is_inside(name):
            array = _read_tensor(name, tensors[name])
        else:
            array = np.zeros(entry.shape, np.float32)
        if entry.path[-1] == "kernel":
            array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
        found[entry.path] = put(array)
    return unflatten_dict(found)


def _read_tensor(name: str, tensor: Tensor) -> np.ndarray:
    """The tensor as float32, in torch's layout."""
    if not tensor.dtype.startswith(("float", "bfloat")):
        raise CheckpointError(
            f"{name} has type {tensor.dtype}, not float: save the network before it is quantised"
        )
    with np.errstate(over="ignore"):
        array = tensor.read().astype(np.float32, copy=False)
    if not np.isfinite(array).all():
        raise CheckpointError(f"{name} contains {'NaN' if np.isnan(array).any() else 'infinity'}")
    if name.endswith(".running_var") and array.min(initial=0) < 0:
        raise CheckpointError(f"{name} contains a negative variance")
    return array


def _to_jax(array: np.ndarray) -> jax.Array:
    """Copies it to the default device; once on a CPU, where XLA adopts memory that is aligned to 64 bytes."""
    memory = np.empty(array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    aligned = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    aligned[...] = array
    return jax.device_put(aligned)


def _check_arguments(
    mean: Iterable[SupportsFloat] | None,
    std: Iterable[SupportsFloat] | None,
    norm: str | None,
    eps: float | None,
    image_size: int | None,
    sha256: str | None,
) -> dict[str, Any]:
    """The given fields of the `ModelSpec`, checked."""
    if (mean is None) != (std is None):
        raise ValueError("pass both mean= and std=, or neither")
    if norm is None and eps is not None:
        raise ValueError(f"eps={eps:g} needs norm='l2' or norm='linf'")
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{8,64}", sha256):
        raise ValueError(f"sha256={sha256!r} must be 8 to 64 hexadecimal digits")
    given: dict[str, Any] = {}
    if mean is not None and std is not None:
        given |= {"mean": tuple(map(float, mean)), "std": tuple(map(float, std))}
    if norm is not None:
        check_radius(norm, eps or 0)
        given |= {"norm": norm, "eps": float(eps or 0)}
    if image_size is not None:
        given["image_size"] = image_size
    fields: dict[str, Any] = {"image_size": 224, **_IMAGENET, **given}
    check_spec(ModelSpec("", 1, **fields))
    return given


def _check_hash(name: str, actual: str, asked: str | None, known: KnownModel | None) -> None:
    """Compares the file's hash with the requested one or, if there is none, with the published one."""
    if asked and not actual.startswith(asked.lower()):
        raise CheckpointError(f"its SHA-256 is {actual}, not {asked}")
    if asked or known is None:
        return
    torchvision = re.search(r"-([0-9a-f]{8})\.pth$", name)
    expected = known.sha256 or (torchvision and torchvision[1])
    if expected and not actual.startswith(expected):
        raise CheckpointError(
            f"it is not the published file: its SHA-256 starts with {actual[:8]}, not {expected[:8]}: "
            f"download it again from {known.source}, or pass sha256= to import a different file"
        )


def _make_spec(
    given: dict[str, Any], found: Checkpoint, known: KnownModel | None, provenance: dict[str, Any]
) -> ModelSpec:
    """The description of the model, each field from its first origin, which is added to the provenance."""
    network, table = found.network, ("mean", "std", "norm", "eps", "image_size")
    origins: dict[str, dict[str, Any]] = {
        "argument": given,
        "file": {} if network.mean is None else {"mean": network.mean, "std": network.std},
        "metadata": found.metadata,
        "table": {f: getattr(known, f) for f in table if getattr(known, f, None) is not None},
        "ImageNet": {} if found.module.cifar_stem or found.unknown_normaliser else _IMAGENET,
        "unknown": {"norm": "none", "eps": 0.0, "image_size": 32 if found.module.cifar_stem else 224},
    }

    def origin(field: str) -> str:
        return next((name for name, fields in origins.items() if field in fields), "")

    if not origin("mean"):
        problem = "the normalisation of the images is unknown"
        if found.unknown_normaliser:
            problem = f"{found.unknown_normaliser} has one value per channel and may normalise the images"
        raise CheckpointError(f"{problem}: import it with mean and std")
    provenance |= {"normalisation": origin("mean"), "threat_model": origin("norm")}
    fields = ChainMap(*origins.values())
    spec = ModelSpec(found.architecture, found.module.num_classes, **fields, provenance=provenance)
    try:
        check_spec(spec)
    except ValueError as error:
        raise CheckpointError(f"{error}: import it with mean and std") from error
    return spec
