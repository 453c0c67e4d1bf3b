"""Datasets by name, as uint8 arrays on the host.

`DATASETS` lists the built-in datasets. To add one, write a function
`(image_size, seed, cache_dir) -> (class_names, train, validation, test)` and register it there. `OPENERS`
maps the prefix of a recorded dataset's name (`tfds:cifar10`) to the function that opens it; to add a kind,
write a function `name -> Recording` and register it there.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image

from advtransfer.data import glyphs
from advtransfer.data.cache import cached_arrays, content_digest
from advtransfer.data.decode import fit_image
from advtransfer.data.folder import open_folder
from advtransfer.data.recorded import (
    SPLITS,
    Recording,
    check_missing,
    find_size,
    find_splits,
    find_training,
    inspect,
    load_parts,
)
from advtransfer.data.stream import StreamedSplit
from advtransfer.data.subsets import stratified_order
from advtransfer.data.table import open_table
from advtransfer.data.tfds import open_tfds
from advtransfer.data.views import VIEWS
from advtransfer.labels import check_labels

BROKEN = ("refuse", "skip")
LOADING = ("memory", "stream", "auto")
MAX_IN_MEMORY = 2e9  # bytes of training images above which "auto" streams, whatever the machine


class Split(NamedTuple):
    """Images and labels on the host."""

    images: UInt8[np.ndarray, "n h w 3"]
    labels: Int32[np.ndarray, " n"]

    @property
    def num_images(self) -> int:
        return len(self.labels)

    @property
    def nbytes(self) -> int:
        """Bytes of the images in memory."""
        return self.images.nbytes


def check_split(split: Split) -> None:
    """Raises a one-line ValueError unless images are uint8 [N, H, W, 3] and labels class indices [N]."""
    shape, dtype = np.shape(split.images), getattr(split.images, "dtype", None)
    if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8:
        raise ValueError(f"images are {dtype} {shape}, not uint8 [N, H, W, 3]")
    check_labels(split.labels, len(split.images))


class Dataset(NamedTuple):
    """The three splits of a dataset; they share no image. Images may be smaller than the network's."""

    name: str
    class_names: tuple[str, ...]
    train: Split | StreamedSplit
    validation: Split  # recorded, or held out from the training images; for choosing hyper-parameters
    test: Split
    skipped: tuple[str, ...] = ()  # images that could not be decoded, with the reason
    remarks: tuple[str, ...] = ()  # notes for the user: files left out, duplicates, ...
    digests: Mapping[str, str] = MappingProxyType({})  # SHA-256 of images and labels, as far as known
    names: Mapping[str, np.ndarray] = MappingProxyType({})  # of recorded images in memory, by split
    is_placeholder: bool = False  # stands in, in a plan, for a dataset that is not prepared
    crop: bool = False  # whether images were scaled and cropped as in ImageNet evaluation

    def in_memory(self, split: str) -> Split:
        """The images and labels of a split; a ValueError if they are streamed."""
        found = getattr(self, split)
        if isinstance(found, StreamedSplit):
            raise ValueError(f"the {split} images of {self.name} are streamed, but are needed in memory")
        return found

    def digest(self, *splits: str) -> str:
        """SHA-256 of the class names and of the images and labels of the given splits."""
        known = [self.digests.get(split) or content_digest(*self.in_memory(split)) for split in splits]
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

    Recorded images are decoded once, in parallel, and cached until a file of the dataset changes. Splits are
    the recorded ones as far as there are any; docs/datasets.md says how the others are drawn. If all images
    of a dataset are squares of one size, they are resized; otherwise the shorter side is scaled to 8/7 of
    `image_size`, and the centre is cropped, as in ImageNet evaluation.

    Args:
      name: `builtin:glyphs`, `builtin:lowercase` or `builtin:digits`; `tfds:NAME`, a prepared TensorFlow
        dataset; `folder:/path`, with one subfolder per class; or `table:/path/labels.csv`, a table of images
        and their classes.
      image_size: side of the images in pixels; None is the dataset's own (glyphs 16, digits 8). Glyphs are
        drawn at this size.
      seed: of the drawn glyphs.
      cache_dir: of drawn and decoded images; None: ~/.cache/advtransfer.
      splits: those that the caller needs; the others of a recorded dataset are empty.
      broken: how to treat images that cannot be decoded: "refuse" raises, "skip" leaves them out and lists
        them in `Dataset.skipped`.
      view: a name in `VIEWS`, whose transformation is applied to all splits.
      loading: "memory"; "stream": the training images stay on disk; or "auto": streamed
        if they would take more than 2 GB. Other splits are always in memory.
      enlarge: whether recorded squares of one size that are smaller than `image_size` are enlarged to it.
        If not, they keep their size and are enlarged on the device batch by batch: 60,000
        images of 32² take 180 MB, at 224² they would take 9 GB. In the view "low_pass" they are kept at 32².
      set_aside: whether a tenth of the training images, at most 5,000, is held out for validation if a
        recorded dataset has no validation images.

    Returns:
      A `Dataset` of uint8 images [N, image_size, image_size, 3] and int32 labels [N].

    Raises:
      ValueError: unknown name (suggesting similar ones), a dataset that is not prepared or malformed, broken
        images, or an invalid size or seed.
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
            raise ValueError(f"{value!r} is not one of {', '.join(known)}")
    if name in DATASETS:
        if loading == "stream":
            raise ValueError(f"{name} is not streamed: its images are generated in memory")
        class_names, *drawn = DATASETS[name](image_size, seed, cache_dir)
        train, validation, test = (Split(VIEWS[view](part.images), part.labels) for part in drawn)
        dataset = Dataset(name, class_names, train, validation, test)
        return dataset._replace(digests={split: content_digest(*getattr(dataset, split)) for split in splits})
    recording = _opener(name)(name)
    if broken == "refuse":
        check_missing(recording)
    size, crop = find_size(recording, image_size, cache_dir, enlarge=enlarge)
    num_train = find_splits(recording)[1]["train"]
    streamed = "train" in splits and is_streamed(name, num_train, size, view, loading)
    in_memory = [split for split in splits if split != "train" or not streamed]
    parts = load_parts(
        recording, image_size, cache_dir, in_memory, broken, view, enlarge=enlarge, set_aside=set_aside
    )
    train, validation, test = (Split(parts[split].images, parts[split].labels) for split in SPLITS)
    if streamed:
        records, indices = find_training(recording)
        place = find_size(recording, image_size, cache_dir)
        train = StreamedSplit(records.read, records.describe, indices, *place, recording.upright, broken)
    remarks = (*recording.remarks, *inspect(parts, recording.class_names))
    for remark in remarks:
        logging.warning("%s: %s", name, remark)
    return Dataset(
        name,
        recording.class_names,
        train,
        validation,
        test,
        skipped=tuple(str(image) for part in parts.values() for image in part.skipped),
        remarks=remarks,
        digests={split: str(part.digest) for split, part in parts.items()},
        names={split: part.names for split, part in parts.items()},
        crop=crop,
    )


def is_streamed(name: str, num_images: int, size: int, view: str, loading: str) -> bool:
    """Whether `num_images` training images of `size`² pixels are streamed (see `load_dataset`)."""
    if loading == "memory" or (loading == "auto" and view != "natural"):
        return False
    if view != "natural":
        raise ValueError(f"{name} cannot be streamed in the view {view}, only loaded into memory")
    return loading == "stream" or num_images * size * size * 3 > MAX_IN_MEMORY


def check_dataset_name(name: str) -> None:
    """Raises the ValueError of `load_dataset` for an unknown or missing dataset, without reading images."""
    if name not in DATASETS:
        _opener(name)(name)


def _opener(name: str) -> Callable[[str], Recording]:
    prefix, colon, _ = name.partition(":")
    if colon and prefix in OPENERS:
        return OPENERS[prefix]
    if (path := Path(name).expanduser()).exists():
        kind = "folder" if path.is_dir() else "table"
        hint = f"did you mean {kind}:{name}?"
    elif colon and prefix != "builtin":
        hint = f"prefix {prefix!r} is not one of builtin, {', '.join(OPENERS)}"
    else:
        near = difflib.get_close_matches(name, DATASETS, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else "no similar name"
    known = ", ".join([*DATASETS, "tfds:NAME", "folder:/path", "table:/path/labels.csv"])
    raise ValueError(f"unknown dataset {name!r}: {hint}; known datasets: {known}")


# Handwritten digits of 13 writers, 8² pixels with values 0 to 16 (Alpaydin and Kaynak, 1998), as shipped with
# scikit-learn. Of the 1,797 images 797 are for testing, 800 for training and 200 for validation.
_DIGITS_TEST, _DIGITS_TRAIN = 797, 800


def _load_digits(image_size: int | None, seed: int, cache_dir: str | PathLike | None) -> Parts:
    """Bright strokes on black, as recorded. The splits do not depend on `seed`."""
    del seed, cache_dir
    from sklearn.datasets import load_digits  # takes a second to import

    recorded = load_digits()
    images = np.repeat(np.rint(recorded.images * (255 / 16)).astype(np.uint8)[..., None], 3, axis=-1)
    if image_size is not None:
        fitted = [fit_image(Image.fromarray(image), image_size, crop=False) for image in images]
        images = np.stack([np.asarray(image) for image in fitted])
    labels = recorded.target.astype(np.int32)

    order = stratified_order(labels, len(labels), np.random.default_rng(1797))
    test, train, validation = (
        Split(images[chosen], labels[chosen])
        for chosen in np.split(order, [_DIGITS_TEST, _DIGITS_TEST + _DIGITS_TRAIN])
    )
    return tuple(map(str, range(10))), train, validation, test


def _load_glyphs(*options: Any) -> Parts:
    """Letters whose background texture matches the letter nine times in ten."""
    return _draw("glyphs", glyphs.draw_labelled, glyphs.LETTERS, (8192, 1024, 2048), *options)


def _load_lowercase(*options: Any) -> Parts:
    """Lower-case letters on textures that are independent of them."""
    return _draw("lowercase", glyphs.draw_lowercase, glyphs.LOWERCASE, (1600, 400, 1200), *options)


def _draw(
    name: str,
    draw_labelled: Callable[..., tuple[np.ndarray, np.ndarray]],
    class_names: str,
    num_images: Sequence[int],
    image_size: int | None,
    seed: int,
    cache_dir: str | PathLike | None,
) -> Parts:
    """A drawn dataset, from the cache if possible; `num_images` of each of `SPLITS`."""
    image_size = glyphs.DEFAULT_SIZE if image_size is None else image_size
    sizes = dict(zip(SPLITS, num_images, strict=True))

    def draw() -> dict[str, np.ndarray]:
        arrays = {}
        for stream, (split, number) in enumerate(sizes.items()):
            rng = np.random.default_rng([seed, stream])
            images, labels = draw_labelled(number, image_size=image_size, rng=rng)
            arrays |= {f"{split}_images": images, f"{split}_labels": labels}
        return arrays

    identity = {"size": image_size, "seed": seed, "splits": sizes, **glyphs.versions()}
    arrays = cached_arrays(name, identity, draw, cache_dir=cache_dir)
    train, validation, test = (
        Split(arrays[f"{split}_images"], arrays[f"{split}_labels"]) for split in SPLITS
    )
    return tuple(class_names), train, validation, test


DATASETS: dict[str, Callable[..., Parts]] = {
    "builtin:digits": _load_digits,
    "builtin:glyphs": _load_glyphs,
    "builtin:lowercase": _load_lowercase,
}

OPENERS: dict[str, Callable[[str], Recording]] = {
    "tfds": open_tfds,
    "folder": open_folder,
    "table": open_table,
}
