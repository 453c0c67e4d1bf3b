"""Fine-tuning: one network, or many of the same shape in one compiled program."""

from __future__ import annotations

import base64
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Integer, Key

from advtransfer import parallel
from advtransfer.data import Split, check_split, image_hashes
from advtransfer.labels import check_labels
from advtransfer.models import Model, ResNet, block_flops
from advtransfer.models.cost import layers
from advtransfer.transfer.activation_cache import Prepared, cache_bytes, own_statistics, prepare
from advtransfer.transfer.cost import prefix_flops
from advtransfer.transfer.freezing import activation_shape, first_unfrozen_block
from advtransfer.transfer.program import EVALUATION_BATCH, Rates, make_fine_tune
from advtransfer.transfer.recipe import Recipe, resolve_recipe, without_rates

_SMALL = 1e7  # FLOPs of a forward pass for an image; less than this leaves a CPU's cores idle


def fine_tune_one(
    model: Model,
    train: Split,
    test: Split | None,
    *,
    key: Key[Array, ""],
    class_names: tuple[str, ...],
    num_unfrozen_blocks: int = 0,
    recipe: Recipe = Recipe(),
) -> tuple[Model, dict[str, Float32[np.ndarray, " epochs"]]]:
    """Fine-tunes a source network on all of `train`.

    Args:
      model: the source.
      train, test: images of another resolution than the source's lie on the device as they are and are
        resized batch by batch (see `resize`), before augmentation. Without test images the history is of the
        training images alone.
      key: of the new head, the batch order and the augmentation.
      class_names: of the target.
      num_unfrozen_blocks: residual blocks trained beside the head, counted from the end; -1: everything.
      recipe: the hyper-parameters.

    Returns:
      The transferred model, and the history: loss, accuracy and mean_per_class_accuracy (see `evaluate`),
      named "train_loss", "test_loss" and so on, at every epoch of `recipe.evaluate_epochs`, in evaluation
      mode.

    Raises:
      ValueError: more blocks than the network has, or images that the recipe does not fit.
    """
    num_classes = len(class_names)
    _check_sets(train, test, num_classes)
    num_images = train.num_images
    recipe = resolve_recipe(recipe, num_images, train.images)
    module = model.module.clone(num_classes=num_classes)
    decided = without_rates(recipe), num_unfrozen_blocks, model.spec.image_size
    run = _one(module, *decided)  # ty: ignore[invalid-argument-type]  # a Flax module is hashable
    # The program measures on two sets; where there is one, the other is an image that costs nothing.
    measured = Split(*(array[:1] for array in train)) if test is None else test
    inputs = prepare(model, train, measured, recipe, num_unfrozen_blocks)[:2]
    rates = Rates(recipe.learning_rate, recipe.weight_decay)
    variables, history = run(model.variables["params"], *inputs, np.arange(num_images), key, rates)
    if test is None:
        history = {name: x for name, x in history.items() if name.startswith("train_")}
    spec = dataclasses.replace(
        model.spec,
        num_classes=num_classes,
        class_names=tuple(class_names),
        norm="none",  # of the training that made these weights; the source's is in the provenance
        eps=0.0,
        provenance={
            "source": dataclasses.asdict(model.spec),
            "num_train_images": num_images,
            "num_unfrozen_blocks": num_unfrozen_blocks,
            "image_hashes": base64.b64encode(image_hashes(train.images).tobytes()).decode(),
            "recipe": dataclasses.asdict(recipe),
        },
    )
    return Model(module, jax.device_get(variables), spec), jax.device_get(history)


def fine_tune_many(
    model: Model,
    train: Split,
    test: Split,
    *,
    subsets: Integer[np.ndarray, "trials n"],
    keys: Key[Array, " trials"],
    num_classes: int,
    num_unfrozen_blocks: int = 0,
    recipe: Recipe = Recipe(),
    rates: Rates | None = None,
    prepared: Prepared | None = None,
) -> dict[str, Float32[np.ndarray, "trials ..."]]:
    """Histories of T fine-tunings that differ in their images, keys and rates only, as one compiled program.

    Args:
      model, train, test, num_unfrozen_blocks, recipe: as for `fine_tune_one`; `train` is the pool of all
        images.
      subsets: of `train`, the images of each trial.
      keys: one for each trial.
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
    _check_sets(train, test, num_classes)
    chex.assert_rank(subsets, 2)
    chex.assert_type(subsets, int)
    chex.assert_equal_shape_prefix([subsets, keys], 1)
    if subsets.size and not 0 <= subsets.min() <= subsets.max() < train.num_images:
        raise ValueError(f"subsets hold other numbers than those of the {train.num_images:,} training images")
    recipe = resolve_recipe(recipe, subsets.shape[1], train.images)
    module = model.module.clone(num_classes=num_classes)
    decided = without_rates(recipe), num_unfrozen_blocks, model.spec.image_size

    def programs(task):
        batch = _trials_per_batch(module, *decided, *subsets.shape, cached=task.is_cached)
        return _many(module, *decided, batch, parallel.num_devices())  # ty: ignore[invalid-argument-type]  # hashable

    tried = rates or Rates(recipe.learning_rate, recipe.weight_decay)
    tried = Rates(*(jnp.atleast_1d(jnp.asarray(x, jnp.float32)) for x in tried))
    chex.assert_rank(tried, 1)
    chex.assert_equal_shape(tried)
    params = model.variables["params"]

    def streams(task):
        # Images where the cache did not fit: every step then runs the frozen blocks too.
        cached = task.is_cached
        return num_streams(module, num_unfrozen_blocks, model.spec.image_size, cached=cached)

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
            task = trials[1]
            histories.append(_spread(programs(task).separate, (params, tried), trials, streams(task)))
        history = {name: np.concatenate([part[name] for part in histories]) for name in histories[0]}
    else:
        if prepared is None:
            used = np.unique(subsets)
            prepared = prepare(model, train, test, recipe, num_unfrozen_blocks, used=used)
        own = subsets if prepared.rows is None else prepared.rows[subsets]
        task = prepared.task
        shared, trials = (params, tried, prepared.batch_stats, task), (jnp.asarray(own), keys)
        history = _spread(programs(task).sharing, shared, trials, streams(task))
    return history if rates is not None else {name: x[:, 0] for name, x in history.items()}


def _check_sets(train: Split, test: Split | None, num_classes: int) -> None:
    sets = {"train": train} if test is None else {"train": train, "test": test}
    for split in sets.values():
        check_split(split)
    for name, split in sets.items():
        check_labels(split.labels, split.num_images, num_classes, name=f"{name}.labels")


def num_streams(module: ResNet, num_unfrozen_blocks: int, image_size: int, *, cached: bool) -> int:
    """How many trials `fine_tune_many` runs at the same time on a device, each by a program of its own.

    On a CPU a small trial leaves cores idle, which others can take (measured: benchmarks/RESULTS.md). With
    `cached` activations a step begins at the first trained block.
    """
    flops = sum(block_flops(module, image_size))
    if cached:
        flops -= prefix_flops(module, image_size, num_unfrozen_blocks)
    return parallel.cores_per_device() if flops < _SMALL else 1


def _trials_per_batch(
    module: ResNet,
    recipe: Recipe,
    num_unfrozen_blocks: int,
    image_size: int,
    num_trials: int,
    num_images: int,
    *,
    cached: bool,
) -> int:
    """How many trials one program takes side by side, as measured best (benchmarks/RESULTS.md), if there is
    memory for them.

    Small batches leave most of a GPU idle. On a CPU nothing is gained by heads side by side, each on rows of
    its own.
    """
    if parallel.platform() == "cpu" or not cached:
        return 1
    if num_unfrozen_blocks == 0:
        # Of an eighth of what is free: the Gram matrix, and the features twice.
        one = 8 * 4 * num_images * (num_images + 2 * module.num_features)
    elif _may_be_products(module, num_unfrozen_blocks, image_size):
        one = 2 * _trial_bytes(module, recipe, num_unfrozen_blocks, image_size)
    else:
        return 1
    # A power of two: what is free changes a little all the time, and the program is compiled for the number.
    return min(num_trials, 2 ** max(0, (parallel.free_bytes() // one).bit_length() - 1))


def _may_be_products(module: ResNet, num_unfrozen_blocks: int, image_size: int) -> bool:
    """Whether trials' own blocks run as batched matrix products: on a GPU, in one group, and on maps of up to
    14², as measured."""
    start = first_unfrozen_block(module, num_unfrozen_blocks)
    if parallel.platform() != "gpu" or module.groups > 1 or start is None:
        return False
    entering = activation_shape(module, start, image_size)  # ty: ignore[invalid-argument-type]  # hashable
    return max(entering.shape[1:3]) <= 14


def _trial_bytes(module: ResNet, recipe: Recipe, num_unfrozen_blocks: int, image_size: int) -> int:
    """Memory of a trial whose blocks are products: the weights four times; for each image the taps of every
    layer and its output twice. What XLA allocates for a GPU is 0.24 to 0.81 of it (17 networks and sizes)."""
    trained = {*module.block_names[-num_unfrozen_blocks:], "fc"}
    weights = numbers = 0
    for layer in layers(module, image_size):  # ty: ignore[invalid-argument-type]  # hashable
        if layer.place in trained:
            weights += 4 * math.prod(layer.kernel)
            taps = math.prod(layer.kernel[:-1]) * math.prod(layer.output[1:-1])
            numbers += taps + 2 * math.prod(layer.output)
    num_images = max(recipe.batch_size, EVALUATION_BATCH // 2)  # what is measured keeps one layer at a time
    return 4 * weights + num_images * np.dtype(module.dtype).itemsize * numbers


def _subsets_at_once(model: Model, recipe: Recipe, k: int, num_train: int, num_test: int) -> int:
    """Trials with activations of their own, held up to three times while they are put together and spread,
    that fit into memory."""
    size = cache_bytes(model.module, recipe, k, model.spec.image_size, num_train, num_test)
    one = max(size, num_train + num_test)
    return parallel.num_devices() * max(1, int(0.5 * parallel.free_bytes() / (3 * one)))


def _spread(program: Callable, shared: tuple, trials: tuple, streams: int) -> dict[str, np.ndarray]:
    """Runs trials, leading axis [T], over all devices and streams; the last one is repeated where T does not
    divide."""
    num_trials, devices = trials[-1].shape[0], parallel.num_devices()
    size = -(-num_trials // (devices * streams)) * devices
    trials, _ = parallel.pad(trials, -(-num_trials // size) * size)
    shared = parallel.replicate(shared, devices)
    parts = [
        (*shared, *parallel.split_locally(jax.tree.map(lambda x, i=i: x[i : i + size], trials), devices))
        for i in range(0, num_trials, size)
    ]
    histories = [parallel.join(history) for history in parallel.side_by_side(program, parts)]
    return {
        name: np.concatenate([history[name] for history in histories])[:num_trials] for name in histories[0]
    }


class _Programs(NamedTuple):
    """Many fine-tunings, compiled two ways."""

    sharing: Callable  # trials that share their task -> history
    separate: Callable  # trials with a task each -> history


@functools.lru_cache(maxsize=64)
def _one(module: ResNet, recipe: Recipe, num_unfrozen_blocks: int, image_size: int) -> Callable:
    return jax.jit(make_fine_tune(module, recipe, num_unfrozen_blocks, image_size))


@functools.lru_cache(maxsize=64)
def _many(
    module: ResNet, recipe: Recipe, num_unfrozen_blocks: int, image_size: int, batch: int, devices: int
) -> _Programs:
    """Compiled once for every (network, recipe, k), whatever the source's weights, rates and images are;
    `batch` trials run as one batched computation."""
    if batch > 1 and num_unfrozen_blocks > 0:
        module = module.clone(as_products=True)
    run = make_fine_tune(module, recipe, num_unfrozen_blocks, image_size)
    each = functools.partial(jax.lax.map, batch_size=batch if batch > 1 else None)

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
        sharing=parallel.map_parallel(sharing, num_shared=4, num_split=2, devices=devices),
        separate=parallel.map_parallel(separate, num_shared=2, num_split=4, devices=devices),
    )
