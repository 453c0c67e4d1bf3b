"""Feature visualisation against closed forms; the fake ReLU against a network whose ReLU is always on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from advtransfer.analysis import visualise as vis
from advtransfer.attacks import L2, Linf, Unconstrained
from advtransfer.models import Model, ResNet, init_variables

RNG = np.random.default_rng(0)
SHAPE = (3, 4, 4, 3)
WEIGHTS = RNG.normal(size=(48, 5)).astype(np.float32)
THREATS = {"l2": L2(0.7), "linf": Linf(0.05), "none": Unconstrained()}


def linear(weights, x):
    return x.reshape(len(x), -1) @ weights


LINEAR = Partial(linear, jnp.asarray(WEIGHTS))


@functools.cache
def model():
    module = ResNet(stage_sizes=(1, 1, 1), bottleneck=False, num_classes=7, cifar_stem=True, width=8)
    variables = init_variables(module, jax.random.key(0))
    rng = np.random.default_rng(1)
    variables = jax.tree.map(
        lambda v: v if v.ndim > 1 else jnp.asarray(rng.uniform(0.5, 1.5, v.shape), jnp.float32), variables
    )
    return Model(module, variables, None)


def shifted(block, shift):
    """The model with a constant added to what enters the last ReLU of a block."""
    name = model().module.block_names[block]
    variables = jax.tree.map(lambda v: v, model().variables)
    norm = variables["params"][name]["bn2"]
    variables["params"][name]["bn2"] = {**norm, "bias": norm["bias"] + shift}
    return model()._replace(variables=variables)


def start(n=3, size=16):
    return np.random.default_rng(2).random((n, size, size, 3), np.float32)


def test_the_maximum_of_a_linear_unit_over_a_ball_inside_the_box():
    images = np.float32(0.4 + 0.2 * RNG.random(SHAPE))
    channels = np.array([4, 0, 2])
    direction = WEIGHTS.T[channels].reshape(SHAPE)
    direction /= np.linalg.norm(direction.reshape(3, -1), axis=1)[:, None, None, None]
    found = vis.visualise(
        vis.Objective(LINEAR, channels), images, threat_model=L2(0.3), step_size=0.05, num_steps=10
    )
    np.testing.assert_allclose(found, images + 0.3 * direction, atol=1e-5)


def test_the_maximum_with_the_papers_radius_is_a_corner_of_the_box():
    images = vis.noise(jax.random.key(0), SHAPE)
    found = vis.visualise(vis.Objective(LINEAR, 3), images, num_steps=200)
    corner = np.broadcast_to((WEIGHTS[:, 3] > 0).reshape(SHAPE[1:]), SHAPE)
    np.testing.assert_array_equal(found, corner)


def test_the_maximum_over_ball_and_box_together():
    """By Lagrange's conditions it is clip(start + λ w) with λ such that the ball's surface is reached."""
    images, w = np.float64(RNG.random(SHAPE)), np.float64(WEIGHTS[:, 1]).reshape(SHAPE[1:])
    best = []
    for image in images:
        low, high = 0.0, 100.0
        for _ in range(100):
            middle = (low + high) / 2
            far = np.linalg.norm(np.clip(image + middle * w, 0, 1) - image) > 1.5
            low, high = (low, middle) if far else (middle, high)
        best.append(np.sum(w * (np.clip(image + low * w, 0, 1) - image)))
    found = vis.visualise(
        vis.Objective(LINEAR, 1), np.float32(images), threat_model=L2(1.5), step_size=0.01, num_steps=600
    )
    climbed = np.sum(w * (np.float64(found) - images), axis=(1, 2, 3))
    assert np.all(climbed <= np.array(best) * 1.0001)
    np.testing.assert_allclose(climbed, best, rtol=5e-3)


def test_a_unit_is_a_channels_mean_over_positions_and_a_logit_a_logit():
    module, variables, _ = model()
    images = start()
    after_1 = module.apply(variables, images, stop=2)
    np.testing.assert_allclose(
        vis.unit(model(), 1, 0).scores_fn(images), after_1.mean((1, 2)), rtol=1e-5, atol=1e-6
    )
    pooled = module.apply(variables, images, stop=3)
    np.testing.assert_array_equal(vis.unit(model(), 2, 0).scores_fn(images), pooled)
    np.testing.assert_array_equal(vis.logit(model(), 0).scores_fn(images), module.apply(variables, images))


def test_inversion_of_an_invertible_map_finds_the_image():
    """By gradient descent, on a rotation with gains of 0.7 to 1.4."""
    rotations = [np.linalg.qr(RNG.normal(size=(48, 48)))[0] for _ in range(2)]
    mixing = rotations[0] @ np.diag(np.linspace(0.7, 1.4, 48)) @ rotations[1]
    features_fn = Partial(linear, jnp.asarray(mixing, jnp.float32))
    images = np.float32(0.1 + 0.8 * RNG.random(SHAPE))
    target = features_fn(images)
    objective = vis.match(features_fn, target)
    step = 0.3 * float(jnp.sum(target**2, axis=1).min())
    found = vis.visualise(
        objective,
        vis.noise(jax.random.key(1), SHAPE),
        threat_model=Unconstrained(),
        step_size=step,
        num_steps=200,
    )
    np.testing.assert_allclose(found, images, atol=1e-4)
    assert np.all(np.abs(objective.scores_fn(images)) < 1e-10)
    np.testing.assert_array_equal(vis.visualise(objective, images, num_steps=3), images)
    far = vis.match(features_fn, np.zeros((1, 48), np.float32)).scores_fn(images)
    assert np.all(np.isfinite(far))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def pixel_gradient(module, stop, fake_relu, variables, images):
    """Of all channels of an activation, or of all logits, with different weights."""

    def total(x):
        features = module.apply(variables, x, stop=stop, fake_relu=fake_relu)
        return jnp.sum(features * jnp.sin(jnp.arange(features.size)).reshape(features.shape))

    return jax.value_and_grad(total)(images)


@pytest.mark.parametrize(("block", "stop"), [(1, 2), (2, 3), (2, None)])
def test_the_fake_relu_lets_gradients_through_as_the_identity(block, stop):
    """A constant before the ReLU changes nothing in what the identity would let through: so from a network
    whose units are all dead the fake ReLU's gradient is the true one where all are alive."""
    module, images = model().module, start(2)
    dead, alive = shifted(block, -1e3).variables, shifted(block, 1e3).variables
    value, true = pixel_gradient(module, stop, False, dead, images)
    assert (value == 0 or stop is None) and not np.any(true)
    fake_value, fake = pixel_gradient(module, stop, True, dead, images)
    _, want = pixel_gradient(module, stop, False, alive, images)
    assert fake_value == value and np.abs(want).max() > 1e-3
    np.testing.assert_allclose(fake, want, rtol=1e-3, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("stop", [0, 2, 3, None])
def test_the_fake_relu_changes_no_activation(stop):
    module, variables, _ = shifted(2, -1.0)
    images = start()
    true = module.apply(variables, images, stop=stop)
    np.testing.assert_array_equal(true, module.apply(variables, images, stop=stop, fake_relu=True))
    assert stop != 3 or np.mean(true == 0) > 0.05


def test_only_the_last_relu_is_fake():
    """Block 1 dead: with its true ReLU nothing of its residual or of what it was given comes through."""
    dead = shifted(1, -1e3)
    _, gradient = pixel_gradient(dead.module, 3, True, dead.variables, start(2))
    assert not np.any(gradient)


def test_the_fake_relu_climbs_from_where_a_unit_is_dead():
    image = start(1)
    before = vis.unit(shifted(2, 1e3), 2, 0).scores_fn(image)[0, 0] - 1e3
    silent = shifted(2, -float(before) - 6.0)
    options = {"step_size": 0.5, "num_steps": 30}
    assert vis.unit(silent, 2, 0).scores_fn(image)[0, 0] == 0
    stuck = vis.visualise(vis.unit(silent, 2, 0, fake_relu=False), image, **options)
    np.testing.assert_array_equal(stuck, image)
    objective = vis.unit(silent, 2, 0)
    assert objective.scores_fn(vis.visualise(objective, image, **options))[0, 0] > 0.1


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (1, 5, 8, 1), (1, 6, 7, 2)])
def test_fourier_coordinates_against_the_full_transform(shape):
    images = np.float32(RNG.normal(size=shape))
    f = np.hypot(np.fft.fftfreq(shape[1])[:, None], np.fft.fftfreq(shape[2])[None])
    scale = 1 / np.maximum(f * max(shape[1:3]), 1)
    want = np.fft.ifft2(np.fft.fft2(images, axes=(1, 2)) * scale[None, :, :, None], axes=(1, 2))
    assert np.abs(want.imag).max() < 1e-6
    np.testing.assert_allclose(vis.scale_spectrum(images, 1), want.real, atol=1e-5)
    back = vis.scale_spectrum(vis.scale_spectrum(images, -1), 1)
    np.testing.assert_allclose(back, images, atol=1e-4)


def test_a_fourier_step_is_gradient_ascent_on_the_coordinates():
    images = np.float32(0.4 + 0.2 * RNG.random(SHAPE))
    objective = lambda x: jnp.sum(jnp.sin(3 * x) * jnp.cos(jnp.arange(144.0)).reshape(SHAPE))  # noqa: E731
    coordinates = vis.scale_spectrum(images, -1)
    moved = coordinates + 0.01 * jax.grad(lambda z: objective(vis.scale_spectrum(z, 1)))(coordinates)
    step = vis.Fourier(Unconstrained()).step(images, jax.grad(objective)(images), 0.01)
    np.testing.assert_allclose(step, vis.scale_spectrum(moved, 1), atol=1e-5)
    ball = vis.Fourier(L2(0.3)).step(images, jax.grad(objective)(images), 0.2)
    direction = (step - images).reshape(3, -1)
    direction *= 0.2 / np.linalg.norm(direction, axis=1, keepdims=True)
    np.testing.assert_allclose((ball - images).reshape(3, -1), direction, atol=1e-5)


@pytest.mark.parametrize("norm", THREATS)
@pytest.mark.parametrize("parameterisation", vis.PARAMETERISATIONS)
def test_what_is_found_is_allowed_and_higher(norm, parameterisation):
    images = RNG.random(SHAPE, np.float32)  # many pixels close to 0 or 1
    channels = np.array([1, 4, 2])
    found = vis.visualise(
        vis.Objective(LINEAR, channels),
        images,
        threat_model=THREATS[norm],
        step_size=0.1,
        num_steps=20,
        parameterisation=parameterisation,
    )
    offsets = np.asarray(found - images).reshape(3, -1)
    assert found.dtype == jnp.float32 and found.min() >= 0 and found.max() <= 1
    assert norm != "l2" or np.linalg.norm(offsets, axis=1).max() <= 0.7 + 1e-6
    assert norm != "linf" or np.abs(offsets).max() <= 0.05 + 1e-6
    assert np.all(np.sum(offsets * WEIGHTS.T[channels], axis=1) > 0.3)


def test_together_or_one_by_one_is_the_same():
    images, channels = start(3), np.array([5, 14, 30])
    features_fn = vis.features_fn(model(), 2)
    target = features_fn(start(4)[1:])
    options = {"threat_model": L2(2.0), "step_size": 0.2, "num_steps": 3}
    for objective_of in (
        lambda i: vis.unit(model(), 2, channels[i]),
        lambda i: vis.match(features_fn, target[i]),
    ):
        together = vis.visualise(objective_of(slice(0, 3)), images, **options)
        assert np.abs(together - images).max() > 0.01
        for i in range(3):
            part = slice(i, i + 1)
            alone = vis.visualise(objective_of(part), images[part], **options)
            np.testing.assert_allclose(alone, together[part], atol=1e-4)


def test_noise_is_the_papers():
    values = np.asarray(vis.noise(jax.random.key(0), (20, 32, 32, 3)))
    assert abs(values.mean() - 0.5) < 4 * 0.05 / np.sqrt(values.size)
    assert abs(values.std() - 0.05) < 4 * 0.05 / np.sqrt(2 * values.size)


def test_a_grid_puts_rows_below_one_another():
    pictures = np.float32(1.5 * RNG.random((2, 3, 4, 5, 3)) - 0.25)
    whole = vis.grid([list(row) for row in pictures], border=2)
    assert whole.shape == (2 * 6 + 2, 3 * 7 + 2, 3) and whole.dtype == np.uint8
    white = np.ones(whole.shape, bool)
    for i, j in np.ndindex(2, 3):
        place = slice(2 + 6 * i, 6 + 6 * i), slice(2 + 7 * j, 7 + 7 * j)
        np.testing.assert_array_equal(whole[place], np.round(255 * pictures[i, j].clip(0, 1)))
        white[place] = False
    assert np.all(whole[white] == 255)


def test_what_does_not_exist_is_refused_in_one_line():
    images = start(2)
    for block in (-1, 3):
        with pytest.raises(ValueError, match=f"there is no block {block}: this network has 0 to 2"):
            vis.unit(model(), block, 0)
    with pytest.raises(ValueError, match="there is no unit or class 8: there are 0 to 7"):
        vis.visualise(vis.unit(model(), 0, np.array([3, 8])), images)
    with pytest.raises(ValueError, match="there is no unit or class -1: there are 0 to 6"):
        vis.visualise(vis.logit(model(), -1), images)
    with pytest.raises(ValueError, match=r"the representation is \(3,\) and the network's there \(32,\)"):
        vis.visualise(vis.match(vis.features_fn(model(), 3), np.ones((2, 3))), images)
    with pytest.raises(ValueError, match="unknown parameterisation 'wavelet': pixels, fourier"):
        vis.visualise(vis.logit(model(), 0), images, parameterisation="wavelet")


@pytest.mark.parametrize("shape", [(4, 8), (8, 4)])
def test_the_lowest_frequency_is_that_of_the_longer_side(shape):
    """A wave of one period along it keeps its height, one of two has half of it."""
    along = np.arange(8) * 2 * np.pi / 8
    for periods, height in ((1, 1.0), (2, 0.5)):
        wave = np.cos(periods * along)
        image = np.broadcast_to(wave if shape == (4, 8) else wave[:, None], shape)[None, :, :, None]
        found = vis.scale_spectrum(np.float32(image), 1)
        np.testing.assert_allclose(found, height * image, atol=1e-6)
