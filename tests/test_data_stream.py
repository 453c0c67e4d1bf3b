"""Streamed training sets: what is in every batch, workers that are killed, and crops against whole images."""

from __future__ import annotations

import hashlib
import itertools
import os
import pickle
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest
from PIL import Image
from test_data_folder import damage, load, serials_of, write_images
from test_data_tfds import numbered, write_set

from advtransfer import config as base
from advtransfer import parallel
from advtransfer.config import ConfigError, read
from advtransfer.data import (
    AUGMENTATIONS,
    Augmentation,
    Split,
    augment,
    datasets,
    load_dataset,
    make_feed,
    recorded,
    resize,
    stream,
    to_float,
)
from advtransfer.data.decode import decode_crop, decode_image, random_box
from advtransfer.data.stream import StreamOrder, iterate, read_batch
from advtransfer.source import start_training
from advtransfer.tasks.source import load_source_data


def noise(width, height, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def train(tmp_path):
    """22 streamed images of the colours 0 ... 21, two classes."""
    write_images(tmp_path / "set", {"train/a": 12, "train/b": 10, "val/a": 3, "test/a": 4})
    return load(tmp_path / "set", loading="stream").train


# --- batches ----------------------------------------------------------------------------------------


def test_every_epoch_has_every_image_once_but_those_that_fill_no_batch(train):
    order, epochs = StreamOrder(seed=3, batch_size=4), []
    for epoch in range(3):
        batches = [read_batch(train, order, step) for step in range(5 * epoch, 5 * epoch + 5)]
        serials = [serial for batch in batches for serial in serials_of(batch)]
        assert len(set(serials)) == len(serials) == 20 and set(serials) <= set(range(22))
        labels = np.concatenate([batch.labels for batch in batches])
        np.testing.assert_array_equal(labels, np.array(serials) >= 12, strict=False)
        epochs.append(serials)
    assert len({tuple(serials) for serials in epochs}) == 3
    other = read_batch(train, order._replace(seed=4), 0)
    assert serials_of(other) != epochs[0][:4]


def test_what_is_drawn_stays_what_it_is(train, monkeypatch):
    """From the seed, the epoch, the step and the position alone, and in every later version the same."""
    assert stream.epoch_order(3, 1, 8).tolist() == [4, 3, 1, 6, 0, 2, 5, 7]
    numbers = []

    def draw(encoded, size, rng, **_):
        numbers.append(int(rng.integers(10**6)))
        return np.zeros((size, size, 3), np.uint8)

    monkeypatch.setattr(stream, "decode_crop", draw)
    order = StreamOrder(seed=3, batch_size=6, process=1, num_processes=2, min_area=0.5)
    for step in (0, 4):
        read_batch(train, order, step)
    expected = [np.random.default_rng([3, 1, step, i]).integers(10**6) for step in (0, 4) for i in (3, 4, 5)]
    assert numbers == expected


def test_every_epoch_of_a_set_on_the_device_has_another_order(monkeypatch):
    monkeypatch.setattr(parallel, "platform", lambda: "gpu")
    images, labels = np.zeros((21, 4, 4, 3), np.uint8), np.arange(21, dtype=np.int32)
    feed, epochs = _feed(Split(images, labels)), []
    for epoch in range(3):
        steps = [feed.rows(step) for step in (2 * epoch, 2 * epoch + 1)]
        for _, positions in steps:
            np.testing.assert_array_equal(positions, np.arange(8).reshape(2, 4))
        taken = np.concatenate([np.ravel(indices) for indices, _ in steps])
        assert len({*taken.tolist()}) == 16 and taken.min() >= 0 and taken.max() <= 20
        epochs.append(tuple(taken.tolist()))
    assert len({*epochs}) == 3
    again = np.concatenate([np.ravel(feed.rows(step)[0]) for step in (2, 3)])
    assert tuple(again.tolist()) == epochs[1]


def test_processes_read_the_rows_of_one_global_batch(tmp_path):
    for i, label in enumerate("ab" * 8):
        (tmp_path / "set/train" / label).mkdir(parents=True, exist_ok=True)
        noise(40, 30, seed=i).save(tmp_path / f"set/train/{label}/{i}.png")
    train = load(tmp_path / "set", loading="stream", image_size=16).train
    for min_area in (0.0, 0.2):
        order = StreamOrder(seed=0, batch_size=8, min_area=min_area)
        whole = read_batch(train, order, 1)
        for num_processes in (2, 4):
            parts = [
                read_batch(train, order._replace(process=i, num_processes=num_processes), 1)
                for i in range(num_processes)
            ]
            np.testing.assert_array_equal(np.concatenate([part.images for part in parts]), whole.images)
            np.testing.assert_array_equal(np.concatenate([part.labels for part in parts]), whole.labels)


@pytest.mark.parametrize("size", [(6, 6), (9, 6)])
def test_without_a_random_crop_images_are_those_of_a_set_in_memory(tmp_path, size):
    """Of folders without a test split, too: the same images train."""
    write_images(tmp_path / "set", {"a": 30, "b": 20}, size=size)
    memory = load(tmp_path / "set", image_size=8)
    streamed = load(tmp_path / "set", image_size=8, loading="stream")
    assert streamed.train.num_images == len(memory.train.labels)
    chex.assert_trees_all_equal(streamed.test, memory.test)
    batches = [read_batch(streamed.train, StreamOrder(seed=0, batch_size=6), step) for step in range(6)]
    expected = dict(
        zip(serials_of(memory.train), zip(memory.train.images, memory.train.labels, strict=True), strict=True)
    )
    for batch in batches:
        for serial, image, label in zip(serials_of(batch), batch.images, batch.labels, strict=True):
            np.testing.assert_array_equal(image, expected[serial][0])
            assert label == expected[serial][1]


def test_prepared_sets_are_read_in_other_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = write_set(tmp_path / "pets/1.0.0", {"train": numbered(0, 30), "test": numbered(30, 6)})
    train = load_dataset(f"tfds:{folder}", loading="stream").train
    order = StreamOrder(seed=0, batch_size=9)
    batches = [read_batch(train, order, step) for step in range(3)]
    serials = [serial for batch in batches for serial in serials_of(batch)]
    assert len(set(serials)) == 27 and train.num_images == 27
    assert [label for batch in batches for label in batch.labels] == [serial % 3 == 0 for serial in serials]
    copy = pickle.loads(pickle.dumps(train.read))  # as a worker gets it
    for (encoded, label), (other, other_label) in zip(copy([4, 20]), train.read([4, 20]), strict=True):
        assert (encoded.getvalue(), label) == (other.getvalue(), other_label)


def test_large_sets_are_split_without_reading_their_labels(tmp_path, monkeypatch):
    write_images(tmp_path / "set", {"a": 30, "b": 30})
    monkeypatch.setattr(recorded, "MAX_STRATIFIED", 40)
    monkeypatch.setattr(recorded, "stratified_order", None)
    dataset = load(tmp_path / "set")
    parts = [serials_of(part) for part in (dataset.train, dataset.validation, dataset.test)]
    assert [len(part) for part in parts] == [43, 5, 12]
    assert sorted(itertools.chain(*parts)) == list(range(60))


# --- broken images ----------------------------------------------------------------------------------


def test_a_broken_image_is_refused_by_name_or_replaced_by_the_next(tmp_path, caplog):
    write_images(tmp_path / "set", {"train/a": 20, "train/b": 20})
    good = load(tmp_path / "set", loading="stream").train
    order = StreamOrder(seed=0, batch_size=20)
    whole = [read_batch(good, order, step) for step in range(2)]
    for serial in (7, 8):
        damage(tmp_path / f"set/train/a/{serial:04}.png", "truncated")
    refuse, skip = (load(tmp_path / "set", loading="stream", broken=how).train for how in ("refuse", "skip"))
    with pytest.raises(
        ValueError, match=r"cannot decode train/a/000[78]\.png \(.*broken_images=skip"
    ) as error:
        for step in range(2):
            read_batch(refuse, order, step)
    assert "\n" not in str(error.value)
    for step in range(2):
        batch = read_batch(skip, order, step)
        assert serials_of(batch) == [9 if serial in (7, 8) else serial for serial in serials_of(whole[step])]
    feed = _feed(skip, batch_size=20, num_steps=4)
    for step in range(4):
        feed.rows(step)
    feed.close()
    output = re.findall(r"skipped: (\S+) .*; (\d) broken images so far", caplog.text)
    assert {name for name, _ in output} == {"train/a/0007.png", "train/a/0008.png"}
    assert [number for _, number in output] == ["1", "2"]


def test_a_set_without_one_good_image_ends(tmp_path):
    write_images(tmp_path / "set", {"train/a": 2, "train/b": 2})
    for path in (tmp_path / "set").rglob("*.png"):
        damage(path, "empty")
    train = load(tmp_path / "set", loading="stream", broken="skip", image_size=6).train
    with pytest.raises(ValueError, match="not one image can be decoded: train/"):
        read_batch(train, StreamOrder(seed=0, batch_size=2), 0)


# --- pipelines --------------------------------------------------------------------------------------

KILLED = """
import hashlib, sys
from advtransfer.data import load_dataset
from advtransfer.data.stream import StreamOrder, iterate
if __name__ == "__main__":
    train = load_dataset(sys.argv[1], cache_dir=sys.argv[2], loading="stream", image_size=16).train
    batches = iterate(train, StreamOrder(seed=0, batch_size=4, min_area=0.1), 0, 10**9, num_workers=2)
    for batch in batches:
        print(hashlib.sha256(batch.images.tobytes() + batch.labels.tobytes()).hexdigest(), flush=True)
"""


def digest(batch):
    return hashlib.sha256(batch.images.tobytes() + batch.labels.tobytes()).hexdigest()


@pytest.mark.process
def test_killed_with_its_workers_alive_and_gone_on_with(tmp_path):
    """All batches are those that are computed one by one, and no worker outlives its process."""
    write_images(tmp_path / "set", {"train/a": 9, "train/b": 9}, size=(40, 30))
    name, cache = f"folder:{tmp_path / 'set'}", tmp_path / "cache"
    train = load_dataset(name, cache_dir=cache, loading="stream", image_size=16).train
    order = StreamOrder(seed=0, batch_size=4, min_area=0.1)
    undisturbed = [digest(read_batch(train, order, step)) for step in range(12)]
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    process = subprocess.Popen(
        [sys.executable, script, name, cache],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    seen = [process.stdout.readline().strip() for _ in range(5)]
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    assert seen == undisturbed[:5], process.communicate()[1]
    workers = [child for child in children if "fork" in " ".join(child.cmdline() or ["fork"])]
    assert len(workers) == 2
    assert not psutil.wait_procs(children, timeout=30)[1]
    process.communicate()
    for num_workers in (0, 1):
        rest = iterate(train, order, 5, 12, num_workers=num_workers)
        assert [digest(batch) for batch in rest] == undisturbed[5:]
        rest.close()


def test_an_error_in_a_thread_is_raised_here(tmp_path):
    write_images(tmp_path / "set", {"train/a": 4, "train/b": 4, "val/a": 1, "test/a": 1})
    damage(tmp_path / "set/train/a/0002.png", "text")
    train = load(tmp_path / "set", loading="stream", image_size=6).train
    batches = iterate(train, StreamOrder(seed=0, batch_size=8), 0, 2, num_workers=0)
    with pytest.raises(ValueError, match="cannot decode train/a/0002.png"):
        next(batches)
    batches.close()


def test_batches_that_outgrow_the_shared_memory_are_refused(train, monkeypatch):
    """Eight batches per worker: 2 x 8 x 4 images of 5000 x 5000 x 3 bytes."""
    needed, message = 4_800_000_000, "take up to 4.8 GB .* has 4.8 GB free: enlarge it .* or lower --config"
    large, order = train._replace(image_size=5000), StreamOrder(seed=0, batch_size=8, num_processes=2)
    monkeypatch.setattr(stream, "_let_grain_read_its_flags", lambda: pytest.fail("workers are started"))
    for free, outcome in ((needed, pytest.fail.Exception), (needed - 1, ValueError)):
        monkeypatch.setattr(stream.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        with pytest.raises(outcome, match=message if outcome is ValueError else "workers are started"):
            iterate(large, order, 0, 2, num_workers=2)


def _feed(train, *, augmentation=AUGMENTATIONS["none"], batch_size=8, num_steps=6, **options):
    return make_feed(
        train,
        augmentation,
        jax.random.key(1),
        batch_size=batch_size,
        num_steps=num_steps,
        seed=0,
        num_workers=0,
        **options,
    )


def test_a_set_on_the_device_is_enlarged_batch_by_batch(monkeypatch):
    """It is stored at its own size; a batch equals one of the enlarged set."""
    monkeypatch.setattr(parallel, "platform", lambda: "gpu")
    rng = np.random.default_rng(0)
    small = Split(rng.integers(0, 256, (20, 5, 5, 3), dtype=np.uint8), np.arange(20, dtype=np.int32))
    feed = _feed(small, image_size=12)
    np.testing.assert_array_equal(feed.shared[0], small.images)
    enlarged = resize(to_float(jnp.asarray(small.images)), 12)
    make_batch = jax.jit(feed.make_batch)
    for device in range(2):
        batch = make_batch(feed.shared, jax.tree.map(lambda x: x[device], feed.rows(1)), 1)  # noqa: B023
        np.testing.assert_allclose(batch.images, enlarged[batch.labels], atol=1e-6)


def test_the_devices_of_a_cpu_share_one_copy_of_the_images(monkeypatch):
    """They get the rows of each step, and make of them what a device makes that has all images."""
    rng = np.random.default_rng(0)
    split = Split(rng.integers(0, 256, (20, 5, 5, 3), dtype=np.uint8), np.arange(20, dtype=np.int32))
    feeds = []
    for platform in ("cpu", "gpu"):
        monkeypatch.setattr(parallel, "platform", lambda platform=platform: platform)
        feeds.append(_feed(split, image_size=12, augmentation=Augmentation(crop_padding=2, flip=True)))
    assert sum(x.size for x in jax.tree.leaves(feeds[0].shared)) < split.images.size
    for step in (0, 3):
        for device in range(2):
            batches = [
                jax.jit(feed.make_batch)(
                    feed.shared,
                    jax.tree.map(lambda x: x[device], feed.rows(step)),  # noqa: B023
                    step,
                )
                for feed in feeds
            ]
            chex.assert_trees_all_equal(*batches)


def test_what_devices_get_and_make_of_it(train):
    """Two devices hold the two halves of every batch, also after a jump, and augment them by key."""
    augmentation = Augmentation(crop_padding=2)
    feed = _feed(train, augmentation=augmentation)
    key = jax.random.split(jax.random.key(1))[1]
    make_batch = jax.jit(feed.make_batch)
    for step in (0, 1, 5, 1):
        expected = read_batch(train, StreamOrder(seed=0, batch_size=8), step)
        images, labels, positions = feed.rows(step)
        np.testing.assert_array_equal(images, expected.images.reshape(2, 4, 6, 6, 3))
        np.testing.assert_array_equal(labels, expected.labels.reshape(2, 4))
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, step), i))(np.arange(8))  # noqa: B023
        augmented = augment(keys, to_float(expected.images), augmentation).reshape(2, 4, 6, 6, 3)
        for device in range(2):
            rows = images[device], labels[device], positions[device]
            batch = make_batch(feed.shared, rows, step)
            np.testing.assert_allclose(batch.images, augmented[device], atol=1e-6)
    feed.close()


# --- training ---------------------------------------------------------------------------------------


def _config(root, **train):
    config = base.default()
    config.train.dataset = f"folder:{root}"
    config.cache_dir = str(root.parent / "cache")
    config.train.update(image_size=8, batch_size=8, num_epochs=3, num_workers=0, loading="stream")
    config.train.augmentation.update(resized_crop=0.3, flip=True)
    config.evaluate.batch_size = 4
    config.train.update(train)
    return config


def test_training_goes_on_from_any_step(tmp_path):
    for i, label in enumerate("ab" * 9):
        (tmp_path / "set/train" / label).mkdir(parents=True, exist_ok=True)
        noise(20, 16, seed=i).save(tmp_path / f"set/train/{label}/{i}.png")
    write_images(tmp_path / "set", {"val/a": 4, "test/a": 4})
    config = _config(tmp_path / "set")
    options = read(config)
    run = start_training(options.training, load_source_data(options))
    state, saved = run.state, {}
    for step in range(6):
        saved[step] = jax.device_get(state)
        state, metrics = run.run_step(state, step)
    undisturbed = jax.device_get(state)
    state = jax.device_put(saved[3], jax.tree.map(lambda x: x.sharding, state))
    for step in range(3, 6):
        state, again = run.run_step(state, step)
    run.close()
    chex.assert_trees_all_equal(jax.device_get(state), undisturbed)
    chex.assert_trees_all_equal(jax.device_get(again), jax.device_get(metrics))
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), undisturbed.params, saved[0].params)
    assert min(jax.tree.leaves(moved)) > 0


def test_what_is_streamed(tmp_path, monkeypatch):
    write_images(tmp_path / "set", {"train/a": 12, "train/b": 10, "test/a": 4})

    def streamed(**options):
        return not isinstance(load(tmp_path / "set", **options).train, datasets.Split)

    assert streamed(loading="stream") and not streamed() and not streamed(loading="auto")
    monkeypatch.setattr(datasets, "MAX_IN_MEMORY", 20 * 6 * 6 * 3 - 1)  # two of the 22 images validate
    assert streamed(loading="auto") and not streamed(loading="memory")
    monkeypatch.setattr(datasets, "MAX_IN_MEMORY", 20 * 6 * 6 * 3)
    assert not streamed(loading="auto") and streamed(loading="auto", image_size=7)

    with pytest.raises(ValueError, match="builtin:digits is not streamed"):
        load_dataset("builtin:digits", loading="stream")
    with pytest.raises(ValueError, match="in the view grey, only loaded into memory"):
        load(tmp_path / "set", loading="stream", view="grey")
    config = _config(tmp_path / "set", image_size=6)
    config.evaluate.split = "train"
    with pytest.raises(ConfigError, match="config.evaluate.split: the training images are streamed"):
        load_source_data(read(config))


# --- random crops -----------------------------------------------------------------------------------


def test_boxes_have_the_share_and_the_shape_that_are_asked_for():
    rng = np.random.default_rng(0)
    boxes = np.array([random_box(rng, 4000, 4000, min_area=0.3) for _ in range(4000)])
    left, top, width, height = boxes.T
    assert boxes[:, :2].min() >= 0 and (left + width).max() <= 4000 and (top + height).max() <= 4000
    area, ratio = width * height / 4000**2, width / height
    assert 0.299 < area.min() < 0.31 and area.max() > 0.9
    assert 0.749 < ratio.min() < 0.76 and 1.31 < ratio.max() < 1.335
    # Small boxes always fit: among them, uniform in area and log ratio, anywhere.
    small = area < 0.5
    assert abs(area[small].mean() - 0.4) < 0.005 and abs(np.log(ratio[small]).mean()) < 0.01
    assert abs((left[small] / (4000 - width[small])).mean() - 0.5) < 0.02


def test_where_no_box_fits_the_middle_is_taken():
    rng = np.random.default_rng(0)
    assert random_box(rng, 1000, 12, min_area=0.08) == (492, 0, 16, 12)
    assert random_box(rng, 12, 1000, min_area=0.08) == (0, 492, 12, 16)


class Script(np.random.Generator):
    """Random numbers that are written down, (area, ratio) of each try; of integers the largest."""

    def __init__(self, *tries):
        super().__init__(np.random.PCG64())
        self.numbers = iter([number for area, ratio in tries for number in (area, np.log(ratio))])

    def uniform(self, low, high):
        return next(self.numbers)

    def integers(self, number):
        return number - 1


def test_the_first_of_ten_boxes_that_fits_is_taken():
    miss, whole, flat = (1.0, 4 / 3), (0.75, 4 / 3), (0.36, 1.0)
    fits = (40, 40, 60, 60)
    assert random_box(Script(flat, miss), 100, 100, min_area=0.1) == fits
    assert random_box(Script(*[miss] * 9, flat), 100, 100, min_area=0.1) == fits
    assert random_box(Script(*[miss] * 10), 100, 100, min_area=0.1) == (0, 0, 100, 100)
    assert random_box(Script(whole, flat), 100, 100, min_area=0.1) == (0, 25, 100, 75)  # as wide as the image
    assert random_box(Script((0.75, 3 / 4), flat), 100, 100, min_area=0.1) == (25, 0, 75, 100)
    # Of an image of one line a box without area is no box, and one of a pixel is.
    assert random_box(Script((0.02, 1.0), (0.1, 1.0)), 10, 1, min_area=0.01) == (9, 0, 1, 1)


@pytest.mark.parametrize("orientation", [1, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("upright", [True, False])
def test_a_crop_is_cut_out_of_the_image_and_scaled(tmp_path, orientation, upright):
    path, exif = tmp_path / "image.png", Image.Exif()
    exif[0x0112] = orientation
    noise(90, 60).save(path, exif=exif)
    whole = decode_image(path, upright=upright)
    left, top, width, height = random_box(np.random.default_rng(5), *whole.size, min_area=0.2)
    box = whole.crop((left, top, left + width, top + height))
    expected = box.resize((24, 24), Image.Resampling.BILINEAR)
    found = decode_crop(path, 24, np.random.default_rng(5), min_area=0.2, upright=upright)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("size", "part"), [(76, 1), (75, 2), (38, 2), (37, 4), (19, 4), (18, 8), (2, 8)])
def test_the_resolution_that_a_photograph_is_decoded_at(tmp_path, size, part):
    """Of a box of 400 x 300 pixels: the least of those that leave it twice the asked pixels."""
    path = tmp_path / "image.jpg"
    noise(800, 640).save(path)
    with Image.open(path) as image:
        image.draft(None, (800 // part, 640 // part))
        smaller = image.convert("RGB")
    assert smaller.size == (800 // part, 640 // part)
    place = Script((400 * 300 / (800 * 640), 4 / 3))
    found = decode_crop(path, size, place, min_area=0.1)
    box = smaller.crop(tuple(round(side / part) for side in (400, 340, 800, 640)))
    np.testing.assert_array_equal(found, box.resize((size, size), Image.Resampling.BILINEAR))


def test_large_photographs_are_decoded_at_lower_resolution(tmp_path):
    """The result is another than that of decoding them whole, and hardly so."""
    path = tmp_path / "image.jpg"
    noise(1600, 1200).save(path, quality=95)
    left, top, width, height = random_box(np.random.default_rng(1), 1600, 1200, min_area=0.5)
    box = decode_image(path).crop((left, top, left + width, top + height))
    whole = np.asarray(box.resize((64, 64), Image.Resampling.BILINEAR), float)
    found = np.asarray(decode_crop(path, 64, np.random.default_rng(1), min_area=0.5), float)
    assert 0 < np.abs(found - whole).mean() < 1.5
    moved = np.asarray(decode_crop(path, 64, np.random.default_rng(2), min_area=0.5), float)
    assert np.abs(moved - whole).mean() > 15
