"""Saliency against closed forms, dense gradients and exact integrals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advtransfer.analysis import saliency
from advtransfer.attacks import L2, Linf, Unconstrained, cross_entropy, pgd
from advtransfer.models import Model, ModelSpec, ResNet, init_variables, logits_fn

SHAPE = (5, 4, 6, 3)
LABELS = np.array([0, 1, 2, 1, 0])
RNG = np.random.default_rng(0)
IMAGES = RNG.random(SHAPE, np.float32)
WEIGHTS = RNG.normal(size=(72, 3)).astype(np.float32)


def linear(x):
    return x.reshape(len(x), -1) @ jnp.asarray(WEIGHTS)


def of_label(logits, labels):
    """The label's logit as the loss: linear on a linear model."""
    return jnp.take_along_axis(logits, labels[:, None], 1)[:, 0]


def squares(logits, labels):
    """Of logits that are the pixels themselves."""
    return jnp.sum(logits**2, axis=1)


def pixels(x):
    return x.reshape(len(x), -1)


@functools.cache
def network():
    module = ResNet(stage_sizes=(1, 1), bottleneck=False, num_classes=3, cifar_stem=True, width=8)
    variables = init_variables(module, jax.random.key(0))
    return logits_fn(Model(module, variables, ModelSpec("small", 3, 16, module.mean, module.std)))


@pytest.mark.parametrize("margin", [-40.0, 0.0, 3.0, 17.0, 60.0])
def test_the_loss_and_its_gradient_keep_their_digits_however_sure_the_network(margin):
    logits = np.array([[margin, 0.0, -1.0]])
    others = np.exp(logits[:, 1:]).sum()
    wrong = others / (np.exp(logits[0, 0]) + others)
    loss, gradient = jax.value_and_grad(lambda z: saliency.stable_cross_entropy(z, np.array([0]))[0])(
        jnp.float32(logits)
    )
    np.testing.assert_allclose(loss, np.log1p(others * np.exp(-margin)), rtol=1e-5)
    shares = np.exp(logits[0, 1:]) / others
    np.testing.assert_allclose(gradient[0], wrong * np.array([-1.0, *shares]), rtol=1e-5)
    np.testing.assert_allclose(
        loss, cross_entropy(jnp.float32(logits), np.array([0]))[0], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_gradients_on_a_linear_model_are_the_closed_form(batch_size):
    logits = IMAGES.reshape(5, -1).astype(np.float64) @ WEIGHTS
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    want = ((probabilities - np.eye(3)[LABELS]) @ WEIGHTS.T).reshape(SHAPE)
    found = saliency.gradients(linear, IMAGES, LABELS, batch_size=batch_size)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)


def test_gradients_of_a_network_are_those_of_every_image_alone():
    fn, images = network(), RNG.random((3, 16, 16, 3), np.float32)
    found = saliency.gradients(fn, images, LABELS[:3], batch_size=2)
    alone = jax.jit(jax.grad(lambda x, label: -jax.nn.log_softmax(fn(x[None]))[0, label]))
    for image, label, gradient in zip(images, LABELS, found, strict=False):
        want = alone(image, label)
        np.testing.assert_allclose(gradient, want, rtol=1e-3, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("threat_model", [L2(0.3), Linf(0.1), Unconstrained()], ids=["l2", "linf", "none"])
def test_an_attacks_first_step_goes_along_the_gradient(threat_model):
    images = np.float32(0.4 + 0.2 * IMAGES)
    gradient = saliency.gradients(linear, images, LABELS)
    want = threat_model.project(threat_model.step(images, gradient, 0.05), images)
    step = {"num_steps": 1, "step_size": 0.05, "use_best": False}
    np.testing.assert_allclose(pgd(linear, images, LABELS, threat_model, **step), want, atol=1e-5)


def test_smooth_grad_of_a_linear_loss_is_its_gradient():
    found = saliency.smooth_grad(
        linear, IMAGES, LABELS, key=jax.random.key(1), num_samples=1, loss_fn=of_label
    )
    np.testing.assert_allclose(found, WEIGHTS.T[LABELS].reshape(SHAPE), rtol=1e-5)


def test_smooth_grad_averages_gaussian_noise_of_the_images_own_range():
    """The gradient 2x of a sum of squares is off by twice the mean of the noise."""
    images = np.stack([0.2 + 0.1 * RNG.random((32, 32, 3)), RNG.random((32, 32, 3))]).astype(np.float32)
    ranges = np.ptp(images, axis=(1, 2, 3))
    key, options = jax.random.key(2), {"num_samples": 16, "noise": 0.2, "loss_fn": squares}
    found = saliency.smooth_grad(pixels, images, LABELS[:2], key=key, **options)
    off = (found - 2 * images) / 2
    np.testing.assert_allclose(off.std((1, 2, 3)), 0.2 * ranges / np.sqrt(16), rtol=0.06)
    assert np.all(np.abs(off.mean((1, 2, 3))) < 4 * 0.2 * ranges / np.sqrt(16 * 3072))
    alone = saliency.smooth_grad(pixels, images, LABELS[:2], key=key, batch_size=1, **options)
    np.testing.assert_allclose(alone, found, atol=1e-6)
    assert np.abs(np.corrcoef(off[0].ravel(), off[1].ravel())[0, 1]) < 0.1


@pytest.mark.parametrize("baseline", [0.0, 0.3, IMAGES[0]], ids=["black", "grey", "image"])
def test_integrated_gradients_in_closed_form(baseline):
    found = saliency.integrated_gradients(linear, IMAGES, LABELS, baseline=baseline, loss_fn=of_label)
    want = (IMAGES - baseline) * WEIGHTS.T[LABELS].reshape(SHAPE)
    np.testing.assert_allclose(found.attributions, want, atol=1e-5)
    found = saliency.integrated_gradients(pixels, IMAGES, LABELS, baseline=baseline, loss_fn=squares)
    np.testing.assert_allclose(found.attributions, IMAGES**2 - baseline**2, atol=1e-5)
    assert found.errors.max() < 1e-5


def test_halved_steps_are_the_finer_trapezium_rule():
    """Of t² over 16 steps that is 1/3 + 1/(6·16²), the Euler-Maclaurin sum."""
    cubes = lambda logits, labels: jnp.sum(logits**3, axis=1)  # noqa: E731
    options = {"num_steps": 2, "max_steps": 31, "tolerance": 0.0}
    found = saliency.integrated_gradients(pixels, IMAGES, LABELS, loss_fn=cubes, **options)
    np.testing.assert_allclose(found.attributions, IMAGES**3 * (1 + 1 / (2 * 16**2)), rtol=1e-5)
    options["num_steps"] = 1
    for most, steps in ((32, 32), (1, 1)):
        options["max_steps"] = most
        found = saliency.integrated_gradients(pixels, IMAGES, LABELS, loss_fn=cubes, **options)
        np.testing.assert_allclose(found.attributions, IMAGES**3 * (1 + 1 / (2 * steps**2)), rtol=1e-5)


def relu_network():
    """One hidden layer of ReLUs with a linear loss, and its integrated gradients exactly, in float64: along
    the way every hidden unit is on for one stretch, whose length is what its weights count."""
    hidden, bias = RNG.normal(size=(72, 40)), RNG.normal(size=40)
    out = RNG.normal(size=(40, 3))

    def fn(x):
        return jax.nn.relu(x.reshape(len(x), -1) @ jnp.float32(hidden) + jnp.float32(bias)[None]) @ (
            jnp.float32(out)
        )

    start, slope = np.zeros((5, 72)) @ hidden + bias, IMAGES.reshape(5, -1).astype(np.float64) @ hidden
    root = np.clip(-start / slope, 0.0, 1.0)
    on = np.where(slope > 0, 1 - root, root)
    mean = (on * out.T[LABELS]) @ hidden.T
    return fn, mean.reshape(SHAPE) * IMAGES


def test_integrated_gradients_of_relus_against_the_exact_integral():
    fn, want = relu_network()
    found = saliency.integrated_gradients(fn, IMAGES, LABELS, loss_fn=of_label, tolerance=0.0)
    error = np.linalg.norm((found.attributions - want).reshape(5, -1), axis=1)
    assert np.all(error < 1e-3 * np.linalg.norm(want.reshape(5, -1), axis=1))
    coarse = saliency.integrated_gradients(
        fn, IMAGES, LABELS, loss_fn=of_label, num_steps=3, max_steps=6, tolerance=0.0
    )
    gaps = np.abs(coarse.attributions.sum((1, 2, 3)) - want.sum((1, 2, 3)))
    np.testing.assert_allclose(coarse.errors, gaps / np.maximum(np.abs(want.sum((1, 2, 3))), 1), rtol=1e-3)
    assert coarse.errors.max() > 1e-3


def test_completeness_on_a_network():
    fn, images = network(), RNG.random((4, 16, 16, 3), np.float32)
    labels = np.array([2, 0, 1, 1])
    found = saliency.integrated_gradients(fn, images, labels, num_steps=8, batch_size=2)
    loss = lambda x: np.float64(cross_entropy(fn(x), labels))  # noqa: E731
    change = loss(images) - loss(np.zeros_like(images))
    gaps = np.abs(np.float64(found.attributions).sum((1, 2, 3)) - change)
    assert np.all(gaps <= 1.01e-3 * np.maximum(np.abs(change), 1.0))
    assert found.errors.max() <= 1e-3


def test_an_image_stops_when_it_is_exact_whatever_the_others_need():
    fn, _ = relu_network()
    options = {"loss_fn": of_label, "num_steps": 4, "tolerance": 0.01}
    together = saliency.integrated_gradients(fn, IMAGES, LABELS, **options)
    alone = saliency.integrated_gradients(fn, IMAGES, LABELS, batch_size=1, **options)
    np.testing.assert_allclose(together.attributions, alone.attributions, atol=1e-4)


def test_pictures_clip_at_three_standard_deviations():
    values = RNG.normal(size=(2, 50, 50, 1)) * np.array([1e-9, 1e3]).reshape(2, 1, 1, 1)
    values[:, 0, 0], values[:, 0, 1] = 0.0, 10 * np.abs(values).max((1, 2))
    pictures = saliency.to_picture(values)
    sigma = np.sqrt((values**2).mean((1, 2, 3)))
    for value, picture, deviation in zip(values, pictures, sigma, strict=True):
        inside = np.abs(value) < 3 * deviation
        np.testing.assert_allclose(
            picture[inside], (value[inside] + 3 * deviation) / (6 * deviation), rtol=1e-5
        )
    np.testing.assert_array_equal(pictures[:, 0, 0], 0.5)
    np.testing.assert_array_equal(pictures[:, 0, 1], 1.0)
    np.testing.assert_array_equal(saliency.to_picture(np.zeros(SHAPE)), np.full(SHAPE, 0.5, np.float32))


def wave(u, v, height=12, width=20):
    y, x = np.mgrid[:height, :width]
    return np.cos(2 * np.pi * (u * y / height + v * x / width) + 0.4)[None, :, :, None]


@pytest.mark.parametrize(("u", "v"), [(0, 0), (3, 0), (0, 5), (-2, 3), (6, 10)])
def test_a_wave_is_low_up_to_its_own_frequency(u, v):
    frequency = np.hypot(2 * u / 12, 2 * v / 20)
    np.testing.assert_allclose(saliency.low_frequency_share(wave(u, v), cutoff=frequency), 1.0)
    below = saliency.low_frequency_share(wave(u, v), cutoff=frequency - 1e-6)
    np.testing.assert_allclose(below, 0.0, atol=1e-12)


def test_shares_of_energy_add_over_waves_and_channels():
    mixed = np.concatenate([3.0 * wave(1, 0) + 1.0 * wave(5, 2), 2.0 * wave(0, 9)], axis=-1)
    np.testing.assert_allclose(saliency.low_frequency_share(mixed, cutoff=0.3), 9 / (9 + 1 + 4))
    scaled = saliency.low_frequency_share(np.float32(mixed * 1e-30), cutoff=0.3)
    np.testing.assert_allclose(scaled, 9 / 14, rtol=1e-5)


def test_white_noise_has_the_share_of_frequencies_and_all_is_everything():
    noise = RNG.normal(size=(400, 16, 16, 3))
    radius = np.hypot(*np.meshgrid(np.arange(-8, 8) / 8, np.arange(-8, 8) / 8))
    shares = saliency.low_frequency_share(noise, cutoff=0.5)
    error = shares.std() / np.sqrt(400)
    assert abs(shares.mean() - (radius <= 0.5).mean()) < 4 * error < 0.01
    np.testing.assert_allclose(saliency.low_frequency_share(noise, cutoff=1.5), 1.0)
    np.testing.assert_array_equal(saliency.low_frequency_share(np.zeros(SHAPE)), 0.0)


def test_alignment_is_the_cosine():
    gradient = RNG.normal(size=SHAPE)
    flat = lambda x, i: np.float64(x[i]).ravel()  # noqa: E731
    want = [
        abs(flat(IMAGES, i) @ flat(gradient, i))
        / np.sqrt((flat(IMAGES, i) @ flat(IMAGES, i)) * (flat(gradient, i) @ flat(gradient, i)))
        for i in range(5)
    ]
    np.testing.assert_allclose(saliency.alignment(gradient, IMAGES), want)
    np.testing.assert_allclose(saliency.alignment(-1e-25 * IMAGES, IMAGES), 1.0)
    np.testing.assert_array_equal(saliency.alignment(np.zeros(SHAPE), IMAGES), 0.0)


def test_bad_input_is_refused_in_one_line():
    with pytest.raises(ValueError, match="images are uint8: pass floats"):
        saliency.gradients(linear, np.zeros(SHAPE, np.uint8), LABELS)
    with pytest.raises(ValueError, match="num_samples is 0"):
        saliency.smooth_grad(linear, IMAGES, LABELS, key=jax.random.key(0), num_samples=0)
    for number in (0, 11):
        with pytest.raises(ValueError, match=f"num_steps is {number}: choose 1 to max_steps, which is 10"):
            saliency.integrated_gradients(linear, IMAGES, LABELS, num_steps=number, max_steps=10)
