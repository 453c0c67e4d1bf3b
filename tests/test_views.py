"""Views of a target set: what each keeps of an image, and that nothing else about it matters."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from test_layers import ROOT

from advtransfer.data import glyphs, load_dataset, views
from advtransfer.data.views import VIEWS

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 24, 24, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("shape", [(0, 8, 8, 3), (1, 8, 8, 3), (70, 3, 5, 3)])
def test_every_view_keeps_shape_and_type_and_its_input(name, shape):
    images = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    before = images.copy()
    shown = VIEWS[name](images)
    assert shown.shape == shape and shown.dtype == np.uint8
    np.testing.assert_array_equal(images, before)


@pytest.mark.parametrize("name", [name for name in VIEWS if name != "amplitude_swap"])
def test_a_view_of_an_image_does_not_depend_on_the_others(name):
    many = np.concatenate([IMAGES] * 30)[:130]  # more than a thread takes at a time
    np.testing.assert_array_equal(VIEWS[name](many)[127:128], VIEWS[name](many[127:128]))


def test_a_flat_image_has_no_detail_colour_edge_or_figure():
    flat = np.full((2, 8, 8, 3), 77, np.uint8)
    for name in ("low_pass", "grey", "patch_shuffle", "amplitude_swap"):
        np.testing.assert_array_equal(VIEWS[name](flat), flat)
    assert (views.edges(flat) == 0).all() and (views.silhouette(flat) == 255).all()


def test_low_pass_and_grey_are_pillows_scaling_and_the_luma():
    pixels = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    luma = pixels @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(views.grey(pixels[None])[0], np.dstack([luma] * 3), atol=0.51)
    small = Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR)
    (low,) = views.low_pass(pixels[None])
    np.testing.assert_array_equal(low, np.asarray(small.resize((48, 48), Image.Resampling.BILINEAR)))
    assert (low != pixels).any()


def test_patches_are_moved_as_their_order_says_and_can_be_put_back():
    shown = views.patch_shuffle(IMAGES)
    for image, found in zip(IMAGES, shown, strict=True):
        order = views.patch_order(image)
        assert sorted(order) == list(range(16)) and (order != np.arange(16)).any()
        back = np.empty_like(image)
        for place, patch in enumerate(order):
            (row, column), (from_row, from_column) = (divmod(int(i), 4) for i in (place, patch))
            piece = found[6 * row : 6 * row + 6, 6 * column : 6 * column + 6]
            back[6 * from_row : 6 * from_row + 6, 6 * from_column : 6 * from_column + 6] = piece
        np.testing.assert_array_equal(back, image)
    orders = {tuple(views.patch_order(image)) for image in IMAGES}
    assert len(orders) == len(IMAGES)


def test_every_patch_comes_to_every_place():
    pixels = np.random.default_rng(2).integers(0, 256, (3200, 4, 4, 3), dtype=np.uint8)
    orders = np.stack([views.patch_order(image) for image in pixels])
    table = np.stack([np.bincount(orders[:, place], minlength=16) for place in range(16)])
    assert np.abs(table - 200).max() < 5 * np.sqrt(200)


def test_pixels_beyond_a_multiple_of_four_stay():
    image = IMAGES[:1, :23, :22]
    shown = views.patch_shuffle(image)
    np.testing.assert_array_equal(shown[:, 20:], image[:, 20:])
    np.testing.assert_array_equal(shown[:, :, 20:], image[:, :, 20:])
    inside = [np.sort(x[0, :20, :20].reshape(-1)) for x in (shown, image)]
    np.testing.assert_array_equal(*inside)
    assert (shown != image).any()


def test_amplitudes_are_the_partners_and_phases_the_images_own():
    """Of images near enough to grey that nothing is cut off, to within the rounding of pixels."""
    images = np.random.default_rng(3).integers(108, 149, (7, 16, 16, 3), dtype=np.uint8)
    swapped = views.amplitude_swap(images)
    own, found = (np.fft.fft2(x.astype(float), axes=(1, 2)) for x in (images, swapped))
    # Rounding adds up to 1/2 to each of 256 pixels: to a coefficient some 16 * 0.29, at most 5 times that.
    gaps = np.abs(np.abs(found)[:, None] - np.abs(own)[None]).max((2, 3, 4))
    partners = gaps.argmin(1)
    assert (gaps.min(1) < 25).all() and (np.sort(gaps, 1)[:, 1] > 100).all()
    assert sorted(partners) == list(range(7)) and (partners != np.arange(7)).all()
    strong = np.abs(found) > 100
    angle = np.angle(found / np.where(np.abs(own) > 0, own, 1))
    assert strong.mean() > 0.1 and np.abs(angle[strong]).max() < 0.26
    place, cycle = 0, []
    for _ in images:  # one cycle: nobody swaps back with its partner
        cycle.append(place)
        place = partners[place]
    assert place == 0 and sorted(cycle) == list(range(7))


def test_every_image_has_the_same_partner_on_every_machine():
    """Of images of one colour nothing but the partner's amplitude, the colour, is left."""
    flat = np.broadcast_to(np.arange(8, dtype=np.uint8)[:, None, None, None] * 10, (8, 5, 4, 3))
    shown = views.amplitude_swap(flat)
    np.testing.assert_array_equal(shown, flat[[1, 7, 4, 6, 3, 0, 5, 2]])


def test_amplitudes_are_swapped_as_the_whole_plane_of_coefficients_says():
    """With what is cut off at 0 and 255; where an image has no amplitude its phase is 0."""
    flat = np.full((1, 24, 24, 3), 90, np.uint8)
    images = np.concatenate([IMAGES, flat, 255 * (IMAGES[:2] > 127).astype(np.uint8)])
    colours = np.broadcast_to(np.arange(8, dtype=np.uint8)[:, None, None, None], (8, 1, 1, 3))
    partners = views.amplitude_swap(colours)[:, 0, 0, 0]
    own, other = (np.fft.fft2(x.astype(float), axes=(1, 2)) for x in (images, images[partners]))
    phase = np.where(np.abs(own) > 1e-6, np.exp(1j * np.angle(own)), 1)
    expected = np.fft.ifft2(phase * np.abs(other), axes=(1, 2)).real
    assert expected.min() < -10 and expected.max() > 265
    np.testing.assert_allclose(views.amplitude_swap(images), np.clip(expected, 0, 255), atol=0.51)


def test_amplitudes_of_an_image_with_itself_are_the_image():
    np.testing.assert_array_equal(views.amplitude_swap(IMAGES[:1]), IMAGES[:1])


@pytest.mark.parametrize("turned", [False, True])
def test_edges_of_steps_and_ramps(turned):
    step = np.zeros((1, 9, 8, 3), np.uint8)
    step[:, :, 4:] = 90
    ramp = np.broadcast_to(np.arange(8, dtype=np.uint8)[None, None, :, None] * 10, (1, 9, 8, 3)).copy()
    for image, expected in (
        (step, [0, 0, 0, 90, 90, 0, 0, 0]),
        (ramp, [10, 20, 20, 20, 20, 20, 20, 10]),  # a difference of two pixels; the border repeated
    ):
        shown = views.edges(image.swapaxes(1, 2) if turned else image)
        shown = shown.swapaxes(1, 2) if turned else shown
        np.testing.assert_array_equal(shown, np.broadcast_to(np.array(expected)[:, None], shown.shape))
    corner = np.zeros((1, 8, 8, 3), np.uint8)
    corner[:, 4:, 4:] = 255
    shown = views.edges(corner)[0, ..., 0]
    assert shown[3, 3] == round(np.hypot(1 / 4, 1 / 4) * 255)  # of the weights 1, 2, 1 along either axis
    assert shown[4, 3] == shown[3, 4] == round(np.hypot(3 / 4, 1 / 4) * 255)
    assert shown[4, 4] == 255  # 3/4 along both, cut off


def test_thresholds_part_pixels_with_the_largest_variance_between():
    rng = np.random.default_rng(4)
    for _ in range(20):
        luma = np.clip(rng.normal(rng.choice([60, 170], 100), 25), 0, 255).astype(np.uint8)
        between = []
        for t in range(256):
            low, high = luma[luma <= t], luma[luma > t]
            share = len(low) / len(luma)
            apart = low.mean() - high.mean() if len(low) and len(high) else 0.0
            between.append(share * (1 - share) * apart**2)
        assert between[views.otsu_threshold(luma)] == pytest.approx(max(between), rel=1e-9)


@pytest.mark.parametrize("opposite", [False, True])
def test_the_figure_is_black_whether_dark_or_bright(opposite):
    image = np.full((1, 12, 12, 3), 30, np.uint8)
    image[:, 3:9, 4:7] = 200
    image[:, 0, 5] = 200  # it may touch the border
    shown = views.silhouette(255 - image if opposite else image)
    np.testing.assert_array_equal(shown, np.where(image == 200, 0, 255))


def test_the_ground_is_what_more_than_half_of_the_border_shows():
    bright = np.random.default_rng(6).random((300, 5, 4)) < 0.5
    bright[:, 2, 1:3] = False, True  # both are there
    images = np.where(bright[..., None], 200, 30).astype(np.uint8).repeat(3, axis=-1)
    border = np.ones((5, 4), bool)
    border[1:-1, 1:-1] = False
    figure = bright != (bright[:, border].sum(1) > 7)[:, None, None]  # of 14
    np.testing.assert_array_equal(views.silhouette(images)[..., 0], np.where(figure, 0, 255))


def test_the_threshold_of_two_pixels():
    assert views.otsu_threshold(np.uint8([[9, 200]])) == 9
    assert views.otsu_threshold(np.uint8([[0, 255]])) == 0


def test_silhouettes_of_letters_are_their_masks():
    """Against the coverage that the letters are drawn with, whatever their colours and gratings."""
    letters = np.tile(np.arange(23), 10)
    images = glyphs.render_glyphs(letters, letters[::-1], image_size=32, rng=np.random.default_rng(5))
    rng = np.random.default_rng(5)
    faces = rng.integers(len(glyphs._FACES), size=len(letters))
    transforms = glyphs._draw_transforms(len(letters), rng)
    masters = glyphs._letter_masters(glyphs.LETTERS, 32 * 4)
    drawn = [masters[pair] for pair in zip(letters, faces, strict=True)]
    mask = glyphs._warp(drawn, transforms, 32) > 0.5
    found = views.silhouette(images)[..., 0] == 0
    overlap = (mask & found).sum((1, 2)) / (mask | found).sum((1, 2))
    assert np.median(overlap) > 0.95 and (overlap > 0.8).mean() > 0.97


@pytest.mark.process
def test_another_process_with_one_thread_shows_the_same():
    code = (
        "import os; os.cpu_count = lambda: 1\n"
        "import hashlib, numpy as np; from advtransfer.data.views import VIEWS\n"
        "x = np.random.default_rng(0).integers(0, 256, (130, 12, 12, 3), dtype=np.uint8)\n"
        "print([hashlib.sha256(VIEWS[v](x)).hexdigest() for v in VIEWS])"
    )
    there = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True, text=True)
    images = np.random.default_rng(0).integers(0, 256, (130, 12, 12, 3), dtype=np.uint8)
    here = [hashlib.sha256(VIEWS[name](images)).hexdigest() for name in VIEWS]
    assert len(set(here)) == len(VIEWS) and there.stdout.strip() == str(here)


@pytest.mark.parametrize("name", VIEWS)
def test_recorded_and_embedded_sets_are_shown_in_every_view(tmp_path, name):
    """Each as the view of the decoded images, all splits, and cached apart from the other views."""
    for split, count in (("train", 6), ("test", 5)):
        (tmp_path / "set" / split / "a").mkdir(parents=True)
        for i in range(count):
            Image.fromarray(IMAGES[i % 5]).save(tmp_path / "set" / split / f"a/{i}.png")
    for dataset in (f"folder:{tmp_path / 'set'}", "builtin:digits"):

        def load(view, dataset=dataset):
            return load_dataset(dataset, image_size=24, cache_dir=tmp_path / "cache", view=view)

        natural, shown, again = load("natural"), load(name), load(name)
        for split in ("train", "validation", "test"):
            plain, seen, cached = (getattr(x, split) for x in (natural, shown, again))
            np.testing.assert_array_equal(seen.images, VIEWS[name](plain.images))
            np.testing.assert_array_equal(cached.images, seen.images)
            np.testing.assert_array_equal(seen.labels, plain.labels)
        same = all(np.array_equal(shown[i].images, natural[i].images) for i in (2, 3, 4))
        assert (shown.digest("train", "test") == natural.digest("train", "test")) == same
        assert same == (name == "natural" or (name == "grey" and dataset == "builtin:digits"))
