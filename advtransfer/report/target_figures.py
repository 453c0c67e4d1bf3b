"""The figures of one target: accuracy and lead against n, epoch, k and constraint."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from advtransfer.foreign import file_name
from advtransfer.report import figures, reference
from advtransfer.report.sections import Axis, Panel, Plot, Series, SourceInfo, Style, Text
from advtransfer.report.statistics import in_order
from advtransfer.report.target_tables import Material
from advtransfer.report.words import blocks_text, k_text, listing, networks_text, span

if TYPE_CHECKING:
    from pandas import DataFrame


class _Kind(NamedTuple):
    """One thing to draw against: the columns that are a point's place, its panel and its line."""

    name: str
    noun: str
    label: str
    x: str
    panel: str
    line: str
    least: int  # fewer places than this are no figure


_N, _K = "num_train_images", "num_unfrozen_blocks"
_IMAGES = ("the number of labelled images", "labelled target images, n (logarithmic)")
_KINDS = (
    _Kind("n", *_IMAGES, _N, _K, "source", 1),
    _Kind("epoch", "epoch", "epoch (logarithmic)", "epoch", _K, "source", 2),
    _Kind("k", "k", "trained blocks, k", _K, _N, "source", 2),
    _Kind("constraint", "constraint", "source", "source", _N, _K, 3),
)


def target_figures(material: Material, target: str) -> Iterator[Text | Plot]:
    """Every figure of a target, or why it is left out."""
    for kind in _KINDS:
        table, where = _shown(material, target, kind)
        number = table[kind.x].nunique()
        if number < kind.least:
            sources = "there is one source" if number == 1 else f"there are {number} sources"
            few = {"epoch": "one epoch was evaluated", "k": "there is one k"}
            reason = few.get(kind.name, f"{sources}, which the figures above show")
            yield Text(f"Accuracy against {kind.noun} is left out: {reason}.", "muted")
        elif not table["mean"].notna().any():
            yield Text(f"Accuracy against {kind.noun} is left out: nothing was measured.", "muted")
        else:
            yield from _figure(material, target, kind, table.dropna(subset="mean"), where)
            if table["delta"].notna().any():
                yield from _figure(material, target, kind, table.dropna(subset="delta"), where, lead=True)


def _shown(material: Material, target: str, kind: _Kind) -> tuple[DataFrame, str]:
    """The rows of `summary` or `curves` in a figure, and its settings in words."""
    if kind.name == "epoch":
        size, table = material.results.epoch_size(target), material.results.curves
        table = table[(table["target"] == target) & (table[_N] == size)]
        return table, f", fine-tuned on n = {size:,} images"
    table, last = material.results.summary, material.results.last
    table = table[table["target"] == target]
    where = f" at each seed’s last epoch ({span(last.loc[last['target'] == target, 'epoch'])})"
    if kind.name == "n":
        return table, where
    sizes = material.results.sizes(target)
    few = [sizes[i] for i in sorted({round(part * (len(sizes) - 1) / 3) for part in range(4)})]
    return table[table[_N].isin(few)], f"{where}, n = {listing(few)}"


def _figure(
    material: Material, target: str, kind: _Kind, table: DataFrame, where: str, *, lead: bool = False
) -> Iterator[Text | Plot]:
    """One panel per k or n, with one vertical axis unless they are accuracies at several n."""
    name = f"{'delta' if lead else 'accuracy'}_vs_{kind.name}"
    y, half = ("delta", "delta_ci95") if lead else ("mean", "ci95")
    axis, places = _axis(material, kind, table)
    styles: Mapping[Any, Style] = material.styles
    ordered = in_order(table, (kind.panel, kind.line, kind.x), material.results.sources)
    if kind.line == _K:
        styles = figures.depth_styles({k: _depth(k) for k in in_order(table, [_K], {})[_K].unique().tolist()})
    panels: dict[int, list[Series]] = {}
    groups = ordered.groupby([kind.panel, kind.line], sort=False)
    for (value, line), part in groups:  # ty: ignore[not-iterable] (pandas says Hashable; it is a tuple)
        x = [places.index(at) for at in part[kind.x]] if axis.ticks else part[kind.x].tolist()
        panels.setdefault(value, []).append(Series(styles[line], x, part[y].tolist(), part[half].tolist()))
    behind = []
    if material.reference == "paper" and kind.name == "n" and reference.NUM_UNFROZEN_BLOCKS in panels:
        behind = published(material, target, places, lead=lead)

    drawn = []
    by_size = bool(axis.ticks)
    for value, series in panels.items():
        together = series if by_size and not lead else [*itertools.chain(*panels.values()), *behind]
        yrange = figures.value_range(together, lead=lead)
        title = f"n = {value:,}" if by_size else blocks_text(value).capitalize()
        ylabel = "Lead over the natural source, points" if lead else "Test accuracy, %"
        thin = behind if value == reference.NUM_UNFROZEN_BLOCKS else []
        ylabel += " (thin: published)" if thin else ""
        suffix = f"n{value}" if by_size else f"k{k_text(value)}"
        file = f"figures/{name}_{slug(material.results.targets, target)}_{suffix}.svg"
        zero = "natural" if lead else ""
        drawn.append(Panel(title, ylabel, axis, series, yrange, zero, thin, file))
    networks = networks_text(material.results)
    caption = _caption(target, where, networks + span(table["num_seeds"]), by_size, lead)
    if behind:
        caption += f" Thin lines with crosses: published numbers ({reference.CITATION}; k = 3, no interval)."
    yield Text(f"{'Lead over the natural source' if lead else 'Accuracy'} against {kind.noun}", "heading")
    yield Plot(caption, drawn, material.add(name, table))


def _axis(material: Material, kind: _Kind, table: DataFrame) -> tuple[Axis, list[Any]]:
    """The horizontal axis, and the values along it."""
    values = in_order(table, [kind.x], material.results.sources)[kind.x].unique().tolist()
    if kind.name in ("n", "epoch"):
        log = min(values) > 0
        return Axis(kind.label if log else kind.noun, log), values
    texts = (
        [re.sub(r" \(ε = (.*)\)", r" \1", label)[:14] for label in material.labels(values)]
        if kind.x == "source"
        else [_depth(k).removeprefix("k = ") for k in values]
    )
    return Axis(kind.label, ticks=texts, joined=kind.name == "k"), values


def _depth(blocks: int) -> str:
    return {0: "head", -1: "all"}.get(blocks, f"k = {blocks}")


def _caption(target: str, where: str, seeds: str, by_size: bool, lead: bool) -> str:
    line, band = ("Mark", "bar") if by_size else ("Line", "band")
    interval = f"{band}: 95 % interval (Student’s t) over {seeds} seeds"
    interval = "one seed, so no interval" if seeds == "1" else interval
    if lead:
        return (
            f"Test accuracy on {target}{where}, minus that of the natural source with the same seed, so on "
            f"the same images. {line}: mean; {interval}. Above the dashed line the robust source is ahead."
        )
    axes = " Every n has its own vertical axis." if by_size else ""
    return f"Test accuracy on {target}{where}. {line}: mean; {interval}.{axes}"


def published(material: Material, target: str, sizes: Sequence[int], *, lead: bool) -> list[Series]:
    """The paper's lines for this target within the range of the user's n; their numbers go to `shown`."""
    import pandas as pd

    lines = []
    base = reference.published_line(SourceInfo("", "none", 0.0), target)
    for name in material.results.robust(target) if lead else material.results.by_name(target):
        source = material.results.sources[name]
        line = reference.published_line(source, target)
        line = {n: y - base[n] if lead else y for n, y in line.items() if sizes[0] <= n <= sizes[-1]}
        if not line:
            continue
        if not lead:
            fixed = (name, target, reference.target_of(target), reference.column_of(source))
            columns = ("source", "target", "published_target", "published_column", _N, "mean")
            material.add("reference", pd.DataFrame([(*fixed, *at) for at in line.items()], columns=columns))
        lines.append(Series(material.styles[name], list(line), list(line.values()), [math.nan] * len(line)))
    return lines


def slug(targets: Sequence[str], target: str) -> str:
    """A target's name for a file name, which no other of the targets has."""
    taken: set[str] = set()
    return {name: file_name(name, taken) for name in targets}[target]
