"""Trials: who they are, which of them the grid holds, and which of them one program can run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int32, Integer, Key

from advtransfer.arrays import AnyArray
from advtransfer.data import Dataset, check_subset, subset_indices
from advtransfer.models import Model, identity
from advtransfer.options import NOT_EMPTY, option, options, to_dict
from advtransfer.transfer import Recipe, resolve_recipe, without_rates

# Folded into each trial's seed, apart from the source's own use of the same number.
_TRIAL_STREAM = 0x7A5C


class Source(NamedTuple):
    """A network that trials start from, and what rows say of it."""

    name: str
    norm: str
    eps: float
    identity: str  # SHA-256 of its weights, architecture and normalisation
    seed: int = 0  # that tells networks of one name apart


def check_trainings(name: str, models: Sequence[Model]) -> None:
    """Raises a ValueError for networks that are not one source, trained once or from several seeds."""
    if len({(model.spec.norm, model.spec.eps) for model in models}) != 1:
        raise ValueError(f"{name}: the networks of a source, one or more, have the same norm and eps")
    if len(models) > 1 and len(set(map(identity, models))) < len(models):
        raise ValueError(f"{name}: two networks have the same weights: leave one of them away")


class Trial(NamedTuple):
    """One fine-tuning; everything that decides its result is in here."""

    source: Source
    target: str
    split: str  # what is measured: test | validation
    num_train_images: int
    num_unfrozen_blocks: int
    seed: int
    stratified: bool
    recipe: Recipe
    view: str = "natural"  # of the target's images
    data: str = ""  # SHA-256 of the target's training images and of those measured on

    def config(self) -> str:
        """The trial as one line of JSON."""
        fields = self._asdict() | {"source": self.source._asdict(), "recipe": to_dict(self.recipe)}
        return json.dumps(fields, sort_keys=True)

    def identity(self) -> str:
        """SHA-256 of `config`, without the source's name and seed: the same weights are the same source."""
        fields = json.loads(self.config())
        del fields["source"]["name"], fields["source"]["seed"]
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    def subset(self, labels: Integer[AnyArray, " all"]) -> Int32[np.ndarray, " n"]:
        """Its training images, which depend on (target, n, seed) and no source."""
        return subset_indices(
            labels, self.num_train_images, dataset=self.target, seed=self.seed, stratified=self.stratified
        )

    def key(self) -> Key[Array, ""]:
        """Of the head, the batch order and the augmentation: the same for every source."""
        return jax.random.fold_in(jax.random.key(_TRIAL_STREAM), self.seed)


@options
class Grid:
    """A grid of fine-tunings: every source × target × n × k × seed is one trial."""

    num_train_images: tuple[int, ...] = option(
        (200, 400, 800), "numbers of training images; -1: all", low=1, also=(-1,), lengths=NOT_EMPTY
    )
    num_unfrozen_blocks: tuple[int, ...] = option(
        (0, 1), "blocks trained beside the head; -1: everything", low=-1, lengths=NOT_EMPTY
    )
    num_seeds: int = option(20, "seeds, each with its own subset, head, batch order and augmentation", low=1)
    seeds: tuple[int, ...] = option(
        (), "seeds, of which the first num_seeds are used; (): 0, 1, ...", low=0, high=2**32 - 1
    )
    fewer_seeds: tuple[tuple[int, int], ...] = option(
        (), "pairs (n, m): only the first m seeds at n or more images", low=1
    )
    split: str = option(
        "test",
        "split that trials are measured on; validation to choose hyper-parameters",
        choices=("test", "validation"),
    )

    def on(self, split: str) -> Grid:
        """The same grid, measured on another split."""
        return dataclasses.replace(self, split=split)


class Cell(NamedTuple):
    """A point of the grid: its trials differ in their seed."""

    source: str  # which network
    target: str
    view: str
    num_train_images: int  # as asked for; -1: all
    num_unfrozen_blocks: int


def make_cells(
    grid: Grid, sources: Iterable[str], targets: Iterable[str], views: Iterable[str] = ("natural",)
) -> list[Cell]:
    """Every source × target × view × k × n, in the order of rows."""
    sources, views = list(sources), list(views)
    return [
        Cell(source, target, view, n, k)
        for target in targets
        for view in views
        for k in grid.num_unfrozen_blocks
        for n in grid.num_train_images
        for source in sources
    ]


class Start(NamedTuple):
    """What the trials of a cell start from."""

    source: Source
    model: Model | None  # None: not trained yet
    dataset: Dataset


def make_trial(
    recipe: Recipe,
    source: Source,
    dataset: Dataset,
    *,
    split: str = "test",
    n: int,
    k: int,
    seed: int,
    view: str = "natural",
    stratified: bool = True,
) -> Trial:
    """A trial, with the recipe resolved for its images.

    Args:
      recipe, source, split, seed, stratified: as the trial's own.
      dataset: the target, in its view.
      n: number of training images; -1: all that the dataset has.
      k: number of unfrozen blocks.
      view: that the dataset was loaded in.

    Raises:
      ValueError: the dataset has fewer images, or none to measure on.
    """
    if not getattr(dataset, split).num_images:
        raise ValueError(f"{dataset.name} has no {split} images")
    num_all = dataset.train.num_images
    n = num_all if n == -1 else n
    check_subset(n, num_all, dataset.name)
    return Trial(
        source=source,
        target=dataset.name,
        split=split,
        num_train_images=n,
        num_unfrozen_blocks=k,
        seed=seed,
        stratified=stratified,
        recipe=resolve_recipe(recipe, n, dataset.in_memory("train").images),
        view=view,
        data=dataset.digest("train", split),
    )


def make_trials(
    grid: Grid,
    recipe: Recipe,
    cells: Iterable[Cell],
    start_of: Callable[[Cell, str], Start],
    *,
    stratified: bool = True,
) -> dict[Cell, list[Trial]]:
    """The trials of every cell, in the order of the grid's seeds.

    Args:
      grid, recipe, stratified: which trials.
      cells: the grid's.
      start_of: (cell, split that is measured) to what the cell's trials start from.

    Raises:
      ValueError: as `make_trial`.
    """
    found = {}
    recipes: dict[tuple[str, int], Recipe] = {}  # the preset "utrera" looks at all images
    for cell in cells:
        source, _, dataset = start_of(cell, grid.split)
        images = dataset.digest("train"), cell.num_train_images
        first = make_trial(
            recipes.get(images, recipe),
            source,
            dataset,
            split=grid.split,
            n=cell.num_train_images,
            k=cell.num_unfrozen_blocks,
            seed=0,
            view=cell.view,
            stratified=stratified,
        )
        recipes[images] = first.recipe
        found[cell] = [first._replace(seed=seed) for seed in seeds_of(grid, first.num_train_images)]
    return found


def flatten(grid: Mapping[Cell, Sequence[Trial]]) -> list[Trial]:
    """The trials of all cells, each once: all images may be as many as another n."""
    return list(dict.fromkeys(trial for members in grid.values() for trial in members))


def seeds_of(grid: Grid, num_images: int) -> Sequence[int]:
    """The seeds of a cell with so many images."""
    number = grid.num_seeds
    for threshold, fewer in sorted(grid.fewer_seeds):
        number = min(number, fewer) if num_images >= threshold else number
    return (grid.seeds or range(number))[:number]


def group(trials: Iterable[Trial], *, size: int = 0) -> list[list[Trial]]:
    """Trials that one program can run together, at most `size` of them (0: no limit) but all rates of a seed:
    seed after seed, each with the same rates in the same order."""
    shapes: dict[Trial, dict[int, list[Trial]]] = {}
    for trial in trials:
        shape = trial._replace(seed=0, recipe=without_rates(trial.recipe))
        shapes.setdefault(shape, {}).setdefault(trial.seed, []).append(trial)
    groups = []
    for by_seed in shapes.values():
        alike: dict[tuple, list[list[Trial]]] = {}
        for own in by_seed.values():
            alike.setdefault(tuple(rates_of(own)), []).append(own)
        for rates, seeds in alike.items():
            step = max(1, size // len(rates)) if size else len(seeds)
            groups += [
                [trial for own in seeds[i : i + step] for trial in own] for i in range(0, len(seeds), step)
            ]
    return groups


def rates_of(trials: Sequence[Trial]) -> list[tuple[float, float]]:
    """(learning rate, weight decay) of each."""
    return [(trial.recipe.learning_rate, trial.recipe.weight_decay) for trial in trials]


def trial_steps(trial: Trial) -> int:
    """Gradient steps of a trial."""
    return trial.recipe.num_epochs * -(-trial.num_train_images // trial.recipe.batch_size)
