"""Finds the network in a checkpoint, its input normalisation, and numbers such as the accuracy.

Training code often wraps a network before saving it: `module.` in DataParallel, `model.` in a Sequential
after a normalisation layer, `module.attacker.model.` in MadryLab/robustness, which saves every weight twice,
`student` and `teacher` in self-distillation. Any dictionary in the file and any prefix of its names may
contain a network; one is chosen, and the other networks and tensors are listed.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from advtransfer.torch_checkpoint.layout import brief, brief_list, is_inside, name_other
from advtransfer.torch_reader import CheckpointError, Contents, Stub, Tensor

# Words in the names of networks with averaged weights, which are the ones to be evaluated.
_AVERAGED = re.compile(r"(?<![a-z])(ema|swa|averaged?|avg|shadow|teacher)(?![a-z])", re.IGNORECASE)
# The buffers of normalisation layers, by the last part of their names.
_NORMALISERS = (("new_mean", "new_std"), ("mean", "std"), ("mu", "sigma"))
_PER_CHANNEL = ((3,), (3, 1, 1), (1, 3, 1, 1))
_COUNTERS = ("num_batches_tracked", "n_averaged")
_MAX_TENSORS, _MAX_NETWORKS, _MAX_CLAIMS, _MAX_DEPTH = 10_000, 8, 64, 4
_FIRST_BLOCK = "layer1.0.conv1.weight"
_NUMBERED_BLOCK = re.compile(r"((?:.*\.)?)([0-9]{1,3})\.0\.conv1\.weight")


class Network(NamedTuple):
    """The tensors of a network, and the other contents of the file."""

    tensors: dict[str, Tensor]  # by torchvision's names, without num_batches_tracked
    copies: dict[str, dict[str, Tensor]]  # of the network, by wrapping; not yet compared with it
    others: tuple[str, ...]  # wrappings of the networks that were not chosen
    strays: dict[str, Tensor]  # by full name: tensors of the state dict that belong to no network
    mean: tuple[float, ...] | None  # from the buffers of a normalisation layer
    std: tuple[float, ...] | None
    claims: dict[str, int | float]  # numbers saved with the state dict: epoch, accuracies
    wrapping: str  # the place of the network: key of the state dict, "/", prefix of the names
    prefix: str


class _Candidate(NamedTuple):
    """A network in one of the state dicts of the file."""

    key: str  # of the state dict, "a/b" if nested; "": the top level
    prefix: str  # of the names
    tensors: dict[str, Tensor]  # by torchvision's names

    @property
    def wrapping(self) -> str:
        return "/".join(filter(None, (self.key, self.prefix)))

    @property
    def shown(self) -> str:
        return brief(self.wrapping or ".")


def find_network(contents: Contents, weights: str = "") -> Network:
    """Finds the ResNet in the contents of a file, without reading weights.

    Args:
        contents: of the file.
        weights: selects one of several networks by its wrapping ("." for none) or by parts of it between dots
            and slashes; "": averaged networks are preferred. If several match, the one with the shortest
            wrapping is chosen, and the others must be copies of it (see `check_copies`).

    Raises:
        CheckpointError: there is no state dict, no ResNet in it, or none that matches `weights`.
    """
    states = dict(_state_dicts(contents.tree))
    found = itertools.chain.from_iterable(_candidates(key, state) for key, state in states.items())
    candidates = list(itertools.islice(found, _MAX_NETWORKS + 1))
    if not candidates:
        raise CheckpointError(_nothing_found(contents.tree, states))
    if len(candidates) > _MAX_NETWORKS:
        raise CheckpointError(f"contains more than {_MAX_NETWORKS} networks: save only one of them")
    chosen, *copies = _choose(candidates, weights)
    _check_number(chosen.tensors)
    if kind := name_other(chosen.tensors, has_resnet=True):
        raise CheckpointError(_other_kind(kind))
    state, named = states[chosen.key], [id(candidate) for candidate in (chosen, *copies)]
    prefixes = tuple(candidate.prefix for candidate in candidates if candidate.key == chosen.key)
    mean, std = _normalisation(state, contents.tree if chosen.key else {})
    return Network(
        tensors=chosen.tensors,
        copies={copy.shown: copy.tensors for copy in copies},
        others=tuple(candidate.shown for candidate in candidates if id(candidate) not in named),
        strays={n: t for n, t in _weights(state).items() if not n.startswith(prefixes)},
        mean=mean,
        std=std,
        claims=_claims(contents.tree, state),
        wrapping=brief(chosen.wrapping) if chosen.wrapping else "",
        prefix=chosen.prefix,
    )


def _state_dicts(tree: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The tensors of every (nested) dictionary that contains any, by the path of keys to it."""
    level, seen = [("", tree)], set()
    for _ in range(_MAX_DEPTH):
        deeper = []
        for key, folder in level:
            if not isinstance(folder, dict) or id(folder) in seen:
                continue
            seen.add(id(folder))
            named = {n: x for n, x in folder.items() if isinstance(n, str)}
            if tensors := {n: x for n, x in named.items() if isinstance(x, Tensor)}:
                yield key, tensors
            start = key + "/" if key else ""
            deeper += [(start + n, x) for n, x in named.items() if isinstance(x, dict)]
        level = deeper


def _candidates(key: str, state: dict[str, Tensor]) -> list[_Candidate]:
    """The networks in a state dict; a tensor belongs to the network with the longest matching prefix."""
    renamings: dict[str, dict[str, str]] = {}  # prefix -> number of a child module -> torchvision's name
    tried: set[str] = set()
    for name in state:
        if name.endswith(_FIRST_BLOCK):
            prefix = name.removesuffix(_FIRST_BLOCK)
            if (not prefix or prefix.endswith(".")) and prefix + "conv1.weight" in state:
                renamings[prefix] = {}
        elif (match := _NUMBERED_BLOCK.fullmatch(name)) and match[1] not in tried:
            tried.add(match[1])
            if children := _numbered_children(state, match[1]):
                renamings[match[1]] = children
        if len(renamings) + len(tried) > 2 * _MAX_NETWORKS:  # each is a pass over all names
            break
    parts: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in renamings}
    if parts:
        for name, tensor in _weights(state).items():
            prefix = max((p for p in parts if name.startswith(p)), key=len, default=None)
            if prefix is not None:
                parts[prefix][name[len(prefix) :]] = tensor
    return [
        _Candidate(key, prefix, _torchvision_names(tensors, renamings[prefix]))
        for prefix, tensors in parts.items()
    ]


def _numbered_children(state: Mapping[str, Tensor], prefix: str) -> dict[str, str]:
    """Torchvision's names of the numbered children of a ResNet in a Sequential; {}: it is not one.

    `Sequential(*resnet.children())` numbers all children, including those without weights: 0 and 1 are the
    convolution and BatchNorm of the stem, 4 to 7 the stages.
    """
    names = [name[len(prefix) :].split(".") for name in state if name.startswith(prefix)]
    numbers = {int(first) for first, *_ in names if re.fullmatch("[0-9]{1,3}", first)}
    stages = [i for i in sorted(numbers) if f"{prefix}{i}.0.conv1.weight" in state]
    stem = [i for i in sorted(numbers) if i < stages[0]]
    if len(stem) != 2 or stages != list(range(stages[0], stages[0] + len(stages))):
        return {}
    conv, norm = (f"{prefix}{i}." for i in stem)
    if conv + "weight" not in state or norm + "running_mean" not in state:
        return {}
    names = ("conv1", "bn1", *(f"layer{i + 1}" for i in range(len(stages))))
    return dict(zip(map(str, (*stem, *stages)), names, strict=True))


def _weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without counters and normalisation layers."""
    normalisers = {name for pair in _find_normalisers(state) for name in pair}
    return {
        name: tensor
        for name, tensor in state.items()
        if name not in normalisers and name.rpartition(".")[2] not in _COUNTERS
    }


def _torchvision_names(tensors: Mapping[str, Tensor], children: Mapping[str, str]) -> dict[str, Tensor]:
    """Renames numbered children, and the shortcuts and head of MadryLab/robustness' CIFAR networks."""

    def rename(name: str) -> str:
        first, dot, rest = name.partition(".")
        new = children.get(first, first) + dot + rest
        new = re.sub(r"^(layer\d+\.\d+)\.shortcut\.", r"\1.downsample.", new)
        new = re.sub(r"^linear\.", "fc.", new)
        return name if new in tensors else new

    return {rename(name): tensor for name, tensor in tensors.items()}


def _choose(candidates: Sequence[_Candidate], weights: str) -> list[_Candidate]:
    """The selected network, followed by those that must be copies of it."""
    found = list(candidates)
    if weights:
        path = weights.strip("./").replace("/", ".")
        exact = [c for c in found if c.wrapping.strip("./").replace("/", ".") == path]
        found = exact or [c for c in found if f".{path}." in f".{c.wrapping.replace('/', '.')}."]
        if not found:
            raise CheckpointError(
                f"contains no network under {brief(weights)}: config.checkpoint.weights (weights=) can be "
                f"{brief_list((c.shown for c in candidates), quote=False)}"
            )
    else:
        # Averaged parameters without BatchNorm statistics are not a complete network.
        found = [c for c in found if "bn1.running_mean" in c.tensors] or found
        averaged = [c for c in found if _AVERAGED.search(c.wrapping)]
        shapes = {frozenset((n, t.shape) for n, t in c.tensors.items() if is_inside(n)) for c in found}
        if averaged and len(shapes) == 1:  # a teacher of another architecture is not an average
            found = averaged
    return sorted(found, key=lambda candidate: len(candidate.wrapping))


def _nothing_found(tree: Any, states: Mapping[str, dict[str, Tensor]]) -> str:
    """Describes the contents of a file without a ResNet."""
    for found in states.values():
        if any(tensor.shape for tensor in found.values()):
            _check_number(found)
            if kind := name_other(found, has_resnet=False):
                return _other_kind(kind)
            return f"no ResNet was found: the first names are {brief_list(found)}"
    values = (tree, *tree.values()) if isinstance(tree, dict) else (tree,)
    if stub := next((value for value in values if isinstance(value, Stub)), None):
        return (
            f"contains a pickled {brief(stub.name)} object, not a state dict: load it in PyTorch and save "
            "only its weights, with torch.save(model.state_dict(), FILE)"
        )
    if not isinstance(tree, dict):
        return f"contains a {type(tree).__name__}, not a state dict: save model.state_dict()"
    return f"no state dict was found: the top-level keys are {brief_list(map(str, tree)) or 'none'}"


def _check_number(tensors: Mapping[str, Tensor]) -> None:
    if len(tensors) > _MAX_TENSORS:
        raise CheckpointError(f"contains {len(tensors):,} tensors, more than the supported {_MAX_TENSORS:,}")


def _other_kind(kind: str) -> str:
    return f"contains {kind}: only torchvision's ResNets can be imported"


def check_copies(network: Network) -> None:
    """Raises a CheckpointError unless the copies in a file, as of MadryLab/robustness, are equal."""
    first = network.wrapping or "."
    for wrapping, copy in network.copies.items():
        for name in dict.fromkeys((*network.tensors, *copy)):
            a, b = network.tensors.get(name), copy.get(name)
            if a is None or b is None or not _equal(a, b):
                raise CheckpointError(
                    f"contains two networks, under {first} and {wrapping}, that differ in {brief(name)}: "
                    "select one with config.checkpoint.weights (weights=): "
                    f"{', '.join((first, *network.copies))}"
                )


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.same_memory(b):
        return True
    return (a.shape, a.dtype) == (b.shape, b.dtype) and np.array_equal(
        a.read().reshape(-1).view(np.uint8), b.read().reshape(-1).view(np.uint8)
    )


def _find_normalisers(tensors: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """The names of the mean and standard deviation of every normalisation layer."""
    pairs = []
    for name in tensors:
        start, dot, last = name.rpartition(".")
        for mean, std in _NORMALISERS:
            pair = name, start + dot + std
            if last == mean and all(n in tensors and tensors[n].shape in _PER_CHANNEL for n in pair):
                pairs.append(pair)
    return pairs


def _normalisation(
    state: Mapping[str, Tensor], siblings: Mapping[str, Any]
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """(mean, std) of the normalisation layers in the state dict and among its siblings, which must agree."""
    found: dict[tuple[tuple[float, ...], tuple[float, ...]], str] = {}
    for name, other in _NORMALISERS:
        mean, std = _values(siblings.get(name)), _values(siblings.get(other))
        if mean is not None and std is not None:
            found[mean, std] = name
    for name, other in _find_normalisers(state):
        found[_channels(state[name]), _channels(state[other])] = name
    if len(found) > 1:
        raise CheckpointError(f"two normalisations differ: {brief_list(found.values())}")
    return next(iter(found), (None, None))


def _values(value: Any) -> tuple[float, ...] | None:
    """The values of a tensor, list or tuple of one number per channel; None: it is something else."""
    if isinstance(value, Tensor):
        return _channels(value) if value.shape in _PER_CHANNEL else None
    is_list = type(value) in (list, tuple) and len(value) == 3 and all(map(_is_number, value))
    return tuple(float(x) for x in value) if is_list and all(abs(x) < 2**53 for x in value) else None


def _channels(tensor: Tensor) -> tuple[float, ...]:
    """The shortest decimals that round to the float32 values: 0.485, not 0.48500001430511475."""
    if not tensor.dtype.startswith(("float", "bfloat")):
        raise CheckpointError(f"the mean or std of the images has type {tensor.dtype}, not float")
    with np.errstate(over="ignore"):
        return tuple(float(str(value)) for value in tensor.read().astype(np.float32).reshape(-1))


def _claims(tree: Mapping[Any, Any], state: Mapping[str, Tensor]) -> dict[str, int | float]:
    """The readable numbers at the top level, such as epoch and nat_prec1."""

    def may_be(key: Any, value: Any) -> bool:
        is_scalar = isinstance(value, Tensor) and math.prod(value.shape) == 1 and key not in state
        return isinstance(key, str) and (is_scalar or _is_number(value))

    claims: dict[str, int | float] = {}
    for key, value in [pair for pair in tree.items() if may_be(*pair)][:_MAX_CLAIMS]:
        if isinstance(value, Tensor):
            try:
                value = value.read().item()
            except CheckpointError:
                continue
        if _is_number(value) and abs(value) < 2**53:  # exact in JSON, and not NaN
            claims[key[:100]] = value
    return claims


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
