"""Named datasets: splits that never overlap, fixed by their seed, a cache that cannot hurt."""

from __future__ import annotations

import os
import re

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from advtransfer.data import DATASETS, LETTERS, glyphs, load_dataset
from advtransfer.data.cache import cached_arrays


@pytest.fixture(scope="module")
def digits():
    return load_dataset("builtin:digits")


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def drawn(cache_dir):
    return load_dataset("builtin:glyphs", cache_dir=cache_dir)


def assert_equal_datasets(one, other):
    for name in ("train", "validation", "test"):
        for left, right in zip(getattr(one, name), getattr(other, name), strict=True):
            np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("name", DATASETS)
def test_contract_of_every_dataset(name, cache_dir):
    dataset = load_dataset(name, image_size=16, cache_dir=cache_dir)
    assert dataset.name == name
    for split in (dataset.train, dataset.validation, dataset.test):
        assert split.images.dtype == np.uint8 and split.labels.dtype == np.int32
        assert split.images.shape == (len(split.labels), 16, 16, 3)
        assert set(split.labels) == set(range(len(dataset.class_names)))


def test_digits_are_the_recorded_ones_each_in_one_split(digits):
    recorded = load_digits()
    splits = (digits.train, digits.validation, digits.test)
    assert [len(split.labels) for split in splits] == [800, 200, 797]

    def bag(images, labels):
        return sorted(zip(map(bytes, images), labels.tolist(), strict=True))

    pixels = np.concatenate([split.images for split in splits])
    np.testing.assert_array_equal(pixels, np.repeat(pixels[..., :1], 3, axis=-1))
    labels = np.concatenate([split.labels for split in splits])
    scaled = np.round(recorded.images / 16 * 255).astype(np.uint8)
    assert bag(pixels[..., 0], labels) == bag(scaled, recorded.target)


def test_digits_splits_are_stratified_and_fixed(digits):
    share = np.bincount(load_digits().target) / 1797
    for split in (digits.train, digits.validation, digits.test):
        counts = np.bincount(split.labels)
        assert np.abs(counts - share * len(split.labels)).max() <= 2
    assert_equal_datasets(digits, load_dataset("builtin:digits", seed=7))


def test_digits_are_resized_as_by_pillow(digits):
    larger = load_dataset("builtin:digits", image_size=16)
    np.testing.assert_array_equal(larger.test.labels, digits.test.labels)
    for small, large in zip(digits.test.images[:20], larger.test.images[:20], strict=True):
        expected = Image.fromarray(small[..., 0]).resize((16, 16), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(large[..., 2], np.asarray(expected))
    assert load_dataset("builtin:digits", image_size=1).test.images.shape == (797, 1, 1, 3)


def test_glyphs_splits(drawn):
    assert drawn.test.images.shape[1:] == (16, 16, 3)  # their own size
    assert drawn.class_names == tuple(LETTERS) and len(LETTERS) == 23
    for split, num_images in zip(drawn[2:5], (8192, 1024, 2048), strict=True):
        counts = np.bincount(split.labels)
        assert counts.sum() == num_images and np.ptp(counts) <= 1
    distinct = {image.tobytes() for split in drawn[2:5] for image in split.images}
    assert len(distinct) == 8192 + 1024 + 2048


def test_glyphs_come_from_the_cache_and_only_for_the_same_request(drawn, cache_dir, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("drew images that the cache holds")

    monkeypatch.setattr(glyphs, "draw_labelled", refuse)
    assert_equal_datasets(drawn, load_dataset("builtin:glyphs", cache_dir=cache_dir))
    for other in ({"seed": 1}, {"image_size": 24}):
        with pytest.raises(AssertionError, match="drew images"):
            load_dataset("builtin:glyphs", cache_dir=cache_dir, **other)


def test_glyphs_differ_by_seed(drawn, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    other = load_dataset("builtin:glyphs", seed=1)
    assert list((tmp_path / "advtransfer").iterdir())
    assert not np.array_equal(other.train.images, drawn.train.images)
    ours = {image.tobytes() for image in drawn.test.images}
    assert ours.isdisjoint(image.tobytes() for image in other.train.images)


class Counter:
    """Makes an array and counts how often it had to."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return {"values": np.arange(1000)}


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied", "another"])
def test_damaged_cache_file_is_made_again(tmp_path, damage):
    make = Counter()
    cached_arrays("kind", {"seed": 0}, make, cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle] ^= 0xFF if damage == "flipped" else 0
    damaged = {"truncated": data[:middle], "flipped": data, "emptied": b"", "another": b"hello"}
    path.write_bytes(bytes(damaged[damage]))
    for _ in range(2):
        arrays = cached_arrays("kind", {"seed": 0}, make, cache_dir=tmp_path)
        np.testing.assert_array_equal(arrays["values"], np.arange(1000))
    assert make.calls == 2
    assert list(tmp_path.iterdir()) == [path]


def test_cache_that_cannot_be_written_is_done_without(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    arrays = cached_arrays("kind", {"seed": 0}, Counter(), cache_dir=blocked / "folder")
    np.testing.assert_array_equal(arrays["values"], np.arange(1000))


def test_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    cached_arrays("kind", {"seed": 0}, Counter(), cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_path_without_a_kind(tmp_path):
    (tmp_path / "labels.csv").touch()
    for path, kind in ((tmp_path, "folder"), (tmp_path / "labels.csv", "table")):
        with pytest.raises(ValueError, match=f"did you mean {kind}:{path}\\?"):
            load_dataset(str(path))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("builtin:digit", {}, "did you mean builtin:digits"),
        ("glyphs", {}, "did you mean builtin:glyphs"),
        ("nowhere:cifar10", {}, "prefix 'nowhere' is not one of builtin, tfds, folder, table"),
        ("xyz", {}, "known datasets: builtin:digits, builtin:glyphs, builtin:lowercase, tfds:NAME"),
        ("builtin:digits", {"image_size": 0}, "image_size of builtin:digits must be"),
        ("builtin:glyphs", {"image_size": 8}, "got image_size 8"),
        ("builtin:digits", {"view": "gray"}, "'gray' is not one of natural, low_pass, grey"),
        ("builtin:digits", {"broken": "drop"}, "'drop' is not one of refuse, skip"),
        ("builtin:digits", {"splits": ["tests"]}, "'tests' is not one of train, validation, test"),
        ("builtin:glyphs", {"seed": -1}, "must not be negative, got -1"),
    ],
)
def test_bad_requests_get_one_clear_line(tmp_path, name, options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_dataset(name, cache_dir=tmp_path, **options)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
