"""Training batches, from a dataset on the device or from files decoded on the fly."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Integer, Key, PyTree

from advtransfer import parallel
from advtransfer.data.batches import Batch, make_batch
from advtransfer.data.datasets import Split, check_split
from advtransfer.data.stream import DeviceBatches, StreamedSplit, StreamOrder
from advtransfer.data.transforms import Augmentation, augment, to_float


class Feed(NamedTuple):
    """Batches by step, prepared partly on the host and partly on the devices."""

    shared: PyTree  # arrays on every device
    rows: Callable[[int], PyTree]  # step -> each device's part of the batch, with leading axis [devices]
    make_batch: Callable[
        [PyTree, PyTree, Integer[Array, ""]], Batch
    ]  # (shared, one device's rows, step), pure
    close: Callable[[], None]


def make_feed(
    train: Split | StreamedSplit,
    augmentation: Augmentation,
    key: Key[Array, ""],
    *,
    batch_size: int,
    num_steps: int,
    seed: int,
    num_workers: int,
    image_size: int | None = None,
    devices: int | None = None,
) -> Feed:
    """Batches that are a function of the step and the arguments.

    Every epoch visits the images in a new order and drops an incomplete last batch. An example's key is
    derived from the step and its position in the batch, so batches do not depend on the number of devices and
    processes. Streamed images are cropped from the full-size image when they are decoded; the rest of the
    augmentation runs on the device.

    Args:
      train, augmentation: the images, and what becomes of them.
      key: for the order and the augmentation.
      batch_size: over all processes and devices.
      num_steps: of the whole training.
      seed: for the order and crops of streamed images, instead of `key`.
      num_workers: see `iterate`; streamed images only.
      image_size: side of the network's images, to which a dataset on the device is resized; None keeps its
        size.
      devices: of each process, that a batch is divided among; None: all.
    """
    order_key, example_key = jax.random.split(key)
    positions = parallel.split(np.arange(batch_size), devices)

    def example_keys(key, step, positions):
        step_key = jax.random.fold_in(key, step)
        return jax.vmap(lambda position: jax.random.fold_in(step_key, position))(positions)

    if isinstance(train, StreamedSplit):
        order = StreamOrder(
            seed, batch_size, parallel.process(), parallel.num_processes(), augmentation.resized_crop
        )
        batches = DeviceBatches(train, order, num_steps, num_workers=num_workers, devices=devices)
        uncropped = dataclasses.replace(augmentation, resized_crop=0.0)

        def make_streamed(shared, rows, step):
            images, labels, positions = rows
            keys = example_keys(shared, step, positions)
            return Batch(augment(keys, to_float(images), uncropped), labels, keys)

        return Feed(
            shared=parallel.replicate(example_key, devices),
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
        return parallel.split(epoch_order(epoch)[i * batch_size : (i + 1) * batch_size], devices), positions

    def make_gathered(shared, rows, step):
        (images, labels, key), (indices, positions) = shared, rows
        keys = example_keys(key, step, positions)
        return make_batch(images, labels, indices, keys, augmentation, image_size=image_size)

    if parallel.platform() == "cpu":  # its devices share the memory, which a copy for each would fill

        def own_rows(step):
            indices, positions = rows(step)
            own = np.arange(indices.shape[1])
            return train.images[indices], train.labels[indices], np.tile(own, (len(indices), 1)), positions

        def make_from_rows(key, rows, step):
            images, labels, indices, positions = rows
            return make_gathered((images, labels, key), (indices, positions), step)

        return Feed(parallel.replicate(example_key, devices), own_rows, make_from_rows, close=lambda: None)

    shared = jnp.asarray(train.images), jnp.asarray(train.labels), example_key
    return Feed(parallel.replicate(shared, devices), rows, make_gathered, close=lambda: None)
