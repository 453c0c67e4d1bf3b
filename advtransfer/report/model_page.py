"""The page of one fine-tuned network: what it was made from, how accurate it is, and where it errs."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from advtransfer.report import figures
from advtransfer.report.files import csv_lines, csv_text
from advtransfer.report.intervals import wilson
from advtransfer.report.outcome import Outcome, class_records, confused_pairs, mistake_records
from advtransfer.report.render import write_page
from advtransfer.report.sections import (
    Axis,
    Entry,
    Matrix,
    Page,
    Panel,
    PictureRow,
    Pictures,
    Plot,
    Section,
    Series,
    Table,
    Text,
)

MAX_CLASSES = 30  # in a confusion matrix that one can read
MAX_MISTAKES = 16
MAX_LISTED = 20  # confused pairs, and classes where there are too many to show

_EMPTY: Mapping[str, Any] = MappingProxyType({})
_FILES = ("epochs.csv", "choice.csv", "confusion.csv", "classes.csv", "mistakes.csv", "report.html")


class ModelPage(NamedTuple):
    """What the page of a network is made of; anything but `title` and `history` may be missing.

    Attributes:
      title, facts, command, versions, config: as in `Page`.
      history: by column, of equal length: "epoch" (counted from 1), "train_accuracy" (in [0, 1]) and
        whatever else was measured; "test_accuracy" is drawn.
      outcome: on the test images.
      pictures: of the first of `outcome.mistakes`, [M, H, W, 3] in [0, 1]; the first 16 are shown.
      choice: how the number of trained blocks was chosen, in a sentence; its table in `choice_rows`, one
        record per candidate, with "num_unfrozen_blocks", "chosen" and, if measured, "mean_accuracy" and
        "standard_error".
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
    outcome, columns = page.outcome, list(page.history)
    files = {"epochs.csv": csv_lines([columns, *zip(*page.history.values(), strict=True)])}
    if page.choice_rows:
        files["choice.csv"] = csv_text(page.choice_rows, list(page.choice_rows[0]))
    sections = [_epochs(page), *([_choice(page)] if page.choice else [])]
    headline, note = "No test images were given: the accuracy on new images is not known.", ""
    if outcome is not None:
        classes, counts = class_records(outcome), outcome.confusion.tolist()
        names = outcome.class_names  # which may be anything, so columns are known by their place
        lines = [(name, *row) for name, row in zip(names, counts, strict=True)]
        files["confusion.csv"] = csv_lines([("label", *names), *lines])
        files["classes.csv"] = csv_text(classes, list(classes[0]))
        wrong = mistake_records(outcome)
        files["mistakes.csv"] = csv_text(wrong, ("index", "label", "predicted", "probability"))
        sections += [_confusion(outcome), _classes(outcome), _mistakes(page)]
        correct, total = int(np.trace(outcome.confusion)), len(outcome.labels)
        low, high = map(_percent, wilson(correct, total))
        headline = (
            f"{_percent(correct / total)} % of {_count(total, 'test image')} {'is' if total == 1 else 'are'} "
            f"classified correctly (95 % interval {low} … {high} %)."
        )
        note = (
            "The interval (Wilson’s) is over test images alone: one network was trained, and another seed or "
            "other training images would change the result too."
        )
    for name in _FILES:
        if name not in (*files, "report.html"):
            (folder / name).unlink(missing_ok=True)
    rule = {"choice.csv": "the rule for the number of trained blocks"} if page.choice_rows else {}
    shown = (page.facts, page.command, page.versions, page.config, rule)
    return write_page(Page(page.title, sections, [headline], note, *shown), folder, files)


def _epochs(page: ModelPage) -> Section:
    """Accuracy on the training and the test images, epoch by epoch."""
    epochs = page.history["epoch"]
    lines = []
    for style, column in ((figures.TRAINING, "train_accuracy"), (figures.TEST, "test_accuracy")):
        known = [
            (int(x), float(y))
            for x, y in zip(epochs, page.history.get(column, ()), strict=False)
            if math.isfinite(y)
        ]
        if known:
            lines.append(Series(style, *zip(*known, strict=True), [math.nan] * len(known)))
    last = "; ".join(
        f"{line.style.label}: {_percent(line.mean[-1])} % after epoch {line.x[-1]}" for line in lines
    )
    title = "Accuracy by epoch"
    if len(epochs) < 2:
        text = f"Accuracy on {last}. It was measured once; evaluate_epochs asks for more."
        return Section(title, parts=[Text(text)])
    low, high = figures.value_range(lines)
    panel = Panel(
        "Training and test images" if len(lines) == 2 else lines[0].style.label.capitalize(),
        "Accuracy, %",
        Axis("epoch (logarithmic)", log=True),
        lines,
        (max(low, -0.02), min(high, 1.02)),
    )
    caption = f"Accuracy in evaluation mode, {last}."
    return Section(title, parts=[Plot(caption, [panel], "epochs.csv")])


def _choice(page: ModelPage) -> Section:
    rows = []
    for row in page.choice_rows:
        if "mean_accuracy" not in row:
            continue
        k, mean = row["num_unfrozen_blocks"], row["mean_accuracy"]
        name = {0: "head alone", -1: "everything"}.get(k, f"{k}")
        known = "diverged" if math.isnan(mean) else f"{_percent(mean)} ± {_percent(row['standard_error'])}"
        rows.append([Entry(strong=name) if row["chosen"] else name, known, "chosen" if row["chosen"] else ""])
    parts: list[Any] = [Text(page.choice)]
    if rows:
        caption = "Accuracy on training images held out, in %: mean over the folds ± its standard error."
        parts.append(Table(caption, ["Trained blocks", "Held out, %", ""], rows, "choice.csv"))
    return Section("The number of trained blocks", parts=parts)


def _confusion(outcome: Outcome) -> Section:
    title, names = "What is taken for what", outcome.class_names
    if len(names) > MAX_CLASSES:
        rows = [(a, b, f"{n:,}", _percent(share)) for a, b, n, share in confused_pairs(outcome, MAX_LISTED)]
        caption = f"The pairs that are confused most often, of {len(names):,} classes."
        heads = ["Label", "Prediction", "Images", "% of the label’s"]
        return Section(title, parts=[Table(caption, heads, rows, "confusion.csv", words=True)])
    caption = (
        "Confusion matrix: test images by label (row) and prediction (column), coloured by the share of the "
        "label’s images: blue correct, orange wrong."
    )
    return Section(
        title, parts=[Matrix(caption, [("", outcome.confusion)], names, "confusion.csv", confusion=True)]
    )


def _classes(outcome: Outcome) -> Section:
    shown = [record for record in class_records(outcome) if record["num_images"]]
    caption = "Accuracy on the test images of each class, in %, with Wilson’s 95 % interval."
    if len(outcome.class_names) > MAX_CLASSES:
        # By the upper end, or classes of one image would be all there is to see.
        shown = sorted(shown, key=lambda record: (record["high95"], record["accuracy"]))[:MAX_LISTED]
        caption = f"The {len(shown)} least accurate classes, by the upper end of the interval. {caption}"
    rows = []
    for record in shown:
        bar = [record[name] for name in ("accuracy", "low95", "high95")]
        share, low, high = map(_percent, bar)
        interval = Entry(f"{low} … {high}", bar=bar)
        rows.append([record["class"], f"{record['num_images']:,}", share, interval])
    mean = _percent(float(np.nanmean(outcome.class_accuracy)))
    heads = ["Class", "Images", "Accuracy, %", "95 % interval"]
    parts = [Text(f"The mean over the classes is {mean} %."), Table(caption, heads, rows, "classes.csv")]
    return Section("Class by class", parts=parts)


def _mistakes(page: ModelPage) -> Section:
    title, outcome = "The most confident mistakes", page.outcome
    wrong = mistake_records(outcome)
    if not wrong:
        return Section(title, parts=[Text("There are none: every test image is classified correctly.")])
    images = np.asarray(page.pictures)[: min(MAX_MISTAKES, len(wrong))]
    labels, alts = [], []
    for record in wrong[: len(images)]:
        label, predicted, certain = (
            record["label"],
            record["predicted"],
            f"{_percent(record['probability'])} %",
        )
        labels.append(Entry(f"{label} → ", predicted, certain))
        alts.append(f"Test image {record['index']}: {label}, classified as {predicted} ({certain})")
    caption = (
        f"{_count(len(wrong), 'test image')} of {len(outcome.labels):,} are classified wrongly. Shown: "
        f"{len(labels)}, the most confident first: label → prediction, and its probability."
    )
    return Section(title, parts=[Pictures(caption, [[PictureRow("", images, labels, alts)]], "mistakes.csv")])


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
