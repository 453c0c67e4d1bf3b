"""A new head for a new task."""

from __future__ import annotations

import difflib

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from advtransfer.arrays import Variables


def _torch(key: jax.Array, shape: tuple[int, int], scale: float) -> tuple[jax.Array, jax.Array]:
    """`torch.nn.Linear`'s default: kernel and bias uniform in ±1/√features."""
    del scale
    bound = shape[0] ** -0.5
    kernel_key, bias_key = jax.random.split(key)
    return (
        jax.random.uniform(kernel_key, shape, jnp.float32, -bound, bound),
        jax.random.uniform(bias_key, shape[1:], jnp.float32, -bound, bound),
    )


def _normal(key: jax.Array, shape: tuple[int, int], scale: float) -> tuple[jax.Array, jax.Array]:
    """N(0, scale²) kernel, zero bias; the published code of Utrera et al. (2021) uses scale 1."""
    kernel = scale * jax.random.normal(key, shape, jnp.float32)
    return kernel, jnp.zeros(shape[1:], jnp.float32)


def _zeros(key: jax.Array, shape: tuple[int, int], scale: float) -> tuple[jax.Array, jax.Array]:
    del key, scale
    return jnp.zeros(shape, jnp.float32), jnp.zeros(shape[1:], jnp.float32)


HEAD_INITS = {"torch": _torch, "normal": _normal, "zeros": _zeros}


def reset_head(
    variables: Variables, key: Key[Array, ""], *, num_classes: int, init: str = "torch", scale: float = 1.0
) -> Variables:
    """Variables with a fresh head ("fc") for `num_classes`; everything else is shared with the old ones.

    Args:
      variables: {"params", "batch_stats"} of a network of the ResNet family.
      key: of the draw.
      num_classes: of the new task.
      init: "torch", uniform as in PyTorch's Linear; "normal"; or "zeros".
      scale: standard deviation of `init="normal"`.
    """
    if init not in HEAD_INITS:
        near = difflib.get_close_matches(init, HEAD_INITS, n=1) or HEAD_INITS
        raise ValueError(f"unknown head init {init!r}; nearest: {', '.join(near)}")
    chex.assert_rank(variables["params"]["fc"]["kernel"], 2)
    features = variables["params"]["fc"]["kernel"].shape[0]
    kernel, bias = HEAD_INITS[init](key, (features, num_classes), scale)
    head = {"kernel": kernel, "bias": bias}
    return {**variables, "params": {**variables["params"], "fc": head}}
