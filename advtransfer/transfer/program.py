"""One whole fine-tuning as a pure function: what the engine maps over trials, compiled once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int32, Num, PyTree

from advtransfer import optim, parallel
from advtransfer.arrays import AnyArray, Variables
from advtransfer.data import Batch, augment, to_float
from advtransfer.evaluate import evaluation_means, evaluation_metrics
from advtransfer.models import ResNet
from advtransfer.train import Apply, Metrics, TrainState, init_state, make_train_step, module_apply
from advtransfer.transfer import dual
from advtransfer.transfer.freezing import first_unfrozen_block, frozen_mask
from advtransfer.transfer.head import reset_head
from advtransfer.transfer.recipe import Recipe


class Task(NamedTuple):
    """What is trained and measured on: images, or their activations at the first trained block."""

    # uint8 [V N, H, W, 3], or float [V N, ...]; view after view of all images
    train_inputs: Num[Array, "vn ..."]
    train_labels: Int32[Array, " n"]
    test_inputs: Num[Array, "m ..."]
    test_labels: Int32[Array, " m"]

    @property
    def is_cached(self) -> bool:
        """Whether the inputs are activations; images are uint8."""
        return self.train_inputs.dtype != jnp.uint8


class Rates(NamedTuple):
    """The hyper-parameters that trials of one program may differ in."""

    learning_rate: Float[Array, " ..."] | float
    weight_decay: Float[Array, " ..."] | float


History = dict[str, Array]  # "train_loss", ... at the recipe's evaluate_epochs, float32 [..., E]

EVALUATION_BATCH = 256


class _Form(NamedTuple):
    """How the trained parameters are held while they are trained."""

    variables: Variables  # before the first step
    mask: PyTree | None  # True where frozen
    apply: Apply  # of training steps
    inputs: Callable[[jax.Array], Any]  # what `apply` takes for rows of the subset's inputs, [V n, ...]
    network: Callable[[TrainState], tuple[PyTree, PyTree]]  # the network's own params and batch_stats


def make_fine_tune(
    module: ResNet, recipe: Recipe, num_unfrozen_blocks: int, image_size: int | None = None
) -> Callable[..., tuple[Variables, History]]:
    """A pure function (params, batch_stats, task, indices, key, rates) -> (variables, history): one training.

    `params` is the source's, whose head is replaced; `module` has the target's number of classes;
    `indices` [n] are the training images; `rates` stand in the place of the recipe's. Images are resized to
    `image_size`. Every epoch visits each of the training images once, in batches of `recipe.batch_size` and a
    last one of what remains. Frozen parameters get no gradient, momentum or decay
    (`optax.selective_transform`). A head on few cached features is trained in dual form.

    `key` splits into those of the head, of the order and of the examples. Epoch e (from 0) visits the images
    in the order `indices[permutation(fold_in(order, e), n)]`; step s augments a batch of size b with
    `split(fold_in(examples, s), b)`, or draws one of the fixed views of each image with these keys.
    """
    start = first_unfrozen_block(module, num_unfrozen_blocks)
    evaluated = np.isin(np.arange(1, recipe.num_epochs + 1), recipe.evaluate_epochs)

    def run(params, batch_stats, task, indices, key, rates):
        chex.assert_rank([task.train_labels, task.test_labels, indices], 1)
        chex.assert_equal_shape_prefix([task.test_inputs, task.test_labels], 1)
        chex.assert_is_divisible(len(task.train_inputs), len(task.train_labels))
        num_images, num_views = len(indices), len(task.train_inputs) // len(task.train_labels)
        head_key, order_key, example_key = jax.random.split(key, 3)
        variables = reset_head(
            {"params": params, "batch_stats": batch_stats},
            head_key,
            num_classes=module.num_classes,
            init=recipe.head_init,
            scale=recipe.head_scale,
        )
        cached = task.is_cached
        network = _apply_from(module, start, cached, recipe.frozen_batch_norm)
        rows = jnp.add.outer(jnp.arange(num_views) * len(task.train_labels), indices).reshape(-1)
        form = _choose_form(module, num_unfrozen_blocks, variables, network, task.train_inputs, rows)
        tx = _optimizer(recipe, rates, recipe.num_epochs * -(-num_images // recipe.batch_size), form.mask)
        train_step = make_train_step(
            form.apply, tx, label_smoothing=recipe.label_smoothing, freeze_mask=form.mask
        )

        def step(state, places):
            keys = jax.random.split(jax.random.fold_in(example_key, state.step), len(places))
            labels = task.train_labels[indices[places]]
            if num_views > 1:
                views = jax.vmap(lambda key: jax.random.randint(key, (), 0, num_views))(keys)
                places = views * num_images + places
            inputs = form.inputs(places)
            if not cached:
                inputs = augment(keys, to_float(inputs, image_size), recipe.augmentation)
            return train_step(state, Batch(inputs, labels, keys))[0], None

        def epoch(state, inputs):
            number, evaluated = inputs
            order = jax.random.permutation(jax.random.fold_in(order_key, number), num_images)
            num_full = num_images // recipe.batch_size * recipe.batch_size
            full = order[:num_full].reshape(-1, recipe.batch_size)
            state, _ = jax.lax.scan(step, state, full)
            if num_full < num_images:
                state, _ = step(state, order[num_full:])
            return state, jax.lax.cond(evaluated, measure, nothing, state)

        def measure(state):
            variables = form.network(state)

            def logits_fn(inputs):
                images = inputs if cached else to_float(inputs, image_size)
                return network(*variables, images, False)[0]

            return _measure_both(logits_fn, task, indices)

        def nothing(state):
            return jax.tree.map(jnp.zeros_like, jax.eval_shape(measure, state))

        epochs = (jnp.arange(recipe.num_epochs), jnp.asarray(evaluated))
        state, history = jax.lax.scan(epoch, init_state(form.variables, tx), epochs)
        params, batch_stats = form.network(state)
        history = {name: x[np.flatnonzero(evaluated)] for name, x in history.items()}
        return {"params": params, "batch_stats": batch_stats}, history

    return run


def _choose_form(
    module: ResNet,
    num_unfrozen_blocks: int,
    variables: Variables,
    apply: Apply,
    inputs: jax.Array,
    rows: jax.Array,
) -> _Form:
    """The dual form for a head on few cached features, otherwise the network as it is."""
    is_head = num_unfrozen_blocks == 0 and inputs.dtype != jnp.uint8
    if is_head and dual.is_cheaper(len(rows), inputs.shape[1]):
        return _dual_form(variables, inputs[rows])
    return _Form(
        variables,
        frozen_mask(module, variables["params"], num_unfrozen_blocks),
        apply,
        inputs=lambda places: inputs[rows[places]],
        network=lambda state: (state.params, state.batch_stats),
    )


def _dual_form(variables: Variables, features: jax.Array) -> _Form:
    """The head alone, in the span of its features [V n, D]."""
    params = variables["params"]
    kernel, bias = params["fc"]["kernel"], params["fc"]["bias"]
    head = dual.make_dual(features, kernel)

    def network(state):
        own = dual.primal_head(state.params, features, kernel)
        return {**params, "fc": own}, state.batch_stats

    start = {"params": dual.dual_params(len(features), bias), "batch_stats": variables["batch_stats"]}
    return _Form(start, None, dual.dual_apply, lambda places: dual.dual_inputs(head, places), network)


def _optimizer(
    recipe: Recipe, rates: Rates, num_steps: int, mask: PyTree | None
) -> optax.GradientTransformation:
    tx = optim.sgd(
        optim.make_schedule(recipe.schedule, rates.learning_rate, num_steps),
        momentum=recipe.momentum,
        weight_decay=rates.weight_decay,
    )
    return tx if mask is None else optax.selective_transform(tx, freeze_mask=mask)


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


def _measure_both(logits_fn: Callable, task: Task, indices: jax.Array) -> dict[str, jax.Array]:
    """ "train_loss", ..., "test_mean_per_class_accuracy" of a network."""
    sets = {
        "train": (task.train_inputs, task.train_labels, indices),
        "test": (task.test_inputs, task.test_labels, jnp.arange(len(task.test_labels))),
    }
    found = {}
    for name, data in sets.items():
        metrics = evaluation_means(_measure(logits_fn, *data))
        # A diverged network still names some class for every image: that is no accuracy.
        is_number = jnp.isfinite(metrics["loss"])
        found |= {f"{name}_{key}": jnp.where(is_number, x, jnp.nan) for key, x in metrics.items()}
    return found


def _measure(logits_fn: Callable, inputs: Array, labels: Array, indices: AnyArray) -> Metrics:
    """`evaluation_metrics` of the inputs at `indices`, a piece at a time to bound the memory."""
    size = min(EVALUATION_BATCH, len(indices))
    num_pieces = -(-len(indices) // size)
    padded, mask = parallel.pad(indices, num_pieces * size)

    def measure(piece):
        indices, mask = piece
        return evaluation_metrics(logits_fn(inputs[indices]), labels[indices], mask)

    pieces = jax.tree.map(lambda x: x.reshape(num_pieces, size), (padded, mask))
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), jax.lax.map(measure, pieces))
