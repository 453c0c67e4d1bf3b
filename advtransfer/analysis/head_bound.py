"""How far the loss of a linear head can rise in a ball around an image, by the sensitivity of its features
(Nern et al., 2023, "On Transfer of Adversarial Robustness from Pretraining to Downstream Tasks", NeurIPS).

    sensitivity = feature_sensitivity(features_fn, images, at.L2(0.5), key=key)    # once for every source
    found = head_bound(features, labels, kernel, bias, sensitivity)                # cheap, for every head

The sensitivity is what an attack finds, at most the true one: the bound is an estimate, not a certificate.
"""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Float32, Float64, Integer, PRNGKeyArray

from advtransfer import parallel
from advtransfer.arrays import AnyArray
from advtransfer.attacks import L2, Linf, LogitsFn, as_network, check_images, jit_for, pgd
from advtransfer.attacks.threat_models import Size
from advtransfer.labels import check_labels


def feature_sensitivity(
    features_fn: LogitsFn,
    images: Float[AnyArray, "n h w c"],
    threat_model: L2 | Linf,
    *,
    key: PRNGKeyArray,
    num_steps: int = 20,
    step_size: Size | None = None,
    num_restarts: int = 1,
    batch_size: int = 256,
) -> Float32[np.ndarray, " n"]:
    """The largest ‖f(x + δ) − f(x)‖₂ that PGD finds in the threat model, of every image.

    The search starts at random, as at δ = 0 the gradient is zero.

    Args:
      features_fn: images [N, H, W, C] in [0, 1] to features [N, D], what a linear head reads; any callable
        that JAX can trace, such as `visualise.features_fn(model, B, fake_relu=False)`.
      images: float [N, H, W, C] in [0, 1].
      threat_model, num_steps, num_restarts: as for `pgd`.
      step_size: None: half of eps. Such long steps, which overshoot where a loss is climbed, find more here.
      key: of the random starts; they depend on an image's place alone.
      batch_size: images at a time.

    Returns:
      float32 [N], in the units of the features.

    Raises:
      ValueError: as `pgd`.
    """
    chex.assert_rank(images, 4)
    chex.assert_type(images, float)
    check_images(images)
    if step_size is None:
        step_size = threat_model.eps / 2
    images, keys = np.asarray(images, np.float32), jax.random.split(key, len(images))
    size = min(batch_size, len(images))
    network, found = as_network(features_fn, jax.ShapeDtypeStruct((size, *images.shape[1:]), np.float32)), []
    for i in range(0, len(images), size):
        (batch, own), mask = parallel.pad((jnp.asarray(images[i : i + size]), keys[i : i + size]), size)
        distance = Partial(_squared_distance, network, jit_for(network, _features)(network, batch))
        moved = pgd(
            distance,
            batch,
            np.zeros(size, np.int32),
            threat_model,
            num_steps=num_steps,
            step_size=step_size,
            key=own,
            random_start=True,
            num_restarts=num_restarts,
            loss_fn=_only_column,
        )
        squares = np.asarray(jit_for(network, _squared_distance)(network, distance.args[1], moved))
        found.append(np.sqrt(squares[mask > 0, 0]))
    return np.concatenate(found)


def _features(network: Partial, images: Array) -> Array:
    return network(images).astype(jnp.float32)


def _squared_distance(network: Partial, center: Array, images: Array) -> Array:
    """[N, 1]; unlike the distance, its gradient at the centre is a number."""
    return jnp.sum((_features(network, images) - center) ** 2, axis=1, keepdims=True)


def _only_column(scores: Array, labels: Array) -> Array:
    return scores[:, 0]


class HeadBound(NamedTuple):
    """Of every image."""

    loss: Float64[np.ndarray, " n"]  # cross-entropy of the head, without an attack
    bound: Float64[np.ndarray, " n"]  # that it does not exceed where the features move that far
    sharp_bound: Float64[np.ndarray, " n"]  # the same, class by class
    keeps_label: Bool[np.ndarray, " n"]  # whether the label stays the largest logit there


def head_bound(
    features: Float[AnyArray, "n d"],
    labels: Integer[AnyArray, " n"],
    kernel: Float[AnyArray, "d classes"],
    bias: Float[AnyArray, " classes"],
    sensitivity: Float[AnyArray, " n"],
) -> HeadBound:
    """What a linear head can lose if the features of image i move by at most `sensitivity[i]` in ℓ2.

    With z = Wᵀf + b, cross-entropy is log Σ_j exp(z_j − z_y). A move Δ of the features changes z_j − z_y by
    (w_j − w_y)·Δ, at most g_j ‖Δ‖₂ with g_j = ‖w_j − w_y‖₂. So CE(f + Δ) ≤ log Σ_j exp(z_j − z_y + g_j ‖Δ‖₂),
    the sharp bound, which is at most CE(f) + max_j g_j ‖Δ‖₂, the bound, as all exponents rise by no more than
    that. The label stays the answer where z_y − z_j > g_j ‖Δ‖₂ for every other j.

    Nern et al. bound the rise of any Lipschitz loss by a norm of all of W; that of cross-entropy, whose
    constant is 2 in the maximum norm, by 2 max_j ‖w_j‖₂ ‖Δ‖₂. The triangle inequality makes this bound never
    looser. It is of these images alone: theirs has a further term for images that were not drawn. Both are
    looser than the truth where features move across w_j − w_y, not along it.

    Args:
      features: float [N, D], what the head reads.
      labels: int [N].
      kernel, bias: float [D, classes] and [classes].
      sensitivity: float [N], 0 or more; see `feature_sensitivity`.

    Raises:
      ValueError: labels that are not classes, or a negative sensitivity.
    """
    chex.assert_rank([features, kernel, bias], [2, 2, 1])
    chex.assert_shape(kernel, (features.shape[1], None))
    chex.assert_shape(bias, kernel.shape[1:])
    chex.assert_shape(sensitivity, (len(features),))
    check_labels(labels, len(features), len(bias))
    if np.min(sensitivity, initial=0) < 0:
        raise ValueError(f"a sensitivity is {np.min(sensitivity):.3g}: it is a distance, 0 or more")
    weights, labels = np.asarray(kernel, np.float64).T, np.asarray(labels)
    logits = np.asarray(features, np.float64) @ weights.T + np.asarray(bias, np.float64)
    ahead = logits - np.take_along_axis(logits, labels[:, None], axis=1)  # z_j - z_y, zero at the label
    apart = np.stack([np.linalg.norm(weights - own, axis=1) for own in weights])[labels]
    moved = apart * np.asarray(sensitivity, np.float64)[:, None]
    loss, sharp = (np.logaddexp.reduce(x, axis=1) for x in (ahead, ahead + moved))
    keeps = np.all((ahead + moved < 0) | (np.arange(len(bias)) == labels[:, None]), axis=1)
    return HeadBound(loss, loss + moved.max(axis=1), sharp, keeps)
