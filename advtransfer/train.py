"""The one training step, and the loop that runs it.

Natural training, adversarial training and fine-tuning are the same step with another `attack` and
another mask.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, Protocol, SupportsFloat, runtime_checkable

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from jaxtyping import Array, Float, Float32, Int32, Integer, PyTree

from advtransfer import parallel
from advtransfer.arrays import AnyArray, Variables
from advtransfer.attacks import Attack, cross_entropy
from advtransfer.checkpoint import Checkpoints
from advtransfer.data import Batch, check_batch
from advtransfer.models import ResNet
from advtransfer.optim import apply_updates

# Folded into each example's key for the attack, so that it draws nothing that augmentation has drawn.
_ATTACK_STREAM = 0xADF

Metrics = dict[str, tuple[Float[Array, " ..."], Float[Array, " ..."]]]  # (sum, count) of each


@runtime_checkable
class Apply(Protocol):
    """A network as a pure function; evaluation leaves `batch_stats` as they are."""

    def __call__(
        self, params: PyTree, batch_stats: PyTree, images: PyTree[Float[Array, "n ..."]], train: bool
    ) -> tuple[Float[Array, "n classes"], PyTree]: ...


class TrainState(NamedTuple):
    """Everything that a step changes."""

    step: Int32[Array, ""]  # done
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    average: PyTree = ()  # moving average of params and batch_stats, if there is one

    @property
    def variables(self) -> Variables:
        """As `module.apply` takes them: the moving average, if there is one."""
        params, batch_stats = self.average or (self.params, self.batch_stats)
        return {"params": params, "batch_stats": batch_stats}


def init_state(
    variables: Variables, tx: optax.GradientTransformation, *, average: bool = False
) -> TrainState:
    """The state before the first step; `variables` holds "params" and "batch_stats"."""
    params, batch_stats = variables["params"], variables["batch_stats"]
    start = jnp.zeros((), jnp.int32)
    copies = jax.tree.map(jnp.copy, (params, batch_stats)) if average else ()  # donated beside the originals
    return TrainState(start, params, batch_stats, tx.init(params), copies)


def module_apply(module: ResNet, *, start: int | None = None) -> Apply:
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
    attack: Attack | None = None,
    attack_in_train_mode: bool = False,
    label_smoothing: float = 0.0,
    freeze_mask: PyTree[bool] | None = None,
    num_parts: int = 1,
    average_decay: float = 0.0,
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
      num_parts: the batch is processed in this many parts, one after the other, to save memory; the update is
        that of the mean gradient. BatchNorm sees one part at a time, like the shards of several devices.
      average_decay: of the state's moving average, in every step min(average_decay, (1 + step) / (10 + step))
        so that a short training forgets its beginning too.
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

    def gradient(params, batch_stats, batch):
        images = batch.images
        if attack is not None:
            logits_fn = Partial(attacked_logits, params, batch_stats)
            keys = jax.vmap(lambda key: jax.random.fold_in(key, _ATTACK_STREAM))(batch.keys)
            images = attack(logits_fn, images, batch.labels, key=keys)
        grads, (batch_stats, losses, logits) = jax.grad(loss_fn, has_aux=True)(
            params, batch_stats, images, batch.labels
        )
        return grads, batch_stats, sum_metrics(losses, logits, batch.labels)

    def gradient_in_parts(params, batch_stats, batch):
        def add_part(carry, part):
            total, batch_stats = carry
            grads, batch_stats, metrics = gradient(params, batch_stats, part)
            return (jax.tree.map(jnp.add, total, grads), batch_stats), metrics

        parts = jax.tree.map(lambda x: x.reshape(num_parts, -1, *x.shape[1:]), batch)
        zeros = jax.tree.map(jnp.zeros_like, params)
        (total, batch_stats), metrics = jax.lax.scan(add_part, (zeros, batch_stats), parts)
        grads = jax.tree.map(lambda x: x / num_parts, total)
        return grads, batch_stats, jax.tree.map(lambda x: jnp.sum(x, axis=0), metrics)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        check_batch(batch)
        compute = gradient if num_parts == 1 else gradient_in_parts
        grads, batch_stats, metrics = compute(state.params, state.batch_stats, batch)
        grads, batch_stats = parallel.mean((grads, batch_stats), axis_name)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = apply_updates(state.params, updates, freeze_mask)
        average = state.average
        if average:
            decay = jnp.minimum(average_decay, (1.0 + state.step) / (10.0 + state.step))
            new = (params, batch_stats)
            average = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, average, new)
        metrics = parallel.total(metrics, axis_name)
        return TrainState(state.step + 1, params, batch_stats, opt_state, average), metrics

    return train_step


def smoothed_cross_entropy(
    logits: Float[AnyArray, "n classes"], labels: Integer[AnyArray, " n"], smoothing: float
) -> Float32[Array, " n"]:
    """Cross-entropy per example [N] to (1 - s)·onehot + s/classes (Szegedy et al., 2016, §7)."""
    if smoothing == 0.0:
        return cross_entropy(logits, labels)
    uniform = -jnp.mean(jax.nn.log_softmax(logits.astype(jnp.float32)), axis=-1)
    return (1.0 - smoothing) * cross_entropy(logits, labels) + smoothing * uniform


def sum_metrics(
    losses: Float[AnyArray, " n"],
    logits: Float[AnyArray, "n classes"],
    labels: Integer[AnyArray, " n"],
    mask: Float[AnyArray, " n"] | None = None,
) -> Metrics:
    """(sum, count) of loss and accuracy over the examples whose mask [N] is 1."""
    chex.assert_rank(logits, 2)
    chex.assert_shape([losses, labels] if mask is None else [losses, labels, mask], logits.shape[:1])
    mask = jnp.ones(labels.shape, jnp.float32) if mask is None else mask
    correct = (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
    count = jnp.sum(mask)
    return {"loss": (jnp.sum(losses * mask), count), "accuracy": (jnp.sum(correct * mask), count)}


def means(metrics: Mapping[str, tuple[SupportsFloat, SupportsFloat]]) -> dict[str, float]:
    """{"loss": (sum, count)} to {"loss": sum / count} as Python floats."""
    return {name: float(total) / float(count) for name, (total, count) in metrics.items()}


class DivergedError(RuntimeError):
    """The loss is no longer a number; the message names the step and the last good checkpoint."""


class Preempted(BaseException):
    """SIGTERM came, and what the message says is on disk; no error that anything on the way should handle."""


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
    validate: Callable[[TrainState], dict[str, float]] | None = None,
    validate_every: int = 0,
) -> TrainState:
    """Runs steps `int(state.step)` ... `num_steps - 1` and returns the last state.

    Args:
      state: where to begin; a restored state resumes exactly where it was saved.
      run_step: (state, step) to (state, metrics). Must depend on nothing else, so that a resumed run
        repeats it.
      num_steps: the step to stop at.
      schedule: the learning rate by step, for the log and for messages.
      checkpoints: where states are saved, every `save_every` steps and after the last.
      save_every: in steps.
      log_every: in steps; losses are looked at this often, and before every save.
      log: (step, {"loss", "accuracy", "learning_rate"}), means since the last call.
      steps: wraps the range of steps, to draw a progress bar.
      validate: scalars of a state, which are logged with the others after every `validate_every` steps.
      validate_every: in steps; 0: never.

    Raises:
      DivergedError: a loss or a weight that is not finite; such a state is never saved.
      Preempted: SIGTERM arrived, at any of the processes; the state after the step in flight is saved.
    """
    chex.assert_rank(state.step, 0)
    chex.assert_type(state.step, int)
    pending: list[Metrics] = []

    def rate(step: int) -> float:
        return float(schedule(step))  # ty: ignore[invalid-argument-type] complex in Optax's types alone

    def look(step: int, more: dict[str, float]) -> None:
        """Fetches the metrics of the steps up to `step` and logs them, with `more`."""
        fetched = jax.device_get(pending)
        for i, metrics in enumerate(fetched, start=step - len(fetched)):
            if not np.isfinite(metrics["loss"][0]):
                raise DivergedError(_diverged(i, rate(i), checkpoints))
        totals = jax.tree.map(lambda *x: np.sum(x), *fetched)
        log(step, {**means(totals), "learning_rate": rate(step - 1), **more})
        pending.clear()

    start, terminated = int(state.step), threading.Event()
    together = parallel.num_processes() > 1
    with on_sigterm(terminated.set):
        for step in steps(range(start, num_steps)):
            state, metrics = run_step(state, step)
            pending.append(metrics)
            # Two steps in flight keep a device busy; more would only make the progress bar lie.
            jax.block_until_ready(pending[-3:][0])
            done = step + 1
            stop = parallel.preempted(done) if together else terminated.is_set()
            save = done % save_every == 0 or done == num_steps or stop
            validated = validate(state) if validate and validate_every and done % validate_every == 0 else {}
            if validated or save or done % log_every == 0:
                look(done, validated)
            if save:
                if not _all_finite(state.params):
                    raise DivergedError(_diverged(step, rate(step), checkpoints))
                checkpoints.save(done, state)
            if stop:
                raise Preempted(f"SIGTERM: saved at step {done} of {num_steps}")
    return state


@jax.jit
def _all_finite(params: PyTree) -> Array:
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
def on_sigterm(handle: Callable[[], None]) -> Generator[None]:
    """Calls `handle` when SIGTERM comes while the block runs.

    Does nothing outside of the main thread, where signals cannot be caught, and in one of several processes,
    where JAX's runtime catches them to tell the others.
    """
    if threading.current_thread() is not threading.main_thread() or parallel.num_processes() > 1:
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: handle())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def stop_on_sigterm() -> None:
    """For `on_sigterm`: what is finished is on disk, and what is in flight is done again.

    Raises:
      Preempted: always.
    """
    raise Preempted("SIGTERM: what was finished is saved")
