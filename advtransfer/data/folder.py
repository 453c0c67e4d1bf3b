"""Image folders: one subfolder per class.

`folder:/path` contains some of train/CLASS/*, validation/CLASS/* and test/CLASS/*, or is a single tree
CLASS/*, which is then split (see `load_parts`); module `layout` documents other accepted names. Class folders
may have subfolders. Classes are numbered in the order of their names, as in torchvision's ImageFolder, but
integers numerically. Names that differ only in Unicode composition are one class. Files that are left out are
counted and reported.

`folder:/path:TRAIN` selects the training images in TFDS's notation: `train[:10%]`, `train[500:]`,
`train+validation`. As files have no order of their own, slices are taken from a fixed, stratified order: a
tenth of the images is a tenth of each class.
"""

from __future__ import annotations

import functools
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import SupportsIndex

import numpy as np

from advtransfer.data.cache import fingerprint
from advtransfer.data.layout import Walk, read_layout, split_of
from advtransfer.data.recorded import Recording, Records, check_training, fixed_order, split_name

Images = list[tuple[Path, int]]  # paths and labels


def open_folder(name: str) -> Recording:
    """Lists the images of a folder. They are read later, and made upright by their EXIF orientation.

    Raises:
      ValueError: no such folder, no class folders in it, an ambiguous layout (see `read_layout`), or a class
        without training images.
    """
    root, train = Path(name.partition(":")[2]).expanduser(), None
    if not root.is_dir():  # a folder's name may itself contain a colon
        place, train = split_name(str(root))
        root = Path(place)
    if not root.is_dir():
        raise ValueError(f"{name}: there is no folder {root}")
    train = train or "train"
    walk = Walk(name, root)
    layout = read_layout(walk)
    classes = {split: _classes(walk, folder) for split, folder in layout.splits.items()}
    first, folder = next(iter(layout.splits.items()))
    class_names = tuple(sorted(classes[first], key=_order))
    if not class_names:
        raise ValueError(f"{name}: {folder} has no class folders; expected {folder}/CLASS/*.png")
    left_out: Counter[str] = Counter()
    listed = {
        split: _list_images(walk, split, folders, class_names, left_out) for split, folders in classes.items()
    }
    for folder in {root, *layout.splits.values()}:
        content = walk.look(folder)
        left_out += content.left_out
        left_out["images outside class folders"] += len(content.images)
    paths = [path for images in listed.values() for path, _ in images]
    remarks = list(layout.remarks)
    if counts := _counts(left_out):
        remarks.append(f"left out {counts}")
    if train != "train":
        listed = _slice(name, listed, train)
    return Recording(
        name=name,
        class_names=class_names,
        splits={split: make_records(root, images) for split, images in listed.items()},
        identity={"files": fingerprint(root, paths), "classes": class_names, "train": train},
        upright=True,
        remarks=tuple(remarks),
    )


def _classes(walk: Walk, folder: Path) -> dict[str, list[Path]]:
    """Class folders by class name."""
    found: dict[str, list[Path]] = {}
    for child in walk.look(folder).folders:
        found.setdefault(_printable(unicodedata.normalize("NFC", child.name)), []).append(child)
    return found


def _printable(name: str) -> str:
    """A file name as text, with bytes that are not UTF-8 and unprintable characters escaped."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _order(class_name: str) -> tuple[bool, int, str]:
    is_number = class_name.isascii() and class_name.isdigit()
    return not is_number, int(class_name) if is_number else 0, class_name


def _slice(name: str, listed: dict[str, Images], train: str) -> dict[str, Images]:
    """The images of each split if `train`, a sum of slices, selects the training images."""
    used: set[str] = set()
    chosen: Images = []
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


def _list_images(
    walk: Walk,
    split: str,
    folders: dict[str, list[Path]],
    class_names: tuple[str, ...],
    left_out: Counter[str],
) -> Images:
    """The images in the order of classes and names; files that are left out are added to `left_out`.

    Raises:
      ValueError: classes that do not occur in training, or a class without training images.
    """
    unknown = sorted(folders.keys() - set(class_names))
    if unknown:
        raise ValueError(
            f"{walk.name}: {split} has classes that do not occur in training: {', '.join(unknown)}; the "
            f"training classes are {', '.join(class_names)}"
        )
    images: Images = []
    for label, class_name in enumerate(class_names):
        before, missed = len(images), Counter[str]()
        for folder in folders.get(class_name, ()):
            for _, content in sorted(walk.below(folder)):
                images += [(path, label) for path in content.images]
                missed += content.left_out
        if split == "train" and len(images) == before:
            only = f" (only {_counts(missed)})" if missed else ""
            raise ValueError(f"{walk.name}: {folders[class_name][0]} contains no images{only}")
        left_out += missed
    return images


def _counts(left_out: Counter[str]) -> str:
    return ", ".join(f"{count:,} {why}" for why, count in left_out.most_common() if count)


def make_records(root: Path, images: Images) -> Records:
    """Image files below `root`, by index."""
    # As one array of bytes, a million names take little memory and are quickly sent to another process.
    names = np.array([os.fsencode(path.relative_to(root)) for path, _ in images], np.bytes_)
    labels = np.array([label for _, label in images], np.int32)
    return Records(
        count=len(images),
        labels=lambda: labels,
        read=functools.partial(_read, root, names, labels),
        describe=lambda index: _printable(os.fsdecode(names[index])),
    )


def _read(
    root: Path, names: np.ndarray, labels: np.ndarray, indices: Iterable[SupportsIndex]
) -> list[tuple[Path, int]]:
    return [(root / os.fsdecode(names[index]), int(labels[index])) for index in indices]
