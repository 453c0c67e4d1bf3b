"""The network inside a checkpoint: out of its wrappers, with its normaliser and what the file claims of it.

Training codes wrap a network in others before they save it: `module.` of DataParallel, `model.` of a
Sequential behind a normaliser, `module.attacker.model.` of MadryLab/robustness, which saves
every weight twice.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from advtransfer.torch_checkpoint.layout import brief, brief_list, name_other
from advtransfer.torch_checkpoint.reader import CheckpointError, Contents, Stub, Tensor

# Where codes keep the state dict, in the order in which they are tried: averaged weights come last.
_STATE_DICT_KEYS = (
    *("model", "state_dict", "model_state_dict", "net", "network", "weights", "params"),
    *("model_ema", "state_dict_ema", "ema_state_dict", "ema_model", "ema"),
)
# The buffers of normalisers, by the last part of their names.
_NORMALISERS = (("new_mean", "new_std"), ("mean", "std"), ("mu", "sigma"))
_PER_CHANNEL = ((3,), (3, 1, 1), (1, 3, 1, 1))
_COUNTERS = ("num_batches_tracked", "n_averaged")
_MAX_TENSORS, _MAX_COPIES, _MAX_CLAIMS = 10_000, 8, 64
_FIRST_BLOCK = "layer1.0.conv1.weight"


Normalisation = tuple[tuple[float, ...], ...]  # mean, std


class Network(NamedTuple):
    """A network's tensors, and what stands around them in the file."""

    tensors: dict[str, Tensor]  # by torchvision's names, without num_batches_tracked
    copies: dict[str, dict[str, Tensor]]  # of the network, by their prefixes; not compared with it yet
    strays: tuple[str, ...]  # whole names of the tensors that belong to nothing known
    mean: tuple[float, ...] | None  # from the normaliser's buffers
    std: tuple[float, ...] | None
    claims: dict[str, int | float]  # the numbers that stand beside the state dict: epoch, accuracies
    wrapping: str  # where the network was: the state dict's key, "/" and the prefix of the names


def find_network(contents: Contents) -> Network:
    """Finds the ResNet in what a file holds. No weight is read.

    Raises:
        CheckpointError: no state dict, or no ResNet in it.
    """
    key, state, prefixes = _find_state_dict(contents.tree)
    normalisers = _find_normalisers(state)
    known = {name for pair in normalisers for name in pair}
    beside = _find_values(contents.tree) if key else {}
    parts: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in prefixes}
    strays = []
    for name, tensor in state.items():
        if name in known or name.rpartition(".")[2] in _COUNTERS:
            continue
        prefix = max((p for p in prefixes if name.startswith(p)), key=len, default=None)
        if prefix is None:
            strays.append(name)
        else:
            parts[prefix][name[len(prefix) :]] = tensor
    mean, std = _read_normalisers(state, normalisers, beside)
    first, *others = prefixes
    return Network(
        tensors=_torchvision_names(parts[first]),
        copies={prefix: _torchvision_names(parts[prefix]) for prefix in others},
        strays=tuple(strays),
        mean=mean,
        std=std,
        claims=_claims(contents.tree, state),
        wrapping=brief("/".join(filter(None, (key, first)))) if key or first else "",
    )


def _find_state_dict(tree: Any) -> tuple[str, dict[str, Tensor], list[str]]:
    """Its key ("": the tree itself), its tensors, and the prefixes of its networks, the shortest first."""
    states = {"": tree}
    if isinstance(tree, dict):
        states |= {key: tree[key] for key in _STATE_DICT_KEYS if key in tree}
    found: dict[str, Tensor] = {}
    for key, state in states.items():
        if not isinstance(state, dict):
            continue
        tensors = {name: t for name, t in state.items() if isinstance(name, str) and isinstance(t, Tensor)}
        if len(tensors) > _MAX_TENSORS:
            raise CheckpointError(f"holds {len(tensors):,} tensors; at most {_MAX_TENSORS:,} are looked at")
        starts = [name.removesuffix(_FIRST_BLOCK) for name in tensors if name.endswith(_FIRST_BLOCK)]
        starts = [s for s in starts if (not s or s.endswith(".")) and s + "conv1.weight" in tensors]
        if len(starts) > _MAX_COPIES:
            raise CheckpointError(f"holds {len(starts)} networks: save one of them alone")
        if starts:
            _check_family(tensors, has_resnet=True)
            return key, tensors, sorted(starts, key=len)
        found = found or tensors
    if found:
        _check_family(found, has_resnet=False)
        raise CheckpointError(f"no ResNet was found: the first names are {brief_list(found)}")
    for stub in filter(lambda state: isinstance(state, Stub), states.values()):
        raise CheckpointError(
            f"holds a pickled {brief(stub.name)} object, not a state dict: load it in PyTorch and save its "
            f"weights alone, with torch.save(model.state_dict(), FILE)"
        )
    if not isinstance(tree, dict):
        raise CheckpointError(f"holds no state dict but a {type(tree).__name__}: save model.state_dict()")
    raise CheckpointError(
        f"no state dict was found: the top-level keys are {brief_list(map(str, tree)) or 'none'}"
    )


def _check_family(tensors: Mapping[str, Tensor], has_resnet: bool) -> None:
    if kind := name_other(tensors, has_resnet=has_resnet):
        raise CheckpointError(f"holds {kind}, which is no torchvision ResNet: only those can be imported")


def check_copies(network: Network) -> None:
    """Compares the copies of a network, which MadryLab/robustness saves for its attacker, with it.

    Raises:
        CheckpointError: one differs; the first differing name is in the message.
    """
    for prefix, copy in network.copies.items():
        for name in dict.fromkeys((*network.tensors, *copy)):
            a, b = network.tensors.get(name), copy.get(name)
            if a is None or b is None or not _equal(a, b):
                raise CheckpointError(
                    f"holds two networks, under {brief(network.wrapping)} and {brief(prefix)}, that differ "
                    f"in {brief(name)}: save one of them alone"
                )


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.same_memory(b):
        return True
    return (a.shape, a.dtype) == (b.shape, b.dtype) and np.array_equal(
        a.read().reshape(-1).view(np.uint8), b.read().reshape(-1).view(np.uint8)
    )


def _torchvision_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the shortcuts and the head of the CIFAR networks of MadryLab/robustness."""

    def rename(name: str) -> str:
        new = re.sub(r"^(layer\d+\.\d+)\.shortcut\.", r"\1.downsample.", name)
        new = re.sub(r"^linear\.", "fc.", new)
        return name if new in tensors else new

    return {rename(name): tensor for name, tensor in tensors.items()}


def _find_normalisers(tensors: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Names of means and of the standard deviations beside them."""
    pairs = []
    for name in tensors:
        start, dot, last = name.rpartition(".")
        for mean, std in _NORMALISERS:
            pair = name, start + dot + std
            if last == mean and all(n in tensors and tensors[n].shape in _PER_CHANNEL for n in pair):
                pairs.append(pair)
    return pairs


def _find_values(tree: Mapping[str, Any]) -> dict[Normalisation, str]:
    """Means and standard deviations that stand beside the state dict, as tensors or as lists."""
    found = {}
    for names in _NORMALISERS:
        values = tuple(_values(tree.get(name)) for name in names)
        if None not in values:
            found[values] = names[0]
    return found


def _values(value: Any) -> tuple[float, ...] | None:
    if isinstance(value, Tensor):
        return _channels(value) if value.shape in _PER_CHANNEL else None
    is_list = type(value) in (list, tuple) and len(value) == 3 and all(map(_is_number, value))
    return tuple(float(x) for x in value) if is_list and all(abs(x) < 2**53 for x in value) else None


def _read_normalisers(
    tensors: Mapping[str, Tensor], pairs: list[tuple[str, str]], beside: dict[Normalisation, str]
) -> Normalisation | tuple[None, None]:
    """(mean, std) of all, which must agree; (None, None) if there is none."""
    found = beside | {tuple(_channels(tensors[name]) for name in pair): pair[0] for pair in pairs}
    if len(found) > 1:
        raise CheckpointError(f"two normalisers differ: {brief_list(found.values())}")
    return next(iter(found), (None, None))


def _channels(tensor: Tensor) -> tuple[float, ...]:
    """The shortest decimals that round to the values: 0.485, not 0.48500001430511475."""
    if not tensor.dtype.startswith(("float", "bfloat")):
        raise CheckpointError(f"a normaliser is {tensor.dtype}, no float")
    with np.errstate(over="ignore"):
        return tuple(float(str(value)) for value in tensor.read().astype(np.float32).reshape(-1))


def _claims(tree: Mapping[Any, Any], state: Mapping[str, Tensor]) -> dict[str, int | float]:
    """The numbers at the top level, such as epoch and nat_prec1; one that cannot be told is left out."""
    candidates = [
        (key, value)
        for key, value in tree.items()
        if isinstance(key, str) and (_is_number(value) or (_is_scalar(value) and key not in state))
    ]
    claims: dict[str, int | float] = {}
    for key, value in candidates[:_MAX_CLAIMS]:
        if isinstance(value, Tensor):
            try:
                value = value.read().item()
            except CheckpointError:
                continue
        if _is_number(value) and abs(value) < 2**53:  # what JSON holds: no NaN either
            claims[key[:100]] = value
    return claims


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and math.prod(value.shape) == 1
