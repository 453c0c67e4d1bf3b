"""The grid search: learning rate, weight decay and epochs, chosen on validation images for every cell."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from advtransfer.options import option, options
from advtransfer.study.rows import Row
from advtransfer.study.trials import Cell, Trial
from advtransfer.transfer import Recipe, resolve_recipe


@options
class Search:
    """What is tried, in all combinations, for every source, target, n and k; the best on validation images is
    taken."""

    learning_rates: tuple[float, ...] = option((), "learning rates to try; (): the recipe's", above=0)
    weight_decays: tuple[float, ...] = option((), "weight decays to try; (): the recipe's", low=0)
    epochs: tuple[int, ...] = option((), "numbers of epochs to try; (): the recipe's", low=1)
    search_seeds: int = option(3, "seeds of each combination of hyper-parameters", low=1)

    @property
    def is_asked(self) -> bool:
        """Whether there is anything to choose from."""
        return bool(self.learning_rates or self.weight_decays or self.epochs)


class HyperParameters(NamedTuple):
    """What is searched for."""

    learning_rate: float
    weight_decay: float
    num_epochs: int

    def of(self, recipe: Recipe) -> Recipe:
        """The recipe with these in it."""
        measured = tuple(epoch for epoch in recipe.evaluate_epochs if epoch < self.num_epochs)
        recipe = dataclasses.replace(recipe, evaluate_epochs=measured, **self._asdict())
        return resolve_recipe(recipe, recipe.batch_size)


def candidates(search: Search, grid: Mapping[Cell, Sequence[Trial]]) -> dict[Cell, list[Trial]]:
    """The trials of the search: every combination for each cell of a grid of `make_trials` that is measured
    on the validation split, on its first seeds."""
    found = {}
    for cell, trials in grid.items():
        recipe = trials[0].recipe
        found[cell] = [
            trial._replace(recipe=HyperParameters(rate, decay, epochs).of(recipe))
            for epochs in search.epochs or (recipe.num_epochs,)
            for trial in trials[: search.search_seeds]
            for rate in search.learning_rates or (recipe.learning_rate,)
            for decay in search.weight_decays or (recipe.weight_decay,)
        ]
    return found


def choose(
    tried: Mapping[Cell, Sequence[Trial]], rows: Iterable[Row]
) -> tuple[dict[Cell, HyperParameters], list[dict[str, object]]]:
    """The best of each cell, and the whole search as a table.

    Args:
      tried: of `candidates`.
      rows: of these trials.

    Returns:
      The hyper-parameters with the highest accuracy on the validation split after the last epoch, mean over
      the seeds; of equals the first; any that diverged come last. And a row for each cell and combination.
    """
    last = {}  # rows of a trial come in the order of its epochs
    for row in rows:
        last[row["trial_id"]] = row["test_accuracy"]
    best, table = {}, []
    for cell, trials in tried.items():
        accuracies: dict[HyperParameters, list[float]] = {}
        for trial in trials:
            values = HyperParameters(*(getattr(trial.recipe, name) for name in HyperParameters._fields))
            accuracies.setdefault(values, []).append(last[trial.identity()])
        means = {values: float(np.mean(found)) for values, found in accuracies.items()}
        best[cell] = max(means, key=lambda values: np.nan_to_num(means[values], nan=-1.0))
        table += [
            {
                **cell._asdict(),
                **values._asdict(),
                "validation_accuracy": mean,
                "num_seeds": len(accuracies[values]),
                "chosen": int(values == best[cell]),
            }
            for values, mean in means.items()
        ]
    return best, table


def with_choices(
    grid: Mapping[Cell, Sequence[Trial]], best: Mapping[Cell, HyperParameters]
) -> dict[Cell, list[Trial]]:
    """The grid with the choice of each cell in its recipes."""
    return {
        cell: [trial._replace(recipe=best[cell].of(trial.recipe)) for trial in trials]
        for cell, trials in grid.items()
    }
