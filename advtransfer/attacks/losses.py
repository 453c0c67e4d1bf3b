"""What an attack climbs: a loss per example, float32 [N], of logits [N, classes] and labels int [N]."""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Integer

from advtransfer.arrays import AnyArray

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
