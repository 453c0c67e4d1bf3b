"""Shape against texture: decisions over groups of outputs, their shares, images of two cues."""

import itertools
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import tensorflow_datasets
from jax.tree_util import Partial
from PIL import Image

from advtransfer.analysis.cue_conflict import LETTER_OUTPUTS, glyph_cue_conflict, read_cue_conflict
from advtransfer.analysis.imagenet16 import IMAGENET16
from advtransfer.analysis.shape import decide, half_point, measure, shape_bias
from advtransfer.data import LETTERS, glyphs, render_glyphs
from advtransfer.intervals import share

# WordNet names of the leaves below each category, without the birds and dogs.
WORDNET = {
    "airplane": "n02690373",
    "bear": "n02132136 n02133161 n02134084 n02134418",
    "bicycle": "n02835271 n03792782",
    "boat": "n02951358 n03344393 n03662601 n04273569 n04612504",
    "bottle": "n02823428 n03937543 n03983396 n04557648 n04560804 n04579145 n04591713",
    "car": "n02814533 n03100240 n04285008",
    "cat": "n02123045 n02123159 n02123394 n02123597 n02124075 n02125311",
    "chair": "n02791124 n03376595 n04099969 n04429376",
    "clock": "n02708093 n03196217 n04548280",
    "elephant": "n02504013 n02504458",
    "keyboard": "n03085013 n04505470",
    "knife": "n03041632",
    "oven": "n04111531",
    "truck": "n03345487 n03417042 n03770679 n03796401 n03930630 n03977966 n04461696 n04467665",
}
# Between the first and the last: sorted WordNet names in the order of ILSVRC's classes. Left out are ...
BIRDS = ("n01514859", "n02056570", 49)
DOGS = ("n02085782", "n02113978", 109)


def test_outputs_of_the_16_classes_are_those_of_their_wordnet_names():
    folder = Path(tensorflow_datasets.__file__).parent / "datasets/imagenet2012"
    names = (folder / "labels.txt").read_text().split()
    assert len(names) == 1000 and names == sorted(names)
    assert list(IMAGENET16) == sorted(IMAGENET16) and len(IMAGENET16) == 16
    for category, leaves in WORDNET.items():
        assert [names[output] for output in IMAGENET16[category]] == leaves.split()
    for category, (first, last, count) in (("bird", BIRDS), ("dog", DOGS)):
        outputs = IMAGENET16[category]
        assert (names[outputs[0]], names[outputs[-1]], len(outputs)) == (first, last, count)
        assert list(outputs) == sorted(set(outputs))
    assert len(set(itertools.chain(*IMAGENET16.values()))) == 207
    # Dingo, wolves and foxes, lizards and whales are neither.
    assert not {269, 273, 277, 45, 147} & {*IMAGENET16["dog"], *IMAGENET16["bird"]}


def test_a_decision_is_the_class_of_the_highest_mean_probability():
    """Of hand-made probabilities; the sum, the maximum and the mean of logits would each say otherwise."""
    groups = {"a": [0], "b": (1, 2, 3), "c": [4, 5]}
    probabilities = np.array(
        [
            [0.20, 0.15, 0.15, 0.15, 0.25, 0.02, 0.08],  # means 0.2, 0.15, 0.135; sum b, maximum c
            [0.10, 0.10, 0.10, 0.10, 0.24, 0.001, 0.359],  # c, though its logits' mean is the lowest
            [0.05, 0.10, 0.10, 0.10, 0.01, 0.01, 0.63],  # b; the output of no class does not decide
        ]
    )
    shift = np.array([[0.0], [50.0], [-800.0]])
    np.testing.assert_array_equal(decide(np.log(probabilities) + shift, groups), ["a", "c", "b"])
    np.testing.assert_array_equal(decide(np.zeros((2, 7)), groups), ["a", "a"])
    logits = np.random.default_rng(0).normal(0, 3, (20, 1000)).astype(np.float32)
    for row, found in zip(logits, decide(logits), strict=True):
        softmax = np.exp(row.astype(np.float64)) / np.exp(row.astype(np.float64)).sum()
        means = {name: np.mean([softmax[i] for i in outputs]) for name, outputs in IMAGENET16.items()}
        assert found == max(means, key=means.get)
    for wrong in ([], [7], [-1]):
        with pytest.raises(ValueError, match="class 'c' needs some of the outputs 0 to 6"):
            decide(np.zeros((2, 7)), {"a": [0], "c": wrong})


def test_shares_of_hand_made_decisions():
    shapes = np.array(["cat", "cat", "cat", "cat", "dog", "dog", "cat", "dog", "owl"])
    textures = np.array(["dog", "dog", "owl", "owl", "cat", "cat", "cat", "dog", "cat"])
    decisions = np.array(["cat", "dog", "cat", "bee", "cat", "owl", "cat", "dog", "bee"])
    # Two images have one class for both cues and do not count, though the decision is right.
    found = shape_bias(decisions, shapes, textures)
    overall = found.overall
    assert found.class_names == ("cat", "dog", "owl")
    assert [overall.shape_bias.count, overall.shape_bias.total, overall.shape_bias.value] == [2, 4, 0.5]
    assert [overall.shape.count, overall.texture.count, overall.neither.count] == [2, 2, 3]
    assert overall.shape.total == overall.texture.total == overall.neither.total == 7
    np.testing.assert_allclose(found.per_class.shape.value, [2 / 4, 0, 0])
    np.testing.assert_allclose(found.per_class.texture.value, [1 / 4, 1 / 2, 0])
    np.testing.assert_allclose(found.per_class.neither.value, [1 / 4, 1 / 2, 1])
    np.testing.assert_allclose(found.per_class.shape_bias.value, [2 / 3, 0, np.nan])
    np.testing.assert_array_equal(found.per_class.shape_bias.total, [3, 1, 0])
    with pytest.raises(ValueError, match="no image has the shape of one class and the texture of another"):
        shape_bias(decisions[6:8], shapes[6:8], textures[6:8])


def test_wilson_intervals_against_scipy():
    counts = np.array([0, 1, 7, 50, 99, 100])
    found = share(counts, np.full(6, 100))
    for i, count in enumerate(counts):
        interval = scipy.stats.binomtest(int(count), 100).proportion_ci(method="wilson")
        np.testing.assert_allclose([found.lower[i], found.upper[i]], interval, atol=1e-12)
    np.testing.assert_allclose(found.value, counts / 100)
    totals = np.arange(1, 500)
    none, all_of_them = share(0 * totals, totals), share(totals, totals)
    assert np.all(none.lower >= 0) and np.all(all_of_them.upper <= 1)  # whatever the rounding
    nothing = share(0, 0)
    assert np.isnan(nothing.value)
    np.testing.assert_allclose([nothing.lower, nothing.upper], [0, 1], atol=1e-12)


def test_the_strength_at_which_the_bias_is_one_half():
    assert half_point([0.0, 0.1, 0.3], [1.0, 0.75, 0.25]) == pytest.approx(0.2)
    assert half_point([0.0, 0.1, 0.3], [0.1, 0.5, 0.9]) == pytest.approx(0.1)
    assert np.isnan(half_point([0.0, 0.1], [1.0, 0.6])) and np.isnan(half_point([0.0, 0.1], [0.2, np.nan]))


def _save(folder, name, pixels):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def test_images_of_the_published_layout_are_read_as_they_are(tmp_path):
    names = ["airplane/airplane10-bicycle2.png", "airplane/airplane2-airplane1.png", "bear/bear1-oven3.png"]
    pixels = np.random.default_rng(0).integers(0, 256, (4, 28, 28, 3), dtype=np.uint8)
    folder = tmp_path / "set"
    for name, image in zip([*names, "truck1-car1.png"], pixels, strict=True):
        _save(folder, name, image)
    (folder / "README.txt").touch()
    (folder / "bear/._bear1-oven3.png").touch()
    found = read_cue_conflict(folder, image_size=28, cache_dir=tmp_path)
    np.testing.assert_array_equal(found.images, pixels)
    assert found.files == (*names, "truck1-car1.png")
    assert found.shapes.tolist() == ["airplane", "airplane", "bear", "truck"]
    assert found.textures.tolist() == ["bicycle", "airplane", "oven", "car"]
    smaller = read_cue_conflict(folder, image_size=14, cache_dir=tmp_path).images
    whole = Image.fromarray(pixels[3]).resize((14, 14), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(smaller[3], np.asarray(whole))


def test_any_classes_and_photographs_of_many_sizes(tmp_path):
    stripe = np.zeros((32, 48, 3), np.uint8)
    stripe[:, 0] = 255  # lost by the crop
    _save(tmp_path / "set", "A1-B.png", stripe)
    _save(tmp_path / "set", "B-A22.jpg", np.full((40, 40, 3), 9, np.uint8))
    found = read_cue_conflict(tmp_path / "set", LETTERS, image_size=16, cache_dir=tmp_path)
    assert found.shapes.tolist() == ["A", "B"] and found.textures.tolist() == ["B", "A"]
    assert found.images.shape == (2, 16, 16, 3) and found.images[0].max() == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, "holds no images; expected airplane1-bicycle2.png"),
        ("bear/bear1.png", "bear/bear1.png is not named SHAPE1-TEXTURE2"),
        ("bear1-zebra2.png", "bear1-zebra2.png names the class 'zebra', which is none of airplane, bear"),
        ("bear1-oven2.png", r"1 of 1 test images .* cannot be decoded: bear1-oven2.png"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(tmp_path, name, message):
    folder = tmp_path / "set"
    folder.mkdir()
    if name:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"no picture")
    with pytest.raises(ValueError, match=message) as error:
        read_cue_conflict(folder, image_size=16, cache_dir=tmp_path)
    assert "\n" not in str(error.value)


def test_letters_on_all_other_gratings_and_nothing_else_changes_with_their_strength():
    weak, strong, bare = (glyph_cue_conflict(a, num_repeats=2) for a in (0.02, 0.06, 0.0))
    pairs = list(zip(weak.shapes.tolist(), weak.textures.tolist(), strict=True))
    assert sorted(pairs) == sorted(2 * list(itertools.permutations(LETTERS, 2)))
    assert (
        strong.shapes.tolist() == weak.shapes.tolist() and strong.textures.tolist() == weak.textures.tolist()
    )
    # Colours between 0.15 and 0.85: nothing is cut off, and gratings are added to within rounding.
    once, thrice = (x.images.astype(int) - bare.images.astype(int) for x in (weak, strong))
    assert np.abs(thrice - 3 * once).max() <= 4 and np.abs(thrice).max() >= 14
    again = glyph_cue_conflict(0.02, num_repeats=2)
    np.testing.assert_array_equal(weak.images, again.images)
    assert (glyph_cue_conflict(0.02, num_repeats=2, seed=1).images != weak.images).any(axis=(1, 2, 3)).all()
    assert (bare.images[:506] != bare.images[506:]).any(axis=(1, 2, 3)).all()


def test_letters_fade_into_their_background():
    opaque, half, gone = (glyph_cue_conflict(0.05, opacity).images.astype(int) for opacity in (1, 0.5, 0))
    assert np.abs(2 * half - opaque - gone).max() <= 2  # rounding, twice
    assert (np.ptp(gone, axis=(1, 2)) <= np.ceil(255 * 2 * 0.05)).all()  # nothing but the grating
    assert (np.ptp(opaque, axis=(1, 2)).max(-1) > 40).all()


def test_usual_gratings_and_opacity_are_those_of_the_dataset():
    rng = np.random.default_rng([3, 2])
    images, labels = glyphs.draw_labelled(50, image_size=16, rng=rng)
    rng = np.random.default_rng([3, 2])
    rng.permutation(50)
    others = (labels + rng.integers(1, 23, 50)) % 23
    textures = np.where(rng.random(50) < 0.9, labels, others)
    same = render_glyphs(labels, textures, image_size=16, rng=rng, amplitude=(0.02, 0.06), opacity=1.0)
    np.testing.assert_array_equal(images, same)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"amplitude": (-0.1, 0.1)}, "amplitude must be"),
        ({"amplitude": (0.2, 0.1)}, "amplitude must be"),
        ({"amplitude": (0.1, np.nan)}, "amplitude must be"),
        ({"opacity": 1.5}, r"opacity must be in \[0, 1\]"),
        ({"opacity": np.nan}, r"opacity must be in \[0, 1\]"),
    ],
)
def test_impossible_cues(options, message):
    with pytest.raises(ValueError, match=message):
        render_glyphs([0], [0], image_size=16, rng=np.random.default_rng(0), **options)


def _brightest_channel(gain, images):
    return gain * images.mean((1, 2))


@pytest.mark.parametrize("batch_size", [4, 64])
def test_a_network_is_measured_on_all_images_in_0_to_1(batch_size):
    """A network that names the channel which is brightest, on images that are red or green or blue."""
    names = np.array(["red", "green", "blue"])
    shapes, textures, shown = (
        np.array(x) for x in ([0, 0, 1, 2, 2] * 2, [1, 2, 0, 0, 1] * 2, [0, 2, 2, 0, 2] * 2)
    )
    images = np.zeros((10, 4, 4, 3), np.uint8)
    images[np.arange(10), :, :, shown] = 255
    conflict = glyph_cue_conflict(0.1)._replace(images=images, shapes=names[shapes], textures=names[textures])
    network = Partial(_brightest_channel, jnp.float32(20))
    groups = {"red": [0], "green": [1], "blue": [2]}
    found = measure(network, conflict, groups, batch_size=batch_size)
    assert [found.overall.shape.count, found.overall.texture.count, found.overall.neither.count] == [4, 4, 2]
    assert found.class_names == ("blue", "green", "red")
    np.testing.assert_array_equal(found.per_class.shape.count, [2, 0, 2])


def test_a_reader_of_letters_and_a_reader_of_gratings_are_told_apart():
    """Matched filters on images whose other cue is faded: the bias is 1 and 0."""
    conflict = glyph_cue_conflict(0.06, opacity=0.0)
    angle, cycles = glyphs.texture_of(np.arange(len(LETTERS)))
    middle = (np.arange(16) + 0.5) / 16
    towards = np.cos(angle)[:, None, None] * middle + np.sin(angle)[:, None, None] * middle[:, None]
    wave = np.exp(2j * np.pi * cycles[:, None, None] * towards)
    grey = conflict.images.mean(-1) - conflict.images.mean((1, 2, 3), keepdims=False)[:, None, None]
    energy = np.abs(np.einsum("nhw,chw->nc", grey, wave))
    found = shape_bias(decide(energy, LETTER_OUTPUTS), conflict.shapes, conflict.textures)
    assert found.overall.texture.value > 0.9 and found.overall.shape_bias.value < 0.05
    exact = shape_bias(conflict.shapes, conflict.shapes, conflict.textures)
    assert exact.overall.shape_bias.value == 1 and exact.overall.neither.count == 0
