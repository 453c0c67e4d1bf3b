"""Where the batches of a training come from: a set on the device, or files that are decoded on the way."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from advtransfer import parallel
from advtransfer.data.batches import Batch, make_batch
from advtransfer.data.datasets import Split, check_split
from advtransfer.data.stream import DeviceBatches, StreamedSplit, StreamOrder
from advtransfer.data.transforms import Augmentation, augment, to_float


class Feed(NamedTuple):
    """Batches by step, each half made on the host and half on the devices."""

    shared: Any  # arrays on every device
    rows: Callable[[int], Any]  # step -> what each device has of the batch, leading axis [devices]
    make_batch: Callable[[Any, Any, jax.Array], Batch]  # (shared, one device's rows, step), pure
    close: Callable[[], None]


def make_feed(
    train: Split | StreamedSplit,
    augmentation: Augmentation,
    key: jax.Array,
    *,
    batch_size: int,
    num_steps: int,
    seed: int,
    num_workers: int,
    image_size: int | None = None,
) -> Feed:
    """Batches that depend on nothing but the step and what is given here.

    Every epoch takes the images in another order and drops those that fill no batch. An example's key comes
    from the step and its position in the batch, so batches are the same over any number of devices and
    processes. Streamed images are cropped as they are decoded, out of the whole photograph; the rest of the
    augmentation is done on the device.

    Args:
      train: the images.
      augmentation: what happens to them.
      key: what order and augmentation are drawn from.
      batch_size: over all processes and devices.
      num_steps: of the whole training.
      seed: what order and crops of streamed images are drawn from, instead of `key`.
      num_workers: see `iterate`; streamed images only.
      image_size: side of the network's images, to which a set that lies on the device is resized; None
        leaves it as it is.
    """
    order_key, example_key = jax.random.split(key)
    positions = parallel.split(np.arange(batch_size))

    def example_keys(key, step, positions):
        step_key = jax.random.fold_in(key, step)
        return jax.vmap(lambda position: jax.random.fold_in(step_key, position))(positions)

    if isinstance(train, StreamedSplit):
        order = StreamOrder(
            seed, batch_size, parallel.process(), parallel.num_processes(), augmentation.resized_crop
        )
        batches = DeviceBatches(train, order, num_steps, num_workers=num_workers)
        uncropped = dataclasses.replace(augmentation, resized_crop=0.0)

        def make_streamed(shared, rows, step):
            images, labels, positions = rows
            keys = example_keys(shared, step, positions)
            return Batch(augment(keys, to_float(images), uncropped), labels, keys)

        return Feed(
            shared=parallel.replicate(example_key),
            rows=lambda step: (*batches(step), positions),
            make_batch=make_streamed,
            close=batches.close,
        )

    check_split(train)

    @functools.lru_cache(maxsize=1)
    def epoch_order(epoch):
        return np.asarray(jax.random.permutation(jax.random.fold_in(order_key, epoch), train.num_images))

    def rows(step):
        epoch, i = divmod(step, train.num_images // batch_size)
        return parallel.split(epoch_order(epoch)[i * batch_size : (i + 1) * batch_size]), positions

    def make_gathered(shared, rows, step):
        (images, labels, key), (indices, positions) = shared, rows
        keys = example_keys(key, step, positions)
        return make_batch(images, labels, indices, keys, augmentation, image_size=image_size)

    shared = parallel.replicate((jnp.asarray(train.images), jnp.asarray(train.labels), example_key))
    return Feed(shared, rows, make_gathered, close=lambda: None)
