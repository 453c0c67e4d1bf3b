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
    many = caches_of(_pieces(_grid(num_seeds=5)), DATASETS)  # 5 × 12 of 40
    assert {cache.num_images for cache in many} == {40 + 20}


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

    sizes = []

    def spied(run):
        def checked(model, train, test, *args, **kwargs):
            assert set(map(bytes, train.images)) <= set(map(bytes, DATASET.train.images))
            np.testing.assert_array_equal(test.images, DATASET.test.images)
            sizes.append(len(kwargs.get("subsets", ())))
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
    assert set(sizes) == {0, 2}  # of two trials both
    assert len(measure_speed(_pieces(trials), MODELS, DATASETS, budget=0.0).training) == 1
    # Of many heads no more than run at the same time in four turns.
    many, sizes[:] = [_trial(recipe=recipe, seed=s) for s in range(100)], []
    measure_speed(_pieces(many), MODELS, DATASETS, budget=0.0)
    assert max(sizes) == 4 * jax.local_device_count() * calibrate.num_streams(
        MODELS["natural"].module, 0, 8, cached=frozen != "update"
    )


def test_seconds_are_readable():
    assert [format_seconds(x) for x in (0.2, 89, 100, 5399, 7200, 3.6e6)] == [
        "1 s",
        "89 s",
        "1.7 min",
        "90.0 min",
        "2.0 h",
        "1,000.0 h",
    ]


def test_the_nearest_kind_is_of_the_same_network_before_all_else():
    module, other = (MODELS["natural"].module.clone(num_classes=n) for n in (1, 2))
    kind = module, 8, 1, 0
    for known, nearest in (
        ([(other, 8, 1, 0), (module, 8, 9, 0)], 1),
        ([(module, 16, 1, 0), (module, 8, 9, 0)], 1),
        ([(module, 8, 0, 0), (module, 8, 9, 0)], 1),  # then of trained blocks
        ([(module, 8, 4, 0), (module, 8, 2, 9)], 1),  # then k
        ([(module, 8, 2, 5), (module, 8, 2, 9)], 0),  # then n
    ):
        assert calibrate._nearest(kind, {k: i for i, k in enumerate(known)}) == nearest


def test_what_is_tried_is_an_epoch_or_so():
    recipe = Recipe(num_epochs=64, evaluate_epochs=(32, 64), batch_size=5)
    for k, n in ((0, 40), (1, 4 * 5)):  # of trained blocks four batches
        (piece,) = _pieces([_trial(recipe=recipe, num_train_images=40, num_unfrozen_blocks=k)])
        long, short = (calibrate._shorten(piece, 20, budget).first for budget in (1e9, 0.0))
        assert (long.num_train_images, short.num_train_images) == (n, n)
        assert (long.recipe.num_epochs, short.recipe.num_epochs) == (32, 1)
        assert long.recipe.evaluate_epochs == (32,)
