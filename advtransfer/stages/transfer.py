"""stage=transfer: one network for one target; leaves `model/` and `rows.csv`."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from advtransfer.config import names_key
from advtransfer.data import Dataset, Split
from advtransfer.models import Model, create_module, identity, save_model
from advtransfer.report import write_rows
from advtransfer.source import compute_dtype, load_data
from advtransfer.stages.named_models import find_model, model_name
from advtransfer.stages.workdir import check_workdir, open_workdir
from advtransfer.study import Source, Trial, history_rows, make_trial, num_steps
from advtransfer.train import DivergedError
from advtransfer.transfer import fine_tune, first_unfrozen_block


def run(config: ConfigDict, workdir: Path) -> None:
    source, dataset = _check(config, workdir)
    open_workdir(config, workdir)
    trial = _trial(config, source, dataset)
    subset = trial.subset(dataset.train.labels)
    started = time.monotonic()
    model, history = fine_tune(
        source,
        Split(*(array[subset] for array in dataset.train)),
        dataset.test,
        key=trial.key(),
        class_names=dataset.class_names,
        num_unfrozen_blocks=trial.num_unfrozen_blocks,
        recipe=trial.recipe,
    )
    if not np.isfinite(history["train_loss"][-1]):
        raise DivergedError(
            f"the loss became NaN or infinite (learning rate {trial.recipe.learning_rate:g}); nothing was "
            "saved. Lower config.transfer.learning_rate"
        )
    save_model(model, workdir / "model", overwrite=True)
    rows = history_rows(trial, history, time.monotonic() - started)
    write_rows(rows, workdir / "rows.csv")
    print(
        f"{workdir / 'model'}: test accuracy {rows[-1]['test_accuracy']:.1%}, "
        f"class by class {rows[-1]['test_mean_per_class_accuracy']:.1%}"
    )


def plan(config: ConfigDict, workdir: Path) -> str:
    source, dataset = _check(config, workdir)
    trial = _trial(config, source, dataset)
    k = trial.num_unfrozen_blocks
    return (
        f"fine-tune {'all' if k == -1 else k} blocks of {source.spec.architecture} on "
        f"{trial.num_train_images:,} images of {trial.target}, {num_steps(trial):,} steps"
    )


def _trial(config: ConfigDict, model: Model, dataset: Dataset) -> Trial:
    recipe, spec = config.transfer, model.spec
    source = Source(model_name(config.source), spec.norm, spec.eps, identity(model))
    n, k = recipe.num_train_images, recipe.num_unfrozen_blocks
    with names_key("transfer.num_train_images"):
        return make_trial(config, source, dataset, split="test", n=n, k=k, seed=config.seed)


def _check(config: ConfigDict, workdir: Path) -> tuple[Model, Dataset]:
    recipe = config.transfer
    with names_key("source"):
        if not config.source:
            raise ValueError("name a model: a folder, hf:REPO/FILE or a PyTorch file")
        source = find_model(config.source, compute_dtype(config.dtype))
    with names_key("transfer.num_unfrozen_blocks"):
        first_unfrozen_block(create_module(source.spec.architecture), recipe.num_unfrozen_blocks)
    dataset = load_data(
        config,
        "transfer.target",
        image_size=source.spec.image_size,
        splits=("train", "test"),
        view=recipe.view,
        set_aside=recipe.num_train_images != -1,
    )
    _trial(config, source, dataset)
    check_workdir(config, workdir)
    return source, dataset
