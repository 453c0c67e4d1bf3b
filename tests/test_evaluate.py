"""Evaluation against a plain count, whatever the batch and the devices, with and without an attack."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from advtransfer import parallel
from advtransfer.attacks import L2, pgd
from advtransfer.data import Batch, Dataset, Split, resize, to_float
from advtransfer.evaluate import align_classes, evaluate, make_evaluate_step, predict
from advtransfer.models import Model, ModelSpec, create_module, init_variables, logits_fn

NUM_IMAGES = 13


def _model():
    module = create_module("resnet_tiny", num_classes=4).clone(width=4, stage_sizes=(1, 1))
    shapes = jax.eval_shape(lambda: init_variables(module, jax.random.key(0), 8))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: rng.uniform(-0.8, 0.8, x.shape).astype(np.float32), shapes)
    variables["batch_stats"] = jax.tree.map(lambda x: np.abs(x) + 0.5, variables["batch_stats"])
    return Model(module, variables, ModelSpec("resnet_tiny", 4, 8, module.mean, module.std))


def _split():
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (NUM_IMAGES, 8, 8, 3), dtype=np.uint8)
    return Split(images, rng.integers(0, 4, NUM_IMAGES).astype(np.int32))


MODEL = _model()
SPLIT = _split()
NETWORK = logits_fn(MODEL)
RANDOM_ATTACK = functools.partial(
    pgd, threat_model=L2(0.4), num_steps=2, step_size=0.1, random_start=True, num_restarts=2
)


@jax.jit
def _logits(images):
    return MODEL.module.apply(MODEL.variables, images)


def _count(images, labels):
    """Mean loss and accuracy, in float64 from the logits on."""
    logits = np.float64(_logits(images))
    logits -= logits.max(1, keepdims=True)
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    rows = np.arange(len(labels))
    return {"loss": -log_probs[rows, labels].mean(), "accuracy": (logits.argmax(1) == labels).mean()}


@pytest.mark.parametrize("batch_size", [4, 26])
def test_every_example_counts_once(batch_size):
    """13 images divide neither by the batch nor by the two devices; the padding counts for nothing."""
    found = evaluate(NETWORK, SPLIT, batch_size=batch_size)
    expected = _count(SPLIT.images / np.float32(255), SPLIT.labels)
    assert found["accuracy"] == pytest.approx(expected["accuracy"], abs=1e-7)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert 0 < found["accuracy"] < 1


def test_sums_and_counts_leave_masked_examples_out():
    images, labels = to_float(jnp.asarray(SPLIT.images)), jnp.asarray(SPLIT.labels)
    mask = np.arange(NUM_IMAGES) % 2 == 0
    batch = Batch(images, labels, jax.random.split(jax.random.key(0), NUM_IMAGES))
    metrics = make_evaluate_step()(NETWORK, batch, jnp.asarray(mask, jnp.float32))
    expected = _count(np.asarray(images)[mask], SPLIT.labels[mask])
    assert float(metrics["loss"][1]) == float(metrics["accuracy"][1]) == 7
    assert float(metrics["accuracy"][0]) == round(7 * expected["accuracy"])
    assert float(metrics["loss"][0] / metrics["loss"][1]) == pytest.approx(expected["loss"], rel=1e-5)


def test_mean_per_class_is_the_mean_of_the_classes_accuracies():
    """Of three classes with 1, 4 and 8 images; the fourth has none and does not count."""
    images = SPLIT.images / np.float32(255)
    logits = np.concatenate([images[:, 0, 0], np.zeros((NUM_IMAGES, 1), np.float32)], axis=1)
    guesses = logits.argmax(1)
    labels = np.repeat([0, 2, 1], [1, 4, 8]).astype(np.int32)
    expected = np.mean([np.mean(guesses[labels == c] == c) for c in np.unique(labels)])
    corner = Partial(lambda x: jnp.concatenate([x[:, 0, 0], jnp.zeros((len(x), 1))], axis=1))
    for batch_size in (4, 26):
        found = evaluate(corner, Split(SPLIT.images, labels), batch_size=batch_size)
        assert found["mean_per_class_accuracy"] == pytest.approx(expected, abs=1e-12)
        assert found["accuracy"] == pytest.approx(np.mean(guesses == labels), abs=1e-12)
    assert len(np.unique(guesses)) == 3 and abs(expected - found["accuracy"]) > 0.1
    perfect = evaluate(corner, Split(SPLIT.images, guesses.astype(np.int32)), batch_size=4)
    assert perfect["mean_per_class_accuracy"] == perfect["accuracy"] == 1.0


def test_images_of_another_size_are_resized():
    small = Split(SPLIT.images[:, :5, :5], SPLIT.labels)
    found = evaluate(NETWORK, small, batch_size=4, image_size=8)
    expected = _count(np.asarray(resize(to_float(jnp.asarray(small.images)), 8)), SPLIT.labels)
    assert found["accuracy"] == pytest.approx(expected["accuracy"], abs=1e-7)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)


@pytest.mark.parametrize("attack", [None, RANDOM_ATTACK], ids=["natural", "random"])
def test_the_batch_size_changes_nothing(attack):
    """Also with random restarts, whose keys belong to the examples and not to the batches."""
    key = jax.random.key(5)
    small, large = (evaluate(NETWORK, SPLIT, batch_size=size, attack=attack, key=key) for size in (4, 26))
    assert small["accuracy"] == pytest.approx(large["accuracy"], abs=1e-7)
    assert small["loss"] == pytest.approx(large["loss"], abs=1e-6)


def test_one_device_measures_what_two_do(monkeypatch):
    options = {"batch_size": 4, "attack": RANDOM_ATTACK, "key": jax.random.key(5)}
    assert parallel.choose_devices(4) == 2
    two = evaluate(NETWORK, SPLIT, **options)
    monkeypatch.setattr(parallel, "choose_devices", lambda _: 1)
    one = evaluate(NETWORK, SPLIT, **options)
    for name in ("accuracy", "mean_per_class_accuracy"):
        assert one[name] == pytest.approx(two[name], abs=1e-7)
    assert one["loss"] == pytest.approx(two["loss"], abs=1e-6)


def test_with_an_attack_it_measures_the_attacked_images():
    """The same attack by hand on all images at once, with the keys that evaluation promises."""
    key = jax.random.key(5)
    images, labels = to_float(jnp.asarray(SPLIT.images)), jnp.asarray(SPLIT.labels)
    attacked = RANDOM_ATTACK(NETWORK, images, labels, key=jax.random.split(key, NUM_IMAGES))
    expected = _count(np.asarray(attacked), SPLIT.labels)
    found = evaluate(NETWORK, SPLIT, batch_size=4, attack=RANDOM_ATTACK, key=key)
    assert found["accuracy"] == pytest.approx(expected["accuracy"], abs=1e-7)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert found["loss"] > evaluate(NETWORK, SPLIT, batch_size=4)["loss"] + 0.05


def test_the_key_decides_the_random_starts():
    measure = functools.partial(evaluate, NETWORK, SPLIT, batch_size=26, attack=RANDOM_ATTACK)
    losses = [measure(key=jax.random.key(seed))["loss"] for seed in (0, 1)]
    assert abs(losses[0] - losses[1]) > 1e-5
    assert measure()["loss"] == losses[0]


def test_a_batch_that_the_devices_do_not_divide_is_refused_in_one_line(two_devices):
    with pytest.raises(ValueError, match="batch of 5 examples .* 2 devices: use a multiple of 2") as error:
        evaluate(NETWORK, SPLIT, batch_size=5)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [8, 5, 16])
def test_a_model_takes_bytes_and_floats_of_every_size(size):
    """At its own size, 8²: predictions and accuracy are those of images that were resized before."""
    images = np.random.default_rng(2).integers(0, 256, (7, size, size, 3), np.uint8)
    resized = np.asarray(resize(to_float(jnp.asarray(images)), 8))
    expected = _logits(resized)
    for given in (images, images / np.float32(255), jnp.asarray(images), images / 255):
        np.testing.assert_allclose(predict(MODEL, given, batch_size=4), expected, rtol=1e-5, atol=1e-5)
    labels = np.arange(7, dtype=np.int32) % 4
    assert evaluate(MODEL, Split(images, labels), batch_size=4)["accuracy"] == pytest.approx(
        np.mean(expected.argmax(1) == labels)
    )


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((8, 8, 3), np.uint8), r"the shape \(8, 8, 3\), .* a single one is images\[None\]"),
        (np.zeros((2, 8, 6, 3), np.uint8), "reads files as colour squares"),
        (np.zeros((2, 8, 8, 1), np.uint8), "reads files as colour squares"),
        (np.zeros((0, 8, 8, 3), np.uint8), r"the shape \(0, 8, 8, 3\)"),
        (np.full((2, 8, 8, 3), 255.0), r"images run from 255 to 255: pass pixels in \[0, 1\]"),
        (np.full((2, 8, 8, 3), -1.0), "networks do that themselves"),
        (np.full((2, 8, 8, 3), np.nan), "images run from nan"),
        (np.zeros((2, 8, 8, 3), np.int32), "images are int32: pass uint8, or floats"),
    ],
)
def test_predict_refuses_what_is_no_image(images, message):
    with pytest.raises(ValueError, match=message) as error:
        predict(MODEL, images)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("batch_size", [4, 256])
def test_predict_is_the_networks_logits(batch_size):
    images = SPLIT.images / np.float32(255)
    found = predict(NETWORK, images, batch_size=batch_size)
    expected = _logits(images)
    assert found.shape == (NUM_IMAGES, 4)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


# --- classes --------------------------------------------------------------------------------------


def dataset_of(names, labels):
    labels = np.int32(labels)
    split = Split(np.zeros((len(labels), 8, 8, 3), np.uint8), labels)
    return Dataset("pets", tuple(names), split, split, split)


def spec_of(names, num_classes=4):
    return dataclasses.replace(MODEL.spec, num_classes=num_classes, class_names=tuple(names))


def test_labels_follow_the_models_classes_by_name():
    spec = spec_of(("ant", "bee", "cow", "dog"))
    aligned = align_classes(dataset_of(("dog", "ant"), [0, 1, 1]), spec)
    assert aligned.class_names == spec.class_names
    for split in (aligned.train, aligned.validation, aligned.test):
        assert split.labels.tolist() == [3, 0, 0]
    same = dataset_of(spec.class_names, [0, 1, 2, 3])
    assert align_classes(same, spec) is same
    assert aligned.digest("test") != dataset_of(("dog", "ant"), [0, 1, 1]).digest("test")


@pytest.mark.parametrize("names", [(), ("0", "1", "2", "3")])
def test_without_names_the_number_decides(names):
    dataset = dataset_of(("ant", "bee", "cow", "dog"), [0, 1])
    assert align_classes(dataset, spec_of(names)) is dataset
    with pytest.raises(ValueError, match="pets has 2 classes, the model 4"):
        align_classes(dataset_of(("ant", "bee"), [0, 1]), spec_of(names))
    numbered = dataset_of(("0", "1", "2", "3"), [0, 1])
    assert align_classes(numbered, spec_of(("ant", "bee", "cow", "dog"))) is numbered


def test_unknown_classes_and_the_development_kits_numbers_are_refused():
    with pytest.raises(
        ValueError, match="has the classes b, c, which the model does not know; it has a, x, y, z"
    ):
        align_classes(dataset_of("abc", [0]), spec_of("axyz"))
    numbers = sorted(str(i) for i in range(1, 1001))
    with pytest.raises(ValueError, match="numbers its classes from 1 to 1000"):
        align_classes(dataset_of(numbers, [0]), spec_of((), 1000))
