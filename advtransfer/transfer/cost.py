"""What fine-tuning costs, counted in floating-point operations before anything runs."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from advtransfer.models import ResNet, init_variables
from advtransfer.transfer.freezing import first_unfrozen_block, prefix_is_constant
from advtransfer.transfer.recipe import Recipe, resolve_recipe


class Layer(NamedTuple):
    """A convolution, or the head, as it runs on one image."""

    place: str  # "conv1", a block's name, or "fc"
    output: tuple[int, ...]
    kernel: tuple[int, ...]


@functools.lru_cache(maxsize=64)
def layers(module: ResNet, image_size: int) -> tuple[Layer, ...]:
    """Every layer with a kernel, in the order in which they run."""
    found = []

    def note(call, args, kwargs, context):
        y = call(*args, **kwargs)
        path = context.module.path
        if path and "kernel" in context.module.variables.get("params", {}):
            found.append(Layer(path[0], y.shape, context.module.variables["params"]["kernel"].shape))
        return y

    variables = jax.eval_shape(lambda: init_variables(module, jax.random.key(0), image_size))
    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    with nn.intercept_methods(note):
        jax.eval_shape(module.apply, variables, image)
    return tuple(found)


def block_flops(module: ResNet, image_size: int) -> tuple[float, ...]:
    """Floating-point operations of the forward pass for one image: [stem, block 0, ..., block B - 1, head].

    Of convolutions and the head, two for each product and sum; the rest does not count.
    """
    flops = dict.fromkeys(["conv1", *module.block_names, "fc"], 0.0)
    for layer in layers(module, image_size):  # ty: ignore[invalid-argument-type]  # a Flax module is hashable
        # Every output value takes a product with each kernel value of its channel.
        flops[layer.place] += 2.0 * math.prod(layer.output) * math.prod(layer.kernel[:-1])
    return tuple(flops.values())


def prefix_flops(module: ResNet, image_size: int, num_unfrozen_blocks: int) -> float:
    """Those of `block_flops` below the first trained block; 0 where everything is trained."""
    start = first_unfrozen_block(module, num_unfrozen_blocks)
    return 0.0 if start is None else sum(block_flops(module, image_size)[: start + 1])


def fine_tune_flops(
    module: ResNet,
    image_size: int,
    recipe: Recipe,
    *,
    num_unfrozen_blocks: int,
    num_train: int,
    num_test: int,
) -> float:
    """Floating-point operations of one fine-tuning, with its evaluations and without the making of a cache.

    A step takes three forward passes of what is trained, and one of what lies below unless that is cached; a
    head in dual form takes fewer.
    """
    recipe = resolve_recipe(recipe, num_train)
    frozen = prefix_flops(module, image_size, num_unfrozen_blocks)
    trained = sum(block_flops(module, image_size)) - frozen
    if prefix_is_constant(num_unfrozen_blocks, recipe):
        frozen = 0.0
    num_steps = recipe.num_epochs * num_train
    num_measured = len(recipe.evaluate_epochs) * (num_train + num_test)
    return num_steps * (frozen + 3 * trained) + num_measured * (frozen + trained)
