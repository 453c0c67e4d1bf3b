"""What a study takes, counted: models, operations, caches, and the seconds that measured speeds make."""

import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from test_study import DATASET, SOURCES, _grid, _models, _trial

from advtransfer.data import Augmentation, Split
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
from advtransfer.transfer import Prepared, Recipe, activations, block_flops
from advtransfer.transfer.program import Task

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


def test_the_nearest_kind_is_of_the_same_network_before_all_else():
    module, other = (MODELS["natural"].module.clone(num_classes=n) for n in (1, 2))
    kind, head = (module, 8, 1, 0), (module, 8, 0, 10)
    for known, nearest in (
        ([(other, 8, 1, 0), (module, 8, 9, 0)], 1),
        ([(module, 16, 1, 0), (module, 8, 9, 0)], 1),
        ([(module, 8, 0, 0), (module, 8, 9, 0)], 1),  # then of trained blocks
        ([(module, 8, 4, 0), (module, 8, 2, 9)], 1),  # then k
        ([(module, 8, -1, 0), (module, 8, 2, 9)], 1),
        ([(module, 8, 2, 5), (module, 8, 2, 9)], 0),  # then n
    ):
        assert calibrate._nearest(kind, {k: i for i, k in enumerate(known)}) == nearest
    assert calibrate._nearest(head, {(module, 8, 1, 10): 0, (module, 8, 0, 99): 1}) == 1
    assert calibrate._nearest(head, {(module, 8, 0, 4): 0, (module, 8, 0, 12): 1}) == 1


def test_what_is_tried_is_an_epoch_or_so():
    recipe = Recipe(num_epochs=64, evaluate_epochs=(32, 64), batch_size=5)
    for k, n in ((0, 40), (1, 4 * 5)):  # of trained blocks four batches
        (piece,) = _pieces([_trial(recipe=recipe, num_train_images=40, num_unfrozen_blocks=k)])
        long, short = (calibrate._shorten(piece, 20, budget).first for budget in (1e9, 0.0))
        assert (long.num_train_images, short.num_train_images) == (n, n)
        assert (long.recipe.num_epochs, short.recipe.num_epochs) == (32, 1)
        assert long.recipe.evaluate_epochs == (32,)
    few = _trial(recipe=recipe, num_train_images=12, num_unfrozen_blocks=1)
    (piece,) = _pieces([few])
    halved = few._replace(recipe=recipe._replace(num_epochs=16, evaluate_epochs=(16,)))
    budget = 1.2 * piece._replace(first=halved).flops / calibrate._GUESS
    assert calibrate._shorten(piece, 20, budget).first == halved


def test_those_with_most_to_do_are_tried_first_each_in_a_quarter_of_what_is_left(monkeypatch):
    trials = [_trial(num_train_images=n, seed=s) for n, number in ((12, 2), (6, 9)) for s in range(number)]
    trials += [_trial(num_train_images=n, num_unfrozen_blocks=1) for n in (6, 12)]  # one kind
    trials += [_trial(source=SOURCES[1], num_train_images=n, seed=s) for n in (40, 20) for s in range(2)]
    pieces = _pieces(trials)
    work = {}
    for piece in pieces:
        work.setdefault(piece.kind, []).append(piece.number * piece.flops)
    order = sorted(work, key=lambda kind: sum(work[kind]), reverse=True)
    assert len({round(sum(x)) for x in work.values()}) == len(order) == 5
    now, tried = [100.0], []
    monkeypatch.setattr(calibrate, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def spied(piece, model, target, budget, speed, kind):
        assert model is MODELS[piece.first.source.name] and target is DATASET
        assert piece.kind == kind and piece.number * piece.flops == max(work[kind])
        tried.append((kind, budget))
        speed.training[kind] = 1.0
        now[0] += 0.75

    monkeypatch.setattr(calibrate, "_time", spied)
    measure_speed(pieces, MODELS, DATASETS, budget=1.5)
    assert tried == list(zip(order, (0.375, 0.1875, 0.0), strict=False))


TRAINS, CACHES, COMPILES = 1e-9, 3e-9, 7.0  # seconds an operation, an operation, a program


@pytest.mark.parametrize(
    ("frozen", "k", "n", "num_seeds", "num_views", "tried"),
    [
        ("source", 0, 12, 30, 0, 24),  # of heads four turns
        ("source", 0, 12, 20, 0, 20),
        ("source", 1, 12, 30, 0, 6),
        ("source", 1, 290, 4, 2, 4),
        ("target", 0, 290, 30, 0, 24),
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
        for size in (300, 1_100)
    )
    dataset = DATASET._replace(train=train, test=test)
    flips = Augmentation(flip=num_views > 0)
    recipe = Recipe(2, (1, 2), 80, frozen_batch_norm=frozen, augmentation=flips, num_views=num_views)
    if n < 80:
        recipe = recipe._replace(batch_size=5)
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

    def prepares(given, own, held_out, given_recipe, given_k):
        assert given is model and (given_recipe, given_k) == (recipe, k)
        np.testing.assert_array_equal(own.images, train.images[:256])
        np.testing.assert_array_equal(held_out.images, test.images[:1024])
        passes("prepare", CACHES * below * (max(1, num_views) * 256 + 1024))
        inputs = np.arange(max(1, num_views) * 256)[:, None]
        return Prepared({}, Task(inputs, own.labels, np.zeros(1), np.zeros(1)))

    def trains(given, own, held_out, *, subsets, keys, num_classes, num_unfrozen_blocks, recipe, prepared):
        assert given is model and (num_classes, num_unfrozen_blocks) == (3, k)
        assert subsets.tolist() == [list(range(min(n, 4 * recipe.batch_size) if k else n))] * tried
        expected = [trials[0]._replace(seed=seed).key() for seed in range(tried)]
        assert jax.random.key_data(keys).tolist() == [jax.random.key_data(key).tolist() for key in expected]
        np.testing.assert_array_equal(held_out.images, test.images[:1024])
        assert (recipe.num_epochs, recipe.evaluate_epochs) == (1, (1,))
        if cached:  # view after view, each of images that are there
            task = prepared.task
            places = np.arange(n) % 256
            expected = np.concatenate([256 * view + places for view in range(max(1, num_views))])
            assert task.train_inputs[:, 0].tolist() == expected.tolist()
            assert task.train_labels.tolist() == train.labels[places].tolist()
        else:
            assert prepared is None
            np.testing.assert_array_equal(own.images, train.images[np.arange(n) % 256])
            np.testing.assert_array_equal(own.labels, train.labels[np.arange(n) % 256])
        operations = n * 3 * above + (n + 1024) * above  # one epoch, measured once
        operations += 0 if cached else (2 * n + 1024) * below
        passes("train", TRAINS * operations * math.ceil(tried / 6))

    monkeypatch.setattr(calibrate, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(calibrate, "prepare", prepares)
    monkeypatch.setattr(calibrate, "fine_tune_many", trains)
    monkeypatch.setattr(calibrate, "num_streams", lambda *_, **__: 6 // jax.local_device_count())
    speed = measure_speed([piece], MODELS, {"": dataset}, budget=0.0)
    assert speed.training == pytest.approx({piece.kind: TRAINS})
    assert speed.compiling == pytest.approx({piece.kind: COMPILES})
    assert speed.caching == (pytest.approx({piece.kind: CACHES}) if cached else {})
    devices, turns = jax.local_device_count(), math.ceil(num_seeds / 6)
    assert devices == 2
    expected = COMPILES + turns * piece.flops * TRAINS
    assert predict_seconds([piece], [], speed) == pytest.approx(expected)
