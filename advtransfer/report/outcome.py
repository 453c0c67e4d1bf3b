"""A network's predictions on labelled test images: counts, accuracy by class, and its worst mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int64, Integer

from advtransfer.intervals import wilson

if TYPE_CHECKING:
    from pandas import DataFrame


class Outcome(NamedTuple):
    """Labels and predictions of N test images of C classes."""

    class_names: tuple[str, ...]
    labels: Int64[np.ndarray, " n"]
    predictions: Int64[np.ndarray, " n"]
    probabilities: Float64[np.ndarray, " n"]  # that the network gives its prediction
    confusion: Int64[np.ndarray, "c c"]  # images by label (row) and prediction (column)
    class_accuracy: Float64[np.ndarray, " c"]  # NaN for a class without an image
    mistakes: Int64[np.ndarray, " m"]  # images classified wrongly, the most confident mistake first

    @property
    def accuracy(self) -> float:
        return float(np.trace(self.confusion) / len(self.labels))


def make_outcome(
    labels: Integer[np.ndarray, " n"], logits: Float[np.ndarray, "n c"], class_names: Sequence[str]
) -> Outcome:
    """Outcome of logits against labels, integers from 0 to C - 1.

    Raises:
      ValueError: other shapes.
    """
    labels, logits = np.asarray(labels, np.int64), np.asarray(logits, np.float64)
    if labels.ndim != 1 or logits.shape != (len(labels), len(class_names)):
        raise ValueError(
            f"labels are {labels.shape} and logits {logits.shape}: pass [N] and [N, {len(class_names)}]"
        )
    predictions = logits.argmax(axis=1)
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = exponentials.max(axis=1) / exponentials.sum(axis=1)
    confusion = np.zeros((len(class_names),) * 2, np.int64)
    np.add.at(confusion, (labels, predictions), 1)
    counts = confusion.sum(axis=1)
    class_accuracy = np.where(counts > 0, np.diagonal(confusion) / np.maximum(counts, 1), np.nan)
    wrong = np.flatnonzero(predictions != labels)
    mistakes = wrong[np.argsort(-probabilities[wrong], kind="stable")]
    return Outcome(
        tuple(class_names), labels, predictions, probabilities, confusion, class_accuracy, mistakes
    )


def class_table(outcome: Outcome) -> DataFrame:
    """A row per class: its test images, the correct ones, their share and its 95 % interval."""
    import pandas as pd

    totals, correct = outcome.confusion.sum(axis=1), np.diagonal(outcome.confusion)
    low, high = wilson(correct, totals)
    columns = {"num_images": totals, "num_correct": correct, "accuracy": outcome.class_accuracy}
    return pd.DataFrame({"class": outcome.class_names, **columns, "low95": low, "high95": high})


def mistake_table(outcome: Outcome, files: Sequence[str] = ()) -> DataFrame:
    """A row per wrong prediction, the most confident first; `index` counts the test images from 0, and `file`
    is of `files`, the names of all test images, if they are known."""
    import pandas as pd

    names, wrong = np.array(outcome.class_names, object), outcome.mistakes
    classes = {"label": names[outcome.labels[wrong]], "predicted": names[outcome.predictions[wrong]]}
    table = pd.DataFrame({"index": wrong, **classes, "probability": outcome.probabilities[wrong]})
    return table.assign(file=np.asarray(files)[wrong]) if len(files) else table


def confused_pairs(outcome: Outcome, number: int) -> DataFrame:
    """Label, prediction, images, and their share of the label's, of the wrong cells with the most images."""
    import pandas as pd

    names, wrong = np.array(outcome.class_names, object), outcome.confusion.copy()
    np.fill_diagonal(wrong, 0)
    i, j = np.unravel_index(np.argsort(-wrong, axis=None, kind="stable")[:number], wrong.shape)
    counts, totals = wrong[i, j], np.maximum(outcome.confusion.sum(axis=1), 1)
    columns = {"label": names[i], "predicted": names[j], "num_images": counts, "share": counts / totals[i]}
    return pd.DataFrame(columns)[counts > 0]
