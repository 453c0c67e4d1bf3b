"""Many devices and many processes: the only home of pmap, collectives, the process index and jax.distributed.

Everything else is written for one device. A function becomes data-parallel here, once, at its call site;
inside it, `mean` and `total` combine over devices when an `axis_name` is given and do nothing when it is
None. Over several processes every one runs the same program: each feeds its own devices with its own rows
of a batch, arrays stay local to a process, and process 0 decides and writes what exists once.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from jax.experimental import multihost_utils
from jaxtyping import Float32, PyTree

AXIS = "devices"

LOST_PROCESS = 3  # exit code of a process whose run has lost another one

# Operations of a forward pass per weight on each CPU device. Images/s of training steps on two devices over
# those on one were 0.71-0.96 at 200, 0.93-1.14 at 400 and 0.98-1.37 from 800 on (benchmarks/RESULTS.md).
_LEAST_WORK = 500

# Where a launcher says how many processes it has started; mpirun may have been called in a job of Slurm.
_PROCESS_COUNTS = ("JAX_NUM_PROCESSES", "OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS")


class NoCluster(RuntimeError):
    """The processes of a run did not find each other; the message says what to set."""


def initialize(*, heartbeat_seconds: int = 40) -> None:
    """Joins the processes of one run; call it once, before anything touches a device.

    A TPU pod, Slurm, Open MPI and Kubernetes are found by JAX itself. Elsewhere the environment says it:
    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID. This process ends
    with one line and the code LOST_PROCESS when the others do not come within five minutes, or one of them
    dies later. Where the launcher counts one process there is nothing to join, which a warning says.

    Args:
      heartbeat_seconds: a process that is silent for this long counts as dead.

    Raises:
      NoCluster: nothing says which processes there are.
    """
    if next((os.environ[name] for name in _PROCESS_COUNTS if name in os.environ), None) == "1":
        logging.warning("--multihost: the launcher has started one process only")
        return
    own = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    # What the user has set suffices: in Kubernetes JAX would need a package and permissions as well.
    by_hand = all(name in os.environ for name in ("JAX_COORDINATOR_ADDRESS", *own.values()))
    try:
        ctypes.CDLL(None).signal(signal.SIGABRT, _on_missing)
        given: dict[str, Any] = {
            name: int(os.environ[variable]) for name, variable in own.items() if variable in os.environ
        }
        jax.distributed.initialize(
            **given,
            cluster_detection_method="deactivate" if by_hand else None,
            heartbeat_timeout_seconds=heartbeat_seconds,
            shutdown_timeout_seconds=heartbeat_seconds,
        )
        ctypes.CDLL(None).signal(signal.SIGABRT, _on_lost)
    except (ValueError, RuntimeError) as error:
        raise NoCluster(
            f"--multihost: {error} Outside of a TPU pod, Slurm, Open MPI and Kubernetes set "
            "JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from error


def _ending(line: str) -> Any:
    """A handler of the signal by which JAX's runtime aborts, from a thread of its own, when another process
    is missing: the main thread waits by then, and nothing is raised that could be caught."""

    def end(_: int) -> None:
        os.write(2, f"{line}\n".encode())
        os._exit(LOST_PROCESS)

    return ctypes.CFUNCTYPE(None, ctypes.c_int)(end)


_on_missing = _ending(
    "the processes of this run did not find each other: see that all were started, and that process 0's "
    "address and port can be reached; then the same command on all"
)
_on_lost = _ending(
    "another process of this run has ended, its own messages say why; resume with the same command on all"
)


def num_processes() -> int:
    """Processes of this run."""
    return jax.process_count()


def process() -> int:
    """This process's number in the run, from 0."""
    return jax.process_index()


def barrier(name: str) -> None:
    """Returns when every process has come to the barrier of this name."""
    if num_processes() > 1:
        multihost_utils.sync_global_devices(name)


def from_main(tree: PyTree) -> PyTree:
    """Process 0's values of a tree of arrays and numbers, on every process; shapes and types are everywhere
    the same."""
    return tree if num_processes() == 1 else multihost_utils.broadcast_one_to_all(tree)


def everywhere(fine: bool) -> bool:
    """Whether `fine` holds on every process; all of them ask, and all get the same answer."""
    return fine if num_processes() == 1 else bool(np.all(multihost_utils.process_allgather(np.bool_(fine))))


def preempted(step: int) -> bool:
    """Whether SIGTERM has come to one of several processes and this is the step that all are to save at.

    The processes agree through JAX's coordination service, so every one must ask after every step.
    """
    return multihost_utils.reached_preemption_sync_point(step)


def platform() -> str:
    """Of this process's devices: cpu, gpu or tpu."""
    return jax.local_devices()[0].platform


def one_device_per_core() -> None:
    """Makes every core of a CPU a device, for `choose_devices`; call it before anything touches a device.

    XLA_FLAGS and JAX_NUM_CPU_DEVICES that name a number of devices hold. Where there may be an accelerator
    nothing is changed.
    """
    asked = os.environ.get("JAX_PLATFORMS", "")
    if asked != "cpu" and (asked or entry_points(group="jax_plugins") or find_spec("libtpu")):
        return
    flags = {
        "--xla_force_host_platform_device_count": num_cores(),
        # By default XLA ends the process when one device keeps another waiting for 40 s.
        "--xla_cpu_collective_call_terminate_timeout_seconds": 10**6,
    }
    given = os.environ.get("XLA_FLAGS", "")
    ours = [f"{name}={value}" for name, value in flags.items() if name not in given]
    os.environ["XLA_FLAGS"] = " ".join([*filter(None, [given]), *ours])


def num_cores() -> int:
    """CPU cores that this process may use: by its affinity, its control group's share of time, and NPROC, to
    which XLA keeps too."""
    known = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    with contextlib.suppress(ValueError):
        cores = min(cores, max(1, int(os.environ.get("NPROC", ""))))
    with contextlib.suppress(OSError, ValueError):  # "max" is no limit
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        cores = min(cores, max(1, quota // period))
    return cores


def num_devices() -> int:
    """Devices of this process that independent work is spread over: all accelerators, but one CPU device, in
    which work shares the cores by threads (`cores_per_device`)."""
    return 1 if platform() == "cpu" else jax.local_device_count()


def cores_per_device() -> int:
    """CPU cores for each of `num_devices`; of an accelerator, which runs one program, 1."""
    return max(1, num_cores() // num_devices()) if platform() == "cpu" else 1


def choose_devices(batch_size: int, *, flops_per_weight: float = math.inf) -> int:
    """How many devices of each process a batch is divided among.

    All accelerators. Of CPU devices (see `one_device_per_core`) the largest number that divides the batch and
    leaves each enough to do: on one device XLA runs small convolutions on one core, but on several each
    repeats what has to be done for every weight, such as its update.

    Args:
      batch_size: of all processes.
      flops_per_weight: operations of a forward pass for an image, for each weight that is trained.
    """
    available = jax.local_device_count()
    if platform() != "cpu":
        return available
    own = batch_size // num_processes()
    fitting = [
        n for n in range(1, available + 1) if own % n == 0 and own // n * flops_per_weight >= _LEAST_WORK
    ]
    return max(fitting, default=1)


def side_by_side(function: Callable[..., Any], calls: Sequence[tuple]) -> list[Any]:
    """`function(*call)` of all calls at the same time, each in a thread, with their arrays computed."""
    precision = jax.config.jax_default_matmul_precision  # ty: ignore[missing-attribute] JAX adds it at run time

    def run(call):
        # What `with` sets of JAX holds in one thread.
        with jax.default_matmul_precision(precision):
            return jax.block_until_ready(function(*call))

    if len(calls) == 1:
        return [run(calls[0])]
    with ThreadPoolExecutor(len(calls)) as threads:
        return list(threads.map(run, calls))


def free_bytes() -> int:
    """Memory that new arrays may take on each of `num_devices`: the least that one of them has left; on a CPU
    what the machine has left, or what the control group of this process leaves."""
    known = [device.memory_stats() for device in jax.local_devices()]
    if all(known):
        return min(stats["bytes_limit"] - stats["bytes_in_use"] for stats in known)
    return _free_host_bytes() // num_devices()


def _free_host_bytes() -> int:
    free = [psutil.virtual_memory().available]
    with contextlib.suppress(OSError, ValueError, StopIteration):  # "max" is no limit
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        lines = (group / "memory.stat").read_text().splitlines()
        cached = next(int(line.split()[1]) for line in lines if line.startswith("inactive_file"))
        free.append(limit - used + cached)
    return max(0, min(free))


def is_main_process() -> bool:
    """Whether this process writes the files that exist once: logs, rows, reports."""
    return process() == 0


def mean(tree: PyTree, axis_name: str | None) -> PyTree:
    """Mean of every leaf over the devices of `axis_name`; the tree itself when `axis_name` is None."""
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def total(tree: PyTree, axis_name: str | None) -> PyTree:
    """Sum of every leaf over the devices of `axis_name`; the tree itself when `axis_name` is None."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def data_parallel(
    function: Callable[..., Any],
    *,
    num_shared: int,
    num_split: int,
    devices: int | None = None,
    donate: tuple[int, ...] = (),
) -> Callable[..., Any]:
    """`function(*shared, *split)`, run on devices of all processes, each over its shard of what is split.

    Shared arguments have no device axis (replicate them once with `replicate`); split arguments come from
    `split`, with a leading axis [devices]. The results must be equal on all devices (combined by
    `mean` or `total` over `AXIS`) and carry no device axis either. Arguments numbered in `donate` are
    given up to the call. `devices` is their number in each process, here and below; None: all.
    """
    return jax.pmap(
        function,
        axis_name=AXIS,
        in_axes=(None,) * num_shared + (0,) * num_split,
        out_axes=None,
        donate_argnums=donate,
        # None: in the order that suits the interconnect.
        devices=None if devices in (None, jax.local_device_count()) else _of_all_processes(devices),
    )


def _of_all_processes(devices: int) -> list[jax.Device]:
    return [device for i in range(num_processes()) for device in jax.local_devices(i)[:devices]]


def map_parallel(
    function: Callable[..., Any], *, num_shared: int, num_split: int, devices: int | None = None
) -> Callable[..., Any]:
    """Like `data_parallel`, for independent work on this process's devices: split arguments come from
    `split_locally`, and results keep their leading axis [devices]."""
    in_axes = (None,) * num_shared + (0,) * num_split
    return jax.pmap(function, in_axes=in_axes, devices=jax.local_devices()[:devices])


def replicate(tree: PyTree, devices: int | None = None) -> PyTree:
    """Copies of every array on local devices, as arrays without a device axis."""
    mesh = jax.sharding.Mesh(np.array(jax.local_devices()[:devices]), (AXIS,))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.device_put(tree, everywhere)


def replicate_globally(tree: PyTree) -> PyTree:
    """Host arrays that are the same on all processes, as arrays on all devices of all processes, which is the
    form that Orbax writes from any process. None waits for another."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), (AXIS,))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, everywhere, lambda index: x[index]), tree
    )


def split(tree: PyTree, devices: int | None = None) -> PyTree:
    """This process's rows of a batch [N, ...], as [devices, N / devices of all processes, ...].

    Raises:
      ValueError: when the number of all processes' devices does not divide N.
    """
    processes = num_processes()
    _check_divisible(tree, processes * (devices or jax.local_device_count()))

    def own_rows(x):
        rows = x.shape[0] // processes
        return x[process() * rows :][:rows]

    return split_locally(tree if processes == 1 else jax.tree.map(own_rows, tree), devices)


def split_locally(tree: PyTree, devices: int | None = None) -> PyTree:
    """Reshapes [N, ...] to [devices, N / devices, ...]: independent work for this process's devices.

    Raises:
      ValueError: when the number of devices does not divide N.
    """
    devices = devices or jax.local_device_count()
    _check_divisible(tree, devices)
    return jax.tree.map(lambda x: x.reshape(devices, x.shape[0] // devices, *x.shape[1:]), tree)


def _check_divisible(tree: PyTree, devices: int) -> None:
    for x in jax.tree.leaves(tree):
        if x.shape[0] % devices:
            raise ValueError(
                f"a batch of {x.shape[0]} examples cannot be split evenly over {devices} devices: "
                f"use a multiple of {devices}"
            )


def join(tree: PyTree) -> PyTree:
    """The inverse of `split_locally`: [devices, M, ...] to [devices * M, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def pad(tree: PyTree, size: int) -> tuple[PyTree, Float32[np.ndarray, " size"]]:
    """Repeats the last example up to a leading axis of `size`; the mask [size] is 1.0 where one is real."""
    length = jax.tree.leaves(tree)[0].shape[0]
    mask = (np.arange(size) < length).astype(np.float32)
    if length == size:
        return tree, mask
    indices = np.minimum(np.arange(size), length - 1)
    return jax.tree.map(lambda x: jnp.take(x, indices, axis=0), tree), mask
