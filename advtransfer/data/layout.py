"""What the folders of an image set mean: which are splits, which are classes. Nothing is guessed.

Folders called train, test or validation, under their usual other names (`split_of`) and in any case, are
splits where they hold class folders; where all of them hold pictures, as beside other classes, they are
classes of that name. One folder around the whole set, and one around the classes of a split, are opened
(archive/train, seg_train/seg_train). Whatever else could be read in two ways is refused.
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
# Of the formats in `decode.FORMATS`.
SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in (
        *("apng", "avif", "avifs", "bmp", "dib", "gif", "jfif", "jpe", "jpeg", "jpg", "j2k", "jp2", "jpx"),
        *("pbm", "pgm", "png", "pnm", "ppm", "tga", "tif", "tiff", "webp"),
    )
)


class Layout(NamedTuple):
    """The folders that hold the classes of each split, and what a reader should know of them."""

    splits: dict[str, Path]  # some of train, validation, test
    remarks: tuple[str, ...]


class Content(NamedTuple):
    """What lies directly in a folder: paths in the order of their names."""

    pictures: tuple[Path, ...]  # files with a picture's suffix, and links with one that lead nowhere
    folders: tuple[Path, ...]
    left_out: Counter[str]  # how many of what else, by reason


class Walk:
    """Lists folders below `root`, each once: links that lead back into the set are left out.

    Hidden folders and files, and those that file systems and viewers make for themselves (`@eaDir`,
    `__MACOSX`, ...), are left out too; so is what is neither a file nor a folder.
    """

    def __init__(self, name: str, root: Path):
        self.name, self.root = name, root
        self._real_root = os.path.realpath(root)
        self._known: dict[Path, Content] = {}
        self._linked_files: set[str] = set()  # where links lead to
        self._linked_folders: set[str] = set()

    def look(self, folder: Path) -> Content:
        """What lies directly in a folder.

        Raises:
          ValueError: it cannot be listed, or a folder's link leads nowhere.
        """
        if folder not in self._known:
            self._known[folder] = self._list(folder)
        return self._known[folder]

    def _list(self, folder: Path) -> Content:
        pictures, folders, left_out = [], [], Counter()
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
                    pictures.append(path)  # that cannot be read, and is refused or skipped as others are
                elif suffix:
                    left_out[f"of the kind {suffix}"] += 1
                else:
                    raise ValueError(
                        f"{self.name}: {path} is a link to what is not there: mount or remove it"
                    )
            elif entry.is_symlink() and not self._is_followed(path):
                left_out["links to what is in the set already"] += 1
            elif entry.is_dir():
                folders.append(path)
            elif not entry.is_file():
                left_out["neither files nor folders"] += 1
            elif suffix in SUFFIXES:
                pictures.append(path)
            else:
                left_out[f"of the kind {suffix}" if suffix else "without a suffix"] += 1
        return Content(tuple(pictures), tuple(folders), left_out)

    def _is_followed(self, link: Path) -> bool:
        """Whether a link leads out of the set, and neither into nor around what others led to."""
        there, folders = os.path.realpath(link), {self._real_root}
        if link.is_dir():
            folders |= self._linked_folders
        met = there in self._linked_files or any(
            os.path.commonpath([there, folder]) in (there, folder) for folder in folders
        )
        (self._linked_folders if link.is_dir() else self._linked_files).add(there)
        return not met

    def below(self, folder: Path) -> Iterable[tuple[Path, Content]]:
        """A folder and those below it, with what lies in each."""
        content = self.look(folder)
        yield folder, content
        for child in content.folders:
            yield from self.below(child)

    def holds_pictures(self, folder: Path) -> bool:
        return any(content.pictures for _, content in self.below(folder))

    def holds_classes(self, folder: Path) -> bool:
        """Whether pictures lie in folders of it, and none beside these."""
        content = self.look(folder)
        return not content.pictures and any(map(self.holds_pictures, content.folders))


def split_of(name: str) -> str | None:
    """The split that a folder's name usually stands for: Training, test_set, seg_val, valid, dev, ..."""
    plain = re.sub(r"[-_ .]", "", name).casefold()
    plain = re.sub(r"^(seg)|(set|data|images|imgs|split)$", "", plain)
    return _SPLITS.get(re.sub(r"(set|data|images|imgs|split)$", "", plain))


def read_layout(walk: Walk) -> Layout:
    """The splits of the set, or "train" for a single tree of classes.

    Raises:
      ValueError: no class folders, or folders that could mean several things.
    """
    top, remarks = _enter(walk, walk.root, lambda child: not split_of(child.name))
    children = [child for child in walk.look(top).folders if walk.holds_pictures(child)]
    named = [child for child in children if split_of(child.name)]
    splits = [child for child in named if walk.holds_classes(child)]
    others = [child for child in children if child not in splits]
    if not splits:
        if named and len(named) == len(children):
            raise ValueError(
                f"{walk.name}: {_names(named)} hold pictures and no class folders; expected "
                f"{named[0]}/CLASS/*.png"
            )
        _check_classes(walk, children)
        return Layout({"train": top}, remarks)
    if others:
        raise ValueError(
            f"{walk.name}: {_names(others)} lies beside {_names(splits)} in {top} and is no split with class "
            "folders: call it train, validation or test and sort its pictures into classes, or move it away"
        )
    found: dict[str, Path] = {}
    for child in splits:
        split = split_of(child.name)
        if split in found:
            raise ValueError(
                f"{walk.name}: {_names([found[split], child])} could each be the {split} images: "
                "move one away"
            )
        found[split] = child
    for split, folder in found.items():
        found[split], more = _enter(walk, folder, lambda child: True)
        remarks += more
        _check_classes(walk, walk.look(found[split]).folders, is_split=True)
    if any(found[split].name != split for split in found):
        read = ", ".join(f"{folder.relative_to(walk.root)}/ as {split}" for split, folder in found.items())
        remarks += (f"took {read}",)
    return Layout({split: found[split] for split in _USUAL if split in found}, remarks)


def _enter(walk: Walk, folder: Path, is_wrapper: Callable[[Path], bool]) -> tuple[Path, tuple[str, ...]]:
    """The folder that holds the classes (or splits) where others are only wrapped around it."""
    remarks: tuple[str, ...] = ()
    while not walk.look(folder).pictures:
        children = [child for child in walk.look(folder).folders if walk.holds_pictures(child)]
        if len(children) != 1 or not is_wrapper(children[0]) or not walk.holds_classes(children[0]):
            break
        (folder,) = children
        remarks = (f"took {folder.relative_to(walk.root)}/, the only folder with pictures there",)
    return folder, remarks


def _check_classes(walk: Walk, folders: Iterable[Path], *, is_split: bool = False) -> None:
    """Raises a ValueError for folds, or splits of other names, where classes are expected."""
    nested = [folder for folder in folders if walk.holds_classes(folder)]
    inside = [{child.name for child in walk.look(folder).folders} for folder in nested]
    shared = sorted(set.intersection(*inside)) if len(nested) > 1 else []
    if shared and (not is_split or all(_FOLD.fullmatch(f.name) or split_of(f.name) for f in nested)):
        raise ValueError(
            f"{walk.name}: {_names(nested)} each hold {', '.join(shared[:5])}: are they parts of the set, or "
            "its classes? Put what is trained on into train/CLASS and what is tested on into test/CLASS"
        )


def _names(folders: Sequence[Path]) -> str:
    return ", ".join(f"{folder.name}/" for folder in folders[:5]) + (", ..." if len(folders) > 5 else "")
