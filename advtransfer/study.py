"""The study: a grid of trials, who they are, which of them are left to do, and the rows they leave.

A trial is one fine-tuning: (source, target, n images, k blocks, hyper-parameters, seed). Its identity is
the SHA-256 of all of that. Trials that differ in their seed only form a group, which runs as one
compiled program and leaves one file of rows, written whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from advtransfer.data import Augmentation, Dataset, subset_indices
from advtransfer.models import Model
from advtransfer.transfer import Recipe, fine_tune_many

# Folded into each trial's seed, apart from the source's own use of the same number.
_TRIAL_STREAM = 0x7A5C

_METRICS = ("train_accuracy", "train_loss", "test_accuracy", "test_loss")

Row = dict[str, Any]


class Source(NamedTuple):
    """A network that trials start from, and what rows say of it."""

    name: str
    norm: str
    eps: float
    identity: str  # SHA-256 of its weights, architecture and normalisation


class Trial(NamedTuple):
    """One fine-tuning; everything that decides its result is in here."""

    source: Source
    target: str
    split: str  # what is measured: test | validation
    num_train_images: int
    num_unfrozen_blocks: int
    seed: int
    stratified: bool
    nested: bool
    recipe: Recipe
    view: str = "natural"  # of the target's images

    def config(self) -> str:
        """The trial as one line of JSON."""
        fields = self._asdict() | {
            "source": self.source._asdict(),
            "recipe": self.recipe._asdict() | {"augmentation": self.recipe.augmentation._asdict()},
        }
        return json.dumps(fields, sort_keys=True)

    def identity(self) -> str:
        """SHA-256 of `config`, without the source's name: the same weights are the same source."""
        fields = json.loads(self.config())
        del fields["source"]["name"]
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    def subset(self, labels: np.ndarray) -> np.ndarray:
        """int32 [n]: its training images, which depend on (target, n, seed) and no source."""
        return subset_indices(
            labels,
            self.num_train_images,
            dataset=self.target,
            seed=self.seed,
            stratified=self.stratified,
            nested=self.nested,
        )

    def key(self) -> jax.Array:
        """Of the head, the batch order and the augmentation: the same for every source."""
        return jax.random.fold_in(jax.random.key(_TRIAL_STREAM), self.seed)


def make_recipe(transfer: ConfigDict) -> Recipe:
    """config.transfer as a `Recipe`."""
    fields = {name: transfer[name] for name in Recipe._fields}
    epochs = tuple(sorted(set(transfer.evaluate_epochs)))
    return Recipe(
        **fields | {"augmentation": Augmentation(**transfer.augmentation), "evaluate_epochs": epochs}
    )


def make_trials(config: ConfigDict, sources: Sequence[Source]) -> list[Trial]:
    """The grid of config.study, in the order that it runs in: seeds vary fastest."""
    return [
        Trial(
            source=source,
            target=config.transfer.target,
            split=config.study.split,
            num_train_images=n,
            num_unfrozen_blocks=k,
            seed=seed,
            stratified=config.transfer.stratified,
            nested=config.transfer.nested,
            recipe=make_recipe(config.transfer),
            view=config.transfer.view,
        )
        for k in config.study.num_unfrozen_blocks
        for n in config.study.num_train_images
        for source in sources
        for seed in range(config.study.num_seeds)
    ]


def group(trials: Iterable[Trial], *, size: int = 0) -> list[list[Trial]]:
    """Trials that one program can run together, at most `size` of them (0: no limit)."""
    groups: dict[Trial, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(trial._replace(seed=0), []).append(trial)
    return [
        members[i : i + (size or len(members))]
        for members in groups.values()
        for i in range(0, len(members), size or len(members))
    ]


def num_steps(trial: Trial) -> int:
    """Gradient steps of a trial."""
    return trial.recipe.num_epochs * -(-trial.num_train_images // trial.recipe.batch_size)


def run_group(trials: Sequence[Trial], model: Model, dataset: Dataset) -> list[Row]:
    """Runs trials that differ in their seed only; one row per trial and evaluated epoch."""
    first = trials[0]
    started = time.monotonic()
    history = fine_tune_many(
        model,
        dataset.train,
        getattr(dataset, first.split),
        subsets=np.stack([trial.subset(dataset.train.labels) for trial in trials]),
        keys=jnp.stack([trial.key() for trial in trials]),
        num_classes=len(dataset.class_names),
        num_unfrozen_blocks=first.num_unfrozen_blocks,
        recipe=first.recipe,
    )
    seconds = (time.monotonic() - started) / len(trials)
    return [
        row
        for t, trial in enumerate(trials)
        for row in history_rows(trial, {name: x[t] for name, x in history.items()}, seconds)
    ]


def history_rows(trial: Trial, history: dict[str, np.ndarray], seconds: float) -> list[Row]:
    """One row per evaluated epoch of a trial; `history` as `fine_tune` returns it."""
    return [
        {
            "source": trial.source.name,
            "source_norm": trial.source.norm,
            "source_eps": trial.source.eps,
            "target": _row_target(trial),
            "num_train_images": trial.num_train_images,
            "num_unfrozen_blocks": trial.num_unfrozen_blocks,
            "seed": trial.seed,
            "epoch": epoch,
            **{name: _number(history[name][e]) for name in _METRICS},
            "seconds": round(seconds, 4),
            "trial_id": trial.identity(),
            "config": trial.config(),
        }
        for e, epoch in enumerate(trial.recipe.evaluate_epochs)
    ]


def _row_target(trial: Trial) -> str:
    """Validation accuracy must never pass for test accuracy, nor another view for the images as they are."""
    marks = [mark for mark in (trial.view, trial.split) if mark not in ("natural", "test")]
    return ":".join([trial.target, *marks])


def _number(x: np.ndarray) -> float | None:
    """JSON knows no NaN: what a diverged trial measured is null."""
    return float(x) if np.isfinite(x) else None


def finished_rows(folder: str | Path, *, set_aside: bool = False) -> dict[str, list[Row]]:
    """Rows of every finished trial in `folder`, by trial identity.

    A damaged file is warned about and counts for nothing, so its trials are run again; with `set_aside` it is
    renamed to NAME.corrupt, out of the way of every reader of rows.
    """
    finished: dict[str, list[Row]] = {}
    for path in sorted(Path(folder).glob("*.jsonl")):
        try:
            finished |= _read_group(path)
        except (ValueError, KeyError, TypeError) as error:
            logging.warning("%s is damaged (%r): its trials are run again", path, error)
            if set_aside:
                path.replace(path.with_suffix(".corrupt"))
    return finished


def _read_group(path: Path) -> dict[str, list[Row]]:
    """Rows of one file by trial identity; ValueError, KeyError or TypeError for anything but whole trials."""
    trials: dict[str, list[Row]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        row |= {name: math.nan for name in _METRICS if row[name] is None}
        trials.setdefault(row["trial_id"], []).append(row)
    for rows in trials.values():
        epochs = json.loads(rows[0]["config"])["recipe"]["evaluate_epochs"]
        if [row["epoch"] for row in rows] != epochs:
            raise ValueError(f"a trial has no row for each of its epochs {epochs}")
    return trials


def run_trials(
    trials: Sequence[Trial],
    models: dict[str, Model],
    dataset_for: Callable[[Model], Dataset],
    folder: str | Path,
    *,
    group_size: int = 0,
    progress: Callable[[list], Iterator] = iter,
) -> list[Row]:
    """Rows of all trials; those that `folder` already holds are not run again, damaged files are set aside.

    Args:
      trials: the grid.
      models: the sources' networks by name.
      dataset_for: the target dataset at a network's resolution.
      folder: where every finished group leaves its file.
      group_size: as `group`.
      progress: wraps the list of groups that are left, to draw a progress bar.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    finished = finished_rows(folder, set_aside=True)
    # The same weights under two names are one trial.
    missing = {t.identity(): t for t in trials if t.identity() not in finished}
    left = group(missing.values(), size=group_size)
    for members in progress(left) if left else ():
        model = models[members[0].source.name]
        rows = run_group(members, model, dataset_for(model))
        identities = "".join(trial.identity() for trial in members)
        path = folder / f"{hashlib.sha256(identities.encode()).hexdigest()[:32]}.jsonl"
        partial = path.with_suffix(f".partial{os.getpid()}")
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(partial, path)
    finished = finished_rows(folder)
    return [
        row | {"source": trial.source.name, "config": trial.config()}
        for trial in trials
        for row in finished[trial.identity()]
    ]
