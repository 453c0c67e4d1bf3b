"""Batches of images, assembled on the device from a dataset held there."""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
from jaxtyping import Array, Int32, Integer, Key, Num, PyTree, UInt8

from advtransfer.data.transforms import Augmentation, augment, to_float


class Batch(NamedTuple):
    """Images of one step, each with the key that all of its randomness is drawn from."""

    # float32 [N, H, W, 3] in [0, 1]; in fine-tuning also activations, or the inputs of a head in dual form
    images: PyTree[Num[Array, "n ..."]]
    labels: Int32[Array, " n"]
    keys: Key[Array, " n"]


def check_batch(batch: Batch) -> None:
    """Raises an AssertionError unless labels are integers [N] and every other array has leading axis [N]."""
    chex.assert_rank(batch.labels, 1)
    chex.assert_type(batch.labels, int)
    chex.assert_equal_shape_prefix(jax.tree.leaves(batch), 1)


def make_batch(
    images: UInt8[Array, "m h w 3"],
    labels: Integer[Array, " m"],
    indices: Integer[Array, " n"],
    keys: Key[Array, " n"],
    augmentation: Augmentation,
    *,
    image_size: int | None = None,
) -> Batch:
    """Gathers, resizes and augments the images of one step.

    A pure function: jit it with `augmentation` and `image_size` static. The result for an image depends only
    on the image and its key, not on the rest of the batch.

    Args:
      images, labels: the whole dataset.
      indices: from 0 to M - 1.
      keys: for example `jax.random.split(key, N)`.
      augmentation: applied after resizing.
      image_size: side of the network's images; None keeps their size.
    """
    chex.assert_rank([images, labels, indices, keys], [4, 1, 1, 1])
    chex.assert_equal_shape_prefix([images, labels], 1)
    chex.assert_equal_shape([indices, keys])
    chex.assert_type([labels, indices], int)
    chosen = to_float(images[indices], image_size)
    return Batch(augment(keys, chosen, augmentation), labels[indices], keys)
