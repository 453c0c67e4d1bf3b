"""What fine-tuning costs, counted in floating-point operations before anything runs."""

from __future__ import annotations

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from advtransfer.models import init_variables
from advtransfer.transfer.freezing import first_unfrozen_block, prefix_is_constant
from advtransfer.transfer.recipe import Recipe


@functools.lru_cache(maxsize=64)
def block_flops(module: Any, image_size: int) -> tuple[float, ...]:
    """Floating-point operations of the forward pass for one image: [stem, block 0, ..., block B - 1, head].

    Of convolutions and the head, two for each product and sum; the rest does not count.
    """
    places = {name: i for i, name in enumerate(["conv1", *module.block_names, "fc"])}
    flops = [0.0] * len(places)

    def count(call, args, kwargs, context):
        y = call(*args, **kwargs)
        path = context.module.path
        if path and "kernel" in context.module.variables.get("params", {}):
            kernel = context.module.variables["params"]["kernel"].shape
            # Every output value takes a product with each kernel value of its channel.
            flops[places[path[0]]] += 2.0 * math.prod(y.shape) * math.prod(kernel[:-1])
        return y

    variables = jax.eval_shape(lambda: init_variables(module, jax.random.key(0), image_size))
    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    with nn.intercept_methods(count):
        jax.eval_shape(module.apply, variables, image)
    return tuple(flops)


def fine_tune_flops(
    module: Any, image_size: int, recipe: Recipe, *, num_unfrozen_blocks: int, num_train: int, num_test: int
) -> float:
    """Floating-point operations of one fine-tuning, with its evaluations and without the making of a cache.

    A step takes three forward passes of what is trained, and one of what lies below unless that is cached; a
    head in dual form takes fewer.
    """
    flops = block_flops(module, image_size)
    start = first_unfrozen_block(module, num_unfrozen_blocks)
    frozen = 0.0 if start is None else sum(flops[: start + 1])
    trained = sum(flops) - frozen
    if prefix_is_constant(num_unfrozen_blocks, recipe):
        frozen = 0.0
    num_steps = recipe.num_epochs * num_train
    num_measured = len(recipe.measured_epochs) * (num_train + num_test)
    return num_steps * (frozen + 3 * trained) + num_measured * (frozen + trained)
