"""Image folders: one subfolder per class.

`folder:/path` holds train/CLASS/*, test/CLASS/* and perhaps validation/CLASS/* (or val), some of them
missing, or is one tree CLASS/*, which is then split (see `load_parts`). Class folders may have
subfolders; classes are numbered in the alphabetical order of their names, as torchvision's ImageFolder
does. Hidden files and files that are no pictures by their suffix are ignored.

`folder:/path:TRAIN` says what the training images are, in TFDS's notation: `train[:10%]`, `train[500:]`,
`train+validation`. Slices are taken of a fixed order in which every class has its share of every beginning,
since files have no order of their own: a tenth of the images is a tenth of each class.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from advtransfer.data.cache import fingerprint
from advtransfer.data.recorded import PLACE_AND_TRAIN, Recording, Records, check_training, fixed_order

_SPLIT_FOLDERS = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}
Images = list[tuple[Path, int]]  # paths and labels
_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def open_folder(name: str) -> Recording:
    """Lists the images of a folder; they are read later, turned upright by their EXIF orientation.

    Raises:
      ValueError: no such folder, no class folders in it, or a class without training images.
    """
    root, train = Path(name.partition(":")[2]).expanduser(), "train"
    if not root.is_dir():  # a folder's name may hold a colon itself
        place, train = re.fullmatch(PLACE_AND_TRAIN, str(root)).groups()
        root = Path(place)
    if not root.is_dir():
        raise ValueError(f"{name}: there is no folder {root}")
    folders = {split: root / child for child, split in _SPLIT_FOLDERS.items() if (root / child).is_dir()}
    folders = folders or {"train": root}
    first = next(iter(folders))
    class_names = tuple(path.name for path in sorted(folders[first].iterdir()) if _is_class(path))
    if not class_names:
        raise ValueError(
            f"{name}: {folders[first]} has no class folders; expected {folders[first]}/CLASS/*.png"
        )
    listed = {
        split: _list_images(name, folder, class_names, complete=split == "train")
        for split, folder in folders.items()
    }
    paths = [path for images in listed.values() for path, _ in images]
    if train != "train":
        listed = _slice(name, listed, train)
    return Recording(
        name=name,
        class_names=class_names,
        splits={split: _records(root, images) for split, images in listed.items()},
        identity={"files": fingerprint(root, paths), "classes": class_names, "train": train},
        upright=True,
    )


def _slice(name: str, listed: dict[str, Images], train: str) -> dict[str, Images]:
    """The images of each split when `train`, a sum of slices, is trained on."""
    used, chosen = set(), []
    for term in train.split("+"):
        found = re.fullmatch(r"(\w+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", term)
        split = found and _SPLIT_FOLDERS.get(found[1])
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


def _is_class(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")


def _list_images(name: str, folder: Path, class_names: tuple[str, ...], *, complete: bool) -> Images:
    """Sorted; `complete` asks for an image of every class."""
    unknown = sorted({path.name for path in folder.iterdir() if _is_class(path)} - set(class_names))
    if unknown:
        raise ValueError(f"{name}: {folder} has classes that are not trained on: {', '.join(unknown)}")
    images = []
    for label, class_name in enumerate(class_names):
        before = len(images)
        for parent, _, files in sorted(os.walk(folder / class_name, followlinks=True)):
            good = (f for f in sorted(files) if f[0] != "." and Path(f).suffix.lower() in _SUFFIXES)
            images += [(Path(parent, file), label) for file in good]
        if complete and len(images) == before:
            raise ValueError(f"{name}: {folder / class_name} holds no images")
    return images


def _records(root: Path, images: Images) -> Records:
    # As one array of bytes a million names are small, and quickly handed to another process.
    names = np.array([os.fsencode(path.relative_to(root)) for path, _ in images], np.bytes_)
    labels = np.array([label for _, label in images], np.int32)
    return Records(
        count=len(images),
        labels=lambda: labels,
        read=functools.partial(_read, root, names, labels),
        describe=lambda index: os.fsdecode(names[index]),
    )


def _read(
    root: Path, names: np.ndarray, labels: np.ndarray, indices: Sequence[int]
) -> list[tuple[Path, int]]:
    return [(root / os.fsdecode(names[index]), int(labels[index])) for index in indices]
