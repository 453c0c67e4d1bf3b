"""Transfer against truths: frozen bits, a NumPy softmax regression, one run against many, cached or not."""

import importlib
from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advtransfer.data import Augmentation, Split, resize, to_float
from advtransfer.evaluate import evaluate
from advtransfer.models import Model, ModelSpec, create_module, init_variables, logits_fn
from advtransfer.transfer import (
    HEAD_INITS,
    Recipe,
    activation_cache,
    dual,
    fine_tune_one,
    frozen_mask,
    program,
    reset_head,
    target_batch_stats,
)
from advtransfer.transfer.program import Rates, Task, make_fine_tune

# The package's function of this name hides the module.
tuning = importlib.import_module("advtransfer.transfer.tuning")


def num_parameters(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


CLASSES = ("a", "b", "c")
NUM_TRAIN, NUM_TEST = 20, 30
# 20 images in batches of 8 leave a last one of 4.
RECIPE = Recipe(
    num_epochs=3,
    evaluate_epochs=(1, 3),
    batch_size=8,
    learning_rate=0.1,
    schedule="step",
    weight_decay=0.05,
    label_smoothing=0.1,
)
RATES = Rates(RECIPE.learning_rate, RECIPE.weight_decay)
# (k, frozen_batch_norm); the network has two blocks.
SETTINGS = [(0, "source"), (1, "target"), (1, "update"), (-1, "source")]
SETTINGS += [pytest.param(2, "source", marks=pytest.mark.sweep)]


def _model(seed=0, width=4):
    """Two blocks, 4 and 8 wide, with BatchNorm parameters and statistics that no fresh network has."""
    module = create_module("resnet_tiny", num_classes=5).clone(width=width, stage_sizes=(1, 1))
    shapes = jax.eval_shape(lambda: init_variables(module, jax.random.key(0), 8))
    rng = np.random.default_rng(seed)

    def draw(path, x):
        if x.ndim == 4:
            values = rng.normal(size=x.shape) * (2 / np.prod(x.shape[:3])) ** 0.5
        else:
            values = (
                rng.uniform(0.5, 1.5, x.shape)
                if path[-1].key in ("var", "scale")
                else rng.normal(size=x.shape)
            )
        return jnp.asarray(values, jnp.float32)

    variables = jax.tree_util.tree_map_with_path(draw, shapes)
    return Model(module, variables, ModelSpec("resnet_tiny", 5, 8, module.mean, module.std))


def _split(num_images, seed):
    """Images whose brightness tells the class, more or less."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(CLASSES), num_images).astype(np.int32)
    images = rng.integers(0, 140, (num_images, 8, 8, 3)) + 50 * labels[:, None, None, None]
    return Split(images.astype(np.uint8), labels)


MODEL, TRAIN, TEST = _model(), _split(NUM_TRAIN, 1), _split(NUM_TEST, 2)
KEY = jax.random.key(7)
VARIABLES = MODEL.variables["params"], MODEL.variables["batch_stats"]


def _tune(k, recipe, train=TRAIN, key=KEY):
    return fine_tune_one(
        MODEL, train, TEST, key=key, class_names=CLASSES, num_unfrozen_blocks=k, recipe=recipe
    )


@pytest.fixture(scope="module")
def tuned():
    """(k, frozen_batch_norm) -> (model, history), computed when first asked for."""
    results = {}

    def get(k, frozen_batch_norm):
        if (k, frozen_batch_norm) not in results:
            recipe = replace(RECIPE, frozen_batch_norm=frozen_batch_norm)
            results[k, frozen_batch_norm] = _tune(k, recipe)
        return results[k, frozen_batch_norm]

    return get


def _frozen_names(k):
    """The layers outside the head and the last k blocks, spelt out."""
    blocks = ["layer1_0", "layer2_0"]
    return set() if k == -1 else {"conv1", "bn1", *blocks[: 2 - k]}


def _flat(tree):
    return {
        "/".join(entry.key for entry in path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _bits(x):
    return np.ascontiguousarray(x, np.float32).view(np.uint32)


# --- what moves, and what does not ----------------------------------------------------------------


@pytest.mark.parametrize(("k", "mode"), SETTINGS)
def test_frozen_parameters_keep_their_bits_and_the_others_move(tuned, k, mode):
    before, after = (_flat(model.variables["params"]) for model in (MODEL, tuned(k, mode)[0]))
    assert before.keys() == after.keys()
    for name in before:
        layer = name.split("/")[0]
        if layer in _frozen_names(k):
            np.testing.assert_array_equal(_bits(after[name]), _bits(before[name]), err_msg=name)
        elif layer != "fc":
            assert np.abs(after[name] - before[name]).max() > 1e-5, name
    assert after["fc/kernel"].shape == (8, 3)


@pytest.mark.parametrize(("k", "mode"), SETTINGS)
def test_frozen_statistics_stay_move_or_are_the_targets(tuned, k, mode):
    before, after = (_flat(model.variables["batch_stats"]) for model in (MODEL, tuned(k, mode)[0]))
    target = _flat(target_batch_stats(MODEL.module, MODEL.variables, TRAIN.images))
    assert before.keys() == after.keys()
    for name in before:
        if name.split("/")[0] not in _frozen_names(k) or mode == "update":
            assert np.abs(after[name] - before[name]).max() > 1e-5, name
        else:
            expected = {"source": before, "target": target}[mode]
            np.testing.assert_array_equal(_bits(after[name]), _bits(expected[name]), err_msg=name)


def test_target_statistics_are_the_training_images_own():
    """Mean and unbiased variance of what each BatchNorm sees, averaged over batches of 7, 7 and 6 images."""
    found = _flat(target_batch_stats(MODEL.module, MODEL.variables, TRAIN.images, batch_size=7))
    images = TRAIN.images.astype(np.float32) / 255
    batches = [images[:7], images[7:14], images[14:]]
    train_mode = jax.jit(partial(MODEL.module.apply, train=True, mutable=["batch_stats"]))

    def own(batch):
        """From a running average of momentum 0.9 back to what one batch has put in."""
        _, moved = train_mode(MODEL.variables, batch)
        return jax.tree.map(
            lambda new, old: (np.float64(new) - 0.9 * np.float64(old)) / 0.1,
            moved["batch_stats"],
            MODEL.variables["batch_stats"],
        )

    weights = [len(batch) / len(images) for batch in batches]
    expected = _flat(
        jax.tree.map(
            lambda *x: sum(w * v for w, v in zip(weights, x, strict=True)),
            *(own(batch) for batch in batches),
        )
    )
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=2e-5, err_msg=name)

    # The first layer by hand, in float64.
    kernel = np.float64(MODEL.variables["params"]["conv1"]["kernel"])
    mean, var = 0.0, 0.0
    for weight, batch in zip(weights, batches, strict=True):
        x = (np.float64(batch) - MODEL.spec.mean) / MODEL.spec.std
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
        y = np.einsum("nhwcij,ijco->nhwo", windows, kernel).reshape(-1, kernel.shape[-1])
        mean, var = mean + weight * y.mean(0), var + weight * y.var(0, ddof=1)
    np.testing.assert_allclose(found["bn1/mean"], mean, atol=1e-5)
    np.testing.assert_allclose(found["bn1/var"], var, rtol=1e-5)


@pytest.mark.parametrize("k", [-1, 0, 1, 2])
def test_the_optimiser_keeps_nothing_for_frozen_parameters(k):
    """Its one buffer, the momentum, is as large as the trained parameters; beside it there are counters."""
    params = MODEL.variables["params"]
    tx = program._optimizer(RECIPE, RATES, 9, frozen_mask(MODEL.module, params, k))
    state = tx.init(params)
    buffers = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    trained = {name: x for name, x in params.items() if name not in _frozen_names(k)}
    assert num_parameters(buffers) == num_parameters(trained)
    assert len(jax.tree.leaves(state)) <= len(buffers) + 2


# --- the result -----------------------------------------------------------------------------------


def _softmax_regression(features, labels, kernel, bias, orders, recipe):
    """Minibatch SGD as PyTorch does it (decay into the gradient, then momentum), in float64."""
    weights = np.vstack([kernel, bias[None]])
    inputs = np.hstack([features, np.ones((len(features), 1))])
    s, classes = recipe.label_smoothing, bias.shape[0]
    targets = (1 - s) * np.eye(classes)[labels] + s / classes
    buffer, step = np.zeros_like(weights), 0
    num_steps = len(orders) * -(-len(labels) // recipe.batch_size)
    for order in orders:
        for i in range(0, len(order), recipe.batch_size):
            chosen = order[i : i + recipe.batch_size]
            scores = inputs[chosen] @ weights
            exps = np.exp(scores - scores.max(1, keepdims=True))
            probabilities = exps / exps.sum(1, keepdims=True)
            gradient = inputs[chosen].T @ (probabilities - targets[chosen]) / len(chosen)
            gradient += recipe.weight_decay * weights
            buffer = recipe.momentum * buffer + gradient
            thirds = sum(step >= round(num_steps * third / 3) for third in (1, 2))
            weights = weights - recipe.learning_rate * 0.1**thirds * buffer
            step += 1
    return weights


def _loss_and_accuracy(features, labels, weights):
    scores = np.hstack([features, np.ones((len(features), 1))]) @ weights
    scores -= scores.max(1, keepdims=True)
    log_probs = scores - np.log(np.exp(scores).sum(1, keepdims=True))
    rows = np.arange(len(labels))
    return -log_probs[rows, labels].mean(), (scores.argmax(1) == labels).mean()


@pytest.mark.parametrize("width", [4, 16])
def test_with_nothing_unfrozen_it_is_softmax_regression(width):
    """On 8 features in primal form, on 32, more than the 20 images, in dual form."""
    source = _model(width=width)
    assert dual.is_cheaper(NUM_TRAIN, 2 * width) == (width == 16)
    options = {"key": KEY, "class_names": CLASSES, "num_unfrozen_blocks": 0, "recipe": RECIPE}
    model, history = fine_tune_one(source, TRAIN, TEST, **options)
    head_key, order_key, _ = jax.random.split(KEY, 3)
    head = reset_head(source.variables, head_key, num_classes=3)["params"]["fc"]
    orders = [
        np.asarray(jax.random.permutation(jax.random.fold_in(order_key, epoch), NUM_TRAIN))
        for epoch in range(3)
    ]
    train_features, test_features = (
        np.float64(jax.jit(partial(source.module.apply, stop=2))(source.variables, to_float(images)))
        for images in (TRAIN.images, TEST.images)
    )
    start = np.float64(head["kernel"]), np.float64(head["bias"])
    weights = _softmax_regression(train_features, TRAIN.labels, *start, orders, RECIPE)

    found = model.variables["params"]["fc"]
    assert np.abs(weights[:-1] - start[0]).max() > 0.05
    np.testing.assert_allclose(found["kernel"], weights[:-1], atol=1e-4)
    np.testing.assert_allclose(found["bias"], weights[-1], atol=1e-4)
    for name, features, labels in (
        ("train", train_features, TRAIN.labels),
        ("test", test_features, TEST.labels),
    ):
        loss, accuracy = _loss_and_accuracy(features, labels, weights)
        np.testing.assert_allclose(history[f"{name}_loss"][-1], loss, rtol=1e-4)
        np.testing.assert_allclose(history[f"{name}_accuracy"][-1], accuracy, rtol=1e-6)


def test_the_cached_and_the_recomputed_prefix_give_the_same_weights(tuned, monkeypatch):
    cached, cached_history = tuned(1, "target")
    with monkeypatch.context() as patch:
        patch.setattr(activation_cache, "prefix_is_constant", lambda *_: False)
        patch.setattr(activation_cache, "activations", lambda *_, **__: pytest.fail("the cache was used"))
        recomputed, history = _tune(1, replace(RECIPE, frozen_batch_norm="target"))
    chex.assert_trees_all_close(cached.variables, recomputed.variables, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(cached_history, history, rtol=1e-5, atol=1e-5)


def test_random_augmentation_is_applied_and_never_cached(monkeypatch):
    """Flips change a training, but not on images that are their own mirror."""
    half = TRAIN.images[:, :, :4]
    mirrored = Split(np.concatenate([half, half[:, :, ::-1]], axis=2), TRAIN.labels)
    flipping = replace(RECIPE, augmentation=Augmentation(flip=True))
    with monkeypatch.context() as patch:
        patch.setattr(activation_cache, "activations", lambda *_, **__: pytest.fail("the cache was used"))
        same, _ = _tune(0, flipping, train=mirrored)
        moved, _ = _tune(0, flipping)
    still, _ = _tune(0, RECIPE, train=mirrored)
    chex.assert_trees_all_close(same.variables, still.variables, atol=1e-5)
    unflipped, _ = _tune(0, RECIPE)
    kernels = [model.variables["params"]["fc"]["kernel"] for model in (moved, unflipped)]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-4


@pytest.mark.parametrize(("k", "mode"), [(0, "source"), (1, "update")])
def test_histories_are_what_evaluate_measures(tuned, k, mode):
    """The last entry is the returned model's; the first one that of a training that ends there."""
    recipe = replace(RECIPE, frozen_batch_norm=mode)
    # The learning rate of the first of three epochs is that of a constant schedule.
    first_epoch = replace(recipe, num_epochs=1, evaluate_epochs=(1,), schedule="constant")
    shorter = _tune(k, first_epoch)[0] if k == 0 else None
    model, history = tuned(k, mode)
    for entry, measured in ((0, shorter), (1, model)):
        for name, split in (("train", TRAIN), ("test", TEST)) if measured else ():
            found = evaluate(logits_fn(measured), split, batch_size=16)
            for metric in ("accuracy", "mean_per_class_accuracy"):
                assert history[f"{name}_{metric}"][entry] == pytest.approx(found[metric], abs=1e-6)
            assert history[f"{name}_loss"][entry] == pytest.approx(found["loss"], rel=1e-5)
    assert {x.shape for x in history.values()} == {(2,)}


@pytest.mark.parametrize(("k", "mode"), [(1, "target"), (-1, "update")])
def test_small_images_are_resized_on_the_device(k, mode):
    """As if the whole set had been resized first: the cached prefix and its statistics, and every step."""
    train, test = (Split(split.images[:, 1:6, 1:6], split.labels) for split in (TRAIN, TEST))
    recipe = replace(RECIPE, frozen_batch_norm=mode)
    options = {"key": KEY, "class_names": CLASSES, "num_unfrozen_blocks": k, "recipe": recipe}
    found, history = fine_tune_one(MODEL, train, test, **options)

    images = [resize(to_float(jnp.asarray(split.images)), 8) for split in (train, test)]
    variables = MODEL.variables
    if mode == "target":
        plain = MODEL.module.clone(momentum=0.0)
        _, changed = plain.apply(variables, images[0], train=True, mutable=["batch_stats"])
        variables = {**variables, "batch_stats": changed["batch_stats"]}
        images = [MODEL.module.apply(variables, x, stop=1) for x in images]
    run = make_fine_tune(MODEL.module.clone(num_classes=3), recipe, k)
    task = Task(images[0], jnp.asarray(train.labels), images[1], jnp.asarray(test.labels))
    tuned, expected = jax.jit(run)(
        variables["params"], variables["batch_stats"], task, np.arange(NUM_TRAIN), KEY, RATES
    )
    chex.assert_trees_all_close(found.variables, tuned, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(history, expected, rtol=1e-4, atol=1e-5)


# --- the head -------------------------------------------------------------------------------------


def test_heads_have_the_distributions_that_they_promise():
    features, classes = 8, 8000
    heads = {
        init: reset_head(MODEL.variables, jax.random.key(0), num_classes=classes, init=init, scale=0.3)[
            "params"
        ]["fc"]
        for init in HEAD_INITS
    }
    for head in heads.values():
        assert head["kernel"].shape == (features, classes) and head["bias"].shape == (classes,)
        assert {x.dtype for x in head.values()} == {jnp.dtype("float32")}
    bound = features**-0.5  # torch.nn.Linear: kaiming_uniform(a=√5), which is 1/√fan_in
    for x in heads["torch"].values():
        assert -bound <= x.min() < -0.99 * bound and 0.99 * bound < x.max() <= bound
        assert np.std(x) == pytest.approx(bound / np.sqrt(3), rel=0.03)
        assert np.mean(x) == pytest.approx(0, abs=0.01)
    assert np.std(heads["normal"]["kernel"]) == pytest.approx(0.3, rel=0.02)
    assert np.mean(heads["normal"]["kernel"]) == pytest.approx(0, abs=0.01)
    assert np.abs(heads["normal"]["kernel"]).max() > 3 * 0.3  # no bounded distribution
    assert not heads["normal"]["bias"].any()
    assert not heads["zeros"]["kernel"].any() and not heads["zeros"]["bias"].any()


def test_a_new_head_leaves_everything_else_alone():
    new = reset_head(MODEL.variables, jax.random.key(0), num_classes=7)
    assert new["batch_stats"] is MODEL.variables["batch_stats"]
    for name, layer in MODEL.variables["params"].items():
        assert name == "fc" or new["params"][name] is layer
    assert MODEL.variables["params"]["fc"]["kernel"].shape == (8, 5)


@pytest.mark.parametrize("init", ["torch", "normal"])
def test_two_sources_get_the_same_head_from_the_same_key(init):
    heads = [
        reset_head(model.variables, jax.random.key(seed), num_classes=3, init=init)["params"]["fc"]
        for model, seed in ((MODEL, 0), (_model(seed=1), 0), (MODEL, 1))
    ]
    chex.assert_trees_all_equal(heads[0], heads[1])
    assert np.abs(heads[0]["kernel"] - heads[2]["kernel"]).max() > 0.1


def test_what_is_frozen_has_no_backward_pass():
    """Where it is computed in every step, gradients stop at what enters the first trained block."""
    params, batch_stats = VARIABLES
    apply = program._apply_from(MODEL.module, 1, False, "source")
    images = to_float(TRAIN.images[:4])
    gradients = jax.jit(jax.grad(lambda p: jnp.sum(apply(p, batch_stats, images, False)[0] ** 2)))(params)
    for name, layer in gradients.items():
        moves = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(layer))
        assert (moves == 0) == (name in _frozen_names(1)), name
