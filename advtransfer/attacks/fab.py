"""FAB (Croce and Hein, "Minimally distorted adversarial examples with a fast adaptive boundary attack").

Each step goes to the boundary between two classes as it would be if logits were linear, from the iterate and
from the image at once, and back towards the image from where the network errs.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from advtransfer.arrays import per_example
from advtransfer.attacks.iterative import Found, IterativeAttack
from advtransfer.attacks.losses import is_fooled, targeted_margin
from advtransfer.attacks.threat_models import L2, Linf

_OVERSHOOT = 1.05  # eta of algorithm 1
_MOST_BIAS = 0.1  # of the step that starts at the image; alpha_max
_BACKWARD = 0.9  # of the way from the image to a point where the network errs; beta
_CLOSE = 1e-5  # of the way to a hyperplane, which a step overshoots by far more
_LEAST = 1e-8  # length of a step, so that the bias is a number


def project_to_hyperplane(
    images: Float[Array, "n d"],
    normals: Float[Array, "n d"],
    heights: Float[Array, " n"],
    threat_model: Linf | L2,
) -> Float32[Array, "n d"]:
    """The shortest move from an image in [0, 1] to a point of [0, 1] on a hyperplane (eq. 6).

    Towards the hyperplane each pixel moves by min(t · rate, limit): at rate 1 in ℓ∞, |normal| in ℓ2, until
    it reaches the edge of the box. The height gained, Σ |normal| · min(t · rate, limit), is concave and
    piecewise linear in t, so Newton's method from t = 0 rises to the solution in finitely many steps.

    Args:
      images: in [0, 1].
      normals, heights: the hyperplane {x: <normal, x> = <normal, image> + height}.
      threat_model: in whose norm the move is shortest.

    Returns:
      The moves. Where the box does not meet the hyperplane, to the point of it that comes nearest.
    """
    weights = jnp.abs(normals)
    directions = jnp.sign(normals) * jnp.sign(heights)[:, None]
    limits = jnp.where(directions > 0, 1.0 - images, images)
    rates = weights if isinstance(threat_model, L2) else jnp.ones_like(weights)
    needed = jnp.abs(heights)

    def go_on(carry):
        return jnp.any(carry[1])

    def newton(carry):
        t, _ = carry
        reach = t[:, None] * rates
        gained = jnp.sum(weights * jnp.minimum(reach, limits), axis=1)
        slope = jnp.sum(weights * rates * (reach < limits), axis=1)
        new = t + (needed - gained) / jnp.where(slope > 0, slope, 1.0)
        rises = (needed - gained > _CLOSE * needed) & (slope > 0)
        return jnp.where(rises, new, t), rises

    t, _ = jax.lax.while_loop(go_on, newton, (jnp.zeros_like(needed), needed > 0))
    return directions * jnp.minimum(t[:, None] * rates, limits)


@functools.lru_cache
def targeted_fab(*, num_targets: int = 9, num_steps: int = 100, num_starts: int = 1) -> IterativeAttack:
    """FAB towards the most probable other classes in turn (FAB-T). The first start is the image, others lie
    at random within half of ε. An image counts as fooled once a point within ε fools the network."""

    def start(network, threat_model, job):
        keys = jax.vmap(jax.random.fold_in)(job.keys, job.targets * num_starts + job.starts)
        near = (job.images + threat_model.random_start(keys, job.images)) / 2
        images = jnp.where(per_example(job.starts > 0, near), near, job.images)
        return Found(images, images, is_fooled(network(images), job.labels))

    def step(network, threat_model, job, index, images):
        def total(images):
            gaps = targeted_margin(network(images), job.labels, job.targets)
            return jnp.sum(gaps), gaps

        normals, gaps = jax.grad(total, has_aux=True)(images)
        flat = images.reshape(len(images), -1)
        center = job.images.reshape(flat.shape)
        normals = jnp.nan_to_num(normals).reshape(flat.shape)
        height = -gaps  # the target's logit is to reach the label's
        center_height = height + jnp.sum(normals * (flat - center), axis=1)
        moves = project_to_hyperplane(
            jnp.concatenate([flat, center]),
            jnp.concatenate([normals, normals]),
            jnp.concatenate([height, center_height]),
            threat_model,
        )
        own, biased = jnp.split(moves, 2)
        own_length, biased_length = jnp.split(jnp.maximum(threat_model.norms(moves), _LEAST), 2)
        bias = jnp.minimum(own_length / (own_length + biased_length), _MOST_BIAS)[:, None]
        moved = (flat + _OVERSHOOT * own) * (1 - bias) + (center + _OVERSHOOT * biased) * bias
        moved = jnp.clip(moved, 0.0, 1.0)
        errs = is_fooled(network(moved.reshape(images.shape)), job.labels)
        within = threat_model.norms(moved - center) <= threat_model.eps
        back = jnp.where(errs[:, None], center + _BACKWARD * (moved - center), moved)
        return Found(back.reshape(images.shape), moved.reshape(images.shape), errs & within)

    return IterativeAttack(start, step, num_steps, num_targets, num_starts)
