"""Transforms on the device, against plain NumPy, SciPy and Pillow."""

from __future__ import annotations

import functools
import inspect
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy import ndimage

from advtransfer.data import Augmentation, augment, make_batch, resize, to_float, transforms

pytestmark = pytest.mark.usefixtures("unoptimised")

PAPER = Augmentation(crop_padding=4, flip=True, jitter=0.25, rotation=2.0)


def keys_for(num, seed=0):
    return jax.random.split(jax.random.key(seed), num)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).random((6, 12, 10, 3), np.float32)


RANDOM = {
    name: jax.jit(functools.partial(transform, **options))
    for name, transform, options in (
        ("crop", transforms.random_crop, {"padding": 3}),
        ("resized_crop", transforms.random_resized_crop, {"min_area": 0.1}),
        ("flip", transforms.random_flip, {}),
        ("jitter", transforms.color_jitter, {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4}),
        ("rotation", transforms.random_rotation, {"degrees": 20.0}),
        ("lighting", transforms.random_lighting, {"scale": 0.5}),
        ("augment", augment, {"augmentation": PAPER}),
    )
}


@pytest.mark.parametrize("transform", RANDOM.values(), ids=RANDOM)
def test_random_transforms_depend_on_the_image_and_its_key_alone(transform, images):
    keys = keys_for(len(images))
    together = transform(keys, images)
    chex.assert_type(together, jnp.float32)
    chex.assert_equal_shape([together, images])
    assert float(jnp.abs(together - images).max()) > 0.05
    assert float(together.min()) >= 0 and float(together.max()) <= 1
    order = np.array([4, 1, 5])
    chex.assert_trees_all_close(transform(keys[order], images[order]), together[order], atol=1e-6)


@pytest.mark.parametrize("transform", RANDOM.values(), ids=RANDOM)
def test_each_image_gets_its_own_draw(transform, images):
    same = np.broadcast_to(images[:1], (32, *images.shape[1:]))
    out = np.asarray(transform(keys_for(32), same))
    assert len({image.tobytes() for image in out}) >= (2 if transform is RANDOM["flip"] else 16)


def test_to_float():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    chex.assert_trees_all_close(to_float(pixels), (pixels / 255).astype(np.float32), rtol=1e-7)


@pytest.mark.parametrize("size", [2, 4, 7, 11, 12, 16, 33, 60])
def test_resize_is_pillows_bilinear(size, images):
    def pillow(channel):
        return np.asarray(Image.fromarray(channel).resize((size, size), Image.Resampling.BILINEAR))

    expected = [[pillow(image[..., c]) for c in range(3)] for image in images]
    chex.assert_trees_all_close(resize(images, size), np.moveaxis(np.array(expected), 1, -1), atol=1e-5)


def test_what_is_white_stays_white_and_is_no_brighter():
    """However the weights of a filter are rounded."""
    white = jnp.ones((40, 9, 13, 3))
    rng = np.random.default_rng(0)
    sides = np.stack([rng.integers(1, 10, 40), rng.integers(1, 14, 40)], axis=1)
    corners = np.floor(rng.random((40, 2)) * (np.array([9, 13]) - sides + 1))
    boxes = jnp.asarray(np.concatenate([corners, sides], axis=1), jnp.float32)
    for found in (
        jax.jit(transforms.resized_crop_at)(white, boxes),
        jax.jit(resize, static_argnums=1)(white, 31),
    ):
        assert found.max() <= 1
        np.testing.assert_allclose(found, 1, atol=1e-6)


@pytest.fixture
def draw_boxes(monkeypatch):
    """Of so many images: top, left, height and width of what random resized crops cut out."""
    monkeypatch.setattr(transforms, "resized_crop_at", lambda images, boxes: boxes)

    def draw(num, height, width, min_area):
        images = jnp.zeros((num, height, width, 3))
        drawn = inspect.unwrap(transforms.random_resized_crop)  # without the check that it returns images
        crop = jax.jit(functools.partial(drawn, min_area=min_area))
        return np.asarray(crop(keys_for(num), images)).astype(int).T

    return draw


def test_every_place_of_a_box_is_drawn_and_none_outside(draw_boxes):
    """In images of 4 x 5 pixels, of which boxes of 2 to 4 rows and 2 to 5 columns are cut."""
    top, left, height, width = draw_boxes(4000, 4, 5, 0.2)
    assert {*zip(height, top, strict=True)} == {(h, t) for h in (2, 3, 4) for t in range(5 - h)}
    assert {*zip(width, left, strict=True)} == {(w, x) for w in (2, 3, 4, 5) for x in range(6 - w)}
    small = (height == 2) & (width == 2)  # rows and columns are drawn apart
    assert len({*zip(top[small], left[small], strict=True)}) == 3 * 4
    top, left, height, width = draw_boxes(500, 1, 10, 0.02)  # of one line a box without area is no box
    assert {*top} == {0} and {*height} == {1} and {*width} == {1, 2, 10}


def test_where_none_of_ten_boxes_fits_the_image_is_taken(draw_boxes):
    """As often as ten tries fail; nine and eleven would do so more and less often."""
    num, height, width = 20_000, 10, 40
    boxes = draw_boxes(num, height, width, 0.05)
    whole = np.mean((boxes == np.array([0, 0, height, width])[:, None]).all(0))
    rng = np.random.default_rng(0)
    area = height * width * rng.uniform(0.05, 1, 400_000)
    ratio = np.exp(rng.uniform(*np.log([3 / 4, 4 / 3]), 400_000))
    fails = np.mean(np.rint(np.sqrt(area / ratio)) > height)
    tolerance = 4 * np.sqrt(fails**10 / num)
    assert abs(whole - fails**10) < tolerance < min(fails**9 - fails**10, fails**10 - fails**11) / 2


def test_crop_at_every_offset(images):
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    for y, x in itertools.product(range(5), repeat=2):
        offsets = jnp.tile(jnp.array([y, x]), (len(images), 1))
        expected = padded[:, y : y + 12, x : x + 10]
        chex.assert_trees_all_equal(transforms.crop_at(images, offsets, padding=2), expected)


def test_crop_offsets_are_uniform():
    """A single white pixel shows where each of 8,100 crops was taken: 81 places, 100 each."""
    num = 8100
    images = np.zeros((num, 9, 9, 3), np.float32)
    images[:, 4, 4] = 1
    out = np.asarray(transforms.random_crop(keys_for(num), images, padding=4))
    counts = (out[..., 0] == 1).sum(axis=0)
    assert counts.sum() == num
    assert 40 < ((counts - 100) ** 2 / 100).sum() < 140  # chi-square: 80 ± 13


def test_flip(images):
    flipped = np.array([True, False, True, True, False, False])
    expected = np.where(flipped[:, None, None, None], np.flip(images, axis=2), images)
    chex.assert_trees_all_equal(transforms.flip_where(images, flipped), expected)


def test_light_is_a_sum_of_the_components(images):
    """As in MadryLab/robustness: the sum over components of vector × share × value, for every colour."""
    shares = np.random.default_rng(1).normal(0, 0.3, (len(images), 3)).astype(np.float32)
    values, vectors = transforms._PCA_VALUES, transforms._PCA_VECTORS
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=1e-3)  # orthonormal
    expected = images.copy()
    for n, colour, j in itertools.product(range(len(images)), range(3), range(3)):
        expected[n, ..., colour] += vectors[colour, j] * shares[n, j] * values[j]
    out = transforms.light_by(images, shares)
    np.testing.assert_allclose(out, np.clip(expected, 0, 1), atol=1e-6)


def test_flip_rate():
    images = np.zeros((4000, 1, 2, 3), np.float32)
    images[:, :, 1] = 1
    rate = np.asarray(transforms.random_flip(keys_for(4000), images))[:, 0, 0, 0].mean()
    assert abs(rate - 0.5) < 4 * 0.5 / np.sqrt(4000)


def plain_adjust(image, factors, order):
    """One image, written down from torchvision's documentation."""
    luma = np.array([0.299, 0.587, 0.114])
    for which in order:
        if which == 0:
            other = np.zeros_like(image)
        elif which == 1:
            other = np.full_like(image, (image @ luma).mean())
        else:
            other = np.repeat((image @ luma)[..., None], 3, axis=-1)
        image = np.clip(factors[which] * image + (1 - factors[which]) * other, 0, 1)
    return image


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_colour_changes_in_every_order(order, images):
    factors = np.random.default_rng(1).uniform(0.3, 1.7, (len(images), 3))
    out = transforms.adjust_colors(
        images, jnp.array(factors, jnp.float32), jnp.tile(jnp.array(order), (len(images), 1))
    )
    expected = [plain_adjust(x.astype(float), f, order) for x, f in zip(images, factors, strict=True)]
    chex.assert_trees_all_close(out, np.array(expected, np.float32), atol=2e-6)


@pytest.mark.parametrize("which", range(3), ids=["brightness", "contrast", "saturation"])
def test_each_colour_change_is_pillows(which, images):
    """Pillow's ImageEnhance rounds to whole numbers, so it is equal to a step or two of 1/255."""
    enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[which]
    pixels = np.round(images * 255).astype(np.uint8)
    factors = np.ones((len(images), 3), np.float32)
    factors[:, which] = np.linspace(0.2, 1.8, len(images))
    expected = [
        np.asarray(enhance(Image.fromarray(x)).enhance(float(f[which])))
        for x, f in zip(pixels, factors, strict=True)
    ]
    order = jnp.tile(jnp.arange(3), (len(images), 1))
    out = transforms.adjust_colors(to_float(pixels), jnp.asarray(factors), order)
    chex.assert_trees_all_close(255 * out, np.array(expected, np.float32), atol=1.6)


@pytest.mark.parametrize(("brightness", "low", "high"), [(0.3, 0.7, 1.3), (1.5, 0.0, 2.5)])
def test_jitter_draws_factors_and_orders_uniformly(brightness, low, high):
    """Grey images of one colour show the brightness factor alone, which is never negative."""
    num = 4000
    images = np.full((num, 1, 1, 3), 0.3, np.float32)
    out = transforms.color_jitter(keys_for(num), images, brightness=brightness, contrast=0.5, saturation=0.5)
    factors = np.sort(np.asarray(out)[:, 0, 0, 0] / 0.3)
    distance = np.abs(factors - np.linspace(low, high, num)).max() / (high - low)
    assert distance < 1.63 / np.sqrt(num)  # Kolmogorov-Smirnov at 1 %


def test_jitter_takes_all_six_orders(monkeypatch):
    assert sorted(map(tuple, transforms._ORDERS.tolist())) == sorted(itertools.permutations(range(3)))
    num = 6000
    recorded = {}

    def record(images, factors, order):
        recorded["order"] = np.asarray(order)
        return jnp.asarray(images)

    monkeypatch.setattr(transforms, "adjust_colors", record)
    transforms.color_jitter(keys_for(num), np.zeros((num, 2, 2, 3), np.float32), brightness=0.5)
    _, counts = np.unique(recorded["order"], axis=0, return_counts=True)
    assert len(counts) == 6 and np.abs(counts - 1000).max() < 4 * np.sqrt(1000 * 5 / 6)


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_quarter_turns_are_exact(quarters, images):
    square = images[:, :10]
    out = transforms.rotate_by(square, jnp.full(len(square), 90.0 * quarters))
    chex.assert_trees_all_close(out, np.rot90(square, quarters, axes=(1, 2)), atol=5e-6)


def test_rotation_is_scipys_bilinear(images):
    degrees = np.array([-33.0, -2.0, 0.0, 1.3, 17.0, 111.0], np.float32)
    centre = (np.array(images.shape[1:3]) - 1) / 2

    def plain(image, degree):
        angle = np.deg2rad(float(degree))
        matrix = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        options = {"offset": centre - matrix @ centre, "order": 1, "mode": "grid-constant"}
        channels = [ndimage.affine_transform(image[..., c], matrix, **options) for c in range(3)]
        return np.stack(channels, axis=-1)

    expected = np.stack([plain(*pair) for pair in zip(images, degrees, strict=True)])
    chex.assert_trees_all_close(transforms.rotate_by(images, jnp.asarray(degrees)), expected, atol=1e-5)


def test_rotation_angles_are_uniform():
    """A horizontal ramp shows the angle of each turn in its slope."""
    num = 2000
    ramp = np.linspace(0, 1, 9, dtype=np.float32)[None, None, :, None]
    images = np.broadcast_to(ramp, (num, 9, 9, 3))
    out = np.asarray(transforms.random_rotation(keys_for(num), images, degrees=10.0))
    middle = out[:, 3:6, 3:6, 0]
    angles = np.rad2deg(np.arctan2(middle[:, 0] - middle[:, 2], middle[:, :, 2] - middle[:, :, 0]))
    drawn = np.sort(-angles[:, 1])
    assert np.abs(drawn - np.linspace(-10, 10, num)).max() / 20 < 1.63 / np.sqrt(num)


def test_augment_is_crop_flip_jitter_rotation(images):
    keys = keys_for(len(images))
    chex.assert_trees_all_equal(augment(keys, images, Augmentation()), images)
    crop, flip, jitter, rotation = transforms._split(keys, 4)
    expected = transforms.random_crop(crop, images, padding=4)
    expected = transforms.random_flip(flip, expected)
    strengths = {"brightness": 0.25, "contrast": 0.25, "saturation": 0.25}
    expected = transforms.color_jitter(jitter, expected, **strengths)
    expected = transforms.random_rotation(rotation, expected, degrees=2.0)
    chex.assert_trees_all_close(augment(keys, images, PAPER), expected, atol=1e-6)
    drawn = [np.asarray(jax.random.key_data(part)) for part in (crop, flip, jitter, rotation)]
    assert len({row.tobytes() for part in drawn for row in part}) == 4 * len(images)


def test_robustness_s_augmentation_is_box_flip_jitter_and_lighting(images):
    keys = keys_for(len(images))

    @jax.jit
    def both(keys, images):
        _, flip, jitter, _, box, light = transforms._split(keys, 6)
        expected = transforms.random_flip(flip, transforms.random_resized_crop(box, images, min_area=0.08))
        strengths = {"brightness": 0.1, "contrast": 0.1, "saturation": 0.1}
        expected = transforms.color_jitter(jitter, expected, **strengths)
        expected = transforms.random_lighting(light, expected, scale=0.05)
        return augment(keys, images, transforms.AUGMENTATIONS["robustness"]), expected

    chex.assert_trees_all_close(*both(keys, images), atol=1e-6)


def test_no_augmentation_compiles_to_nothing(images):
    keys = keys_for(len(images))
    lowered = jax.jit(lambda k, x: augment(k, x, Augmentation())).lower(keys, images)
    assert "threefry" not in lowered.compile().as_text()


@pytest.mark.parametrize("image_size", [None, 16])
def test_make_batch(image_size):
    rng = np.random.default_rng(0)
    pixels = jnp.asarray(rng.integers(0, 256, (20, 8, 8, 3), np.uint8))
    labels = jnp.asarray(rng.integers(0, 10, 20, np.int32))
    indices = jnp.array([3, 3, 17, 0])
    keys = keys_for(4)
    make = jax.jit(make_batch, static_argnames=("augmentation", "image_size"))
    batch = make(pixels, labels, indices, keys, augmentation=PAPER, image_size=image_size)
    images = to_float(pixels)[indices]
    if image_size:
        images = resize(images, image_size)
    chex.assert_trees_all_close(batch.images, augment(keys, images, PAPER), atol=1e-6)
    chex.assert_trees_all_equal(batch.labels, labels[indices])
    chex.assert_trees_all_equal(jax.random.key_data(batch.keys), jax.random.key_data(keys))


def test_make_batch_for_several_trials_at_once():
    """vmap over subsets and keys, as a study of many trials does."""
    pixels = jnp.asarray(np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), np.uint8))
    labels = jnp.arange(20, dtype=jnp.int32)
    indices = jnp.array([[1, 2, 3], [4, 5, 6]])
    keys = keys_for(6).reshape(2, 3)
    moved = Augmentation(crop_padding=2, flip=True)
    make = functools.partial(make_batch, pixels, labels, augmentation=moved)
    batches = jax.vmap(make)(indices, keys)
    for trial in range(2):
        one = make(indices[trial], keys[trial])
        chex.assert_trees_all_close(batches.images[trial], one.images, atol=1e-6)
        chex.assert_trees_all_equal(batches.labels[trial], one.labels)


def test_one_key_for_several_images_is_refused(images):
    with pytest.raises(AssertionError):
        transforms.random_flip(jax.random.key(0), images)
