"""How long a study takes on this device: the beginnings of its longest parts are run, then scaled."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from advtransfer import parallel
from advtransfer.data import Dataset, Split
from advtransfer.models import Model
from advtransfer.study.plan import Cache, Piece, caches_of
from advtransfer.transfer import (
    Prepared,
    fine_tune_many,
    num_streams,
    own_statistics,
    prefix_is_constant,
    prepare,
)

_IMAGES = 256  # that activations are computed of; more are copies of them
_TEST_IMAGES = 1024
_BATCHES = 4  # an epoch, where blocks are trained
_GUESS = 20e9  # FLOP/s, to choose what can be tried in the time


class Speed(NamedTuple):
    """What was measured, by the kind of piece: seconds to compile; for a floating-point operation of making a
    cache; and for one of a trial, while as many trials run as do at the same time."""

    training: dict[tuple, float]
    compiling: dict[tuple, float]
    caching: dict[tuple, float]


def measure_speed(
    pieces: Sequence[Piece], models: Mapping[str, Model], datasets: Mapping[str, Dataset], *, budget: float
) -> Speed:
    """Times one piece of each kind, those with most to do first, until `budget` seconds are over.

    Args:
      pieces, datasets: as for `pieces_of`; at least one piece.
      models: the sources' networks by name, trained or not.
    """
    kinds: dict[tuple, list[Piece]] = {}
    for piece in pieces:
        kinds.setdefault(piece.kind, []).append(piece)
    kinds = dict(sorted(kinds.items(), key=lambda item: -sum(p.number * p.flops for p in item[1])))
    deadline = time.monotonic() + budget
    speed = Speed({}, {}, {})
    for kind, alike in kinds.items():
        left = deadline - time.monotonic()
        if left < 0 and speed.training:
            break
        piece = max(alike, key=lambda piece: piece.number * piece.flops)
        model, target = models[piece.first.source.name], datasets[piece.first.data]
        _time(piece, model, target, left / 4, speed, kind)
    return speed


def predict_seconds(pieces: Sequence[Piece], caches: Sequence[Cache], speed: Speed) -> float:
    """Seconds of all pieces on this device; a kind that was not measured is taken like the nearest one."""
    programs = {piece.program: piece.kind for piece in pieces}
    training = sum(
        -(-piece.number // _at_once(piece)) * piece.flops * _nearest(piece.kind, speed.training)
        for piece in pieces
    )
    compiling = sum(_nearest(kind, speed.compiling) for kind in programs.values())
    caching = sum(cache.flops * _nearest(cache.kind, speed.caching or speed.training) for cache in caches)
    return training + compiling + caching


def _nearest(kind: tuple, known: Mapping[tuple, float]) -> float:
    """The value of the kind with the same network, before the same k, before the nearest n."""
    module, size, k, n = kind

    def distance(other):
        return other[:2] != (module, size), (other[2] == 0) != (k == 0), abs(other[2] - k), abs(other[3] - n)

    return known[min(known, key=distance)]


def _at_once(piece: Piece) -> int:
    """Trials that run at the same time."""
    k = piece.first.num_unfrozen_blocks
    cached = prefix_is_constant(k, piece.first.recipe)
    streams = num_streams(piece.module, k, piece.image_size, cached=cached)
    return parallel.num_devices() * streams


def _time(piece: Piece, model: Model, target: Dataset, budget: float, speed: Speed, kind: tuple) -> None:
    """Measures a piece, smaller than it is if that takes more than `budget` seconds."""
    first, k = piece.first, piece.first.num_unfrozen_blocks
    train, test = (
        Split(*(array[:number] for array in (split.images, split.labels)))
        for split, number in ((target.train, _IMAGES), (getattr(target, first.split), _TEST_IMAGES))
    )
    small, own = _shorten(piece, test.num_images, budget), own_statistics(first.recipe, k)
    number = min(piece.number, _at_once(piece) * (4 if k == 0 else 1))
    n = small.first.num_train_images
    prepared = None
    if own:
        train = Split(*(np.resize(array, (n, *array.shape[1:])) for array in train))
    else:
        seconds, prepared, _ = _twice(
            lambda: jax.block_until_ready(prepare(model, train, test, first.recipe, k)[:2])
        )
        views = max(1, first.recipe.num_views)
        for cache in caches_of([piece], {first.data: target}):
            computed = views * train.num_images + test.num_images
            speed.caching[kind] = seconds / (cache.flops / cache.num_images * computed)
        prepared = _repeat(Prepared(*prepared), views, n)
    seconds, _, compiling = _twice(
        lambda: fine_tune_many(
            model,
            train,
            test,
            subsets=np.tile(np.arange(n), (number, 1)),
            keys=jnp.stack([first._replace(seed=seed).key() for seed in range(number)]),
            num_classes=len(target.class_names),
            num_unfrozen_blocks=k,
            recipe=small.first.recipe,
            prepared=prepared,
        )
    )
    speed.training[kind] = seconds / (-(-number // _at_once(piece)) * small.flops)
    speed.compiling[kind] = compiling


def _shorten(piece: Piece, num_test: int, budget: float) -> Piece:
    """The piece with as many epochs as lie between two evaluations, or fewer, and fewer images."""
    recipe, n, k = piece.first.recipe, piece.first.num_train_images, piece.first.num_unfrozen_blocks
    num_epochs = -(-recipe.num_epochs // len(recipe.measured_epochs))
    if k != 0:
        n = min(n, _BATCHES * recipe.batch_size)
    while True:
        shorter = recipe._replace(num_epochs=num_epochs, evaluate_epochs=(num_epochs,))
        first = piece.first._replace(recipe=shorter, num_train_images=n)
        small = piece._replace(first=first, num_test=num_test)
        if num_epochs == 1 or small.flops / _GUESS < budget:
            return small
        num_epochs = -(-num_epochs // 2)


def _repeat(prepared: Prepared, views: int, n: int) -> Prepared:
    """As many training images as are wanted, view after view."""
    task = prepared.task
    there = len(task.train_labels)
    places = jnp.resize(jnp.arange(there), n)
    rows = jnp.add.outer(jnp.arange(views) * there, places).reshape(-1)
    inputs = task.train_inputs[rows if len(task.train_inputs) == views * there else places]
    return Prepared(
        *parallel.replicate(
            (prepared.batch_stats, task._replace(train_inputs=inputs, train_labels=task.train_labels[places]))
        )
    )


def _twice(run: Callable[[], Any]) -> tuple[float, Any, float]:
    """Seconds of the second call, its result, and by how much the first one was slower, which compiles."""
    times = []
    for _ in range(2):
        started = time.monotonic()
        result = run()
        times.append(time.monotonic() - started)
    return times[1], result, max(0.0, times[0] - times[1])
