"""The report's part on one target: few images, what is needed, figures, the best k, all numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from typing import Any

from advtransfer.report.markup import listing, table, th
from advtransfer.report.plots import Material, add_numbers, axis_figures, epoch_size
from advtransfer.report.summary import FEW_IMAGES, Pooled
from advtransfer.report.words import blocks_text, count, is_clear, points


def transfer_section(material: Material, target: str) -> str:
    return "\n".join(
        [
            f"<h2>Transfer to {escape(target)}</h2>",
            _pooled_table(material, target),
            _needed_table(material, target, "images"),
            _needed_table(material, target, "epochs"),
            *axis_figures(material, target),
            _best_table(material, target),
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
    add_numbers(material, "pooled_delta", records, columns)
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


def needed_rows(material: Material, target: str, quantity: str, title: str = "") -> dict[int, list[str]]:
    """Per k a table's row: the factor over the whole curve for every robust source (epochs: at one n)."""
    size = epoch_size(material.results, target)
    found = {
        (row["num_unfrozen_blocks"], row["source"]): row
        for row in material.ratios
        if (row["target"], row["quantity"]) == (target, quantity)
        and "accuracy" not in row
        and row.get("num_train_images", size) == size
    }
    names = [name for name in material.results.sources if material.results.sources[name].norm != "none"]
    return {
        k: [
            th(escape(title or blocks_text(k)), "row"),
            *(needed_cell(found.get((k, name))) for name in names),
        ]
        for k in material.results.blocks(target)
        if any(k == blocks for blocks, _ in found)
    }


def needed_cell(row: Mapping[str, Any] | None) -> str:
    if row is None or math.isnan(row["factor"]):
        return "<td>–</td>"
    if row["bound"]:
        said = f"≥ {_times(row['factor'])}" if row["bound"] == "at least" else "not reached"
        return f"<td>{said}</td>"
    factor = _times(row["factor"])
    if math.isnan(row["ci95_low"]):
        return f"<td>{factor} <small>(1 seed)</small></td>"
    clear = not row["ci95_low"] <= 1 <= row["ci95_high"]
    low, high = (_times(row[end])[:-1] if row[end] < math.inf else "∞" for end in ("ci95_low", "ci95_high"))
    return f"<td>{f'<b>{factor}</b>' if clear else factor} <small>({low} … {high})</small></td>"


def _times(factor: float) -> str:
    return f"{factor:.2f}×" if factor < 9.995 else f"{factor:.0f}×"


def _needed_table(material: Material, target: str, quantity: str) -> str:
    rows = list(needed_rows(material, target, quantity).values())
    if not rows:
        return ""  # notes() says why
    robust = [name for name, source in material.results.sources.items() if source.norm != "none"]
    size = epoch_size(material.results, target)
    where = "" if quantity == "images" else f", fine-tuned on n = {size:,}"
    return table(
        ["Trained layers", *(material.styles[name].label for name in robust)],
        [rows],
        f"{quantity.capitalize()} needed{where}: how many times fewer than the natural source, for the same "
        f"accuracy on {target}; below 1 it is more. In brackets: 95 % interval; bold: it excludes 1.",
        numbers="../ratios",
    )


NEEDED = (
    "Mean of the factor’s logarithm over the accuracies that both sources reach, each curve non-decreasing "
    "and interpolated in the logarithm; 95 % interval by bootstrap over seeds, paired. "
    "“≥”: the robust source is better with its fewest than the natural one with its most; “not reached”: the "
    "other way round. Bold: the interval excludes 1."
)


def _best_table(material: Material, target: str) -> str:
    found = {(r["num_train_images"], r["source"]): r for r in material.best if r["target"] == target}
    if not found:
        return ""
    names = [name for name in material.results.by_name(target) if any(name == s for _, s in found)]
    rows = [
        [th(f"{size:,}", "row"), *(_best_cell(found.get((size, name))) for name in names)]
        for size in sorted({size for size, _ in found})
    ]
    content = table(
        ["n", *(material.styles[name].label for name in names)],
        [rows],
        f"The k of the highest mean accuracy on {target}, its lead over the second in points (paired by "
        "seed, 95 % interval), and in brackets every k that it cannot be told from: the interval of the "
        "difference includes zero. The best was picked after looking, so its lead is rather too large.",
        numbers="../best_k",
    )
    return f"<h3>Which k is best</h3>\n{content}"


def _best_cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "<td>–</td>"
    best = _k(row["best"]) if row["tied"] else f"<b>{_k(row['best'])}</b>"
    tied = f" [or {', '.join(_k(k) for k in row['tied'].split())}]" if row["tied"] else ""
    half = "" if math.isnan(row["lead_ci95"]) else f" ± {100 * row['lead_ci95']:.1f}"
    return f"<td>{best}{tied} <small>{points(row['lead'])}{half}</small></td>"


def _k(blocks: int | str) -> str:
    return "all" if int(blocks) < 0 else str(blocks)


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
