"""Bytes that training steps move on a GPU, read off the programs that XLA makes for one. No GPU is needed.

    pip install jax-cuda13-plugin jax-cuda13-pjrt   # of the version that jax has
    python -m benchmarks.traffic --case=resnet50:256:224 --steps=forward,attack,clean,pgd3

The steps are those of benchmarks.steps, compiled in bfloat16 for an H100 that is described, not present, so
nothing is autotuned. GB are the sizes of all operands and results of the kernels, as if no cache held any.
"with ReLU" counts the convolutions that write what bias, residual and ReLU make of their sums.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from advtransfer.attacks import L2, cross_entropy, pgd
from advtransfer.data import Batch
from advtransfer.models import create_module, init_variables
from advtransfer.optim import sgd
from advtransfer.train import init_state, make_train_step, module_apply
from benchmarks.steps import EPS, LEARNING_RATE, MOMENTUM, STEP_SIZE, WEIGHT_DECAY, Case, num_attack_steps

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84978434048
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 1 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
KINDS = {"convolutions": "cudnn", "reductions": "reduce", "the rest": ""}  # by what a kernel's name holds
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "s64": 8, "u64": 8}


class Kernel(NamedTuple):
    name: str
    bytes: int


@functools.cache
def gpu() -> SingleDeviceSharding:
    """The described GPU, as a place of arguments."""
    topology = topologies.get_topology_desc("H100", "cuda", target_config=H100, topology="1x1x1")
    return SingleDeviceSharding(topology.devices[0])


def lower(function: Callable[..., Any], *args: Any) -> Any:
    """`function` lowered for the GPU, of arguments that are arrays or their shapes."""

    def there(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=gpu())

    with mock.patch.object(jax, "default_backend", lambda: "gpu"):
        return jax.jit(function).lower(*jax.tree.map(there, args))


def lower_step(case: Case, name: str) -> Any:
    """A step of benchmarks.steps."""
    module = create_module(case.architecture, dtype=jnp.bfloat16)
    variables = jax.eval_shape(lambda key: init_variables(module, key), jax.random.key(0))
    images = jax.ShapeDtypeStruct((case.batch_size, case.image_size, case.image_size, 3), jnp.float32)
    labels = jax.ShapeDtypeStruct((case.batch_size,), jnp.int32)
    if name == "forward":
        return lower(module.apply, variables, images)

    def loss(images, variables, labels):
        logits: Any = module.apply(variables, images)
        return cross_entropy(logits, labels).sum()

    if name == "attack":
        return lower(jax.value_and_grad(loss), images, variables, labels)
    num_steps = num_attack_steps(name)
    attack = functools.partial(
        pgd, threat_model=L2(EPS), num_steps=num_steps, step_size=STEP_SIZE, use_best=False
    )
    tx = sgd(LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    step = make_train_step(module_apply(module), tx, attack=attack if num_steps else None)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), case.batch_size))
    state = jax.eval_shape(lambda variables: init_state(variables, tx), variables)
    return lower(step, state, jax.eval_shape(Batch, images, labels, keys))


def kernels(program: str) -> Iterator[Kernel]:
    """Those that a compiled program calls, from its text."""
    sizes: dict[str, int] = {}
    for line in program[program.index("\nENTRY") :].splitlines()[1:]:
        found = re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)", line)
        if not found:
            continue
        name, shape, operation, rest = found.groups()
        sizes[name] = _size(shape)
        if operation in ("parameter", "get-tuple-element", "tuple", "bitcast", "constant"):
            continue
        arguments = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
        if name.startswith("loop_slice_fusion"):  # reads what it writes
            arguments = [name]
        target = re.search(r'custom_call_target="([^"]+)"', line)
        yield Kernel(target[1] if target else name, sizes[name] + sum(sizes[x] for x in arguments))


def _size(shape: str) -> int:
    total = 0
    for dtype, sides in re.findall(r"(\w+)\[([\d,]*)\]", shape):
        size = _BYTES.get(dtype, 0)
        for side in filter(None, sides.split(",")):
            size *= int(side)
        total += size
    return total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", default="resnet50:256:224", help="ARCHITECTURE:BATCH:SIZE")
    parser.add_argument("--steps", default="forward,attack,clean,pgd3", help="also pgd1, pgd2")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
    architecture, *sizes = args.case.split(":")
    case = Case(architecture, *map(int, sizes))
    print(f"JAX {jax.__version__}, {case.architecture} {case.image_size}², batch {case.batch_size}")
    columns = ["step", "GB", *KINDS, "with ReLU", "temporary GB"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name in args.steps.split(","):
        compiled = lower_step(case, name).compile()
        program = compiled.as_text()
        found = dict.fromkeys(KINDS, 0)
        for kernel in kernels(program):
            kind = next(kind for kind, part in KINDS.items() if part in kernel.name)
            found[kind] += kernel.bytes
        with_relu = program.count('"activation_mode":"kRelu"')
        temporary = compiled.memory_analysis().temp_size_in_bytes
        cells = [sum(found.values()), *found.values()]
        shown = " | ".join(f"{cell / 1e9:.1f}" for cell in cells)
        print(f"| {name} | {shown} | {with_relu} | {temporary / 1e9:.1f} |", flush=True)


if __name__ == "__main__":
    main()
