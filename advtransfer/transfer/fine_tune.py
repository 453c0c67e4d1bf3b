"""Fine-tuning: one network, or many of the same shape in one compiled program."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from advtransfer import parallel
from advtransfer.data import Split
from advtransfer.models import Model
from advtransfer.transfer.freezing import (
    activations,
    first_unfrozen_block,
    prefix_is_constant,
    target_batch_stats,
)
from advtransfer.transfer.program import Rates, Task, make_fine_tune
from advtransfer.transfer.recipe import Recipe, check_recipe


class Prepared(NamedTuple):
    """What the trials of one source, target and k share, on the device."""

    batch_stats: Any  # that they start from
    task: Task


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
      train, test: uint8 images, and labels. Images of another resolution than the source's lie on the device
        as they are and are resized batch by batch (see `resize`), before augmentation.
      key: of the new head, the batch order and the augmentation.
      class_names: of the target, one per class.
      num_unfrozen_blocks: residual blocks trained beside the head, counted from the end; -1: everything.
      recipe: the hyper-parameters.

    Returns:
      The transferred model, and the history: "train_..." and "test_..." of loss, accuracy and
      mean_per_class_accuracy (see `evaluation_means`), float32 [E] each, after every epoch of
      `recipe.evaluate_epochs`, in evaluation mode.

    Raises:
      ValueError: more blocks than the network has, a batch larger than the subset, `evaluate_epochs` that
        do not ascend within 1 ... `num_epochs`, or an unknown name in the recipe.
    """
    num_images = len(train.labels)
    recipe = check_recipe(recipe, num_images)
    module = model.module.clone(num_classes=len(class_names))
    run = _one(module, _shape_of(recipe), num_unfrozen_blocks, model.spec.image_size)
    inputs = prepare(model, train, test, recipe, num_unfrozen_blocks)
    rates = Rates(recipe.learning_rate, recipe.weight_decay)
    variables, history = run(model.variables["params"], *inputs, np.arange(num_images), key, rates)
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
    return Model(module, jax.device_get(variables), spec), jax.device_get(history)


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
    rates: Rates | None = None,
    prepared: Prepared | None = None,
) -> dict[str, np.ndarray]:
    """Histories of T fine-tunings that differ in their images, keys and rates only, as one compiled program.

    Args:
      model, train, test, num_unfrozen_blocks, recipe: as for `fine_tune`; `train` is the pool of all images.
      subsets: integers [T, n], the images of each trial.
      keys: PRNG keys [T].
      num_classes: of the target.
      rates: learning rates and weight decays [R]; each is tried on every subset, and they share its images,
        order and head. None: the recipe's.
      prepared: of `prepare`, for more than one call; None: prepared here.

    Returns:
      As the history of `fine_tune`, float32 [T, E] each, or [T, R, E] with `rates`: what separate calls give,
      up to rounding.

    Raises:
      ValueError: as `fine_tune`.
    """
    recipe = check_recipe(recipe, subsets.shape[1])
    module = model.module.clone(num_classes=num_classes)
    programs = _many(module, _shape_of(recipe), num_unfrozen_blocks, model.spec.image_size)
    tried = rates or Rates(recipe.learning_rate, recipe.weight_decay)
    tried = Rates(*(jnp.atleast_1d(jnp.asarray(x, jnp.float32)) for x in tried))
    params = model.variables["params"]
    if own_statistics(recipe, num_unfrozen_blocks):
        # Every subset has its own statistics, hence its own prefix: trials share the parameters only.
        inputs = [
            prepare(model, Split(*(x[subset] for x in train)), test, recipe, num_unfrozen_blocks)
            for subset in subsets
        ]
        own_images = jnp.broadcast_to(jnp.arange(subsets.shape[1]), subsets.shape)
        trials = (*jax.tree.map(lambda *x: jnp.stack(x), *inputs), own_images, keys)
        history = _spread(programs.separate, (params, tried), trials)
    else:
        inputs = prepared or prepare(model, train, test, recipe, num_unfrozen_blocks)
        history = _spread(programs.sharing, (params, tried, *inputs), (jnp.asarray(subsets), keys))
    return history if rates is not None else {name: x[:, 0] for name, x in history.items()}


def own_statistics(recipe: Recipe, num_unfrozen_blocks: int) -> bool:
    """Whether every subset has BatchNorm statistics of its own, so that trials share no activations."""
    return recipe.frozen_batch_norm == "target" and num_unfrozen_blocks != -1


def prepare(model: Model, train: Split, test: Split, recipe: Recipe, num_unfrozen_blocks: int) -> Prepared:
    """Starting BatchNorm statistics, and the task: cached activations where the prefix is constant."""
    module, variables, size = model.module, model.variables, model.spec.image_size
    if own_statistics(recipe, num_unfrozen_blocks):
        stats = target_batch_stats(module, variables, train.images, size)
        variables = {**variables, "batch_stats": stats}
    if prefix_is_constant(num_unfrozen_blocks, recipe):
        start = first_unfrozen_block(module, num_unfrozen_blocks)
        enter = functools.partial(activations, module, variables, start=start, image_size=size)
        views = [
            enter(train.images, augmentation=recipe.augmentation, view=view)
            for view in range(max(1, recipe.num_views))
        ]
        inputs = [jnp.concatenate(views), enter(test.images)]
    else:
        inputs = [jnp.asarray(split.images) for split in (train, test)]
    labels = [jnp.asarray(split.labels) for split in (train, test)]
    return Prepared(variables["batch_stats"], Task(inputs[0], labels[0], inputs[1], labels[1]))


def _spread(program: Callable, shared: tuple, trials: tuple) -> dict[str, np.ndarray]:
    """Runs trials, leading axis [T], over all devices; the last one is repeated where T does not divide."""
    num_trials, devices = trials[-1].shape[0], parallel.num_devices()
    trials, _ = parallel.pad(trials, -(-num_trials // devices) * devices)
    history = program(*parallel.replicate(shared), *parallel.split_locally(trials))
    return {name: np.asarray(x)[:num_trials] for name, x in parallel.join(history).items()}


class _Programs(NamedTuple):
    """Many fine-tunings, compiled two ways."""

    sharing: Callable  # trials that share their task -> history
    separate: Callable  # trials with a task each -> history


def _shape_of(recipe: Recipe) -> Recipe:
    """What of a recipe decides the program; rates are arguments of it."""
    return recipe._replace(learning_rate=0.0, weight_decay=0.0)


@functools.lru_cache(maxsize=64)
def _one(module: Any, recipe: Recipe, num_unfrozen_blocks: int, image_size: int) -> Callable:
    return jax.jit(make_fine_tune(module, recipe, num_unfrozen_blocks, image_size))


@functools.lru_cache(maxsize=64)
def _many(module: Any, recipe: Recipe, num_unfrozen_blocks: int, image_size: int) -> _Programs:
    """Compiled once for every (network, recipe, k), whatever the source's weights, rates and images are."""
    run = make_fine_tune(module, recipe, num_unfrozen_blocks, image_size)

    def one(params, rates, *trial):
        def own(rates):
            return run(params, *trial, rates)[1]

        # One product serves all rates of a head, on any machine.
        return jax.vmap(own)(rates) if num_unfrozen_blocks == 0 else _each(own, rates, num_unfrozen_blocks)

    def sharing(params, rates, batch_stats, task, indices, keys):
        own = functools.partial(one, params, rates, batch_stats, task)
        return _each(lambda trial: own(*trial), (indices, keys), num_unfrozen_blocks)

    def separate(params, rates, *trials):
        return _each(lambda trial: one(params, rates, *trial), trials, num_unfrozen_blocks)

    return _Programs(
        sharing=parallel.map_parallel(sharing, num_shared=4, num_split=2),
        separate=parallel.map_parallel(separate, num_shared=2, num_split=4),
    )


def _each(function: Callable, trials: Any, num_unfrozen_blocks: int) -> Any:
    """`function` of every trial, as many side by side as measured best (benchmarks/RESULTS.md).

    A trial with kernels of its own keeps a whole CPU busy, and side by side its convolutions would be grouped
    ones. Of heads a few at once hide what a step costs beside its products; more fall out of the caches.
    """
    number = len(jax.tree.leaves(trials)[0])
    if num_unfrozen_blocks != 0:
        lanes = 1
    elif parallel.platform() == "cpu":
        lanes = next(lanes for lanes in (4, 3, 2, 1) if number % lanes == 0)
    else:
        lanes = number
    return jax.lax.map(function, trials, batch_size=lanes if lanes > 1 else None)
