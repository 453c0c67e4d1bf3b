"""What belongs to a model beside its weights, and how a safetensors file keeps it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

from advtransfer.models import ModelSpec
from advtransfer.torch_checkpoint.reader import CheckpointError

_KEY = "advtransfer"  # of the file's metadata: a JSON object with the fields of Metadata
_NORMS = ("none", "l2", "linf")


class Metadata(NamedTuple):
    """The fields of a `ModelSpec` that names and shapes of the weights do not tell."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    norm: str
    eps: float
    image_size: int
    class_names: tuple[str, ...]


def make_metadata(spec: ModelSpec) -> dict[str, str]:
    """The metadata of a safetensors file. "format": "pt" is what transformers and timm ask for."""
    fields = {field: getattr(spec, field) for field in Metadata._fields}
    return {"format": "pt", "architecture": spec.architecture, _KEY: json.dumps(fields, default=float)}


def parse_metadata(metadata: dict[str, str]) -> Metadata | None:
    """What `make_metadata` wrote; None: another program wrote the file.

    Raises:
        CheckpointError: it has been changed since.
    """
    if _KEY not in metadata:
        return None
    try:
        fields = json.loads(metadata[_KEY])
        found = Metadata(
            mean=tuple(float(v) for v in fields["mean"]),
            std=tuple(float(v) for v in fields["std"]),
            norm=str(fields["norm"]),
            eps=float(fields["eps"]),
            image_size=int(fields["image_size"]),
            class_names=tuple(str(name) for name in fields["class_names"]),
        )
        check_normalisation(found.mean, found.std)
        check_threat_model(found.norm, found.eps)
        if not 0 < found.image_size < 2**16:
            raise ValueError("image_size is no size")
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"its metadata are damaged ({type(error).__name__}): export it again"
        ) from error
    return found


def check_normalisation(mean: Sequence[float], std: Sequence[float]) -> None:
    """Raises a ValueError if these cannot normalise RGB images in [0, 1]."""
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(f"mean has {len(mean)} entries and std {len(std)}, not 3 each")
    if not all(0 <= m <= 1 for m in mean) or not all(0 < s < 256 for s in std):
        raise ValueError(f"mean {tuple(mean)} and std {tuple(std)} do not normalise images in [0, 1]")


def check_threat_model(norm: str | None, eps: float | None) -> None:
    """Raises a ValueError if norm (none | l2 | linf) and its radius in pixel units contradict each other."""
    if norm is None and eps is not None:
        raise ValueError(f"eps={eps:g} needs norm='l2' or norm='linf'")
    if norm is not None and norm not in _NORMS:
        raise ValueError(f"norm={norm!r} must be one of {', '.join(_NORMS)}")
    if norm == "none" and eps:
        raise ValueError(f"eps={eps:g} contradicts norm='none'")
    if norm in ("l2", "linf") and not (eps and 0 < eps < float("inf")):
        raise ValueError(f"norm={norm!r} needs eps, its radius in pixel units, such as 3.0 or 4 / 255")
