"""Many devices: the only home of pmap, collectives and the process index.

Everything else is written for one device. A function becomes data-parallel here, once, at its call site;
inside it, `mean` and `total` combine over devices when an `axis_name` is given and do nothing when it is
None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

AXIS = "devices"


def num_devices() -> int:
    """Devices that this process feeds."""
    return jax.local_device_count()


def is_main_process() -> bool:
    """Whether this process writes the files that exist once: logs, rows, reports."""
    return jax.process_index() == 0


def mean(tree: Any, axis_name: str | None) -> Any:
    """Mean of every leaf over the devices of `axis_name`; the tree itself when `axis_name` is None."""
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def total(tree: Any, axis_name: str | None) -> Any:
    """Sum of every leaf over the devices of `axis_name`; the tree itself when `axis_name` is None."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def data_parallel(
    function: Callable[..., Any],
    *,
    num_shared: int,
    num_split: int,
    donate: tuple[int, ...] = (),
) -> Callable[..., Any]:
    """`function(*shared, *split)`, run on every local device over its own shard of the split arguments.

    Shared arguments have no device axis (replicate them once with `replicate`); split arguments come from
    `split`, with a leading axis [num_devices]. The results must be equal on all devices (combined by
    `mean` or `total` over `AXIS`) and carry no device axis either. Arguments numbered in `donate` are
    given up to the call.
    """
    return jax.pmap(
        function,
        axis_name=AXIS,
        in_axes=(None,) * num_shared + (0,) * num_split,
        out_axes=None,
        donate_argnums=donate,
    )


def map_parallel(function: Callable[..., Any], *, num_shared: int, num_split: int) -> Callable[..., Any]:
    """Like `data_parallel`, for independent work: results keep their leading axis [num_devices]."""
    return jax.pmap(function, in_axes=(None,) * num_shared + (0,) * num_split)


def replicate(tree: Any) -> Any:
    """Copies of every array on every local device, as arrays without a device axis."""
    mesh = jax.sharding.Mesh(np.array(jax.local_devices()), (AXIS,))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.device_put(tree, everywhere)


def split(tree: Any) -> Any:
    """Reshapes [N, ...] to [num_devices, N / num_devices, ...].

    Raises:
      ValueError: when the number of devices does not divide N.
    """
    devices = num_devices()

    def shard(x):
        if x.shape[0] % devices:
            raise ValueError(
                f"a batch of {x.shape[0]} examples cannot be split evenly over {devices} devices: "
                f"use a multiple of {devices}"
            )
        return x.reshape(devices, x.shape[0] // devices, *x.shape[1:])

    return jax.tree.map(shard, tree)


def join(tree: Any) -> Any:
    """The inverse of `split`: [num_devices, M, ...] to [num_devices * M, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def pad(tree: Any, size: int) -> tuple[Any, np.ndarray]:
    """Repeats the last example up to a leading axis of `size`; the mask [size] is 1.0 where one is real."""
    length = jax.tree.leaves(tree)[0].shape[0]
    mask = (np.arange(size) < length).astype(np.float32)
    if length == size:
        return tree, mask
    indices = np.minimum(np.arange(size), length - 1)
    return jax.tree.map(lambda x: jnp.take(x, indices, axis=0), tree), mask
