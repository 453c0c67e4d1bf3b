"""The hyper-parameters of a fine-tuning."""

from __future__ import annotations

from typing import NamedTuple

from advtransfer.data import Augmentation

FROZEN_BATCH_NORM = ("update", "source", "target")


class Recipe(NamedTuple):
    """How a network is fine-tuned.

    Rate, schedule, momentum, decay, batch and epochs are the paper's (Utrera et al., 2021, §3). Its frozen
    BatchNorm is `update`, its head `normal`, and its colour targets are augmented.
    """

    num_epochs: int = 150
    evaluate_epochs: tuple[int, ...] = (150,)  # counted from 1
    batch_size: int = 128
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


def check_recipe(recipe: Recipe, num_images: int) -> Recipe:
    """A recipe that can be run on so many images, or a ValueError that says why not."""
    if recipe.batch_size > num_images:
        raise ValueError(f"batch_size={recipe.batch_size} is larger than the {num_images} training images")
    possible = sorted({*range(1, recipe.num_epochs + 1)} & {*recipe.evaluate_epochs})
    if not possible or possible != [*recipe.evaluate_epochs]:
        raise ValueError(
            f"evaluate_epochs={recipe.evaluate_epochs} must be epochs in ascending order, from 1 to "
            f"num_epochs={recipe.num_epochs}"
        )
    if recipe.frozen_batch_norm not in FROZEN_BATCH_NORM:
        raise ValueError(
            f"frozen_batch_norm={recipe.frozen_batch_norm!r} must be one of {', '.join(FROZEN_BATCH_NORM)}"
        )
    return recipe._replace(evaluate_epochs=tuple(recipe.evaluate_epochs))
