"""Datasets for a plan: a known set that is not prepared has its published sizes, and no images."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from advtransfer.data.datasets import SPLITS, Dataset, Split, is_streamed, load_dataset
from advtransfer.data.recorded import PLACE_AND_TRAIN, check_memory, split_sizes
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
    """As `load_dataset`, but a known set that is not prepared comes as a placeholder.

    A placeholder has the published numbers of images and classes, labels in turn, and one image of noise as
    often as there are images, which takes no memory: grey or coloured as the set is, and of the size that its
    images get. If the images themselves would take too much memory, a remark says so.

    Raises:
      ValueError: as `load_dataset`; NotPrepared, of which it is a kind, for sets of which nothing is known.
    """
    asked = {"image_size": image_size, "splits": splits, "view": view, "loading": loading}
    asked |= {"enlarge": enlarge, "set_aside": set_aside}
    try:
        return load_dataset(name, **asked, **options)
    except NotPrepared:
        if (known := known_sizes(name)) is None:
            raise
        return _placeholder(name, known, **asked)


def known_sizes(name: str) -> Target | None:
    """The published sizes of what a name stands for; None: they are not known.

    In `tfds:NAME:TRAIN` the part of the training images that is trained on is counted as TFDS does,
    `train[:10%]` for one. Of other recorded splits, such as SVHN's `extra`, nothing is known.
    """
    if (target := find_target(name)) is not None:
        return target
    where, train = re.fullmatch(PLACE_AND_TRAIN, name).groups()
    target = find_target(where)
    if target is None or train is None:
        return target
    num_train = _count(train, target.num_train)
    return target._replace(num_train=num_train) if num_train else None


def _count(train: str, num_train: int) -> int:
    """Images of a part, in TFDS's notation, of `num_train` images of the split train; 0: it is no part."""
    import tensorflow_datasets as tfds

    whole = tfds.core.SplitInfo(name="train", shard_lengths=[num_train], num_bytes=0)
    try:
        parts = tfds.core.ReadInstruction.from_spec(train).to_absolute({"train": whole})
    except (ValueError, KeyError, AssertionError):
        return 0
    return sum(len(range(num_train)[part.from_ : part.to]) for part in parts)


def _placeholder(
    name: str,
    known: Target,
    *,
    image_size: int,
    splits: Sequence[str],
    view: str,
    loading: str,
    enlarge: bool,
    set_aside: bool,
) -> Dataset:
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

    parts: dict[str, Split | StreamedSplit] = {split: split_of(number) for split, number in sizes.items()}
    if streamed:

        def read(indices: Sequence[int]) -> Sequence:
            raise ValueError(f"{name} is not prepared")

        indices, crop = np.arange(num_streamed), known.side is None
        parts["train"] = StreamedSplit(read, str, indices, image_size, crop, upright=False, broken="refuse")
    remarks = ()
    try:
        check_memory(name, sum(sizes.values()) - streamed * sizes["train"], side)
    except ValueError as error:
        remarks = (str(error),)
        logging.warning("%s", error)
    return Dataset(
        name,
        tuple(map(str, range(known.num_classes))),
        **parts,
        remarks=remarks,
        digests={split: f"{name}, {view}, {side}, {sizes}: {split}, as published" for split in SPLITS},
        is_placeholder=True,
    )
