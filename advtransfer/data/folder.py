"""Image folders: one subfolder per class.

`folder:/path` holds train/CLASS/*, test/CLASS/* and perhaps validation/CLASS/*, some of them missing, or is
one tree CLASS/*, which is then split (see `load_parts`); `layout` says which other names are understood.
Class folders may have subfolders. Classes are numbered in the order of their names, as torchvision's
ImageFolder does it, but whole numbers in that of their values. Names that differ in how Unicode composes
their letters alone are one class. What is left out is counted and said.

`folder:/path:TRAIN` says what the training images are, in TFDS's notation: `train[:10%]`, `train[500:]`,
`train+validation`. Slices are taken of a fixed order in which every class has its share of every beginning,
since files have no order of their own: a tenth of the images is a tenth of each class.
"""

from __future__ import annotations

import functools
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from advtransfer.data.cache import fingerprint
from advtransfer.data.layout import Walk, read_layout, split_of
from advtransfer.data.recorded import PLACE_AND_TRAIN, Recording, Records, check_training, fixed_order

Images = list[tuple[Path, int]]  # paths and labels


def open_folder(name: str) -> Recording:
    """Lists the images of a folder; they are read later, turned upright by their EXIF orientation.

    Raises:
      ValueError: no such folder, no class folders in it, folders that could mean several things (see
        `read_layout`), or a class without training images.
    """
    root, train = Path(name.partition(":")[2]).expanduser(), "train"
    if not root.is_dir():  # a folder's name may hold a colon itself
        place, train = re.fullmatch(PLACE_AND_TRAIN, str(root)).groups()
        root = Path(place)
    if not root.is_dir():
        raise ValueError(f"{name}: there is no folder {root}")
    walk = Walk(name, root)
    layout = read_layout(walk)
    classes = {split: _classes(walk, folder) for split, folder in layout.splits.items()}
    first = next(iter(classes))
    class_names = tuple(sorted(classes[first], key=_order))
    if not class_names:
        folder = layout.splits[first]
        raise ValueError(f"{name}: {folder} has no class folders; expected {folder}/CLASS/*.png")
    left_out: Counter[str] = Counter()
    listed = {
        split: _list_images(walk, split, folders, class_names, left_out) for split, folders in classes.items()
    }
    for folder in {root, *layout.splits.values()}:
        content = walk.look(folder)
        left_out += content.left_out
        left_out["pictures outside class folders"] += len(content.pictures)
    paths = [path for images in listed.values() for path, _ in images]
    remarks = list(layout.remarks)
    if +left_out:
        counts = ", ".join(f"{count:,} {why}" for why, count in left_out.most_common() if count)
        remarks.append(f"left out {counts}")
    if train != "train":
        listed = _slice(name, listed, train)
    return Recording(
        name=name,
        class_names=class_names,
        splits={split: _records(root, images) for split, images in listed.items()},
        identity={"files": fingerprint(root, paths), "classes": class_names, "train": train},
        upright=True,
        remarks=tuple(remarks),
    )


def _classes(walk: Walk, folder: Path) -> dict[str, list[Path]]:
    """The class folders by class name."""
    found: dict[str, list[Path]] = {}
    for child in walk.look(folder).folders:
        found.setdefault(_printable(unicodedata.normalize("NFC", child.name)), []).append(child)
    return found


def _printable(name: str) -> str:
    """A file's name as text: bytes that are no UTF-8, and what cannot be printed, are escaped."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _order(class_name: str) -> tuple[bool, int, str]:
    is_number = class_name.isascii() and class_name.isdigit()
    return not is_number, int(class_name) if is_number else 0, class_name


def _slice(name: str, listed: dict[str, Images], train: str) -> dict[str, Images]:
    """The images of each split when `train`, a sum of slices, is trained on."""
    used, chosen = set(), []
    for term in train.split("+"):
        found = re.fullmatch(r"(\w+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", term)
        split = found and split_of(found[1])
        if split not in listed:
            raise ValueError(
                f"{name}: {term!r} names no images; write train[:10%] or the like, of {', '.join(listed)}"
            )
        images = listed[split]
        order = fixed_order([label for _, label in images], len(images))
        place = slice(*(_place(bound, len(images)) for bound in found.groups()[1:]))
        chosen += [images[i] for i in np.sort(order[place])]
        used.add(split)
    check_training(name, used, listed)
    if not chosen:
        raise ValueError(f"{name}: there is no image in {train}")
    return {split: images for split, images in listed.items() if split not in used} | {"train": chosen}


def _place(bound: str | None, count: int) -> int | None:
    """A slice's bound as a number of images; percent are rounded to the nearest, as TFDS does."""
    if bound is None or not bound.endswith("%"):
        return bound and int(bound)
    return round(int(bound[:-1]) / 100 * count)


def _list_images(
    walk: Walk,
    split: str,
    folders: dict[str, list[Path]],
    class_names: tuple[str, ...],
    left_out: Counter[str],
) -> Images:
    """In the order of classes and names; what is left out of them is added to `left_out`.

    Raises:
      ValueError: classes that are not trained on, or of the training images one that has none.
    """
    unknown = sorted(folders.keys() - set(class_names))
    if unknown:
        raise ValueError(
            f"{walk.name}: {split} has classes that are not trained on: {', '.join(unknown)}; trained on are "
            f"{', '.join(class_names)}"
        )
    images = []
    for label, class_name in enumerate(class_names):
        before, missed = len(images), Counter()
        for folder in folders.get(class_name, ()):
            for _, content in sorted(walk.below(folder)):
                images += [(path, label) for path in content.pictures]
                missed += content.left_out
        if split == "train" and len(images) == before:
            seen = ", ".join(f"{count:,} {why}" for why, count in missed.most_common())
            raise ValueError(
                f"{walk.name}: {folders[class_name][0]} holds no images" + (f" (only {seen})" if seen else "")
            )
        left_out += missed
    return images


def _records(root: Path, images: Images) -> Records:
    # As one array of bytes a million names are small, and quickly handed to another process.
    names = np.array([os.fsencode(path.relative_to(root)) for path, _ in images], np.bytes_)
    labels = np.array([label for _, label in images], np.int32)
    return Records(
        count=len(images),
        labels=lambda: labels,
        read=functools.partial(_read, root, names, labels),
        describe=lambda index: _printable(os.fsdecode(names[index])),
    )


def _read(
    root: Path, names: np.ndarray, labels: np.ndarray, indices: Sequence[int]
) -> list[tuple[Path, int]]:
    return [(root / os.fsdecode(names[index]), int(labels[index])) for index in indices]
