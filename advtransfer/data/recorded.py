"""Sets of recorded images: which of them train, validate and test, decoded once and kept."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from os import PathLike
from typing import NamedTuple

import numpy as np
import PIL
import psutil

from advtransfer.data.cache import cached_arrays, content_digest
from advtransfer.data.decode import Encoded, decode_images, open_image
from advtransfer.data.subsets import stratified_order
from advtransfer.data.views import LOW_PASS_SIDE, VIEWS

TEST_SHARE = 0.2  # of the images of a set that records no test images
VALIDATION_SHARE, MAX_VALIDATION = 0.1, 5000  # of the training images, where no validation is recorded
MAX_STRATIFIED = 200_000  # a larger set is split without its labels, which may take reading all of it
PLACE_AND_TRAIN = r"(.*?)(?::([a-z]\w*(?:\[[^\]]*\])?(?:\+.+)?))?"  # of names such as /path:train[:10%]
_CHUNK = 1024  # images whose headers are read at a time
_DARK = (
    32  # an eighth of the range: a set of 8-bit photographs without a pixel above it is none that is meant
)


class Records(NamedTuple):
    """The encoded images of one recorded split."""

    count: int
    labels: Callable[[], np.ndarray]  # int32 [count]; read when called
    # Images with their labels; from any thread, and from any process, so it can be pickled.
    read: Callable[[Sequence[int]], Sequence[tuple[Encoded, int]]]
    describe: Callable[[int], str]  # what to call an image in a message


class Recording(NamedTuple):
    """A set as it lies on disk."""

    name: str
    class_names: tuple[str, ...]
    splits: dict[str, Records]  # some of train, validation, test
    identity: dict  # another whenever a file is another
    upright: bool  # see `decode_image`
    side: int | None = None  # pixels, where all images are known to be squares of this side
    remarks: tuple[str, ...] = ()  # what a reader should know of how it was read


class Part(NamedTuple):
    """One of our splits, decoded."""

    images: np.ndarray  # uint8 [N, H, W, 3]
    labels: np.ndarray  # int32 [N]
    skipped: np.ndarray  # strings: the broken images that are left out
    digest: np.ndarray  # string: SHA-256 of images and labels
    hashes: np.ndarray  # uint64 [N], of each image's pixels


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
    """Decodes the asked ones of train, validation and test, or takes them from the cache.

    Recorded splits are kept. A set without test images is tested on its validation images, or on a
    stratified fifth of its training images if it has none; a tenth of the training images, at most
    5,000, validates where nothing else does, unless `set_aside` is False. The draw is fixed. Without
    training images there is nothing but test.

    Raises:
      ValueError: no common size where `image_size` is None, images that cannot be decoded unless
        `broken` is "skip", or more images than half of the free memory holds.
    """
    size, crop = find_size(recording, image_size, cache_dir, enlarge=enlarge)
    if view == "low_pass" and size < (image_size or size):  # enlarging them again is left to the device
        size, view = min(size, LOW_PASS_SIDE), "natural"
    found, sizes = _found(recording, set_aside)
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
        skipped = [f"{records.describe(indices[place])} ({reasons[place]})" for place in sorted(reasons)]
        if skipped:
            images, labels = (np.delete(array, list(reasons), axis=0) for array in (images, labels))
        images = VIEWS[view](images)
        digest, skipped = np.array(content_digest(images, labels)), np.array(skipped, dtype=np.str_)
        return Part(images, labels, skipped, digest, _hashes(images))._asdict()

    kind = recording.name.partition(":")[0]
    identity = recording.identity | {"size": size, "pillow": PIL.__version__, "sizes": sizes}
    identity |= {
        "rule": [TEST_SHARE, VALIDATION_SHARE, MAX_VALIDATION, MAX_STRATIFIED],
        "crop": crop,
        "view": view,
        "holds": Part._fields,
    }

    def load(split: str) -> Part:
        if not sizes[split] or split not in splits:
            images, hashes = np.empty((0, size, size, 3), np.uint8), np.empty(0, np.uint64)
            return Part(images, np.empty(0, np.int32), np.empty(0, np.str_), np.array(""), hashes)
        make = functools.partial(decode, split)
        part = Part(**cached_arrays(kind, identity | {"split": split}, make, cache_dir=cache_dir))
        if broken == "refuse" and len(part.skipped):
            raise ValueError(_complain(recording.name, part.skipped, sizes[split]))
        return part

    return {split: load(split) for split in sizes}


def _hashes(images: np.ndarray) -> np.ndarray:
    digests = (hashlib.blake2b(np.ascontiguousarray(image), digest_size=8).digest() for image in images)
    return np.array([int.from_bytes(digest, "little") for digest in digests], np.uint64)


def inspect(parts: Mapping[str, Part]) -> list[str]:
    """What a reader should know of decoded images: those left out, those that come twice, and dark ones."""
    remarks = []
    if skipped := [str(image) for part in parts.values() for image in part.skipped]:
        listed = "; ".join(skipped[:5]) + ("; …" if len(skipped) > 5 else "")
        remarks.append(f"left out {len(skipped):,} images that cannot be decoded: {listed}")
    labels: dict[str, dict[int, set[int]]] = {}  # of each image by the hash of its pixels, of each split
    for split, part in parts.items():
        known = labels.setdefault(split, {})
        for pixels, label in zip(part.hashes.tolist(), part.labels.tolist(), strict=True):
            known.setdefault(pixels, set()).add(label)
        several = sum(len(found) > 1 for found in known.values())
        if several:
            remarks.append(f"{several:,} images are among the {split} images with several labels each")
    for one, other in (("test", "train"), ("validation", "train"), ("test", "validation")):
        shared = labels[one].keys() & labels[other].keys()
        if shared:
            odd = sum(labels[one][pixels] != labels[other][pixels] for pixels in shared)
            remarks.append(
                f"{len(shared):,} of the {one} images are among the {other} images too, pixel by pixel"
                + (f", {odd:,} of them with another label" if odd else "")
            )
    brightest = max((part.images.max() for part in parts.values() if len(part.images)), default=255)
    if brightest < _DARK:
        remarks.append(
            f"no pixel is brighter than {brightest} of 255: do 16-bit files hold values of 10 or 12 bits? "
            "Scale them to the whole range of 16 bits"
        )
    return remarks


def find_size(
    recording: Recording,
    image_size: int | None,
    cache_dir: str | PathLike | None,
    *,
    enlarge: bool = True,
) -> tuple[int, bool]:
    """The side that images get, and whether they are cropped to it: unless they are squares of one size.

    Without `enlarge` such squares keep their side where it is the smaller one.

    Raises:
      ValueError: `image_size` is None and there is no common one.
    """
    # On the whole set, so that a split does not depend on which others are asked for.
    side = recording.side or _common_side(recording, cache_dir)
    if image_size is None and not side:
        raise ValueError(f"the images of {recording.name} are no squares of one size: give image_size")
    if not side:
        return image_size, True
    return (image_size or side) if enlarge else min(side, image_size or side), False


def find_training(recording: Recording) -> tuple[Records, np.ndarray]:
    """The records that `load_parts` trains on, undecoded, and which of them."""
    return _assign(*_found(recording, True), ["train"])["train"]


def count_training(recording: Recording) -> int:
    """How many images `load_parts` trains on."""
    return _found(recording, True)[1]["train"]


def _found(recording: Recording, set_aside: bool) -> tuple[dict[str, Records], dict[str, int]]:
    """The recorded splits under our names, and how many images each of ours has."""
    found = dict(recording.splits)
    if "test" not in found and "validation" in found:
        found["test"] = found.pop("validation")
    return found, split_sizes({split: records.count for split, records in found.items()}, set_aside)


def split_sizes(counts: dict[str, int], set_aside: bool) -> dict[str, int]:
    """How many images train, validate and test, from how many are recorded in each split."""
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
    """Records and indices of each split; what no asked split needs is not drawn."""
    parts = {split: (records, np.arange(records.count)) for split, records in found.items()}
    for split in ("test", "validation"):
        if split in parts or "train" not in parts or not {split, "train", "validation"} & set(splits):
            continue
        records, indices = parts["train"]
        small = len(indices) <= MAX_STRATIFIED  # of others the labels may take reading all of the set
        drawn = fixed_order(records.labels()[indices] if small else indices, sizes[split])
        parts[split] = records, np.sort(indices[drawn])
        parts["train"] = records, np.delete(indices, drawn)
    return parts


def fixed_order(labels: Sequence[int], length: int) -> np.ndarray:
    """The first places of an order of images that is always the same; stratified, unless there are so many
    that it would take too long, and `labels` does not matter."""
    rng = np.random.default_rng(0)
    if len(labels) > MAX_STRATIFIED:
        return rng.permutation(len(labels))[:length]
    return stratified_order(np.asarray(labels), length, rng)


def check_training(name: str, used: set[str], recorded: Collection[str]) -> None:
    """Raises a ValueError if the splits that `name` trains on are those that the set is tested on."""
    test = "test" if "test" in recorded else "validation"
    if used & {test, "all"}:
        raise ValueError(
            f"{name} would train on its test images, which are {test}: the last part of a name says what is "
            "trained on; to measure on fewer images set config.evaluate.num_images"
        )


def _common_side(recording: Recording, cache_dir: str | PathLike | None) -> int:
    """The side of all images if they are squares of one size, else 0; broken ones do not count."""

    def measure() -> dict[str, np.ndarray]:
        sides = set()
        for records in recording.splits.values():
            for start in range(0, records.count, _CHUNK):
                for encoded, _ in records.read(range(start, min(start + _CHUNK, records.count))):
                    try:
                        with open_image(encoded) as image:
                            sides.add(image.size)
                    except Exception:  # decoding names it and says why
                        continue
                    if len(sides) > 1 or image.width != image.height:
                        return {"side": np.array(0)}
        return {"side": np.array(min(sides, default=(0, 0))[0])}

    return int(cached_arrays("side", recording.identity, measure, cache_dir=cache_dir)["side"])


def check_memory(name: str, num_images: int, size: int) -> None:
    """Raises a ValueError if so many images of `size`² pixels take more than half of the free memory."""
    needed, free = num_images * size * size * 3, psutil.virtual_memory().available
    if needed > free / 2:
        raise ValueError(
            f"{num_images:,} images of {name} at {size}² pixels take {needed / 1e9:,.1f} GB, more than half "
            f"of the {free / 1e9:,.1f} GB of free memory: lower image_size, name a slice of the set "
            "(:train[:10%]), or stream what a source is trained on (--config.train.loading=stream)"
        )


def _complain(name: str, skipped: np.ndarray, num_images: int) -> str:
    listed = "; ".join(skipped[:5]) + ("; …" if len(skipped) > 5 else "")
    return (
        f"{len(skipped):,} of {num_images:,} images of {name} cannot be decoded: {listed}. Mend or remove "
        'them, or leave them out: --config.broken_images=skip (load_dataset: broken="skip")'
    )
