"""The tables of one target: few images, what is needed, the best k, all numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from advtransfer.report.sections import Entry, Part, Style, Table, Text
from advtransfer.report.statistics import FEW_IMAGES, PooledLead, Results
from advtransfer.report.words import (
    blocks_text,
    count,
    is_clear,
    k_text,
    listing,
    networks_text,
    points,
    sample_text,
)

if TYPE_CHECKING:
    from pandas import DataFrame


class Material(NamedTuple):
    """What was computed of the rows, and `shown`: the numbers of what is shown, by path of the CSV."""

    results: Results
    ratios: DataFrame
    styles: dict[str, Style]
    reference: str
    shown: dict[str, list[DataFrame]]

    def labels(self, names: Iterable[str]) -> list[str]:
        return [self.styles[name].label for name in names]

    @property
    def robust(self) -> list[str]:
        return [name for name, source in self.results.sources.items() if source.norm != "none"]

    def add(self, name: str, table: DataFrame) -> str:
        """Adds a figure's numbers below those of earlier targets; returns their path."""
        path = f"figures/{name}.csv"
        self.shown.setdefault(path, []).append(table)
        return path


def _cells(
    found: Mapping[Any, Any], key: Any, names: Iterable[str], show: Callable[[Any], Entry]
) -> list[Entry]:
    """What is found of a key and every source, shown; a dash where there is nothing."""
    return [show(found[key, name]) if (key, name) in found else Entry("–") for name in names]


def _marked(text: str, is_strong: bool, small: str) -> Entry:
    return Entry(strong=text, small=small) if is_strong else Entry(text, small=small)


def overview(material: Material) -> list[Table]:
    """Images and epochs needed on every target, for the fewest trained layers as in the headline."""
    rows = [
        [f"{target}, {quantity}", *cells]
        for target in material.results.targets
        for quantity in ("images", "epochs")
        for cells in list(_factors(material, target, quantity).values())[:1]
    ]
    fewest = sorted({blocks_text(material.results.blocks(target)[0]) for target in material.results.targets})
    caption = (
        "How many times fewer images and epochs than from the natural source, for the same accuracy "
        f"({', '.join(fewest)}; below 1 it is more), with the 95 % interval of a bootstrap over "
        f"{'networks and ' * material.results.is_crossed}seeds; bold: it excludes 1. "
        "“≥”: the robust source is better with its fewest than the natural one with its most; "
        "“not reached”: the other way round."
    )
    return [Table(caption, ["", *material.labels(material.robust)], rows, "ratios.csv")] if rows else []


def needed(material: Material, target: str, quantity: str) -> list[Table]:
    rows = [[blocks_text(k), *cells] for k, cells in _factors(material, target, quantity).items()]
    where = "" if quantity == "images" else f", fine-tuned on n = {material.results.epoch_size(target):,}"
    caption = (
        f"{quantity.capitalize()} needed{where}: how many times fewer than the natural source, for the same "
        f"accuracy on {target}, with its 95 % interval; bold: it excludes 1."
    )
    heads = ["Trained layers", *material.labels(material.robust)]
    return [Table(caption, heads, rows, "ratios.csv")] if rows else []  # notes() says why


def _factors(material: Material, target: str, quantity: str) -> dict[int, list[Entry]]:
    """By k: the factor over the whole curve for every robust source (epochs: at one n)."""
    table, size = material.ratios, material.results.epoch_size(target)
    table = table[(table["target"] == target) & (table["quantity"] == quantity) & table["accuracy"].isna()]
    table = table[table["num_train_images"].isin([size]) | table["num_train_images"].isna()]
    found = {(row.num_unfrozen_blocks, row.source): row for row in table.itertuples()}
    blocks = dict.fromkeys(k for k, _ in found)
    return {k: _cells(found, k, material.robust, factor_entry) for k in blocks}


def factor_entry(row: Any) -> Entry:
    """A row of `ratios` as a cell."""
    factor = f"{row.factor:.2f}×" if row.factor < 9.995 else f"{row.factor:.0f}×"
    if math.isnan(row.factor) or row.bound:
        return Entry({"at least": f"≥ {factor}", "not reached": "not reached"}.get(row.bound, "–"))
    if math.isnan(row.ci95_low):
        return Entry(factor, small="(1 seed)")
    low, high = (
        f"{end:.{0 if end >= 9.995 else 2}f}".replace("inf", "∞") for end in (row.ci95_low, row.ci95_high)
    )
    return _marked(factor, not row.ci95_low <= 1 <= row.ci95_high, f"({low} … {high})")


def few_images(material: Material, target: str) -> list[Table]:
    import pandas as pd

    pooled = {
        (p.num_unfrozen_blocks, p.source.name): p for p in material.results.pooled if p.target == target
    }
    if not pooled:
        return []

    def lead(p: PooledLead) -> Entry:
        if math.isnan(p.ci95):
            return Entry(points(p.delta), small="(1 seed)")
        ends = f"({points(p.delta - p.ci95)} … {points(p.delta + p.ci95)}, {sample_text(p)})"
        return _marked(points(p.delta), is_clear(p.delta, p.ci95), ends)

    columns = ("target", "num_unfrozen_blocks", "source", "delta", "ci95", "num_seeds", "sizes")
    records = [
        p._asdict() | {"source": p.source.name, "sizes": " ".join(map(str, p.sizes))} for p in pooled.values()
    ]
    path = material.add("pooled_delta", pd.DataFrame(records, columns=columns))
    names = [name for name in material.results.robust(target) if any(name == n for _, n in pooled)]
    rows = [[blocks_text(k), *_cells(pooled, k, names, lead)] for k in dict.fromkeys(k for k, _ in pooled)]
    sizes = sorted({n for p in pooled.values() for n in p.sizes})
    some = ", where both sources have them" if any(len(p.sizes) < len(sizes) for p in pooled.values()) else ""
    few = "" if max(sizes) <= FEW_IMAGES else f" (the fewest there are; none is ≤ {FEW_IMAGES})"
    caption = (
        f"Lead over the natural source with few images, in points: mean per seed over n = {listing(sizes)}"
        f"{few}{some}, and its 95 % interval. Bold: the interval excludes zero."
    )
    return [Table(caption, ["Trained layers", *material.labels(names)], rows, path)]


def best_k(material: Material, target: str) -> list[Part]:
    best = material.results.best
    best = best[best["target"] == target]
    found = {(row.num_train_images, row.source): row for row in best.itertuples()}
    if not found:
        return []

    def cell(row: Any) -> Entry:
        others = ", ".join(k_text(int(k)) for k in row.tied.split())
        best = k_text(row.best) + (f" [or {others}]" if others else "")
        return _marked(best, not others, points(row.lead) + _plus_minus(row.lead_ci95))

    names = [name for name in material.results.by_name(target) if any(name == source for _, source in found)]
    rows = [[f"{n:,}", *_cells(found, n, names, cell)] for n in sorted({n for n, _ in found})]
    caption = (
        f"The k with the highest mean accuracy on {target} and its lead over the second, in points (95 % "
        "interval, paired by seed); in brackets every k whose difference to it includes zero. The best was "
        "picked after looking, so its lead is rather too large."
    )
    table = Table(caption, ["n", *material.labels(names)], rows, "best_k.csv")
    return [Text("Which k is best", "heading"), table]


def all_numbers(material: Material, target: str) -> list[Part]:
    results = material.results
    names = results.by_name(target)
    robust = results.robust(target) if len(results.natural(target)) == 1 else []
    summary = results.summary[results.summary["target"] == target]
    found = {((r.num_unfrozen_blocks, r.num_train_images), r.source): r for r in summary.itertuples()}
    most, fewest = int(summary["num_seeds"].max()), int(summary["num_seeds"].min())

    def accuracy(row: Any) -> Entry:
        if math.isnan(row.mean):
            return Entry("–")
        fewer = "" if row.num_seeds == most else f" [{row.num_seeds}]"
        return Entry(f"{100 * row.mean:.1f}", small=f"{_plus_minus(row.ci95)}{fewer}".strip())

    def lead(row: Any) -> Entry:
        small = _plus_minus(row.delta_ci95).strip()
        return _marked(points(row.delta), is_clear(row.delta, row.delta_ci95), small)

    rows: list[list[str | Entry]] = []
    for blocks in results.blocks(target):
        rows.append([blocks_text(blocks).capitalize()])
        for size in results.sizes(target):
            place = (blocks, size)
            cells = _cells(found, place, names, accuracy) + _cells(found, place, robust, lead)
            rows.append([f"{size:,}", *cells])
    caption = (
        f"Test accuracy on {target} in %: mean ± half-width of the 95 % interval over "
        f"{networks_text(results)}{count(most, 'seed')}"
        f"{', fewer where given in brackets' if fewest < most else ''}."
    )
    if robust:
        caption += " Differences are in points, paired by seed; bold: the interval excludes zero."
    heads = ["n", *material.labels(names), *(f"{label} − natural" for label in material.labels(robust))]
    return [Text("All numbers", "heading"), Table(caption, heads, rows, "summary.csv")]


def _plus_minus(half_width: float) -> str:
    return "" if math.isnan(half_width) else f" ± {100 * half_width:.1f}"
