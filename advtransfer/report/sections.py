"""The report's part on one target: few images, accuracy, difference, epochs, all numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from advtransfer.report import figures
from advtransfer.report.markup import image, listing, numbers_link, span, table, th
from advtransfer.report.rows import csv_text
from advtransfer.report.summary import FEW_IMAGES, SUMMARY_COLUMNS, Pooled, Results, curves
from advtransfer.report.words import blocks_text, count, is_clear, points


class Material(NamedTuple):
    """What the sections are made from, and `files`: what they add beside the page, by path."""

    results: Results
    summary: list[dict[str, Any]]
    pooled: list[Pooled]
    styles: dict[str, figures.Style]
    files: dict[str, str | bytes]


def transfer_section(material: Material, target: str) -> str:
    seeds = {row["num_seeds"] for row in material.summary if row["target"] == target}
    band = f"band: 95 % interval (Student’s t) over {span(sorted(seeds))} seeds"
    if seeds == {1}:
        band = "one seed, so no interval"
    return "\n".join(
        [
            f"<h2>Transfer to {escape(target)}</h2>",
            _pooled_table(material, target),
            _accuracy_figure(material, target, band),
            _delta_figure(material, target, band),
            _epoch_figure(material, target, band),
            _accuracy_table(material, target),
        ]
    )


def _pooled_table(material: Material, target: str) -> str:
    pooled = {(p.num_unfrozen_blocks, p.source.name): p for p in material.pooled if p.target == target}
    if not pooled:
        return ""
    names = [n for n in material.results.robust(target) if any(n == name for _, name in pooled)]
    rows = []
    for blocks in sorted({k for k, _ in pooled}, key=material.results.blocks(target).index):
        cells = [_pooled_cell(pooled.get((blocks, name))) for name in names]
        rows.append([th(escape(blocks_text(blocks)), "row"), *cells])
    heads = ["Trained layers", *(material.styles[name].label for name in names)]
    sizes = sorted({n for p in pooled.values() for n in p.sizes})
    columns = ("target", "num_unfrozen_blocks", "source", "delta", "ci95", "num_seeds", "sizes")
    records = [
        p._asdict() | {"source": p.source.name, "sizes": " ".join(map(str, p.sizes))} for p in pooled.values()
    ]
    _numbers(material, "pooled_delta", records, columns)
    fewer = any(len(p.sizes) < len(sizes) for p in pooled.values())
    some = ", or those of them that both sources have" if fewer else ""
    few = "" if max(sizes) <= FEW_IMAGES else f" (the fewest there are; none is ≤ {FEW_IMAGES})"
    return table(
        heads,
        [rows],
        "Lead over the natural source with few images, in points, with its 95 % interval. Averaged "
        f"per seed over n = {listing(sizes)}{few}{some}. Bold: the interval excludes zero.",
        numbers="pooled_delta",
    )


def _pooled_cell(p: Pooled | None) -> str:
    if p is None:
        return "<td>–</td>"
    lead = points(p.delta)
    if math.isnan(p.ci95):
        return f"<td>{lead} <small>(1 seed)</small></td>"
    lead = f"<b>{lead}</b>" if is_clear(p.delta, p.ci95) else lead
    interval = f"{points(p.delta - p.ci95)} … {points(p.delta + p.ci95)}, {p.num_seeds} seeds"
    return f"<td>{lead} <small>({interval})</small></td>"


def _accuracy_figure(material: Material, target: str, band: str) -> str:
    rows = [row for row in material.summary if row["target"] == target]
    _numbers(material, "accuracy_vs_n", rows, SUMMARY_COLUMNS[:7])
    return _line_figure(
        material,
        target,
        [row | {"x": row["num_train_images"], "y": row["mean"], "half": row["ci95"]} for row in rows],
        heading="Accuracy against the number of labelled images",
        name="accuracy_vs_n",
        xlabel="labelled target images, n (logarithmic)",
        ylabel="Test accuracy, %",
        log=True,
        caption=f"Test accuracy on {target} at each seed’s last epoch. Line: mean; {band}.",
    )


def _delta_figure(material: Material, target: str, band: str) -> str:
    columns = ("source", "target", "num_train_images", "num_unfrozen_blocks", "delta", "delta_ci95")
    rows = [row for row in material.summary if row["target"] == target and not math.isnan(row["delta"])]
    if not rows:
        return ""
    _numbers(material, "delta_vs_n", rows, columns)
    return _line_figure(
        material,
        target,
        [row | {"x": row["num_train_images"], "y": row["delta"], "half": row["delta_ci95"]} for row in rows],
        heading="Difference to the natural source",
        name="delta_vs_n",
        xlabel="labelled target images, n (logarithmic)",
        ylabel="Lead over the natural source, points",
        log=True,
        zero="natural",
        caption=(
            "Accuracy minus that of the natural source with the same seed, so on the same target "
            f"images. Line: mean difference, paired by seed; {band}. Above the dashed line the "
            "robust source is ahead."
        ),
    )


def _epoch_figure(material: Material, target: str, band: str) -> str:
    sizes = material.results.sizes(target)
    chosen = max((n for n in sizes if n <= FEW_IMAGES), default=sizes[0])
    curve = curves(material.results, target, chosen)
    if len({point["epoch"] for point in curve}) < 2:
        return "<p class=caveat>Accuracy against epoch is left out: one epoch was evaluated.</p>"
    columns = (*SUMMARY_COLUMNS[:4], "epoch", "mean", "ci95", "num_seeds")
    _numbers(material, "accuracy_vs_epoch", curve, columns)
    return _line_figure(
        material,
        target,
        [point | {"x": point["epoch"], "y": point["mean"], "half": point["ci95"]} for point in curve],
        heading=f"Accuracy against epoch, n = {chosen:,}",
        name="accuracy_vs_epoch",
        xlabel="epoch",
        ylabel="Test accuracy, %",
        caption=f"Test accuracy on {target}, fine-tuned on {chosen:,} images. Line: mean; {band}.",
    )


def _line_figure(
    material: Material,
    target: str,
    marks: list[dict[str, Any]],
    *,
    heading: str,
    name: str,
    caption: str,
    xlabel: str,
    ylabel: str,
    log: bool = False,
    zero: str = "",
) -> str:
    """One panel per k from marks with `x`, `y` and `half` (the interval's half-width)."""
    panels: dict[int, list[figures.Series]] = {}
    for blocks in material.results.blocks(target):
        for source, style in material.styles.items():
            line = [
                (p["x"], p["y"], p["half"])
                for p in marks
                if (p["num_unfrozen_blocks"], p["source"]) == (blocks, source)
            ]
            if not all(math.isnan(y) for _, y, _ in line):
                columns = zip(*sorted(line), strict=True)
                panels.setdefault(blocks, []).append(figures.Series(style, *columns))
    if not panels:
        return f"<p class=caveat>{escape(heading)} is left out: nothing was measured.</p>"
    low, high = figures.value_range(panels.values(), include=(0.0,) if zero else ())
    # Intervals of few seeds can reach beyond what an accuracy can be; the axis does not.
    yrange = (low, high) if zero else (max(low, -0.02), min(high, 1.02))
    images = []
    for blocks, series in panels.items():
        title = blocks_text(blocks).capitalize()
        svg = figures.line_panel(
            series, title=title, xlabel=xlabel, ylabel=ylabel, yrange=yrange, log=log, zero=zero
        )
        suffix = f"{_slug(material.results.targets, target)}_k{'all' if blocks < 0 else blocks}"
        material.files[f"figures/{name}_{suffix}.svg"] = svg
        images.append(image(svg, "svg+xml", _describe(title, xlabel, ylabel, series)))
    return (
        f"<h3>{escape(heading)}</h3>\n<figure class=plot><div class=panels>{''.join(images)}</div>"
        f"<figcaption>{escape(caption)} {numbers_link(name)}</figcaption></figure>"
    )


def _describe(title: str, xlabel: str, ylabel: str, series: Sequence[figures.Series]) -> str:
    """What a reader who cannot see the panel needs from it: both ends of every line."""
    told = []
    for style, x, mean, _ in series:
        known = [f"{100 * y:.1f} at {at:,}" for at, y in zip(x, mean, strict=True) if not math.isnan(y)]
        told.append(f"{style.label} {' to '.join(dict.fromkeys((known[0], known[-1])))}")
    return f"{title}: {ylabel} against {xlabel}. {'; '.join(told)}."


def _accuracy_table(material: Material, target: str) -> str:
    results = material.results
    names = results.natural(target) + results.robust(target)
    robust = results.robust(target) if len(results.natural(target)) == 1 else []
    found = {
        (row["num_unfrozen_blocks"], row["num_train_images"], row["source"]): row
        for row in material.summary
        if row["target"] == target
    }
    seeds = sorted({row["num_seeds"] for row in found.values()})
    width = 1 + len(names) + len(robust)
    groups = []
    for blocks in results.blocks(target):
        title = blocks_text(blocks).capitalize()
        rows = [[f"<th class=group colspan={width} scope=rowgroup>{title}</th>"]]
        for size in results.sizes(target):
            cells = [_accuracy_cell(found.get((blocks, size, name)), seeds[-1]) for name in names]
            leads = [_lead_cell(found.get((blocks, size, name))) for name in robust]
            rows.append([th(f"{size:,}", "row"), *cells, *leads])
        groups.append(rows)
    labels = [
        material.styles[name].label.replace(" = ", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}") for name in names
    ]
    leads = [f"{label} − natural" for label in labels[len(names) - len(robust) :]]
    caption = (
        f"Test accuracy on {target} in %: mean ± half-width of the 95 % interval over "
        f"{count(seeds[-1], 'seed')}{', fewer where given in brackets' if len(seeds) > 1 else ''}."
    )
    if robust:
        caption += " Differences are in points, paired by seed; bold: the interval excludes zero."
    return f"<h3>All numbers</h3>\n{table(['n', *labels, *leads], groups, caption)}"


def _accuracy_cell(row: dict[str, Any] | None, most: int) -> str:
    if row is None or math.isnan(row["mean"]):
        return "<td>–</td>"
    interval = "" if math.isnan(row["ci95"]) else f" <small>± {100 * row['ci95']:.1f}</small>"
    fewer = "" if row["num_seeds"] == most else f" <small>[{row['num_seeds']}]</small>"
    return f"<td>{100 * row['mean']:.1f}{interval}{fewer}</td>"


def _lead_cell(row: dict[str, Any] | None) -> str:
    if row is None or math.isnan(row["delta"]):
        return "<td>–</td>"
    lead = points(row["delta"])
    if math.isnan(row["delta_ci95"]):
        return f"<td>{lead}</td>"
    lead = f"<b>{lead}</b>" if is_clear(row["delta"], row["delta_ci95"]) else lead
    return f"<td>{lead} <small>± {100 * row['delta_ci95']:.1f}</small></td>"


def _numbers(
    material: Material, name: str, records: Sequence[Mapping[str, Any]], columns: Sequence[str]
) -> None:
    """Adds a figure's numbers; later targets of the same figure are appended."""
    path = f"figures/{name}.csv"
    before = material.files.get(path, csv_text([], columns))
    material.files[path] = before + csv_text(records, columns).partition("\n")[2]


def _slug(targets: Sequence[str], target: str) -> str:
    """A target's name for a file name; targets that would share one get their position too."""
    slugs = [re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-") for name in targets]
    position = targets.index(target)
    slug = slugs[position]
    return slug if slug and slugs.count(slug) == 1 else f"{slug}-{position}".lstrip("-")
