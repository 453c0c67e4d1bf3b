"""Every warning of an evaluation: a network built to trip it, and ordinary ones that trip none."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advtransfer.attacks import (
    L2,
    Linf,
    check_black_box,
    check_large_eps,
    check_network,
    check_steps,
    cross_entropy,
    pgd,
)

RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(0.3, 0.7, (24, 4, 4, 3)).astype(np.float32)
KERNEL = RNG.normal(size=(48, 3)).astype(np.float32)


def linear(x):
    return (x.reshape(len(x), -1) - 0.5) @ KERNEL


def curved(x):
    """Not linear, with gradients everywhere."""
    return 3 * jnp.tanh(jax.nn.softplus(4 * (x.reshape(len(x), -1) - 0.5)) @ KERNEL)


LABELS = np.asarray(linear(IMAGES)).argmax(1)


def of_images(logits_fn):
    """The network's own answers as labels: all are classified rightly."""
    return np.asarray(logits_fn(IMAGES)).argmax(1)


def scaled(x):
    """As a distilled network at temperature 1 (Papernot et al., 2016)."""
    return 1e5 * linear(x)


def rounded(x):
    """Takes pixels in steps, whose derivative is zero."""
    return linear(jnp.round(16 * x) / 16)


def softmax(x):
    return jax.nn.softmax(linear(x))


def by_callback():
    """Draws on the host at every run."""
    draws = np.random.default_rng(1)

    def noise(x):
        return draws.normal(size=(len(x), 3)).astype(np.float32)

    def network(x):
        shape = jax.ShapeDtypeStruct((len(x), 3), jnp.float32)
        return linear(x) + 0.1 * jax.lax.stop_gradient(jax.pure_callback(noise, shape, x))

    network = jax.custom_jvp(network)
    network.defjvp(lambda x, t: (network(*x), jax.jvp(linear, x, t)[1]))
    return network


def by_state():
    """Draws with another key at every call, as dropout that is left on does."""
    numbers = itertools.count()
    return lambda x: (
        linear(x) + 0.1 * jax.random.normal(jax.random.fold_in(jax.random.key(0), next(numbers)), (len(x), 3))
    )


def names(warnings):
    return [warning.name for warning in warnings]


@pytest.mark.parametrize("network", [linear, curved], ids=["linear", "curved"])
def test_an_ordinary_network_trips_nothing(network):
    labels = of_images(network)
    assert check_network(network, IMAGES, labels) == ()
    assert check_network(network, IMAGES, np.roll(labels, 1)) == ()
    for threat in (L2(0.3), Linf(0.05)):
        assert check_steps(losses(network, labels, threat)) == ()
    assert check_large_eps(lower(network, labels, Linf(0.5)), chance(labels), attack="PGD") == ()


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (by_callback(), ["randomness"]),
        (by_state(), ["randomness"]),
        (softmax, ["probabilities"]),
        (scaled, ["saturation"]),
        (rounded, ["zero gradient"]),
        (lambda x: 1e5 * rounded(x), ["saturation", "zero gradient"]),
    ],
    ids=["callback", "state", "softmax", "scaled", "rounded", "both"],
)
def test_a_network_that_misleads_attacks_is_named(network, expected):
    found = check_network(network, IMAGES, LABELS)
    assert names(found) == expected
    assert all("Carlini" in warning.source or "Croce" in warning.source for warning in found)
    assert all(warning.message.endswith(".") and "\n" not in warning.message for warning in found)


def test_images_that_are_classified_wrongly_count_neither_as_saturated_nor_as_flat():
    labels = of_images(lambda x: 1e5 * rounded(x))
    labels[3:] = (labels[3:] + 1) % 3
    found = check_network(lambda x: 1e5 * rounded(x), IMAGES, labels)
    assert [warning.message[:17] for warning in found] == ["3 of 3 images tha"] * 2


@pytest.mark.parametrize(("scale", "is_warned"), [(0.5, False), (2.0, True)])
def test_saturation_begins_where_the_softmax_of_float32_is_one_hot(scale, is_warned):
    """Where every other probability is zero, so is cross-entropy's gradient."""
    margin = -np.log(np.finfo(np.float32).tiny)
    logits = np.zeros((2, 3), np.float32)
    logits[:, 1] = scale * margin + np.log(2)
    network = lambda x: jnp.asarray(logits) + 0.01 * linear(x[:2])  # noqa: E731
    found = check_network(network, IMAGES[:2], np.array([1, 1]))
    assert names(found) == ["saturation"] * is_warned
    gradient = jax.grad(lambda z: cross_entropy(z, jnp.array([1, 1])).sum())(jnp.asarray(logits))
    assert bool(np.all(np.abs(np.asarray(gradient)) < np.finfo(np.float32).tiny)) is is_warned


def losses(network, labels, threat, steps=(0, 1, 10)):
    return {
        n: float(
            cross_entropy(
                network(pgd(network, IMAGES, labels, threat, num_steps=n)), jnp.asarray(labels)
            ).mean()
        )
        for n in steps
    }


def lower(network, labels, threat):
    found = pgd(network, IMAGES, labels, threat, num_steps=20)
    return float(np.mean(np.asarray(network(found)).argmax(1) == labels))


def chance(labels):
    return np.bincount(labels).max() / len(labels)


def test_a_loss_that_does_not_rise_is_named():
    """Of pixels in steps it stays; of a network that answers far away from its training images as it does
    there, one long step finds more than many short ones along a gradient that points the wrong way."""
    found = check_steps(losses(rounded, of_images(rounded), Linf(0.05)))
    assert names(found) == ["steps"] and "do not raise the loss" in found[0].message

    def folded(x):
        """A ridge a short way along the gradient, beyond which the loss falls and rises again."""
        z = (x - 0.5).mean(axis=(1, 2, 3))
        ridge = 0.2 * jnp.exp(-(((z - 0.02) / 0.01) ** 2)) + jnp.maximum(z - 0.04, 0) * 200
        return jnp.stack([0.0 * z, ridge], axis=1)

    images, labels = np.full((2, 4, 4, 3), 0.51, np.float32), np.array([0, 0])
    found = {
        n: float(cross_entropy(folded(pgd(folded, images, labels, Linf(0.06), num_steps=n)), labels).mean())
        for n in (0, 1, 60)
    }
    assert found[1] > found[60] > found[0]
    (warning,) = check_steps(found)
    assert warning.name == "steps" and "after 1" in warning.message and "§5.2" in warning.source


@pytest.mark.parametrize(
    ("found", "is_warned"),
    [
        ({0: 1.0, 1: 2.0, 10: 2.0}, False),
        ({0: 1.0, 1: 2.0, 10: 1.995}, False),
        ({0: 1.0, 1: 2.0, 10: 1.985}, True),
        ({0: 1.0, 1: 1.0, 10: 1.0}, True),
        ({10: 3.0, 1: 2.0, 0: 1.0}, False),
    ],
)
def test_a_loss_may_fall_by_a_hundredth_of_its_rise(found, is_warned):
    assert bool(check_steps(found)) is is_warned


def test_accuracy_beyond_chance_in_a_ball_that_holds_grey_is_named():
    labels = of_images(rounded)
    found = check_large_eps(lower(rounded, labels, Linf(0.5)), chance(labels), attack="ℓ∞ PGD-20, ε = 0.5")
    assert names(found) == ["large ε"] and "ℓ∞ PGD-20, ε = 0.5 is at least 100.0%" in found[0].message
    assert check_large_eps(0.4, 0.4, attack="PGD") == ()


def test_a_black_box_that_finds_more_than_gradients_do_is_named():
    """Random signs fool pixels in steps, which no gradient moves."""
    labels, noise = of_images(rounded), np.sign(RNG.normal(size=(50, *IMAGES.shape))).astype(np.float32)
    tried = [np.asarray(rounded(np.clip(IMAGES + 0.2 * x, 0, 1))).argmax(1) == labels for x in noise]
    found = check_black_box(lower(rounded, labels, Linf(0.2)), float(np.all(tried, axis=0).mean()))
    assert names(found) == ["black box"]
    tried = [np.asarray(linear(np.clip(IMAGES + 0.2 * x, 0, 1))).argmax(1) == LABELS for x in noise]
    assert check_black_box(lower(linear, LABELS, Linf(0.2)), float(np.all(tried, axis=0).mean())) == ()


@pytest.mark.parametrize(("black_box", "is_warned"), [(0.5, False), (0.4981, False), (0.4979, True)])
def test_two_tenths_of_a_point_are_allowed(black_box, is_warned):
    assert bool(check_black_box(0.5, black_box)) is is_warned


def test_what_is_no_image_or_no_class_is_refused():
    with pytest.raises(ValueError, match="images run from 0"):
        check_network(linear, 255 * np.abs(IMAGES - IMAGES.min()), LABELS)
    with pytest.raises(ValueError, match="the network has 3 classes"):
        check_network(linear, IMAGES, LABELS + 3)
