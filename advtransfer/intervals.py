"""95 % intervals of a mean (Student's t) and of a share (Wilson)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy  # its submodules are imported when they are used

Numbers = float | np.number | np.ndarray  # one, or an array of them


def half_width(deviation: Any, number: Any) -> Any:
    """Of Student's t interval of a mean, t(0.975, m - 1) · s / √m, of numbers or arrays; NaN for m < 2."""
    return scipy.special.stdtrit(number - 1, 0.975) * deviation / np.sqrt(number)


def mean_and_ci95(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval; the latter is NaN for one value, both for none."""
    x = np.asarray(values, np.float64)
    if len(x) < 2:
        return (float(x[0]) if len(x) else math.nan), math.nan
    return float(x.mean()), float(half_width(x.std(ddof=1), len(x)))


def wilson(num_correct: Numbers, num_images: Numbers) -> tuple[Any, Any]:
    """The 95 % intervals of shares, numbers or arrays (Wilson, JASA 22, 1927); NaN of no images.

    Unlike ± 1.96 standard errors they stay within [0, 1], and have a width where all or none are correct.
    """
    correct, total = np.float64(num_correct), np.float64(num_images)
    with np.errstate(invalid="ignore", divide="ignore"):
        share, unit = correct / total, scipy.special.ndtri(0.975) ** 2 / total
        half = np.sqrt(unit * share * (1 - share) + unit**2 / 4)
        low, high = ((share + unit / 2 + side * half) / (1 + unit) for side in (-1, 1))
    # Exactly 0 and 1 at the ends, whatever the rounding.
    return np.where(share == 0, 0.0, low)[()], np.where(share == 1, 1.0, high)[()]


class Share(NamedTuple):
    """count / total with its 95 % interval by `wilson`; each a float64, or an array of one shape."""

    value: Any  # NaN where `total` is 0
    lower: Any
    upper: Any
    count: Any
    total: Any


def share(count: Numbers, total: Numbers) -> Share:
    """A share with its interval, which is from 0 to 1 where `total` is 0.

    Raises:
      ValueError: arrays of different shapes.
    """
    count, total = np.float64(count), np.float64(total)
    if np.shape(count) != np.shape(total):
        raise ValueError(f"count has the shape {np.shape(count)}, total {np.shape(total)}")
    low, high = wilson(count, total)
    value = np.where(total > 0, count / np.maximum(total, 1), np.nan)[()]
    return Share(value, np.nan_to_num(low), np.nan_to_num(high, nan=1.0), count, total)
