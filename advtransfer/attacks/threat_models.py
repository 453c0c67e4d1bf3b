"""Threat models: the set of images that an adversary may show, and how to move inside it.

Each is a small pytree with three functions on batches [N, ...] of images in [0, 1]:
`project(images, centers)` to the nearest allowed image, `step(images, gradients, step_size)` along the
steepest ascent for its norm, `random_start(keys, centers)` to a random allowed image. `eps` is in pixel
units.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from advtransfer.arrays import AnyArray

Images = Float[AnyArray, " n *image"]  # of one shape throughout a call
Size = float | Float[Array, ""]  # of an allowed set, or of a step: a length in pixel units
Sizes = Size | Float[Array, " n *ones"]  # for all images, or for each

# Keeps the ℓ2 step finite at a zero gradient, which then moves nothing (Engstrom et al., robustness, 2019).
_TINY = 1e-10


@runtime_checkable
class ThreatModel(Protocol):
    """What `pgd` asks of a threat model."""

    def project(self, images: Images, centers: Images) -> Float[Array, " n *image"]: ...

    def step(self, images: Images, gradients: Images, step_size: Sizes) -> Images: ...

    def random_start(self, keys: Key[Array, " n"], centers: Images) -> Float[Array, " n *image"]: ...


class Linf(NamedTuple):
    """Every pixel value within `eps` of the original (Madry et al., 2018, §2)."""

    eps: Size

    def project(self, images: Images, centers: Images) -> Float[Array, " n *image"]:
        chex.assert_equal_shape([images, centers])
        return jnp.clip(jnp.clip(images, centers - self.eps, centers + self.eps), 0.0, 1.0)

    def step(self, images: Images, gradients: Images, step_size: Sizes) -> Images:
        chex.assert_equal_shape([images, gradients])
        return images + step_size * jnp.sign(gradients)

    def random_start(self, keys: Key[Array, " n"], centers: Images) -> Float[Array, " n *image"]:
        """Uniform in the ball (Madry et al., 2018, §5), then clipped to [0, 1]."""
        chex.assert_equal_shape_prefix([keys, centers], 1)
        noise = jax.vmap(lambda key: jax.random.uniform(key, centers.shape[1:], jnp.float32, -1.0, 1.0))(keys)
        return self.project(centers + self.eps * noise, centers)

    def norms(self, moves: Images) -> Float[Array, " n"]:
        """The largest entry of each."""
        return jnp.max(jnp.abs(moves), axis=tuple(range(1, moves.ndim)))


class L2(NamedTuple):
    """Euclidean distance to the original at most `eps`."""

    eps: Size

    def project(self, images: Images, centers: Images) -> Float[Array, " n *image"]:
        chex.assert_equal_shape([images, centers])
        # Clipping after the ball is safe: the box is convex and holds the centre, so the distance can
        # only shrink.
        offsets = images - centers
        norms = _norms(offsets)
        scales = jnp.minimum(1.0, self.eps / jnp.maximum(norms, _TINY))
        return jnp.clip(centers + offsets * scales, 0.0, 1.0)

    def step(self, images: Images, gradients: Images, step_size: Sizes) -> Images:
        chex.assert_equal_shape([images, gradients])
        # At first by the largest entry, whose square may be too small, or too large, for a float32.
        peaks = jnp.max(jnp.abs(gradients), axis=tuple(range(1, gradients.ndim)), keepdims=True)
        gradients = gradients / jnp.where(peaks > 0, peaks, 1.0)
        return images + step_size * gradients / (_norms(gradients) + _TINY)

    def random_start(self, keys: Key[Array, " n"], centers: Images) -> Float[Array, " n *image"]:
        """Uniform in the ball: a normalised Gaussian direction, a radius eps·U^(1/d) (Muller, 1959)."""
        chex.assert_equal_shape_prefix([keys, centers], 1)

        def noise(key, shape):
            key_direction, key_radius = jax.random.split(key)
            direction = jax.random.normal(key_direction, shape, jnp.float32)
            radius = jax.random.uniform(key_radius, dtype=jnp.float32) ** (1.0 / direction.size)
            return direction * (radius / (jnp.linalg.norm(direction.ravel()) + _TINY))

        offsets = jax.vmap(lambda key: noise(key, centers.shape[1:]))(keys)
        return self.project(centers + self.eps * offsets, centers)

    def norms(self, moves: Images) -> Float[Array, " n"]:
        """The Euclidean length of each."""
        return _norms(moves).ravel()


class Unconstrained(NamedTuple):
    """Any image in [0, 1]; steps follow each example's own raw gradient, so `step_size` carries its units."""

    def project(self, images: Images, centers: Images) -> Float[Array, " n *image"]:
        chex.assert_equal_shape([images, centers])
        return jnp.clip(images, 0.0, 1.0)

    def step(self, images: Images, gradients: Images, step_size: Sizes) -> Images:
        chex.assert_equal_shape([images, gradients])
        return images + step_size * gradients

    def random_start(self, keys: Key[Array, " n"], centers: Images) -> Float[Array, " n *image"]:
        """Uniform in the box."""
        chex.assert_equal_shape_prefix([keys, centers], 1)
        return jax.vmap(lambda key: jax.random.uniform(key, centers.shape[1:], jnp.float32))(keys)


# By their names in `norms.NORMS`, where "none" means no attack.
THREAT_MODELS = {"l2": L2, "linf": Linf}


def _norms(x: AnyArray) -> Array:
    """ℓ2 norm of each example, shaped to broadcast against the batch."""
    axes = tuple(range(1, x.ndim))
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=axes, keepdims=True))
