"""stage=source: trains the network of config.train and measures it.

Leaves in the workdir: `log.jsonl` and TensorBoard events, `checkpoints/` while it trains, `model/`,
`evaluation.json`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from advtransfer import parallel
from advtransfer.checkpoint import UnreadableCheckpoints
from advtransfer.config import ConfigError, Options, names_key
from advtransfer.data import Dataset, StreamedSplit
from advtransfer.evaluate import Evaluation, describe, measure
from advtransfer.foreign import AnyPath
from advtransfer.models import Model, identity
from advtransfer.source import (
    SourceRecipe,
    check_source,
    choose_devices,
    num_steps,
    state_bytes,
    train_source,
)
from advtransfer.tasks.inputs import load_data
from advtransfer.tasks.workdir import Job, check_workdir, claimed, keep, open_workdir


def run(job: Job) -> None:
    options = job.options
    dataset = load_source_data(options)
    open_workdir(job)
    with claimed(job.workdir):
        _, found = train_and_measure(options, options.training, dataset, job.workdir)
    if parallel.is_main_process():
        print(f"{job.workdir / 'model'}: {describe(found)}")


def plan(job: Job) -> str:
    dataset = load_source_data(job.options, planned=True)
    check_workdir(job)
    return training_plan(job.options.training, dataset, job.workdir)


def load_source_data(options: Options, *, planned: bool = False) -> Dataset:
    """The dataset of config.train at its resolution, to train on and to measure the network on, once all that
    the training needs has been checked.

    Raises:
      ConfigError: naming the key.
    """
    recipe, data, split = options.training, options.training_data, options.measured.split
    validation = ("validation",) if recipe.validate_every else ()
    dataset = load_data(
        options.run,
        "train.dataset",
        data.dataset,
        splits=tuple(dict.fromkeys(("train", *validation, split))),
        image_size=recipe.image_size,
        loading=data.loading,
        planned=planned,
    )
    with names_key("train"):
        check_source(recipe, dataset)
    if isinstance(getattr(dataset, split), StreamedSplit):
        with names_key("evaluate.split"):
            raise ValueError("the training images are streamed: measure on test or validation")
    check_evaluation(options.evaluation)
    return dataset


def check_evaluation(evaluation: Evaluation) -> None:
    """Raises a ConfigError for a batch that the devices do not divide."""
    with names_key("evaluate.batch_size"):
        size = evaluation.batch_size
        parallel.split(np.empty(size), parallel.choose_devices(size))


def training_plan(recipe: SourceRecipe, dataset: Dataset, folder: AnyPath, *, name: str = "") -> str:
    """One line: what training this source in `folder` takes."""
    line = f"source {name or recipe.name}: "
    if (folder / "model" / "model.json").exists():
        return line + "done"
    attack = "" if recipe.norm == "none" else f" against PGD-{recipe.attack_steps}"
    size = state_bytes(recipe, dataset) + dataset.train.nbytes
    devices = choose_devices(recipe, dataset)
    return line + (
        f"train {recipe.architecture}, {num_steps(recipe, dataset):,} steps of "
        f"{recipe.batch_size} images{attack} on {devices} device{'s' * (devices > 1)}; state and images "
        f"{size / 1e6:,.1f} MB a device"
    )


def train_and_measure(
    options: Options, recipe: SourceRecipe, dataset: Dataset, folder: AnyPath
) -> tuple[Model, dict[str, Any]]:
    """The source of a recipe, trained in `folder` unless it is there, and what was measured of it."""
    try:
        model = train_source(
            recipe,
            dataset,
            folder=folder,
            seed=options.run.seed,
            dtype=options.run.dtype,
            evaluation=options.evaluation,
            name=recipe.name,
        )
    except UnreadableCheckpoints:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return model, measure_once(options, model, dataset, folder, name=recipe.name)


def measure_once(
    options: Options, model: Model, dataset: Dataset, folder: AnyPath, *, name: str
) -> dict[str, Any]:
    """`measure`, kept in `folder`/evaluation.json for as long as the model and the images stay the same."""
    split = options.measured.split
    subject = {"model": identity(model), "dataset": dataset.name, "data": dataset.digest(split)}
    with names_key("evaluate"):
        return keep(
            folder / "evaluation.json",
            subject,
            lambda: measure(
                model, getattr(dataset, split), options.evaluation, seed=options.run.seed, name=name
            ),
        )
