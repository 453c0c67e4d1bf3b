"""What fine-tuning costs, counted in floating-point operations before anything runs."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from advtransfer.models import init_variables


def block_flops(module: Any, image_size: int) -> list[float]:
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
    return flops
