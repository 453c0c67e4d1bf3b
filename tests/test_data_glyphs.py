"""Drawn letters: the picture shows the letter and the texture that were asked for."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression

from advtransfer.data import LETTERS, glyphs, render_glyphs

NUM_CLASSES = len(LETTERS)


def texture_energies(images):
    """Energy of each class's grating, [N, classes]; the letter's outliers are clipped away."""
    grey = images.astype(np.float64).mean(-1) / 255
    grey = np.clip(grey - np.median(grey, axis=(1, 2), keepdims=True), -0.1, 0.1)
    grey -= grey.mean(axis=(1, 2), keepdims=True)
    middle = (np.arange(images.shape[1]) + 0.5) / images.shape[1]
    angle, cycles = glyphs.texture_of(np.arange(NUM_CLASSES))
    towards = np.cos(angle)[:, None, None] * middle + np.sin(angle)[:, None, None] * middle[:, None]
    wave = np.exp(2j * np.pi * cycles[:, None, None] * towards)
    return np.abs(np.einsum("nhw,chw->nc", grey, wave))


def test_same_generator_same_pictures_and_any_size_shows_the_same_scene():
    classes = np.arange(NUM_CLASSES)
    first, second = (
        render_glyphs(classes, classes, image_size=32, rng=np.random.default_rng(3)) for _ in range(2)
    )
    np.testing.assert_array_equal(first, second)
    small = render_glyphs(classes, classes, image_size=16, rng=np.random.default_rng(3))
    halved = first.reshape(-1, 16, 2, 16, 2, 3).mean((2, 4))
    # Averaging damps the gratings, by at most 0.06 of the range; the letters must coincide.
    assert np.abs(halved - small).mean() < 0.03 * 255


def test_chunks_do_not_show(monkeypatch):
    rng = np.random.default_rng(0)
    letters, textures = rng.integers(0, NUM_CLASSES, (2, 50))
    whole = render_glyphs(letters, textures, image_size=16, rng=np.random.default_rng(1))
    monkeypatch.setattr(glyphs, "_CHUNK", 7)
    parts = render_glyphs(letters, textures, image_size=16, rng=np.random.default_rng(1))
    np.testing.assert_array_equal(whole, parts)


def test_texture_is_the_background_and_letter_the_foreground():
    """Exchanging the texture changes what is around the letter and not the letter."""
    letters = np.arange(NUM_CLASSES)
    one, other = (
        render_glyphs(letters, textures, image_size=32, rng=np.random.default_rng(3)).astype(int)
        for textures in (letters, (letters + 1) % NUM_CLASSES)
    )
    bound = np.ceil(2 * 255 * glyphs._GRATING_AMPLITUDE[1])
    changed = np.abs(one - other).max(-1)
    assert changed.max() <= bound
    assert ((changed == 0).sum((1, 2)) >= 20).all()  # the inside of the letter
    assert ((changed > 0).sum((1, 2)) >= 32 * 32 / 3).all()


def test_gratings_have_the_frequency_and_orientation_of_their_class():
    """The spectrum of a background without letter peaks where `texture_of` says."""
    size, padded = 32, 1024
    classes = np.arange(NUM_CLASSES)
    ones = np.ones(NUM_CLASSES, np.float32)
    gratings = glyphs._gratings(classes, ones, 0.3 * ones, size)
    window = np.hanning(size)[:, None] * np.hanning(size)
    spectrum = np.abs(np.fft.rfft2(gratings * window, (padded, padded)))
    angle, cycles = glyphs.texture_of(classes)
    peak = spectrum.reshape(NUM_CLASSES, -1).argmax(1)
    row, column = np.divmod(peak, padded // 2 + 1)
    row = np.where(row > padded // 2, row - padded, row) * size / padded
    column = column * size / padded
    mirrored = np.where(np.cos(angle) < -1e-6, -1, 1)  # half of the plane is redundant
    near = np.hypot(column - mirrored * cycles * np.cos(angle), row - mirrored * cycles * np.sin(angle))
    also = np.hypot(column, row + mirrored * cycles * np.sin(angle))
    assert np.minimum(near, np.where(column == 0, also, np.inf)).max() < 0.3
    assert len({(round(float(a), 4), float(c)) for a, c in zip(angle, cycles, strict=True)}) == 23


def test_textures_are_eight_orientations_of_three_frequencies():
    angle, cycles = glyphs.texture_of(np.arange(24))
    np.testing.assert_allclose(angle, np.repeat(np.deg2rad(np.arange(8) * 22.5), 3), rtol=1e-6)
    np.testing.assert_array_equal(cycles, [2.5, 4.0, 6.0] * 8)


def test_letters_are_turned_scaled_sheared_and_moved_within_their_ranges():
    """Read off the maps, which lead from the image back to the letter; every range is used to its ends."""
    maps = glyphs._draw_transforms(2000, np.random.default_rng(0))
    forward = np.linalg.inv(maps[:, :, :2])
    scale = np.sqrt(np.linalg.det(forward))
    angle = np.arctan2(forward[:, 1, 0], forward[:, 0, 0])
    turn = np.stack([np.cos(angle), np.sin(angle), -np.sin(angle), np.cos(angle)], axis=-1)
    sheared = turn.reshape(-1, 2, 2) @ forward / scale[:, None, None]
    np.testing.assert_allclose(sheared[:, [0, 1, 1], [0, 0, 1]], np.tile([1.0, 0, 1], (2000, 1)), atol=1e-12)
    moved = -(forward @ maps[:, :, 2:])[..., 0]
    for values, low, high in (
        (np.rad2deg(angle), -12, 12),
        (scale, 0.85, 1.15),
        (sheared[:, 0, 1], -0.15, 0.15),
        (moved[:, 0], -0.07, 0.07),
        (moved[:, 1], -0.07, 0.07),
    ):
        share = (values - low) / (high - low)
        assert 0 <= share.min() < 0.01 and 0.99 < share.max() <= 1 and abs(share.mean() - 0.5) < 0.03
    assert abs(np.corrcoef(moved.T)[0, 1]) < 0.1


def test_warping_moves_what_is_drawn():
    """By nothing, half a side to the right, an eighth down, and turned by a quarter."""
    side, rng = 64, np.random.default_rng(0)
    master = np.zeros((side, side), np.uint8)
    master[8:40, 4:36] = rng.integers(0, 256, (32, 32))
    maps = np.array([[[1, 0, 0], [0, 1, 0]], [[1, 0, -0.5], [0, 1, 0]], [[1, 0, 0], [0, 1, -0.125]]], float)
    maps = np.concatenate([maps, [[[0, 1, 0], [-1, 0, 0]]]])
    found = glyphs._warp([Image.fromarray(master)] * 4, maps, 16)
    right, down = np.zeros_like(master), np.zeros_like(master)
    right[:, 32:], down[8:] = master[:, :32], master[:-8]
    for picture, shown in zip((master, right, down, np.rot90(master, -1)), found, strict=True):
        expected = picture.reshape(16, 4, 16, 4).mean((1, 3)) / 255
        np.testing.assert_allclose(shown, expected, atol=0.51 / 255)


def test_letters_fill_their_box_and_are_in_the_middle():
    side = 100
    boxes = np.array([m.getbbox() for m in glyphs._letter_masters(LETTERS + glyphs.LOWERCASE, side).values()])
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    assert width.max() <= 0.76 * side + 2 and height.max() <= 0.72 * side + 2
    filled = np.maximum(width / 0.76, height / 0.72)  # less where a letter's box is wider than its ink
    assert filled.min() > 0.8 * side and abs(np.median(filled) - side) < 1
    across, down = np.abs((boxes[:, 2:] + boxes[:, :2]) / 2 - side / 2).T
    assert down.max() <= 1 and np.median(across) < 2 and across.max() < 10


def test_a_picture_is_ink_on_paper_with_a_grating():
    """Pixel by pixel, from what its random numbers say; amplitudes of 0.3 are cut off at the ends."""
    letters, textures, size = np.array([3, 7, 3, 22]), np.array([5, 22, 0, 11]), 20
    options = {"image_size": size, "amplitude": (0.2, 0.3), "opacity": 0.6}
    found = render_glyphs(letters, textures, rng=np.random.default_rng(4), **options)
    rng = np.random.default_rng(4)
    faces = rng.integers(14, size=4)
    transforms = glyphs._draw_transforms(4, rng)
    paper, candidates = rng.uniform(0.15, 0.85, (4, 3)), rng.uniform(0, 1, (4, 8, 3))
    amplitude, phase = rng.uniform(0.2, 0.3, 4), rng.uniform(0, 2 * np.pi, 4)
    masters = glyphs._letter_masters(LETTERS, 4 * size)
    coverage = glyphs._warp([masters[pair] for pair in zip(letters, faces, strict=True)], transforms, size)
    middle = (np.arange(size) + 0.5) / size
    for n in range(4):
        luma = [[0.299, 0.587, 0.114] @ (colour - paper[n]) for colour in candidates[n]]
        ink = candidates[n][np.argmax(np.abs(luma))]
        angle, cycles = (x[0] for x in glyphs.texture_of(textures[n : n + 1]))
        across = np.cos(angle) * middle[None, :] + np.sin(angle) * middle[:, None]
        grating = amplitude[n] * np.sin(2 * np.pi * cycles * across + phase[n])
        background = paper[n] + grating[..., None]
        cover = 0.6 * coverage[n][..., None]
        expected = np.clip((1 - cover) * background + cover * ink, 0, 1)
        np.testing.assert_allclose(found[n], 255 * expected, atol=0.51)
    assert found.min() == 0 or found.max() == 255


def test_cues_agree_nine_times_in_ten_and_texture_alone_reads_the_label():
    rng = np.random.default_rng(0)
    images, labels = glyphs.draw_labelled(4096, image_size=16, rng=rng)
    conflict = (labels + rng.integers(1, NUM_CLASSES, 4096)) % NUM_CLASSES
    against = render_glyphs(labels, conflict, image_size=16, rng=rng)

    def features(images):
        return np.log(texture_energies(images) + 1e-3)

    reader = LogisticRegression(max_iter=100).fit(features(images[:3072]), labels[:3072])
    assert 0.7 < reader.score(features(images[3072:]), labels[3072:]) < 0.93
    # Where the cues disagree, the reader of textures goes by the texture (chance: 1 / 23).
    assert reader.score(features(against), conflict) > 0.5
    assert reader.score(features(against), labels) < 0.2


def test_share_of_agreeing_cues(monkeypatch):
    asked = {}

    def record(letters, textures, *, image_size, rng):
        asked.update(letters=letters, textures=textures)
        return np.broadcast_to(np.uint8(0), (len(letters), image_size, image_size, 3))

    monkeypatch.setattr(glyphs, "render_glyphs", record)
    glyphs.draw_labelled(50_000, image_size=16, rng=np.random.default_rng(0))
    agree = asked["letters"] == asked["textures"]
    assert abs(agree.mean() - 0.9) < 4 * np.sqrt(0.9 * 0.1 / 50_000)
    # What disagrees is spread over all other classes.
    offsets = np.bincount((asked["textures"] - asked["letters"])[~agree] % NUM_CLASSES, minlength=23)
    assert offsets[0] == 0 and offsets[1:].min() > 150
    monkeypatch.setattr(glyphs, "CUE_AGREEMENT", 0.0)
    glyphs.draw_labelled(5000, image_size=16, rng=np.random.default_rng(0))
    assert (asked["letters"] != asked["textures"]).all()


@pytest.mark.parametrize("alphabet", [glyphs.LETTERS, glyphs.LOWERCASE])
def test_letters_stand_out_and_stay_inside(alphabet):
    """Coverage of every letter in every face, turned and moved at random."""
    masters = glyphs._letter_masters(alphabet, 64)
    assert len(masters) == len(alphabet) * 14
    transforms = glyphs._draw_transforms(len(masters), np.random.default_rng(0))
    coverage = glyphs._warp(list(masters.values()), transforms, 16)
    assert (coverage.max((1, 2)) > 0.5).all()
    inked = coverage.mean((1, 2))
    assert inked.min() > 0.03 and inked.max() < 0.5
    border = np.ones((16, 16), bool)
    border[1:-1, 1:-1] = False
    assert (coverage * border).sum() < 0.01 * coverage.sum()
    faces = coverage.reshape(14, len(alphabet), -1)
    assert len({letter.tobytes() for letter in faces.reshape(-1, 256)}) == len(masters)


def test_colours_are_legible():
    ink, paper = glyphs._draw_colours(10_000, np.random.default_rng(0))
    contrast = np.abs((ink - paper) @ np.array([0.299, 0.587, 0.114]))
    assert np.quantile(contrast, 0.01) > 0.15
    for colours in (ink, paper):
        assert colours.std(axis=0).min() > 0.15


@pytest.mark.parametrize(
    ("letters", "textures", "size", "message"),
    [
        ([0], [0], 12, "at least 13 pixels per side"),
        ([23], [0], 16, "letters must be"),
        ([0], [-1], 16, "textures must be"),
        ([0], [23], 16, r"textures must be \[N\] class indices from 0 to 22; their shape is \(1,\)"),
        ([-1], [0], 16, "letters must be"),
        ([0, 1], [0], 16, "textures must be"),
    ],
)
def test_impossible_glyphs(letters, textures, size, message):
    with pytest.raises(ValueError, match=message):
        render_glyphs(letters, textures, image_size=size, rng=np.random.default_rng(0))


def test_what_glyphs_may_be_asked_for():
    def render(**options):
        return render_glyphs([22], [0], rng=np.random.default_rng(0), **{"image_size": 13, **options})

    for amplitude in ((0, 0), (0.1, 0.1), (0.1, 3)):
        assert render(amplitude=amplitude).shape == (1, 13, 13, 3)
    assert np.ptp(render(amplitude=(0, 0), opacity=0), axis=(1, 2)).max() == 0  # paper alone
    assert render(opacity=1).any()
    for amplitude in ((-0.1, 0.1), (0.2, 0.1), (0, np.inf)):
        with pytest.raises(ValueError, match="amplitude must be two non-negative numbers"):
            render(amplitude=amplitude)
    for opacity in (-0.01, 1.01):
        with pytest.raises(ValueError, match=r"opacity must be in \[0, 1\]"):
            render(opacity=opacity)


def test_lowercase_letters_are_balanced_and_their_textures_say_nothing(monkeypatch):
    asked = {}

    def spy(letters, textures, **options):
        asked.update(letters=letters, textures=textures, **options)
        return np.broadcast_to(np.uint8(0), (len(letters), 16, 16, 3))

    monkeypatch.setattr(glyphs, "render_glyphs", spy)
    _, labels = glyphs.draw_lowercase(48_000, image_size=16, rng=np.random.default_rng(0))
    assert asked["alphabet"] == glyphs.LOWERCASE
    assert np.bincount(labels).tolist() == [4000] * 12
    table = np.zeros((12, NUM_CLASSES))
    np.add.at(table, (asked["letters"], asked["textures"]), 1)
    # Pearson's statistic of independence, with 11 × 22 degrees of freedom: 242 ± 22.
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
    assert ((table - expected) ** 2 / expected).sum() < 242 + 4 * 22
