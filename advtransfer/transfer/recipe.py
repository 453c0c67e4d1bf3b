"""The hyper-parameters of a fine-tuning."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from jaxtyping import UInt8

from advtransfer.data import Augmentation, choose_augmentation
from advtransfer.optim import SCHEDULES
from advtransfer.options import option, options
from advtransfer.transfer.head import HEAD_INITS

FROZEN_BATCH_NORM = ("update", "source", "target")
_LARGEST = 3.4e38  # of float32


@options
class Recipe:
    """How a network is fine-tuned.

    Learning rate, schedule, momentum, weight decay, batch size and epochs default to those of Utrera et al.
    (2021, §3). Three defaults differ: the paper uses frozen_batch_norm="update", head_init="normal", and
    augments colour targets.
    """

    num_epochs: int = option(150, "epochs", low=1)
    max_steps: int = option(0, "maximum steps, reached by fewer epochs but at least one; 0: no limit", low=0)
    evaluate_epochs: tuple[int, ...] = option(
        (), "epochs, of those that there are, after which the network is measured, besides the last", low=1
    )
    batch_size: int = option(128, "images per step; with fewer images all of them", low=1)
    learning_rate: float = option(0.1, "initial learning rate", above=0, high=_LARGEST)
    schedule: str = option("step", "schedule of the learning rate (optim.make_schedule)", choices=SCHEDULES)
    momentum: float = option(0.9, "momentum of SGD", low=0, below=1)
    weight_decay: float = option(
        5e-4, "weight decay of all trained parameters, added to the gradient", low=0, high=_LARGEST
    )
    label_smoothing: float = option(0.0, "weight of the uniform distribution in the targets", low=0, below=1)
    head_init: str = option("torch", "distribution of the new head", choices=tuple(HEAD_INITS))
    head_scale: float = option(1.0, "standard deviation of head_init=normal", low=0, high=_LARGEST)
    frozen_batch_norm: str = option(
        "source",
        "statistics of frozen layers: those of the batch, with running averages that move (update), the "
        "source's, or estimated once on the target's training images (target)",
        choices=FROZEN_BATCH_NORM,
    )
    augmentation: Augmentation = option(Augmentation(), "augmentation of the training images")
    num_views: int = option(
        0,
        "fixed views of each image to choose from in every step, the image and its augmentations, so that "
        "the frozen blocks are computed once; 0: augmentation is drawn anew in every step",
        low=0,
    )


def resolve_recipe(
    recipe: Recipe, num_images: int, images: UInt8[np.ndarray, "n h w 3"] | None = None
) -> Recipe:
    """The recipe with all decided that depends on the images: batch size, epochs, augmentation.

    Args:
      recipe: any; a resolved one stays as it is.
      num_images: training images of one fine-tuning.
      images: the target's training images, which the preset "utrera" looks at.

    Raises:
      ValueError: as `choose_augmentation`.
    """
    batch_size, num_epochs = min(recipe.batch_size, num_images), recipe.num_epochs
    if recipe.max_steps:
        num_epochs = min(num_epochs, max(1, recipe.max_steps // -(-num_images // batch_size)))
    measured = {epoch for epoch in recipe.evaluate_epochs if epoch < num_epochs}
    return replace(
        recipe,
        num_epochs=num_epochs,
        max_steps=0,
        evaluate_epochs=(*sorted(measured), num_epochs),
        batch_size=batch_size,
        augmentation=choose_augmentation(recipe.augmentation, images),
    )


def without_rates(recipe: Recipe) -> Recipe:
    """What decides the compiled program: learning rate and weight decay are arguments of it."""
    return replace(recipe, learning_rate=1.0, weight_decay=0.0)
