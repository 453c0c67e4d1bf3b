"""The sensitivity of features against closed forms, and the bound of a head against attacks on it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from advtransfer.analysis.head_bound import feature_sensitivity, head_bound
from advtransfer.attacks import L2, Linf, cross_entropy, pgd

RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(0.4, 0.6, (7, 4, 4, 3)).astype(np.float32)  # so far inside that the box does not bind
MAP = RNG.normal(size=(48, 6)).astype(np.float32)
KEY = jax.random.key(0)


def linear(x):
    return x.reshape(len(x), -1) @ MAP


def curved(x):
    return jnp.tanh((x.reshape(len(x), -1) - 0.5) @ MAP)


def head(num_classes=4, seed=1, scale=1.0):
    rng = np.random.default_rng(seed)
    kernel, bias = rng.normal(size=(6, num_classes)), rng.normal(size=num_classes)
    return np.float32(scale * kernel), np.float32(bias)


def test_of_a_linear_map_it_is_the_largest_singular_value():
    """max ‖Aδ‖₂ over ‖δ‖₂ ≤ ε is ε σ_max(A): PGD with long steps is a power iteration there."""
    found = feature_sensitivity(linear, IMAGES, L2(0.2), key=KEY, num_steps=200)
    expected = 0.2 * np.linalg.svd(MAP, compute_uv=False)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_of_one_feature_it_is_the_dual_norm():
    """|w·δ| over ‖δ‖∞ ≤ ε is ε ‖w‖₁, on either side of zero."""
    found = feature_sensitivity(lambda x: linear(x)[:, :1], IMAGES, Linf(0.05), key=KEY, num_steps=20)
    np.testing.assert_allclose(found, 0.05 * np.abs(MAP[:, 0]).sum(), rtol=1e-4)


def test_it_depends_neither_on_the_batch_nor_on_what_stands_beside_an_image():
    options = {"key": KEY, "num_steps": 5, "num_restarts": 2}
    whole = feature_sensitivity(curved, IMAGES, L2(0.3), **options)
    parts = feature_sensitivity(curved, IMAGES, L2(0.3), batch_size=3, **options)
    np.testing.assert_allclose(parts, whole, rtol=1e-5)
    assert whole.shape == (7,) and np.ptp(whole) > 1e-3


def test_where_features_do_not_move_it_is_zero():
    found = feature_sensitivity(lambda x: 0 * linear(x) + 2.0, IMAGES, Linf(0.1), key=KEY)
    np.testing.assert_array_equal(found, 0.0)


@pytest.mark.parametrize("threat", [L2(0.2), Linf(0.05)], ids=["l2", "linf"])
@pytest.mark.parametrize("features_fn", [linear, curved], ids=["linear", "curved"])
def test_no_attack_on_a_head_finds_more_than_its_bound(features_fn, threat):
    """Of random heads; and where the bound keeps the label, so does the attacked head."""
    sensitivity = feature_sensitivity(features_fn, IMAGES, threat, key=KEY, num_steps=50, num_restarts=10)
    features, kept = np.asarray(features_fn(IMAGES)), []
    for seed, scale in itertools.product((1, 2, 3), (0.3, 3.0)):
        kernel, bias = head(seed=seed, scale=scale)
        network = Partial(lambda w, b, x: features_fn(x) @ w + b[None], kernel, bias)
        labels = np.asarray(network(IMAGES)).argmax(1)
        labels[-1] = (labels[-1] + 1) % 4
        found = head_bound(features, labels, kernel, bias, sensitivity)
        np.testing.assert_allclose(found.loss, cross_entropy(network(IMAGES), labels), rtol=1e-4, atol=1e-5)
        attacked = network(pgd(network, IMAGES, labels, threat, num_steps=50))
        losses = np.asarray(cross_entropy(attacked, labels), np.float64)
        assert np.all(losses <= found.sharp_bound + 1e-4)
        assert np.all(found.sharp_bound <= found.bound + 1e-9)
        assert losses.mean() > found.loss.mean() + 1e-3
        assert np.all(np.asarray(attacked).argmax(1)[found.keeps_label] == labels[found.keeps_label])
        assert not found.keeps_label[-1]
        kept.append(found.keeps_label[:-1].mean())
    assert np.any(np.array(kept) > 0)


def test_the_bound_is_met_where_the_head_looks_along_what_moves_most():
    """Two classes whose weights differ along the features' most sensitive direction: a large loss rises by
    exactly ‖w_1 − w_0‖ times the sensitivity, and labels flip exactly where they may."""
    left, values, _ = np.linalg.svd(MAP.T)
    direction = left[:, 0]
    kernel = np.stack([0 * direction, direction], axis=1)
    features, labels = np.asarray(linear(IMAGES)), np.zeros(7, int)
    bias = np.array([0.0, 50.0])
    found = head_bound(features, labels, kernel, bias, np.full(7, 0.2 * values[0]))
    np.testing.assert_allclose(found.bound - found.loss, 0.2 * values[0], rtol=1e-6)
    threat, logits = L2(0.2), lambda x: linear(x) @ jnp.float32(kernel) + jnp.float32(bias)[None]
    attacked = cross_entropy(logits(pgd(logits, IMAGES, labels, threat, num_steps=20)), jnp.asarray(labels))
    np.testing.assert_allclose(attacked, found.sharp_bound, rtol=1e-5)
    np.testing.assert_allclose(attacked, found.bound, rtol=1e-4)
    for shift, keeps in ((-1e-3, True), (1e-3, False)):
        bias = np.array([0.0, -(features @ direction)[0] - 0.2 * values[0] + shift])
        assert head_bound(
            features[:1], labels[:1], kernel, bias, [0.2 * values[0]] * np.ones(1)
        ).keeps_label == (keeps)


def test_it_is_at_most_the_bound_by_the_norms_of_all_weights():
    kernel, bias = head()
    labels = np.arange(7) % 4
    found = head_bound(np.asarray(linear(IMAGES)), labels, kernel, bias, np.ones(7))
    assert np.all(found.bound - found.loss <= 2 * np.linalg.norm(kernel, axis=0).max() + 1e-9)


def test_what_cannot_be_is_refused():
    kernel, bias = head()
    features = np.asarray(linear(IMAGES))
    with pytest.raises(ValueError, match="a sensitivity is -1: it is a distance, 0 or more"):
        head_bound(features, np.zeros(7, int), kernel, bias, -np.ones(7))
    with pytest.raises(ValueError, match="whose labels are 0 to 3"):
        head_bound(features, np.full(7, 4), kernel, bias, np.ones(7))
