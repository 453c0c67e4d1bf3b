"""Fine-tuning: one network, or many of the same shape in one compiled program."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from advtransfer import optim, parallel
from advtransfer.attacks import cross_entropy
from advtransfer.data import Augmentation, Batch, Split, make_batch, to_float
from advtransfer.models import Model
from advtransfer.train import (
    Apply,
    Metrics,
    TrainState,
    init_state,
    make_train_step,
    module_apply,
    sum_metrics,
)
from advtransfer.transfer.freezing import (
    activations,
    first_unfrozen_block,
    frozen_mask,
    prefix_is_constant,
    target_batch_stats,
)
from advtransfer.transfer.head import reset_head
from advtransfer.transfer.recipe import Recipe, check_recipe


class Task(NamedTuple):
    """What is trained and measured on: images, or their activations at the first trained block."""

    train_inputs: jax.Array  # uint8 [N, H, W, 3], or float [N, ...]
    train_labels: jax.Array  # int32 [N]
    test_inputs: jax.Array
    test_labels: jax.Array


History = dict[str, jax.Array]  # "train_loss", ... at the recipe's evaluate_epochs, float32 [..., E]

_EVALUATION_BATCH = 256


def fine_tune(
    model: Model,
    train: Split,
    test: Split,
    *,
    key: jax.Array,
    class_names: tuple[str, ...],
    num_unfrozen_blocks: int = 0,
    recipe: Recipe = Recipe(),
) -> tuple[Model, dict[str, np.ndarray]]:
    """Fine-tunes a source network on all of `train`.

    Args:
      model: the source.
      train, test: uint8 images at the source's resolution, and labels.
      key: of the new head, the batch order and the augmentation.
      class_names: of the target, one per class.
      num_unfrozen_blocks: residual blocks trained beside the head, counted from the end; -1: everything.
      recipe: the hyper-parameters.

    Returns:
      The transferred model, and the history: loss and accuracy on train and test, float32 [E] each,
      after every epoch of `recipe.evaluate_epochs`, in evaluation mode.

    Raises:
      ValueError: more blocks than the network has, a batch larger than the subset, `evaluate_epochs` that
        do not ascend within 1 ... `num_epochs`, or an unknown name in the recipe.
    """
    num_images = len(train.labels)
    recipe = check_recipe(recipe, num_images)
    module = model.module.clone(num_classes=len(class_names))
    programs = _programs(module, recipe, num_unfrozen_blocks)
    inputs = _prepare(model, train, test, recipe, num_unfrozen_blocks)
    state, history = programs.one(model.variables["params"], *inputs, np.arange(num_images), key)
    spec = dataclasses.replace(
        model.spec,
        num_classes=len(class_names),
        class_names=tuple(class_names),
        norm="none",  # of the training that made these weights; the source's is in the provenance
        eps=0.0,
        provenance={
            "source": dataclasses.asdict(model.spec),
            "num_train_images": num_images,
            "num_unfrozen_blocks": num_unfrozen_blocks,
            "recipe": recipe._asdict() | {"augmentation": recipe.augmentation._asdict()},
        },
    )
    return Model(module, jax.device_get(state.variables), spec), jax.device_get(history)


def fine_tune_many(
    model: Model,
    train: Split,
    test: Split,
    *,
    subsets: np.ndarray,
    keys: jax.Array,
    num_classes: int,
    num_unfrozen_blocks: int = 0,
    recipe: Recipe = Recipe(),
) -> dict[str, np.ndarray]:
    """Histories of T fine-tunings that differ in their images and keys only, run as one compiled program.

    Args:
      model, train, test, num_unfrozen_blocks, recipe: as for `fine_tune`; `train` is the pool of all images.
      subsets: integers [T, n], the images of each trial.
      keys: PRNG keys [T].
      num_classes: of the target.

    Returns:
      As the history of `fine_tune`, float32 [T, E] each: what T separate calls give, up to rounding.

    Raises:
      ValueError: as `fine_tune`.
    """
    recipe = check_recipe(recipe, subsets.shape[1])
    module = model.module.clone(num_classes=num_classes)
    programs = _programs(module, recipe, num_unfrozen_blocks)
    trials = (jnp.asarray(subsets), keys)
    params = model.variables["params"]
    if recipe.frozen_batch_norm == "target" and num_unfrozen_blocks != -1:
        # Every subset has its own statistics, hence its own prefix: trials share the parameters only.
        inputs = [
            _prepare(model, Split(*(x[subset] for x in train)), test, recipe, num_unfrozen_blocks)
            for subset in subsets
        ]
        own_images = jnp.broadcast_to(jnp.arange(subsets.shape[1]), subsets.shape)
        trials = (*jax.tree.map(lambda *x: jnp.stack(x), *inputs), own_images, keys)
        return _spread(programs.separate, (params,), trials)
    inputs = _prepare(model, train, test, recipe, num_unfrozen_blocks)
    return _spread(programs.sharing, (params, *inputs), trials)


def _spread(program: Callable, shared: tuple, trials: tuple) -> dict[str, np.ndarray]:
    """Runs trials, leading axis [T], over all devices; the last one is repeated where T does not divide."""
    num_trials, devices = trials[-1].shape[0], parallel.num_devices()
    trials, _ = parallel.pad(trials, -(-num_trials // devices) * devices)
    history = program(*parallel.replicate(shared), *parallel.split_locally(trials))
    return {name: np.asarray(x)[:num_trials] for name, x in parallel.join(history).items()}


def _prepare(
    model: Model, train: Split, test: Split, recipe: Recipe, num_unfrozen_blocks: int
) -> tuple[Any, Task]:
    """Starting BatchNorm statistics, and the task: cached activations where the prefix is constant."""
    module, variables = model.module, model.variables
    if recipe.frozen_batch_norm == "target" and num_unfrozen_blocks != -1:
        stats = target_batch_stats(module, variables, train.images)
        variables = {**variables, "batch_stats": stats}
    if prefix_is_constant(num_unfrozen_blocks, recipe.frozen_batch_norm, recipe.augmentation):
        start = first_unfrozen_block(module, num_unfrozen_blocks)
        inputs = [activations(module, variables, split.images, start) for split in (train, test)]
    else:
        inputs = [jnp.asarray(split.images) for split in (train, test)]
    labels = [jnp.asarray(split.labels) for split in (train, test)]
    return variables["batch_stats"], Task(inputs[0], labels[0], inputs[1], labels[1])


class _Programs(NamedTuple):
    """One fine-tuning, compiled three ways."""

    one: Callable  # a single trial -> (state, history)
    sharing: Callable  # trials that share their task -> history
    separate: Callable  # trials with a task each -> history


@functools.lru_cache(maxsize=64)
def _programs(module: Any, recipe: Recipe, num_unfrozen_blocks: int) -> _Programs:
    """Compiled once for every (network, recipe, k), whatever the source's weights and the images are."""
    run = make_fine_tune(module, recipe, num_unfrozen_blocks)

    def history(*args):
        return run(*args)[1]

    return _Programs(
        one=jax.jit(run),
        sharing=parallel.map_parallel(
            jax.vmap(history, in_axes=(None, None, None, 0, 0)), num_shared=3, num_split=2
        ),
        separate=parallel.map_parallel(
            jax.vmap(history, in_axes=(None, 0, 0, 0, 0)), num_shared=1, num_split=4
        ),
    )


def make_fine_tune(
    module: Any, recipe: Recipe, num_unfrozen_blocks: int
) -> Callable[..., tuple[TrainState, History]]:
    """A pure function (params, batch_stats, task, indices, key) -> (state, history): one whole fine-tuning.

    `params` is the source's, whose head is replaced; `module` has the target's number of classes;
    `indices` [n] are the training images. Every epoch visits each of them once, in batches of
    `recipe.batch_size` and a last one of what remains. Frozen parameters get no gradient, momentum or decay
    (`optax.selective_transform`).

    `key` splits into those of the head, of the order and of the examples. Epoch e (from 0) visits the images
    in the order `indices[permutation(fold_in(order, e), n)]`; step s augments a batch of size b with
    `split(fold_in(examples, s), b)`.
    """
    start = first_unfrozen_block(module, num_unfrozen_blocks)
    cached = prefix_is_constant(num_unfrozen_blocks, recipe.frozen_batch_norm, recipe.augmentation)
    apply = _apply_from(module, start, cached, recipe.frozen_batch_norm)
    evaluated = np.isin(np.arange(1, recipe.num_epochs + 1), recipe.evaluate_epochs)

    def run(params, batch_stats, task, indices, key):
        num_images = indices.shape[0]
        steps_per_epoch = -(-num_images // recipe.batch_size)
        head_key, order_key, example_key = jax.random.split(key, 3)
        variables = reset_head(
            {"params": params, "batch_stats": batch_stats},
            head_key,
            num_classes=module.num_classes,
            init=recipe.head_init,
            scale=recipe.head_scale,
        )
        mask = frozen_mask(module, variables["params"], num_unfrozen_blocks)
        tx = _optimizer(recipe, recipe.num_epochs * steps_per_epoch, mask)
        train_step = make_train_step(apply, tx, label_smoothing=recipe.label_smoothing, freeze_mask=mask)

        def step(state, chosen):
            step_key = jax.random.fold_in(example_key, state.step)
            keys = jax.random.split(step_key, chosen.shape[0])
            return train_step(state, _batch(task, chosen, keys, recipe.augmentation))[0], None

        def epoch(state, inputs):
            number, evaluated = inputs
            order_now = jax.random.fold_in(order_key, number)
            order = indices[jax.random.permutation(order_now, num_images)]
            num_full = num_images // recipe.batch_size * recipe.batch_size
            full = order[:num_full].reshape(-1, recipe.batch_size)
            state, _ = jax.lax.scan(step, state, full)
            if num_full < num_images:
                state, _ = step(state, order[num_full:])
            return state, jax.lax.cond(evaluated, measure, nothing, state)

        def measure(state):
            train = (task.train_inputs[indices], task.train_labels[indices])
            test = (task.test_inputs, task.test_labels)
            found = {}
            for name, data in (("train", train), ("test", test)):
                metrics = {key: x / n for key, (x, n) in _measure(apply, state, *data).items()}
                # A diverged network still names some class for every image: that is no accuracy.
                is_number = jnp.isfinite(metrics["loss"])
                found |= {f"{name}_{key}": jnp.where(is_number, x, jnp.nan) for key, x in metrics.items()}
            return found

        def nothing(state):
            return jax.tree.map(jnp.zeros_like, jax.eval_shape(measure, state))

        epochs = (jnp.arange(recipe.num_epochs), jnp.asarray(evaluated))
        state, history = jax.lax.scan(epoch, init_state(variables, tx), epochs)
        return state, {name: x[np.flatnonzero(evaluated)] for name, x in history.items()}

    return run


def _optimizer(recipe: Recipe, num_steps: int, mask: Any) -> optax.GradientTransformation:
    tx = optim.sgd(
        optim.make_schedule(recipe.schedule, recipe.learning_rate, num_steps),
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
    )
    return optax.selective_transform(tx, freeze_mask=mask)


def _apply_from(module: Any, start: int | None, cached: bool, frozen_batch_norm: str) -> Apply:
    """The network from its inputs (images, or cached activations at `start`) to logits."""
    if start is None or frozen_batch_norm == "update":
        return module_apply(module)
    unfrozen = module_apply(module, start=start)
    if cached:
        return unfrozen

    def apply(params, batch_stats, images, train):
        variables = {"params": params, "batch_stats": batch_stats}
        entering = jax.lax.stop_gradient(module.apply(variables, images, stop=start))
        return unfrozen(params, batch_stats, entering, train)

    return apply


def _batch(task: Task, chosen: jax.Array, keys: jax.Array, augmentation: Augmentation) -> Batch:
    if task.train_inputs.dtype == jnp.uint8:
        return make_batch(task.train_inputs, task.train_labels, chosen, keys, augmentation)
    return Batch(task.train_inputs[chosen], task.train_labels[chosen], keys)


def _measure(apply: Apply, state: TrainState, inputs: jax.Array, labels: jax.Array) -> Metrics:
    """(sum, count) of loss and accuracy in evaluation mode, a piece at a time to bound the memory."""
    size = min(_EVALUATION_BATCH, labels.shape[0])
    num_pieces = -(-labels.shape[0] // size)
    padded, mask = parallel.pad((inputs, labels), num_pieces * size)
    pieces = jax.tree.map(lambda x: x.reshape(num_pieces, size, *x.shape[1:]), (*padded, mask))

    def measure(piece):
        inputs, labels, mask = piece
        images = to_float(inputs) if inputs.dtype == jnp.uint8 else inputs
        logits, _ = apply(state.params, state.batch_stats, images, False)
        return sum_metrics(cross_entropy(logits, labels), logits, labels, mask)

    return jax.tree.map(jnp.sum, jax.lax.map(measure, pieces))
