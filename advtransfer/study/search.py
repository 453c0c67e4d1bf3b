"""The grid search: learning rate, weight decay and epochs, chosen on validation images for every cell."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from advtransfer.study.rows import Row
from advtransfer.study.trials import Cell, Trial, evaluated_to_the_end
from advtransfer.transfer import Recipe


class Choice(NamedTuple):
    """What is searched for."""

    learning_rate: float
    weight_decay: float
    num_epochs: int

    def of(self, recipe: Recipe) -> Recipe:
        """The recipe with these in it."""
        return evaluated_to_the_end(recipe._replace(**self._asdict()))


def is_asked(study: ConfigDict) -> bool:
    """Whether config.study has anything to choose from."""
    return bool(study.learning_rates or study.weight_decays or study.epochs)


def candidates(config: ConfigDict, grid: Mapping[Cell, Sequence[Trial]]) -> dict[Cell, list[Trial]]:
    """The trials of the search: every combination for each cell, on the first seeds of the grid.

    Args:
      config: config.study has the values; where it has none, config.transfer's is the only one.
      grid: of `make_trials`, measured on the validation split.
    """
    study, transfer = config.study, config.transfer
    values = (
        study.learning_rates or (transfer.learning_rate,),
        study.weight_decays or (transfer.weight_decay,),
        study.epochs,
    )
    return {
        cell: [
            trial._replace(recipe=Choice(rate, decay, epochs).of(trial.recipe))
            for epochs in values[2] or (trials[0].recipe.num_epochs,)
            for trial in trials[: study.search_seeds]
            for rate, decay in itertools.product(*values[:2])
        ]
        for cell, trials in grid.items()
    }


def choose(
    tried: Mapping[Cell, Sequence[Trial]], rows: Iterable[Row]
) -> tuple[dict[Cell, Choice], list[dict[str, object]]]:
    """The best of each cell, and the whole search as a table.

    Args:
      tried: of `candidates`.
      rows: of these trials.

    Returns:
      The choice with the highest accuracy on the validation split after the last epoch, mean over the seeds;
      of equals the first; one that diverged comes last. And a row for each cell and combination.
    """
    last = {}  # rows of a trial come in the order of its epochs
    for row in rows:
        last[row["trial_id"]] = row["test_accuracy"]
    best, table = {}, []
    for cell, trials in tried.items():
        accuracies: dict[Choice, list[float]] = {}
        for trial in trials:
            choice = Choice(*(getattr(trial.recipe, name) for name in Choice._fields))
            accuracies.setdefault(choice, []).append(last[trial.identity()])
        means = {choice: float(np.mean(found)) for choice, found in accuracies.items()}
        best[cell] = max(means, key=lambda choice: np.nan_to_num(means[choice], nan=-1.0))
        table += [
            {
                **cell._asdict(),
                **choice._asdict(),
                "validation_accuracy": mean,
                "num_seeds": len(accuracies[choice]),
                "chosen": int(choice == best[cell]),
            }
            for choice, mean in means.items()
        ]
    return best, table


def with_choices(
    grid: Mapping[Cell, Sequence[Trial]], best: Mapping[Cell, Choice]
) -> dict[Cell, list[Trial]]:
    """The grid with the choice of each cell in its recipes."""
    return {
        cell: [trial._replace(recipe=best[cell].of(trial.recipe)) for trial in trials]
        for cell, trials in grid.items()
    }


def to_csv(table: Sequence[Mapping[str, object]]) -> str:
    """The table of `choose`; what diverged has no accuracy."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {key: "" if value != value else value for key, value in record.items()} for record in table
    )
    return text.getvalue()
