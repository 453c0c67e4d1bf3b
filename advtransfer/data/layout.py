"""Which folders of an image dataset are splits and which are classes, without guessing.

Folders called train, test or validation, or one of their usual variants (`split_of`) in any case, are splits
if they contain class folders; if they contain images, next to other classes, they are classes of that name. A
folder that wraps the whole dataset, or the classes of a split, is entered (archive/train,
seg_train/seg_train). Any other ambiguous layout is refused.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

_USUAL = {
    "train": ("train", "training", "tr"),
    "validation": ("validation", "val", "valid", "validate", "dev", "development"),
    "test": ("test", "testing", "tst"),
}
_SPLITS = {usual: split for split, names in _USUAL.items() for usual in names}
_JUNK = {"__MACOSX", "lost+found"}
_FOLD = re.compile(r"(fold|split|part|set|cv|k|run|batch)?[-_ ]*\d+", re.IGNORECASE)
# Suffixes of the formats in `decode.FORMATS`.
SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in (
        *("apng", "avif", "avifs", "bmp", "dib", "gif", "jfif", "jpe", "jpeg", "jpg", "j2k", "jp2", "jpx"),
        *("pbm", "pgm", "png", "pnm", "ppm", "tga", "tif", "tiff", "webp"),
    )
)


class Layout(NamedTuple):
    """The folder that contains the classes of each split, and notes for the user."""

    splits: dict[str, Path]  # some of train, validation, test
    remarks: tuple[str, ...]


class Content(NamedTuple):
    """The direct content of a folder, ordered by name."""

    images: tuple[Path, ...]  # files with an image suffix, including broken links
    folders: tuple[Path, ...]
    left_out: Counter[str]  # number of other entries by reason


def in_words(left_out: Counter[str]) -> str:
    """Such as "3 hidden, 1 with suffix .txt"."""
    return ", ".join(f"{count:,} {why}" for why, count in left_out.most_common() if count)


class Walk:
    """Lists the folders below `root`, each once, without links that lead back into the dataset, what is
    hidden or made by file systems and viewers (`@eaDir`, `__MACOSX`, ...), and what is no file or folder."""

    def __init__(self, name: str, root: Path):
        self.name, self.root = name, root
        self._real_root = os.path.realpath(root)
        self._known: dict[Path, Content] = {}
        self._linked_files: set[str] = set()  # targets of links
        self._linked_folders: set[str] = set()

    def look(self, folder: Path) -> Content:
        """The direct content of a folder.

        Raises:
          ValueError: the folder cannot be listed, or contains a broken link without a suffix.
        """
        if folder not in self._known:
            self._known[folder] = self._list(folder)
        return self._known[folder]

    def _list(self, folder: Path) -> Content:
        images, folders, left_out = [], [], Counter[str]()
        try:
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            raise ValueError(f"{self.name}: {folder} cannot be listed: {error.strerror}") from error
        for entry in entries:
            path, suffix = Path(entry.path), Path(entry.name).suffix.lower()
            if entry.name[0] in ".@#$" or entry.name in _JUNK:
                left_out["hidden"] += 1
            elif entry.is_symlink() and not os.path.exists(path):
                if suffix in SUFFIXES:
                    images.append(path)  # treated like any other image that cannot be read
                elif suffix:
                    left_out[f"with suffix {suffix}"] += 1
                else:
                    raise ValueError(
                        f"{self.name}: {path} is a broken link: mount its target or remove the link"
                    )
            elif entry.is_symlink() and not self._is_followed(path):
                left_out["links to what is already in the dataset"] += 1
            elif entry.is_dir():
                folders.append(path)
            elif not entry.is_file():
                left_out["neither files nor folders"] += 1
            elif suffix in SUFFIXES:
                images.append(path)
            else:
                left_out[f"with suffix {suffix}" if suffix else "without a suffix"] += 1
        return Content(tuple(images), tuple(folders), left_out)

    def _is_followed(self, link: Path) -> bool:
        """Whether a link's target overlaps neither with the dataset nor with another link's target."""
        target, folders = os.path.realpath(link), {self._real_root}
        if link.is_dir():
            folders |= self._linked_folders
        overlaps = target in self._linked_files or any(
            os.path.commonpath([target, folder]) in (target, folder) for folder in folders
        )
        (self._linked_folders if link.is_dir() else self._linked_files).add(target)
        return not overlaps

    def below(self, folder: Path) -> Iterable[tuple[Path, Content]]:
        """A folder and all folders below it, with their content."""
        content = self.look(folder)
        yield folder, content
        for child in content.folders:
            yield from self.below(child)

    def has_images(self, folder: Path) -> bool:
        return any(content.images for _, content in self.below(folder))

    def has_classes(self, folder: Path) -> bool:
        """Whether there are images in its subfolders, and none in the folder itself."""
        content = self.look(folder)
        return not content.images and any(map(self.has_images, content.folders))


def split_of(name: str) -> str | None:
    """The split that a folder's name usually means: Training, test_set, seg_val, valid, dev, ..."""
    plain = re.sub(r"[-_ .]", "", name).casefold()
    plain = re.sub(r"^(seg)|(set|data|images|imgs|split)$", "", plain)
    return _SPLITS.get(re.sub(r"(set|data|images|imgs|split)$", "", plain))


def read_layout(walk: Walk) -> Layout:
    """The splits of the dataset, or "train" for a single tree of classes.

    Raises:
      ValueError: no class folders, or an ambiguous layout.
    """
    top, remarks = _enter(walk, walk.root, lambda child: not split_of(child.name))
    children = [child for child in walk.look(top).folders if walk.has_images(child)]
    named = {child: split for child in children if (split := split_of(child.name))}
    splits = {child: split for child, split in named.items() if walk.has_classes(child)}
    others = [child for child in children if child not in splits]
    if not splits:
        if named and len(named) == len(children):
            raise ValueError(
                f"{walk.name}: {_names(children)} contain images but no class folders; expected "
                f"{children[0]}/CLASS/*.png"
            )
        _check_classes(walk, children)
        return Layout({"train": top}, remarks)
    if others:
        raise ValueError(
            f"{walk.name}: {_names(others)} is next to {_names([*splits])} in {top} but is not a split with "
            "class folders: name it train, validation or test and sort its images into class folders, or "
            "move it away"
        )
    found: dict[str, Path] = {}
    for child, split in splits.items():
        if split in found:
            both = _names([found[split], child])
            raise ValueError(f"{walk.name}: {both} could both be the {split} images: move one away")
        found[split] = child
    for split, folder in found.items():
        found[split], more = _enter(walk, folder, lambda child: True)
        remarks += more
        _check_classes(walk, walk.look(found[split]).folders, is_split=True)
    if any(found[split].name != split for split in found):
        read = ", ".join(f"{folder.relative_to(walk.root)}/ as {split}" for split, folder in found.items())
        remarks += (f"read {read}",)
    return Layout({split: found[split] for split in _USUAL if split in found}, remarks)


def _enter(walk: Walk, folder: Path, is_wrapper: Callable[[Path], bool]) -> tuple[Path, tuple[str, ...]]:
    """The folder that contains the classes (or splits), below folders that only wrap it."""
    remarks: tuple[str, ...] = ()
    while not walk.look(folder).images:
        children = [child for child in walk.look(folder).folders if walk.has_images(child)]
        if len(children) != 1 or not is_wrapper(children[0]) or not walk.has_classes(children[0]):
            break
        (folder,) = children
        remarks = (f"read {folder.relative_to(walk.root)}/, the only folder with images",)
    return folder, remarks


def _check_classes(walk: Walk, folders: Iterable[Path], *, is_split: bool = False) -> None:
    """Raises a ValueError for folds, or splits of other names, where classes are expected."""
    nested = [folder for folder in folders if walk.has_classes(folder)]
    inside = [{child.name for child in walk.look(folder).folders} for folder in nested]
    shared = sorted(set.intersection(*inside)) if len(nested) > 1 else []
    if shared and (not is_split or all(_FOLD.fullmatch(f.name) or split_of(f.name) for f in nested)):
        raise ValueError(
            f"{walk.name}: {_names(nested)} each contain {', '.join(shared[:5])}: are they splits or "
            "classes? Put the training images into train/CLASS and the test images into test/CLASS"
        )


def _names(folders: Sequence[Path]) -> str:
    return ", ".join(f"{folder.name}/" for folder in folders[:5]) + (", ..." if len(folders) > 5 else "")
