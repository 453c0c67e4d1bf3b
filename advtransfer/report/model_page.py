"""The page of one fine-tuned network: what it was made from, how accurate it is, and where it errs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from advtransfer.foreign import AnyPath
from advtransfer.intervals import wilson
from advtransfer.report import figures
from advtransfer.report.files import csv_lines, csv_text
from advtransfer.report.outcome import Outcome, class_table, confused_pairs, mistake_table
from advtransfer.report.render import write_page
from advtransfer.report.sections import (
    EMPTY,
    Axis,
    Entry,
    Matrix,
    Page,
    Panel,
    Part,
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
_MAX_NAME = 16  # characters of a file's name below a picture
MAX_LISTED = 20  # confused pairs, and classes where there are too many to show

_FILES = ("epochs.csv", "choice.csv", "confusion.csv", "classes.csv", "mistakes.csv")


class ModelPage(NamedTuple):
    """What the page of a network is made of; anything but `title` and `history` may be missing.

    Attributes:
      title, facts, command, versions, config: as in `Page`.
      history: by column, of equal length: "epoch" (counted from 1), "train_accuracy" (in [0, 1]) and
        whatever else was measured; "test_accuracy" is drawn.
      outcome: on the test images.
      files: names of the test images.
      pictures: of the first of `outcome.mistakes`, [M, H, W, 3] in [0, 1]; the first 16 are shown.
      choice: how the number of trained blocks was chosen, in a sentence; its table in `choice_rows`, one
        record per candidate, with "num_unfrozen_blocks", "chosen" and, if measured, "mean_accuracy" and
        "standard_error".
    """

    title: str
    history: Mapping[str, Sequence[float] | np.ndarray]
    facts: Sequence[tuple[str, str]] = ()
    outcome: Outcome | None = None
    files: Sequence[str] = ()
    pictures: np.ndarray | Sequence = ()
    choice: str = ""
    choice_rows: Sequence[Mapping[str, Any]] = ()
    command: str = ""
    versions: Mapping[str, str] = EMPTY
    config: Mapping[str, Any] = EMPTY


def write_model_page(page: ModelPage, folder: str | AnyPath) -> AnyPath:
    """Writes the page and its tables into `folder`, a local or any other path; returns that of report.html.

    The tables: `epochs.csv`; `choice.csv` of a chosen number of blocks; of test images `confusion.csv`,
    `classes.csv` and `mistakes.csv`. Each file appears whole, report.html last; one that an earlier network
    left, and that this one has nothing for, is deleted. The same page gives the same bytes.
    """
    folder = Path(folder) if isinstance(folder, str) else folder
    outcome, columns = page.outcome, list(page.history)
    files = {"epochs.csv": csv_lines([columns, *zip(*page.history.values(), strict=True)])}
    is_rule = page.choice_rows and "mean_accuracy" not in page.choice_rows[0]
    if page.choice_rows:
        files["choice.csv"] = csv_text(page.choice_rows)
    sections = [_epochs(page), _choice(page)]
    headline, note = "No test images were given: the accuracy on new images is not known.", ""
    if outcome is not None:
        names = outcome.class_names  # which may be anything, so columns are known by their place
        counts = [(name, *row) for name, row in zip(names, outcome.confusion.tolist(), strict=True)]
        files["confusion.csv"] = csv_lines([("label", *names), *counts])
        files["classes.csv"] = csv_text(class_table(outcome))
        files["mistakes.csv"] = csv_text(mistake_table(outcome, page.files))
        sections += [_confusion(outcome), _classes(outcome), _mistakes(outcome, page.files, page.pictures)]
        correct, total = int(np.trace(outcome.confusion)), len(outcome.labels)
        share, low, high = map(_percent, (correct / total, *wilson(correct, total)))
        images = "1 test image is" if total == 1 else f"{total:,} test images are"
        headline = f"{share} % of {images} classified correctly (95 % interval {low} … {high} %)."
        commonest = _percent(outcome.confusion.sum(axis=1).max() / total)
        note = (
            f"The most frequent class alone would be right for {commonest} %. The interval (Wilson’s) is "
            "over test images alone: one network was trained; another seed or other training images would "
            "change the result too."
        )
    made = Page(
        page.title,
        sections=[section for section in sections if section.parts],
        headline=[headline],
        note=note,
        facts=page.facts,
        command=page.command,
        versions=page.versions,
        config=page.config,
        files={"choice.csv": "the rule for the number of trained blocks"} if is_rule else {},
    )
    path = write_page(made, folder, files)
    for name in {*_FILES} - {*files}:
        (folder / name).unlink(missing_ok=True)
    return path


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
            x, y = zip(*known, strict=True)
            lines.append(Series(style, x, y, [math.nan] * len(known)))
    last = "; ".join(
        f"{line.style.label}: {_percent(line.mean[-1])} % after epoch {line.x[-1]}" for line in lines
    )
    title = "Accuracy by epoch"
    if len(epochs) < 2:
        text = f"Accuracy on {last}. It was measured once; evaluate_epochs asks for more."
        return Section(title, parts=[Text(text)])
    panel = Panel(
        "Training and test images" if len(lines) == 2 else lines[0].style.label.capitalize(),
        "Accuracy, %",
        Axis("epoch (logarithmic)", log=True),
        lines,
        figures.value_range(lines),
    )
    caption = f"Accuracy in evaluation mode, {last}."
    return Section(title, parts=[Plot(caption, [panel], "epochs.csv")])


def _choice(page: ModelPage) -> Section:
    rows = []
    for row in page.choice_rows:
        if "mean_accuracy" in row:
            k, mean, chosen = row["num_unfrozen_blocks"], row["mean_accuracy"], row["chosen"]
            name = {0: "head alone", -1: "everything"}.get(k, f"{k}")
            held_out = f"{_percent(mean)} ± {_percent(row['standard_error'])}"
            cells = ["diverged" if math.isnan(mean) else held_out, "chosen" if chosen else ""]
            rows.append([Entry(strong=name) if chosen else name, *cells])
    parts: list[Part] = [Text(page.choice)] if page.choice else []
    if rows:
        caption = "Accuracy on training images held out, in %: mean over the folds ± its standard error."
        parts.append(Table(caption, ["Trained blocks", "Held out, %", ""], rows, "choice.csv"))
    return Section("The number of trained blocks", parts=parts)


def _confusion(outcome: Outcome) -> Section:
    title, names = "Which classes are confused", outcome.class_names
    if len(names) > MAX_CLASSES:
        pairs = confused_pairs(outcome, MAX_LISTED).itertuples(index=False)
        rows = [(a, b, f"{number:,}", _percent(share)) for a, b, number, share in pairs]
        caption = f"The pairs that are confused most often, of {len(names):,} classes."
        heads = ["Label", "Prediction", "Images", "% of the label’s"]
        return Section(title, parts=[Table(caption, heads, rows, "confusion.csv", words=True)])
    caption = (
        "Confusion matrix: test images by label (row) and prediction (column), coloured by the share of the "
        "label’s images: blue correct, orange wrong."
    )
    matrix = Matrix(caption, [("", outcome.confusion)], names, "confusion.csv", confusion=True)
    return Section(title, parts=[matrix])


def _classes(outcome: Outcome) -> Section:
    table = class_table(outcome).query("num_images > 0")
    caption = "Accuracy on the test images of each class, in %, with Wilson’s 95 % interval."
    if len(outcome.class_names) > MAX_CLASSES:
        # By the upper end, or classes of one image would be all there is to see.
        table = table.sort_values(["high95", "accuracy"], kind="stable")[:MAX_LISTED]
        caption = f"The {len(table)} least accurate classes, by the upper end of the interval. {caption}"
    rows = []
    for name, number, _, *bar in table.itertuples(index=False):
        share, low, high = map(_percent, bar)
        rows.append([name, f"{number:,}", share, Entry(f"{low} … {high}", bar=bar)])
    mean = _percent(float(np.nanmean(outcome.class_accuracy)))
    heads = ["Class", "Images", "Accuracy, %", "95 % interval"]
    parts = [Text(f"The mean over the classes is {mean} %."), Table(caption, heads, rows, "classes.csv")]
    return Section("Class by class", parts=parts)


def _mistakes(outcome: Outcome, files: Sequence[str], pictures: np.ndarray | Sequence) -> Section:
    title, wrong = "The most confident mistakes", mistake_table(outcome, files)
    if wrong.empty:
        return Section(title, parts=[Text("There are none: every test image is classified correctly.")])
    images = np.asarray(pictures)[: min(MAX_MISTAKES, len(wrong))]
    labels, alts = [], []
    for i, label, predicted, probability, *file in wrong[: len(images)].itertuples(index=False):
        certain = f"{_percent(probability)} %"
        labels.append(Entry(f"{label} → ", predicted, ", ".join([certain, *map(short_name, file)])))
        alts.append(f"Test image {i}: {label}, classified as {predicted} ({certain})")
    caption = (
        f"Wrong predictions: {len(wrong):,} of {len(outcome.labels):,}. Shown: {len(labels)}, "
        "the most confident first: label → prediction, and its probability."
    )
    return Section(title, parts=[Pictures(caption, [[PictureRow("", images, labels, alts)]], "mistakes.csv")])


def short_name(file: str) -> str:
    """The end of an image's name, for a line below its picture."""
    last = file.rpartition("/")[2]
    return last if len(last) <= _MAX_NAME else f"…{last[1 - _MAX_NAME :]}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
