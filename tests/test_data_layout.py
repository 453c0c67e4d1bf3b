"""Image folders as people have them: split names, wrappers, links, thumbnails, odd names, odd files."""

import os
import re
import unicodedata
import zlib

import numpy as np
import pytest
from PIL import Image

from advtransfer.data import load_dataset
from advtransfer.data.decode import decode_image, fit_image

DARK, BRIGHT = 40, 200  # where training and test images lie


def draw(path, value, label=0, serial=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value, 50 * label, serial)).save(path, **options)


def draw_classes(folder, value=DARK, classes=("cat", "dog"), number=6):
    for label, name in enumerate(classes):
        for serial in range(number):
            draw(folder / name / f"{serial}.png", value, label, serial)


def load(root, **options):
    return load_dataset(f"folder:{root}", image_size=8, cache_dir=root.parent / "cache", **options)


def sizes(dataset):
    return [split.num_images for split in (dataset.train, dataset.validation, dataset.test)]


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train", "test"),
        ("Training", "Testing"),
        ("TRAIN", "Test"),
        ("training_set", "test_set"),
        ("train-images", "test images"),
        ("seg_train/seg_train", "seg_test/seg_test"),
        ("archive/train", "archive/test"),
        ("a/b/train/c", "a/b/test/c"),
        ("train", "valid"),
        ("train", "Dev"),
    ],
)
def test_splits_under_their_usual_names(tmp_path, train, test):
    draw_classes(tmp_path / "set" / train)
    draw_classes(tmp_path / "set" / test, BRIGHT)
    (tmp_path / "set" / "README.md").write_text("how they were taken")
    dataset = load(tmp_path / "set")
    assert dataset.class_names == ("cat", "dog") and sizes(dataset) == [11, 1, 12]
    assert set(dataset.test.images[..., 0].ravel()) == {BRIGHT}
    assert np.bincount(dataset.test.labels).tolist() == [6, 6]
    (left_out,) = [remark for remark in dataset.remarks if remark.startswith("left out")]
    assert left_out == "left out 1 with suffix .md"
    assert any(remark.startswith("read") for remark in dataset.remarks) == (
        (train, test) != ("train", "test")
    )


def test_validation_beside_training_and_test(tmp_path):
    for folder, value in (("train", DARK), ("val", 100), ("test", BRIGHT)):
        draw_classes(tmp_path / "set" / folder, value)
    dataset = load(tmp_path / "set")
    assert sizes(dataset) == [12, 12, 12] and set(dataset.validation.images[..., 0].ravel()) == {100}


@pytest.mark.parametrize("wrapped", ["", "archive/"])
def test_classes_may_have_the_names_of_splits_and_folders_of_their_own(tmp_path, wrapped):
    """Pictures of trains: train/ holds pictures, as the classes beside it do."""
    draw_classes(tmp_path / "set" / wrapped, classes=("bus", "train", "tram"), number=10)
    draw(tmp_path / "set" / wrapped / "tram/modern/1.png", DARK, 2, 99)
    dataset = load(tmp_path / "set")
    assert dataset.class_names == ("bus", "train", "tram") and sum(sizes(dataset)) == 31
    splits = (dataset.train, dataset.validation, dataset.test)
    found = np.concatenate([split.images[:, 0, 0, 1] for split in splits])
    np.testing.assert_array_equal(found, 50 * np.concatenate([split.labels for split in splits]))


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (("fold_0/cat", "fold_0/dog", "fold_1/cat", "fold_1/dog"), "fold_0/, fold_1/ each contain cat, dog"),
        (
            ("north/cat", "north/dog", "south/cat", "south/cow"),
            "north/, south/ each contain cat: are they splits or classes",
        ),
        (("train/1/cat", "train/1/dog", "train/2/cat", "train/2/dog"), "1/, 2/ each contain cat, dog"),
        (("train/cat", "train/dog", "extra/cat", "test/cat"), "extra/ is next to test/, train/"),
        (("train/cat", "train/dog", "test"), "test/ is next to train/"),
        (("train/cat", "train/dog", "Training/cat"), "Training/, train/ could both be the train images"),
        (("train", "test"), "test/, train/ contain images but no class folders"),
        (
            ("train/cat", "train/dog", "test/Cat", "test/dog"),
            "not occur in training: Cat; the training classes are cat, dog",
        ),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(tmp_path, folders, message):
    for folder in folders:
        draw(tmp_path / "set" / folder / "1.png", DARK)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load(tmp_path / "set")
    assert "\n" not in str(caught.value)


def test_folders_of_classes_may_repeat_below_train(tmp_path):
    for name in ("cat", "dog"):
        for place in ("indoor", "outdoor"):
            for serial in range(5):
                draw(tmp_path / "set/train" / name / place / f"{serial}.png", DARK, serial=serial)
    assert load(tmp_path / "set").class_names == ("cat", "dog")


@pytest.mark.parametrize(
    "copy",
    [
        ".ipynb_checkpoints/{}-checkpoint.png",
        "@eaDir/{}.png/SYNOFILE_THUMB_M.png",
        ".@__thumb/default{}.png",
        "#recycle/{}.png",
        "__MACOSX/._{}.png",
    ],
)
def test_thumbnails_and_hidden_copies_do_not_count(tmp_path, copy):
    draw_classes(tmp_path / "set", number=10)
    for name in ("cat", "dog"):
        for serial in range(10):
            draw(tmp_path / "set" / name / copy.format(serial), DARK, serial=serial)
    dataset = load(tmp_path / "set")
    assert sum(sizes(dataset)) == 20 and dataset.remarks[0] == "left out 2 hidden"


@pytest.mark.parametrize(
    ("links", "number"),
    [
        ({"cat/self": "."}, 1),
        ({"cat/all": "..", "dog/all": ".."}, 2),
        ({"cat/0b.png": "0.png"}, 1),
        ({"cow": "cat"}, 1),
        ({"cat/other": "../dog"}, 1),
    ],
)
def test_links_into_the_set_are_left_out(tmp_path, links, number):
    draw_classes(tmp_path / "set", number=10)
    for link, target in links.items():
        os.symlink(target, tmp_path / "set" / link)
    dataset = load(tmp_path / "set")
    assert sum(sizes(dataset)) == 20 and dataset.class_names == ("cat", "dog")
    assert dataset.remarks[0] == f"left out {number} links to what is already in the dataset"


def test_links_out_of_the_set_are_followed_once(tmp_path):
    draw_classes(tmp_path / "elsewhere", number=10)
    (tmp_path / "set").mkdir()
    for name in ("cat", "dog"):
        os.symlink(tmp_path / "elsewhere" / name, tmp_path / "set" / name)
    os.symlink(tmp_path / "elsewhere/dog", tmp_path / "set/dog_again")
    os.symlink(tmp_path / "elsewhere", tmp_path / "elsewhere/cat/loop")
    dataset = load(tmp_path / "set")
    assert dataset.class_names == ("cat", "dog") and sum(sizes(dataset)) == 20


def test_links_that_lead_nowhere_are_broken_images_or_refused(tmp_path):
    draw_classes(tmp_path / "set", number=10)
    os.symlink("/not/mounted/1.png", tmp_path / "set/cat/gone.png")
    with pytest.raises(ValueError, match=r"1 of \d+ train images .* cat/gone.png \(No such file"):
        load(tmp_path / "set")
    dataset = load(tmp_path / "set", broken="skip")
    assert sum(sizes(dataset)) == 20 and len(dataset.skipped) == 1
    os.symlink("/not/mounted", tmp_path / "set/cow")
    with pytest.raises(ValueError, match="cow is a broken link: mount its target"):
        load(tmp_path / "set", broken="skip")


def test_odd_files_are_counted_and_never_opened(tmp_path):
    draw_classes(tmp_path / "set", number=10)
    for serial in range(4):
        draw(tmp_path / f"set/cat/new{serial}.PNG_large", DARK, serial=serial, format="PNG")
        draw(tmp_path / f"set/dog/new{serial}", DARK, serial=serial, format="PNG")
        draw(tmp_path / f"set/dog/more{serial}.JFIF", DARK, serial=serial, format="JPEG")
    os.mkfifo(tmp_path / "set/cat/pipe.png")
    draw(tmp_path / "set/beside.png", DARK)
    dataset = load(tmp_path / "set")
    assert sum(sizes(dataset)) == 24
    counts = ("4 with suffix .png_large", "4 without a suffix", "1 neither files nor folders")
    assert all(count in dataset.remarks[0] for count in (*counts, "1 images outside class folders"))
    draw(tmp_path / "set/cow/1.PNG_large", DARK, format="PNG")
    with pytest.raises(ValueError, match=re.escape("cow contains no images (only 1 with suffix .png_large)")):
        load(tmp_path / "set")
    with pytest.raises(ValueError, match="not a regular file"):
        decode_image(tmp_path / "set/cat/pipe.png")


def test_names_of_classes_in_bytes_and_unicode_are_text_that_can_be_written(tmp_path):
    composed, split = unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café")
    for part, names in (("train", [composed, split, "a\x1b[2J"]), ("test", [split])):
        for name in names:
            for serial in range(4):
                draw(tmp_path / "set" / part / name / f"{serial}{len(name)}.png", DARK, serial=serial)
    latin = os.path.join(os.fsencode(tmp_path / "set/train"), b"th\xe9")
    os.mkdir(latin)
    Image.new("RGB", (8, 8)).save(os.path.join(latin, b"\xff.png").decode("utf-8", "surrogateescape"))
    dataset = load(tmp_path / "set")
    assert dataset.class_names == ("a\\x1b[2J", composed, "th\\xe9")
    assert [int(n) for n in np.bincount(np.r_[dataset.train.labels, dataset.validation.labels])] == [4, 8, 1]
    assert set(dataset.test.labels) == {1}
    (tmp_path / "set/train" / composed / "broken\x07.png").write_bytes(b"x")
    assert load(tmp_path / "set", broken="skip").skipped[0].startswith(f"train/{composed}/broken\\x07.png (")


def test_numbers_are_classes_in_the_order_of_their_values(tmp_path):
    draw_classes(tmp_path / "set", classes=("9", "10", "100", "2", "b", "a10", "a9"))
    assert load(tmp_path / "set").class_names == ("2", "9", "10", "100", "a10", "a9", "b")


def test_duplicate_images_are_reported(tmp_path):
    for split, value in (("train", DARK), ("test", BRIGHT)):
        draw_classes(tmp_path / "set" / split, value, number=6)
    draw(tmp_path / "set/test/cat/copy1.png", DARK, 0, 0)  # as train/cat/0.png
    draw(tmp_path / "set/test/cat/copy2.png", DARK, 1, 1)  # as train/dog/1.png
    draw(tmp_path / "set/train/dog/copy3.png", DARK, 0, 2)  # as train/cat/2.png
    dataset = load(tmp_path / "set", set_aside=False)
    assert dataset.remarks == (
        "images with more than one label, pixel for pixel, in train: 1, such as train/cat/2.png and "
        "train/dog/copy3.png",
        "test images that are also train images, pixel for pixel: 2, 1 of them with a different label, "
        "such as test/cat/copy1.png and train/cat/0.png",
    )


def test_classes_without_test_images_are_reported(tmp_path):
    for split, names in (("train", "abc"), ("test", "b")):
        for name in names:
            draw(tmp_path / "set" / split / name / "0.png", BRIGHT, "abc".index(name), len(split))
    dataset = load(tmp_path / "set", set_aside=False)
    assert dataset.remarks == ("2 of 3 classes have no test image: a; c",)
    assert dataset.names["test"].tolist() == ["test/b/0.png"]


def test_a_set_without_a_bright_pixel_is_reported(tmp_path):
    for bits, is_told in ((16, False), (12, True), (10, True)):
        for serial in range(10):
            values = np.random.default_rng(serial).integers(0, 2**bits, (2, 8, 8), dtype=np.uint16)
            for name, pixels in zip(("ill", "well"), values, strict=True):
                path = tmp_path / str(bits) / name / f"{serial}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
        remarks = load(tmp_path / str(bits)).remarks
        assert [remark.startswith("no pixel is brighter than") for remark in remarks] == [True] * is_told


def png_with_exif(path, exif):
    """A whole PNG of 8 x 6 pixels with an eXIf chunk of these bytes."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    data, chunk = path.read_bytes(), b"eXIf" + exif
    whole = len(exif).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    path.write_bytes(data[:33] + whole + data[33:])
    return pixels


@pytest.mark.parametrize(
    "exif",
    [
        b"rubbish",
        b"MM\x00*\x00\x00\x00\x08\xff\xff",
        # Orientation 99.
        b"II*\x00\x08\x00\x00\x00\x01\x00\x12\x01\x03\x00\x01\x00\x00\x00\x63\x00\x00\x00\x00\x00\x00\x00",
    ],
)
def test_damaged_exif_data_leave_the_picture_as_it_is(tmp_path, exif):
    pixels = png_with_exif(tmp_path / "x.png", exif)
    np.testing.assert_array_equal(decode_image(tmp_path / "x.png", upright=True), pixels)


def test_pictures_of_impossible_sizes_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    Image.new("1", (101, 100)).save(tmp_path / "large.png")
    with pytest.raises(ValueError, match="101 x 100 pixels, more than 10,000"):
        decode_image(tmp_path / "large.png")
    Image.new("RGB", (100, 100)).save(tmp_path / "fits.png")
    assert decode_image(tmp_path / "fits.png").size == (100, 100)
    Image.new("RGB", (1, 200)).save(tmp_path / "thin.png")
    thin = decode_image(tmp_path / "thin.png")
    with pytest.raises(ValueError, match="8 x 1,600 pixels, more than 10,000"):
        fit_image(thin, 7, crop=True)
    assert fit_image(thin, 5, crop=True).size == (5, 5)
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(1 << 31)
    with pytest.raises(ValueError, match=r"the file has 2,147,483,648 bytes, the limit is 1,073,741,824"):
        decode_image(tmp_path / "huge.png")


def test_only_pictures_are_read_whatever_a_file_is_called(tmp_path):
    """Pillow would start Ghostscript for PostScript."""
    (tmp_path / "x.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n"
    )
    with pytest.raises(Exception, match="cannot identify image file"):
        decode_image(tmp_path / "x.png")
