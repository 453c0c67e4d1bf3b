"""Image folders: layouts and splits, every kind of picture, broken ones, a cache that follows the files."""

from __future__ import annotations

import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from advtransfer.data import datasets, load_dataset, recorded
from advtransfer.data.decode import decode_image, fit_image
from advtransfer.data.views import VIEWS


def color_of(serial: int) -> tuple[int, int, int]:
    return serial % 256, serial // 256, 77


def write_images(root, counts, *, first=0, size=(6, 6)):
    """Images of one colour each, which is their serial number; returns {class folder: serials}."""
    serials = {}
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        serials[folder] = list(range(first, first + count))
        for serial in serials[folder]:
            Image.new("RGB", size, color_of(serial)).save(root / folder / f"{serial:04}.png")
        first += count
    return serials


def serials_of(split):
    assert (split.images == split.images[:, :1, :1]).all()
    pixels = split.images[:, 0, 0].astype(int)
    assert (pixels[:, 2] == 77).all()
    return (pixels[:, 0] + 256 * pixels[:, 1]).tolist()


def load(root, **options):
    return load_dataset(f"folder:{root}", cache_dir=root.parent / "cache", **options)


def test_recorded_splits_are_kept(tmp_path):
    root = tmp_path / "set"
    counts = {"train/b": 5, "train/a": 3, "train/a/deeper": 2, "val/a": 2, "val/b": 1, "test/b": 4}
    written = write_images(root, counts)
    (root / "train/a/notes.txt").write_text("no picture")
    (root / "train/b/.hidden.png").write_bytes(b"no picture either")
    (root / "train/.cache").mkdir()
    dataset = load(root)
    assert dataset.class_names == ("a", "b") and dataset.skipped == ()
    for split, folder in (("train", "train"), ("validation", "val"), ("test", "test")):
        found = getattr(dataset, split)
        expected = [
            (serial, "ab".index(path.split("/")[1]))
            for path, serials in written.items()
            if path.startswith(folder)
            for serial in serials
        ]
        assert sorted(zip(serials_of(found), found.labels.tolist(), strict=True)) == sorted(expected)
        assert found.images.dtype == np.uint8 and found.labels.dtype == np.int32
        assert found.images.shape == (len(expected), 6, 6, 3)


@pytest.mark.parametrize(
    ("folders", "sizes"),
    [
        ([""], (144, 16, 40)),  # one tree: a fifth tests, a tenth of the rest validates
        (["train/"], (144, 16, 40)),
        (["train/", "test/"], (180, 20, 200)),
        (["train/", "val/"], (180, 20, 200)),  # what validates becomes the test
        (["train/", "validation/", "test/"], (200, 200, 200)),
        (["test/"], (0, 0, 200)),
        (["val/"], (0, 0, 200)),
    ],
)
def test_every_image_is_in_one_split_and_classes_keep_their_share(tmp_path, folders, sizes):
    counts = {f"{folder}{name}": count for folder in folders for name, count in (("x", 120), ("y", 80))}
    write_images(tmp_path / "set", counts, size=(2, 2))
    dataset = load(tmp_path / "set")
    splits = (dataset.train, dataset.validation, dataset.test)
    assert tuple(len(split.labels) for split in splits) == sizes
    serials = [serial for split in splits for serial in serials_of(split)]
    assert sorted(serials) == list(range(200 * len(folders)))
    for split in splits:
        assert abs(np.sum(split.labels == 0) - 0.6 * len(split.labels)) <= 1
        labels = [int(serial % 200 >= 120) for serial in serials_of(split)]
        assert split.labels.tolist() == labels


@pytest.mark.parametrize("asked", [("test",), ("validation",), ("train", "validation")])
def test_asked_splits_are_those_of_the_whole_set(tmp_path, asked):
    write_images(tmp_path / "set", {"x": 30, "y": 20})
    whole = load(tmp_path / "set")
    for cache_dir in (tmp_path / "cache", tmp_path / "another"):
        part = load_dataset(f"folder:{tmp_path / 'set'}", cache_dir=cache_dir, splits=asked)
        for split in ("train", "validation", "test"):
            expected = getattr(whole, split).images[: None if split in asked else 0]
            np.testing.assert_array_equal(getattr(part, split).images, expected)


def pictures():
    """name -> (image, options of save, what its RGB pixels are), 8 x 6 pixels."""
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    grey, alpha = rgb[..., 0], rgb[..., 1]
    deep = rng.integers(0, 65536, (6, 8), dtype=np.uint16)
    deep[0, :4] = 0, 128, 129, 65535
    over_white = [
        np.rint(255 + (plane.astype(float) - 255) * (alpha / 255.0)) for plane in np.moveaxis(rgb, 2, 0)
    ]
    grey_over_white = np.rint(255 + (grey.astype(float) - 255) * (alpha / 255.0))
    palette = Image.fromarray(grey % 4).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 0, 0, 0])
    colors = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90], [0, 0, 0]])[grey % 4]
    hole = np.where((grey % 4 == 3)[..., None], 255, colors)
    ink = np.repeat(np.repeat(rng.integers(0, 256, (1, 1, 4), dtype=np.uint8), 6, 0), 8, 1)
    light = 255 - ink.astype(float)
    rgba, la = np.dstack([rgb, alpha]), np.dstack([grey, alpha])
    return {
        "rgb.png": (Image.fromarray(rgb), {}, rgb),
        "grey.png": (Image.fromarray(grey), {}, three(grey)),
        "bilevel.png": (Image.fromarray(grey > 99), {}, three(255 * (grey > 99))),
        "sixteen_bits.png": (Image.fromarray(deep), {}, three(np.floor(deep / 257 + 0.5))),
        "sixteen_bits.tif": (Image.fromarray(deep), {}, three(np.floor(deep / 257 + 0.5))),
        "palette.png": (palette, {}, colors),
        "palette_with_hole.png": (palette, {"transparency": 3}, hole),
        "palette.gif": (palette, {}, colors),
        "rgba.png": (Image.fromarray(rgba), {}, np.dstack(over_white)),
        "grey_alpha.png": (Image.fromarray(la, "LA"), {}, three(grey_over_white)),
        "cmyk.jpg": (Image.fromarray(ink, "CMYK"), {"quality": 100}, light[..., :3] * light[..., 3:] / 255),
        "lossless.webp": (Image.fromarray(rgb), {"lossless": True}, rgb),
    }


def three(grey):
    return np.repeat(grey[..., None], 3, axis=-1)


@pytest.mark.parametrize("name", list(pictures()))
def test_every_kind_of_picture_becomes_rgb(tmp_path, name):
    image, options, expected = pictures()[name]
    image.save(tmp_path / name, **options)
    found = np.asarray(decode_image(tmp_path / name)).astype(float)
    # Blending and a JPEG's coefficients are rounded; everything else is exact.
    tolerance = {"cmyk.jpg": 2, "rgba.png": 1, "grey_alpha.png": 1}.get(name, 0)
    np.testing.assert_allclose(found, expected, atol=tolerance)


@pytest.mark.parametrize(
    ("dtype", "values"), [(np.float32, (0, 1)), (np.int32, (0, 65_536)), (np.int32, (-1, 65_535))]
)
def test_pixels_of_unknown_range_are_refused(tmp_path, dtype, values):
    Image.fromarray(np.array([values], dtype)).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match=r"no known range|do not fit"):
        decode_image(tmp_path / "x.tif")


# EXIF orientation -> how the stored pixels become what a viewer shows (EXIF 2.3, section 4.6.4).
UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_photographs_are_turned_upright(tmp_path, orientation):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "set/test/a").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "set/test/a/x.png", exif=exif)
    (found,) = load(tmp_path / "set").test.images
    np.testing.assert_array_equal(found, UPRIGHT[orientation](pixels))
    np.testing.assert_array_equal(np.asarray(decode_image(tmp_path / "set/test/a/x.png")), pixels)


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (256, 300), (90, 40), (333, 333)])
def test_photographs_are_scaled_to_8_7_and_cut_out_of_the_middle(width, height):
    """On ramps, whose value after bilinear scaling is known: that of the middle of the new pixel."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    pixels = np.dstack([255 * x / (width - 1), 255 * y / (height - 1), 0 * x]).round().astype(np.uint8)
    found = np.asarray(fit_image(Image.fromarray(pixels), 224, crop=True)).astype(float)
    assert found.shape == (224, 224, 3)
    scale = 256 / min(width, height)
    for channel, side in ((0, width), (1, height)):
        cut = (int(side * scale) - 224) / 2
        middle = (np.arange(224) + 0.5 + round(cut)) * side / int(side * scale) - 0.5
        line = found[112, :, 0] if channel == 0 else found[:, 112, 1]
        np.testing.assert_allclose(line, 255 * middle / (side - 1), atol=1.6)


def test_squares_of_one_size_are_resized_whole_and_others_cropped(tmp_path):
    stripe = np.zeros((28, 28, 3), np.uint8)
    stripe[:, 0] = 255  # lost by a crop
    for name, second in (("same", (28, 28)), ("mixed", (30, 30))):
        (tmp_path / name / "test/a").mkdir(parents=True)
        Image.fromarray(stripe).save(tmp_path / name / "test/a/0.png")
        Image.new("RGB", second).save(tmp_path / name / "test/a/1.png")
    whole = load(tmp_path / "same", image_size=14).test.images[0]
    expected = Image.fromarray(stripe).resize((14, 14), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(whole, np.asarray(expected))
    assert load(tmp_path / "mixed", image_size=14).test.images[0].max() == 0
    assert load(tmp_path / "same").test.images.shape == (2, 28, 28, 3)
    with pytest.raises(ValueError, match="not squares of one size: set image_size"):
        load(tmp_path / "mixed")


def test_small_squares_keep_their_side_for_the_device_to_enlarge(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 48, 48, 3), dtype=np.uint8)
    (tmp_path / "set/test/a").mkdir(parents=True)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"set/test/a/{i}.png")

    def images(image_size, **options):
        return load(tmp_path / "set", image_size=image_size, enlarge=False, **options).test.images

    def scaled(size):
        return [
            np.asarray(Image.fromarray(im).resize((size, size), Image.Resampling.BILINEAR)) for im in pixels
        ]

    np.testing.assert_array_equal(images(224), pixels)
    np.testing.assert_array_equal(images(None), pixels)
    np.testing.assert_array_equal(images(20), scaled(20))  # more than a network sees would be of no use
    np.testing.assert_array_equal(images(224, view="low_pass"), scaled(32))  # and back to 224 on the device
    np.testing.assert_array_equal(images(40, view="low_pass"), VIEWS["low_pass"](np.array(scaled(40))))
    assert images(224, view="grey").shape == (2, 48, 48, 3)
    assert load(tmp_path / "set", image_size=224).test.images.shape == (2, 224, 224, 3)

    small = np.array(scaled(20))
    for i, image in enumerate(small):
        Image.fromarray(image).save(tmp_path / f"set/test/a/{i}.png")
    np.testing.assert_array_equal(images(224, view="low_pass"), small)  # which have no finer detail

    Image.fromarray(pixels[0]).resize((60, 50)).save(tmp_path / "set/test/a/0.png")
    assert images(64).shape == (2, 64, 64, 3)  # photographs are brought to the network's size


def test_slices_hold_their_share_of_every_class(tmp_path):
    write_images(
        tmp_path / "set", {"train/a": 40, "train/b": 20, "val/a": 5, "val/b": 5, "test/a": 6, "test/b": 6}
    )

    def parts(train, **options):
        dataset = load_dataset(f"folder:{tmp_path / 'set'}:{train}", cache_dir=tmp_path / "cache", **options)
        return [[serials_of(split), split.labels] for split in dataset[2:5]]

    (half, labels), (validation, _), (test, _) = parts("train[:50%]")
    assert np.bincount(labels).tolist() == [20, 10] and len(validation) == 10 and len(test) == 12
    assert all((serial < 40) == (label == 0) for serial, label in zip(half, labels, strict=True))
    (rest, _), *_ = parts("train[50%:]")
    assert sorted([*half, *rest]) == list(range(60))
    (last, labels), *_ = parts("train[-6:]")
    assert np.bincount(labels).tolist() == [4, 2] and set(last) < set(rest)
    (both, _), (validation, _), _ = parts("train[:30]+validation")
    assert len(both) == 36 and len(validation) == 4  # a tenth of 40, since none is recorded for it now
    (both, _), (validation, _), _ = parts("train[:30]+validation", set_aside=False)
    assert len(both) == 40 and not validation


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("test[:5]", "would train on its test images (test)"),
        ("train[:x]", "'train[:x]' selects no images"),
        ("trains", "'trains' selects no images; use train, test, or slices such as train[:10%]"),
        ("validation", "'validation' selects no images"),
        ("train[3:3]", "train[3:3] contains no images"),
    ],
)
def test_slices_that_cannot_be_get_one_clear_line(tmp_path, train, message):
    write_images(tmp_path / "set", {"train/a": 4, "test/a": 2})
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_dataset(f"folder:{tmp_path / 'set'}:{train}", cache_dir=tmp_path / "cache")
    assert "\n" not in str(error.value)


def test_the_digest_is_that_of_the_images_and_labels(tmp_path, monkeypatch):
    """Wherever and whenever the files were written; other splits do not count, and the cache knows it."""
    folders = {"train/a": 8, "train/b": 8, "test/a": 3, "test/b": 3}
    digests = []
    for place in ("one", "two"):
        write_images(tmp_path / place / "set", folders)
        digests.append(load(tmp_path / place / "set").digest("train", "test"))
    assert digests[0] == digests[1] and len(digests[0]) == 64
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "content_digest", None)
        assert load(tmp_path / "one/set").digest("train", "test") == digests[0]
    again = load(tmp_path / "one/set")
    assert again._replace(digests={}).digest("train", "test") == digests[0]
    Image.new("RGB", (6, 6), color_of(999)).save(tmp_path / "one/set/test/b/0019.png")
    changed = load(tmp_path / "one/set")
    assert changed.digest("train") == again.digest("train")
    assert changed.digest("train", "test") != digests[0] and changed.digest("test") != again.digest("test")
    assert again._replace(class_names=("a", "c")).digest("train") != again.digest("train")


def damage(path, kind):
    data = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"hello", "truncated": data[: len(data) // 2]}[kind])


@pytest.mark.parametrize("kind", ["empty", "text", "truncated"])
def test_broken_images_are_named_and_refused_or_skipped(tmp_path, kind):
    write_images(tmp_path / "set", {"train/a": 20, "train/b": 20, "test/a": 5, "test/b": 5}, size=(40, 40))
    damage(tmp_path / "set/test/b/0047.png", kind)
    for _ in range(2):  # also when it comes from the cache
        with pytest.raises(ValueError, match=re.escape("1 of 10 test images")) as error:
            load(tmp_path / "set", image_size=8)
        assert "test/b/0047.png (" in str(error.value) and "\n" not in str(error.value)
        dataset = load(tmp_path / "set", image_size=8, broken="skip")
        (skipped,) = dataset.skipped
        assert skipped.startswith("test/b/0047.png (")
        assert serials_of(dataset.test) == [40, 41, 42, 43, 44, 45, 46, 48, 49]
        assert dataset.test.labels.tolist() == [0] * 5 + [1] * 4


def test_decoded_once_and_again_when_a_file_changes(tmp_path, monkeypatch):
    write_images(tmp_path / "set", {"test/a": 3, "test/b": 3})
    first = load(tmp_path / "set").test.images

    with monkeypatch.context() as patch:
        patch.setattr(recorded, "decode_images", None)
        np.testing.assert_array_equal(load(tmp_path / "set").test.images, first)

    path = tmp_path / "set/test/a/0001.png"
    before = path.stat()
    data = bytearray(path.read_bytes())
    Image.new("RGB", (6, 6), color_of(9)).save(path)
    assert path.stat().st_size == len(data)  # neither the size nor the time of change tells
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert serials_of(load(tmp_path / "set").test) == [0, 9, 2, 3, 4, 5]

    (tmp_path / "set/test/b/0005.png").rename(tmp_path / "set/test/a/0005.png")
    assert load(tmp_path / "set").test.labels.tolist() == [0, 0, 0, 0, 1, 1]


def test_what_does_not_fit_into_memory_is_refused(tmp_path, monkeypatch):
    write_images(tmp_path / "set", {"train/a": 20, "test/a": 10})
    free = 2 * 10 * 8 * 8 * 3
    monkeypatch.setattr(recorded.psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    assert len(load(tmp_path / "set", image_size=8, splits=["test"]).test.labels) == 10
    with pytest.raises(
        ValueError,
        match=r"30 images of folder:.* more than half .* or stream the training images of a source",
    ):
        load(tmp_path / "set", image_size=8)
    monkeypatch.setattr(recorded.psutil, "virtual_memory", lambda: SimpleNamespace(available=48.4e9))
    with pytest.raises(ValueError, match=r"at 40000² pixels take 144\.0 GB, .* half of the 48\.4 GB of free"):
        load(tmp_path / "set", image_size=40_000)


def test_a_tenth_validates_but_never_more_than_5000():
    def training(count):
        records = recorded.Records(count, labels=None, read=None, describe=None)
        recording = recorded.Recording("x", ("a",), {"train": records, "test": records}, {}, True)
        return recorded.find_splits(recording)[1]["train"]

    assert [training(count) for count in (49_990, 50_010, 60_000)] == [44_991, 45_010, 55_000]


def test_the_images_that_are_split_off_are_always_the_same():
    """In every later version, too: 6 of 12 and 8, with their shares."""
    assert recorded.fixed_order(np.repeat([0, 1], [12, 8]), 6).tolist() == [9, 15, 2, 14, 7, 4]


def test_the_largest_set_that_is_split_by_class(tmp_path, monkeypatch):
    write_images(tmp_path / "set", {"a": 30, "b": 30})
    monkeypatch.setattr(recorded, "MAX_STRATIFIED", 60)
    dataset = load(tmp_path / "set")
    for part, size in ((dataset.train, 43), (dataset.validation, 5), (dataset.test, 12)):
        assert len(part.labels) == size and np.ptp(np.bincount(part.labels)) <= 1


@pytest.mark.parametrize("place", range(6))
def test_one_image_of_another_shape_is_found_wherever_it_is(tmp_path, monkeypatch, place):
    monkeypatch.setattr(recorded, "_CHUNK", 2)
    write_images(tmp_path / "set", {"test/a": 5})
    if place < 5:
        Image.new("RGB", (7, 7)).save(tmp_path / f"set/test/a/{place:04}.png")
        with pytest.raises(ValueError, match="not squares of one size"):
            load(tmp_path / "set")
    else:
        assert load(tmp_path / "set").test.images.shape == (5, 6, 6, 3)


def test_oblongs_of_one_size_and_files_that_are_no_images_have_no_common_side(tmp_path):
    write_images(tmp_path / "oblong", {"test/a": 2}, size=(9, 6))
    write_images(tmp_path / "broken", {"test/a": 2})
    for path in (tmp_path / "broken").rglob("*.png"):
        damage(path, "text")
    for name in ("oblong", "broken"):
        with pytest.raises(ValueError, match="not squares of one size: set image_size"):
            load(tmp_path / name, broken="skip")


@pytest.mark.parametrize("count", [5, 6])
def test_five_broken_images_are_named(tmp_path, count):
    write_images(tmp_path / "set", {"test/a": 9})
    for serial in range(count):
        damage(tmp_path / f"set/test/a/{serial:04}.png", "empty")
    with pytest.raises(ValueError, match=f"{count} of 9 test images") as error:
        load(tmp_path / "set", image_size=6)
    named = re.findall(r"test/a/(\d+)\.png \(", str(error.value))
    assert named == ["0000", "0001", "0002", "0003", "0004"]
    assert ("); …. Fix" in str(error.value)) == (count > 5)


@pytest.mark.parametrize("count", [64, 65])
def test_threads_decode_every_image(tmp_path, count):
    """64 are a thread's share."""
    write_images(tmp_path / "set", {"test/a": count})
    assert serials_of(load(tmp_path / "set").test) == list(range(count))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "has no class folders"),
        (["x.png"], "has no class folders"),
        (["train/a/x.png", "train/b/x.txt"], "train/b contains no images"),
        (["train/a/x.png", "test/b/x.png"], "classes that do not occur in training: b"),
        (None, "there is no folder"),
    ],
)
def test_badly_formed_folders_get_one_clear_line(tmp_path, files, message):
    root = tmp_path / "set"
    for file in files or ():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(root / file, format="PNG")
    if files is not None:
        root.mkdir(exist_ok=True)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load(root)
    assert "\n" not in str(error.value)
