"""The hyper-parameters of a fine-tuning."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from advtransfer.data import Augmentation
from advtransfer.optim import SCHEDULES
from advtransfer.transfer.head import HEAD_INITS

FROZEN_BATCH_NORM = ("update", "source", "target")


class Recipe(NamedTuple):
    """How a network is fine-tuned.

    Rate, schedule, momentum, decay, batch and epochs are the paper's (Utrera et al., 2021, §3). Its frozen
    BatchNorm is `update`, its head `normal`, and its colour targets are augmented.
    """

    num_epochs: int = 150
    evaluate_epochs: tuple[int, ...] = ()  # counted from 1; none: after the last
    batch_size: int = 128  # with fewer images all of them
    learning_rate: float = 0.1
    schedule: str = "step"
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    head_init: str = "torch"
    head_scale: float = 1.0
    frozen_batch_norm: str = "source"  # update | source | target
    augmentation: Augmentation = Augmentation()
    num_views: int = 0  # the image and its fixed augmentations to choose from; 0: drawn anew in every step

    @property
    def measured_epochs(self) -> tuple[int, ...]:
        """After which the network is measured."""
        return tuple(self.evaluate_epochs) or (self.num_epochs,)


def check_recipe(recipe: Recipe, num_images: int) -> Recipe:
    """The recipe for so many images, with what is left open in it decided.

    Raises:
      ValueError: naming the field, its value and what it must be.
    """

    def is_number(value: Any, low: float, high: float) -> bool:
        try:
            return not isinstance(value, bool | str) and low <= float(value) <= high
        except (TypeError, ValueError):
            return False

    def is_whole(value: Any) -> bool:
        return isinstance(value, int | np.integer) and not isinstance(value, bool) and value >= 1

    fraction, largest = "a number from 0 to below 1", 3.4e38  # of float32
    for field, is_good, expected in (
        ("num_epochs", is_whole(recipe.num_epochs), "a whole number, 1 or more"),
        ("batch_size", is_whole(recipe.batch_size), "a whole number, 1 or more"),
        ("learning_rate", is_number(recipe.learning_rate, 1e-38, largest), "a positive number"),
        ("schedule", recipe.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
        ("momentum", is_number(recipe.momentum, 0, 1) and recipe.momentum < 1, fraction),
        ("weight_decay", is_number(recipe.weight_decay, 0, largest), "0 or more"),
        ("label_smoothing", is_number(recipe.label_smoothing, 0, 1) and recipe.label_smoothing < 1, fraction),
        ("head_init", recipe.head_init in HEAD_INITS, f"one of {', '.join(HEAD_INITS)}"),
        ("head_scale", is_number(recipe.head_scale, 0, largest), "0 or more"),
        (
            "frozen_batch_norm",
            recipe.frozen_batch_norm in FROZEN_BATCH_NORM,
            f"one of {', '.join(FROZEN_BATCH_NORM)}",
        ),
    ):
        if not is_good:
            raise ValueError(f"{field}={getattr(recipe, field)!r} must be {expected}")
    epochs = recipe.measured_epochs
    if sorted({*range(1, recipe.num_epochs + 1)} & {*epochs}) != [*epochs]:
        raise ValueError(
            f"evaluate_epochs={epochs} must be epochs in ascending order, from 1 to "
            f"num_epochs={recipe.num_epochs}"
        )
    return recipe._replace(evaluate_epochs=epochs, batch_size=min(recipe.batch_size, num_images))
