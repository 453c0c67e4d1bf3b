"""Statistics of a study: means, intervals and differences to the natural source, paired by seed.

Every interval is Student's t at 95 % over m seeds (its half-width: t(0.975, m - 1) · s / √m); one
seed has none. The natural source is the one with `source_norm` "none"; where a target has several
or none, there is nothing to subtract and the differences stay NaN.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

SUMMARY_COLUMNS = (
    "source",
    "target",
    "num_train_images",
    "num_unfrozen_blocks",
    "mean",
    "ci95",
    "num_seeds",
    "delta",
    "delta_ci95",
)
CURVE_COLUMNS = (*SUMMARY_COLUMNS[:4], "epoch", *SUMMARY_COLUMNS[4:])
FEW_IMAGES = 100  # what the headline calls few: the regime of the paper's title claim


class Source(NamedTuple):
    """A source network: `norm` is none, l2 or linf, `eps` its radius in pixel units."""

    name: str
    norm: str
    eps: float

    @property
    def constraint(self) -> str:
        """As a reader writes it: "natural", "ℓ2 (ε = 0.5)", "ℓ∞ (ε = 4/255)"."""
        if self.norm == "none":
            return "natural"
        symbol = {"l2": "ℓ2", "linf": "ℓ∞"}.get(self.norm, self.norm)
        return symbol if math.isnan(self.eps) else f"{symbol} (ε = {format_eps(self.norm, self.eps)})"


class Cell(NamedTuple):
    """One point of the grid; its trials differ in seed."""

    source: str
    target: str
    num_train_images: int
    num_unfrozen_blocks: int


class Results(NamedTuple):
    """Rows, indexed: test accuracy by cell, seed and epoch (NaN where it was not measured)."""

    sources: dict[str, Source]
    accuracies: dict[Cell, dict[int, dict[int, float]]]
    by_target: dict[str, list[Source]]  # the sources that each target was reached from
    repeated: int  # how many (cell, seed, epoch) have more than one trial

    @property
    def targets(self) -> list[str]:
        return list(self.by_target)

    def blocks(self, target: str) -> list[int]:
        """The numbers of unfrozen blocks, fewest first; -1 means all of them."""
        found = {cell.num_unfrozen_blocks for cell in self.accuracies if cell.target == target}
        return sorted(found, key=_blocks_order)

    def sizes(self, target: str) -> list[int]:
        return sorted({cell.num_train_images for cell in self.accuracies if cell.target == target})

    def final(self, cell: Cell) -> dict[int, float]:
        """Each seed's accuracy at its last epoch; seeds that have none there are left out."""
        seeds = self.accuracies.get(cell, {})
        last = {seed: epochs[max(epochs)] for seed, epochs in seeds.items()}
        return {seed: value for seed, value in last.items() if not math.isnan(value)}

    def natural(self, target: str) -> list[str]:
        return [source.name for source in self.by_target[target] if source.norm == "none"]

    def by_name(self, target: str) -> list[str]:
        return [source.name for source in self.by_target[target]]

    def robust(self, target: str) -> list[str]:
        return [source.name for source in self.by_target[target] if source.norm != "none"]


class Pooled(NamedTuple):
    """A robust source's lead over the natural one where images are few; accuracies in [0, 1].

    Per seed, the difference is averaged over `sizes` first (one seed's subsets may be nested, so
    the sizes are not independent); `delta` and `ci95` are then taken over seeds.
    """

    source: Source
    target: str
    num_unfrozen_blocks: int
    sizes: tuple[int, ...]
    delta: float
    ci95: float
    num_seeds: int


def collect(rows: Iterable[Mapping[str, Any]]) -> Results:
    """Indexes rows as `read_rows` gives them; sources by norm (natural first), radius and name."""
    identities: dict[str, set[tuple[str, float]]] = {}
    trials: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        threat = (row["source_norm"], 0.0 if row["source_norm"] == "none" else row["source_eps"])
        identities.setdefault(row["source"], set()).add(threat)
        cell = (row["target"], row["num_train_images"], row["num_unfrozen_blocks"])
        place = (row["source"], threat, cell, row["seed"], row["epoch"])
        trials.setdefault(place, {})[row.get("trial_id", "")] = row["test_accuracy"]

    accuracies: dict[Cell, dict[int, dict[int, float]]] = {}
    told_apart = _told_apart(identities)
    found = {}
    for (name, threat, cell, seed, epoch), values in trials.items():
        if len(identities[name]) > 1:  # one name for several networks: tell them apart
            name = told_apart[name, threat]
        found[name] = Source(name, *threat)
        epochs = accuracies.setdefault(Cell(name, *cell), {}).setdefault(seed, {})
        epochs[epoch] = sum(values.values()) / len(values)
    order = {"none": 0, "l2": 1, "linf": 2}
    ranked = sorted(found.values(), key=lambda s: (order.get(s.norm, 3), s.norm, s.eps, s.name))
    reached = {(cell.target, cell.source) for cell in accuracies}
    by_target = {
        target: [source for source in ranked if (target, source.name) in reached]
        for target in sorted({target for target, _ in reached})
    }
    repeated = sum(len(values) > 1 for values in trials.values())
    return Results({source.name: source for source in ranked}, accuracies, by_target, repeated)


def _told_apart(identities: Mapping[str, set[tuple[str, float]]]) -> dict[tuple, str]:
    """Names of networks that share one, by this and the threat: with the constraint, and a number if another
    has that name."""
    names, taken = {}, set(identities)
    for name in sorted(identities):
        for threat in sorted(identities[name], key=str) if len(identities[name]) > 1 else ():
            told = f"{name}, {Source(name, *threat).constraint}"
            number = 1
            while told in taken:
                number += 1
                told = f"{name}, {Source(name, *threat).constraint} ({number})"
            taken.add(told)
            names[name, threat] = told
    return names


def mean_and_ci95(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval; the latter is NaN for one value, both for none."""
    x = np.asarray(values, np.float64)
    if len(x) < 2:
        return (float(x[0]) if len(x) else math.nan), math.nan
    half = stdtrit(len(x) - 1, 0.975) * x.std(ddof=1) / math.sqrt(len(x))
    return float(x.mean()), float(half)


def summarise(rows: Iterable[Mapping[str, Any]] | Results) -> list[dict[str, Any]]:
    """One dict of `SUMMARY_COLUMNS` per source, target, n and k.

    `mean` and `ci95` are over the last epoch of each seed; `delta` is this source minus the natural
    one, over the seeds that both have, and `delta_ci95` the half-width of its interval paired by
    seed. What cannot be computed is NaN (an empty cell in summary.csv).
    """
    results = rows if isinstance(rows, Results) else collect(rows)
    summary = []
    for cell in sorted(results.accuracies, key=functools.partial(_place, results)):
        final = results.final(cell)
        measures = (
            *mean_and_ci95(list(final.values())),
            len(final),
            *mean_and_ci95(list(_paired(results, cell).values())),
        )
        summary.append(dict(zip(SUMMARY_COLUMNS, (*cell, *measures), strict=True)))
    return summary


def curves(results: Results) -> list[dict[str, Any]]:
    """As `summarise`, but at every epoch: what is drawn against epochs, one dict of `CURVE_COLUMNS` each."""
    points = []
    for cell in sorted(results.accuracies, key=functools.partial(_place, results)):
        seeds = results.accuracies[cell]
        natural = results.natural(cell.target)
        robust = len(natural) == 1 and results.sources[cell.source].norm != "none"
        base = results.accuracies.get(cell._replace(source=natural[0]), {}) if robust else {}
        for epoch in sorted({epoch for epochs in seeds.values() for epoch in epochs}):
            mine, theirs = _at(seeds, epoch), _at(base, epoch)
            leads = [mine[seed] - theirs[seed] for seed in mine if seed in theirs]
            values = (*mean_and_ci95(list(mine.values())), len(mine), *mean_and_ci95(leads))
            points.append(dict(zip(CURVE_COLUMNS, (*cell, epoch, *values), strict=True)))
    return points


def _at(seeds: Mapping[int | str, Mapping[int, float]], epoch: int) -> dict[int | str, float]:
    """Accuracies measured at an epoch, by seed."""
    return {s: e[epoch] for s, e in seeds.items() if not math.isnan(e.get(epoch, math.nan))}


def _place(results: Results, cell: Cell) -> tuple[Any, ...]:
    """The order of tables: by target, k, n, then the sources as they are ranked."""
    rank = list(results.sources).index(cell.source)
    return cell.target, _blocks_order(cell.num_unfrozen_blocks), cell.num_train_images, rank


def pooled_deltas(results: Results, *, max_images: int = FEW_IMAGES) -> list[Pooled]:
    """For every target, k and robust source: its lead, pooled over all n <= `max_images`.

    Where a target has no such n, its smallest n stands alone. Only seeds that both sources have at
    every pooled n count; where that leaves fewer than two, the smallest n with pairs stands alone.
    """
    pooled = []
    for target in results.targets:
        sizes = [n for n in results.sizes(target) if n <= max_images] or results.sizes(target)[:1]
        for blocks in results.blocks(target):
            for name in results.robust(target):
                pairs = {n: _paired(results, Cell(name, target, n, blocks)) for n in sizes}
                pairs = {n: deltas for n, deltas in pairs.items() if deltas}
                if not pairs:
                    continue
                seeds = set.intersection(*map(set, pairs.values()))
                if len(seeds) < 2:
                    pairs = dict(list(pairs.items())[:1])
                    seeds = set(*pairs.values())
                per_seed = [np.mean([d[seed] for d in pairs.values()]) for seed in sorted(seeds, key=str)]
                delta, ci95 = mean_and_ci95(per_seed)
                source = results.sources[name]
                pooled.append(Pooled(source, target, blocks, tuple(pairs), delta, ci95, len(per_seed)))
    return pooled


def format_eps(norm: str, eps: float) -> str:
    """A radius as it is usually written: ℓ∞ in 255ths, unless the decimal is the shorter one."""
    decimal, steps = f"{eps:g}", f"{255 * eps:.4g}"
    return f"{steps}/255" if norm == "linf" and len(steps) + 4 < len(decimal) else decimal


def _paired(results: Results, cell: Cell) -> dict[int, float]:
    """By seed: this cell's accuracy minus the natural source's; empty where there is none."""
    natural = results.natural(cell.target)
    if len(natural) != 1 or results.sources[cell.source].norm == "none":
        return {}
    base = results.final(cell._replace(source=natural[0]))
    mine = results.final(cell)
    return {seed: mine[seed] - base[seed] for seed in sorted(mine.keys() & base.keys(), key=str)}


def _blocks_order(num_unfrozen_blocks: int) -> float:
    return math.inf if num_unfrozen_blocks < 0 else num_unfrozen_blocks
