"""What a network looks at: the gradient of its loss with respect to the pixels, and two numbers about it.

    gradients(logits_fn, images, labels)                     # plain
    smooth_grad(logits_fn, images, labels, key=key)          # averaged over noisy copies
    integrated_gradients(logits_fn, images, labels)          # along the way from a baseline
    to_picture(...), low_frequency_share(...), alignment(...)

The images may be natural ones or what `pgd` has made of them in any threat model; and
`threat_model.step(images, gradients, eps)` is the first step of an attack along these gradients. Everything
is per image, and does not depend on the other images or on `batch_size`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, Float32, Float64, Integer, PRNGKeyArray, Real

from advtransfer import parallel
from advtransfer.arrays import AnyArray
from advtransfer.attacks import LogitsFn, LossFn, as_network, jit_for, log_odds
from advtransfer.labels import check_labels


def stable_cross_entropy(
    logits: Float[AnyArray, "n classes"], labels: Integer[AnyArray, " n"]
) -> Float32[Array, " n"]:
    """Softmax cross-entropy per example, float32 [N], whose gradient is right however sure the network is.

    Through a softmax the gradient is a difference of probabilities, in float32 without a correct digit when
    the label's is within 1e-7 of 1, on images the network is sure of. Written as
    softplus(log odds) it is a small factor times the gradient of the log odds.
    """
    return jax.nn.softplus(log_odds(logits, labels))


def gradients(
    logits_fn: LogitsFn,
    images: Float[AnyArray, "n h w c"],
    labels: Integer[AnyArray, " n"],
    *,
    loss_fn: LossFn = stable_cross_entropy,
    batch_size: int = 64,
) -> Float32[np.ndarray, "n h w c"]:
    """Gradient of each image's loss with respect to its pixels, float32 [N, H, W, C], loss per unit of pixel.

    Args:
      logits_fn: images [N, H, W, C] in [0, 1] to logits [N, classes], such as `at.logits_fn(model)`.
      images: float [N, H, W, C].
      labels: int [N].
      loss_fn: (logits, labels) to a loss per image [N].
      batch_size: images on the device at once.

    Raises:
      ValueError: images that are not floats, or labels that are not classes.
    """
    network = _network(logits_fn, images, labels, batch_size)
    gradients_of = jit_for(network, _gradients, static_argnames="loss_fn")
    step = functools.partial(gradients_of, network, loss_fn=loss_fn)
    return _in_batches(step, batch_size, images, labels)


def smooth_grad(
    logits_fn: LogitsFn,
    images: Float[AnyArray, "n h w c"],
    labels: Integer[AnyArray, " n"],
    *,
    key: PRNGKeyArray,
    num_samples: int = 50,
    noise: float = 0.15,
    loss_fn: LossFn = stable_cross_entropy,
    batch_size: int = 64,
) -> Float32[np.ndarray, "n h w c"]:
    """SmoothGrad (Smilkov et al., 2017, arXiv:1706.03825): the mean of `gradients` over noisy copies.

    Args:
      logits_fn, images, labels, loss_fn, batch_size: as for `gradients`, whose errors are raised too.
      key: of the noise; image i draws from `fold_in(key, i)`.
      num_samples: noisy copies of every image.
      noise: standard deviation of the Gaussian noise, as a share of the image's own range (max - min).
        The defaults are within the paper's 10-20 % and up to 50 samples. Nothing is clipped.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}: SmoothGrad needs at least one noisy copy")
    network = _network(logits_fn, images, labels, batch_size)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(images)))
    gradients_of = jit_for(network, _smooth_grad, static_argnames="loss_fn")
    step = functools.partial(gradients_of, network, num_samples=num_samples, noise=noise, loss_fn=loss_fn)
    return _in_batches(step, batch_size, images, labels, keys)


class IntegratedGradients(NamedTuple):
    """Attributions, and how far each image's are from adding up as they should."""

    attributions: Float32[np.ndarray, "n h w c"]  # units of the loss
    errors: Float32[np.ndarray, " n"]  # see `integrated_gradients`


def integrated_gradients(
    logits_fn: LogitsFn,
    images: Float[AnyArray, "n h w c"],
    labels: Integer[AnyArray, " n"],
    *,
    baseline: float | Float[AnyArray, "h w c"] = 0.0,
    num_steps: int = 256,
    max_steps: int = 16384,
    tolerance: float = 1e-3,
    loss_fn: LossFn = stable_cross_entropy,
    batch_size: int = 64,
) -> IntegratedGradients:
    """Integrated gradients of the loss (Sundararajan et al., 2017, arXiv:1703.01365, eq. 1).

    attributions = (image - baseline) · ∫₀¹ gradient(baseline + t (image - baseline)) dt; they sum to
    loss(image) - loss(baseline), "completeness". What raises the loss is positive.

    The integral is a trapezium sum whose steps are halved, every gradient serving again, until the error in
    completeness is at most `tolerance`. The error is relative to `|loss(image) - loss(baseline)|`, or to 1
    where that is less. With ReLUs the integrand jumps, so the error falls as 1 / steps only, Gauss-Legendre's
    too.

    Args:
      logits_fn, images, labels, loss_fn, batch_size: as for `gradients`, whose errors are raised too.
      baseline: the image where nothing is to be seen, a number or [H, W, C]; black if not given.
      num_steps: of the first sum (paper, §5: 20 to 300).
      max_steps: no finer sum than this is tried; `errors` tells of the images that would have needed it.
      tolerance: see above.
    """
    if not 1 <= num_steps <= max_steps:
        raise ValueError(f"num_steps is {num_steps}: choose 1 to max_steps, which is {max_steps}")
    step = functools.partial(
        _integrated_gradients,
        _network(logits_fn, images, labels, batch_size),
        baseline=baseline,
        num_steps=num_steps,
        max_steps=max_steps,
        tolerance=tolerance,
        loss_fn=loss_fn,
    )
    return _in_batches(step, batch_size, images, labels)


def _gradients(logits_fn, images, labels, loss_fn):
    return jax.grad(lambda x: jnp.sum(loss_fn(logits_fn(x), labels)))(images)


def _smooth_grad(logits_fn, images, labels, keys, num_samples, noise, loss_fn):
    pixels = tuple(range(1, images.ndim))
    scale = noise * jnp.ptp(images, axis=pixels, keepdims=True)

    def add(i, total):
        draws = jax.vmap(
            lambda key: jax.random.normal(jax.random.fold_in(key, i), images.shape[1:], jnp.float32)
        )(keys)
        return total + _gradients(logits_fn, images + scale * draws, labels, loss_fn)

    return jax.lax.fori_loop(0, num_samples, add, jnp.zeros_like(images)) / num_samples


def _integrated_gradients(
    logits_fn, images, labels, *, baseline, num_steps, max_steps, tolerance, loss_fn
) -> IntegratedGradients:
    baseline = jnp.broadcast_to(jnp.float32(baseline), images.shape)
    way, steps = np.float64(images - baseline), num_steps
    losses_of = jit_for(logits_fn, _losses, static_argnames="loss_fn")
    losses = [np.float64(losses_of(logits_fn, x, labels, loss_fn=loss_fn)) for x in (baseline, images)]
    change = losses[1] - losses[0]

    mean_gradients = jit_for(logits_fn, _mean_gradients, static_argnames="loss_fn")

    def mean_at(offset, steps):
        args = logits_fn, baseline, images, labels, offset, steps
        return np.float64(mean_gradients(*args, loss_fn=loss_fn))

    def errors(mean):
        return np.abs(np.sum(mean * way, axis=(1, 2, 3)) - change) / np.maximum(np.abs(change), 1.0)

    mean = mean_at(0.0, steps)
    while 2 * steps <= max_steps and np.any(unfinished := errors(mean) > tolerance):
        mean[unfinished] = 0.5 * (mean + mean_at(0.5, steps))[unfinished]
        steps *= 2
    return IntegratedGradients((mean * way).astype(np.float32), errors(mean).astype(np.float32))


def _losses(logits_fn, images, labels, loss_fn):
    return loss_fn(logits_fn(images), labels)


def _mean_gradients(logits_fn, baseline, images, labels, offset, steps, loss_fn):
    """On the way from the baseline to the images: with offset 0 the trapezium rule over that many steps, with
    offset 0.5 their midpoints."""

    def add(i, total):
        t = (i + offset) / steps
        weight = jnp.where((t == 0) | (t == 1), 0.5, 1.0)
        return total + weight * _gradients(logits_fn, baseline + t * (images - baseline), labels, loss_fn)

    return jax.lax.fori_loop(0, steps + (offset == 0), add, jnp.zeros_like(images)) / steps


def _network(logits_fn: LogitsFn, images: AnyArray, labels: AnyArray, batch_size: int) -> Partial:
    """The network as a pytree, for batches of the images, once these and the labels are checked."""
    chex.assert_rank(images, 4)
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images are {images.dtype}: pass floats in [0, 1], such as images / 255")
    batch = jax.ShapeDtypeStruct((min(batch_size, len(images)), *images.shape[1:]), jnp.float32)
    network = as_network(logits_fn, batch)
    check_labels(labels, len(images), jax.eval_shape(network, batch).shape[1])
    return network


def _in_batches(step: Callable[..., Any], batch_size: int, images: AnyArray, *others: AnyArray) -> Any:
    """`step` of (images, *others), `batch_size` examples at a time; a tree of NumPy arrays [N, ...]."""
    arrays = (jnp.asarray(images, jnp.float32), *others)
    size = min(batch_size, len(images))
    results = []
    for i in range(0, len(images), size):
        batch, _ = parallel.pad([array[i : i + size] for array in arrays], size)
        results.append(jax.device_get(step(*batch)))
    return jax.tree.map(lambda *x: np.concatenate(x)[: len(images)], *results)


def to_picture(values: Float[AnyArray, "n h w c"]) -> Float32[np.ndarray, "n h w c"]:
    """Gradients [N, H, W, C] as pictures, float32 in [0, 1]: clipped at ±3 standard deviations of the image's
    own values and scaled from there (Tsipras et al., 2019, arXiv:1805.12152, figure 2). The standard
    deviation is taken about zero, so that a zero is mid-grey."""
    values = np.asarray(values, np.float64)
    chex.assert_rank(values, 4)
    deviation = np.sqrt(np.mean(values**2, axis=(1, 2, 3), keepdims=True))
    scaled = 0.5 + values / np.where(deviation > 0, 6 * deviation, 1.0)
    return np.clip(scaled, 0.0, 1.0).astype(np.float32)


def low_frequency_share(
    values: Real[AnyArray, "n h w c"], *, cutoff: float = 0.25
) -> Float64[np.ndarray, " n"]:
    """Share of each image's energy at low spatial frequencies, float64 [N] in [0, 1].

    The energy is the sum of the squares, by Parseval over the two-dimensional Fourier transform too, of all
    channels together. A frequency of u cycles over the height H and v over the width W counts as low where
    hypot(2u / H, 2v / W) <= cutoff: as a share of the Nyquist frequency, constants included. White noise has
    there the share of such frequencies among all H·W. An image of zeros has the share 0.

    Args:
      values: [N, H, W, C], gradients or images.
      cutoff: share of the Nyquist frequency; up to 1 along the axes, sqrt(2) in the corners.
    """
    chex.assert_rank(values, 4)
    height, width = values.shape[1:3]
    radius = np.hypot(2 * np.fft.fftfreq(height)[:, None], 2 * np.fft.fftfreq(width)[None])
    low = radius <= cutoff + 1e-12
    energy = np.stack(
        [np.sum(np.abs(np.fft.fft2(x, axes=(0, 1))) ** 2, axis=-1) for x in np.asarray(values, np.float64)]
    )
    total = energy.sum((1, 2))
    return (energy * low).sum((1, 2)) / np.where(total > 0, total, 1.0)


def alignment(
    values: Float[AnyArray, "n h w c"], images: Real[AnyArray, "n h w c"]
) -> Float64[np.ndarray, " n"]:
    """`|⟨image, gradient⟩|` / (‖image‖ ‖gradient‖), float64 [N] in [0, 1]; 0 where either is all zeros.

    The alignment of Etmann et al. (2019, arXiv:1905.04172) divided by ‖image‖, so that it is a
    cosine. As there the image is not centred: its origin is black.
    """
    values, images = np.asarray(values, np.float64), np.asarray(images, np.float64)
    chex.assert_equal_shape([values, images])
    values, images = (x.reshape(len(x), -1) for x in (values, images))
    norms = np.linalg.norm(values, axis=1) * np.linalg.norm(images, axis=1)
    return np.abs(np.sum(values * images, axis=1)) / np.where(norms > 0, norms, 1.0)
