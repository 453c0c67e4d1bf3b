"""Projected gradient descent (Madry et al., 2018, eq. 2.1 and §2), as one compiled loop."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from advtransfer.attacks.threat_models import THREAT_MODELS, ThreatModel

_UNROLLED = 3  # steps of an attack that is compiled without a loop, on accelerators

LogitsFn = Callable[[jax.Array], jax.Array]
LossFn = Callable[[jax.Array, jax.Array], jax.Array]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Softmax cross-entropy per example, float32 [N]; logits [N, classes], labels int [N]."""
    chex.assert_rank(logits, 2)
    chex.assert_shape(labels, logits.shape[:1])
    chex.assert_type(labels, int)
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(log_probs, labels[:, None], axis=1)[:, 0]


class _Search(NamedTuple):
    """State of the search, per example: where it is, and the best that it has seen."""

    images: jax.Array  # [N, H, W, C], the current iterate
    best_images: jax.Array  # [N, H, W, C]
    best_objective: jax.Array  # [N], the objective at best_images
    done: jax.Array  # bool [N], fooled already (only with early_finish)


def pgd(
    logits_fn: LogitsFn,
    images: jax.Array,
    labels: jax.Array,
    threat_model: ThreatModel,
    *,
    num_steps: int = 20,
    step_size: float = 0.5,
    key: jax.Array | None = None,
    random_start: bool = False,
    num_restarts: int = 1,
    use_best: bool = True,
    targeted: bool = False,
    loss_fn: LossFn | None = None,
    early_finish: bool = False,
) -> jax.Array:
    """Adversarial images: the largest loss that `num_steps` projected gradient steps find in the threat
    model.

    Every example is attacked on its own: its result depends on nothing else in the batch. The gradient
    is taken with respect to the images only, and iterates are float32 whatever type the network computes
    in. Called again with the same `logits_fn` object and shapes, the compiled attack is reused;
    `at.logits_fn(model)` passes the weights as arguments, a plain Python function is compiled with
    whatever it closes over.

    Args:
      logits_fn: images [N, H, W, C] in [0, 1] to logits [N, classes].
      images: float [N, H, W, C] in [0, 1].
      labels: int [N]; the true classes, or the wanted ones when `targeted`.
      threat_model: `L2(eps)`, `Linf(eps)` or `Unconstrained()`; eps in pixel units.
      num_steps: gradient steps.
      step_size: length of a step in the threat model's norm, pixel units.
      key: a PRNG key, or one key per example [N]; needed by `random_start`.
      random_start: start uniformly in the allowed set instead of at the image.
      num_restarts: independent searches; each example keeps its worst. Needs `random_start`.
      use_best: return the iterate of largest loss, the last one included, instead of the last. Restarts
        are always compared by loss.
      targeted: descend the loss towards `labels`.
      loss_fn: (logits, labels) to a loss per example [N]; default: softmax cross-entropy.
      early_finish: leave an example as soon as the network errs on it (reaches the target), and stop
        when it errs on all. Cheaper for measuring accuracy; the losses found are smaller.

    Returns:
      float32 [N, H, W, C] in the threat model's set and in [0, 1].

    Raises:
      ValueError: images that are no floats; no key for a random start; restarts without one; a negative
        number of steps.
    """
    chex.assert_rank(images, 4)
    chex.assert_shape(labels, images.shape[:1])
    chex.assert_type(labels, int)
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images are {images.dtype}: pass floats in [0, 1], such as images / 255")
    if random_start and key is None:
        raise ValueError("random_start needs a key: pass key=jax.random.key(seed)")
    if num_restarts > 1 and not random_start:
        raise ValueError("every restart would be the same search: pass random_start=True and a key")
    if num_steps < 0 or num_restarts < 1:
        raise ValueError("num_steps must be >= 0 and num_restarts >= 1")
    if key is not None and not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)  # jax.random.PRNGKey's form
    if key is not None and key.ndim == 0:
        key = jax.random.split(key, images.shape[0])
    if key is not None:
        chex.assert_shape(key, images.shape[:1])
    return _pgd(
        logits_fn if isinstance(logits_fn, Partial) else Partial(logits_fn),
        jnp.asarray(images, jnp.float32),
        labels,
        threat_model,
        step_size,
        key if random_start else None,
        _Options(num_steps, num_restarts, use_best, targeted, loss_fn or cross_entropy, early_finish),
    )


class _Options(NamedTuple):
    """What the compiled search is made for; as in `pgd`."""

    num_steps: int
    num_restarts: int
    use_best: bool
    targeted: bool
    loss_fn: LossFn
    early_finish: bool

    @property
    def remembers(self) -> bool:
        """Whether the result is the best that was seen, not the last."""
        return self.use_best or self.early_finish or self.num_restarts > 1


@functools.partial(jax.jit, static_argnames="options")
def _pgd(
    logits_fn: Partial,
    images: jax.Array,
    labels: jax.Array,
    threat_model: ThreatModel,
    step_size: jax.Array,
    keys: jax.Array | None,
    options: _Options,
) -> jax.Array:
    """`pgd` with its arguments checked; `keys` [N] asks for a random start."""

    def objective_fn(x):
        """What the search climbs, summed over examples so that each gets its own gradient."""
        logits = logits_fn(x)
        objective = options.loss_fn(logits, labels) * (-1.0 if options.targeted else 1.0)
        done = (jnp.argmax(logits, axis=-1) == labels) == options.targeted
        # A fooled example outranks every loss seen before: a larger loss need not change the prediction.
        ranked = jnp.where(done & options.early_finish, jnp.inf, objective)
        return jnp.sum(objective), (ranked, done)

    def remember(search, ranked, done):
        better = ranked > search.best_objective
        return search._replace(
            best_images=jnp.where(_per_example(better, images), search.images, search.best_images),
            best_objective=jnp.where(better, ranked, search.best_objective),
            done=search.done | (done & options.early_finish),
        )

    def step(_, search):
        gradients, (ranked, done) = jax.grad(objective_fn, has_aux=True)(search.images)
        if options.use_best or options.early_finish:
            search = remember(search, ranked, done)
        moved = threat_model.project(threat_model.step(search.images, gradients, step_size), images)
        frozen = _per_example(search.done, images)
        return search._replace(images=jnp.where(frozen, search.images, moved))

    def restart(index, search):
        if keys is not None:
            restart_keys = jax.vmap(lambda key: jax.random.fold_in(key, index))(keys)
            start = threat_model.random_start(restart_keys, images)
            frozen = _per_example(search.done, images)
            search = search._replace(images=jnp.where(frozen, search.images, start))
        search = _loop(step, options.num_steps, search, stop_when_done=options.early_finish)
        if options.remembers:
            search = remember(search, *objective_fn(search.images)[1])
        return search

    start = _Search(
        images=images,
        best_images=images,
        best_objective=jnp.full(labels.shape, -jnp.inf, jnp.float32),
        done=jnp.zeros(labels.shape, bool),
    )
    search = _loop(restart, options.num_restarts, start, stop_when_done=options.early_finish)
    return search.best_images if options.remembers else search.images


def _loop(body, num_iterations: int, search: _Search, *, stop_when_done: bool) -> _Search:
    """`fori_loop` over (index, search), leaving when every example is done if asked to."""
    if num_iterations == 1:
        return body(0, search)
    if not stop_when_done:
        # A GPU launches what it can foresee ahead of time; on a CPU only compiling would take longer.
        unroll = num_iterations <= _UNROLLED and jax.default_backend() != "cpu"
        return jax.lax.fori_loop(0, num_iterations, body, search, unroll=True if unroll else None)
    _, search = jax.lax.while_loop(
        lambda carry: (carry[0] < num_iterations) & ~jnp.all(carry[1].done),
        lambda carry: (carry[0] + 1, body(*carry)),
        (0, search),
    )
    return search


def _per_example(flags: jax.Array, images: jax.Array) -> jax.Array:
    """bool [N] shaped to broadcast against images [N, ...]."""
    return flags.reshape(-1, *(1,) * (images.ndim - 1))


@functools.lru_cache(maxsize=64)
def make_attack(norm: str, eps: float, *, num_steps: int, step_ratio: float, **options):
    """`pgd` with everything chosen but (logits_fn, images, labels, key): what training and evaluation call.

    The same arguments give the same object, so that what was compiled for it serves again.

    Args:
      norm: a key of `THREAT_MODELS`, or "none".
      eps: its radius, pixel units.
      num_steps: gradient steps.
      step_ratio: step size divided by eps.
      **options: of `pgd`.

    Returns:
      An attack, or None for the norm "none".
    """
    if norm == "none":
        return None
    return functools.partial(
        pgd,
        threat_model=THREAT_MODELS[norm](eps),
        num_steps=num_steps,
        step_size=step_ratio * eps,
        **options,
    )
