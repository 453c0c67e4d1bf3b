"""95 % intervals of a mean (Student's t), also of two crossed levels of seeds, and of a share (Wilson)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy  # its submodules are imported when they are used
from jaxtyping import Float64, Integer

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


class Crossed(NamedTuple):
    """Finite values, each of one network (its source seed) on one subset (its seed)."""

    values: Float64[np.ndarray, " v"]
    source_seeds: Integer[np.ndarray, " v"]
    seeds: Integer[np.ndarray, " v"]


def crossed_mean_and_ci95(measured: Crossed, minus: Crossed | None = None) -> tuple[float, float, int]:
    """The mean over networks and subsets, the half-width of its 95 % interval, and the number of subsets.

    Every network is fine-tuned on the same subsets, so the two levels are crossed. The mean is that of the
    networks' means; with `minus`, less the same of other networks, on the subsets that both have. Its
    variance is summed over the levels: what a bootstrap of the level alone gives, times m / (m - 1), in
    closed form because the statistic is linear. As in the bootstrap of both levels (Owen, Annals of Applied
    Statistics 1(2), 2007), the noise of a single trial counts once for each level, so the interval is rather
    too wide. It is Student's t with Satterthwaite's degrees of freedom (Biometrics Bulletin 2(6), 1946):
    percentiles of a bootstrap are too narrow for few networks.

    Of 2,000 simulated studies with 20 subsets and standard deviations of 1.5 points for the network, 2 for
    the subset, 0.7 for the subset and the kind of network, 1.5 for the rest, the interval of a difference
    covered the truth in 94, 95, 97, 96 % with 2, 3, 5, 10 networks of each kind (99 % without an effect of
    the network), that of a mean in 89, 93, 95, 95 %. Student's t over the subsets of one pair of networks
    covered it in 37 %; percentiles of a bootstrap of networks, and of subsets within each, in 84 and 89 %
    with 3 and 5 networks, those of one of both levels, crossed, in 86 and 91 %.

    The interval is NaN for fewer than two subsets; one network has no spread and adds nothing to it.
    """
    if minus is not None:
        both = np.intersect1d(measured.seeds, minus.seeds)
        measured, minus = (
            Crossed(*(x[np.isin(table.seeds, both)] for x in table)) for table in (measured, minus)
        )
    subsets = np.unique(measured.seeds)
    if not len(subsets):
        return math.nan, math.nan, 0
    mean, added, levels = 0.0, np.zeros(len(subsets)), []
    for sign, table in ((1, measured), (-1, minus)):
        if table is None:
            continue
        _, network = np.unique(table.source_seeds, return_inverse=True)
        subset = np.searchsorted(subsets, table.seeds)
        number = np.bincount(network)
        means = np.bincount(network, table.values) / number
        rest = (table.values - means[network]) / number[network]
        mean += sign * means.mean()
        added += sign * np.bincount(subset, rest, len(subsets)) / len(means)
        levels.append((float(means.var()) / len(means), len(means)))
    levels.append((float((added**2).sum()), len(subsets)))
    half = half_width_of_levels(levels) if len(subsets) > 1 else math.nan
    return float(mean), half, len(subsets)


def half_width_of_levels(levels: Iterable[tuple[float, int]]) -> float:
    """Of Student's t interval with Satterthwaite's degrees of freedom, from the variance that a bootstrap of
    each level gives and the level's number of members, of which one adds nothing."""
    parts = [(variance * m / (m - 1), m - 1) for variance, m in levels if m > 1]
    total = sum(variance for variance, _ in parts)
    if not total:
        return 0.0
    freedom = total**2 / sum(variance**2 / own for variance, own in parts)
    return float(scipy.special.stdtrit(freedom, 0.975) * math.sqrt(total))


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
