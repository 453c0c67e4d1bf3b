"""Drawn letters: the picture shows the letter and the texture that were asked for."""

from __future__ import annotations

import numpy as np
import pytest
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

    monkeypatch.setattr(glyphs, "render_glyphs", record)
    glyphs.draw_labelled(50_000, image_size=16, rng=np.random.default_rng(0))
    agree = asked["letters"] == asked["textures"]
    assert abs(agree.mean() - 0.9) < 4 * np.sqrt(0.9 * 0.1 / 50_000)
    # What disagrees is spread over all other classes.
    offsets = np.bincount((asked["textures"] - asked["letters"])[~agree] % NUM_CLASSES, minlength=23)
    assert offsets[0] == 0 and offsets[1:].min() > 150


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
        ([0], [0], 12, "13 pixels or more a side"),
        ([23], [0], 16, "letters must be"),
        ([0], [-1], 16, "textures must be"),
        ([0, 1], [0], 16, "textures must be"),
    ],
)
def test_impossible_glyphs(letters, textures, size, message):
    with pytest.raises(ValueError, match=message):
        render_glyphs(letters, textures, image_size=size, rng=np.random.default_rng(0))


def test_lowercase_letters_are_balanced_and_their_textures_say_nothing(monkeypatch):
    asked = {}

    def spy(letters, textures, **options):
        asked.update(letters=letters, textures=textures, **options)
        return np.zeros((len(letters), 1, 1, 3), np.uint8)

    monkeypatch.setattr(glyphs, "render_glyphs", spy)
    _, labels = glyphs.draw_lowercase(48_000, image_size=16, rng=np.random.default_rng(0))
    assert asked["alphabet"] == glyphs.LOWERCASE
    assert np.bincount(labels).tolist() == [4000] * 12
    table = np.zeros((12, NUM_CLASSES))
    np.add.at(table, (asked["letters"], asked["textures"]), 1)
    # Pearson's statistic of independence, with 11 × 22 degrees of freedom: 242 ± 22.
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
    assert ((table - expected) ** 2 / expected).sum() < 242 + 4 * 22
