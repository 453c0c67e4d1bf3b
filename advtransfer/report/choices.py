"""Which k is best for each n, and the user's accuracies in the layout of the paper's table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from advtransfer.report.reference import column_of
from advtransfer.report.summary import Cell, Results, mean_and_ci95

BEST_COLUMNS = (
    "source",
    "target",
    "num_train_images",
    "best",  # the k of the highest mean
    "mean",
    "ci95",
    "num_seeds",
    "second",
    "lead",  # of the best over the second, paired by seed
    "lead_ci95",
    "tied",  # every other k, over which the best's lead has an interval that includes zero, or none
)


def best_blocks(results: Results) -> list[dict[str, Any]]:
    """One dict of `BEST_COLUMNS` per source, target and n with at least two k; -1 means all blocks.

    The best is picked after looking, so its lead is, if anything, too large; each interval stands alone.
    """
    found = []
    for target in results.targets:
        for name in results.by_name(target):
            for size in results.sizes(target):
                cells = {k: Cell(name, target, size, k) for k in results.blocks(target)}
                finals = {k: results.final(cell) for k, cell in cells.items()}
                means = {k: mean_and_ci95(list(seeds.values())) for k, seeds in finals.items() if seeds}
                if len(means) < 2:
                    continue
                best, *others = sorted(means, key=lambda k: -means[k][0])
                leads = {k: _lead(finals[best], finals[k]) for k in others}
                tied = [k for k in others if not leads[k][0] > leads[k][1]]
                values = (
                    name,
                    target,
                    size,
                    best,
                    *means[best],
                    len(finals[best]),
                    others[0],
                    *leads[others[0]],
                )
                found.append(dict(zip(BEST_COLUMNS, (*values, " ".join(map(str, tied))), strict=True)))
    return found


def paper_tables(results: Results, summary: Iterable[Mapping[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """Per k, rows as in paper_summary_k3.csv: accuracies in %, one column per source.

    Sources of the paper's threats have its column names (0, 3, 4, 8) unless several have the same; the others
    have their own names, after "source " where that is another column's.
    """
    columns = {name: column_of(source) for name, source in results.sources.items()}
    shared = list(columns.values())
    names = {name: c for name, c in columns.items() if c and shared.count(c) == 1}
    taken = {"num_training_images", "target_ds", *names.values()}
    for name in [name for name in columns if name not in names]:
        names[name] = name
        while names[name] in taken:
            names[name] = f"source {names[name]}"
        taken.add(names[name])
    names = {name: names[name] for name in columns}
    tables: dict[int, dict[tuple[int, str], dict[str, Any]]] = {}
    for row in summary:
        place = {"num_training_images": row["num_train_images"], "target_ds": row["target"]}
        lines = tables.setdefault(row["num_unfrozen_blocks"], {})
        line = lines.setdefault(tuple(place.values()), place | dict.fromkeys(names.values()))
        line[names[row["source"]]] = 100 * row["mean"]
    return {k: [lines[place] for place in sorted(lines)] for k, lines in tables.items()}


def _lead(best: Mapping[Any, float], other: Mapping[Any, float]) -> tuple[float, float]:
    seeds = sorted(best.keys() & other.keys(), key=str)
    return mean_and_ci95([best[seed] - other[seed] for seed in seeds])
