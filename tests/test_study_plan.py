"""What a study takes, counted: models, operations, caches, and the seconds that measured speeds make."""

import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from test_study import DATASET, SOURCES, _grid, _models, _trial

from advtransfer.data import Augmentation, Split
from advtransfer.models import block_flops
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
from advtransfer.study.plan import PEAKS, STEP_SECONDS, UTILISATION, Cache
from advtransfer.transfer import Prepared, Recipe, activations
from advtransfer.transfer.program import Task

pytestmark = pytest.mark.usefixtures("unoptimised", "two_devices")

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
        start = model.module.num_blocks - cache.num_unfrozen_blocks
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
    assert len(pieces) == 4  # two sources at two sizes
    speeds = {0: Speed(training=1e-6, compiling=7.0, caching=1e-7)}
    devices = jax.local_device_count()
    expected = 2 * 7.0 + sum(cache.flops for cache in caches) * 1e-7
    expected += sum(4 / devices * piece.flops for piece in pieces) * 1e-6
    assert math.isclose(predict_seconds(pieces, caches, speeds), expected)


@pytest.mark.parametrize(("k", "nearest"), [(0, 0), (1, 3), (4, 3), (6, 5), (-1, 3)])
def test_a_k_that_was_not_measured_is_as_fast_as_its_neighbour(k, nearest):
    """Heads are like no trained block."""
    speeds = {known: Speed(0.0, 0.0, caching=float(known)) for known in (0, 3, 5)}
    cache = Cache(num_images=1, num_bytes=1, flops=1.0, num_unfrozen_blocks=k)
    assert predict_seconds([], [cache], speeds) == nearest


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
    speeds = measure_speed(_pieces(trials), MODELS, DATASETS, budget=100.0)
    assert speeds.keys() == {0, 1, -1}
    assert all(np.isfinite(speed.training) and speed.training > 0 for speed in speeds.values())
    assert {k for k, speed in speeds.items() if speed.caching} == ({0, 1} if frozen == "source" else set())
    assert set(sizes) == {0, 2}  # of two trials both
    assert len(measure_speed(_pieces(trials), MODELS, DATASETS, budget=0.0)) == 1
    # Of many heads no more than run at the same time in four turns.
    many, sizes[:] = [_trial(recipe=recipe, seed=s) for s in range(100)], []
    measure_speed(_pieces(many), MODELS, DATASETS, budget=0.0)
    assert max(sizes) == 4 * jax.local_device_count() * calibrate.num_streams(
        MODELS["natural"].module, 0, 8, cached=frozen != "update"
    )


def test_seconds_are_readable():
    assert [format_seconds(x) for x in (0.2, 89, 90, 100, 5399, 5400, 7200, 3.6e6)] == [
        "1 s",
        "89 s",
        "1.5 min",
        "1.7 min",
        "90.0 min",
        "1.5 h",
        "2.0 h",
        "1,000.0 h",
    ]


def test_those_with_most_to_do_are_tried_first_each_in_a_quarter_of_what_is_left(monkeypatch):
    trials = [_trial(num_train_images=n, seed=s) for n, number in ((12, 2), (6, 9)) for s in range(number)]
    trials += [_trial(num_train_images=n, num_unfrozen_blocks=1) for n in (6, 12)]
    pieces = _pieces(trials)
    now, tried = [100.0], []
    monkeypatch.setattr(calibrate, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def spied(piece, model, target, budget):
        assert model is MODELS["natural"] and target is DATASET
        tried.append((piece.first.num_unfrozen_blocks, piece.first.num_train_images, budget))
        now[0] += 0.75
        return Speed(1.0, 1.0, 1.0)

    monkeypatch.setattr(calibrate, "_time", spied)
    measure_speed(pieces, MODELS, DATASETS, budget=1.5)
    assert tried == [(1, 12, 0.375), (0, 6, 0.1875)]


TRAINS, CACHES, COMPILES = 1e-9, 3e-9, 7.0  # seconds an operation, an operation, a program


@pytest.mark.parametrize(
    ("frozen", "k", "n", "num_seeds", "num_views", "tried"),
    [
        ("source", 0, 12, 30, 0, 24),  # of heads four turns
        ("source", 0, 12, 20, 0, 20),
        ("source", 1, 12, 30, 0, 6),
        ("source", 1, 590, 4, 2, 4),
        ("target", 0, 590, 30, 0, 24),
        ("target", 1, 12, 2, 0, 2),
    ],
)
def test_the_speed_found_is_that_of_a_machine_that_makes_so_many_operations(
    frozen, k, n, num_seeds, num_views, tried, monkeypatch
):
    """Six trials at the same time, by a clock that counts their operations."""
    rng = np.random.default_rng(0)
    train, test = (
        Split(rng.integers(0, 256, (size, 8, 8, 3), np.uint8), np.arange(size, dtype=np.int32) % 3)
        for size in (600, 1_100)
    )
    dataset = DATASET._replace(train=train, test=test)
    flips = Augmentation(flip=num_views > 0)
    recipe = Recipe(
        num_epochs=2,
        evaluate_epochs=(1, 2),
        batch_size=5 if n < 80 else 80,
        frozen_batch_norm=frozen,
        augmentation=flips,
        num_views=num_views,
    )
    trials = [
        _trial(recipe=recipe, num_unfrozen_blocks=k, num_train_images=n, seed=s) for s in range(num_seeds)
    ]
    (piece,) = pieces_of(trials, NETWORKS, {"": dataset})
    model, flops = MODELS["natural"], block_flops(piece.module, 8)
    below, above = sum(flops[: 2 - k]), sum(flops[2 - k :])
    now, compiled = [50.0], set()
    cached = frozen == "source"

    def passes(name, seconds):
        now[0] += seconds + (name not in compiled) * COMPILES
        compiled.add(name)

    measured = min(n, 512)

    def prepares(given, own, held_out, given_recipe, given_k):
        assert given is model and given_k == k
        np.testing.assert_array_equal(own.images, train.images[:512])
        np.testing.assert_array_equal(held_out.images, test.images[:1024])
        passes("prepare", CACHES * below * (max(1, num_views) * 512 + 1024))
        return Prepared({}, Task(np.zeros(1), own.labels, np.zeros(1), np.zeros(1)))

    def trains(given, own, held_out, *, subsets, keys, num_classes, num_unfrozen_blocks, recipe, prepared):
        assert given is model and (num_classes, num_unfrozen_blocks) == (3, k)
        assert subsets.tolist() == [list(range(measured))] * tried
        expected = [trials[0]._replace(seed=seed).key() for seed in range(tried)]
        assert jax.random.key_data(keys).tolist() == [jax.random.key_data(key).tolist() for key in expected]
        np.testing.assert_array_equal(own.images, train.images[:512])
        np.testing.assert_array_equal(held_out.images, test.images[:1024])
        assert (recipe.num_epochs, recipe.evaluate_epochs) == (1, (1,))
        assert (prepared is not None) == cached
        operations = measured * 3 * above + (measured + 1024) * above  # one epoch, measured once
        operations += 0 if cached else (2 * measured + 1024) * below
        passes("train", TRAINS * operations * math.ceil(tried / 6))

    monkeypatch.setattr(calibrate, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(calibrate, "prepare", prepares)
    monkeypatch.setattr(calibrate, "fine_tune_many", trains)
    monkeypatch.setattr(calibrate, "num_streams", lambda *_, **__: 6 // jax.local_device_count())
    speed = measure_speed([piece], MODELS, {"": dataset}, budget=0.0)
    assert speed == {k: pytest.approx((TRAINS, COMPILES, CACHES if cached else 0.0))}
    devices, turns = jax.local_device_count(), math.ceil(num_seeds / 6)
    assert devices == 2
    expected = COMPILES + turns * piece.flops * TRAINS
    assert predict_seconds([piece], [], speed) == pytest.approx(expected)
