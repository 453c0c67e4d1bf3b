"""What a network computes, counted in floating-point operations before anything runs."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from advtransfer.models.resnet import ResNet, init_variables


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
        jax.eval_shape(lambda *args: module.apply(*args), variables, image)  # JAX would not trace it again
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


def flops_per_weight(module: ResNet, image_size: int) -> float:
    """Those of `block_flops` together, for each weight of a kernel."""
    kernels = [layer.kernel for layer in layers(module, image_size)]  # ty: ignore[invalid-argument-type]  # hashable
    return sum(block_flops(module, image_size)) / sum(map(math.prod, kernels))
