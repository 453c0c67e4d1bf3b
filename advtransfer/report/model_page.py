"""The page of one fine-tuned network: what it was made from, how well it reads, and where it errs."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from advtransfer.report import figures, markup
from advtransfer.report.markup import image, numbers_link, scrolling, table, th
from advtransfer.report.outcome import Outcome, class_records, confused_pairs, mistake_records, wilson
from advtransfer.report.rows import csv_lines, csv_text, write_files

MAX_CLASSES = 30  # in a confusion matrix that one can read
MAX_MISTAKES = 16
MAX_LISTED = 20  # confused pairs, and classes where there are too many to show

_EMPTY: Mapping[str, Any] = MappingProxyType({})
_FILES = ("epochs.csv", "choice.csv", "confusion.csv", "classes.csv", "mistakes.csv", "report.html")
_TRAIN = figures.Style("training images", "#4d4d4d", "o", (0, (4, 2)), True)
_TEST = figures.Style("test images", "#0072B2", "s", "-", False)


class ModelPage(NamedTuple):
    """What the page of a network is made of; anything but `title` and `history` may be missing.

    Attributes:
      title: of the page.
      history: by column, of equal length: "epoch" (counted from 1), "train_accuracy" (in [0, 1]) and
        whatever else was measured; "test_accuracy" is drawn.
      facts: (name, value) in words, of the source, the target and the training.
      outcome: on the test images.
      pictures: of the first of `outcome.mistakes`, [M, H, W, 3] in [0, 1]; the first 16 are shown.
      choice: how the number of trained blocks was chosen, in a sentence; its table in `choice_rows`, one
        record per candidate, with "num_unfrozen_blocks", "chosen" and, if measured, "mean_accuracy" and
        "standard_error".
      command, versions, config: as in `Evidence`.
    """

    title: str
    history: Mapping[str, Sequence[float]]
    facts: Sequence[tuple[str, str]] = ()
    outcome: Outcome | None = None
    pictures: np.ndarray | Sequence = ()
    choice: str = ""
    choice_rows: Sequence[Mapping[str, Any]] = ()
    command: str = ""
    versions: Mapping[str, str] = _EMPTY
    config: Mapping[str, Any] = _EMPTY


def write_model_page(page: ModelPage, folder: str | os.PathLike[str]) -> Path:
    """Writes the page and its tables into `folder`, a local or any other path; returns that of report.html.

    The tables: `epochs.csv`; `choice.csv` of a chosen number of blocks; of test images `confusion.csv`,
    `classes.csv` and `mistakes.csv`. Each file appears whole, report.html last; one that an earlier network
    left, and that this one has nothing for, is deleted. The same page gives the same bytes.
    """
    folder = Path(folder) if isinstance(folder, str) else folder
    columns = list(page.history)
    records = [dict(zip(columns, row, strict=True)) for row in zip(*page.history.values(), strict=True)]
    files = {"epochs.csv": csv_text(records, columns)}
    if page.choice_rows:
        files["choice.csv"] = csv_text(page.choice_rows, list(page.choice_rows[0]))
    if page.outcome is not None:
        classes, mistakes = class_records(page.outcome), mistake_records(page.outcome)
        files["confusion.csv"] = _confusion_csv(page.outcome)
        files["classes.csv"] = csv_text(classes, list(classes[0]))
        files["mistakes.csv"] = csv_text(mistakes, ("index", "label", "predicted", "probability"))
    body = [_opening(page), _epochs(page), _choice(page)]
    if page.outcome is not None:
        body += [_confusion(page.outcome), _classes(page.outcome), _mistakes(page)]
    body.append(reproduction(page))
    files["report.html"] = markup.page(page.title, body)
    for name in _FILES:
        if name not in files:
            (folder / name).unlink(missing_ok=True)
    return write_files(folder, files)


def _opening(page: ModelPage) -> str:
    facts = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in page.facts
    )
    if page.outcome is None:
        said = "No test images were given: how well this network reads new images is not known."
        note = ""
    else:
        correct, total = int(np.trace(page.outcome.confusion)), len(page.outcome.labels)
        low, high = wilson(correct, total)
        said = (
            f"{_percent(correct / total)}&nbsp;% of {_count(total, 'test image')} "
            f"{'is' if total == 1 else 'are'} classified correctly "
            f"(95&nbsp;% interval {_percent(low)}&nbsp;…&nbsp;{_percent(high)}&nbsp;%)."
        )
        note = (
            "<p class=caveat>The interval (Wilson’s) is that of the choice of test images. It says nothing "
            "of other training images or another seed: one network was trained.</p>"
        )
    return f"<h1>{escape(page.title)}</h1>\n<div class=headline><p>{said}</p></div>{note}" + (
        f"<dl class=facts>{facts}</dl>" if facts else ""
    )


def _epochs(page: ModelPage) -> str:
    """Accuracy on the training and the test images, epoch by epoch."""
    epochs = page.history["epoch"]
    lines = [
        figures.Series(style, *zip(*points, strict=True), [math.nan] * len(points))
        for style, column in ((_TRAIN, "train_accuracy"), (_TEST, "test_accuracy"))
        if (points := _finite(epochs, page.history.get(column, ())))
    ]
    told = "; ".join(
        f"{line.style.label}: {_percent(line.mean[-1])} % after epoch {line.x[-1]}" for line in lines
    )
    head = "<h2>Accuracy by epoch</h2>\n"
    if len(epochs) < 2:
        return (
            f"{head}<p>Accuracy on {escape(told)}. No figure: the accuracy was measured once; "
            "<code>evaluate_epochs</code> asks for more.</p>"
        )
    low, high = figures.value_range([lines])
    svg = figures.line_panel(
        lines,
        figures.Axis("epoch (logarithmic)", log=True),
        title="Training and test images" if len(lines) == 2 else lines[0].style.label.capitalize(),
        ylabel="Accuracy, %",
        yrange=(max(low, -0.02), min(high, 1.02)),
    )
    caption = f"Accuracy in evaluation mode after the epochs that were measured; {told}."
    return (
        f"{head}<figure class=plot><div class=panels>{image(svg, 'svg+xml', told)}</div>"
        f"<figcaption>{escape(caption)} {numbers_link('../epochs')}</figcaption></figure>"
    )


def _finite(epochs: Sequence[float], values: Sequence[float]) -> list[tuple[int, float]]:
    return [(int(e), float(v)) for e, v in zip(epochs, values, strict=False) if math.isfinite(v)]


def _choice(page: ModelPage) -> str:
    if not page.choice:
        return ""
    head = f"<h2>The number of trained blocks</h2>\n<p>{escape(page.choice)}</p>"
    if not any("mean_accuracy" in row for row in page.choice_rows):
        return f"{head}\n<p class=caveat>{numbers_link('../choice', 'The rule')}</p>"
    rows = []
    for row in page.choice_rows:
        k, mean = row["num_unfrozen_blocks"], row["mean_accuracy"]
        name = {0: "head alone", -1: "everything"}.get(k, f"{k}")
        known = "diverged" if math.isnan(mean) else f"{_percent(mean)} ± {_percent(row['standard_error'])}"
        texts = [f"<td>{known}</td>", f"<td>{'chosen' if row['chosen'] else ''}</td>"]
        rows.append([th(f"<b>{name}</b>" if row["chosen"] else name, "row"), *texts])
    caption = "Accuracy on training images held out, in %: mean over the folds ± its standard error."
    heads = ["Trained blocks", "Held out, %", ""]
    return f"{head}\n{table(heads, [rows], caption, numbers='../choice')}"


def _confusion(outcome: Outcome) -> str:
    names = outcome.class_names
    head = "<h2>What is taken for what</h2>\n"
    if len(names) > MAX_CLASSES:
        pairs = confused_pairs(outcome, MAX_LISTED)
        rows = [
            [th(escape(a), "row"), f"<td>{escape(b)}</td>", f"<td>{n:,}</td>", f"<td>{_percent(share)}</td>"]
            for a, b, n, share in pairs
        ]
        caption = f"The pairs that are confused most often, of {len(names):,} classes."
        heads = ["Label", "Read as", "Images", "% of the label’s"]
        return head + table(heads, [rows], caption, numbers="../confusion", classes="words")
    cell = "padding:.3rem .4rem;text-align:center;min-width:2.25rem"
    columns = "".join(f'<th scope=col style="{cell}">{escape(name)}</th>' for name in names)
    shares = outcome.confusion / np.maximum(outcome.confusion.sum(axis=1, keepdims=True), 1)
    rows = []
    for i, name in enumerate(names):
        cells = [
            f'<td style="{cell};background:{_colour(shares[i, j], i == j)}">{n or "<small>·</small>"}</td>'
            for j, n in enumerate(outcome.confusion[i].tolist())
        ]
        first = f'<th scope=row style="position:sticky;left:0;background:#fff">{escape(name)}</th>'
        rows.append(f"<tr>{first}{''.join(cells)}</tr>")
    content = (
        f"<table><thead><tr>{th('Label&nbsp;↓ read&nbsp;as&nbsp;→', 'col')}{columns}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
    )
    caption = (
        "Confusion matrix: test images by label (row) and by what the network reads (column). The deeper the "
        "colour, the larger the share of the label’s images: blue correct, orange wrong."
    )
    return head + scrolling(content, caption, numbers="../confusion")


def _colour(share: float, right: bool) -> str:
    """Dark text stays readable on the deepest of them."""
    if not share:
        return "none"
    red, green, blue = (0, 114, 178) if right else (213, 94, 0)
    return f"rgba({red},{green},{blue},{0.08 + 0.47 * share:.3f})"


def _classes(outcome: Outcome) -> str:
    records = [record for record in class_records(outcome) if record["num_images"]]
    shown, caption = records, "Accuracy on the test images of each class, in %, with Wilson’s 95 % interval."
    if len(outcome.class_names) > MAX_CLASSES:
        # By the upper end, or classes of one image would be all there is to see.
        shown = sorted(records, key=lambda record: (record["high95"], record["accuracy"]))[:MAX_LISTED]
        caption = f"The {len(shown)} classes that are read worst, by the upper end of the interval. {caption}"
    rows = [
        [
            th(escape(record["class"]), "row"),
            f"<td>{record['num_images']:,}</td>",
            f"<td>{_percent(record['accuracy'])}</td>",
            f"<td>{_percent(record['low95'])} … {_percent(record['high95'])}</td>",
            f"<td>{bar(record)}</td>",
        ]
        for record in shown
    ]
    mean = _percent(float(np.nanmean(outcome.class_accuracy)))
    said = f"<p>The mean over the classes is {mean}&nbsp;%.</p>\n"
    heads = ["Class", "Images", "Accuracy, %", "95 % interval", ""]
    return f"<h2>Class by class</h2>\n{said}{table(heads, [rows], caption, numbers='../classes')}"


def bar(record: Mapping[str, Any]) -> str:
    """The share as a bar, its interval as a line across the bar's end."""
    width, low, high = (100 * record[name] for name in ("accuracy", "low95", "high95"))
    return (
        '<svg width="144" height="12" viewBox="0 0 100 12" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect width="100" height="12" fill="{figures.RULE}"/>'
        f'<rect width="{width:.2f}" height="12" fill="#0072b2" fill-opacity=".55"/>'
        f'<line x1="{low:.2f}" x2="{high:.2f}" y1="6" y2="6" stroke="{figures.INK}" stroke-width="1.5"/>'
        "</svg>"
    )


def _mistakes(page: ModelPage) -> str:
    outcome = page.outcome
    head = "<h2>The most confident mistakes</h2>\n"
    if not len(outcome.mistakes):
        return f"{head}<p>There are none: every test image is classified correctly.</p>"
    records = mistake_records(outcome)
    items = []
    for record, pixels in zip(records[:MAX_MISTAKES], page.pictures, strict=False):
        label, predicted = record["label"], record["predicted"]
        certain = f"{_percent(record['probability'])}\N{NO-BREAK SPACE}%"
        # A long label would push the prediction out of the lines that are shown.
        between = "</span><span class=label>" if len(label + predicted) > 12 else ""
        alt = f"Test image {record['index']}: {label}, read as {predicted} ({certain})"
        items.append(
            f"<li>{image(figures.png(pixels), 'png', alt, 'picture')}<span class=label>"
            f"{escape(label)} → {between}<b>{escape(predicted)}</b></span>"
            f"<span class=label>{certain}</span></li>"
        )
    caption = (
        f"{_count(len(records), 'test image')} of {len(outcome.labels):,} are read wrongly. "
        f"Shown: {len(items)}, the surest first. Label → what the network reads, and the probability that it "
        "gives."
    )
    return (
        f"{head}<figure class=plot><ul class=strip>{''.join(items)}</ul>"
        f"<figcaption>{escape(caption)} {numbers_link('../mistakes', 'All of them')}</figcaption></figure>"
    )


def reproduction(page: ModelPage) -> str:
    parts = ["<h2>Reproduce</h2>"]
    if page.command:
        words = (f"<span>{escape(word)}</span>" for word in page.command.split(" "))
        parts.append(f"<pre class=command><code>{' '.join(words)}</code></pre>")
    if page.versions:
        listed = ", ".join(f"{name} {version}" for name, version in sorted(page.versions.items()))
        parts.append(f"<p>Made with {escape(listed)}.</p>")
    if page.config:
        text = json.dumps(dict(page.config), indent=2, sort_keys=True, default=str)
        parts.append(f"<details><summary>The recipe</summary><pre>{escape(text)}</pre></details>")
    return "\n".join(parts) if len(parts) > 1 else ""


def _confusion_csv(outcome: Outcome) -> str:
    """A class may be called anything, so the columns are told by their place."""
    names = zip(outcome.class_names, outcome.confusion.tolist(), strict=True)
    return csv_lines([["label", *outcome.class_names], *([name, *counts] for name, counts in names)])


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
