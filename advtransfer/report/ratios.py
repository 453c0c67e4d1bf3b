"""Images and epochs needed: by what factor a robust source needs fewer to be as accurate as the natural one.

A source's curve is its mean test accuracy over seeds against log n (or log epoch), made non-decreasing by
least squares (isotonic regression, min-max formula: Barlow et al. 1972) and joined by straight lines. Read
the other way round it says how many images an accuracy takes: where the curve first reaches it. The factor
at an accuracy is what the natural source needs over what the robust one needs. One factor for a whole curve
is the mean of its logarithm over the accuracies that both curves reach (Bjøntegaard's delta rate, VCEG-M33,
2001). Nothing is extrapolated: where the robust source is better with its fewest images already, the factor
is "at least" the one to these; where it never gets there, "not reached": less than the one to its most.

Intervals are percentiles over 2,000 resamples of the seeds, with levels widened for few seeds (Hesterberg
2015, The American Statistician 69(4)); under six seeds, whose resamples are too few for that, Student's t
times the resamples' standard deviation, on the logarithm. A seed is resampled with all that belongs to it:
both sources, every n. Seeds that are there at other n, or for one source only, are resampled among their
like, so a point with a single seed adds nothing to the interval.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import scipy
from jaxtyping import Float64

from advtransfer.report.statistics import Results, SeedTable, seed_tables

if TYPE_CHECKING:
    from pandas import DataFrame

RATIO_COLUMNS = (
    *("quantity", "source", "target", "num_unfrozen_blocks", "num_train_images", "epoch", "accuracy"),
    *("factor", "ci95_low", "ci95_high", "num_seeds", "bound"),
)
NUM_RESAMPLES = 2000
_FEW_SEEDS = 6  # 5 seeds have 126 different resamples
_MOST_POINTS = 24  # of a curve; of more, so many are taken, evenly spread


class Factor(NamedTuple):
    """How many times fewer: `low` and `high` end its 95 % interval (0 and inf: no end, NaN: no interval)."""

    value: float
    low: float
    high: float
    bound: str = ""


class Comparison(NamedTuple):
    """One robust curve against the natural one: at the natural one's points, and over the whole curve."""

    places: Float64[np.ndarray, " m"]  # the natural source's n, or epochs
    accuracies: Float64[np.ndarray, " m"]
    factors: list[Factor]
    whole: Factor
    num_seeds: int  # of the source that has fewer


def ratios(results: Results) -> DataFrame:
    """The table of `RATIO_COLUMNS`: per robust source, target and k a row for every point of the natural
    source's curve, and one for the curve as a whole; targets without a single natural source have none.

    `quantity` is images or epochs; `num_train_images` or `epoch` the point, where the natural source has
    `accuracy` (these are empty for the curve as a whole, but for the n of epochs); `factor` how many times
    fewer the robust source needs; `bound` empty, "at least" or "not reached".
    """
    import pandas as pd

    found = []
    place = ("target", "num_unfrozen_blocks", "source")
    by_images = seed_tables(results.last, place, "num_train_images")
    curves = {(*key, None): curve for key, curve in by_images.items()}
    curves |= seed_tables(results.trials, (*place, "num_train_images"), "epoch")
    for target in results.targets:
        natural = results.natural(target)
        if len(natural) != 1:
            continue
        for blocks, name in itertools.product(results.blocks(target), results.robust(target)):
            here = {"source": name, "target": target, "num_unfrozen_blocks": blocks}
            for size in (None, *results.sizes(target)):
                base, mine = (curves.get((target, blocks, source, size)) for source in (natural[0], name))
                compared = compare(base, mine) if base and mine else None
                if compared and size is None:
                    found += _records(compared, here | {"quantity": "images"}, "num_train_images")
                elif compared:
                    epochs = {"quantity": "epochs", "num_train_images": size}
                    found += _records(compared, here | epochs, "epoch")
    return pd.DataFrame(found, columns=RATIO_COLUMNS, dtype=object)


def compare(natural: SeedTable, robust: SeedTable) -> Comparison | None:
    """By what factor `robust` needs fewer to reach the accuracies of `natural`; None if there is no curve."""
    seeds = np.union1d(natural.seeds, robust.seeds)
    (x, ours), (z, theirs) = (_points(curve, seeds) for curve in (natural, robust))
    if len(x) < 2 or len(z) < 2:
        return None
    there = np.isfinite(np.hstack([ours, theirs]))
    weights = _resamples(tuple(np.unique(there, axis=0, return_inverse=True)[1].ravel().tolist()))
    base, mine = _rising(ours, weights), _rising(theirs, weights)
    log_x, log_z = np.log(x), np.log(z)
    num_seeds = min(len(natural.seeds), len(robust.seeds))
    shifts = _first_reach(log_x, base, base) - _first_reach(log_z, mine, base)
    factors = [
        _factor(shift, num_seeds, least=at - log_z[0], most=at - log_z[-1])
        for shift, at in zip(shifts.T, log_x, strict=True)
    ]
    shift = _mean_shift(log_x, base, log_z, mine)
    whole = _factor(shift, num_seeds, least=log_x[-1] - log_z[0], most=log_x[0] - log_z[-1])
    return Comparison(x, base[0], factors, whole, num_seeds)


def _records(compared: Comparison, place: dict[str, Any], axis: str) -> list[dict[str, Any]]:
    levels = [
        {axis: int(x), "accuracy": y}
        for x, y in zip(compared.places, compared.accuracies.tolist(), strict=True)
    ]
    return [
        place
        | level
        | dict(zip(RATIO_COLUMNS[7:], (*factor[:3], compared.num_seeds, factor.bound), strict=True))
        for level, factor in zip([*levels, {}], [*compared.factors, compared.whole], strict=True)
    ]


def _points(curve: SeedTable, seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The positive places of a curve where anything was measured [m], and its accuracies [seeds, m]."""
    table = np.full((len(seeds), len(curve.places)), np.nan)
    table[np.searchsorted(seeds, curve.seeds)] = curve.values
    known = np.flatnonzero((curve.places > 0) & np.isfinite(table).any(axis=0))
    if len(known) > _MOST_POINTS:
        known = known[np.unique(np.linspace(0, len(known) - 1, _MOST_POINTS).round().astype(int))]
    return curve.places[known].astype(float), table[:, known]


@functools.lru_cache(maxsize=64)
def _resamples(strata: tuple[int, ...]) -> np.ndarray:
    """How often each seed is drawn within its stratum, [1 + resamples, seeds]; first the sample itself."""
    rng = np.random.default_rng(0)
    weights = np.ones((1 + NUM_RESAMPLES, len(strata)))
    for stratum in sorted(set(strata)):
        members = [i for i, s in enumerate(strata) if s == stratum]
        weights[1:, members] = rng.multinomial(len(members), [1 / len(members)] * len(members), NUM_RESAMPLES)
    return weights


def _rising(table: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Means over the weighted seeds [resamples, m], made non-decreasing by least squares."""
    there = np.isfinite(table)
    counts = there.sum(0)  # the same in every resample, because strata are by what is there
    totals = np.cumsum(np.pad(weights @ np.where(there, table, 0), ((0, 0), (1, 0))), axis=1, dtype=float)
    counts = np.cumsum(np.pad(counts, (1, 0)), dtype=float)
    best = np.full((len(weights), table.shape[1]), -np.inf)
    for j in range(table.shape[1]):  # max over j <= i of min over l >= i of the mean of points j..l
        means = (totals[:, j + 1 :] - totals[:, j, None]) / (counts[j + 1 :] - counts[j])
        least = np.minimum.accumulate(means[:, ::-1], axis=1)[:, ::-1]
        best[:, j:] = np.maximum(best[:, j:], least)
    return best


def _first_reach(x: np.ndarray, y: np.ndarray, level: np.ndarray) -> np.ndarray:
    """Where curves `y` [B, m] over `x` [m] first reach `level` [B, L]; -inf: before, inf: not at all."""
    rise = np.diff(y, axis=1)[:, None]
    above = level[:, :, None] - y[:, None, :-1]
    share = np.where(rise > 0, above / np.where(rise > 0, rise, 1), above > 0)
    at = x[0] + np.clip(share, 0, 1) @ np.diff(x)
    slack = 1e-12  # a curve reaches its own ends, rounding or not
    at = np.where(level < y[:, :1] - slack, -np.inf, at)
    return np.where(level > y[:, -1:] + slack, np.inf, at)


def _mean_shift(x: np.ndarray, base: np.ndarray, z: np.ndarray, mine: np.ndarray) -> np.ndarray:
    """Mean of x - z over the accuracies that both reach, [B]; infinite where one is better everywhere."""
    low = np.maximum(base[:, 0], mine[:, 0])[:, None]
    high = np.minimum(base[:, -1], mine[:, -1])[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        shift = (_area(x, base, low, high) - _area(z, mine, low, high)) / (high - low)[:, 0]
    ahead, behind = mine[:, 0] >= base[:, -1], mine[:, -1] <= base[:, 0]
    shift = np.where(high[:, 0] > low[:, 0], shift, np.nan)  # a flat curve has nothing to compare
    return np.where(ahead & ~behind, np.inf, np.where(behind & ~ahead, -np.inf, shift))


def _area(x: np.ndarray, y: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Integral of x over y from `low` to `high`, for curves [B, m] of straight lines."""
    start, end = y[:, :-1], y[:, 1:]
    rise = np.where(end > start, end - start, 1)
    a, b = np.clip(start, low, high), np.clip(end, low, high)
    middle = ((a + b) / 2 - start) / rise
    return ((b - a) * (x[:-1] + middle * np.diff(x))).sum(1)


def _factor(shifts: np.ndarray, num_seeds: int, *, least: float, most: float) -> Factor:
    """From log factors, the sample's first; `least` and `most`: to the ends of the robust curve."""
    shift, low, high = shifts[0], math.nan, math.nan
    if num_seeds > 1 and not math.isnan(shift):
        t = scipy.special.stdtrit(num_seeds - 1, 0.975) * math.sqrt(num_seeds / (num_seeds - 1))
        # What lies beyond an end of the robust curve is known on one side only, and a flat curve on neither.
        at_least = np.nan_to_num(shifts[1:], nan=-math.inf, posinf=least, neginf=-math.inf)
        at_most = np.nan_to_num(shifts[1:], nan=math.inf, posinf=math.inf, neginf=most)
        low = np.quantile(at_least, scipy.special.ndtr(-t), method="lower")
        high = np.quantile(at_most, scipy.special.ndtr(t), method="higher")
        if num_seeds < _FEW_SEEDS and np.isfinite(shifts).all():
            half = t * shifts[1:].std()
            low, high = shift - half, shift + half
    bound = {math.inf: "at least", -math.inf: "not reached"}.get(shift, "")
    shift = {math.inf: least, -math.inf: most}.get(shift, shift)
    return Factor(*(float(np.exp(value)) for value in (shift, low, high)), bound)
