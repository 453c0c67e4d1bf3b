"""stage=predict: the classes of new images; leaves `predictions.csv` and `report.html`.

An image that cannot be decoded has a row that says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from advtransfer.calibration import Calibration, calibrate, probabilities
from advtransfer.config import ConfigError, names_key
from advtransfer.data import Dataset, Split
from advtransfer.data.unlabelled import Unlabelled, open_unlabelled
from advtransfer.evaluate import align_classes, check_head, predict, unseen
from advtransfer.models import Model
from advtransfer.progress import progress_bar
from advtransfer.report.prediction_page import Predicted, as_exported, prediction_sections, shown
from advtransfer.report.render import write_page
from advtransfer.report.sections import Page
from advtransfer.tasks.inputs import find_model, load_data
from advtransfer.tasks.workdir import Job, check_workdir, open_workdir, versions

_CROPPED = {True: "cropped, as photographs are", False: "squares of one size"}


class _Task(NamedTuple):
    model: Model
    images: Unlabelled
    held_out: Dataset | None
    splits: tuple[str, ...]  # of held_out, which have images


def run(job: Job) -> None:
    task, options = _check(job), job.options.prediction
    calibration, held_out = None, ""
    if task.held_out is not None:
        every = [task.held_out.in_memory(split) for split in task.splits]
        parts = [unseen(part, task.model.spec) for part in every]
        held_out = f"{task.held_out.name} ({' and '.join(task.splits)})"
        number = sum(part.num_images for part in parts)
        if not number:
            raise ConfigError(
                f"config.predict.held_out: the model was fine-tuned on all images of {held_out}: name images "
                "that it has not seen, or none"
            )
        if seen := sum(part.num_images for part in every) - number:
            held_out += f", without {seen:,} that the model was fine-tuned on"
        calibration = _calibrate(task.model, parts, options.batch_size)
    predicted = _predict(task, calibration, options.num_listed, options.batch_size)
    if len(predicted.problems) == len(predicted.names):
        place, why = next(iter(predicted.problems.items()))
        raise ConfigError(
            f"config.predict.images={options.images}: no image can be decoded, such as "
            f"{predicted.names[place]} ({why})"
        )
    open_workdir(job)
    pictures = task.images.read(shown(predicted)).pixels
    sections = prediction_sections(
        predicted, pictures, calibration, held_out, abstain_below=options.abstain_below
    )
    findings = [section.finding for section in sections if section.finding]
    page = Page(
        title="Predictions",
        sections=sections,
        headline=findings[:1],
        facts=[
            ("Model", options.model),
            ("Images", options.images),
            *([("Left out", left_out)] if (left_out := task.images.left_out) else []),
            ("Held-out images", held_out or "none"),
        ],
        command=job.command,
        versions=versions(),
        config={name: job.settings[name] for name in ("predict", "dtype")},
    )
    path = write_page(page, job.workdir)
    if left_out:
        findings.append(f"left out of {options.images}: {left_out}")
    if calibration and not calibration.temperature.problem:
        findings.append(as_exported(calibration.temperature.value))
    print(*findings, f"predictions: {job.workdir / 'predictions.csv'}", f"report: {path}", sep="\n")


def plan(job: Job) -> str:
    task = _check(job, planned=True)
    number = sum(getattr(task.held_out, split).num_images for split in task.splits)
    before = f"fit a temperature on {number:,} images of {task.held_out.name}, " if task.held_out else ""
    return f"{before}classify {len(task.images.names):,} images with {task.model.spec.architecture}"


def _check(job: Job, *, planned: bool = False) -> _Task:
    options = job.options.prediction
    with names_key("predict.model"):
        model = find_model(options.model, job.options.run.dtype, planned=planned)
        check_head(model.spec)
    trained_on = model.spec.provenance.get("data", {})
    with names_key("predict.images"):
        if not options.images:
            raise ValueError("name a folder of images, or an image file")
        images = open_unlabelled(
            options.images,
            model.spec.image_size,
            crop=trained_on.get("crop"),
            view=trained_on.get("view", "natural"),
        )
    held_out, splits = None, ()
    if (name := options.held_out or trained_on.get("name", "none")) != "none":
        splits = tuple(x for x in options.splits if x != "validation" or trained_on.get("set_aside", True))
        held_out = _held_out(job, model, name, splits, images.view, planned=planned)
    check_workdir(job)
    return _Task(model, images, held_out, splits)


def _held_out(
    job: Job, model: Model, name: str, splits: tuple[str, ...], view: str, *, planned: bool
) -> Dataset:
    """The labelled images, with the model's labels."""
    if not splits:
        raise ConfigError(
            "config.predict.splits=validation, but the model was trained on these images: set test"
        )
    size, crop = model.spec.image_size, model.spec.provenance.get("data", {}).get("crop")
    try:
        options = {"image_size": size, "splits": splits, "view": view, "planned": planned}
        dataset = load_data(job.options.run, "predict.held_out", name, **options)
    except ConfigError as error:
        hint = (
            "; the model was fine-tuned on it: start the command in the folder where that was, or name these "
            "images anew, others, or none"
        )
        raise ConfigError(f"{error}{hint * (not job.options.prediction.held_out)}") from error
    with names_key("predict.held_out"):
        aligned = align_classes(dataset, model.spec)
        if crop not in (None, dataset.crop) and not dataset.is_placeholder:
            raise ValueError(
                f"the images of {name} are {_CROPPED[dataset.crop]}, those that the model was fine-tuned on "
                f"were {_CROPPED[crop]}: name images like those, or none"
            )
    return aligned


def _calibrate(model: Model, parts: Sequence[Split], batch_size: int) -> Calibration:
    logits = [predict(model, part.images, batch_size=batch_size) for part in parts]
    return calibrate(np.concatenate(logits), np.concatenate([part.labels for part in parts]))


def _predict(task: _Task, calibration: Calibration | None, num_listed: int, batch_size: int) -> Predicted:
    model, images = task.model, task.images
    temperature = calibration.temperature.value if calibration else 1.0
    number = min(num_listed, model.spec.num_classes)
    classes, shares, problems = [], [], {}
    for chunk in progress_bar(images.chunks(), "images", "chunks", total=images.num_chunks):
        problems |= {sum(map(len, classes)) + place: why for place, why in chunk.broken.items()}
        found = probabilities(predict(model, chunk.pixels, batch_size=batch_size), temperature)
        order = np.argsort(-found, axis=1, kind="stable")[:, :number]
        classes.append(order)
        shares.append(np.take_along_axis(found, order, axis=1))
    names = model.spec.class_names or tuple(map(str, range(model.spec.num_classes)))
    return Predicted(images.names, names, np.concatenate(classes), np.concatenate(shares), problems)
