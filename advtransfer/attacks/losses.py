"""What an attack climbs: a loss per example, float32 [N], of logits [N, classes] and labels int [N]."""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Integer

from advtransfer.arrays import AnyArray

_TINY = 1e-12  # keeps a ratio of equal logits finite, as in Croce and Hein's code

LossFn = Callable[[Float[Array, "n classes"], Integer[Array, " n"]], Float[Array, " n"]]


def cross_entropy(
    logits: Float[AnyArray, "n classes"], labels: Integer[AnyArray, " n"]
) -> Float32[Array, " n"]:
    """Softmax cross-entropy."""
    _check(logits, labels)
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(log_probs, labels[:, None], axis=1)[:, 0]


def log_odds(logits: Float[AnyArray, "n classes"], labels: Integer[AnyArray, " n"]) -> Float32[Array, " n"]:
    """log((1 - p) / p) of the label's probability p: logsumexp of the other logits - the label's logit.

    Cross-entropy is softplus of it, and its gradient this one's times 1 - p. So both rank images alike and
    their gradients point the same way; but however sure the network is, this one has no factor that vanishes.
    """
    others, own = _split(logits, labels)
    return jax.nn.logsumexp(others, axis=-1) - own


def margin(logits: Float[AnyArray, "n classes"], labels: Integer[AnyArray, " n"]) -> Float32[Array, " n"]:
    """The largest other logit - the label's (Carlini and Wagner, 2017, f6 without its bound).

    An attack on it moves the same whatever positive number the logits are multiplied with.
    """
    others, own = _split(logits, labels)
    return jnp.max(others, axis=-1) - own


def dlr(logits: Float[AnyArray, "n classes"], labels: Integer[AnyArray, " n"]) -> Float32[Array, " n"]:
    """Difference of logits ratio (Croce and Hein, 2020, eq. 6): `margin` over the distance from the first to
    the third largest logit. It neither saturates nor depends on the logits' scale and shift.

    Raises:
      ValueError: fewer than three classes.
    """
    _check_classes(logits, 3)
    first, _, third = jnp.moveaxis(jax.lax.top_k(logits.astype(jnp.float32), 3)[0], -1, 0)
    return margin(logits, labels) / (first - third + _TINY)


def targeted_dlr(
    logits: Float[AnyArray, "n classes"], labels: Integer[AnyArray, " n"], targets: Integer[AnyArray, " n"]
) -> Float32[Array, " n"]:
    """`dlr` towards a class (Croce and Hein, 2020, eq. 7): the target's logit - the label's, over the
    distance from the first logit to the mean of the third and fourth largest.

    Raises:
      ValueError: fewer than four classes.
    """
    _check_classes(logits, 4)
    first, _, third, fourth = jnp.moveaxis(jax.lax.top_k(logits.astype(jnp.float32), 4)[0], -1, 0)
    return targeted_margin(logits, labels, targets) / (first - (third + fourth) / 2 + _TINY)


def targeted_margin(
    logits: Float[AnyArray, "n classes"], labels: Integer[AnyArray, " n"], targets: Integer[AnyArray, " n"]
) -> Float32[Array, " n"]:
    """The target's logit - the label's."""
    _check(logits, labels)
    _check(logits, targets)
    pair = jnp.take_along_axis(logits.astype(jnp.float32), jnp.stack([targets, labels], axis=1), axis=1)
    return pair[:, 0] - pair[:, 1]


def is_fooled(logits: Float[AnyArray, "n classes"], labels: Integer[AnyArray, " n"]) -> Bool[Array, " n"]:
    """Where the largest logit is not the label's, or a logit is not a finite number."""
    _check(logits, labels)
    return (jnp.argmax(logits, axis=-1) != labels) | ~jnp.all(jnp.isfinite(logits), axis=-1)


def _split(logits: AnyArray, labels: AnyArray) -> tuple[Array, Array]:
    """The logits with -inf in the label's place, and the label's logit."""
    _check(logits, labels)
    logits = logits.astype(jnp.float32)
    is_label = jnp.arange(logits.shape[-1])[None] == labels[:, None]
    return jnp.where(is_label, -jnp.inf, logits), jnp.sum(jnp.where(is_label, logits, 0.0), axis=-1)


def _check(logits: AnyArray, labels: AnyArray) -> None:
    chex.assert_rank(logits, 2)
    chex.assert_shape(labels, logits.shape[:1])
    chex.assert_type(labels, int)


def _check_classes(logits: AnyArray, number: int) -> None:
    if logits.shape[-1] < number:
        raise ValueError(f"this loss takes {number} classes or more, not {logits.shape[-1]}: take the margin")
