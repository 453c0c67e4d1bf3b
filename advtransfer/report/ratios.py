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

Where a source was trained from several seeds, source seeds of both and the seeds of subsets are resampled
one level at a time, and the interval is that of `intervals.half_width_of_levels`, on the logarithm; where a
resample is beyond an end of the robust curve, widened percentiles over resamples of all levels at once. Of
600 simulated studies with 20 subsets, intervals of the whole curve's factor covered the truth in 94, 96, 95
and 95 % with 2, 3, 5 and 8 networks of each source, those of one network each in 37 to 42 %.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import scipy
from jaxtyping import Float64

from advtransfer.intervals import half_width_of_levels
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
    there = np.isfinite(np.hstack([*ours, *theirs]))
    strata = tuple(np.unique(there, axis=0, return_inverse=True)[1].ravel().tolist())
    networks = len(ours), len(theirs)
    crossed = max(networks) > 1
    weights = _crossed_resamples(strata, *networks) if crossed else [_resamples(strata)] * 2
    base, mine = (
        _rising(table.reshape(-1, table.shape[-1]), own)
        for table, own in zip((ours, theirs), weights, strict=True)
    )
    log_x, log_z = np.log(x), np.log(z)
    num_seeds = min(len(np.unique(curve.seeds)) for curve in (natural, robust))
    levels = (*networks, num_seeds) if crossed else ()
    shifts = _first_reach(log_x, base, base) - _first_reach(log_z, mine, base)
    factors = [
        _factor(shift, num_seeds, least=at - log_z[0], most=at - log_z[-1], levels=levels)
        for shift, at in zip(shifts.T, log_x, strict=True)
    ]
    shift = _mean_shift(log_x, base, log_z, mine)
    ends = {"least": log_x[-1] - log_z[0], "most": log_x[0] - log_z[-1]}
    whole = _factor(shift, num_seeds, **ends, levels=levels)
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
    """The positive places of a curve where every source seed was measured [m], and its accuracies [source
    seeds, seeds, m]."""
    own = np.zeros_like(curve.seeds) if curve.source_seeds is None else curve.source_seeds
    numbers, network = np.unique(own, return_inverse=True)
    table = np.full((len(numbers), len(seeds), len(curve.places)), np.nan)
    table[network, np.searchsorted(seeds, curve.seeds)] = curve.values
    known = np.flatnonzero((curve.places > 0) & np.isfinite(table).any(axis=1).all(axis=0))
    if len(known) > _MOST_POINTS:
        known = known[np.unique(np.linspace(0, len(known) - 1, _MOST_POINTS).round().astype(int))]
    return curve.places[known].astype(float), table[..., known]


@functools.lru_cache(maxsize=64)
def _resamples(strata: tuple[int, ...]) -> np.ndarray:
    """How often each seed is drawn within its stratum, [1 + resamples, seeds]; first the sample itself."""
    rng = np.random.default_rng(0)
    weights = np.ones((1 + NUM_RESAMPLES, len(strata)))
    for stratum in sorted(set(strata)):
        members = [i for i, s in enumerate(strata) if s == stratum]
        weights[1:, members] = rng.multinomial(len(members), [1 / len(members)] * len(members), NUM_RESAMPLES)
    return weights


@functools.lru_cache(maxsize=8)
def _crossed_resamples(
    strata: tuple[int, ...], num_natural: int, num_robust: int
) -> tuple[np.ndarray, np.ndarray]:
    """How often each pair of a source seed and a seed is drawn, for both sources [1 + resamples, pairs]:
    first the sample itself, then a quarter each with natural, robust and subset seeds alone drawn, then with
    all."""
    rng = np.random.default_rng(1)
    quarter = NUM_RESAMPLES // 4
    natural, robust, subsets = (
        np.ones((5, quarter, number)) for number in (num_natural, num_robust, len(strata))
    )
    for level, drawn in ((1, natural), (2, robust)):
        number = drawn.shape[-1]
        drawn[[level, 4]] = rng.multinomial(number, [1 / number] * number, (2, quarter))
    subsets[3:] = _resamples(strata)[1 : 1 + 2 * quarter].reshape(2, quarter, -1)
    natural, robust = (
        (drawn[..., None] * subsets[..., None, :]).reshape(5 * quarter, -1)[quarter - 1 :]
        for drawn in (natural, robust)
    )
    return natural, robust


def _rising(table: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Means over the weighted seeds [resamples, m], made non-decreasing by least squares."""
    there = np.isfinite(table)
    counts, totals = (
        np.cumsum(np.pad(weights @ values, ((0, 0), (1, 0))), axis=1, dtype=float)
        for values in (there, np.where(there, table, 0))  # something everywhere, because of the strata
    )
    best = np.full((len(weights), table.shape[1]), -np.inf)
    for j in range(table.shape[1]):  # max over j <= i of min over l >= i of the mean of points j..l
        means = (totals[:, j + 1 :] - totals[:, j, None]) / (counts[:, j + 1 :] - counts[:, j, None])
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


def _factor(
    shifts: np.ndarray, num_seeds: int, *, least: float, most: float, levels: tuple[int, ...] = ()
) -> Factor:
    """From log factors, the sample's first; `least` and `most`: to the ends of the robust curve; `levels`:
    how many there are of what `_crossed_resamples` draws."""
    shift, low, high = shifts[0], math.nan, math.nan
    if num_seeds > 1 and not math.isnan(shift):
        alone, drawn = np.split(shifts[1:], [-NUM_RESAMPLES // 4]) if levels else ((), shifts[1:])
        fewest = min((number for number in levels if number > 1), default=num_seeds)
        t = scipy.special.stdtrit(fewest - 1, 0.975) * math.sqrt(fewest / (fewest - 1))
        # What lies beyond an end of the robust curve is known on one side only, and a flat curve on neither.
        at_least = np.nan_to_num(drawn, nan=-math.inf, posinf=least, neginf=-math.inf)
        at_most = np.nan_to_num(drawn, nan=math.inf, posinf=math.inf, neginf=most)
        low = np.quantile(at_least, scipy.special.ndtr(-t), method="lower")
        high = np.quantile(at_most, scipy.special.ndtr(t), method="higher")
        if (levels or num_seeds < _FEW_SEEDS) and np.isfinite(shifts).all():
            half = t * drawn.std()
            if levels:
                spread = np.split(alone, 3)
                half = half_width_of_levels(zip((x.var() for x in spread), levels, strict=True))
            low, high = shift - half, shift + half
    bound = {math.inf: "at least", -math.inf: "not reached"}.get(shift, "")
    shift = {math.inf: least, -math.inf: most}.get(shift, shift)
    return Factor(*(float(np.exp(value)) for value in (shift, low, high)), bound)
