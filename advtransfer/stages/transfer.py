"""stage=transfer: one network for one target; leaves `model/` and `rows.csv`."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from advtransfer.config import names_key
from advtransfer.data import Dataset, Split, subset_indices
from advtransfer.models import ModelSpec, create_module, identity, save_model
from advtransfer.report import write_rows
from advtransfer.source import compute_dtype, load_data
from advtransfer.stages.named_models import find_model, find_spec, model_name
from advtransfer.stages.workdir import check_workdir, open_workdir
from advtransfer.study import Source, Trial, history_rows, make_recipe, num_steps
from advtransfer.train import DivergedError
from advtransfer.transfer import fine_tune, first_unfrozen_block


def run(config: ConfigDict, workdir: Path) -> None:
    spec, dataset = _check(config, workdir)
    with names_key("source"):
        source = find_model(config.source, compute_dtype(config.dtype))
    open_workdir(config, workdir)
    name = model_name(config.source)
    trial = _trial(config, Source(name, spec.norm, spec.eps, identity(source)))
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
    print(f"{workdir / 'model'}: test accuracy {rows[-1]['test_accuracy']:.1%}")


def plan(config: ConfigDict, workdir: Path) -> str:
    spec, _ = _check(config, workdir)
    trial = _trial(config, Source(config.source, spec.norm, spec.eps, ""))
    k = trial.num_unfrozen_blocks
    return (
        f"fine-tune {'all' if k == -1 else k} blocks of {spec.architecture} on "
        f"{trial.num_train_images:,} images of {trial.target}, {num_steps(trial):,} steps"
    )


def _trial(config: ConfigDict, source: Source) -> Trial:
    recipe = config.transfer
    return Trial(
        source=source,
        target=recipe.target,
        split="test",
        num_train_images=recipe.num_train_images,
        num_unfrozen_blocks=recipe.num_unfrozen_blocks,
        seed=config.seed,
        stratified=recipe.stratified,
        nested=recipe.nested,
        recipe=make_recipe(recipe),
        view=recipe.view,
    )


def _check(config: ConfigDict, workdir: Path) -> tuple[ModelSpec, Dataset]:
    recipe = config.transfer
    with names_key("source"):
        if not config.source:
            raise ValueError("name a model: a folder, hf:REPO/FILE or a PyTorch file")
        spec = find_spec(config.source)
    with names_key("transfer.num_unfrozen_blocks"):
        first_unfrozen_block(create_module(spec.architecture), recipe.num_unfrozen_blocks)
    dataset = load_data(
        config,
        "transfer.target",
        image_size=spec.image_size,
        splits=("train", "test"),
        view=recipe.view,
    )
    with names_key("transfer.num_train_images"):
        subset_indices(dataset.train.labels, recipe.num_train_images, dataset=recipe.target, seed=0)
    check_workdir(config, workdir)
    return spec, dataset
