"""The rows that finished trials leave: a file for each group, whole or not at all."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Num

from advtransfer import foreign, storage
from advtransfer.foreign import AnyPath
from advtransfer.study.trials import Trial

_METRICS = ("train_accuracy", "train_loss", "test_accuracy", "test_loss", "test_mean_per_class_accuracy")

Row = dict[str, Any]


def history_rows(trial: Trial, history: dict[str, Num[np.ndarray, " epochs"]], seconds: float) -> list[Row]:
    """One row per evaluated epoch of a trial; `history` as `fine_tune_one` returns it."""
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
            "source_seed": trial.source.seed,
            "trial_id": trial.identity(),
            "config": trial.config(),
        }
        for e, epoch in enumerate(trial.recipe.evaluate_epochs)
    ]


def _row_target(trial: Trial) -> str:
    """Validation accuracy must never pass for test accuracy, nor another view for the images as they are."""
    marks = [mark for mark in (trial.view, trial.split) if mark not in ("natural", "test")]
    return ":".join([trial.target, *marks])


def _number(x: np.floating | float) -> float | None:
    """JSON knows no NaN: what a diverged trial measured is null."""
    return float(x) if np.isfinite(x) else None


def finished_rows(folder: str | os.PathLike[str], *, set_aside: bool = False) -> dict[str, list[Row]]:
    """Rows of every finished trial in `folder`, by trial identity.

    A damaged file is warned about and counts for nothing, so its trials are run again; with `set_aside` it is
    renamed to NAME.corrupt, out of the way of every reader of rows.
    """
    finished: dict[str, list[Row]] = {}
    for path in sorted(storage.to_path(folder).glob("*.jsonl")):
        try:
            finished |= _read_group(path)
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            logging.warning("%s is damaged (%r): its trials are run again", path, error)
            if set_aside:
                with contextlib.suppress(OSError):  # another process has done it
                    path.replace(path.with_suffix(".corrupt"))
    return finished


def holds(path: AnyPath, trials: Iterable[Trial]) -> bool:
    """Whether the file of a group is there, and holds the rows of all of `trials`."""
    try:
        return _read_group(path).keys() >= {trial.identity() for trial in trials}
    except (ValueError, KeyError, TypeError, FileNotFoundError):
        return False


def _read_group(path: AnyPath) -> dict[str, list[Row]]:
    """Rows of one file by trial identity; ValueError, KeyError or TypeError for anything but whole trials."""
    trials: dict[str, list[Row]] = {}
    for line in foreign.read_bytes(path).decode().splitlines():
        row = dict(foreign.parse_json(line))
        row |= {name: math.nan for name in _METRICS if row.get(name, 0.0) is None}
        trials.setdefault(row["trial_id"], []).append(row)
    for rows in trials.values():
        epochs = foreign.parse_json(rows[0]["config"])["recipe"]["evaluate_epochs"]
        if [row["epoch"] for row in rows] != epochs:
            raise ValueError(f"a trial has no row for each of its epochs {epochs}")
    return trials
