"""What a study takes, counted: models, operations, caches, and the seconds that measured speeds make."""

import math

import jax
import numpy as np
import pytest
from test_study import DATASET, SOURCES, _grid, _models, _trial

from advtransfer.study import (
    accelerator_hours,
    caches_of,
    calibrate,
    format_seconds,
    measure_speed,
    pieces_of,
    predict_seconds,
)
from advtransfer.study.calibrate import Speed
from advtransfer.study.plan import PEAKS, STEP_SECONDS, UTILISATION
from advtransfer.transfer import Recipe, activations, block_flops

pytestmark = pytest.mark.usefixtures("unoptimised")

MODELS = {source.name: _models()[source.identity] for source in SOURCES}
NETWORKS = {name: (model.module, 8) for name, model in MODELS.items()}
DATASETS = {"": DATASET}


def _pieces(trials):
    return pieces_of(trials, NETWORKS, DATASETS)


def test_operations_are_those_of_every_image_that_is_seen():
    """XLA's own count of one forward and backward pass of the head, times the images."""
    (piece,) = _pieces([_trial(seed=seed) for seed in range(3)])
    width = MODELS["natural"].module.num_features
    assert piece.number == 3
    # Two epochs of 6 images, three products each; twice measured on 6 + 20 images.
    assert piece.flops == 2 * 3 * width * (3 * 2 * 6 + 2 * 26)


def test_a_cache_is_counted_once_for_all_that_share_it():
    recipe = Recipe(num_epochs=2, evaluate_epochs=(2,), batch_size=5)
    trials = [t._replace(recipe=recipe, num_unfrozen_blocks=k) for t in _grid() for k in (0, 1)]
    caches = caches_of(_pieces(trials), DATASETS)
    assert len(caches) == 4  # two sources, two k; both n share
    model = MODELS["natural"]
    for cache in caches:
        _, _, k, _ = cache.kind
        start = model.module.num_blocks - k
        assert cache.num_images == min(40, 3 * 12) + 20
        held = activations(model.module, model.variables, DATASET.test.images, start, 8)
        assert cache.num_bytes == cache.num_images * held.nbytes / 20
        assert cache.flops == cache.num_images * sum(block_flops(model.module, 8)[: start + 1])
    assert not caches_of(_pieces([_trial(num_unfrozen_blocks=-1)]), DATASETS)


def test_hours_of_an_accelerator_are_operations_or_launches():
    trials = [_trial(seed=seed, num_unfrozen_blocks=1) for seed in range(3)]
    (piece,) = _pieces(trials)
    hours = accelerator_hours([piece], [])
    steps = 3 * 2 * 2  # trials in turn, epochs, batches of 5 from 6 images
    assert math.isclose(hours["H200"], steps * STEP_SECONDS / 3600)
    huge = [piece._replace(number=10**9)]
    assert accelerator_hours(huge, [])["H200"] >= 10**9 * piece.flops / UTILISATION / PEAKS["H200"] / 3600


def test_seconds_are_operations_at_the_measured_speed_and_one_compilation_for_each_program():
    recipe = Recipe(num_epochs=2, evaluate_epochs=(2,), batch_size=5)
    pieces = _pieces([t._replace(recipe=recipe) for t in _grid(num_seeds=4)])
    caches = caches_of(pieces, DATASETS)
    kinds = {piece.kind for piece in pieces}
    assert len(pieces) == 4 and len(kinds) == 2  # two sources at two sizes
    speed = Speed(dict.fromkeys(kinds, 1e-6), dict.fromkeys(kinds, 7.0), dict.fromkeys(kinds, 1e-7))
    devices = jax.local_device_count()
    expected = 2 * 7.0 + sum(cache.flops for cache in caches) * 1e-7
    expected += sum(4 / devices * piece.flops for piece in pieces) * 1e-6
    assert math.isclose(predict_seconds(pieces, caches, speed), expected)
    # What was not measured is taken like its nearest neighbour.
    one = Speed(*({min(kinds, key=lambda kind: kind[3]): value} for value in (1e-6, 7.0, 1e-7)))
    assert math.isclose(predict_seconds(pieces, caches, one), expected)


@pytest.mark.parametrize("frozen", ["source", "target", pytest.param("update", marks=pytest.mark.sweep)])
def test_speeds_are_measured_by_running_the_beginning(frozen, monkeypatch):
    """Of the training images, with the test images beside them."""

    def spied(run):
        def checked(model, train, test, *args, **kwargs):
            assert set(map(bytes, train.images)) <= set(map(bytes, DATASET.train.images))
            np.testing.assert_array_equal(test.images, DATASET.test.images)
            return run(model, train, test, *args, **kwargs)

        return checked

    for name in ("prepare", "fine_tune_many"):
        monkeypatch.setattr(calibrate, name, spied(getattr(calibrate, name)))
    recipe = Recipe(num_epochs=4, evaluate_epochs=(2, 4), batch_size=5, frozen_batch_norm=frozen)
    trials = [
        _trial(recipe=recipe, seed=s, num_unfrozen_blocks=k, num_train_images=12)
        for k in (0, 1, -1)
        for s in (0, 1)
    ]
    speed = measure_speed(_pieces(trials), MODELS, DATASETS, budget=100.0)
    assert {kind[2] for kind in speed.training} == {0, 1, -1} == {kind[2] for kind in speed.compiling}
    assert all(np.isfinite(x) and x > 0 for x in speed.training.values())
    assert {kind[2] for kind in speed.caching} == ({0, 1} if frozen == "source" else set())
    assert len(measure_speed(_pieces(trials), MODELS, DATASETS, budget=0.0).training) == 1


def test_seconds_are_readable():
    assert [format_seconds(x) for x in (0.2, 89, 100, 5399, 7200, 3.6e6)] == [
        "1 s",
        "89 s",
        "1.7 min",
        "90.0 min",
        "2.0 h",
        "1,000.0 h",
    ]
