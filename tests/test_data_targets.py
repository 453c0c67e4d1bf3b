"""The papers' targets and augmentations: names that TFDS has, and random resized crops against Pillow."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from advtransfer import config as base
from advtransfer.config import ConfigError, read
from advtransfer.data import (
    AUGMENTATIONS,
    TARGETS,
    Augmentation,
    augment,
    choose_augmentation,
    transforms,
)
from advtransfer.data.targets import BY_HAND, DOWNLOAD_MB, IMAGENET

ALL = [(study, name) for study, targets in TARGETS.items() for name in targets]


def test_the_papers_sets_are_there():
    assert sorted(TARGETS["utrera"]) == ["cifar10", "cifar100", "fashion_mnist", "kmnist", "mnist", "svhn"]
    assert len(TARGETS["salman"]) == 12
    per_class = {name for name, target in TARGETS["salman"].items() if target.metric == "mean_per_class"}
    assert per_class == {"aircraft", "caltech101", "caltech256", "flowers", "pets"}


@pytest.mark.parametrize(("study", "name"), ALL)
def test_targets_are_as_tfds_describes_them(study, name):
    target = TARGETS[study][name]
    assert target.augmentation in AUGMENTATIONS
    if not target.dataset:
        return  # a folder that the user makes
    prefix, _, rest = target.dataset.partition(":")
    builder = tfds.builder(rest.partition(":")[0], try_gcs=False)
    assert prefix == "tfds" and builder.info.features["label"].num_classes == target.num_classes
    side, _, num_channels = builder.info.features["image"].shape
    assert (side, num_channels) == (target.side, target.num_channels)


@pytest.mark.parametrize("name", DOWNLOAD_MB)
def test_downloads_are_the_files_that_tfds_lists(name):
    """All of them, but of two sets the files of older versions."""
    builder = tfds.builder(name, try_gcs=False)
    older = {"caltech101": "drive.google.com", "cars196": "http://imagenet.stanford"}.get(name, "nowhere")
    listed = sum(info.size for url, info in builder.url_infos.items() if older not in url)
    if name == "imagenet2012":
        assert listed / 1e6 == pytest.approx(DOWNLOAD_MB[name], abs=1)
    else:
        assert DOWNLOAD_MB[name] == round(listed / 1e6)
    assert (name in BY_HAND) == bool(builder.MANUAL_DOWNLOAD_INSTRUCTIONS)


def test_imagenet_has_the_classes_of_its_set():
    info = tfds.builder("imagenet2012", try_gcs=False).info
    assert info.features["label"].num_classes == IMAGENET.num_classes
    assert (IMAGENET.num_train, IMAGENET.num_test) == (1_281_167, 50_000)  # ILSVRC 2012, train and val


# Images of the whole sets, training and test, and of each class in training where all classes have as many.
SIZES = {
    **{"cifar10": (60_000, 5_000), "cifar100": (60_000, 500), "svhn": (99_289, None)},
    **{name: (70_000, 6_000) for name in ("mnist", "fashion_mnist", "kmnist")},
    **{"aircraft": (10_000, 66.67), "birdsnap": (40_848, None), "caltech101": (9_144, 30)},
    **{"caltech256": (30_607, 60), "cars": (16_185, None), "dtd": (5_640, 80), "flowers": (8_189, 20)},
    **{"food": (101_000, 750), "pets": (7_349, None), "sun397": (39_700, 50)},
}


@pytest.mark.parametrize(("study", "name"), ALL)
def test_targets_have_the_images_of_their_sets(study, name):
    target, (images, of_a_class) = TARGETS[study][name], SIZES[name]
    assert target.num_train + target.num_test == images
    if of_a_class:
        assert target.num_train == round(target.num_classes * of_a_class)
    else:
        train = {"svhn": 73_257, "birdsnap": 32_677, "cars": 8_144, "pets": 3_680}
        assert target.num_train == train[name]
    if not target.dataset:  # others are compared with TFDS
        assert target.num_classes == {"aircraft": 100, "birdsnap": 500, "caltech256": 257}[name]


def test_resized_crops_are_pillows():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 24, 32, 3), dtype=np.uint8)
    sides = np.stack([rng.integers(1, 25, 40), rng.integers(1, 33, 40)], axis=1)
    corners = np.floor(rng.random((40, 2)) * (np.array([24, 32]) - sides + 1)).astype(int)
    sides[0], corners[0] = (24, 32), (0, 0)
    boxes = np.concatenate([corners, sides], axis=1).astype(np.float32)
    found = np.asarray(transforms.resized_crop_at(transforms.to_float(images), boxes)) * 255
    for image, new, (top, left, height, width) in zip(images, found, boxes.astype(int).tolist(), strict=True):
        cut = Image.fromarray(image).crop((left, top, left + width, top + height))
        expected = np.asarray(cut.resize((32, 24), Image.Resampling.BILINEAR))
        np.testing.assert_allclose(new, expected, atol=1.01)  # Pillow rounds after each direction
    np.testing.assert_allclose(found[0], images[0], atol=1e-3)


def test_random_boxes_have_torchvisions_areas_and_ratios(monkeypatch):
    """Every box is inside; areas reach from the smallest share to nearly 1, ratios from 3/4 to 4/3."""
    monkeypatch.setattr(transforms, "resized_crop_at", lambda images, boxes: boxes)

    def draw(keys):
        crop = inspect.unwrap(transforms.random_resized_crop)  # without the check that it returns images
        return crop(keys, jnp.zeros((len(keys), 100, 100, 3)), min_area=0.08)

    boxes = jax.jit(draw)(jax.random.split(jax.random.key(0), 4000))
    top, left, height, width = np.asarray(boxes).T
    assert (
        (top >= 0).all() and (left >= 0).all() and (top + height <= 100).all() and (left + width <= 100).all()
    )
    share, ratio = height * width / 1e4, width / height
    assert 0.075 < share.min() < 0.1 and share.max() > 0.95
    assert 0.73 < ratio.min() < 0.77 and 1.3 < ratio.max() < 1.37
    # The first of ten tries that fits, simulated: large boxes of odd ratios are rejected more often.
    rng = np.random.default_rng(0)
    areas, ratios = (
        rng.uniform(0.08, 1, (40000, 10)),
        np.exp(rng.uniform(*np.log([3 / 4, 4 / 3]), (40000, 10))),
    )
    fits = (np.rint(100 * np.sqrt(areas * ratios)) <= 100) & (np.rint(100 * np.sqrt(areas / ratios)) <= 100)
    first = fits.argmax(axis=1)[:, None]
    expected = np.take_along_axis(areas, first, axis=1)[:, 0]
    levels = [0.1, 0.25, 0.5, 0.75, 0.9]
    np.testing.assert_allclose(np.quantile(share, levels), np.quantile(expected, levels), atol=0.03)
    free = (height < 90) & (width < 90)
    np.testing.assert_allclose(np.mean(top[free] / (100 - height[free])), 0.5, atol=0.02)


def test_salmans_augmentation_crops_and_flips():
    images = np.random.default_rng(0).random((64, 16, 16, 3), np.float32)
    keys = jax.random.split(jax.random.key(0), 64)
    changed = np.asarray(jax.jit(augment, static_argnums=2)(keys, images, AUGMENTATIONS["salman"]))
    assert changed.shape == images.shape and (np.abs(changed - images).max(axis=(1, 2, 3)) > 0.1).all()
    np.testing.assert_array_equal(augment(keys, images, AUGMENTATIONS["none"]), images)


@pytest.mark.parametrize("stage", ["train", "transfer"])
def test_presets_are_chosen_by_name(stage):
    config = base.default()
    keys, part = config[stage].augmentation, {"train": "training", "transfer": "recipe"}[stage]

    def chosen():
        return choose_augmentation(getattr(read(config), part).augmentation)

    assert chosen() == Augmentation()
    for name, augmentation in AUGMENTATIONS.items():
        keys.preset = name
        assert chosen() == augmentation
    keys.preset, keys.jitter = "", 0.25
    assert chosen() == Augmentation(jitter=0.25)
    keys.preset = "salman"
    with pytest.raises(ConfigError, match=rf"{stage}.augmentation.preset=salman cannot be combined"):
        chosen()
    keys.preset, keys.jitter = "utrera_grey", 0.0
    with pytest.raises(ConfigError, match="must be one of '', none, utrera, utrera_color"):
        chosen()


def test_utreras_preset_looks_at_the_targets_images():
    utrera = Augmentation(preset="utrera")
    grey = np.repeat(np.arange(4 * 5 * 5, dtype=np.uint8).reshape(4, 5, 5, 1), 3, axis=-1)
    coloured = grey.copy()
    coloured[3, 4, 4, 1] += 1
    for images, name in ((grey, "none"), (coloured, "utrera_color")):
        assert choose_augmentation(utrera, images) == AUGMENTATIONS[name]
    with pytest.raises(ValueError, match="preset=utrera depends on the images"):  # streamed ones, say
        choose_augmentation(utrera)
