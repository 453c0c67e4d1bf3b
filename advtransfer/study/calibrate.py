"""How long a study takes on this device: for every k a piece of its work is run, then scaled."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from advtransfer import parallel
from advtransfer.data import Dataset, Split
from advtransfer.models import Model
from advtransfer.study.plan import Cache, Piece, caches_of
from advtransfer.transfer import fine_tune_many, num_streams, own_statistics, prefix_is_constant, prepare

_TRAIN_IMAGES, _TEST_IMAGES = 512, 1024
_GUESS = 20e9  # FLOP/s, to choose how many epochs can be tried in the time


class Speed(NamedTuple):
    """What was measured of one k."""

    training: float  # seconds per operation of a trial, while as many run as do at the same time
    compiling: float  # seconds of a program
    caching: float  # seconds per operation of making a cache


def measure_speed(
    pieces: Sequence[Piece], models: Mapping[str, Model], datasets: Mapping[str, Dataset], *, budget: float
) -> dict[int, Speed]:
    """Times the largest piece of each number of unfrozen blocks, those with most to do first, until `budget`
    seconds are over.

    Args:
      pieces, datasets: as for `pieces_of`; at least one piece.
      models: the sources' networks by name, trained or not.
    """
    largest: dict[int, Piece] = {}
    for piece in sorted(pieces, key=lambda piece: -piece.number * piece.flops):
        largest.setdefault(piece.first.num_unfrozen_blocks, piece)
    deadline = time.monotonic() + budget
    speeds: dict[int, Speed] = {}
    for k, piece in largest.items():
        left = deadline - time.monotonic()
        if left < 0 and speeds:
            break
        speeds[k] = _time(piece, models[piece.first.source.name], datasets[piece.first.data], left / 4)
    return speeds


def predict_seconds(pieces: Sequence[Piece], caches: Sequence[Cache], speeds: Mapping[int, Speed]) -> float:
    """Seconds of all pieces on this device; a k that was not measured is taken like the nearest one."""

    def speed_of(k: int) -> Speed:
        return speeds[min(speeds, key=lambda known: ((known == 0) != (k == 0), abs(known - k)))]

    seconds = sum(cache.flops * speed_of(cache.num_unfrozen_blocks).caching for cache in caches)
    programs = {}
    for piece in pieces:
        speed = speed_of(piece.first.num_unfrozen_blocks)
        seconds += -(-piece.number // _at_once(piece)) * piece.flops * speed.training
        programs[piece.program] = speed.compiling
    return seconds + sum(programs.values())


def _at_once(piece: Piece) -> int:
    """Trials that run at the same time."""
    k = piece.first.num_unfrozen_blocks
    cached = prefix_is_constant(k, piece.first.recipe)
    return parallel.num_devices() * num_streams(piece.module, k, piece.image_size, cached=cached)


def _time(piece: Piece, model: Model, target: Dataset, budget: float) -> Speed:
    """Measures a piece, with fewer images and epochs than it has."""
    first, k = piece.first, piece.first.num_unfrozen_blocks
    train, test = (
        Split(*(array[:number] for array in target.in_memory(split)))
        for split, number in (("train", _TRAIN_IMAGES), (first.split, _TEST_IMAGES))
    )
    n = min(first.num_train_images, train.num_images)
    epochs = -(-first.recipe.num_epochs // len(first.recipe.evaluate_epochs))
    while True:
        recipe = replace(first.recipe, num_epochs=epochs, evaluate_epochs=(epochs,))
        own = first._replace(recipe=recipe, num_train_images=n)
        small = piece._replace(first=own, num_test=test.num_images)
        if epochs == 1 or small.flops / _GUESS < budget:
            break
        epochs = -(-epochs // 2)
    caching, prepared = 0.0, None
    if not own_statistics(recipe, k):
        seconds, prepared, _ = _twice(lambda: prepare(model, train, test, recipe, k))
        for cache in caches_of([small._replace(number=1)], {first.data: target}):
            computed = max(1, recipe.num_views) * train.num_images + test.num_images
            caching = seconds / (cache.flops / cache.num_images * computed)
    number = min(piece.number, _at_once(piece) * (4 if k == 0 else 1))
    seconds, _, compiling = _twice(
        lambda: fine_tune_many(
            model,
            train,
            test,
            subsets=np.tile(np.arange(n), (number, 1)),
            keys=jnp.stack([first._replace(seed=seed).key() for seed in range(number)]),
            num_classes=len(target.class_names),
            num_unfrozen_blocks=k,
            recipe=recipe,
            prepared=prepared,
        )
    )
    return Speed(seconds / (-(-number // _at_once(piece)) * small.flops), compiling, caching)


def _twice(run: Callable[[], Any]) -> tuple[float, Any, float]:
    """Seconds of the second call, its result, and how much longer the first one took, which compiles."""
    times = []
    for _ in range(2):
        started = time.monotonic()
        result = run()
        jax.block_until_ready(jax.tree.leaves(result))
        times.append(time.monotonic() - started)
    return times[1], result, max(0.0, times[0] - times[1])
