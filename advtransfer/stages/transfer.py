"""stage=transfer: one network for one target; leaves `model/`, `rows.csv`, `report.html` and its tables."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from advtransfer.config import names_key, to_json
from advtransfer.data import Dataset, Split
from advtransfer.models import Model, create_module, identity, save_model
from advtransfer.report import write_model_page, write_rows
from advtransfer.source import compute_dtype, load_data
from advtransfer.stages.named_models import find_model, model_name, plan_model
from advtransfer.stages.one_model import make_page, tune
from advtransfer.stages.workdir import check_workdir, claimed, open_workdir, versions
from advtransfer.study import Source, Trial, history_rows, make_trial, num_steps
from advtransfer.transfer import (
    choose_k,
    depths,
    first_unfrozen_block,
    normalised_by,
    possible_folds,
    rule_of_thumb,
)


class _Task(NamedTuple):
    model: Model  # the source
    dataset: Dataset
    trial: Trial  # of the k that the config gives
    subset: np.ndarray  # int32 [n]: its training images


def run(config: ConfigDict, workdir: Path) -> None:
    task = _check(config, workdir)
    open_workdir(config, workdir)
    with claimed(workdir):
        _run(config, workdir, task)


def _run(config: ConfigDict, workdir: Path, task: _Task) -> None:
    trial, names, choice = task.trial, task.dataset.class_names, None
    train = Split(*(array[task.subset] for array in task.dataset.train))
    if (method := config.transfer.choose_num_unfrozen_blocks) != "given":
        choice = choose_k(
            method,
            task.model,
            train,
            num_classes=len(names),
            key=trial.key(),
            num_folds=config.transfer.num_folds,
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
    save_model(tuned.model, workdir / "model", overwrite=True)
    rows = history_rows(trial, tuned.history, time.monotonic() - started)
    write_rows(rows, workdir / "rows.csv")
    settings = json.loads(to_json(config))
    page = make_page(
        tuned,
        title=f"{trial.source.name}, fine-tuned on {trial.target}",
        source=trial.source.name,
        target=rows[-1]["target"],
        command=config.report.command,
        config={name: settings[name] for name in ("source", "transfer", "seed", "dtype")},
        versions=versions(),
    )
    path = write_model_page(page, workdir)
    print(
        f"{workdir / 'model'}: test accuracy {rows[-1]['test_accuracy']:.1%}, "
        f"class by class {rows[-1]['test_mean_per_class_accuracy']:.1%}"
        + (f"; {_blocks(trial.num_unfrozen_blocks)} trained, by {_by(choice.method)}" if choice else "")
    )
    print(f"report: {path}")


def plan(config: ConfigDict, workdir: Path) -> str:
    task = _check(config, workdir, planned=True)
    trial, num_blocks = task.trial, task.model.module.num_blocks
    blocks, before = _blocks(trial.num_unfrozen_blocks), ""
    method = config.transfer.choose_num_unfrozen_blocks
    if method == "rule":
        blocks = f"{_blocks(rule_of_thumb(trial.num_train_images, num_blocks))} (by {_by(method)})"
    if method == "cross_validation":
        candidates = depths(num_blocks)
        num_folds = possible_folds(task.dataset.train.labels[task.subset], config.transfer.num_folds)
        named = ", ".join("all" if k == -1 else str(k) for k in candidates)
        before = (
            f"choose the number of blocks among {named}: {num_folds * len(candidates)} fine-tunings more, "
            f"{num_folds} folds each\n"
        )
        blocks = "the chosen blocks"
    return (
        f"{before}fine-tune {blocks} of {task.model.spec.architecture} on "
        f"{trial.num_train_images:,} images of {trial.target}, {num_steps(trial):,} steps"
    )


def _blocks(k: int) -> str:
    return f"{'all' if k == -1 else k} blocks"


def _by(method: str) -> str:
    return {"rule": "the rule of thumb", "cross_validation": "cross-validation"}[method]


def _check(config: ConfigDict, workdir: Path, *, planned: bool = False) -> _Task:
    recipe = config.transfer
    find = plan_model if planned else find_model
    with names_key("source"):
        if not config.source:
            raise ValueError("name a model: a folder, hf:REPO/FILE or a PyTorch file")
        model = find(config.source, compute_dtype(config.dtype))
    with names_key("transfer.num_unfrozen_blocks"):
        first_unfrozen_block(create_module(model.spec.architecture), recipe.num_unfrozen_blocks)
    dataset = load_data(
        config,
        "transfer.target",
        image_size=model.spec.image_size,
        splits=("train", "test"),
        view=recipe.view,
        set_aside=recipe.num_train_images != -1,
        planned=planned,
    )
    if recipe.input_norm == "target" and model.spec.norm == "none" and not dataset.is_placeholder:
        with names_key("transfer.input_norm"):
            model = normalised_by(model, dataset.train.images)
    source = Source(model_name(config.source), model.spec.norm, model.spec.eps, identity(model))
    n, k = recipe.num_train_images, recipe.num_unfrozen_blocks
    with names_key("transfer.num_train_images"):
        trial = make_trial(config, source, dataset, split="test", n=n, k=k, seed=config.seed)
        subset = trial.subset(dataset.train.labels)
    if recipe.choose_num_unfrozen_blocks == "cross_validation":
        with names_key("transfer.choose_num_unfrozen_blocks"):
            possible_folds(dataset.train.labels[subset], recipe.num_folds)
    check_workdir(config, workdir)
    return _Task(model, dataset, trial, subset)
