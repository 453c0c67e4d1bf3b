"""Projected gradient descent (Madry et al., 2018, eq. 2.1 and §2), as one compiled loop."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Float32, Integer, Key, Num, PRNGKeyArray, UInt32

from advtransfer.arrays import AnyArray, per_example
from advtransfer.attacks.losses import LossFn, cross_entropy, log_odds
from advtransfer.attacks.network import LogitsFn, as_network, jit_for
from advtransfer.attacks.threat_models import THREAT_MODELS, Linf, Size, ThreatModel, Unconstrained
from advtransfer.labels import check_labels

Attack = Callable[..., Float32[Array, "n h w c"]]  # (logits_fn, images, labels, key=keys) to images

SLACK = 1e-4  # of pixels beyond [0, 1], as resizing leaves them
_UNROLLED = 3  # steps of an attack that is compiled without a loop, on accelerators


class _Search(NamedTuple):
    """State of the search, per example: where it is, and the best that it has seen."""

    images: Float32[Array, "n h w c"]  # the current iterate
    best_images: Float32[Array, "n h w c"]
    best_objective: Float[Array, " n"]  # the objective at best_images
    done: Bool[Array, " n"]  # fooled already (only with early_finish)
    lost: Bool[Array, " n"]  # the objective or its gradient was not a number


def pgd(
    logits_fn: LogitsFn,
    images: Float[AnyArray, "n h w c"],
    labels: Integer[AnyArray, " n"],
    threat_model: ThreatModel,
    *,
    num_steps: int = 20,
    step_size: Size | None = None,
    key: PRNGKeyArray | Key[Array, " n"] | UInt32[Array, "n _"] | None = None,
    random_start: bool = False,
    num_restarts: int = 1,
    use_best: bool = True,
    targeted: bool = False,
    loss_fn: LossFn | None = None,
    early_finish: bool = False,
) -> Float32[Array, "n h w c"]:
    """Adversarial images: the largest loss that `num_steps` projected gradient steps find in the threat
    model.

    Every example is attacked on its own: its result depends on nothing else in the batch. The gradient
    is taken with respect to the images only, and iterates are float32 whatever type the network computes
    in. Inside a differentiated loss the result is a constant. The compiled attack is reused for
    the same network and shapes, with the weights that the network has at the time (see `as_network`).

    Args:
      logits_fn: images [N, H, W, C] in [0, 1] to logits [N, classes]: `at.logits_fn(model)`, or any other
        callable that JAX can trace (see `as_network`).
      images: float [N, H, W, C] in [0, 1].
      labels: int [N]; the true classes, or the wanted ones when `targeted`.
      threat_model: `L2(eps)`, `Linf(eps)` or `Unconstrained()`; eps in pixel units.
      num_steps: gradient steps.
      step_size: length of a step in the threat model's norm, pixel units; None: 2.5 eps / num_steps (Madry
        et al., 2018, §5 and appendix B; Salman et al., 2020, use 2 / 3 eps for 3 steps).
      key: a PRNG key, or one key per example [N]; needed by `random_start`.
      random_start: start uniformly in the allowed set instead of at the image.
      num_restarts: independent searches; each example keeps its worst. Needs `random_start`.
      use_best: return the iterate of largest loss, the last one included, instead of the last. Restarts
        are always compared by loss.
      targeted: descend the loss towards `labels`.
      loss_fn: (logits, labels) to a loss per example [N], such as `margin`; default: `log_odds`, which ranks
        images and points as softmax cross-entropy does, and does not saturate; where the length of
        the gradient matters (`Unconstrained`), cross-entropy.
      early_finish: leave an example as soon as the network errs on it (reaches the target), and stop
        when it errs on all. Cheaper for measuring accuracy; the losses found are smaller.

    Returns:
      float32 [N, H, W, C] in the threat model's set and in [0, 1].

    Raises:
      ValueError: images that are not floats in [0, 1]; labels that are not classes; no key for a random
        start; restarts without one; a negative number of steps; an impossible eps or step size; a loss or a
        gradient that is not a number. Under `jit`, where values are unknown, none of them is
        checked, and images where the loss or its gradient is not a number become NaN.
    """
    chex.assert_rank(images, 4)
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images are {images.dtype}: pass floats in [0, 1], such as images / 255")
    if random_start and key is None:
        raise ValueError("random_start needs a key: pass key=jax.random.key(seed)")
    if num_restarts > 1 and not random_start:
        raise ValueError("every restart would be the same search: pass random_start=True and a key")
    if num_steps < 0 or num_restarts < 1:
        raise ValueError("num_steps must be >= 0 and num_restarts >= 1")
    if step_size is None:
        step_size = 2.5 * _eps(threat_model) / max(num_steps, 1)
    check_sizes(threat_model, step_size)
    check_images(images)
    images = jnp.asarray(images, jnp.float32)
    network = as_network(logits_fn, images)
    check_labels(labels, len(images), jax.eval_shape(network, images).shape[1])
    if loss_fn is None:
        loss_fn = log_odds if not isinstance(threat_model, Unconstrained) else cross_entropy
    # Constants: an attack inside a loss is not differentiated.
    network, images, threat_model, step_size = jax.lax.stop_gradient(
        (network, images, *jax.tree.map(jnp.float32, (threat_model, step_size)))
    )
    found, lost = jit_for(network, _pgd, static_argnames="options")(
        network,
        images,
        labels,
        threat_model,
        step_size,
        _keys(key, len(images)) if random_start and key is not None else None,
        _Options(num_steps, num_restarts, use_best, targeted, loss_fn, early_finish),
    )
    if not isinstance(lost, Tracer) and (number := int(lost.sum())):
        raise ValueError(
            f"the network's loss, or its gradient, is not a number on {number:,} of {len(images):,} images: "
            "the result of this attack would be meaningless"
        )
    return found


def _eps(threat_model: Any) -> float | Array:
    if not hasattr(threat_model, "eps"):
        raise ValueError(f"{type(threat_model).__name__} has no eps for step_size to follow: give step_size")
    return threat_model.eps


def _keys(key: Array, number: int) -> Array:
    """A key for each example."""
    key = typed(key)
    keys = jax.random.split(key, number) if key.ndim == 0 else key
    chex.assert_shape(keys, (number,))
    return keys


def typed(key: PRNGKeyArray | Key[Array, " n"] | UInt32[Array, "n _"]) -> Key[Array, ...]:
    """Keys of `jax.random.key`, also from those of `jax.random.PRNGKey`."""
    is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key if is_typed else jax.random.wrap_key_data(key)


def check_images(images: Num[AnyArray, " ..."]) -> None:
    """Raises a ValueError unless all pixels are in [0, 1]; where they are known, so not inside of `jit`."""
    low, high = _range(images)
    if not (low >= -SLACK and high <= 1 + SLACK):
        hint = "such as images / 255" if low >= 0 else "not normalised: networks do that themselves"
        raise ValueError(f"images run from {low:.3g} to {high:.3g}: pass pixels in [0, 1], {hint}")


def _range(values: AnyArray) -> tuple[float, float]:
    """The least and the largest of values that are known; of others 0 and 0."""
    if isinstance(values, Tracer) or not np.size(values):
        return 0.0, 0.0
    with jax.ensure_compile_time_eval():
        return float(values.min()), float(values.max())


def check_sizes(threat_model: ThreatModel, step_size: Size) -> None:
    """Raises a ValueError for an implausible eps or step size, if its value is known."""
    eps = getattr(threat_model, "eps", 0.0)
    for name, value in (("eps", eps), ("step_size", step_size)):
        low, high = _range(jnp.asarray(value))
        if not (low >= 0 and high < np.inf):
            raise ValueError(f"{name} is {value}: give a number in units of pixels from 0 to 1, not negative")
    if isinstance(threat_model, Linf) and (largest := _range(jnp.asarray(eps))[1]) >= 1:
        raise ValueError(
            f"Linf(eps={largest:g}) allows every image, as eps is in units of pixels in [0, 1]: did you mean "
            f"{largest:g}/255? For every image take Unconstrained()"
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


def _pgd(
    logits_fn: Partial,
    images: Array,
    labels: Array,
    threat_model: ThreatModel,
    step_size: Array,
    keys: Array | None,
    options: _Options,
) -> tuple[Array, Array]:
    """`pgd` with its arguments checked; `keys` [N] asks for a random start. The second result, bool [N], says
    where the loss or its gradient was not a number."""

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
            best_images=jnp.where(per_example(better, images), search.images, search.best_images),
            best_objective=jnp.where(better, ranked, search.best_objective),
            done=search.done | (done & options.early_finish),
            lost=search.lost | jnp.isnan(ranked),
        )

    def step(_, search):
        gradients, (ranked, done) = jax.grad(objective_fn, has_aux=True)(search.images)
        if options.use_best or options.early_finish:
            search = remember(search, ranked, done)
        is_lost = jnp.isnan(ranked) | jnp.any(~jnp.isfinite(gradients), axis=tuple(range(1, images.ndim)))
        search = search._replace(lost=search.lost | is_lost)
        moved = threat_model.project(threat_model.step(search.images, gradients, step_size), images)
        frozen = per_example(search.done, images)
        return search._replace(images=jnp.where(frozen, search.images, moved))

    def restart(index, search):
        if keys is not None:
            restart_keys = jax.vmap(lambda key: jax.random.fold_in(key, index))(keys)
            start = threat_model.random_start(restart_keys, images)
            frozen = per_example(search.done, images)
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
        lost=jnp.zeros(labels.shape, bool),
    )
    search = _loop(restart, options.num_restarts, start, stop_when_done=options.early_finish)
    found = search.best_images if options.remembers else search.images
    return jnp.where(per_example(search.lost, images), jnp.nan, found), search.lost


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


@functools.lru_cache(maxsize=64)
def make_attack(
    threat_model: ThreatModel | str,
    eps: float | None = None,
    *,
    num_steps: int = 20,
    step_size: float | None = None,
    step_ratio: float | None = None,
    **options: Any,
) -> Attack | None:
    """`pgd` with everything chosen but (logits_fn, images, labels, key): what training and evaluation call.

    The same arguments give the same object, so that its compiled program is reused.

    Args:
      threat_model: as for `pgd`, with plain numbers; or "l2", "linf" or "none", as configurations name it.
      eps: of a threat model that is named.
      num_steps, step_size, options: as for `pgd`.
      step_ratio: step size divided by eps, instead of `step_size`.

    Returns:
      An attack, or None for "none".

    Raises:
      ValueError: an unknown name, an eps beside a threat model or none beside a name, or both step sizes.
    """
    if threat_model == "none":
        return None
    if isinstance(threat_model, str):
        if threat_model not in THREAT_MODELS or eps is None:
            raise ValueError(
                f"make_attack({threat_model!r}, {eps}): give {' or '.join(THREAT_MODELS)} and its eps, or "
                "at.L2(eps)"
            )
        threat_model, eps = THREAT_MODELS[threat_model](eps), None
    if eps is not None or None not in (step_size, step_ratio):
        raise ValueError("give eps once, in the threat model, and one of step_size and step_ratio")
    options |= {"threat_model": threat_model, "num_steps": num_steps}
    options["step_size"] = step_size if step_ratio is None else step_ratio * _eps(threat_model)
    return functools.partial(pgd, **options)
