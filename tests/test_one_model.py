"""One network in one call: what it takes and refuses, what it tells, how it chooses the number of blocks."""

import csv
import dataclasses
import importlib
import json
from collections import Counter
from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_transfer import CLASSES, KEY, MODEL, NUM_TRAIN, RECIPE, TEST, TRAIN

import advtransfer as at
from advtransfer import config as base
from advtransfer import tasks
from advtransfer.config import ConfigError, read
from advtransfer.data import Split
from advtransfer.models import Model, ModelSpec, create_module, init_variables, load_model, save_model
from advtransfer.report import make_outcome, read_rows
from advtransfer.train import DivergedError
from advtransfer.transfer import (
    Choice,
    choose_k,
    depths,
    fine_tune_one,
    one_model,
    possible_folds,
    rule_of_thumb,
)
from advtransfer.transfer.choose_k import RULE, _within_one_error, make_folds

pytestmark = pytest.mark.usefixtures("two_blocks", "unoptimised")

# The package's function of this name hides the module.
choose_k_module = importlib.import_module("advtransfer.transfer.choose_k")

MEASURED = {"test_images": TEST.images, "test_labels": TEST.labels}
tune = partial(at.fine_tune, MODEL, recipe=RECIPE, key=KEY, class_names=CLASSES)


@pytest.fixture(scope="module")
def tuned():
    return tune(TRAIN.images, TRAIN.labels, **MEASURED, num_unfrozen_blocks=1)


# --- one call -------------------------------------------------------------------------------------


def test_it_is_the_engines_training_on_all_of_the_images(tuned):
    options = {"key": KEY, "class_names": CLASSES, "num_unfrozen_blocks": 1, "recipe": RECIPE}
    model, history = fine_tune_one(MODEL, TRAIN, TEST, **options)
    chex.assert_trees_all_equal(tuned.model.variables, model.variables)
    epochs = np.array(RECIPE.evaluate_epochs)
    chex.assert_trees_all_equal(tuned.history, {"epoch": epochs, **history})
    assert tuned.choice is None


def test_a_recipe_of_defaults_fits_any_set():
    """20 images fill no batch of 128, and 3 epochs are measured after the third."""
    tuned = at.fine_tune(MODEL, TRAIN.images, TRAIN.labels, recipe=at.Recipe(num_epochs=3), key=KEY)
    assert tuned.history["epoch"].tolist() == [3]
    explicit = at.Recipe(num_epochs=3, evaluate_epochs=(3,), batch_size=NUM_TRAIN)
    same = at.fine_tune(MODEL, TRAIN.images, TRAIN.labels, recipe=explicit, key=KEY)
    chex.assert_trees_all_equal(tuned.model.variables, same.model.variables)
    shortest = at.fine_tune_many(
        MODEL,
        TRAIN,
        TEST,
        subsets=np.arange(NUM_TRAIN)[None],
        keys=KEY[None],
        num_classes=len(CLASSES),
        recipe=at.Recipe(num_epochs=3),
    )
    assert shortest["test_accuracy"].shape == (1, 1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_floats_are_the_bytes_that_they_came_from(dtype):
    """And without test images the history is of the training images, with the same training."""
    images = TRAIN.images.copy()
    images[0, 0, 0], images[0, 0, 1] = 0, 255
    plain = tune(images, TRAIN.labels, **MEASURED)
    found = tune((images / 255).astype(dtype), TRAIN.labels.astype(np.int64).tolist())
    chex.assert_trees_all_equal(found.model.variables, plain.model.variables)
    assert (found.outcome, found.test) == (None, None)
    expected = {name: x for name, x in plain.history.items() if not name.startswith("test_")}
    assert sum(name.startswith("train_") for name in expected) == 3
    chex.assert_trees_all_equal(found.history, expected)


def test_what_it_tells_of_the_test_images_is_what_the_network_says():
    """Of images smaller than the network's."""
    small = TEST.images[:, 1:6, 1:6]
    found = tune(TRAIN.images[:, 1:6, 1:6], TRAIN.labels, test_images=small, test_labels=TEST.labels)
    enlarged = jnp.clip(
        jax.image.resize(jnp.asarray(small, jnp.float32) / 255, (len(small), 8, 8, 3), "linear"), 0, 1
    )
    logits = np.asarray(jax.jit(found.model.module.apply)(found.model.variables, enlarged))
    outcome = found.outcome
    np.testing.assert_array_equal(outcome.predictions, logits.argmax(-1))
    probabilities = jax.nn.softmax(logits).max(-1)
    np.testing.assert_allclose(outcome.probabilities, probabilities, rtol=1e-4)
    assert outcome.accuracy == pytest.approx(found.history["test_accuracy"][-1], abs=1e-6)
    counts = Counter(zip(TEST.labels.tolist(), logits.argmax(-1).tolist(), strict=True))
    assert {(i, j): n for (i, j), n in np.ndenumerate(outcome.confusion) if n} == counts
    means = found.history["test_mean_per_class_accuracy"][-1]
    assert np.nanmean(outcome.class_accuracy) == pytest.approx(means, abs=1e-6)


def test_classes_and_the_recipe_have_defaults():
    """150 epochs on 20 images take a second; batches are of all of them."""
    found = at.fine_tune(MODEL, TRAIN.images, TRAIN.labels, num_unfrozen_blocks="rule")
    assert found.model.spec.class_names == ("0", "1", "2")
    recipe = found.model.spec.provenance["recipe"]
    assert (recipe["num_epochs"], recipe["batch_size"]) == (150, NUM_TRAIN)
    assert found.history["epoch"].tolist() == [1, 2, 5, 10, 20, 50, 100, 150]
    assert found.choice.num_unfrozen_blocks == found.model.spec.provenance["num_unfrozen_blocks"] == 0
    many = at.fine_tune(MODEL, np.tile(TRAIN.images, (7, 1, 1, 1)), np.tile(TRAIN.labels, 7))
    assert many.model.spec.provenance["recipe"]["batch_size"] == 128 < 7 * NUM_TRAIN


def test_without_a_key_it_is_that_of_seed_0():
    found, expected = (tune(TRAIN.images, TRAIN.labels, key=key) for key in (None, jax.random.key(0)))
    chex.assert_trees_all_equal(found.model.variables, expected.model.variables)


def _measured(k, *, norm="none", num_test=3, side=8, choice=None):
    """What training k blocks of a source would have left; of the test images all are read wrongly."""
    provenance = {
        "source": {"architecture": "resnet_tiny", "norm": norm, "eps": 0.5},
        "num_train_images": 1_600,
        "num_unfrozen_blocks": k,
        "recipe": {"num_epochs": 1_234, "batch_size": 7},
    }
    spec = dataclasses.replace(MODEL.spec, class_names=("a", "b"), provenance=provenance)
    pixels = np.arange(num_test * side * side * 3) % 251
    test = Split(pixels.reshape(num_test, side, side, 3).astype(np.uint8), np.zeros(num_test, np.int32))
    outcome = make_outcome(test.labels, np.tile([0.0, 1.0], (num_test, 1)), ("a", "b"))
    return one_model.FineTuned(MODEL._replace(spec=spec), {"epoch": [1]}, choice, outcome, test)


@pytest.mark.parametrize(
    ("k", "blocks"),
    [(0, "none, the head alone"), (-1, "all"), (1, "1, and the head"), (2, "2, and the head")],
)
def test_the_page_tells_what_was_trained(k, blocks):
    page = one_model.make_page(_measured(k), title="Page")
    expected = ["resnet_tiny, natural", "8² pixels", "2 classes", "1,600", blocks, "1,234", "3"]
    assert [fact for _, fact in page.facts] == expected
    assert (page.choice, page.choice_rows, page.config["batch_size"]) == ("", [], 7)
    assert set(page.versions) >= {"jax", "numpy"}
    given = {"source": "mine", "target": "digits", "config": {"seed": 3}, "versions": {"jax": "1"}}
    page = one_model.make_page(_measured(k, norm="l2"), title="Page", **given)
    assert [fact for _, fact in page.facts[:3:2]] == ["mine, resnet_tiny, ℓ2 (ε = 0.5)", "digits"]
    assert (page.config, page.versions) == (given["config"], given["versions"])


@pytest.mark.parametrize(("side", "step"), [(8, 1), (224, 1), (225, 2), (449, 3)])
def test_of_large_pictures_every_second_or_third_pixel_is_shown(side, step):
    """Of sixteen mistakes, and 224 pixels at most."""
    tuned = _measured(0, num_test=18, side=side)
    page = one_model.make_page(tuned, title="Page")
    expected = tuned.test.images[tuned.outcome.mistakes[:16]][:, ::step, ::step] / 255
    assert page.pictures.dtype == np.float32
    np.testing.assert_allclose(page.pictures, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("num_images", "k", "row", "words"),
    [
        (99, 0, 0, "with 99 training images the head alone."),
        (100, 1, 1, "with 100 training images the last block and the head."),
        (1_600, 3, 2, "with 1,600 training images the last 3 blocks and the head."),
        (51_199, 9, 3, "with 51,199 training images the last 9 blocks and the head."),
        (51_200, -1, 4, "with 51,200 training images everything."),
    ],
)
def test_the_page_tells_what_the_rule_took(num_images, k, row, words):
    output, rows = one_model._told(Choice("rule", k, (0, 1, 3, 6, 9, -1), None), num_images)
    assert words in output
    below = [100, 1_600, 12_800, 51_200, None]
    assert [(r["below_num_images"], r["num_unfrozen_blocks"]) for r in rows] == list(
        zip(below, [0, 1, 3, 9, -1], strict=True)
    )
    assert [r["chosen"] for r in rows] == [int(i == row) for i in range(5)]


def test_the_page_tells_every_fold():
    accuracies = np.array([[0.2, 0.4, 0.6], [0.5, 0.9, 1.0]])
    choice = Choice("cross_validation", 1, (0, 1), accuracies)
    page = one_model.make_page(_measured(1, choice=choice), title="Page")
    assert "in 3 folds: the last block and the head," in page.choice
    for row, k, shares in zip(page.choice_rows, (0, 1), accuracies, strict=True):
        assert (row["num_unfrozen_blocks"], row["chosen"]) == (k, k)
        assert [row[f"fold_{f}"] for f in (1, 2, 3)] == shares.tolist()
        assert row["mean_accuracy"] == pytest.approx(sum(shares) / 3)
        deviations = sum((x - sum(shares) / 3) ** 2 for x in shares)
        assert row["standard_error"] == pytest.approx((deviations / 2 / 3) ** 0.5)


def test_a_folder_holds_the_model_and_its_page(tuned, tmp_path):
    folder = tmp_path / "mine"
    options = {**MEASURED, "folder": str(folder)}
    tune(TRAIN.images, TRAIN.labels, **options, num_unfrozen_blocks="rule")
    with (folder / "choice.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["num_unfrozen_blocks"] for row in rows if row["chosen"] == "1"] == ["0"]
    tune(TRAIN.images, TRAIN.labels, **options, num_unfrozen_blocks=1)  # in its place
    tables = {"epochs.csv", "confusion.csv", "classes.csv", "mistakes.csv"}
    assert {path.name for path in folder.iterdir()} == {"fine_tune.json", "model", "report.html", *tables}
    description = json.loads((folder / "model" / "model.json").read_text())
    assert description["provenance"]["num_unfrozen_blocks"] == 1
    page = (folder / "report.html").read_text().replace("\xa0", " ")
    assert f"{100 * tuned.outcome.accuracy:.1f} % of 30 test images" in page
    assert page.count("data:image/png") == min(16, len(tuned.outcome.mistakes)) > 0


IMAGES, LABELS = TRAIN


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": IMAGES[..., 0]}, r"images have the shape \(20, 8, 8\).*: repeat grey images"),
        ({"images": IMAGES[..., :1]}, r"images have the shape \(20, 8, 8, 1\).*: repeat grey images"),
        ({"images": np.tile(IMAGES, 2)}, r"the shape \(20, 8, 8, 6\), not \[N, H, H, 3\]$"),
        ({"images": np.moveaxis(IMAGES, -1, 1)}, r"move the channels last, np.moveaxis\(images, 1, -1\)"),
        ({"images": IMAGES[:, :4]}, "images of 4 × 8 are not square"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, "images are empty"),
        ({"images": IMAGES.astype(int)}, "images are int64: give uint8, or floats"),
        ({"images": IMAGES.astype(float)}, r"images reach from .* to 2\d\d: .* divide 8-bit values by 255"),
        ({"images": IMAGES / 255 - 0.5}, r"images reach from -0.5"),
        ({"images": IMAGES / IMAGES.max() * 1.5}, "images reach from .* to 1.5"),
        ({"images": np.where(IMAGES > 99, np.nan, 0.5)}, "images hold NaN"),
        ({"labels": LABELS[:-1]}, r"labels have the shape \(19,\), not \[20\]"),
        ({"labels": np.eye(3)[LABELS]}, r"one for each image: give labels.argmax\(-1\)"),
        ({"labels": LABELS / 2}, "labels are float64, not integers"),
        ({"labels": LABELS - 1}, "labels hold -1"),
        ({"labels": LABELS + 1}, "no label is 0, and the largest is 3: number the classes"),
        ({"labels": 2 * LABELS}, "no label is 1, and the largest is 4"),
        ({"labels": LABELS // 2 * 2}, "no label is 1, and the largest is 2"),
        ({"labels": 0 * LABELS}, "there is one class"),
        ({"class_names": ("a", "b")}, "labels run from 0 to 2; the network has 2 classes"),
        ({"test_images": IMAGES}, "test_images and test_labels go together"),
        ({"test_images": IMAGES, "test_labels": LABELS + 1}, "test_labels run from 1 to 3; .* 3 classes"),
        ({"test_images": IMAGES + 0.5, "test_labels": LABELS}, "test_images reach"),
        ({"num_unfrozen_blocks": "auto"}, "num_unfrozen_blocks='auto': .* one of rule, cross_validation"),
        ({"num_unfrozen_blocks": 3}, "cannot unfreeze 3 blocks: this network has 2"),
        ({"num_unfrozen_blocks": "cross_validation", "num_folds": 1}, "in 1 folds: give at least 2"),
        ({"folder": "/proc/no"}, "/proc"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        at.fine_tune(MODEL, **({"images": IMAGES, "labels": LABELS} | change))
    assert "\n" not in str(caught.value)


def test_files_of_others_are_left_alone(tmp_path, monkeypatch):
    """And refused before the training; a folder of ours is written again."""
    (tmp_path / "report.html").write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr(one_model, "tune", None)
        with pytest.raises(
            ValueError, match=r"holds files that advtransfer did not write \(report.html\): choose another"
        ):
            tune(TRAIN.images, TRAIN.labels, folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    for _ in range(2):
        tune(TRAIN.images, TRAIN.labels, folder=tmp_path / "own")
    assert json.loads((tmp_path / "own" / "fine_tune.json").read_text())["num_train_images"] == NUM_TRAIN


def test_a_training_that_diverges_leaves_nothing(tmp_path):
    with pytest.raises(DivergedError, match=r"learning rate 1e\+38"):
        tune(TRAIN.images, TRAIN.labels, recipe=replace(RECIPE, learning_rate=1e38), folder=tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_it_has_diverged_when_its_last_loss_says_so(monkeypatch):
    losses = {"train_loss": np.array([1.0, 2.0, 3.0, np.nan])}
    monkeypatch.setattr(one_model, "fine_tune_one", lambda *_, **__: (MODEL, losses))
    recipe = replace(RECIPE, num_epochs=4, evaluate_epochs=(1, 2, 3, 4))
    with pytest.raises(DivergedError, match="became NaN"):
        tune(TRAIN.images, TRAIN.labels, recipe=recipe)
    losses["train_loss"] = losses["train_loss"][::-1]
    assert tune(TRAIN.images, TRAIN.labels, recipe=recipe).model is MODEL


# --- the number of blocks -------------------------------------------------------------------------


@pytest.mark.parametrize(("counts", "num_folds"), [((9, 7, 4), 4), ((2, 2), 2), ((31, 5, 5), 5), ((10,), 3)])
def test_folds_are_a_stratified_partition(counts, num_folds):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    folds = make_folds(labels, num_folds, jax.random.key(1))
    assert sorted(np.concatenate(folds).tolist()) == list(range(len(labels)))
    assert np.ptp([len(fold) for fold in folds]) <= 1
    shares = np.array([[np.sum(labels[fold] == c) for c in range(len(counts))] for fold in folds])
    assert np.ptp(shares, axis=0).max() <= 1 and shares.min() >= 1
    others = make_folds(labels, num_folds, jax.random.key(2))
    assert any(a.tolist() != b.tolist() for a, b in zip(folds, others, strict=True)) or len(labels) == 4


def test_folds_are_as_many_as_the_rarest_class_allows():
    labels = np.repeat([0, 1], [9, 3])
    assert [possible_folds(labels, n) for n in (2, 3, 5)] == [2, 3, 3]
    with pytest.raises(ValueError, match="class 1 has one training image"):
        possible_folds(np.array([0, 0, 1]), 5)
    with pytest.raises(ValueError, match="cross-validation in 1 folds: give at least 2"):
        possible_folds(labels, 1)


@pytest.mark.parametrize(("batch_size", "expected"), [(11, 11), (12, 12), (13, 12), (100, 12)])
def test_a_batch_is_cut_to_the_smallest_of_what_folds_leave(batch_size, expected, monkeypatch):
    """19 images in three folds leave 12 or 13."""
    asked = []

    def tune(model, train, test, *, subsets, recipe, **_):
        asked.append((recipe.batch_size, recipe.evaluate_epochs, subsets.shape[1] + test.num_images))
        return {"test_accuracy": np.full((1, 1), 0.5)}

    monkeypatch.setattr(choose_k_module, "fine_tune_many", tune)
    recipe = replace(RECIPE, frozen_batch_norm="target", batch_size=batch_size)
    monkeypatch.setattr(choose_k_module, "depths", lambda _: (0, 1))
    train = Split(*(np.tile(x, (4, *[1] * (x.ndim - 1)))[:19] for x in TRAIN))
    choose_k("cross_validation", MODEL, train, num_classes=3, key=KEY, num_folds=3, recipe=recipe)
    assert asked == [(expected, (RECIPE.num_epochs,), 19)] * 6


@pytest.mark.parametrize(("mode", "candidates"), [("source", (0, 1)), ("target", (0,)), ("update", (0,))])
def test_cross_validation_is_a_loop_over_single_trainings(mode, candidates, monkeypatch):
    """With activations that folds share, with statistics of each fold's own images, and from images."""
    assert depths(MODEL.module.num_blocks) == (0, 1, -1)
    monkeypatch.setattr(choose_k_module, "depths", lambda _: candidates)
    train = Split(*(x[:18] for x in TRAIN))
    recipe = replace(RECIPE, frozen_batch_norm=mode, batch_size=15)  # more than the 12 that a fold leaves
    choice = choose_k("cross_validation", MODEL, train, num_classes=3, key=KEY, num_folds=3, recipe=recipe)
    assert choice.candidates == candidates
    key = jax.random.fold_in(KEY, 0xF01D)
    folds = make_folds(train.labels, 3, key)
    alone = replace(recipe, batch_size=12, evaluate_epochs=(3,))
    for c, k in enumerate(candidates):
        for f, fold in enumerate(folds):
            rest = sorted({*range(18)} - {*fold.tolist()})
            own, held_out = (Split(*(x[chosen] for x in train)) for chosen in (rest, fold))
            options = {"key": jax.random.fold_in(key, f), "class_names": CLASSES, "num_unfrozen_blocks": k}
            _, history = fine_tune_one(MODEL, own, held_out, **options, recipe=alone)
            counts = 6 * np.array([history["test_accuracy"][-1], choice.accuracies[c, f]])
            np.testing.assert_array_equal(*np.rint(counts), err_msg=f"k = {k}, fold {f}")
    means = choice.accuracies.mean(axis=1)
    assert np.ptp(choice.accuracies) > 0
    error = choice.accuracies[means.argmax()].std(ddof=1) / 3**0.5
    expected = next(k for k, m in zip(candidates, means, strict=True) if m >= means.max() - error - 1e-9)
    assert choice.num_unfrozen_blocks == expected


def test_the_smallest_within_one_standard_error_is_taken():
    def chosen(*accuracies):
        return _within_one_error((0, 1, -1), np.array(accuracies))

    best = (0.7, 0.9)  # mean 0.8; standard deviation 0.2 / √2, so that of the mean is 0.1
    assert chosen((0.71, 0.71), (0.75, 0.75), best) == 0
    assert chosen((0.69, 0.69), (0.75, 0.75), best) == 1
    assert chosen((0.69, 0.69), (0.69, 0.69), best) == -1
    assert chosen((0.7, 0.9), (0.9, 0.7), (0.8, 0.8)) == 0  # as good
    assert chosen((np.nan, 0.9), (0.5, 0.5), (0.4, 0.4)) == 1  # one diverged
    with pytest.raises(DivergedError, match="lower the learning rate"):
        chosen(*np.full((3, 2), np.nan))


def test_the_rule_takes_more_blocks_for_more_images():
    assert depths(16) == (0, 1, 3, 6, 9, -1) and depths(4) == (0, 1, 3, -1) and depths(3) == (0, 1, -1)
    chosen = [rule_of_thumb(n, 16) for below, _ in RULE for n in (below - 1, below)]
    assert chosen == [0, 1, 1, 3, 3, 9, 9, -1]
    assert [rule_of_thumb(n, 4) for n in (99, 100, 1_600, 12_800)] == [0, 1, 3, -1]
    ours = choose_k("rule", MODEL, TRAIN, num_classes=3, key=KEY)
    assert (ours.num_unfrozen_blocks, ours.accuracies) == (0, None)


# --- the stage ------------------------------------------------------------------------------------


def _config(source, **transfer):
    config = base.default()
    config.stage, config.source = "transfer", str(source)
    config.transfer.update(num_train_images=30, batch_size=10, num_epochs=2, evaluate_epochs=(1, 2))
    config.transfer.update(num_folds=2, **transfer)
    return config


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    module = create_module("resnet_tiny", num_classes=5)
    variables = init_variables(module, jax.random.key(0), 8)
    folder = tmp_path_factory.mktemp("source") / "blank"
    save_model(Model(module, variables, ModelSpec("resnet_tiny", 5, 8, module.mean, module.std)), folder)
    return folder


def test_the_stage_chooses_tells_and_can_be_run_again(source, tmp_path, monkeypatch):
    config = _config(source, choose_num_unfrozen_blocks="cross_validation")
    assert "among 0, 1, all: 6 more fine-tunings, 2 folds for each" in tasks.plan(config, tmp_path)
    monkeypatch.setattr(choose_k_module, "depths", lambda _: (0, 1))
    tasks.run(config, tmp_path)
    with (tmp_path / "choice.csv").open() as file:
        choice = list(csv.DictReader(file))
    assert [row["num_unfrozen_blocks"] for row in choice] == ["0", "1"]
    (chosen,) = (row["num_unfrozen_blocks"] for row in choice if row["chosen"] == "1")
    rows = read_rows(tmp_path)  # the other tables are no rows
    assert [(row["epoch"], row["num_unfrozen_blocks"]) for row in rows] == [
        (1, int(chosen)),
        (2, int(chosen)),
    ]
    assert load_model(tmp_path).spec.provenance["num_unfrozen_blocks"] == int(chosen)
    table = list(csv.reader((tmp_path / "confusion.csv").read_text().splitlines()))
    confusion = np.array([row[1:] for row in table[1:]], int)
    assert np.trace(confusion) / confusion.sum() == pytest.approx(rows[-1]["test_accuracy"], abs=1e-6)
    page = (tmp_path / "report.html").read_bytes()
    tasks.run(config, tmp_path)
    assert (tmp_path / "report.html").read_bytes() == page
    assert b"blank, fine-tuned on builtin:digits" in page and b"in 2 folds" in page


def test_the_plan_says_what_the_rule_takes(source, tmp_path):
    config = _config(source, choose_num_unfrozen_blocks="rule")
    assert "fine-tune 0 blocks (by the rule of thumb) of resnet_tiny on 30" in tasks.plan(config, tmp_path)
    config.transfer.num_train_images = -1
    assert "fine-tune 1 block (by the rule of thumb)" in tasks.plan(config, tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"choose_num_unfrozen_blocks": "auto"}, "choose_num_unfrozen_blocks='auto' must be one of given"),
        ({"choose_num_unfrozen_blocks": "rule", "num_unfrozen_blocks": 1}, "exclude each other"),
        ({"num_folds": 1}, "config.transfer.num_folds=1 must be a whole number, 2 or more"),
    ],
)
def test_an_impossible_choice_names_its_key(changes, words):
    config = base.default()
    config.stage = "transfer"
    config.transfer.update(changes)
    with pytest.raises(ConfigError, match=words):
        read(config)


@pytest.mark.parametrize("change", [{"choose_num_unfrozen_blocks": "rule"}, {"num_folds": 3}])
def test_a_study_chooses_nothing(change):
    config = base.default()
    config.transfer.update(change)
    with pytest.raises(ConfigError, match="is for config.stage=transfer"):
        read(config)


def test_too_few_images_of_a_class_are_refused_before_anything_is_written(source, tmp_path):
    config = _config(source, choose_num_unfrozen_blocks="cross_validation")
    config.transfer.update(num_train_images=10, batch_size=10)
    with pytest.raises(ConfigError, match="config.transfer.choose_num_unfrozen_blocks: class 0 has one"):
        tasks.run(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
