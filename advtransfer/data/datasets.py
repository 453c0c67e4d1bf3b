"""Datasets by name, as uint8 arrays on the host.

`DATASETS` names every set that can be loaded. A set that is new to it needs a function
`(image_size, seed, cache_dir) -> (class_names, train, validation, test)` and a line there.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from os import PathLike
from typing import NamedTuple

import numpy as np
from PIL import Image

from advtransfer.data import glyphs
from advtransfer.data.cache import cached_arrays
from advtransfer.data.subsets import stratified_order


class Split(NamedTuple):
    """Images and labels on the host."""

    images: np.ndarray  # uint8 [N, H, W, 3]
    labels: np.ndarray  # int32 [N]


class Dataset(NamedTuple):
    """The three splits of one dataset; no image is in two of them."""

    name: str
    class_names: tuple[str, ...]
    train: Split
    validation: Split  # carved out of the training images; hyper-parameters are chosen on it
    test: Split


Parts = tuple[tuple[str, ...], Split, Split, Split]


def load_dataset(
    name: str,
    *,
    image_size: int | None = None,
    seed: int = 0,
    cache_dir: str | PathLike | None = None,
) -> Dataset:
    """Loads a dataset by name.

    Args:
      name: one of `DATASETS`.
      image_size: side of the images in pixels; None is the set's own (glyphs 16, digits 8).
        Glyphs are drawn at this size, digits are resized to it (bilinear with antialias).
      seed: which glyphs are drawn. A set of recorded images is the same for every seed.
      cache_dir: where drawn glyphs are kept; None is `$XDG_CACHE_HOME/advtransfer` or
        `~/.cache/advtransfer`. The sets load without a cache when it cannot be written.

    Returns:
      A `Dataset` of uint8 images [N, image_size, image_size, 3] and int32 labels [N].

    Raises:
      ValueError: unknown name (with the nearest known ones), or an impossible size or seed.
    """
    check_dataset_name(name)
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size of {name} must be a positive number of pixels, got {image_size}")
    if seed < 0:
        raise ValueError(f"seed of {name} must not be negative, got {seed}")
    return Dataset(name, *DATASETS[name](image_size, seed, cache_dir))


def check_dataset_name(name: str) -> None:
    """Raises a ValueError that lists the nearest names if no dataset is called `name`."""
    if name in DATASETS:
        return
    known = ", ".join(DATASETS)
    prefixes = sorted({known_name.partition(":")[0] for known_name in DATASETS})
    prefix, colon, _ = name.partition(":")
    if colon and prefix not in prefixes:
        hint = f"prefix {prefix!r} is none of {', '.join(prefixes)}"
    else:
        near = difflib.get_close_matches(name, DATASETS, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else "no name is near it"
    raise ValueError(f"unknown dataset {name!r}: {hint}; known datasets: {known}")


# Handwritten digits of 13 writers, 8² pixels with values 0 to 16 (Alpaydin and Kaynak, 1998),
# as scikit-learn ships them. 1,797 images leave 800 + 200 beside a test split of 797.
_DIGITS_TEST, _DIGITS_TRAIN = 797, 800


def _load_digits(image_size: int | None, seed: int, cache_dir: str | PathLike | None) -> Parts:
    """Bright strokes on black, as recorded. The splits are fixed: `seed` moves no image."""
    del seed, cache_dir
    from sklearn.datasets import load_digits  # takes a second to import

    recorded = load_digits()
    grey = np.rint(recorded.images * (255 / 16)).astype(np.uint8)
    images = _resize(np.repeat(grey[..., None], 3, axis=-1), image_size)
    labels = recorded.target.astype(np.int32)

    order = stratified_order(labels, len(labels), np.random.default_rng(1797))
    test, train, validation = np.split(order, [_DIGITS_TEST, _DIGITS_TEST + _DIGITS_TRAIN])
    names = tuple(str(digit) for digit in range(10))
    return names, *(Split(images[part], labels[part]) for part in (train, validation, test))


_GLYPHS_SPLITS = {"train": 8192, "validation": 1024, "test": 2048}


def _load_glyphs(image_size: int | None, seed: int, cache_dir: str | PathLike | None) -> Parts:
    """Letters whose background texture agrees with the letter nine times in ten."""
    image_size = glyphs.DEFAULT_SIZE if image_size is None else image_size

    def draw() -> dict[str, np.ndarray]:
        arrays = {}
        for stream, (split, num_images) in enumerate(_GLYPHS_SPLITS.items()):
            rng = np.random.default_rng([seed, stream])
            images, labels = glyphs.draw_labelled(num_images, image_size=image_size, rng=rng)
            arrays |= {f"{split}_images": images, f"{split}_labels": labels}
        return arrays

    identity = {"size": image_size, "seed": seed, "splits": _GLYPHS_SPLITS, **glyphs.versions()}
    arrays = cached_arrays("glyphs", identity, draw, cache_dir=cache_dir)
    parts = (Split(arrays[f"{split}_images"], arrays[f"{split}_labels"]) for split in _GLYPHS_SPLITS)
    return tuple(glyphs.LETTERS), *parts


def _resize(images: np.ndarray, size: int | None) -> np.ndarray:
    """Resizes uint8 [N, H, W, 3] on the host to [N, size, size, 3]."""
    if size is None or images.shape[1:3] == (size, size):
        return images
    bilinear = Image.Resampling.BILINEAR
    return np.stack([np.asarray(Image.fromarray(im).resize((size, size), bilinear)) for im in images])


DATASETS: dict[str, Callable[..., Parts]] = {
    "builtin:digits": _load_digits,
    "builtin:glyphs": _load_glyphs,
}
