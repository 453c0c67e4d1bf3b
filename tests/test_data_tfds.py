"""Prepared TensorFlow datasets without TensorFlow: tiny ones written here, and real ones where they are."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2
from test_data_folder import serials_of

from advtransfer.data import check_dataset_name, load_dataset, recorded

REAL = Path(os.environ.get("TFDS_DATA_DIR", Path(__file__).parents[2] / "shared/data/tfds"))


def encode(image, kind="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, **options)
    return file.getvalue()


def plain(serial, size=(5, 5)):
    return encode(np.full((*size, 3), [serial % 256, serial // 256, 77], np.uint8))


def write_set(
    folder, splits, *, shape=(5, 5, 3), names=("cat", "dog"), file_format="array_record", label="label"
):
    """Writes a prepared version `folder`; `splits` is {name: [(image bytes, label), ...]}."""
    folder.mkdir(parents=True)
    name, kind = folder.parent.name, "tensorflow_datasets.core.features"
    dimensions = {"dimensions": [str(-1 if side is None else side) for side in shape]}
    features = {
        "image": {
            "pythonClassName": f"{kind}.image_feature.Image",
            "image": {"shape": dimensions, "dtype": "uint8"},
        },
        label: {
            "pythonClassName": f"{kind}.class_label_feature.ClassLabel",
            "classLabel": {"numClasses": str(len(names))},
        },
    }
    features = {
        "pythonClassName": f"{kind}.features_dict.FeaturesDict",
        "featuresDict": {"features": features},
    }
    (folder / "features.json").write_text(json.dumps(features))
    (folder / f"{label}.labels.txt").write_text("\n".join(names))
    infos = []
    for split, examples in splits.items():
        halves = [examples[: len(examples) // 2], examples[len(examples) // 2 :]]  # two shards
        for shard, half in enumerate(halves):
            writer = ArrayRecordWriter(
                str(folder / f"{name}-{split}.{file_format}-{shard:05}-of-00002"), "group_size:1"
            )
            for data, value in half:
                example = tf_example_pb2.Example()
                example.features.feature["image"].bytes_list.value.append(data)
                example.features.feature[label].int64_list.value.append(value)
                writer.write(example.SerializeToString())
            writer.close()
        infos.append(
            {
                "name": split,
                "shardLengths": [str(len(half)) for half in halves],
                "numBytes": "1",
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
        )
    info = {"name": name, "version": folder.name, "fileFormat": file_format, "splits": infos}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def numbered(first, count):
    """Images of one colour each, which is their serial number; every third is a dog."""
    return [(plain(serial), int(serial % 3 == 0)) for serial in range(first, first + count)]


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "tfds"


UNLABELLED = [(plain(999), -1)] * 4


@pytest.mark.parametrize(
    ("splits", "train", "sizes"),
    [
        ({"train": (0, 60), "test": (60, 30)}, "", (54, 6, 30)),
        ({"train": (0, 60), "validation": (60, 20), "test": (80, 10)}, "", (60, 20, 10)),
        ({"train": (0, 60), "validation": (60, 20)}, "", (54, 6, 20)),
        ({"train": (0, 60), "validation": (60, 20), "test": UNLABELLED}, "", (54, 6, 20)),
        ({"train": (0, 60), "extra": (60, 50)}, "", (43, 5, 12)),
        ({"test": (0, 30)}, "", (0, 0, 30)),
        ({"train": (0, 60), "test": (60, 30)}, ":train[:50%]", (27, 3, 30)),
        ({"train": (0, 60), "validation": (60, 20), "test": (80, 10)}, ":train[50:]", (10, 20, 10)),
        ({"train": (0, 60), "validation": (60, 20), "test": (80, 10)}, ":train+validation", (72, 8, 10)),
        ({"train": (0, 60), "extra": (60, 40), "test": (100, 10)}, ":train[:30]+extra[:50%]", (45, 5, 10)),
    ],
)
def test_which_images_train_validate_and_test(data_dir, splits, train, sizes):
    examples = {name: x if isinstance(x, list) else numbered(*x) for name, x in splits.items()}
    write_set(data_dir / "pets/1.0.0", examples)
    dataset = load_dataset(f"tfds:pets{train}")
    assert dataset.class_names == ("cat", "dog")
    parts = (dataset.train, dataset.validation, dataset.test)
    assert tuple(len(part.labels) for part in parts) == sizes
    serials = [serial for part in parts for serial in serials_of(part)]
    assert len(set(serials)) == len(serials) and 999 not in serials
    for part in parts:
        assert part.labels.tolist() == [int(serial % 3 == 0) for serial in serials_of(part)]
        assert part.images.dtype == np.uint8 and part.labels.dtype == np.int32
    test = splits.get("test", splits.get("validation"))
    if isinstance(test, tuple):
        first, count = test
        assert serials_of(dataset.test) == list(range(first, first + count))


def test_photographs_that_only_test(data_dir):
    """Like imagenet_v2: no training images, JPEGs of all sizes, EXIF ignored as TensorFlow does."""
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    images = [
        rng.integers(0, 256, size, dtype=np.uint8)
        for size in ((40, 60, 3), (70, 50, 3), (33, 33, 3), (64, 48))
    ]
    encoded = [encode(image, "JPEG", exif=exif) for image in images]
    write_set(data_dir / "v2/all/3.0.0", {"test": [(data, 1) for data in encoded]}, shape=(None, None, 3))
    dataset = load_dataset(f"tfds:{data_dir / 'v2'}", image_size=28)
    assert dataset.train.images.shape == dataset.validation.images.shape == (0, 28, 28, 3)
    for data, found in zip(encoded, dataset.test.images, strict=True):
        image = Image.open(io.BytesIO(data)).convert("RGB")
        width, height = image.size
        scaled = (32, int(32 * height / width)) if width <= height else (int(32 * width / height), 32)
        left, top = round((scaled[0] - 28) / 2), round((scaled[1] - 28) / 2)
        expected = np.asarray(image.resize(scaled, Image.Resampling.BILINEAR))[
            top : top + 28, left : left + 28
        ]
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(ValueError, match="set image_size"):
        load_dataset(f"tfds:{data_dir / 'v2'}")


def test_names_find_versions_and_configs(data_dir):
    for place, serial in (("a/1.0.0", 10), ("a/2.0.0", 20), ("b/x/1.0.0", 30), ("b/y/1.0.0", 40)):
        write_set(data_dir / place, {"test": [(plain(serial), 0)] * 2})

    def first(name):
        return serials_of(load_dataset(name).test)[0]

    assert first("tfds:a:1.0.0") == 10 and first("tfds:a") == first("tfds:a:2.*.*") == 20
    assert first("tfds:b/x") == 30 and first(f"tfds:{data_dir}/b/y") == first("tfds:b/y:1.0.0") == 40


def test_broken_records_are_named_and_refused_or_skipped(data_dir):
    examples = numbered(0, 10)
    examples[7] = (examples[7][0][:40], 0)
    write_set(data_dir / "pets/1.0.0", {"test": examples})
    with pytest.raises(
        ValueError, match=re.escape("1 of 10 test images of tfds:pets cannot be decoded: test[7] (")
    ):
        load_dataset("tfds:pets")
    dataset = load_dataset("tfds:pets", broken="skip")
    assert serials_of(dataset.test) == [0, 1, 2, 3, 4, 5, 6, 8, 9]
    assert [text.split(" ")[0] for text in dataset.skipped] == ["test[7]"]


def test_decoded_once_and_again_when_a_shard_changes(data_dir, monkeypatch):
    folder = write_set(data_dir / "pets/1.0.0", {"test": numbered(0, 10)})
    assert serials_of(load_dataset("tfds:pets").test) == list(range(10))
    with monkeypatch.context() as patch:
        patch.setattr(recorded, "decode_images", None)
        assert serials_of(load_dataset("tfds:pets").test) == list(range(10))
    other = write_set(data_dir / "other/1.0.0", {"test": numbered(10, 10)})
    for shard in (0, 1):
        tail = f"-test.array_record-0000{shard}-of-00002"
        (other / f"other{tail}").replace(folder / f"pets{tail}")
    assert serials_of(load_dataset("tfds:pets").test) == list(range(10, 20))


def test_damaged_shard_gets_one_clear_line(data_dir):
    folder = write_set(data_dir / "pets/1.0.0", {"test": numbered(0, 10)})
    shard = folder / "pets-test.array_record-00001-of-00002"
    shard.write_bytes(b"x" * shard.stat().st_size)
    with pytest.raises(ValueError, match="cannot read test of tfds:pets: Corrupted") as error:
        load_dataset("tfds:pets")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        ("tfds:cifar10", ["is not prepared", "tfds build cifar10 --file_format=array_record", "looked in"]),
        ("tfds:cifar1O", ["did you mean tfds:cifar10", "looked in"]),
        ("tfds:petz", ["did you mean tfds:pets"]),
        ("tfds:qwrtzp", ["no similar name"]),
        ("tfds:pets:3.0.0", ["only pets/1.0.0"]),
        ("tfds:/nowhere", ["/nowhere contains no prepared dataset"]),
        ("tfds:.", ["several prepared datasets", "pets/1.0.0"]),
        ("tfds:old", ["stored as tfrecord", "tfds convert_format --dataset_version_dir="]),
        ("tfds:boxes", ["not a dataset of images with one label each", "box, image"]),
        ("tfds:pets:test[:5]", ["would train on its test images", "set config.evaluate.num_images"]),
        ("tfds:pets:train[:x]", ["cannot read train[:x] of tfds:pets"]),
        ("tfds:pets:train[5:5]", ["cannot read train[5:5] of tfds:pets"]),
        ("tfds:pets:trains", ["cannot read trains of tfds:pets"]),
        ("tfds:half", ["cannot read test of tfds:half"]),
        ("tfds:blind", ["no labelled train, validation or test images, only test"]),
    ],
)
def test_bad_names_and_sets_get_one_clear_line(data_dir, monkeypatch, name, messages):
    write_set(data_dir / "pets/1.0.0", {"train": numbered(0, 10), "test": numbered(0, 10)})
    write_set(data_dir / "old/1.0.0", {"test": numbered(0, 10)}, file_format="tfrecord")
    write_set(data_dir / "boxes/1.0.0", {"test": numbered(0, 10)}, label="box")
    write_set(data_dir / "blind/1.0.0", {"test": UNLABELLED})
    (
        write_set(data_dir / "half/1.0.0", {"test": numbered(0, 10)})
        / "half-test.array_record-00000-of-00002"
    ).unlink()
    monkeypatch.chdir(data_dir)
    for function in (check_dataset_name, load_dataset):
        with pytest.raises(ValueError) as error:
            function(name)
        assert all(message in str(error.value) for message in messages), error.value
        assert "\n" not in str(error.value)


@pytest.mark.process
def test_needs_no_tensorflow_and_says_nothing(data_dir, tmp_path):
    write_set(data_dir / "pets/1.0.0", {"train": numbered(0, 10), "test": numbered(10, 10)})
    program = (
        "import sys, advtransfer as at; at.load_dataset('tfds:pets'); assert 'tensorflow' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""


def real_set(name):
    if not (REAL / name).is_dir():
        pytest.skip(f"{name} is not prepared in {REAL}: set TFDS_DATA_DIR to run this test on real images")
    return next((REAL / name).iterdir())


@pytest.mark.parametrize(
    ("name", "train", "sizes"),
    [("cifar10", ":train[:4%]", (1800, 200, 10000)), ("mnist_t10k", "", (4500, 500, 5000))],
)
def test_real_sets_are_what_tfds_decodes(tmp_path, name, train, sizes):
    folder = real_set(name)
    dataset = load_dataset(f"tfds:{folder}{train}", cache_dir=tmp_path)
    assert tuple(len(split.labels) for split in dataset[2:5]) == sizes
    source = tfds.builder_from_directory(folder).as_data_source()
    for place in np.random.default_rng(0).integers(0, sizes[2], 100).tolist():
        example = source["test"][place]
        image = np.broadcast_to(example["image"], dataset.test.images.shape[1:])
        np.testing.assert_array_equal(dataset.test.images[place], image)
        assert dataset.test.labels[place] == example["label"]
    assert (
        dataset.train.images.shape[1]
        == load_dataset(
            f"tfds:{folder}{train}", image_size=224, cache_dir=tmp_path, splits=["test"], enlarge=False
        ).test.images.shape[1]
    )
    labels = np.array([source["train"][place]["label"] for place in range(sizes[0] + sizes[1])])
    for split in (dataset.train, dataset.validation):
        share = np.bincount(labels) * len(split.labels) / len(labels)
        assert np.abs(np.bincount(split.labels) - share).max() <= 1


@pytest.mark.parametrize(("set_aside", "sizes"), [(True, (45000, 5000)), (False, (50000, 0))])
def test_all_of_cifar10_is_50000_images(tmp_path, monkeypatch, set_aside, sizes):
    """Decoding, which other tests look at, is left out."""
    folder = real_set("cifar10")
    decoded = []

    def decode_images(read, indices, size, **_):
        decoded.append(indices)
        return np.zeros((len(indices), size, size, 3), np.uint8), {}

    monkeypatch.setattr(recorded, "decode_images", decode_images)
    (tmp_path / "no cache").touch()
    dataset = load_dataset(
        f"tfds:{folder}",
        image_size=224,
        cache_dir=tmp_path / "no cache",
        splits=["train", "validation"],
        enlarge=False,
        set_aside=set_aside,
    )
    assert (dataset.train.num_images, dataset.validation.num_images) == sizes
    assert dataset.train.nbytes == sizes[0] * 32 * 32 * 3
    assert sorted(np.concatenate(decoded).tolist()) == list(range(50000))
    assert set(np.bincount(dataset.train.labels)) == {sizes[0] // 10}
