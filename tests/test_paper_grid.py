"""The paper's grid: how many models, which seeds, and what the two protocols cost before anything runs."""

import runpy
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from advtransfer.config import read
from advtransfer.data import Augmentation, Dataset, Split
from advtransfer.models import create_module
from advtransfer.study import (
    Grid,
    Source,
    Start,
    accelerator_hours,
    caches_of,
    flatten,
    make_cells,
    make_trials,
    pieces_of,
)
from advtransfer.study.trials import seeds_of

SIZES = {
    "tfds:cifar10": (50_000, 10_000, 10),
    "tfds:cifar100": (50_000, 10_000, 100),
    "tfds:svhn_cropped": (73_257, 26_032, 10),
    "tfds:mnist": (60_000, 10_000, 10),
    "tfds:fashion_mnist": (60_000, 10_000, 10),
    "tfds:kmnist": (60_000, 10_000, 10),
}


def config_of(name, *args):
    path = Path(__file__).parent.parent / "experiments" / f"{name}.py"
    config = runpy.run_path(path)["get_config"](*args)
    read(config)
    return config


def _target(name):
    """Of the true sizes, without pictures: one pixel an image, coloured or grey as in the set."""
    num_train, num_test, num_classes = SIZES[name]
    colour = [0, 128, 255] if "mnist" not in name else [0, 0, 0]

    def split(number):
        labels = np.arange(number, dtype=np.int32) % num_classes
        return Split(np.tile(np.uint8(colour), (number, 1, 1, 1)), labels)

    digests = {"train": f"{name} train", "test": f"{name} test"}
    classes = tuple(map(str, range(num_classes)))
    return Dataset(name, classes, split(num_train), split(0), split(num_test), digests=digests)


TARGETS = {name: _target(name) for name in SIZES}


def _grid(config):
    options, names = read(config), config.study.sources.split(",")
    cells = make_cells(options.grid, names, config.study.targets.split(","))
    return make_trials(
        options.grid,
        options.recipe,
        cells,
        lambda cell, _: Start(Source(cell.source, "none", 0.0, cell.source), None, TARGETS[cell.target]),
        stratified=options.target.stratified,
    )


def _hours(config):
    network = create_module("resnet50", dtype=jnp.bfloat16), 224
    datasets = {target.digest("train", "test"): target for target in TARGETS.values()}
    networks = dict.fromkeys(config.study.sources.split(","), network)
    pieces = pieces_of(flatten(_grid(config)), networks, datasets)
    return accelerator_hours(pieces, caches_of(pieces, datasets))


@pytest.mark.parametrize("name", ["paper_study", "fast_study"])
def test_the_grid_has_as_many_models_as_the_paper(name):
    config = config_of(name)
    trials = flatten(_grid(config))
    assert len(trials) == 14_400
    assert {trial.num_train_images for trial in trials} == {
        *(100 * 2**i for i in range(9)),
        *(num_train for num_train, _, _ in SIZES.values()),
    }
    few = {trial.seed for trial in trials if trial.num_train_images == 1600}
    many = {trial.seed for trial in trials if trial.num_train_images == 3200}
    assert few == {20_000_000 + 100_000 * i for i in range(20)} and len(many) == 10 and many < few
    assert all(trial.recipe.batch_size == min(128, trial.num_train_images) for trial in trials)
    assert not any(trial.stratified for trial in trials)


def test_fewer_seeds_are_never_more():
    grid = Grid(num_seeds=20, fewer_seeds=((100, 5), (200, 10), (50, 40)))
    assert [len(seeds_of(grid, n)) for n in (49, 50, 99, 100, 200)] == [20, 20, 20, 5, 5]
    grid = replace(grid, seeds=(7, 3, *range(100, 130)))
    assert list(seeds_of(grid, 100)) == [7, 3, 100, 101, 102]


def test_the_papers_protocol():
    trials = flatten(_grid(config_of("paper_study")))
    for trial in trials:
        colour = Augmentation(crop_padding=4, flip=True, jitter=0.25, rotation=2.0)
        assert trial.recipe.augmentation == (Augmentation() if "mnist" in trial.target else colour)
        assert trial.recipe.evaluate_epochs == (1, 11, 21, 41, 81, 150)
        recipe = trial.recipe
        assert (recipe.learning_rate, recipe.schedule, recipe.momentum) == (0.1, "step", 0.9)
        assert recipe.weight_decay == 5e-4
        assert (trial.recipe.head_init, trial.recipe.frozen_batch_norm) == ("normal", "update")


def test_the_fast_protocol_takes_fewer_steps_where_images_are_many():
    by_size = {t.num_train_images: t.recipe for t in flatten(_grid(config_of("fast_study")))}
    # 2,500 steps of 128 images are 100 epochs of 3,200, and 6 of 50,000
    assert {n: by_size[n].num_epochs for n in (100, 1600, 3200, 6400, 12800, 50_000)} == {
        **dict.fromkeys((100, 1600, 3200), 100), 6400: 50, 12800: 25, 50_000: 6
    }  # fmt: skip
    assert by_size[12800].evaluate_epochs == (1, 11, 21, 25)


def test_the_fast_protocol_fits_into_a_day_of_an_h200():
    faithful, fast = (_hours(config_of(name))["H200"] for name in ("paper_study", "fast_study"))
    assert fast < 24 < 10 * fast < faithful


@pytest.mark.parametrize(
    ("name", "argument"), [("salman_study", "fixed"), ("salman_study", "full"), ("layer_by_layer", "16")]
)
def test_other_grids_are_valid(name, argument):
    config_of(name, argument)
