"""The one training step, and the loop that runs it.

Natural training, adversarial training and fine-tuning are the same step with another `attack` and
another mask.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from advtransfer import parallel
from advtransfer.attacks import cross_entropy
from advtransfer.checkpoint import Checkpoints
from advtransfer.data import Batch
from advtransfer.optim import apply_updates

# Folded into each example's key for the attack, so that it draws nothing that augmentation has drawn.
_ATTACK_STREAM = 0xADF

Metrics = dict[str, tuple[jax.Array, jax.Array]]


class Apply(Protocol):
    """A network as a pure function; evaluation leaves `batch_stats` as they are."""

    def __call__(
        self, params: Any, batch_stats: Any, images: jax.Array, train: bool
    ) -> tuple[jax.Array, Any]: ...


class TrainState(NamedTuple):
    """Everything that a step changes."""

    step: jax.Array  # int32 scalar, steps done
    params: Any
    batch_stats: Any
    opt_state: Any

    @property
    def variables(self) -> dict[str, Any]:
        """As `module.apply` takes them."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def init_state(variables: Any, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step; `variables` holds "params" and "batch_stats"."""
    params = variables["params"]
    return TrainState(jnp.zeros((), jnp.int32), params, variables["batch_stats"], tx.init(params))


def module_apply(module: Any, *, start: int | None = None) -> Apply:
    """A Flax module as an `Apply`: from the images, or from the activations that enter block `start`."""

    def apply(params, batch_stats, images, train):
        variables = {"params": params, "batch_stats": batch_stats}
        if not train:
            return module.apply(variables, images, start=start), batch_stats
        logits, changed = module.apply(variables, images, start=start, train=True, mutable=["batch_stats"])
        return logits, changed["batch_stats"]

    return apply


def make_train_step(
    apply: Apply,
    tx: optax.GradientTransformation,
    *,
    attack: Callable[..., jax.Array] | None = None,
    attack_in_train_mode: bool = False,
    label_smoothing: float = 0.0,
    freeze_mask: Any | None = None,
    axis_name: str | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A pure function (state, batch) -> (state, metrics): one optimiser step on the mean loss of the batch.

    With an attack it is adversarial training (Madry et al., 2018, eq. 2.1): the images are replaced by
    `attack(logits_fn, images, labels, key=keys)`, which by default sees the network with its running
    BatchNorm statistics. All randomness comes from the batch's per-example keys, so a batch split over
    devices takes the same step as the whole batch on one.

    Args:
      apply: the network.
      tx: the optimiser, given `optax.selective_transform(..., freeze_mask=freeze_mask)` when some are frozen.
      attack: (logits_fn, images, labels, key=keys) to images.
      attack_in_train_mode: the attack sees the batch's own BatchNorm statistics instead.
      label_smoothing: weight of the uniform distribution in the training target.
      freeze_mask: True where a parameter must not change, in the structure of the parameters.
      axis_name: the device axis to average gradients and BatchNorm statistics over.

    Returns:
      The step. Metrics: {"loss": (sum, count), "accuracy": (sum, count)} of the batch as trained on, over all
      devices; accuracy's sum is the number of correct predictions.
    """

    def attacked_logits(params, batch_stats, images):
        return apply(params, batch_stats, images, attack_in_train_mode)[0]

    def loss_fn(params, batch_stats, images, labels):
        logits, batch_stats = apply(params, batch_stats, images, True)
        losses = smoothed_cross_entropy(logits, labels, label_smoothing)
        return jnp.mean(losses), (batch_stats, losses, logits)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        images = batch.images
        if attack is not None:
            logits_fn = Partial(attacked_logits, state.params, state.batch_stats)
            keys = jax.vmap(lambda key: jax.random.fold_in(key, _ATTACK_STREAM))(batch.keys)
            images = attack(logits_fn, images, batch.labels, key=keys)
        grads, (batch_stats, losses, logits) = jax.grad(loss_fn, has_aux=True)(
            state.params, state.batch_stats, images, batch.labels
        )
        grads, batch_stats = parallel.mean((grads, batch_stats), axis_name)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = apply_updates(state.params, updates, freeze_mask)
        metrics = parallel.total(sum_metrics(losses, logits, batch.labels), axis_name)
        return TrainState(state.step + 1, params, batch_stats, opt_state), metrics

    return train_step


def smoothed_cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float) -> jax.Array:
    """Cross-entropy per example [N] to (1 - s)·onehot + s/classes (Szegedy et al., 2016, §7)."""
    if smoothing == 0.0:
        return cross_entropy(logits, labels)
    uniform = -jnp.mean(jax.nn.log_softmax(logits.astype(jnp.float32)), axis=-1)
    return (1.0 - smoothing) * cross_entropy(logits, labels) + smoothing * uniform


def sum_metrics(
    losses: jax.Array, logits: jax.Array, labels: jax.Array, mask: jax.Array | None = None
) -> Metrics:
    """(sum, count) of loss and accuracy over the examples whose mask [N] is 1."""
    mask = jnp.ones(labels.shape, jnp.float32) if mask is None else mask
    correct = (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
    count = jnp.sum(mask)
    return {"loss": (jnp.sum(losses * mask), count), "accuracy": (jnp.sum(correct * mask), count)}


def means(metrics: Metrics) -> dict[str, float]:
    """{"loss": (sum, count)} to {"loss": sum / count} as Python floats."""
    return {name: float(total) / float(count) for name, (total, count) in metrics.items()}


class DivergedError(RuntimeError):
    """The loss is no longer a number; the message says when, and what can be gone back to."""


class Preempted(Exception):
    """SIGTERM came; the state is saved."""


def fit(
    state: TrainState,
    run_step: Callable[[TrainState, int], tuple[TrainState, Metrics]],
    *,
    num_steps: int,
    schedule: optax.Schedule,
    checkpoints: Checkpoints,
    save_every: int,
    log_every: int,
    log: Callable[[int, dict[str, float]], None],
    steps: Callable[[range], Iterator[int]] = iter,
) -> TrainState:
    """Runs steps `int(state.step)` ... `num_steps - 1` and returns the last state.

    Args:
      state: where to begin; a restored state goes on exactly where it was saved.
      run_step: (state, step) to (state, metrics). Must depend on nothing else, so that a resumed run
        repeats it.
      num_steps: the step to stop at.
      schedule: the learning rate by step, for the log and for messages.
      checkpoints: where states are saved, every `save_every` steps and after the last.
      save_every: in steps.
      log_every: in steps; losses are looked at this often, and before every save.
      log: (step, {"loss", "accuracy", "learning_rate"}), means since the last call.
      steps: wraps the range of steps, to draw a progress bar.

    Raises:
      DivergedError: a loss or a weight that is not finite; such a state is never saved.
      Preempted: SIGTERM arrived; the state after the step in flight is saved.
    """
    pending: list[Metrics] = []

    def look(step: int) -> None:
        """Fetches the metrics of the steps up to `step` and logs them."""
        if not pending:
            return
        fetched = jax.device_get(pending)
        for i, metrics in enumerate(fetched, start=step - len(fetched)):
            if not np.isfinite(metrics["loss"][0]):
                raise DivergedError(_diverged(i, float(schedule(i)), checkpoints))
        totals = jax.tree.map(lambda *x: np.sum(x), *fetched)
        log(step, {**means(totals), "learning_rate": float(schedule(step - 1))})
        pending.clear()

    start = int(state.step)
    with _sigterm_flag() as terminated:
        for step in steps(range(start, num_steps)):
            state, metrics = run_step(state, step)
            pending.append(metrics)
            # Two steps in flight keep a device busy; more would only make the progress bar lie.
            jax.block_until_ready(pending[-3:][0])
            done = step + 1
            save = done % save_every == 0 or done == num_steps or terminated.is_set()
            if save or done % log_every == 0:
                look(done)
            if save:
                if not _all_finite(state.params):
                    raise DivergedError(_diverged(step, float(schedule(step)), checkpoints))
                checkpoints.save(done, state)
            if terminated.is_set():
                raise Preempted(f"SIGTERM: saved at step {done} of {num_steps}")
    return state


@jax.jit
def _all_finite(params: Any) -> jax.Array:
    """The loss is taken before the update, so a finite loss does not yet mean finite weights."""
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)]))


def _diverged(step: int, learning_rate: float, checkpoints: Checkpoints) -> str:
    last = checkpoints.latest()
    good = f"last good checkpoint: step {last}" if last is not None else "no checkpoint was saved"
    return (
        f"the loss became NaN or infinite at step {step} (learning rate {learning_rate:g}); {good} in "
        f"{checkpoints.folder}. Lower the learning rate, or the attack's eps"
    )


@contextmanager
def _sigterm_flag() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, while the block runs; signals can only be caught in the main thread."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, previous)
