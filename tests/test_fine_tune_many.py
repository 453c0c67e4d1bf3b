"""Many fine-tunings in one program, the forms that they take, and what is refused."""

from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_transfer import (
    CLASSES,
    KEY,
    MODEL,
    NUM_TEST,
    NUM_TRAIN,
    RATES,
    RECIPE,
    TEST,
    TRAIN,
    VARIABLES,
    _model,
    _split,
    _tune,
    tuning,
)

from advtransfer import parallel
from advtransfer.data import Augmentation, Split
from advtransfer.evaluate import evaluation_means
from advtransfer.models import block_flops, create_module
from advtransfer.transfer import (
    Recipe,
    activations,
    dual,
    fine_tune_many,
    fine_tune_one,
    num_streams,
    program,
    reset_head,
    resolve_recipe,
)
from advtransfer.transfer.program import Rates, Task, make_fine_tune

pytestmark = pytest.mark.usefixtures("two_devices")

POOL = _split(50, 4)
SUBSETS = np.stack([np.random.default_rng(i).permutation(50)[:NUM_TRAIN] for i in range(3)])
KEYS = jax.random.split(jax.random.key(11), 3)


@pytest.mark.parametrize(("k", "mode"), [(0, "source"), (1, "target")])
def test_a_trial_is_the_same_alone_and_in_a_group(k, mode):
    """Three trials on two devices, so that one of them is run twice."""
    recipe = replace(RECIPE, frozen_batch_norm=mode)
    together = fine_tune_many(
        MODEL,
        POOL,
        TEST,
        subsets=SUBSETS,
        keys=KEYS,
        num_classes=3,
        num_unfrozen_blocks=k,
        recipe=recipe,
    )
    assert {x.shape for x in together.values()} == {(3, 2)}
    for t, subset in enumerate(SUBSETS):
        _, alone = _tune(k, recipe, train=Split(*(x[subset] for x in POOL)), key=KEYS[t])
        for name in ("train_accuracy", "test_accuracy"):
            num_images = {"train": NUM_TRAIN, "test": NUM_TEST}[name.split("_")[0]]
            counts = [np.asarray(x) * num_images for x in (together[name][t], alone[name])]
            np.testing.assert_allclose(counts[0], np.rint(counts[0]), atol=1e-4)
            np.testing.assert_array_equal(*np.rint(counts), err_msg=name)
        for name in ("train_loss", "test_loss"):
            np.testing.assert_allclose(together[name][t], alone[name], rtol=1e-5, atol=1e-5)
    assert np.ptp(together["test_loss"], axis=0).min() > 1e-3  # trials do differ


@pytest.mark.parametrize(("k", "mode"), [(0, "source"), (1, "target")])
def test_trials_that_run_at_the_same_time_are_those_that_run_in_turn(k, mode, monkeypatch):
    """Five trials on two devices: three and two in turn, or four and one of two each."""
    subsets, keys = np.concatenate([SUBSETS, SUBSETS[:2]]), jax.random.split(KEYS[0], 5)
    options = {"subsets": subsets, "keys": keys, "num_classes": 3, "num_unfrozen_blocks": k}
    histories = []
    for cores in (1, 2):
        monkeypatch.setattr(parallel, "cores_per_device", lambda cores=cores: cores)
        recipe = replace(RECIPE, frozen_batch_norm=mode)
        histories.append(fine_tune_many(MODEL, POOL, TEST, **options, recipe=recipe))
    assert {x.shape for x in histories[0].values()} == {(5, 2)}
    chex.assert_trees_all_equal(*histories)
    assert num_streams(MODEL.module, k, 16, cached=True) == 2
    large = create_module("resnet18", num_classes=3)
    streams = [num_streams(large, k, 32, cached=cached) for k, cached in ((0, True), (2, True), (0, False))]
    assert streams == [2, 1, 1]


def test_a_head_whose_cache_does_not_fit_counts_as_the_whole_network(monkeypatch):
    seen = []
    monkeypatch.setattr(tuning, "num_streams", lambda *_, cached: seen.append(cached) or 1)
    for free in (10**9, 0):
        monkeypatch.setattr(parallel, "free_bytes", lambda free=free: free)
        fine_tune_many(MODEL, POOL, TEST, subsets=SUBSETS, keys=KEYS, num_classes=3, recipe=RECIPE)
    assert seen == [True, False]


def test_rates_tried_together_are_those_tried_alone():
    """On one subset they share images, order and head; in dual form and with a block of their own."""
    rates = Rates(np.float32([0.1, 0.02]), np.float32([0.0, 0.1]))
    for k, source in ((0, _model(width=16)), (1, MODEL)):
        options = {"subsets": SUBSETS, "keys": KEYS, "num_classes": 3, "num_unfrozen_blocks": k}
        history = fine_tune_many(source, POOL, TEST, **options, recipe=RECIPE, rates=rates)
        assert {x.shape for x in history.values()} == {(3, 2, 2)}
        for r in range(2):
            own = replace(
                RECIPE, learning_rate=float(rates.learning_rate[r]), weight_decay=float(rates.weight_decay[r])
            )
            alone = fine_tune_many(source, POOL, TEST, **options, recipe=own)
            for name, x in alone.items():
                np.testing.assert_allclose(history[name][:, r], x, rtol=1e-5, atol=1e-5, err_msg=name)
        assert np.abs(np.diff(history["test_loss"], axis=1)).min() > 1e-3  # rates do matter


def test_a_head_in_dual_form_takes_the_steps_of_one_in_feature_space(monkeypatch):
    source = _model(width=16)
    options = {"key": KEY, "class_names": CLASSES, "recipe": RECIPE}
    in_dual, _ = fine_tune_one(source, TRAIN, TEST, **options)
    with monkeypatch.context() as patch:
        patch.setattr(dual, "is_cheaper", lambda *_: False)
        patch.setattr(tuning, "_one", tuning._one.__wrapped__)
        primal, _ = fine_tune_one(source, TRAIN, TEST, **options)
    start = reset_head(source.variables, jax.random.split(KEY, 3)[0], num_classes=3)["params"]["fc"]
    for name in start:
        moved = np.abs(primal.variables["params"]["fc"][name] - start[name]).max()
        errors = in_dual.variables["params"]["fc"][name] - primal.variables["params"]["fc"][name]
        assert np.abs(errors).max() < 1e-5 < 1e-2 < moved


def test_fixed_views_are_cached_and_one_of_them_is_drawn_each_time():
    """Two views of images that are their own mirror are the image twice: a plain training."""
    half = TRAIN.images[:, :, :4]
    mirrored = Split(np.concatenate([half, half[:, :, ::-1]], axis=2), TRAIN.labels)
    for source in (MODEL, _model(width=32)):  # 40 rows: more than 8 features, fewer than 64
        tune = partial(fine_tune_one, source, test=TEST, key=KEY, class_names=CLASSES)
        views = replace(RECIPE, augmentation=Augmentation(flip=True), num_views=2)
        plain, _ = tune(mirrored, recipe=RECIPE)
        same, _ = tune(mirrored, recipe=views)
        chex.assert_trees_all_close(same.variables, plain.variables, atol=1e-5)
        kernels = [tune(TRAIN, recipe=r)[0].variables["params"]["fc"]["kernel"] for r in (views, RECIPE)]
        assert np.abs(kernels[0] - kernels[1]).max() > 1e-4
    enter = partial(activations, MODEL.module, MODEL.variables, start=2, augmentation=views.augmentation)
    plain, flipped = np.split(enter(TRAIN.images, num_views=2), 2)
    both = [np.asarray(enter(x)) for x in (TRAIN.images, TRAIN.images[:, :, ::-1])]
    np.testing.assert_allclose(plain, both[0], atol=1e-5)
    # An image's views depend on its number, not on its neighbours.
    few = enter(TRAIN.images[5:12], num_views=2, numbers=np.arange(5, 12), batch_size=3)
    np.testing.assert_allclose(few, np.concatenate([plain[5:12], flipped[5:12]]), atol=1e-5)
    nearest = [min(np.abs(x[i] - flipped[i]).max() for x in both) for i in range(NUM_TRAIN)]
    assert max(nearest) < 1e-5
    shares = [np.abs(both[0][i] - flipped[i]).max() > 1e-3 for i in range(NUM_TRAIN)]
    assert 0 < sum(shares) < NUM_TRAIN


def test_a_group_holds_frozen_parameters_once():
    """In the vectorised program no array is a stack of frozen kernels, one for each of 7 trials."""
    module = MODEL.module.clone(num_classes=3)
    task = Task(*(jnp.asarray(x) for x in (*TRAIN, *TEST)))
    run = make_fine_tune(module, replace(RECIPE, frozen_batch_norm="update"), 1)
    history = jax.vmap(lambda *args: run(*args, RATES)[1], in_axes=(None, None, None, 0, 0))
    subsets, keys = np.tile(np.arange(NUM_TRAIN), (7, 1)), jax.random.split(jax.random.key(0), 7)
    shapes = _carried_shapes(jax.make_jaxpr(history)(*VARIABLES, task, subsets, keys).jaxpr)
    params = MODEL.variables["params"]
    assert (7, *params["layer2_0"]["conv2"]["kernel"].shape) in shapes
    for layer in ("conv1", "layer1_0"):
        for kernel in (x for x in jax.tree.leaves(params[layer]) if x.ndim == 4):
            assert (7, *kernel.shape) not in shapes, layer


def _carried_shapes(jaxpr):
    """Shapes of everything that goes into or comes out of the loops of a program, nested ones too."""
    shapes = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            shapes |= {v.aval.shape for v in (*equation.invars, *equation.outvars)}
        for inner in jax.tree.leaves(
            equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                shapes |= _carried_shapes(inner)
    return shapes


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "change", "message"),
    [
        (3, {}, "cannot unfreeze 3 blocks: this network has 2"),
        (-2, {}, "cannot unfreeze -2 blocks"),
        (0, {"batch_size": 0}, "batch_size=0 must be a whole number, 1 or more"),
        (0, {"num_epochs": 2.5}, "num_epochs=2.5 must be a whole number"),
        (0, {"learning_rate": -0.1}, "learning_rate=-0.1 must be a number above 0"),
        (0, {"learning_rate": float("nan")}, "learning_rate=nan must be a number above 0"),
        (0, {"momentum": 1.0}, "momentum=1.0 must be a number from 0 to below 1"),
        (0, {"weight_decay": -5e-4}, "weight_decay=-0.0005 must be a number, 0 or more"),
        (0, {"label_smoothing": 1.5}, "label_smoothing=1.5 must be a number from 0 to below 1"),
        (0, {"schedule": "linear"}, "schedule='linear' must be one of constant, step, cosine, cyclic"),
        (0, {"frozen_batch_norm": "sources"}, "frozen_batch_norm='sources' must be one of update, source"),
        (0, {"head_init": "zero"}, "head_init='zero' must be one of torch, normal, zeros"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(k, change, message):
    with pytest.raises(ValueError, match=message) as single:
        _tune(k, replace(RECIPE, **change))
    with pytest.raises(ValueError, match=message) as many:
        fine_tune_many(
            MODEL,
            POOL,
            TEST,
            subsets=SUBSETS,
            keys=KEYS,
            num_classes=3,
            num_unfrozen_blocks=k,
            recipe=replace(RECIPE, **change),
        )
    assert "\n" not in str(single.value) + str(many.value)


def test_the_epochs_and_the_batch_that_a_recipe_may_have():
    for asked, measured in (((1,), (1, 3)), ((), (3,)), ((3, 1, 1, 4), (1, 3)), ((1, 2, 3), (1, 2, 3))):
        recipe = resolve_recipe(replace(RECIPE, evaluate_epochs=asked, batch_size=128), 20)
        assert (recipe.evaluate_epochs, recipe.batch_size) == (measured, 20)
        assert resolve_recipe(recipe, 20) == recipe
    with pytest.raises(ValueError, match="^evaluate_epochs=.* must be"):
        replace(RECIPE, evaluate_epochs=(0, 3))


def test_cores_take_trials_whose_forward_pass_is_small(monkeypatch):
    monkeypatch.setattr(parallel, "cores_per_device", lambda: 6)
    stem, first, second, head = block_flops(MODEL.module, 8)
    for k, cached, flops in (
        (0, True, head),
        (1, True, second + head),
        (2, True, first + second + head),
        (1, False, stem + first + second + head),
    ):
        for limit, streams in ((flops, 1), (flops + 1, 6)):
            monkeypatch.setattr(tuning, "_SMALL", limit)
            assert num_streams(MODEL.module, k, 8, cached=cached) == streams


def test_trials_with_statistics_of_their_own_take_half_of_what_is_free(monkeypatch):
    """Three times what each of them caches, or a byte an image where nothing is; on two devices."""
    for cached, free, expected in ((600, 18_000, 10), (600, 17_999, 8), (600, 0, 2), (0, 3000, 20)):
        monkeypatch.setattr(tuning, "cache_bytes", lambda *_, cached=cached: cached)
        monkeypatch.setattr(parallel, "free_bytes", lambda free=free: free)
        assert tuning._subsets_at_once(MODEL, RECIPE, 1, 20, 30) == expected


@pytest.mark.parametrize("size", [7, 10, 256])
def test_sets_are_measured_in_pieces(size, monkeypatch):
    monkeypatch.setattr(program, "EVALUATION_BATCH", size)
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(40, 3)).astype(np.float32), rng.integers(0, 3, 40)
    chosen = rng.permutation(40)[:30]
    found = program._measure(lambda rows: rows, jnp.asarray(logits), jnp.asarray(labels), chosen)
    own = logits[chosen].astype(float)
    losses = np.log(np.exp(own).sum(1)) - own[np.arange(30), labels[chosen]]
    means = evaluation_means(found)
    np.testing.assert_allclose(means["loss"], losses.mean(), rtol=1e-5)
    np.testing.assert_allclose(means["accuracy"], (own.argmax(1) == labels[chosen]).mean(), rtol=1e-6)


def _at_once(architecture, k, *, size=32, cached=True):
    module = create_module(architecture, num_classes=3)
    return tuning._trials_per_batch(module, Recipe(), k, size, 20, 400, cached=cached)


def test_heads_run_side_by_side_as_memory_allows(monkeypatch):
    """On an accelerator: the Gram matrix of each, and its features twice, in an eighth of what is free."""
    assert _at_once("resnet18", 0) == 1  # on a CPU
    monkeypatch.setattr(parallel, "platform", lambda: "tpu")
    one = 4 * (400 * 400 + 2 * 400 * 512)
    for fit, expected in ((0, 1), (1, 1), (5, 4), (8, 8), (10**6, 20)):
        monkeypatch.setattr(parallel, "free_bytes", lambda fit=fit: 8 * fit * one + 7)
        assert _at_once("resnet18", 0) == expected
    assert _at_once("resnet18", 0, cached=False) == 1


def test_trained_blocks_run_side_by_side_on_a_gpu(monkeypatch):
    """Where their maps are small, from a cache, in one group, and half of what is free holds them."""
    monkeypatch.setattr(parallel, "free_bytes", lambda: 10**12)
    for platform, expected in (("cpu", 1), ("tpu", 1), ("gpu", 20)):
        monkeypatch.setattr(parallel, "platform", lambda platform=platform: platform)
        assert _at_once("resnet18_cifar", 3) == expected
    assert _at_once("resnet18_cifar", 3, cached=False) == _at_once("resnet18_cifar", -1) == 1
    assert _at_once("resnet50", 9, size=224) == 1  # a map of 28²
    assert _at_once("resnet50", 8, size=224) == 20
    assert _at_once("resnext50_32x4d", 1, size=224) == 1
    weights = 512 * 512 * 9 * 2 + 512 * 3
    numbers = 512 * 9 * 16 * 2 + 512 + 2 * (512 * 16 * 2 + 3)  # two 3×3 convolutions on 4², and the head
    one = 16 * weights + 4 * 128 * numbers
    for fit, expected in ((0, 1), (1, 1), (5, 4), (10**6, 20)):
        monkeypatch.setattr(parallel, "free_bytes", lambda fit=fit: 2 * fit * one + 7)
        assert _at_once("resnet18_cifar", 1) == expected


@pytest.mark.parametrize("mode", ["source", "target"])
def test_side_by_side_trials_are_those_in_turn(mode, monkeypatch):
    """As batched products, as a GPU takes them."""
    options = {
        "subsets": SUBSETS,
        "keys": KEYS,
        "num_classes": len(CLASSES),
        "num_unfrozen_blocks": 1,
        "recipe": replace(RECIPE, frozen_batch_norm=mode, learning_rate=0.01),
        "rates": Rates(jnp.asarray([0.01, 0.03]), jnp.asarray([0.0, 1e-3])),
    }
    in_turn = fine_tune_many(MODEL, POOL, TEST, **options)
    batches, many = [], tuning._many
    monkeypatch.setattr(tuning, "_many", lambda *args: batches.append(args[-2]) or many(*args))
    monkeypatch.setattr(parallel, "platform", lambda: "gpu")
    monkeypatch.setattr(parallel, "num_devices", lambda: 1)
    together = fine_tune_many(MODEL, POOL, TEST, **options)
    assert set(batches) == {3}
    chex.assert_trees_all_close(together, in_turn, rtol=2e-3, atol=2e-3)
