"""Datasets of recorded images: their splits, decoded once and cached."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from os import PathLike
from typing import NamedTuple, SupportsIndex

import numpy as np
import PIL
import psutil
from jaxtyping import Int32, Integer, Shaped, UInt8, UInt64

from advtransfer.data.cache import cached_arrays, content_digest, image_hashes
from advtransfer.data.decode import Encoded, decode_images, open_image
from advtransfer.data.subsets import stratified_order
from advtransfer.data.views import LOW_PASS_SIDE, VIEWS

SPLITS = ("train", "validation", "test")
TEST_SHARE = 0.2  # fraction of the images that are for testing if no test images are recorded
VALIDATION_SHARE, MAX_VALIDATION = 0.1, 5000  # of the training images, if no validation images are recorded
MAX_STRATIFIED = 200_000  # larger datasets are split without their labels, which may take long to read
_TRAIN = re.compile(r":([a-z]\w*(?:\[[^\]]*\])?(?:\+.+)?)\Z")  # of names such as /path:train[:10%]
_CHUNK = 1024  # images whose headers are read at a time
_SKIP = 'skip them: --config.broken_images=skip (load_dataset: broken="skip")'
_DARK = 32  # an eighth of the range: correctly scaled images have brighter pixels


class Records(NamedTuple):
    """The encoded images of one recorded split. `read` gives, for each index, an image as a path or a file
    (`decode.Encoded`, encoded in one of `decode.FORMATS`) with its label."""

    count: int
    labels: Callable[[], Int32[np.ndarray, " count"]]  # read when called
    # Images with their labels, by index. Can be pickled, and called from any thread.
    read: Callable[[Iterable[SupportsIndex]], Sequence[tuple[Encoded, int]]]
    describe: Callable[[int], str]  # name of an image, for messages


class Recording(NamedTuple):
    """A dataset on disk, listed but not decoded; decoded images are cached by `identity`."""

    name: str
    class_names: tuple[str, ...]
    splits: dict[str, Records]  # some of train, validation, test
    identity: dict  # changes when a file changes
    upright: bool  # see `decode_image`
    side: int | None = None  # pixels, if all images are known to be squares of this size
    remarks: tuple[str, ...] = ()  # notes for the user on how it was read
    missing: tuple[str, ...] = ()  # images of `splits` whose files do not exist


class Part(NamedTuple):
    """A decoded split."""

    images: UInt8[np.ndarray, "n h w 3"]
    labels: Int32[np.ndarray, " n"]
    skipped: Shaped[np.ndarray, " skipped"]  # strings: the broken images that were left out
    digest: Shaped[np.ndarray, ""]  # string: SHA-256 of images and labels
    hashes: UInt64[np.ndarray, " n"]  # of each image's pixels
    names: Shaped[np.ndarray, " n"]  # strings: of the images, such as their files


def split_name(name: str) -> tuple[str, str | None]:
    """Splits /path:train[:10%] into /path and train[:10%], the training images; None if not given."""
    found = _TRAIN.search(name)
    return (name[: found.start()], found[1]) if found else (name, None)


def load_parts(
    recording: Recording,
    image_size: int | None,
    cache_dir: str | PathLike | None,
    splits: Sequence[str],
    broken: str,
    view: str,
    *,
    enlarge: bool = True,
    set_aside: bool = True,
) -> dict[str, Part]:
    """Decodes the requested ones of train, validation and test, or reads them from the cache.

    Recorded splits are used as they are. Without test images, the validation images are for testing, or a
    stratified fifth of the training images if there are none. Without validation images, a tenth of the
    training images, at most 5,000, is held out for validation, unless `set_aside` is False. These draws are
    fixed. Without training images there is only a test split.

    Raises:
      ValueError: images of different sizes if `image_size` is None, images that cannot be decoded unless
        `broken` is "skip", or images that take more than half of the free memory.
    """
    size, crop = find_size(recording, image_size, cache_dir, enlarge=enlarge)
    if view == "low_pass" and size < (image_size or size):  # enlarged again on the device
        size, view = min(size, LOW_PASS_SIDE), "natural"
    found, sizes = find_splits(recording, set_aside=set_aside)
    check_memory(recording.name, sum(sizes[split] for split in splits), size)
    parts = functools.cache(lambda: _assign(found, sizes, splits))

    def decode(split: str) -> dict[str, np.ndarray]:
        records, indices = parts()[split]
        images, reasons = decode_images(
            lambda some: [encoded for encoded, _ in records.read(some)],
            indices,
            size,
            crop=crop,
            upright=recording.upright,
        )
        labels = records.labels()[indices]
        names = np.array([records.describe(index) for index in indices], np.str_)
        skipped = [f"{names[place]} ({reasons[place]})" for place in sorted(reasons)]
        if skipped:
            images, labels, names = (np.delete(x, list(reasons), axis=0) for x in (images, labels, names))
        images = VIEWS[view](images)
        digest, skipped = np.array(content_digest(images, labels)), np.array(skipped, dtype=np.str_)
        return Part(images, labels, skipped, digest, image_hashes(images), names)._asdict()

    identity = recording.identity | {
        **{"size": size, "crop": crop, "view": view, "sizes": sizes, "pillow": PIL.__version__},
        "rule": [TEST_SHARE, VALIDATION_SHARE, MAX_VALIDATION, MAX_STRATIFIED],
        "holds": Part._fields,
    }

    def load(split: str) -> Part:
        if not sizes[split] or split not in splits:
            images, hashes = np.empty((0, size, size, 3), np.uint8), np.empty(0, np.uint64)
            none = np.empty(0, np.str_)
            return Part(images, np.empty(0, np.int32), none, np.array(""), hashes, none)
        kind, make = recording.name.partition(":")[0], functools.partial(decode, split)
        part = Part(**cached_arrays(kind, identity | {"split": split}, make, cache_dir=cache_dir))
        if broken == "refuse" and len(part.skipped):
            raise ValueError(
                f"{len(part.skipped):,} of {sizes[split]:,} {split} images of {recording.name} cannot be "
                f"decoded: {_first_five(part.skipped)}. Fix or remove them, or {_SKIP}"
            )
        return part

    return {split: load(split) for split in sizes}


def _first_five(names: Sequence[str] | np.ndarray) -> str:
    return "; ".join(names[:5]) + ("; …" if len(names) > 5 else "")


def check_missing(recording: Recording) -> None:
    """Raises a ValueError if the files of some images do not exist."""
    if missing := recording.missing:
        raise ValueError(
            f"{len(missing):,} images of {recording.name} do not exist: {_first_five(missing)}. Correct "
            f"the paths, or {_SKIP}"
        )


def inspect(parts: Mapping[str, Part], class_names: Sequence[str]) -> list[str]:
    """Notes for the user on decoded images: those left out, classes without test images, duplicates, and
    images that are all dark."""
    remarks = []
    if len(test := parts["test"].labels) and len(untested := np.setdiff1d(np.arange(len(class_names)), test)):
        remarks.append(
            f"{len(untested):,} of {len(class_names):,} classes have no test image: "
            f"{_first_five([class_names[i] for i in untested])}"
        )
    if skipped := [str(image) for part in parts.values() for image in part.skipped]:
        plural = "s" * (len(skipped) != 1)
        remarks.append(
            f"left out {len(skipped):,} image{plural} that cannot be decoded: {_first_five(skipped)}"
        )
    places: dict[str, dict[int, dict[int, int]]] = {}  # split -> hash of pixels -> label -> first image
    for split, part in parts.items():
        known = places.setdefault(split, {})
        for i, (pixels, label) in enumerate(zip(part.hashes.tolist(), part.labels.tolist(), strict=True)):
            known.setdefault(pixels, {}).setdefault(label, i)
        if several := [[*found.values()] for found in known.values() if len(found) > 1]:
            names = " and ".join(part.names[i] for i in several[0])
            remarks.append(
                f"images with more than one label, pixel for pixel, in {split}: {len(several):,}, such as "
                f"{names}"
            )
    for one, other in (("test", "train"), ("validation", "train"), ("test", "validation")):
        if shared := [pixels for pixels in places[one] if pixels in places[other]]:
            odd = sum(places[one][pixels].keys() != places[other][pixels].keys() for pixels in shared)
            names = [parts[x].names[next(iter(places[x][shared[0]].values()))] for x in (one, other)]
            remarks.append(
                f"{one} images that are also {other} images, pixel for pixel: {len(shared):,}"
                + (f", {odd:,} of them with a different label" if odd else "")
                + f", such as {names[0]} and {names[1]}"
            )
    brightest = max((part.images.max() for part in parts.values() if len(part.images)), default=255)
    if brightest < _DARK:
        remarks.append(
            f"no pixel is brighter than {brightest} of 255: do 16-bit files hold values of 10 or 12 bits? "
            "Scale them to the full 16-bit range"
        )
    return remarks


def find_size(
    recording: Recording,
    image_size: int | None,
    cache_dir: str | PathLike | None,
    *,
    enlarge: bool = True,
) -> tuple[int, bool]:
    """The side of the decoded images, and whether they are cropped, as all but squares of one size are.

    Without `enlarge`, squares of one size that are smaller than `image_size` keep their size.

    Raises:
      ValueError: `image_size` is None and the images have no common size.
    """
    # Decided on the whole dataset, so that a split does not depend on which others are requested.
    side = recording.side or _common_side(recording, cache_dir)
    if not side:
        if image_size is None:
            raise ValueError(f"the images of {recording.name} are not squares of one size: set image_size")
        return image_size, True
    return (image_size or side) if enlarge else min(side, image_size or side), False


def find_training(recording: Recording) -> tuple[Records, Integer[np.ndarray, " n"]]:
    """The records that contain the training images of `load_parts`, undecoded, and their indices."""
    return _assign(*find_splits(recording), ["train"])["train"]


def find_splits(recording: Recording, *, set_aside: bool = True) -> tuple[dict[str, Records], dict[str, int]]:
    """The recorded splits by the name they are used under, and `split_sizes`."""
    found = dict(recording.splits)
    if "test" not in found and "validation" in found:
        found["test"] = found.pop("validation")
    return found, split_sizes({split: records.count for split, records in found.items()}, set_aside)


def split_sizes(counts: dict[str, int], set_aside: bool) -> dict[str, int]:
    """Numbers of training, validation and test images, from the numbers recorded in each split."""
    train, test = counts.get("train", 0), counts.get("test")
    if test is None:
        test = round(TEST_SHARE * train)
        train -= test
    validation = counts.get("validation")
    if validation is None:
        validation = min(round(VALIDATION_SHARE * train), MAX_VALIDATION) if set_aside else 0
        train -= validation
    return {"train": train, "validation": validation, "test": test}


def _assign(
    found: dict[str, Records], sizes: dict[str, int], splits: Sequence[str]
) -> dict[str, tuple[Records, np.ndarray]]:
    """Records and indices of each split; draws that no requested split needs are skipped."""
    parts = {split: (records, np.arange(records.count)) for split, records in found.items()}
    for split in ("test", "validation"):
        if split in parts or "train" not in parts or not {split, "train", "validation"} & set(splits):
            continue
        records, indices = parts["train"]
        labels = records.labels()[indices] if len(indices) <= MAX_STRATIFIED else indices
        drawn = fixed_order(labels, sizes[split])
        parts[split] = records, np.sort(indices[drawn])
        parts["train"] = records, np.delete(indices, drawn)
    return parts


def fixed_order(labels: Integer[np.ndarray, " n"], length: int) -> Integer[np.ndarray, " {length}"]:
    """The first `length` places of a fixed random order of images; stratified by `labels` unless there are
    more than `MAX_STRATIFIED`."""
    rng = np.random.default_rng(0)
    if len(labels) > MAX_STRATIFIED:
        return rng.permutation(len(labels))[:length]
    return stratified_order(labels, length, rng)


def check_training(name: str, used: set[str], recorded: Collection[str]) -> None:
    """Raises a ValueError if the training splits, `used`, include the test split."""
    test = "test" if "test" in recorded else "validation"
    if used & {test, "all"}:
        raise ValueError(
            f"{name} would train on its test images ({test}): the last part of the name selects the training "
            "images; to evaluate on fewer images set config.evaluate.num_images"
        )


def _common_side(recording: Recording, cache_dir: str | PathLike | None) -> int:
    """The side of all images if they are squares of one size, else 0; broken images are ignored."""

    def measure() -> dict[str, np.ndarray]:
        sides = set()
        for records in recording.splits.values():
            for start in range(0, records.count, _CHUNK):
                for encoded, _ in records.read(range(start, min(start + _CHUNK, records.count))):
                    try:
                        with open_image(encoded) as image:
                            sides.add(image.size)
                    except Exception:  # reported when it is decoded
                        continue
                    if len(sides) > 1 or image.width != image.height:
                        return {"side": np.array(0)}
        return {"side": np.array(min(sides, default=(0, 0))[0])}

    return int(cached_arrays("side", recording.identity, measure, cache_dir=cache_dir)["side"])


def check_memory(name: str, num_images: int, size: int) -> None:
    """Raises a ValueError if `num_images` of `size`² pixels take more than half of the free memory."""
    needed, free = num_images * size * size * 3, psutil.virtual_memory().available
    if needed > free / 2:
        raise ValueError(
            f"{num_images:,} images of {name} at {size}² pixels take {needed / 1e9:,.1f} GB, more than half "
            f"of the {free / 1e9:,.1f} GB of free memory: lower image_size, select a slice of the dataset "
            "(:train[:10%]), or stream the training images of a source (--config.train.loading=stream)"
        )
