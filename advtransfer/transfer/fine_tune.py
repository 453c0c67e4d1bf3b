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
from advtransfer.transfer.prepared import Prepared, cache_bytes, own_statistics, prepare
from advtransfer.transfer.program import Rates, make_fine_tune
from advtransfer.transfer.recipe import Recipe, check_recipe


def fine_tune_one(
    model: Model,
    train: Split,
    test: Split | None,
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
        as they are and are resized batch by batch (see `resize`), before augmentation. Without test images
        the history is of the training images alone.
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
    # The program measures on two sets; where there is one, the other is an image that costs nothing.
    measured = Split(*(array[:1] for array in train)) if test is None else test
    inputs = prepare(model, train, measured, recipe, num_unfrozen_blocks)[:2]
    rates = Rates(recipe.learning_rate, recipe.weight_decay)
    variables, history = run(model.variables["params"], *inputs, np.arange(num_images), key, rates)
    if test is None:
        history = {name: x for name, x in history.items() if name.startswith("train_")}
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
      model, train, test, num_unfrozen_blocks, recipe: as for `fine_tune_one`; `train` is the pool of all
        images.
      subsets: integers [T, n], the images of each trial.
      keys: PRNG keys [T].
      num_classes: of the target.
      rates: learning rates and weight decays [R]; each is tried on every subset, and they share its images,
        order and head. None: the recipe's.
      prepared: of `prepare`, for more than one call; None: prepared here.

    Returns:
      As the history of `fine_tune_one`, float32 [T, E] each, or [T, R, E] with `rates`: what separate calls
      give, up to rounding.

    Raises:
      ValueError: as `fine_tune_one`.
    """
    recipe = check_recipe(recipe, subsets.shape[1])
    module = model.module.clone(num_classes=num_classes)
    lanes = _lanes(module, num_unfrozen_blocks, *subsets.shape)
    programs = _many(module, _shape_of(recipe), num_unfrozen_blocks, model.spec.image_size, lanes)
    tried = rates or Rates(recipe.learning_rate, recipe.weight_decay)
    tried = Rates(*(jnp.atleast_1d(jnp.asarray(x, jnp.float32)) for x in tried))
    params = model.variables["params"]
    if own_statistics(recipe, num_unfrozen_blocks):
        # Every subset has its own statistics, hence its own prefix: trials share the parameters only.
        step = _subsets_at_once(model, recipe, num_unfrozen_blocks, subsets.shape[1], test.num_images)
        histories = []
        for i in range(0, len(subsets), step):
            inputs = [
                prepare(model, Split(*(x[subset] for x in train)), test, recipe, num_unfrozen_blocks)[:2]
                for subset in subsets[i : i + step]
            ]
            own_images = np.broadcast_to(np.arange(subsets.shape[1]), (len(inputs), subsets.shape[1]))
            trials = (*jax.tree.map(lambda *x: jnp.stack(x), *inputs), own_images, keys[i : i + step])
            histories.append(_spread(programs.separate, (params, tried), trials))
        history = {name: np.concatenate([part[name] for part in histories]) for name in histories[0]}
    else:
        if prepared is None:
            used = np.unique(subsets)
            prepared = prepare(model, train, test, recipe, num_unfrozen_blocks, used=used)
        own = subsets if prepared.rows is None else prepared.rows[subsets]
        shared = (params, tried, prepared.batch_stats, prepared.task)
        history = _spread(programs.sharing, shared, (jnp.asarray(own), keys))
    return history if rates is not None else {name: x[:, 0] for name, x in history.items()}


def _lanes(module: Any, num_unfrozen_blocks: int, num_trials: int, num_images: int) -> int:
    """How many trials go side by side, as measured best (benchmarks/RESULTS.md), if there is memory for them.

    A trial with kernels of its own keeps a whole CPU busy, and side by side its convolutions would be grouped
    ones. Of heads a few at once hide what a step costs beside its products; more fall out of a CPU's caches.
    """
    if num_unfrozen_blocks != 0:
        return 1
    if parallel.platform() == "cpu":
        return next(lanes for lanes in (4, 3, 2, 1) if -(-num_trials // parallel.num_devices()) % lanes == 0)
    one = 4 * num_images * (num_images + 2 * module.num_features)  # the Gram matrix, the features twice
    # A power of two: what is free changes a little all the time, and the program is compiled for the number.
    return min(num_trials, 2 ** max(0, (parallel.free_bytes() // 8 // one).bit_length() - 1))


def _subsets_at_once(model: Model, recipe: Recipe, k: int, num_train: int, num_test: int) -> int:
    """Trials with activations of their own, held twice while they are put together, that fit into memory."""
    size = cache_bytes(model.module, recipe, k, model.spec.image_size, num_train, num_test)
    one = max(size, num_train + num_test)
    return parallel.num_devices() * max(1, int(0.5 * parallel.free_bytes() / (2 * one)))


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
def _many(module: Any, recipe: Recipe, num_unfrozen_blocks: int, image_size: int, lanes: int) -> _Programs:
    """Compiled once for every (network, recipe, k), whatever the source's weights, rates and images are;
    `lanes` trials go side by side."""
    run = make_fine_tune(module, recipe, num_unfrozen_blocks, image_size)
    each = functools.partial(jax.lax.map, batch_size=lanes if lanes > 1 else None)

    def one(params, rates, *trial):
        def own(rates):
            return run(params, *trial, rates)[1]

        # One product serves all rates of a head, on any machine.
        return jax.vmap(own)(rates) if num_unfrozen_blocks == 0 else jax.lax.map(own, rates)

    def sharing(params, rates, batch_stats, task, indices, keys):
        own = functools.partial(one, params, rates, batch_stats, task)
        return each(lambda trial: own(*trial), (indices, keys))

    def separate(params, rates, *trials):
        return each(lambda trial: one(params, rates, *trial), trials)

    return _Programs(
        sharing=parallel.map_parallel(sharing, num_shared=4, num_split=2),
        separate=parallel.map_parallel(separate, num_shared=2, num_split=4),
    )
