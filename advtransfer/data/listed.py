"""Lists of labelled images, as folders and tables give them: their classes, slices and files."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import SupportsIndex, TypeVar

import numpy as np

from advtransfer.data.cache import shortened
from advtransfer.data.layout import split_of
from advtransfer.data.recorded import Records, check_training, fixed_order

T = TypeVar("T")


def printable(name: str) -> str:
    """A file name as text, with bytes that are not UTF-8 and unprintable characters escaped."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def class_order(class_name: str) -> tuple[bool, int, str]:
    """Sorts classes by their names, but integers first and numerically."""
    is_number = class_name.isascii() and class_name.isdigit()
    return not is_number, int(class_name) if is_number else 0, class_name


def check_classes(name: str, split: str, found: Collection[str], class_names: Collection[str]) -> None:
    """Raises a ValueError if a split has classes that do not occur in training."""
    if unknown := sorted(set(found) - set(class_names)):
        raise ValueError(
            f"{name}: {split} has classes that do not occur in training: {', '.join(unknown)}; the "
            f"training classes are {', '.join(class_names)}"
        )


def select_training(
    name: str, listed: dict[str, list[tuple[T, int]]], train: str
) -> dict[str, list[tuple[T, int]]]:
    """The images and labels of each split if `train`, a sum of slices, selects the training images.

    Slices are taken from a fixed, stratified order.

    Raises:
      ValueError: `train` cannot be read, selects test images or selects nothing.
    """
    used: set[str] = set()
    chosen: list[tuple[T, int]] = []
    for term in train.split("+"):
        found = re.fullmatch(r"(\w+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", term)
        split = split_of(found[1]) if found else None
        if not found or split not in listed:
            raise ValueError(
                f"{name}: {term!r} selects no images; use {', '.join(listed)}, or slices such as train[:10%]"
            )
        images = listed[split]
        order = fixed_order(np.array([label for _, label in images], np.int32), len(images))
        start, stop = (_place(bound, len(images)) for bound in found.groups()[1:])
        chosen += [images[i] for i in np.sort(order[start:stop])]
        used.add(split)
    check_training(name, used, listed)
    if not chosen:
        raise ValueError(f"{name}: {train} contains no images")
    return {split: images for split, images in listed.items() if split not in used} | {"train": chosen}


def _place(bound: str | None, count: int) -> int | None:
    """A slice's bound as a number of images; percentages are rounded to the nearest, as in TFDS."""
    if bound is None:
        return None
    return round(int(bound[:-1]) / 100 * count) if bound.endswith("%") else int(bound)


def file_records(root: Path, images: Sequence[tuple[Path, int]]) -> Records:
    """The records of image files, by path and label; most of them lie below `root`."""
    # As one array of bytes, a million names take little memory and are quickly sent to another process.
    names = np.array([os.fsencode(shortened(path, root)) for path, _ in images], np.bytes_)
    labels = np.array([label for _, label in images], np.int32)
    return Records(
        count=len(images),
        labels=lambda: labels,
        read=functools.partial(_read, root, names, labels),
        describe=functools.partial(_describe, names),
    )


def _read(
    root: Path, names: np.ndarray, labels: np.ndarray, indices: Iterable[SupportsIndex]
) -> list[tuple[Path, int]]:
    return [(root / os.fsdecode(names[index]), int(labels[index])) for index in indices]


def _describe(names: np.ndarray, index: SupportsIndex) -> str:
    return printable(os.fsdecode(names[index]))
