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

import unicodedata
from collections import Counter
from pathlib import Path

from advtransfer.data.cache import fingerprint
from advtransfer.data.layout import Walk, in_words, read_layout
from advtransfer.data.listed import check_classes, class_order, file_records, printable, select_training
from advtransfer.data.recorded import Recording, split_name

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
    class_names = tuple(sorted(classes[first], key=class_order))
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
    if counts := in_words(left_out):
        remarks.append(f"left out {counts}")
    if train != "train":
        listed = select_training(name, listed, train)
    return Recording(
        name=name,
        class_names=class_names,
        splits={split: file_records(root, images) for split, images in listed.items()},
        identity={"files": fingerprint(root, paths), "classes": class_names, "train": train},
        upright=True,
        remarks=tuple(remarks),
    )


def _classes(walk: Walk, folder: Path) -> dict[str, list[Path]]:
    """Class folders by class name."""
    found: dict[str, list[Path]] = {}
    for child in walk.look(folder).folders:
        found.setdefault(printable(unicodedata.normalize("NFC", child.name)), []).append(child)
    return found


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
    check_classes(walk.name, split, folders, class_names)
    images: Images = []
    for label, class_name in enumerate(class_names):
        before, missed = len(images), Counter[str]()
        for folder in folders.get(class_name, ()):
            for _, content in sorted(walk.below(folder)):
                images += [(path, label) for path in content.images]
                missed += content.left_out
        if split == "train" and len(images) == before:
            only = f" (only {in_words(missed)})" if missed else ""
            raise ValueError(f"{walk.name}: {folders[class_name][0]} contains no images{only}")
        left_out += missed
    return images
