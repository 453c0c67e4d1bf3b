"""Images whose shape and texture point to different classes: recorded ones, and letters on gratings."""

from __future__ import annotations

import re
from collections.abc import Collection
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped, UInt8

from advtransfer.analysis.imagenet16 import IMAGENET16
from advtransfer.data.cache import fingerprint
from advtransfer.data.glyphs import DEFAULT_SIZE, LETTERS, render_glyphs
from advtransfer.data.recorded import Recording, Records, load_parts

LETTER_OUTPUTS = {letter: (output,) for output, letter in enumerate(LETTERS)}

_SUFFIXES = {".png", ".jpg", ".jpeg"}
_STREAM = 1000  # of random numbers, beside those that the glyphs' splits are drawn with


class CueConflict(NamedTuple):
    """Images with the shape of one class and the texture of another, or of the same."""

    images: UInt8[np.ndarray, "n h w 3"]
    shapes: Shaped[np.ndarray, " n"]  # class names
    textures: Shaped[np.ndarray, " n"]  # class names
    files: tuple[str, ...] = ()  # N paths below the folder; () where there is none


def image_paths(root: Path) -> list[Path]:
    """The images in a folder and below it, sorted."""
    return sorted(p for p in root.rglob("*") if p.suffix.lower() in _SUFFIXES and p.name[0] != ".")


def read_cue_conflict(
    folder: str | PathLike,
    class_names: Collection[str] = tuple(IMAGENET16),
    *,
    image_size: int | None,
    cache_dir: str | PathLike | None = None,
) -> CueConflict:
    """Reads images named SHAPEi-TEXTUREj.png, such as airplane1-bicycle2.png, in a folder or below it.

    They are resized as a dataset's (`load_dataset`): squares of one size as a whole, so that the published
    224² images stay as they are, others cropped as in ImageNet's evaluation. Decoded images are cached.

    Args:
      folder: such as stimuli/style-transfer-preprocessed-512 of github.com/rgeirhos/texture-vs-shape.
      class_names: of shapes and textures.
      image_size: side in pixels; None is the images' own.
      cache_dir: see `load_dataset`.

    Raises:
      ValueError: no images, a name of another form or of an unknown class, or a broken image.
    """
    root = Path(folder).expanduser()
    paths = image_paths(root)
    if not paths:
        raise ValueError(
            f"{root} holds no images; expected airplane1-bicycle2.png or SHAPE/SHAPE1-TEXTURE2.png"
        )
    files = tuple(str(path.relative_to(root)) for path in paths)
    found = []
    for path in paths:
        match = re.fullmatch(r"(.+?)\d*-(.+?)\d*", path.stem)
        if match is None:
            raise ValueError(f"{path} is not named SHAPE1-TEXTURE2, as airplane1-bicycle2.png is")
        found.append(match.groups())
        for name in match.groups():
            if name not in class_names:
                raise ValueError(
                    f"{path} names the class {name!r}, which is none of {', '.join(class_names)}"
                )
    records = Records(
        count=len(files),
        labels=lambda: np.zeros(len(files), np.int32),
        read=lambda indices: [(paths[i], 0) for i in indices],
        describe=lambda index: files[index],
    )
    identity = {"files": fingerprint(root, paths)}
    recording = Recording(f"cue-conflict:{root}", (), {"test": records}, identity, upright=False)
    images = load_parts(recording, image_size, cache_dir, ["test"], "refuse", "natural")["test"].images
    shapes, textures = np.array(found).T
    return CueConflict(images, shapes, textures, files)


def glyph_cue_conflict(
    amplitude: float,
    opacity: float = 1.0,
    *,
    seed: int = 0,
    num_repeats: int = 1,
    image_size: int = DEFAULT_SIZE,
) -> CueConflict:
    """Every letter on the grating of every other: 506 images times `num_repeats`.

    Sources are trained on gratings of 0.02 to 0.06 below opaque letters, a weak cue and a strong one. The two
    are balanced by fading the letter (`opacity`) or raising the grating (`amplitude`, which also hides the
    letter); see `render_glyphs`. Of one seed the pictures are otherwise the same, and none is in the dataset.
    """
    pairs = np.nonzero(~np.eye(len(LETTERS), dtype=bool))
    letters, textures = (np.tile(classes, num_repeats) for classes in pairs)
    rng = np.random.default_rng([seed, _STREAM])
    strength = (amplitude, amplitude)
    images = render_glyphs(
        letters, textures, image_size=image_size, rng=rng, amplitude=strength, opacity=opacity
    )
    names = np.array(list(LETTERS))
    return CueConflict(images, names[letters], names[textures])
