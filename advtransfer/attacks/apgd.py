"""Auto-PGD (Croce and Hein, 2020, algorithm 1): PGD with momentum, whose step size halves by itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from advtransfer.arrays import per_example
from advtransfer.attacks.iterative import Found, IterativeAttack
from advtransfer.attacks.losses import dlr, is_fooled, log_odds, margin, targeted_dlr, targeted_margin

_MOMENTUM = 0.75  # share of the new step; alpha of eq. 1
_RISES = 0.75  # of the steps since the last look that raise the loss at a good step size; rho of condition 1


class _State(NamedTuple):
    """Of each image."""

    images: Float32[Array, "n h w c"]  # the iterate
    previous: Float32[Array, "n h w c"]
    gradients: Float32[Array, "n h w c"]  # at the iterate
    loss: Float32[Array, " n"]  # of the step before
    best_images: Float32[Array, "n h w c"]
    best_gradients: Float32[Array, "n h w c"]
    best_loss: Float32[Array, " n"]
    schedule: Schedule


class Schedule(NamedTuple):
    """When the step size is looked at, and what has happened since it was (§3.1)."""

    step_size: Float32[Array, " n"]
    period: Int32[Array, " n"]  # steps from one look to the next
    since: Int32[Array, " n"]  # steps since the last look
    rises: Int32[Array, " n"]  # of them, those that raised the loss
    best_loss: Float32[Array, " n"]  # at the last look
    halved: Bool[Array, " n"]  # at the last look


def start_schedule(eps: float | Array, loss: Float32[Array, " n"], num_steps: int) -> Schedule:
    """Steps of 2 ε, looked at first after 22 % of all steps."""
    zeros = jnp.zeros(loss.shape, jnp.int32)
    period = zeros + max(int(0.22 * num_steps), 1)
    return Schedule(jnp.full(loss.shape, 2.0 * eps, jnp.float32), period, zeros, zeros, loss, zeros == 1)


def next_schedule(
    schedule: Schedule, rose: Bool[Array, " n"], best_loss: Float32[Array, " n"], num_steps: int
) -> tuple[Schedule, Bool[Array, " n"]]:
    """After a step: the schedule, and which images go on from their best one, with half the step size.

    Those are, when it is time to look, where too few steps have raised the loss (condition 1), or neither
    the step size nor the best loss has changed since the last look (condition 2). Periods become shorter by
    3 % of all steps, down to 6 %.
    """
    since, rises = schedule.since + 1, schedule.rises + rose
    is_time = since == schedule.period
    stuck = ~schedule.halved & (schedule.best_loss >= best_loss)
    halve = (rises <= _RISES * schedule.period) | stuck
    shorter = jnp.maximum(schedule.period - max(int(0.03 * num_steps), 1), max(int(0.06 * num_steps), 1))
    new = Schedule(
        step_size=jnp.where(is_time & halve, schedule.step_size / 2, schedule.step_size),
        period=jnp.where(is_time, shorter, schedule.period),
        since=jnp.where(is_time, 0, since),
        rises=jnp.where(is_time, 0, rises),
        best_loss=jnp.where(is_time, best_loss, schedule.best_loss),
        halved=jnp.where(is_time, halve, schedule.halved),
    )
    return new, is_time & halve


@functools.lru_cache
def apgd(loss: str = "ce", *, num_steps: int = 100, num_starts: int = 1) -> IterativeAttack:
    """APGD against a loss.

    Args:
      loss: "ce", cross-entropy (by `log_odds`, which has its order and the direction of its gradients, and
        does not saturate); "dlr"; or "margin", which needs two classes only.
      num_steps: gradient steps.
      num_starts: random starts, of which one has to succeed.
    """
    loss_fn = {"ce": log_odds, "dlr": dlr, "margin": margin}[loss]
    return _attack(lambda logits, job: loss_fn(logits, job.labels), num_steps, 0, num_starts)


@functools.lru_cache
def targeted_apgd(loss: str = "dlr", *, num_targets: int = 9, num_steps: int = 100) -> IterativeAttack:
    """APGD towards the most probable other classes in turn (APGD-T); "margin" needs two classes only."""
    loss_fn = {"dlr": targeted_dlr, "margin": targeted_margin}[loss]
    return _attack(lambda logits, job: loss_fn(logits, job.labels, job.targets), num_steps, num_targets, 1)


def _attack(loss_fn: Callable, num_steps: int, num_targets: int, num_starts: int) -> IterativeAttack:
    def look(network, job, images):
        def total(images):
            logits = network(images)
            loss = loss_fn(logits, job)
            return jnp.sum(loss), (loss, is_fooled(logits, job.labels))

        gradients, (loss, fooled) = jax.grad(total, has_aux=True)(images)
        return jnp.where(jnp.isfinite(gradients), gradients, 0.0), loss, fooled

    def start(network, threat_model, job):
        keys = jax.vmap(lambda key, i: jax.random.fold_in(key, i))(
            job.keys, job.targets * num_starts + job.starts
        )
        images = threat_model.random_start(keys, job.images)
        gradients, loss, fooled = look(network, job, images)
        schedule = start_schedule(threat_model.eps, loss, num_steps)
        state = _State(images, images, gradients, loss, images, gradients, loss, schedule)
        return Found(state, images, fooled)

    def step(network, threat_model, job, index, state):
        images, size = state.images, per_example(state.schedule.step_size, job.images)
        moved = threat_model.project(threat_model.step(images, state.gradients, size), job.images)
        share = per_example(jnp.where(index > 0, _MOMENTUM, 1.0), images)
        moved = images + share * (moved - images) + (1 - share) * (images - state.previous)
        moved = threat_model.project(moved, job.images)
        gradients, loss, fooled = look(network, job, moved)
        better = loss > state.best_loss
        best = (
            _where(better, moved, state.best_images),
            _where(better, gradients, state.best_gradients),
            jnp.where(better, loss, state.best_loss),
        )
        schedule, back = next_schedule(state.schedule, loss > state.loss, best[2], num_steps)
        iterate = _where(back, best[0], moved), images, _where(back, best[1], gradients)
        return Found(_State(*iterate, loss, *best, schedule), moved, fooled)

    return IterativeAttack(start, step, num_steps, num_targets, num_starts)


def _where(flags: Array, new: Array, old: Array) -> Array:
    return jnp.where(per_example(flags, new), new, old)
