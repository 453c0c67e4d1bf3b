"""A network's predictions on labelled test images: counts, accuracy by class, and its worst mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from advtransfer.report.intervals import wilson


class Outcome(NamedTuple):
    """Labels and predictions of N test images of C classes."""

    class_names: tuple[str, ...]
    labels: np.ndarray  # int64 [N]
    predictions: np.ndarray  # int64 [N]
    probabilities: np.ndarray  # float64 [N], that the network gives its prediction
    confusion: np.ndarray  # int64 [C, C], images by label (row) and prediction (column)
    class_accuracy: np.ndarray  # float64 [C]; NaN for a class without an image
    mistakes: np.ndarray  # int64 [M], images classified wrongly, the most confident mistake first

    @property
    def accuracy(self) -> float:
        return float(np.trace(self.confusion) / len(self.labels))


def make_outcome(labels: np.ndarray, logits: np.ndarray, class_names: Sequence[str]) -> Outcome:
    """Outcome of logits [N, C] against labels, integers [N] from 0 to C - 1.

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


def class_records(outcome: Outcome) -> list[dict[str, Any]]:
    """One record per class: its test images, the correct ones, their share and its 95 % interval."""
    records = []
    for c, name in enumerate(outcome.class_names):
        correct, total = int(outcome.confusion[c, c]), int(outcome.confusion[c].sum())
        low, high = wilson(correct, total)
        records.append(
            {
                "class": name,
                "num_images": total,
                "num_correct": correct,
                "accuracy": float(outcome.class_accuracy[c]),
                "low95": low,
                "high95": high,
            }
        )
    return records


def mistake_records(outcome: Outcome) -> list[dict[str, Any]]:
    """One record per wrong prediction, the most confident first; `index` counts the test images from 0."""
    return [
        {
            "index": int(i),
            "label": outcome.class_names[outcome.labels[i]],
            "predicted": outcome.class_names[outcome.predictions[i]],
            "probability": float(outcome.probabilities[i]),
        }
        for i in outcome.mistakes
    ]


def confused_pairs(outcome: Outcome, number: int) -> list[tuple[str, str, int, float]]:
    """(label, prediction, images, their share of the label's) of the wrong cells with the most images."""
    wrong = outcome.confusion * ~np.eye(len(outcome.class_names), dtype=bool)
    order = np.argsort(-wrong, axis=None, kind="stable")[:number]
    totals = outcome.confusion.sum(axis=1)
    return [
        (outcome.class_names[i], outcome.class_names[j], int(wrong[i, j]), float(wrong[i, j] / totals[i]))
        for i, j in zip(*np.unravel_index(order, wrong.shape), strict=True)
        if wrong[i, j]
    ]
