"""A head trained on few images, in as many dimensions as there are images.

SGD adds nothing to a linear head's kernel but multiples of the features of its images, and momentum and
weight decay add nothing but earlier kernels. So, with F [n, D] the features and W₀ [D, C] the new head, every
kernel on the way is W = r W₀ + Fᵀ A for some r and A [n, C], and its logits on the n images are r F W₀ + K A
with the Gram matrix K = F Fᵀ (the representer theorem; Schölkopf, Herbrich and Smola, 2001, theorem 1). The
step in W is a step in (A, r) by the same optimiser: the gradient Fᵀ G, with G [n, C] that in the logits, has
the coordinates (G, 0). So a step takes n products for an image and class, in place of 2 D.
"""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Integer, PyTree


class DualHead(NamedTuple):
    """What the steps of one head look up, by the image's place in its training set."""

    gram: Float32[Array, "n n"]
    initial_logits: Float32[Array, "n classes"]  # features times the initial kernel


def is_cheaper(num_images: int, num_features: int) -> bool:
    """Whether a head is trained faster in dual form (benchmarks/study.py)."""
    return num_images <= num_features


def make_dual(features: Float[Array, "n features"], kernel: Float32[Array, "features classes"]) -> DualHead:
    """The dual form for features [n, D] and the initial kernel [D, C]."""
    chex.assert_rank(features, 2)
    chex.assert_shape(kernel, (features.shape[1], None))
    features = features.astype(jnp.float32)
    highest = jax.lax.Precision.HIGHEST
    return DualHead(
        jnp.matmul(features, features.T, precision=highest),
        jnp.matmul(features, kernel, precision=highest),
    )


def dual_params(num_images: int, bias: Float32[Array, " classes"]) -> dict[str, Array]:
    """The parameters of a head that no step has changed yet; `bias` [C] is as it is."""
    chex.assert_rank(bias, 1)
    coefficients = jnp.zeros((num_images, *bias.shape), jnp.float32)
    return {"coefficients": coefficients, "rest": jnp.ones((), jnp.float32), "bias": bias}


def dual_inputs(
    dual: DualHead, places: Integer[Array, " b"]
) -> tuple[Float32[Array, "b n"], Float32[Array, "b classes"], Integer[Array, " b"]]:
    """What `dual_apply` takes for the images at `places`, integers [B] from 0 to n - 1, each at most once."""
    chex.assert_rank(places, 1)
    chex.assert_type(places, int)
    return dual.gram[places], dual.initial_logits[places], places


def dual_apply(
    params: PyTree, batch_stats: PyTree, images: PyTree, train: bool
) -> tuple[Float32[Array, "b classes"], PyTree]:
    """Logits of what `dual_inputs` returns, in the place of images, as an `Apply`: the gradient in `params`
    is in the coordinates of (A, r, bias)."""
    del train
    chex.assert_rank(images, [2, 2, 1])
    chex.assert_equal_shape_prefix(images, 1)
    logits = _logits(params["coefficients"], params["rest"], *images)
    return logits + params["bias"][None], batch_stats


def primal_head(
    params: PyTree, features: Float[Array, "n features"], kernel: Float32[Array, "features classes"]
) -> dict[str, Array]:
    """The head {"kernel" [D, C], "bias" [C]} that `params` stand for."""
    chex.assert_rank(features, 2)
    chex.assert_shape(kernel, (features.shape[1], None))
    chex.assert_shape(params["coefficients"], (features.shape[0], kernel.shape[1]))
    features = features.astype(jnp.float32)
    step = jnp.matmul(features.T, params["coefficients"], precision=jax.lax.Precision.HIGHEST)
    return {"kernel": params["rest"] * kernel + step, "bias": params["bias"]}


@jax.custom_vjp
def _logits(coefficients, rest, rows, initial_logits, places):
    del places
    return jnp.matmul(rows, coefficients, precision=jax.lax.Precision.HIGHEST) + rest * initial_logits


def _forward(coefficients, rest, rows, initial_logits, places):
    return _logits(coefficients, rest, rows, initial_logits, places), (coefficients, rows, places)


def _backward(saved, g):
    coefficients, rows, places = saved
    ascent = jnp.zeros_like(coefficients).at[places].add(g, unique_indices=True, mode="promise_in_bounds")
    return ascent, jnp.zeros((), g.dtype), jnp.zeros_like(rows), jnp.zeros_like(g), None


_logits.defvjp(_forward, _backward)
