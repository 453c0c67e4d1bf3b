"""What a network is fed: a batch, made on the device from a set that lies there."""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax

from advtransfer.data.transforms import Augmentation, augment, to_float


class Batch(NamedTuple):
    """Images of one step, with a key for each that everything random about it is drawn from."""

    images: jax.Array  # float32 [N, H, W, 3] in [0, 1]
    labels: jax.Array  # int32 [N]
    keys: jax.Array  # typed PRNG keys [N]


def check_batch(batch: Batch) -> None:
    """Raises an AssertionError unless labels are integers [N] and all that stands for an image, which is more
    than one array where a head is trained in dual form, has the leading axis [N] too."""
    chex.assert_rank(batch.labels, 1)
    chex.assert_type(batch.labels, int)
    chex.assert_equal_shape_prefix(jax.tree.leaves(batch), 1)


def make_batch(
    images: jax.Array,
    labels: jax.Array,
    indices: jax.Array,
    keys: jax.Array,
    augmentation: Augmentation,
    *,
    image_size: int | None = None,
) -> Batch:
    """Gathers, resizes and augments the images of one step.

    A pure function: jit it with `augmentation` and `image_size` as constants. What becomes of an
    image depends on the image and its key alone, not on its batch.

    Args:
      images: uint8 [M, H, W, 3], the whole set.
      labels: int32 [M].
      indices: integers [N] from 0 to M - 1.
      keys: typed PRNG keys [N], for example `jax.random.split(key, N)`.
      augmentation: what happens to the images, at their new size.
      image_size: side of the network's images; None leaves the size as it is.
    """
    chex.assert_rank([images, labels, indices, keys], [4, 1, 1, 1])
    chex.assert_equal_shape_prefix([images, labels], 1)
    chex.assert_equal_shape([indices, keys])
    chex.assert_type([labels, indices], int)
    chosen = to_float(images[indices], image_size)
    return Batch(augment(keys, chosen, augmentation), labels[indices], keys)
