"""Datasets for planning: a known dataset that is not prepared is replaced by its published sizes."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, SupportsIndex

import numpy as np

from advtransfer.data.datasets import Dataset, Split, is_streamed, load_dataset
from advtransfer.data.recorded import SPLITS, check_memory, split_name, split_sizes
from advtransfer.data.stream import StreamedSplit
from advtransfer.data.targets import Target, find_target
from advtransfer.data.tfds import NotPrepared
from advtransfer.data.views import VIEWS


def plan_dataset(
    name: str,
    *,
    image_size: int,
    splits: Sequence[str] = SPLITS,
    view: str = "natural",
    loading: str = "memory",
    enlarge: bool = True,
    set_aside: bool = True,
    **options: Any,
) -> Dataset:
    """Like `load_dataset`, but returns a placeholder for a known dataset that is not prepared.

    A placeholder has the published numbers of images and classes, cyclic labels, and a single noise image
    broadcast to all images, which takes no memory: grey or coloured like the dataset, and of the size that
    its images would have. A remark says so if the actual images would take too much memory.

    Raises:
      ValueError: as `load_dataset`; its subclass NotPrepared if nothing is known about the dataset.
    """
    options |= {"splits": splits, "view": view, "loading": loading}
    options |= {"enlarge": enlarge, "set_aside": set_aside}
    try:
        return load_dataset(name, image_size=image_size, **options)
    except NotPrepared:
        if (known := known_sizes(name)) is None:
            raise
    side = image_size if enlarge else min(known.side or image_size, image_size)
    counts = {"train": known.num_train, "test": known.num_test}
    num_streamed = split_sizes(counts, True)["train"]
    streamed = "train" in splits and is_streamed(name, num_streamed, side, view, loading)
    sizes = {split: n if split in splits else 0 for split, n in split_sizes(counts, set_aside).items()}
    noise = np.random.default_rng(0).integers(0, 256, (1, side, side, known.num_channels), dtype=np.uint8)
    pixels = VIEWS[view](np.repeat(noise, 3 // known.num_channels, axis=-1))[0]

    def split_of(number: int) -> Split:
        labels = np.arange(number, dtype=np.int32) % known.num_classes
        return Split(np.broadcast_to(pixels, (number, *pixels.shape)), labels)

    train: Split | StreamedSplit
    train, validation, test = (split_of(sizes[split]) for split in SPLITS)
    if streamed:

        def read(indices: Iterable[SupportsIndex]) -> Sequence:
            raise ValueError(f"{name} is not prepared")

        indices, crop = np.arange(num_streamed), known.side is None
        train = StreamedSplit(read, str, indices, image_size, crop, upright=False, broken="refuse")
    remarks = ()
    try:
        check_memory(name, sum(sizes.values()) - streamed * sizes["train"], side)
    except ValueError as error:
        remarks = (str(error),)
        logging.warning("%s", error)
    return Dataset(
        name,
        tuple(map(str, range(known.num_classes))),
        train,
        validation,
        test,
        remarks=remarks,
        digests={split: f"{name}, {view}, {side}, {sizes}: {split}, as published" for split in SPLITS},
        is_placeholder=True,
    )


def known_sizes(name: str) -> Target | None:
    """The published sizes of a dataset; None if they are not known.

    In `tfds:NAME:TRAIN`, the images of a slice such as `train[:10%]` are counted as in TFDS. Sizes of further
    recorded splits, such as SVHN's `extra`, are not known.
    """
    if (target := find_target(name)) is not None:
        return target
    where, train = split_name(name)
    target = find_target(where)
    if target is None or train is None:
        return target
    num_train = _count(train, target.num_train)
    return target._replace(num_train=num_train) if num_train else None


def _count(train: str, num_train: int) -> int:
    """Number of images that a slice in TFDS's notation selects from `num_train`; 0 if it is invalid."""
    import tensorflow_datasets as tfds

    whole = tfds.core.SplitInfo(name="train", shard_lengths=[num_train], num_bytes=0)
    try:
        parts = tfds.core.ReadInstruction.from_spec(train).to_absolute({"train": whole})
    except (ValueError, KeyError, AssertionError):
        return 0
    return sum(len(range(num_train)[part.from_ : part.to]) for part in parts)
