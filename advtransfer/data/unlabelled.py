"""Images without labels: one file, or a folder with all of its subfolders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from advtransfer.data.cache import fingerprint
from advtransfer.data.decode import decode_images
from advtransfer.data.layout import SUFFIXES, Walk, in_words
from advtransfer.data.listed import file_records
from advtransfer.data.recorded import Recording, find_size
from advtransfer.data.views import VIEWS

_CHUNK = 1024  # images that are in memory at a time


class Images(NamedTuple):
    """Decoded images, and by position the reason why one could not be decoded; its pixels are arbitrary."""

    pixels: UInt8[np.ndarray, "n size size 3"]
    broken: dict[int, str]


class Unlabelled(NamedTuple):
    """Images on disk, in the order of their paths, and how they are made square (see `fit_image`)."""

    names: tuple[str, ...]  # relative to the folder
    recording: Recording
    size: int
    crop: bool
    view: str
    left_out: str = ""  # numbers of other files, in words

    def read(self, indices: np.ndarray) -> Images:
        """Decodes the images with these indices."""
        records = self.recording.splits["test"]
        pixels, broken = decode_images(
            lambda some: [encoded for encoded, _ in records.read(some)],
            indices,
            self.size,
            crop=self.crop,
            upright=True,
        )
        return Images(VIEWS[self.view](pixels), broken)

    @property
    def num_chunks(self) -> int:
        return -(-len(self.names) // _CHUNK)

    def chunks(self) -> Iterator[Images]:
        """All images, so many at a time that memory does not limit their number."""
        for start in range(0, len(self.names), _CHUNK):
            yield self.read(np.arange(start, min(start + _CHUNK, len(self.names))))


def read_images(
    place: str | Path, image_size: int, *, crop: bool | None = None, view: str = "natural"
) -> tuple[tuple[str, ...], UInt8[np.ndarray, "n size size 3"]]:
    """Names and pixels of the images in a folder, or of one file, as stage=predict reads them.

    Args:
      place: an image file, or a folder; files that are hidden or have no suffix of an image are left out.
      image_size: side of the images in pixels.
      crop: whether images are scaled and cropped as in ImageNet evaluation, or their central square is
        scaled, as those that the network was trained on were; None: as `load_dataset` would decide, cropped
        unless all are squares of one size.
      view: a name in `VIEWS`, that the network was trained on.

    Raises:
      ValueError: there is no such folder or file, no image in it, or one that cannot be decoded.
    """
    images = open_unlabelled(place, image_size, crop=crop, view=view)
    found = images.read(np.arange(len(images.names)))
    for i, why in found.broken.items():
        raise ValueError(f"{images.names[i]} cannot be decoded ({why}): fix or remove it")
    return images.names, found.pixels


def open_unlabelled(
    place: str | Path, image_size: int, *, crop: bool | None = None, view: str = "natural"
) -> Unlabelled:
    """Lists images; files that are hidden or have no suffix of an image are left out.

    Args:
      place, image_size, crop, view: as for `read_images`.

    Raises:
      ValueError: there is no such folder or file, or no image in it.
    """
    root = Path(place).expanduser()
    if root.is_file():
        if root.suffix.lower() not in SUFFIXES:
            raise ValueError(f"{root} has no suffix of an image, such as .jpg or .png")
        paths, root, left_out = [root], root.parent, ""
    elif root.is_dir():
        walk = Walk(str(root), root)
        contents = [content for _, content in walk.below(root)]
        paths = [path for content in contents for path in content.images]
        left_out = in_words(sum((content.left_out for content in contents), Counter()))
    else:
        plain = str(place).removeprefix("folder:")
        hint = f": write {plain}" if plain != str(place) else ""
        raise ValueError(f"there is no folder or file {root}{hint}")
    if not paths:
        only = f" (only {left_out})" if left_out else ""
        raise ValueError(f"{root} contains no images, in any of its subfolders{only}")
    records = file_records(root, [(path, 0) for path in sorted(paths)])
    names = tuple(map(records.describe, range(records.count)))
    identity = {"files": fingerprint(root, paths), "classes": None}
    recording = Recording(str(root), ("",), {"test": records}, identity, upright=True)
    if crop is None:
        _, crop = find_size(recording, image_size, None)
    return Unlabelled(names, recording, image_size, crop, view, left_out)
