"""Datasets by name, as uint8 arrays on the host.

`DATASETS` names the sets that the package brings along. One that is new to it needs a function
`(image_size, seed, cache_dir) -> (class_names, train, validation, test)` and a line there. `OPENERS`
says what opens the names of recorded sets, such as `tfds:cifar10`; a new kind of them needs a function
`name -> Recording` and a line there.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from PIL import Image

from advtransfer.data import glyphs
from advtransfer.data.cache import cached_arrays, content_digest
from advtransfer.data.folder import open_folder
from advtransfer.data.recorded import Recording, count_training, find_size, inspect, load_parts
from advtransfer.data.stream import StreamedSplit, open_stream
from advtransfer.data.subsets import stratified_order
from advtransfer.data.tfds import open_tfds
from advtransfer.data.views import VIEWS
from advtransfer.labels import check_labels

SPLITS = ("train", "validation", "test")
BROKEN = ("refuse", "skip")
LOADING = ("memory", "stream", "auto")
MAX_IN_MEMORY = 2e9  # bytes of training images that "auto" does not stream: on every machine the same


class Split(NamedTuple):
    """Images and labels on the host."""

    images: np.ndarray  # uint8 [N, H, W, 3]
    labels: np.ndarray  # int32 [N]

    @property
    def num_images(self) -> int:
        return len(self.labels)

    @property
    def nbytes(self) -> int:
        """Bytes of the images that lie in memory."""
        return self.images.nbytes


def check_split(split: Split) -> None:
    """Raises a ValueError, of one line, unless images are uint8 [N, H, W, 3] and labels classes [N]."""
    shape, dtype = np.shape(split.images), getattr(split.images, "dtype", None)
    if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8:
        raise ValueError(f"images are {dtype} {shape}, not uint8 [N, H, W, 3]")
    check_labels(split.labels, len(split.images))


class Dataset(NamedTuple):
    """The three splits of one dataset; no image is in two of them.

    Images may be smaller than a network's (see `load_dataset`): whoever feeds it resizes them.
    """

    name: str
    class_names: tuple[str, ...]
    train: Split | StreamedSplit
    validation: Split  # carved out of the training images; hyper-parameters are chosen on it
    test: Split
    skipped: tuple[str, ...] = ()  # images that could not be decoded, with the reason
    remarks: tuple[str, ...] = ()  # what a reader should know: of folders, what was left out, duplicates
    digests: Mapping[str, str] = MappingProxyType({})  # `content_digest` by split, as far as it is known
    is_placeholder: bool = False  # sizes as published of a set that is not prepared (see `plan_dataset`)

    def in_memory(self, split: str) -> Split:
        """The images and labels of a split.

        Raises:
          ValueError: the split is streamed.
        """
        found = getattr(self, split)
        if isinstance(found, StreamedSplit):
            raise ValueError(f"the {split} images of {self.name} are streamed, but are needed in memory")
        return found

    def digest(self, *splits: str) -> str:
        """SHA-256 of the class names and of all images and labels of the splits, which are in memory."""
        known = [self.digests.get(split) or content_digest(*getattr(self, split)) for split in splits]
        return hashlib.sha256(json.dumps([self.class_names, known]).encode()).hexdigest()


Parts = tuple[tuple[str, ...], Split, Split, Split]


def load_dataset(
    name: str,
    *,
    image_size: int | None = None,
    seed: int = 0,
    cache_dir: str | PathLike | None = None,
    splits: Sequence[str] = SPLITS,
    broken: str = "refuse",
    view: str = "natural",
    loading: str = "memory",
    enlarge: bool = True,
    set_aside: bool = True,
) -> Dataset:
    """Loads a dataset by name.

    Recorded images are decoded once, in parallel, and kept until a file of the set changes. Their labels,
    class names and splits are the set's own as far as it has them (see `load_parts`). If all images
    of a set are squares of one size they are resized as a whole; the images of other sets are cropped
    as in ImageNet's evaluation (see `fit_image`).

    Args:
      name: one of `DATASETS`; `tfds:NAME`, a prepared TensorFlow dataset, which needs no TensorFlow (module
        `tfds` has the whole notation); or `folder:/path`, one subfolder per class (module `folder`).
      image_size: side of the images in pixels; None is the set's own (glyphs 16, digits 8).
        Glyphs are drawn at this size, digits are resized to it (bilinear with antialias).
      seed: which glyphs are drawn. A set of recorded images is the same for every seed.
      cache_dir: where drawn and decoded images are kept; None is `$XDG_CACHE_HOME/advtransfer` or
        `~/.cache/advtransfer`. The sets load without a cache when it cannot be written.
      splits: which of `SPLITS` the caller needs; the others of a recorded set come back empty.
      broken: what becomes of images that cannot be decoded: "refuse" raises, "skip" leaves them out
        and lists them in `Dataset.skipped`.
      view: one of `VIEWS`, such as "low_pass" (module `views`); for all splits.
      loading: "memory", or "stream": the training images stay on disk (module `stream`), or "auto": they do
        when they would take more than 2 GB. Other splits are always in memory.
      enlarge: whether recorded squares of one size that are smaller than `image_size` are enlarged to it.
        Otherwise they keep their size, for the device to enlarge batch by batch (`make_batch`): 60,000 images
        of 32² take 180 MB, at 224² they would take 9 GB. In the view "low_pass" they are kept at 32².
      set_aside: whether a tenth of the training images, at most 5,000, validates where a recorded set has no
        validation images; otherwise all of them train.

    Returns:
      A `Dataset` of uint8 images [N, image_size, image_size, 3] and int32 labels [N].

    Raises:
      ValueError: unknown name (with the nearest known ones), a set that is not prepared or not well
        formed, broken images, or an impossible size or seed.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size of {name} must be a positive number of pixels, got {image_size}")
    if seed < 0:
        raise ValueError(f"seed of {name} must not be negative, got {seed}")
    for value, known in (
        (view, VIEWS),
        (broken, BROKEN),
        (loading, LOADING),
        *((split, SPLITS) for split in splits),
    ):
        if value not in known:
            raise ValueError(f"{value!r} is none of {', '.join(known)}")
    if name in DATASETS:
        if loading == "stream":
            raise ValueError(f"{name} is not streamed: its images are made in memory")
        class_names, *parts = DATASETS[name](image_size, seed, cache_dir)
        parts = [Split(VIEWS[view](part.images), part.labels) for part in parts]
        digests = {
            split: content_digest(*part) for split, part in zip(SPLITS, parts, strict=True) if split in splits
        }
        return Dataset(name, class_names, *parts, digests=digests)
    recording = _opener(name)(name)
    size, _ = find_size(recording, image_size, cache_dir, enlarge=enlarge)
    streamed = "train" in splits and is_streamed(name, count_training(recording), size, view, loading)
    in_memory = [split for split in splits if split != "train" or not streamed]
    parts = load_parts(
        recording, image_size, cache_dir, in_memory, broken, view, enlarge=enlarge, set_aside=set_aside
    )
    skipped = tuple(str(image) for part in parts.values() for image in part.skipped)
    ours = {split: Split(parts[split].images, parts[split].labels) for split in SPLITS}
    if streamed:
        ours["train"] = open_stream(recording, *find_size(recording, image_size, cache_dir), broken)
    digests = {split: str(part.digest) for split, part in parts.items()}
    remarks = (*recording.remarks, *inspect(parts))
    for remark in remarks:
        logging.warning("%s: %s", name, remark)
    return Dataset(name, recording.class_names, **ours, skipped=skipped, remarks=remarks, digests=digests)


def is_streamed(name: str, num_images: int, size: int, view: str, loading: str) -> bool:
    """Whether so many training images of `size`² pixels stay on disk (see `load_dataset`)."""
    if loading == "memory" or (loading == "auto" and view != "natural"):
        return False
    if view != "natural":
        raise ValueError(f"{name} cannot be streamed in the view {view}, only loaded into memory")
    return loading == "stream" or num_images * size * size * 3 > MAX_IN_MEMORY


def check_dataset_name(name: str) -> None:
    """Raises the ValueError of a dataset that is not there, without reading its images."""
    if name not in DATASETS:
        _opener(name)(name)


def _opener(name: str) -> Callable[[str], Recording]:
    prefix, colon, _ = name.partition(":")
    if colon and prefix in OPENERS:
        return OPENERS[prefix]
    if colon and prefix != "builtin":
        hint = f"prefix {prefix!r} is none of builtin, {', '.join(OPENERS)}"
    else:
        near = difflib.get_close_matches(name, DATASETS, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else "no name is near it"
    known = ", ".join([*DATASETS, "tfds:NAME", "folder:/path"])
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


def _load_glyphs(image_size: int | None, seed: int, cache_dir: str | PathLike | None) -> Parts:
    """Letters whose background texture agrees with the letter nine times in ten."""
    sizes = {"train": 8192, "validation": 1024, "test": 2048}
    arrays = _draw("glyphs", glyphs.draw_labelled, sizes, image_size, seed, cache_dir)
    return tuple(glyphs.LETTERS), *arrays


def _load_lowercase(image_size: int | None, seed: int, cache_dir: str | PathLike | None) -> Parts:
    """Lower-case letters on textures that say nothing of them."""
    sizes = {"train": 1600, "validation": 400, "test": 1200}
    arrays = _draw("lowercase", glyphs.draw_lowercase, sizes, image_size, seed, cache_dir)
    return tuple(glyphs.LOWERCASE), *arrays


def _draw(
    name: str,
    draw_labelled: Callable[..., tuple[np.ndarray, np.ndarray]],
    sizes: Mapping[str, int],
    image_size: int | None,
    seed: int,
    cache_dir: str | PathLike | None,
) -> list[Split]:
    """The splits of a drawn set, from the cache if they are there."""
    image_size = glyphs.DEFAULT_SIZE if image_size is None else image_size

    def draw() -> dict[str, np.ndarray]:
        arrays = {}
        for stream, (split, num_images) in enumerate(sizes.items()):
            rng = np.random.default_rng([seed, stream])
            images, labels = draw_labelled(num_images, image_size=image_size, rng=rng)
            arrays |= {f"{split}_images": images, f"{split}_labels": labels}
        return arrays

    identity = {"size": image_size, "seed": seed, "splits": sizes, **glyphs.versions()}
    arrays = cached_arrays(name, identity, draw, cache_dir=cache_dir)
    return [Split(arrays[f"{split}_images"], arrays[f"{split}_labels"]) for split in sizes]


def _resize(images: np.ndarray, size: int | None) -> np.ndarray:
    """Resizes uint8 [N, H, W, 3] on the host to [N, size, size, 3]."""
    if size is None or images.shape[1:3] == (size, size):
        return images
    bilinear = Image.Resampling.BILINEAR
    return np.stack([np.asarray(Image.fromarray(im).resize((size, size), bilinear)) for im in images])


DATASETS: dict[str, Callable[..., Parts]] = {
    "builtin:digits": _load_digits,
    "builtin:glyphs": _load_glyphs,
    "builtin:lowercase": _load_lowercase,
}

OPENERS: dict[str, Callable[[str], Recording]] = {"tfds": open_tfds, "folder": open_folder}
