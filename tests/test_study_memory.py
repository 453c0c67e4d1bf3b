"""What fits is cached; what does not is computed again; either way the same networks come out."""

import logging
from dataclasses import replace

import jax
import numpy as np
import pytest
from test_fine_tune_many import CLASSES, KEY, MODEL, NUM_TRAIN, RECIPE, TEST, TRAIN

from advtransfer import parallel
from advtransfer.data import Augmentation
from advtransfer.transfer import activation_cache, cache_bytes, fine_tune_many, fine_tune_one, prepare

pytestmark = pytest.mark.usefixtures("unoptimised")

SIZE = MODEL.spec.image_size


@pytest.mark.parametrize("k", [0, 1])
def test_a_cache_that_does_not_fit_is_not_made(k, monkeypatch, caplog):
    cached, history = fine_tune_one(
        MODEL, TRAIN, TEST, key=KEY, class_names=CLASSES, num_unfrozen_blocks=k, recipe=RECIPE
    )
    size = cache_bytes(MODEL.module, RECIPE, k, SIZE, NUM_TRAIN, TEST.num_images)
    task = prepare(MODEL, TRAIN, TEST, RECIPE, k).task
    assert size == task.train_inputs.nbytes + task.test_inputs.nbytes
    flipped = replace(RECIPE, augmentation=Augmentation(flip=True), num_views=3)
    size_of_views = cache_bytes(MODEL.module, flipped, k, SIZE, NUM_TRAIN, TEST.num_images)
    assert size_of_views == 3 * task.train_inputs.nbytes + task.test_inputs.nbytes
    monkeypatch.setattr(parallel, "free_bytes", lambda: size)
    with caplog.at_level(logging.WARNING):
        again, recomputed = fine_tune_one(
            MODEL, TRAIN, TEST, key=KEY, class_names=CLASSES, num_unfrozen_blocks=k, recipe=RECIPE
        )
    assert "the frozen blocks are computed in every step instead" in caplog.text
    assert prepare(MODEL, TRAIN, TEST, RECIPE, k).task.train_inputs.dtype == np.uint8
    for name in history:
        np.testing.assert_allclose(recomputed[name], history[name], rtol=1e-4, atol=1e-5)
    leaves = zip(jax.tree.leaves(cached.variables), jax.tree.leaves(again.variables), strict=True)
    assert max(np.abs(x - y).max() for x, y in leaves) < 1e-4

    views = replace(RECIPE, augmentation=Augmentation(flip=True), num_views=2)
    with pytest.raises(ValueError, match="lower num_views=2"):
        prepare(MODEL, TRAIN, TEST, views, k)


def test_a_cache_takes_at_most_seven_tenths_of_what_is_free(monkeypatch, caplog):
    monkeypatch.setattr(parallel, "free_bytes", lambda: 10**10)
    for size, fits in ((0, False), (7 * 10**9, True), (7 * 10**9 + 1, False)):
        monkeypatch.setattr(activation_cache, "cache_bytes", lambda *_, size=size: size)
        assert activation_cache.is_cached(MODEL.module, RECIPE, 1, SIZE, 2000, 30) == fits
    (message,) = caplog.messages
    assert message.startswith("the activations of 2,000 + 30 images at k = 1 take 7.0 GB of the 10.0 GB that")
    with pytest.raises(ValueError, match="lower num_views=2"):
        activation_cache.is_cached(MODEL.module, replace(RECIPE, num_views=2), 1, SIZE, 2000, 30)


def test_only_the_images_that_trials_take_are_cached():
    used = np.array([3, 4, 11, 17])
    all_images, some = (
        prepare(MODEL, TRAIN, TEST, RECIPE, 1),
        prepare(MODEL, TRAIN, TEST, RECIPE, 1, used=used),
    )
    assert len(some.task.train_inputs) == 4 < len(all_images.task.train_inputs) == NUM_TRAIN
    np.testing.assert_allclose(
        some.task.train_inputs[some.rows[used]], all_images.task.train_inputs[used], rtol=1e-5, atol=1e-5
    )
    np.testing.assert_array_equal(some.task.train_labels, TRAIN.labels[used])


def test_trials_with_statistics_of_their_own_go_in_parts_where_memory_is_short(monkeypatch):
    recipe = replace(RECIPE, frozen_batch_norm="target")
    subsets = np.stack([np.random.default_rng(i).permutation(NUM_TRAIN)[:10] for i in range(5)])
    options = {
        "subsets": subsets,
        "keys": jax.random.split(KEY, 5),
        "num_classes": 3,
        "num_unfrozen_blocks": 1,
        "recipe": recipe,
    }
    together = fine_tune_many(MODEL, TRAIN, TEST, **options)
    size = cache_bytes(MODEL.module, recipe, 1, SIZE, 10, TEST.num_images)
    monkeypatch.setattr(parallel, "free_bytes", lambda: 4 * size)
    in_parts = fine_tune_many(MODEL, TRAIN, TEST, **options)
    for name in together:
        np.testing.assert_allclose(in_parts[name], together[name], rtol=1e-4, atol=1e-5)


def test_a_trial_alone_and_in_its_group_make_the_same_network(monkeypatch):
    """Weights to 1e-5, and not one prediction on a test image differs."""
    from advtransfer.transfer import tuning as module

    def run_and_keep(make):
        def made(*args):
            run = make(*args)

            def kept(*args):
                variables, history = run(*args)
                return variables, history | {"kernel": variables["params"]["fc"]["kernel"]}

            return kept

        return made

    monkeypatch.setattr(module, "make_fine_tune", run_and_keep(module.make_fine_tune))
    module._many.cache_clear()
    subsets = np.stack([np.random.default_rng(i).permutation(NUM_TRAIN)[:12] for i in range(4)])
    keys = jax.random.split(KEY, 4)
    for k in (0, 1):
        options = {"num_classes": 3, "num_unfrozen_blocks": k, "recipe": RECIPE}
        found = fine_tune_many(MODEL, TRAIN, TEST, subsets=subsets, keys=keys, **options)
        for t in range(4):
            alone = fine_tune_many(
                MODEL, TRAIN, TEST, subsets=subsets[t : t + 1], keys=keys[t : t + 1], **options
            )
            assert np.abs(found["kernel"][t] - alone["kernel"][0]).max() <= 1e-5
            np.testing.assert_array_equal(found["test_accuracy"][t], alone["test_accuracy"][0])
    module._many.cache_clear()
