"""Networks side by side: accuracy against ε, natural and robust accuracy, AutoAttack, warnings, bounds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy

from advtransfer.norms import SYMBOLS
from advtransfer.report import figures
from advtransfer.report.sections import (
    EMPTY,
    Axis,
    Entry,
    Panel,
    Plot,
    Scatter,
    Section,
    Series,
    SourceInfo,
    Style,
    Table,
    Text,
    format_eps,
)

# Of evaluation.csv and head_bound.csv, after "model".
_COLUMNS = ("norm", "eps", "attack", "num_steps", "accuracy", "lower", "upper", "loss", "num_images")
_LOSSES = ("sensitivity", "loss", "sharp_bound", "bound", "attacked_loss")
_SHARES = ("keeps_label", "attacked_accuracy")
_LEAST_RANKED = 3  # networks, for a rank correlation
_MOST_LISTED = 3  # networks in a sentence
_CHECKS = (
    "randomness; probabilities in place of logits; a saturated softmax; zero gradients; a loss that does not "
    "rise with the steps; accuracy above chance where every ball holds plain grey"
)


class Measured(NamedTuple):
    """What was measured of one network.

    Attributes:
      info: its name, and what it, or the source that it was fine-tuned from, was trained against.
      is_transferred: whether it was fine-tuned.
      rows: as `robustness.Robustness` has them, natural accuracy first.
      warnings: (name, sentence, source) of each.
      bound: of the head, "norm", "eps", "num_images", and in means over these images "sensitivity", "loss",
        "sharp_bound", "bound", "attacked_loss", "keeps_label" and "attacked_accuracy" (shares); or empty.
    """

    info: SourceInfo
    is_transferred: bool
    rows: Sequence[Mapping[str, Any]]
    warnings: Sequence[tuple[str, str, str]] = ()
    bound: Mapping[str, Any] = EMPTY


def robustness_sections(networks: Sequence[Measured], *, norm: str, eps: float) -> list[Section]:
    """The sections of a page; `norm` and `eps` are of the attack that the networks are compared by, "none" of
    none. Accuracies are of PGD, which stops at an image's first error."""
    looks = figures.styles(network.info for network in networks)
    looks = {name: style._replace(label=name) for name, style in looks.items()}
    is_attacked = any(row["attack"] == "PGD" for network in networks for row in network.rows)
    sections = [_accuracy(networks, looks), _trade_off(networks, looks, norm, eps), _auto_attack(networks)]
    sections += [_warnings(networks)] * is_attacked + [_bounds(networks)]
    return [section for section in sections if section.parts or section.finding]


def _accuracy(networks: Sequence[Measured], looks: Mapping[str, Style]) -> Section:
    records = [{"model": n.info.name} | {c: row[c] for c in _COLUMNS} for n in networks for row in n.rows]
    files = {"evaluation": records}
    natural = {network.info.name: network.rows[0] for network in networks}
    images = f"{records[0]['num_images']:,} images"
    shares = [f"{name} {_percent(row['accuracy'])} %" for name, row in natural.items()]
    if len(networks) > _MOST_LISTED:
        low, *_, high = sorted(row["accuracy"] for row in natural.values())
        shares = [f"{_percent(low)} to {_percent(high)} %, of {len(networks)} networks"]
    finding = f"Natural accuracy on {images}: {', '.join(shares)}."
    heads = [
        Entry(n.info.name, small=("from " if n.is_transferred else "") + n.info.constraint) for n in networks
    ]
    norms = [norm for norm in SYMBOLS if any(row["norm"] == norm for row in _curve(networks[0]))]
    panels, tables = [], []
    for norm in norms:
        points = {
            network.info.name: [
                natural[network.info.name],
                *(r for r in _curve(network) if r["norm"] == norm),
            ]
            for network in networks
        }
        scale, unit = (255, ", in 255ths") if norm == "linf" else (1, "")
        lines = [
            Series(
                looks[name],
                [scale * row["eps"] for row in rows],
                [row["accuracy"] for row in rows],
                [math.nan] * len(rows),
                [(row["lower"], row["upper"]) for row in rows],
            )
            for name, rows in points.items()
        ]
        axis = Axis(f"ε ({SYMBOLS[norm]}{unit})")
        panels.append(Panel(f"{SYMBOLS[norm]} attacks", "Accuracy, %", axis, lines))
        rows = points[networks[0].info.name][1:]
        columns = ["Network", "Natural", *(f"ε = {format_eps(norm, row['eps'])}" for row in rows)]
        cells = [[head, *map(_cell, each)] for head, each in zip(heads, points.values(), strict=True)]
        steps = f"PGD-{rows[0]['num_steps']}"
        caption = f"Accuracy under {SYMBOLS[norm]} {steps}, in %, with Wilson’s 95 % intervals; {images}."
        tables.append(Table(caption, columns, cells, "evaluation"))
    if not norms:
        cells = [[head, _cell(row)] for head, row in zip(heads, natural.values(), strict=True)]
        caption = f"Natural accuracy, in %, with Wilson’s 95 % intervals; {images}."
        table = Table(caption, ["Network", "Natural"], cells, "evaluation")
        return Section("Accuracy", finding, [table], files)
    caption = (
        "Accuracy against the radius ε of the attack; at 0 natural accuracy. What is fooled at one ε counts "
        "as fooled at every larger one, whose ball holds the smaller. Bands: 95 % over images (Wilson)."
    )
    return Section("Accuracy against ε", finding, [Plot(caption, panels, "evaluation"), *tables], files)


def _trade_off(networks: Sequence[Measured], looks: Mapping[str, Style], norm: str, eps: float) -> Section:
    """Of several networks, natural accuracy against that under AutoAttack, or else PGD."""
    title, robust = "Accuracy and robustness", {}
    for network in networks:
        attacked = [
            row for row in (*_curve(network), *_stages(network)) if (row["norm"], row["eps"]) == (norm, eps)
        ]
        if attacked:
            robust[network.info.name] = attacked[-1]
    if not robust or len(networks) == 1:
        return Section(title)
    last = next(iter(robust.values()))
    by = f"PGD-{last['num_steps']}" if last["attack"] == "PGD" else last["attack"].partition(":")[0]
    attack = f"{SYMBOLS[norm]} {by}, ε = {format_eps(norm, eps)}"
    natural = {network.info.name: network.rows[0] for network in networks}
    points = [(looks[name], _share(natural[name]), _share(row)) for name, row in robust.items()]
    panel = Scatter("One point a network", "Natural accuracy, %", "Accuracy under attack, %", points)
    caption = (
        f"Natural accuracy against accuracy under {attack}, with 95 % intervals over images (Wilson). Among "
        "networks trained alike, robustness may cost natural accuracy (Tsipras et al., 2019)."
    )
    best = max(natural, key=lambda name: natural[name]["accuracy"])
    most = max(robust, key=lambda name: robust[name]["accuracy"])

    def told(name):
        return (
            f"{name}: {_percent(natural[name]['accuracy'])} % natural, "
            f"{_percent(robust[name]['accuracy'])} % under attack"
        )

    finding = f"Under {attack}, the most robust network is {told(most)}"
    finding += "; it is also the most accurate." if most == best else f"; the most accurate is {told(best)}."
    return Section(title, finding, [Plot(caption, [panel], "evaluation.csv")])


def _auto_attack(networks: Sequence[Measured]) -> Section:
    stages = {network.info.name: _stages(network) for network in networks}
    first = next(iter(stages.values()))
    if not first:
        return Section("AutoAttack")
    version, norm, eps = first[0]["attack"].partition(":")[0], first[0]["norm"], first[0]["eps"]
    heads = ["Network", "Natural", *(f"then {row['attack'].partition(': ')[2]}" for row in first)]
    cells = [[n.info.name, _cell(n.rows[0]), *map(_cell, stages[n.info.name])] for n in networks]
    caption = (
        f"Accuracy after each attack of {version} (Croce & Hein, 2020), {SYMBOLS[norm]} "
        f"ε = {format_eps(norm, eps)}, in %, with Wilson’s 95 % intervals. Each attacks what is left."
    )
    left = [f"{name} {_percent(rows[-1]['accuracy'])} %" for name, rows in stages.items()]
    finding = f"{version} leaves {', '.join(left)}." if len(left) <= _MOST_LISTED else ""
    return Section("AutoAttack", finding, [Table(caption, heads, cells, "evaluation.csv")])


def _warnings(networks: Sequence[Measured]) -> Section:
    found = [
        dict(zip(("model", "name", "message", "source"), (network.info.name, *warning), strict=True))
        for network in networks
        for warning in network.warnings
    ]
    if not found:
        checks = _CHECKS + ("; Square that beats attacks by gradients" if _stages(networks[0]) else "")
        finding = "No check found a sign that these accuracies are not robustness."
        return Section("Warnings", finding, [Text(f"Checked: {checks}.", "muted")])
    signs = "One warning" if len(found) == 1 else f"{len(found)} warnings"
    models = ", ".join(dict.fromkeys(each["model"] for each in found))
    finding = f"{signs}: the accuracy under attack of {models} may not be robustness."
    lines = [f"{each['model']}: {each['message']} ({each['source']})" for each in found]
    return Section("Warnings", finding, [Text("\n".join(lines), "list")], {"warnings": found})


def _bounds(networks: Sequence[Measured]) -> Section:
    """The estimates of the heads' bounds, and whether they rank the networks as the attack does."""
    title = "What the features’ sensitivity says of the heads"
    columns = ("norm", "eps", "num_images", *_LOSSES, *_SHARES)
    found: list[dict[str, Any]] = [
        {"model": n.info.name} | {c: n.bound[c] for c in columns} for n in networks if n.bound
    ]
    if not found:
        return Section(title)
    norm, eps, number = (found[0][name] for name in ("norm", "eps", "num_images"))
    cells = [
        [x["model"], *(f"{x[c]:.3g}" if x[c] < 1000 else f"{x[c]:,.0f}" for c in _LOSSES)]
        + [_percent(x[share]) for share in _SHARES]
        for x in found
    ]
    heads = ["Network", "Sensitivity", "Natural loss", "Sharp bound", "Bound", "Loss under attack"]
    heads += ["Label kept by the estimate, %", "Accuracy under attack, %"]
    caption = (
        f"Means over {number:,} images, {SYMBOLS[norm]} ε = {format_eps(norm, eps)}. Sensitivity: the "
        "largest ‖f(x + δ) − f(x)‖₂ that an attack on the features f found. Bound: natural loss + "
        "max_j ‖w_j − w_y‖₂ · sensitivity (Nern et al., 2023), sharp where classes are summed one by one. "
        "Label kept: the logits are further apart than that sensitivity can close."
    )
    method = Text(
        "An estimate, not a certificate: the true sensitivity is at least what the attack found, so a larger "
        "loss than the bound and a lower accuracy than the labels kept are possible."
    )
    files = {"head_bound": found}
    return Section(title, _ranking(found), [method, Table(caption, heads, cells, "head_bound")], files)


def _ranking(found: Sequence[Mapping[str, Any]]) -> str:
    attacked = [x["attacked_loss"] for x in found]
    missed = [x["model"] for x in found if x["attacked_loss"] > x["sharp_bound"]]
    said = f"The attack found more than the estimate allows: {', '.join(missed)}." if missed else ""
    if len(found) < _LEAST_RANKED:
        return said
    names = {"sensitivity": "the sensitivity alone", "sharp_bound": "the sharp bound", "bound": "the bound"}
    ranks = {name: _rank_correlation([x[name] for x in found], attacked) for name in names}
    told = ", ".join(f"{ranks[name]:.2f} for {words}".replace("-", "−") for name, words in names.items())
    return (
        f"Estimates from the features’ sensitivity (Nern et al., 2023) rank {len(found)} networks as the "
        f"loss under attack does with Spearman’s ρ of {told}. {said}".rstrip()
    )


def _rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's ρ; NaN if all of one are equal."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(scipy.stats.spearmanr(x, y).statistic)


def _curve(network: Measured) -> list[Mapping[str, Any]]:
    return [row for row in network.rows if row["attack"] == "PGD"]


def _stages(network: Measured) -> list[Mapping[str, Any]]:
    return [row for row in network.rows if row["attack"].startswith("AutoAttack")]


def _share(row: Mapping[str, Any]) -> tuple[float, float, float]:
    return row["accuracy"], row["lower"], row["upper"]


def _cell(row: Mapping[str, Any]) -> Entry:
    accuracy, low, high = map(_percent, _share(row))
    return Entry(accuracy, small=f"{low} … {high}")


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
