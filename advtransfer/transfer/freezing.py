"""What is frozen, and the constant part of the network that freezing leaves."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, PyTree, UInt8

from advtransfer import optim
from advtransfer.arrays import AnyArray, Variables
from advtransfer.data import Augmentation, augment, to_float
from advtransfer.models import ResNet, init_variables
from advtransfer.transfer.recipe import Recipe

NO_AUGMENTATION = Augmentation()

# Of the keys that fixed views are drawn with.
_VIEW_STREAM = 0xF1E5


def first_unfrozen_block(module: ResNet, num_unfrozen_blocks: int) -> int | None:
    """The boundary below which nothing is trained, that of block B - k; None when everything is (k = -1).

    Raises:
      ValueError: k is below -1 or above the network's number of blocks.
    """
    if num_unfrozen_blocks == -1:
        return None
    if not 0 <= num_unfrozen_blocks <= module.num_blocks:
        raise ValueError(
            f"cannot unfreeze {num_unfrozen_blocks} blocks: this network has {module.num_blocks} "
            "(-1 unfreezes everything)"
        )
    return module.num_blocks - num_unfrozen_blocks


def frozen_mask(module: ResNet, params: PyTree, num_unfrozen_blocks: int) -> PyTree:
    """True for every parameter outside the head and the last k residual blocks (Utrera et al., 2021, §3)."""
    start = first_unfrozen_block(module, num_unfrozen_blocks)
    blocks = [f"{name}/" for name in module.block_names]
    stem = ["conv1/", "bn1/"]
    if start is None:
        return optim.freeze_mask(params, trainable=[*stem, *blocks, "fc/"], frozen=[])
    return optim.freeze_mask(params, trainable=[*blocks[start:], "fc/"], frozen=[*stem, *blocks[:start]])


def prefix_is_constant(num_unfrozen_blocks: int, recipe: Recipe) -> bool:
    """Whether the activations at the first trained block are a fixed function of the image and its view."""
    fixed = recipe.augmentation == NO_AUGMENTATION or recipe.num_views > 0
    return num_unfrozen_blocks != -1 and recipe.frozen_batch_norm != "update" and fixed


@functools.lru_cache(maxsize=256)
def activation_shape(module: ResNet, start: int, image_size: int) -> jax.ShapeDtypeStruct:
    """What enters block `start` for one image, [1, h, w, c] or [1, C]; computes nothing."""
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    variables = jax.eval_shape(lambda: init_variables(module, jax.random.key(0), image_size))
    return jax.eval_shape(lambda v, x: module.apply(v, x, stop=start), variables, images)


def activations(
    module: ResNet,
    variables: Variables,
    images: UInt8[AnyArray, "n h w 3"],
    start: int,
    image_size: int | None = None,
    *,
    augmentation: Augmentation = NO_AUGMENTATION,
    num_views: int = 1,
    numbers: Integer[AnyArray, " n"] | None = None,
    batch_size: int = 256,
) -> Float[Array, "vn ..."]:
    """What enters block `start` in evaluation mode, [V N, h, w, c] or [V N, C] for V views of uint8 images
    [N, H, W, 3], which are resized to `image_size` on the device (None: left as they are).

    Views follow one another. View 0 is the images as they are, view v > 0 their v-th augmentation, the same
    in every call for the same number of an image, integers `numbers` [N] (None: 0 to N - 1).
    """
    chex.assert_rank(images, 4)
    numbers = np.arange(len(images)) if numbers is None else numbers
    chex.assert_shape(numbers, images.shape[:1])
    chex.assert_type([images, numbers], [np.uint8, int])
    batch_size = min(batch_size, len(images))
    entering = activation_shape(module, start, image_size or images.shape[1])  # ty: ignore[invalid-argument-type]  # hashable
    # Filled in place: there may be memory for the activations once, not twice.
    found = jnp.zeros((num_views * len(images), *entering.shape[1:]), entering.dtype)
    for view in range(num_views):
        drawn = augmentation if view else NO_AUGMENTATION
        for i in range(0, len(images), batch_size):
            i = min(i, len(images) - batch_size)  # the last batch takes some again
            piece = images[i : i + batch_size], numbers[i : i + batch_size]
            part = _enter(module, variables, *piece, view, drawn, start, image_size)
            found = _put(found, part, view * len(images) + i)
    return found


def target_batch_stats(
    module: ResNet,
    variables: Variables,
    images: UInt8[AnyArray, "n h w 3"],
    image_size: int | None = None,
    *,
    batch_size: int = 256,
) -> PyTree:
    """BatchNorm statistics re-estimated on a target set: averages of the batches' own.

    The set is cut into equal batches of at most `batch_size`, as equal as N allows; each counts by its size.
    Images are resized as in `activations`.
    """
    chex.assert_rank(images, 4)
    chex.assert_type(images, np.uint8)
    pieces = np.array_split(np.arange(len(images)), -(-len(images) // batch_size))
    plain = module.clone(momentum=0.0)  # the statistics of the last batch, not a running average
    totals = jax.tree.map(jnp.zeros_like, variables["batch_stats"])
    for piece in pieces:
        stats = _batch_statistics(plain, variables, images[piece], image_size)
        weight = len(piece) / len(images)
        totals = jax.tree.map(lambda total, x, weight=weight: total + weight * x, totals, stats)
    return totals


@jax.jit(static_argnames=("module", "augmentation", "start", "image_size"))
def _enter(module, variables, images, numbers, view, augmentation, start, image_size):
    key = jax.random.fold_in(jax.random.key(_VIEW_STREAM), view)
    keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers)
    images = augment(keys, to_float(images, image_size), augmentation)
    return module.apply(variables, images, stop=start)


@jax.jit(donate_argnames="found")  # apart from `_enter`, which is then compiled once for sets of all sizes
def _put(found, part, place):
    return jax.lax.dynamic_update_slice_in_dim(found, part, place, axis=0)


@jax.jit(static_argnames=("module", "image_size"))
def _batch_statistics(module, variables, images, image_size):
    images = to_float(images, image_size)
    _, changed = module.apply(variables, images, train=True, mutable=["batch_stats"])
    return changed["batch_stats"]
