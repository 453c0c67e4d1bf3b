"""Trials: who they are, which of them the grid holds, and which of them one program can run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from advtransfer.data import Dataset, check_subset, choose_augmentation, subset_indices
from advtransfer.transfer import Recipe

# Folded into each trial's seed, apart from the source's own use of the same number.
_TRIAL_STREAM = 0x7A5C


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
    data: str = ""  # SHA-256 of the target's training images and of those measured on

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


class Cell(NamedTuple):
    """A point of the grid: its trials differ in their seed."""

    source: str  # name
    target: str
    view: str
    num_train_images: int  # as asked for; -1: all
    num_unfrozen_blocks: int


def make_recipe(transfer: ConfigDict, images: np.ndarray, num_images: int) -> Recipe:
    """config.transfer as a `Recipe` for so many of the target's training images, uint8 [N, H, W, 3]."""
    recipe = Recipe(**{name: transfer[name] for name in Recipe._fields})
    batch_size, num_epochs = min(recipe.batch_size, num_images), recipe.num_epochs
    if transfer.max_steps:
        num_epochs = min(num_epochs, max(1, transfer.max_steps // -(-num_images // batch_size)))
    augmentation = choose_augmentation(transfer.augmentation, images)
    recipe = recipe._replace(augmentation=augmentation, batch_size=batch_size, num_epochs=num_epochs)
    return evaluated_to_the_end(recipe)


def evaluated_to_the_end(recipe: Recipe) -> Recipe:
    """The recipe, evaluated after those of its `evaluate_epochs` that it comes to, and after the last."""
    asked = {epoch for epoch in recipe.evaluate_epochs if epoch < recipe.num_epochs}
    return recipe._replace(evaluate_epochs=(*sorted(asked), recipe.num_epochs))


def make_trial(
    config: ConfigDict,
    source: Source,
    dataset: Dataset,
    *,
    split: str,
    n: int,
    k: int,
    seed: int,
    view: str | None = None,
    recipe: Recipe | None = None,
) -> Trial:
    """A trial by the recipe of config.transfer.

    Args:
      config, source: what is asked for.
      dataset: the target, where `n` and the images are looked up.
      split: what is measured.
      n: number of training images; -1: all that the dataset has.
      k: number of unfrozen blocks.
      seed: of the subset, the head, the order and the augmentation.
      view: that the dataset was loaded in; None: config.transfer.view.
      recipe: `make_recipe`'s of these images and `n`, if it is at hand.

    Raises:
      ValueError: the dataset has fewer images.
    """
    num_all = dataset.train.num_images
    n = num_all if n == -1 else n
    check_subset(n, num_all, dataset.name)
    recipe = recipe or make_recipe(config.transfer, dataset.train.images, n)
    return Trial(
        source=source,
        target=dataset.name,
        split=split,
        num_train_images=n,
        num_unfrozen_blocks=k,
        seed=seed,
        stratified=config.transfer.stratified,
        nested=config.transfer.nested,
        recipe=recipe,
        view=view or config.transfer.view,
        data=dataset.digest("train", split),
    )


def make_trials(
    config: ConfigDict, source_names: Sequence[str], start_of: Callable[[Cell], tuple[Source, Dataset]]
) -> dict[Cell, list[Trial]]:
    """The grid of config.study, cell by cell in the order of its reports.

    Args:
      config: which trials.
      source_names: what they start from.
      start_of: a cell's source and target.

    Raises:
      ValueError: as `make_trial`.
    """
    study = config.study
    targets = [name.strip() for name in (study.targets or config.transfer.target).split(",")]
    views = study.views or (config.transfer.view,)
    cells = [
        Cell(name, target, view, n, k)
        for target in targets
        for view in views
        for k in study.num_unfrozen_blocks
        for n in study.num_train_images
        for name in source_names
    ]
    grid = {}
    recipes: dict[tuple[str, int], Recipe] = {}  # the preset "utrera" looks at all images
    for cell in cells:
        source, dataset = start_of(cell)
        images = dataset.digest("train"), cell.num_train_images
        first = make_trial(
            config,
            source,
            dataset,
            split=study.split,
            n=cell.num_train_images,
            k=cell.num_unfrozen_blocks,
            seed=0,
            view=cell.view,
            recipe=recipes.get(images),
        )
        recipes[images] = first.recipe
        grid[cell] = [first._replace(seed=seed) for seed in seeds_of(study, first.num_train_images)]
    return grid


def flatten(grid: Mapping[Cell, Sequence[Trial]]) -> list[Trial]:
    """The trials of all cells, each once: all images may be as many as another n."""
    return list(dict.fromkeys(trial for members in grid.values() for trial in members))


def seeds_of(study: ConfigDict, num_images: int) -> Sequence[int]:
    """The seeds that config.study asks for with so many images."""
    number = study.num_seeds
    for threshold, fewer in sorted(study.fewer_seeds):
        number = min(number, fewer) if num_images >= threshold else number
    return (study.seeds or range(number))[:number]


def group(trials: Iterable[Trial], *, size: int = 0) -> list[list[Trial]]:
    """Trials that one program can run together, at most `size` of them (0: no limit) but all rates of a seed:
    seed after seed, each with the same rates in the same order."""
    shapes: dict[Trial, dict[int, list[Trial]]] = {}
    for trial in trials:
        shape = trial._replace(seed=0, recipe=trial.recipe._replace(learning_rate=0.0, weight_decay=0.0))
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


def num_steps(trial: Trial) -> int:
    """Gradient steps of a trial."""
    return trial.recipe.num_epochs * -(-trial.num_train_images // trial.recipe.batch_size)
