"""The cache of frozen activations: what enters the first trained block, computed once for all trials of one
source, target and k, if it fits into memory."""

from __future__ import annotations

import logging
from typing import NamedTuple

import chex
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32, Integer, PyTree

from advtransfer import parallel
from advtransfer.data import Split, check_split
from advtransfer.models import Model, ResNet
from advtransfer.transfer.freezing import (
    activation_shape,
    activations,
    first_unfrozen_block,
    prefix_is_constant,
    target_batch_stats,
)
from advtransfer.transfer.program import Task
from advtransfer.transfer.recipe import Recipe

_SHARE = 0.7  # of the free memory that a cache may take; the rest is for the training


class Prepared(NamedTuple):
    """What the trials of one source, target and k share, on the device."""

    batch_stats: PyTree
    task: Task
    rows: Int32[np.ndarray, " n"] | None = None  # place of each training image in the task; None: its number


def own_statistics(recipe: Recipe, num_unfrozen_blocks: int) -> bool:
    """Whether every subset has BatchNorm statistics of its own, so that trials share no activations."""
    return recipe.frozen_batch_norm == "target" and num_unfrozen_blocks != -1


def prepare(
    model: Model,
    train: Split,
    test: Split,
    recipe: Recipe,
    num_unfrozen_blocks: int,
    *,
    used: Integer[np.ndarray, " used"] | None = None,
) -> Prepared:
    """Starting BatchNorm statistics, and the task: cached activations where the prefix is constant and they
    fit into memory, otherwise images.

    Args:
      model, train, test, recipe, num_unfrozen_blocks: as for `fine_tune_one`.
      used: ascending integers, those of the training images that any trial takes; None: all. BatchNorm
        statistics of the target are of all images.

    Raises:
      ValueError: fixed views, which have to be cached, do not fit.
    """
    check_split(train)
    check_split(test)
    module, variables, size = model.module, model.variables, model.spec.image_size
    if own_statistics(recipe, num_unfrozen_blocks):
        stats = target_batch_stats(module, variables, train.images, size)
        variables = {**variables, "batch_stats": stats}
    rows, numbers = None, np.arange(train.num_images)
    if used is not None:
        chex.assert_rank(used, 1)
        chex.assert_type(used, int)
        rows, numbers = np.zeros(train.num_images, np.int32), used
        rows[used] = np.arange(len(used))
        train = Split(train.images[used], train.labels[used])
    start = first_unfrozen_block(module, num_unfrozen_blocks)
    sizes = size, train.num_images, test.num_images
    if start is not None and is_cached(module, recipe, num_unfrozen_blocks, *sizes):
        train_inputs = activations(
            *(module, variables, train.images, start, size),
            augmentation=recipe.augmentation,
            num_views=max(1, recipe.num_views),
            numbers=numbers,
        )
        test_inputs = activations(module, variables, test.images, start, size)
    else:
        train_inputs, test_inputs = jnp.asarray(train.images), jnp.asarray(test.images)
    task = Task(train_inputs, jnp.asarray(train.labels), test_inputs, jnp.asarray(test.labels))
    return Prepared(variables["batch_stats"], task, rows)


def is_cached(
    module: ResNet, recipe: Recipe, num_unfrozen_blocks: int, image_size: int, num_train: int, num_test: int
) -> bool:
    """Whether the frozen prefix is computed once: it is constant, and its activations fit into what is free.
    Raises a ValueError where fixed views do not fit."""
    size = cache_bytes(module, recipe, num_unfrozen_blocks, image_size, num_train, num_test)
    free = parallel.free_bytes()
    if not size or size <= _SHARE * free:
        return bool(size)
    problem = (
        f"the activations of {num_train:,} + {num_test:,} images at k = {num_unfrozen_blocks} take "
        f"{size / 1e9:,.1f} GB of the {free / 1e9:,.1f} GB that are free"
    )
    if recipe.num_views:
        raise ValueError(
            f"{problem}: lower num_views={recipe.num_views}, or take fewer images or a smaller k"
        )
    logging.warning("%s: the frozen blocks are computed in every step instead", problem)
    return False


def cache_bytes(
    module: ResNet, recipe: Recipe, num_unfrozen_blocks: int, image_size: int, num_train: int, num_test: int
) -> int:
    """Bytes of the activations that enter the first trained block; 0 if they are no constants."""
    start = first_unfrozen_block(module, num_unfrozen_blocks)
    if start is None or not prefix_is_constant(num_unfrozen_blocks, recipe):
        return 0
    entering = activation_shape(module, start, image_size)  # ty: ignore[invalid-argument-type]  # hashable
    return (max(1, recipe.num_views) * num_train + num_test) * entering.size * entering.dtype.itemsize
