"""Predictions of new images: the classes found, the surest and the least sure pictures, and calibration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Integer, UInt8

from advtransfer.intervals import wilson
from advtransfer.report import figures
from advtransfer.report.model_page import short_name
from advtransfer.report.sections import (
    Axis,
    Entry,
    Panel,
    Part,
    PictureRow,
    Pictures,
    Plot,
    Section,
    Series,
    Style,
    Table,
    Text,
)

if TYPE_CHECKING:
    from advtransfer.calibration import Calibration, Reliability

_NUM_SHOWN = 16  # of the surest, and of the least sure pictures
_MAX_SIDE = 224  # pixels of a picture on the page
_MAX_CLASSES, _MAX_PROBLEMS = 50, 20  # listed
_THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
_SCALED, _RAW = "with temperature", "without"


class Predicted(NamedTuple):
    """The K most probable classes of N images, the most probable first.

    Attributes:
      names: of the images; `problems`: by index, why one could not be decoded.
    """

    names: Sequence[str]
    class_names: Sequence[str]
    classes: Integer[np.ndarray, "n k"]
    probabilities: Float64[np.ndarray, "n k"]
    problems: Mapping[int, str] = MappingProxyType({})


def _by_probability(predicted: Predicted) -> np.ndarray:
    """Indices of the images that could be decoded, the surest first."""
    order = np.argsort(-predicted.probabilities[:, 0], kind="stable")
    return order[~np.isin(order, list(predicted.problems))]


def shown(predicted: Predicted) -> Integer[np.ndarray, " m"]:
    """The images whose pictures the page shows: the surest, then the least sure."""
    order = _by_probability(predicted)
    return np.concatenate([order[:_NUM_SHOWN], order[_NUM_SHOWN:][::-1][:_NUM_SHOWN]])


def prediction_sections(
    predicted: Predicted,
    pictures: UInt8[np.ndarray, "m h w 3"],
    calibration: Calibration | None,
    held_out: str,
    *,
    abstain_below: float,
) -> list[Section]:
    """The sections of a page.

    Args:
      predicted: of the new images.
      pictures: of `shown`.
      calibration: on held-out images, and `held_out` what these are called; or None.
      abstain_below: the probability below which no class is answered.
    """
    return [
        _classes(predicted, abstain_below),
        _pictures(predicted, pictures),
        _calibration(calibration, held_out, abstain_below),
        *([_problems(predicted)] if predicted.problems else []),
    ]


def _records(predicted: Predicted, abstain_below: float) -> list[dict[str, Any]]:
    names, number = np.array(predicted.class_names, object), predicted.classes.shape[1]
    heads = [("class", "probability"), *((f"class_{k}", f"probability_{k}") for k in range(2, number + 1))]
    records = []
    for i, name in enumerate(predicted.names):
        problem = predicted.problems.get(i, "")
        ranked = zip(heads, names[predicted.classes[i]], predicted.probabilities[i].tolist(), strict=True)
        best = {} if problem else {k: x for (a, b), c, p in ranked for k, x in ((a, c), (b, p))}
        record = {"file": name, **{column: best.get(column) for pair in heads[:1] for column in pair}}
        record["abstain"] = "" if problem else int(best["probability"] < abstain_below)
        record |= {column: best.get(column) for pair in heads[1:] for column in pair}
        records.append(record | {"problem": problem})
    return records


def _classes(predicted: Predicted, abstain_below: float) -> Section:
    order = _by_probability(predicted)
    best, surest = predicted.classes[order, 0], predicted.probabilities[order, 0]
    is_answered = surest >= abstain_below
    answered, total = int(is_answered.sum()), len(order)
    finding = (
        f"{answered:,} of {total:,} image{'s' * (total != 1)} classified ({_percent(answered / total)} %)"
        + (f", {total - answered:,} abstained from" if answered < total else "")
        + f": the network abstains where its probability is below {_percent(abstain_below)} %."
    )
    counts = np.bincount(best, minlength=len(predicted.class_names))
    answers = np.bincount(best[is_answered], minlength=len(counts))
    listed = np.argsort(-counts, kind="stable")[:_MAX_CLASSES]
    rows = [
        [predicted.class_names[c], f"{counts[c]:,}", f"{answers[c]:,}", f"{counts[c] - answers[c]:,}"]
        for c in listed
        if counts[c]
    ]
    more = (
        f" The {len(rows)} most frequent of {np.sum(counts > 0)}." if len(rows) < np.sum(counts > 0) else ""
    )
    caption = f"Images by their most probable class.{more}"
    table = Table(caption, ["Most probable class", "Images", "Answered", "Abstained"], rows, "predictions")
    return Section("Classes", finding, [table], {"predictions": _records(predicted, abstain_below)})


def _pictures(predicted: Predicted, pictures: np.ndarray) -> Section:
    indices = shown(predicted)
    step = -(-pictures.shape[1] // _MAX_SIDE)
    pictures = pictures[:, ::step, ::step]
    surest = len(indices[:_NUM_SHOWN])
    parts = []
    for caption, chosen in (
        ("The surest", slice(0, surest)),
        ("The least sure, the least sure first", slice(surest, None)),
    ):
        labels, alts = [], []
        for i in indices[chosen]:
            name, share = predicted.class_names[predicted.classes[i, 0]], predicted.probabilities[i, 0]
            labels.append(Entry("", name, f"{_percent(share)} %, {short_name(predicted.names[i])}"))
            alts.append(f"{predicted.names[i]}: {name} ({_percent(share)} %)")
        if alts:
            rows = [[PictureRow("", pictures[chosen], labels, alts)]]
            parts.append(
                Pictures(f"{caption}: most probable class, and its probability.", rows, "predictions.csv")
            )
    return Section("The surest and the least sure", parts=parts)


def _calibration(calibration: Calibration | None, held_out: str, abstain_below: float) -> Section:
    title = "How far to trust the probabilities"
    if calibration is None:
        text = (
            "The probabilities are the network’s own, and how often it is right is not known, as there are "
            "no held-out labelled images: config.predict.held_out names some."
        )
        return Section(title, text)
    temperature, number = calibration.temperature, len(calibration.labels)
    images = f"{number:,} held-out image{'s' * (number != 1)} of {held_out}"
    before, after = calibration.before, calibration.after
    if temperature.problem:
        finding = f"The probabilities are the network’s own, without a temperature: {temperature.problem}."
    else:
        finding = (
            f"The probabilities are scaled with a temperature of {temperature.value:.4g} (95 % interval "
            f"{temperature.low:.2f} … {temperature.high:.2f}), fitted on {images}."
        )
    curves = [(_RAW if not temperature.problem else "the network’s own", 0, before)]
    if not temperature.problem:
        curves.insert(0, (_SCALED, 1, after))
    series = [_series(label, place, found) for label, place, found in curves]
    least = math.floor(10 * min(found.probability.min() for _, _, found in curves)) * 10
    perfect = Series(
        Style("calibrated", figures.MUTED, "", "dotted", True), (least, 100), (least / 100, 1.0), (0, 0)
    )
    panel = Panel(
        "Held-out images",
        "Accuracy, %",
        Axis("probability, %", values=range(least, 101, 10)),
        series,
        (min(least / 100, *(float(found.low.min()) for _, _, found in curves)) - 0.02, 1.02),
        behind=[perfect],
    )
    caption = (
        f"Accuracy against the mean probability of the predicted class, on {images}, in groups of equal "
        "size; bands: 95 % (Wilson). Calibrated predictions lie on the diagonal."
        + ("" if temperature.problem else " Each image is scaled with a temperature fitted on others.")
    )
    rows = [
        [
            label,
            _percent(found.ece),
            f"{_percent(found.expected[0])} … {_percent(found.expected[1])}",
            f"{found.loss:.3f}",
        ]
        for label, _, found in curves
    ]
    errors = Table(
        "Expected calibration error (15 bins), and its range for a perfectly calibrated network on as many "
        "images; mean cross-entropy.",
        ["Probabilities", "Error, %", "If calibrated, %", "Loss, nats"],
        rows,
        "reliability",
    )
    files = {
        "reliability": _reliability_records(curves),
        "abstaining": _abstaining(calibration, abstain_below),
    }
    parts: list[Part] = [
        Text("This holds for images like the held-out ones; of others it says nothing.", look="muted"),
        *([] if temperature.problem else [Text(as_exported(temperature.value), look="muted")]),
        Plot(caption, [panel], "reliability"),
        errors,
        _abstaining_table(files["abstaining"], abstain_below, images),
    ]
    return Section(title, finding, parts, files)


def as_exported(temperature: float) -> str:
    return f"stage=export gives the same probabilities with --config.export.temperature={temperature:.4g}."


def _series(label: str, place: int, found: Reliability) -> Series:
    style = (figures.TRAINING, figures.TEST)[place]._replace(label=label)
    bounds = list(zip(found.low.tolist(), found.high.tolist(), strict=True))
    x, nothing = (100 * found.probability).tolist(), [float("nan")] * len(bounds)
    return Series(style, x, found.accuracy.tolist(), nothing, bounds)


def _reliability_records(curves: Sequence[tuple[str, int, Reliability]]) -> list[dict[str, Any]]:
    columns = ("probability", "accuracy", "low", "high", "count")
    return [
        {"probabilities": label, **dict(zip(columns, values, strict=True))}
        for label, _, found in curves
        for values in zip(*(getattr(found, column).tolist() for column in columns), strict=True)
    ]


def _abstaining(calibration: Calibration, abstain_below: float) -> list[dict[str, Any]]:
    """A row per threshold: what is answered of the held-out images, and how much of that is right."""
    largest = calibration.held_out.max(axis=1)
    is_correct = calibration.held_out.argmax(axis=1) == calibration.labels
    records = []
    for threshold in sorted({*_THRESHOLDS, abstain_below, 0.0}):
        is_answered = largest >= threshold
        correct, answered = int((is_answered & is_correct).sum()), int(is_answered.sum())
        low, high = wilson(correct, answered)
        records.append(
            {
                "abstain_below": threshold,
                "num_images": len(largest),
                "num_answered": answered,
                "num_correct": correct,
                "accuracy": correct / answered if answered else None,
                "low95": float(low) if answered else None,
                "high95": float(high) if answered else None,
            }
        )
    return records


def _abstaining_table(records: Sequence[Mapping[str, Any]], abstain_below: float, images: str) -> Table:
    rows = []
    for record in records:
        name, answered = _percent(record["abstain_below"]), record["num_answered"]
        cells: list[str | Entry] = [f"{_percent(answered / record['num_images'])}", "–", ""]
        if answered:
            bar = (record["accuracy"], record["low95"], record["high95"])
            share, low, high = map(_percent, bar)
            cells[1:] = [share, Entry(f"{low} … {high}", bar=bar)]
        else:
            cells[2] = Entry("", bar=(float("nan"),) * 3)
        rows.append([Entry(strong=name) if record["abstain_below"] == abstain_below else name, *cells])
    return Table(
        f"What is answered of the {images}, and how often that is right, in %, if the network abstains below "
        "a probability; in bold the one that was set (config.predict.abstain_below).",
        ["Abstain below, %", "Answered, %", "Right, %", "95 % interval"],
        rows,
        "abstaining",
    )


def _problems(predicted: Predicted) -> Section:
    number, total = len(predicted.problems), len(predicted.names)
    finding = f"{number:,} of {total:,} images could not be decoded, and have no prediction."
    listed = [f"{predicted.names[i]}: {why}" for i, why in [*predicted.problems.items()][:_MAX_PROBLEMS]]
    more = [f"and {number - len(listed):,} more, in predictions.csv"] * (number > len(listed))
    return Section(
        "Images that could not be decoded", finding, [Text("\n".join([*listed, *more]), look="list")]
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
