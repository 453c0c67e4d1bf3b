"""stage=transfer: one network for one target; leaves `model/`, `rows.csv`, `report.html` and its tables."""

from __future__ import annotations

import dataclasses
import time
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from advtransfer.config import TargetData, names_key
from advtransfer.data import Dataset, Split
from advtransfer.models import Model, identity, save_model
from advtransfer.report import write_model_page, write_rows
from advtransfer.study import Source, Trial, history_rows, make_trial, trial_steps
from advtransfer.tasks.inputs import find_model, load_data, model_name
from advtransfer.tasks.workdir import Job, check_workdir, claimed, open_workdir, versions
from advtransfer.transfer import (
    choose_k,
    depths,
    first_unfrozen_block,
    make_page,
    normalised_by,
    possible_folds,
    rule_of_thumb,
    tune,
)

_METHODS = {"rule": "the rule of thumb", "cross_validation": "cross-validation"}


class _Task(NamedTuple):
    model: Model  # the source
    dataset: Dataset
    trial: Trial  # of the k that the config gives
    subset: Int32[np.ndarray, " n"]  # its training images


def run(job: Job) -> None:
    task = _check(job)
    open_workdir(job)
    with claimed(job.workdir):
        _run(job, task)


def _run(job: Job, task: _Task) -> None:
    trial, names, choice = task.trial, task.dataset.class_names, None
    train, target = Split(*(x[task.subset] for x in task.dataset.in_memory("train"))), job.options.target
    if target.choose_num_unfrozen_blocks != "given":
        choice = choose_k(
            target.choose_num_unfrozen_blocks,
            task.model,
            train,
            num_classes=len(names),
            key=trial.key(),
            num_folds=target.num_folds,
            recipe=trial.recipe,
        )
        trial = trial._replace(num_unfrozen_blocks=choice.num_unfrozen_blocks)
    started = time.monotonic()
    tuned = tune(
        task.model,
        train,
        task.dataset.test,
        key=trial.key(),
        class_names=names,
        num_unfrozen_blocks=trial.num_unfrozen_blocks,
        recipe=trial.recipe,
        choice=choice,
    )
    tuned = tuned._replace(model=_trained_on(tuned.model, task.dataset, target))
    save_model(tuned.model, job.workdir / "model", overwrite=True)
    rows = history_rows(trial, tuned.history, time.monotonic() - started)
    write_rows(rows, job.workdir / "rows.csv")
    page = make_page(
        tuned,
        title=f"{trial.source.name}, fine-tuned on {trial.target}",
        source=trial.source.name,
        target=rows[-1]["target"],
        files=[*task.dataset.names.get("test", ())],
        command=job.command,
        config={name: job.settings[name] for name in ("source", "transfer", "seed", "dtype")},
        versions=versions(),
    )
    path = write_model_page(page, job.workdir)
    print(
        f"{job.workdir / 'model'}: fine-tuned on {len(train.labels):,} of {task.dataset.train.num_images:,} "
        f"training images; test accuracy {rows[-1]['test_accuracy']:.1%}, mean per class "
        f"{rows[-1]['test_mean_per_class_accuracy']:.1%}"
        + (f"; {_blocks(trial.num_unfrozen_blocks)} trained, by {_METHODS[choice.method]}" if choice else "")
    )
    print(f"report: {path}")


def _trained_on(model: Model, dataset: Dataset, target: TargetData) -> Model:
    """The model, with what stage=predict has to know of the images."""
    data = {
        "name": dataset.name,
        "view": target.view,
        "crop": dataset.crop,
        "set_aside": target.num_train_images != -1,
    }
    spec = dataclasses.replace(model.spec, provenance=model.spec.provenance | {"data": data})
    return model._replace(spec=spec)


def plan(job: Job) -> str:
    task, target = _check(job, planned=True), job.options.target
    trial, num_blocks = task.trial, task.model.module.num_blocks
    before, blocks = "", _blocks(trial.num_unfrozen_blocks)
    method = target.choose_num_unfrozen_blocks
    if method == "rule":
        blocks = f"{_blocks(rule_of_thumb(trial.num_train_images, num_blocks))} (by {_METHODS[method]})"
    if method == "cross_validation":
        candidates = depths(num_blocks)
        labels = task.dataset.in_memory("train").labels[task.subset]
        num_folds = possible_folds(labels, target.num_folds)
        named = ", ".join("all" if k == -1 else str(k) for k in candidates)
        before = (
            f"choose the number of blocks among {named}: {num_folds * len(candidates)} more fine-tunings, "
            f"{num_folds} folds for each\n"
        )
        blocks = "the chosen blocks"
    return (
        f"{before}fine-tune {blocks} of {task.model.spec.architecture} on "
        f"{trial.num_train_images:,} images of {trial.target}, {trial_steps(trial):,} steps"
    )


def _blocks(k: int) -> str:
    return "all blocks" if k == -1 else f"{k} block{'s' * (k != 1)}"


def _check(job: Job, *, planned: bool = False) -> _Task:
    options, target = job.options, job.options.target
    with names_key("source"):
        model = find_model(options.run.source, options.run.dtype, planned=planned)
    with names_key("transfer.num_unfrozen_blocks"):
        first_unfrozen_block(model.module, target.num_unfrozen_blocks)
    dataset = load_data(
        options.run,
        "transfer.target",
        target.target,
        image_size=model.spec.image_size,
        splits=("train", "test"),
        view=target.view,
        set_aside=target.num_train_images != -1,
        planned=planned,
    )
    if target.input_norm == "target" and model.spec.norm == "none" and not dataset.is_placeholder:
        with names_key("transfer.input_norm"):
            model = normalised_by(model, dataset.in_memory("train").images)
    name, spec = model_name(options.run.source), model.spec
    with names_key("transfer.num_train_images"):
        trial = make_trial(
            options.recipe,
            Source(name, spec.norm, spec.eps, identity(model)),
            dataset,
            n=target.num_train_images,
            k=target.num_unfrozen_blocks,
            seed=options.run.seed,
            view=target.view,
            stratified=target.stratified,
        )
        subset = trial.subset(dataset.in_memory("train").labels)
    if target.choose_num_unfrozen_blocks == "cross_validation":
        with names_key("transfer.choose_num_unfrozen_blocks"):
            possible_folds(dataset.in_memory("train").labels[subset], target.num_folds)
    check_workdir(job)
    return _Task(model, dataset, trial, subset)
