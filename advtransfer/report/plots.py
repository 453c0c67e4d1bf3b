"""The report's figures on one target: accuracy and lead against n, epoch, k and constraint."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from advtransfer.foreign import file_name
from advtransfer.report import figures, reference
from advtransfer.report.markup import image, listing, numbers_link, span
from advtransfer.report.rows import csv_text
from advtransfer.report.summary import CURVE_COLUMNS, FEW_IMAGES, SUMMARY_COLUMNS, Pooled, Results, Source
from advtransfer.report.words import blocks_text

Point = dict[str, Any]


class Material(NamedTuple):
    """What the sections are made from, and `files`: what they add beside the page, by path."""

    results: Results
    summary: list[Point]
    curves: list[Point]
    pooled: list[Pooled]
    ratios: list[Point]
    best: list[Point]
    styles: dict[str, figures.Style]
    reference: str
    files: dict[str, str | bytes]


class _Kind(NamedTuple):
    """One thing to draw against: the columns of a point that are its place, its panel and its line."""

    name: str
    noun: str
    label: str
    x: str
    panel: str
    line: str
    least: int  # fewer places than this are no figure


_N, _K = "num_train_images", "num_unfrozen_blocks"
_KINDS = (
    _Kind(
        "n", "the number of labelled images", "labelled target images, n (logarithmic)", _N, _K, "source", 1
    ),
    _Kind("epoch", "epoch", "epoch (logarithmic)", "epoch", _K, "source", 2),
    _Kind("k", "k", "trained blocks, k", _K, _N, "source", 2),
    _Kind("constraint", "constraint", "source", "source", _N, _K, 3),
)


def axis_figures(material: Material, target: str) -> Iterator[str]:
    """Every figure of a target, or why it is left out; their numbers go to `material.files`."""
    for kind in _KINDS:
        points, where = _points(material, target, kind)
        number = len({point[kind.x] for point in points})
        if number < kind.least:
            sources = "there is one source" if number == 1 else f"there are {number} sources"
            few = {"epoch": "one epoch was evaluated", "k": "there is one k"}
            reason = few.get(kind.name, f"{sources}, which the figures above show")
            yield f"<p class=caveat>Accuracy against {kind.noun} is left out: {reason}.</p>"
            continue
        yield _figure(material, target, kind, points, where)
        if any(not math.isnan(point["delta"]) for point in points):
            yield _figure(material, target, kind, points, where, lead=True)


def epoch_size(results: Results, target: str) -> int:
    """The n whose epochs are shown: of those with the most evaluated epochs the largest that is few."""
    epochs: dict[int, set[int]] = {}
    for cell, seeds in results.accuracies.items():
        if cell.target == target:
            epochs.setdefault(cell.num_train_images, set()).update(*seeds.values())
    most = max(map(len, epochs.values()))
    sizes = sorted(size for size, known in epochs.items() if len(known) == most)
    return max((size for size in sizes if size <= FEW_IMAGES), default=sizes[0])


def _points(material: Material, target: str, kind: _Kind) -> tuple[list[Point], str]:
    """What a figure shows, and the settings in words."""
    if kind.name == "epoch":
        size = epoch_size(material.results, target)
        points = [p for p in material.curves if (p["target"], p["num_train_images"]) == (target, size)]
        return points, f", fine-tuned on n = {size:,} images"
    points = [point for point in material.summary if point["target"] == target]
    cells = [seeds for cell, seeds in material.results.accuracies.items() if cell.target == target]
    last = sorted({max(epochs) for seeds in cells for epochs in seeds.values()})
    where = f" at each seed’s last epoch ({span(last)})"
    if kind.name == "n":
        return points, where
    sizes = material.results.sizes(target)
    shown = [sizes[i] for i in sorted({round(part * (len(sizes) - 1) / 3) for part in range(4)})]
    return [p for p in points if p["num_train_images"] in shown], f"{where}, n = {listing(shown)}"


def _figure(
    material: Material, target: str, kind: _Kind, points: list[Point], where: str, *, lead: bool = False
) -> str:
    """One panel per k or n, with its caption and its numbers as CSV."""
    y, half = ("delta", "delta_ci95") if lead else ("mean", "ci95")
    name = f"{'delta' if lead else 'accuracy'}_vs_{kind.name}"
    heading = f"{'Lead over the natural source' if lead else 'Accuracy'} against {kind.noun}"
    points = [point for point in points if not math.isnan(point[y])]
    if not points:
        return f"<p class=caveat>{escape(heading)} is left out: nothing was measured.</p>"
    add_numbers(material, name, points, CURVE_COLUMNS if kind.name == "epoch" else SUMMARY_COLUMNS)
    axis = _axis(material, kind, points)
    places = {value: place for place, value in enumerate(_ordered(material, kind.x, points))}
    styles: Mapping[Any, figures.Style] = material.styles
    if kind.line == "num_unfrozen_blocks":
        styles = figures.depth_styles({k: _depth(k) for k in _ordered(material, kind.line, points)})
    panels: dict[int, list[figures.Series]] = {}
    behind: dict[int, list[figures.Series]] = {}
    for value in _ordered(material, kind.panel, points):
        for line in _ordered(material, kind.line, points):
            here = [p for p in points if (p[kind.panel], p[kind.line]) == (value, line)]
            marks = sorted((places[p[kind.x]] if axis.ticks else p[kind.x], p[y], p[half]) for p in here)
            if marks:
                panels.setdefault(value, []).append(figures.Series(styles[line], *zip(*marks, strict=True)))
        if material.reference == "paper" and kind.name == "n" and value == reference.NUM_UNFROZEN_BLOCKS:
            behind[value] = list(_published(material, target, places, lead=lead))
    ylabel = "Lead over the natural source, points" if lead else "Test accuracy, %"
    drawn = _draw(material, target, name, axis, panels, behind, ylabel, zero="natural" if lead else "")
    caption = _caption(target, where, points, axis, lead=lead)
    if any(behind.values()):
        caption += f" Thin lines with crosses: published numbers ({reference.CITATION}; k = 3, no interval)."
    links = f"{numbers_link(name)} {numbers_link('reference', 'Published') if any(behind.values()) else ''}"
    return (
        f"<h3>{escape(heading)}</h3>\n<figure class=plot><div class=panels>{drawn}</div>"
        f"<figcaption>{escape(caption)} {links}</figcaption></figure>"
    )


def _ordered(material: Material, column: str, points: Sequence[Point]) -> list[Any]:
    """The values of a column in the order in which they are shown."""
    found = {point[column] for point in points}
    if column == "source":
        return [name for name in material.results.sources if name in found]
    return sorted(found, key=lambda v: math.inf if column == "num_unfrozen_blocks" and v < 0 else v)


def _axis(material: Material, kind: _Kind, points: Sequence[Point]) -> figures.Axis:
    if kind.name in ("n", "epoch"):
        log = all(point[kind.x] > 0 for point in points)
        return figures.Axis(kind.label if log else kind.noun, log)
    values = _ordered(material, kind.x, points)
    if kind.name == "k":
        texts = [_depth(k).removeprefix("k = ") for k in values]
    else:
        labels = (material.styles[name].label for name in values)
        texts = [re.sub(r" \(ε = (.*)\)", r" \1", label)[:14] for label in labels]
    return figures.Axis(kind.label, ticks=dict(enumerate(texts)), joined=kind.name == "k")


def _depth(blocks: int) -> str:
    return {0: "head", -1: "all"}.get(blocks, f"k = {blocks}")


def _draw(
    material: Material,
    target: str,
    name: str,
    axis: figures.Axis,
    panels: Mapping[int, list[figures.Series]],
    behind: Mapping[int, list[figures.Series]],
    ylabel: str,
    *,
    zero: str,
) -> str:
    """The panels' images, with one vertical axis unless they differ in n; SVG goes to `material.files`."""
    by_size = bool(axis.ticks)
    images = []
    for value, series in panels.items():
        alone = by_size and not zero
        together = [series] if alone else [*panels.values(), *behind.values()]
        low, high = figures.value_range(together, include=(0.0,) if zero else ())
        # Intervals of few seeds can reach beyond what an accuracy can be; the axis does not.
        yrange = (low, high) if zero else (max(low, -0.02), min(high, 1.02))
        title = f"n = {value:,}" if by_size else blocks_text(value).capitalize()
        thin = behind.get(value, [])
        shown = f"{ylabel} (thin: published)" if thin else ylabel
        svg = figures.line_panel(
            series, axis, title=title, ylabel=shown, yrange=yrange, zero=zero, behind=thin
        )
        suffix = f"n{value}" if by_size else f"k{'all' if value < 0 else value}"
        material.files[f"figures/{name}_{slug(material.results.targets, target)}_{suffix}.svg"] = svg
        images.append(image(svg, "svg+xml", _describe(title, axis, ylabel, series)))
    return "".join(images)


def _caption(target: str, where: str, points: Sequence[Point], axis: figures.Axis, *, lead: bool) -> str:
    seeds = span(sorted({point["num_seeds"] for point in points}))
    shape, mark = ("Mark", "bar") if axis.ticks else ("Line", "band")
    interval = f"{mark}: 95 % interval (Student’s t) over {seeds} seeds, each point on its own"
    interval = "one seed, so no interval" if seeds == "1" else interval
    if not lead:
        axes = " Every n has a vertical axis of its own." if axis.ticks else ""
        return f"Test accuracy on {target}{where}. {shape}: mean; {interval}.{axes}"
    return (
        f"Test accuracy on {target}{where}, minus that of the natural source with the same seed, so on the "
        f"same target images. {shape}: mean difference, paired by seed; {interval}. "
        "Above the dashed line the robust source is ahead."
    )


def _published(
    material: Material, target: str, sizes: Mapping[int, Any], *, lead: bool
) -> Iterator[figures.Series]:
    """The paper's lines for this target within the range of the user's n, and their numbers."""
    low, high = min(sizes), max(sizes)
    base = reference.published_line(Source("", "none", 0.0), target)
    for name in material.results.by_name(target):
        source = material.results.sources[name]
        line = reference.published_line(source, target)
        if lead and source.norm == "none":
            continue
        line = {n: y - base[n] if lead else y for n, y in line.items() if low <= n <= high}
        if not line:
            continue
        if not lead:
            fixed = (name, target, reference.target_of(target), reference.column_of(source))
            columns = ("source", "target", "published_target", "published_column", "num_train_images", "mean")
            records = [dict(zip(columns, (*fixed, n, y), strict=True)) for n, y in line.items()]
            add_numbers(material, "reference", records, columns)
        style = material.styles[name]
        yield figures.Series(style, list(line), list(line.values()), [math.nan] * len(line))


def _describe(title: str, axis: figures.Axis, ylabel: str, series: Sequence[figures.Series]) -> str:
    """What a reader who cannot see the panel needs from it: both ends of every line."""
    told = []
    for style, x, mean, _ in series:
        ends = [(axis.ticks.get(x[i], f"{x[i]:,}"), 100 * mean[i]) for i in sorted({0, len(x) - 1})]
        told.append(f"{style.label} {' to '.join(f'{y:.1f} at {at}' for at, y in ends)}")
    return f"{title}: {ylabel} against {axis.label}. {'; '.join(told)}."


def add_numbers(
    material: Material, name: str, records: Sequence[Mapping[str, Any]], columns: Sequence[str]
) -> None:
    """Adds a figure's numbers; later targets of the same figure are appended."""
    path = f"figures/{name}.csv"
    before = material.files.get(path, csv_text([], columns))
    material.files[path] = before + csv_text(records, columns).partition("\n")[2]


def slug(targets: Sequence[str], target: str) -> str:
    """A target's name for a file name, which no other of the targets has."""
    taken: set[str] = set()
    return {name: file_name(name, taken) for name in targets}[target]
