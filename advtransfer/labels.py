"""What labels are, checked in one place: integers, one for each image, that are classes."""

from __future__ import annotations

import numpy as np
from jax.core import Tracer
from jaxtyping import Integer

from advtransfer.arrays import AnyArray


def check_labels(
    labels: Integer[AnyArray, " n"], length: int, num_classes: int | None = None, *, name: str = "labels"
) -> None:
    """Raises a ValueError, of one line, unless labels are integers [length] in 0 ... num_classes - 1.

    Their values are looked at where they are known, so not inside of `jit`. Without a number of classes they
    must not be negative.
    """
    if not hasattr(labels, "dtype"):
        raise ValueError(f"{name} are of type {type(labels).__name__}: give an array of integers")
    if labels.shape != (length,):
        hint = ""
        if labels.shape == (length, 1):
            hint = f": give {name}[:, 0]"
        elif labels.ndim == 2 and len(labels) == length:
            hint = f": give {name}.argmax(-1)"
        raise ValueError(f"{name} have the shape {labels.shape}, not [{length}], one for each image{hint}")
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{name} are {labels.dtype}, not integers from 0 to C - 1")
    if isinstance(labels, Tracer) or not length:
        return
    values = np.asarray(labels)
    low, high = int(values.min()), int(values.max())
    if num_classes is None and low < 0:
        raise ValueError(f"{name} hold {low}: classes are numbered from 0 to C - 1")
    if num_classes is not None and (low < 0 or high >= num_classes):
        raise ValueError(
            f"{name} run from {low} to {high}; the network has {num_classes:,} classes, "
            f"whose labels are 0 to {num_classes - 1}"
        )
