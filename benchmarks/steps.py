"""Images per second of the four steps that adversarial transfer is made of, ours beside PyTorch.

    python -m benchmarks.steps --platform=cpu --peer=torch
    python -m benchmarks.steps --peer=one-device --devices=2 --step=clean --step=pgd3 --case=resnet18:64:32

Per case (network, batch, resolution): the forward pass; one attack pass (loss and its gradient with
respect to the images, evaluation mode); a clean training step; a PGD-3 training step (ℓ2, attack in
evaluation mode). Training is SGD with momentum and weight decay. Both sides take the same weights
and images in one process, in turn; `ratio` is ours / peer in images per second, taken per turn:
median [quartiles]. The peer is eager PyTorch in channels_last with as many threads as there are
cores, no torch.compile. Run it on an idle machine: a busy core costs PyTorch's threads, which wait
for each other at every operation, far more than XLA's. The second command compares ours on several
devices with ours on one.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

EPS, STEP_SIZE = 3.0, 1.0
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 1e-3, 0.9, 5e-4


class Case(NamedTuple):
    """What is timed: a network on a batch of square images."""

    architecture: str
    batch_size: int
    image_size: int


CASES = {
    "resnet50-32": Case("resnet50", 64, 32),
    "resnet50-224": Case("resnet50", 8, 224),
    "resnet18_cifar-32": Case("resnet18_cifar", 64, 32),
}
STEPS = ("forward", "attack", "clean", "pgd3")


class Step(NamedTuple):
    """A step that is ready to run."""

    run: Callable[[int], None]  # so many times, and waits
    compile_seconds: float = math.nan  # with the others at its side
    temporary_bytes: float = math.nan  # beside its arguments and results


def our_steps(
    case: Case,
    images: np.ndarray,
    labels: np.ndarray,
    dtype: Any,
    names: Sequence[str] = STEPS,
    devices: int = 0,
) -> tuple[dict[str, Step], Any, Any]:
    """The compiled steps by name, the network and the weights that all sides start from.

    On so many devices; 0: as many as source training and evaluation take.
    """
    import jax
    import jax.numpy as jnp

    from advtransfer import parallel
    from advtransfer.attacks import L2, cross_entropy, pgd
    from advtransfer.data import Batch
    from advtransfer.models import create_module, flops_per_weight, init_variables
    from advtransfer.optim import sgd
    from advtransfer.train import init_state, make_train_step, module_apply

    module = create_module(case.architecture, num_classes=1000, dtype=dtype)
    variables = init_variables(module, jax.random.key(0))
    tx = sgd(LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    batch = Batch(jnp.asarray(images), jnp.asarray(labels), jax.random.split(jax.random.key(1), len(labels)))

    def attack(num_steps, logits_fn, images, labels, key):
        return pgd(
            logits_fn,
            images,
            labels,
            L2(EPS),
            num_steps=num_steps,
            step_size=STEP_SIZE,
            use_best=False,
        )

    def loss_fn(variables, images, labels):
        logits: Any = module.apply(variables, images)
        return cross_entropy(logits, labels).sum()

    def build(function, *args):
        started = time.perf_counter()
        compiled = function.lower(*args).compile()
        memory = compiled.memory_analysis()
        return compiled, time.perf_counter() - started, getattr(memory, "temp_size_in_bytes", math.nan)

    def place(tree, count):
        put = parallel.map_parallel(lambda tree: tree, num_shared=0, num_split=1, devices=count)
        return put(parallel.split_locally(tree, count))

    def passes(function, *split):
        count = devices or parallel.choose_devices(case.batch_size)
        mapped = parallel.map_parallel(function, num_shared=1, num_split=len(split), devices=count)
        args = parallel.replicate(variables, count), *place(split, count)
        compiled, *costs = build(mapped, *args)

        def run(calls):
            for _ in range(calls):
                out = compiled(*args)
            jax.block_until_ready(out)

        return Step(run, *costs)

    def training(num_steps):
        attacked = functools.partial(attack, num_steps) if num_steps else None
        work = flops_per_weight(module, case.image_size)
        count = devices or parallel.choose_devices(case.batch_size, flops_per_weight=work)
        state = parallel.replicate(init_state(jax.tree.map(jnp.copy, variables), tx), count)
        apply = module_apply(module.clone(axis_name=parallel.AXIS))
        step = make_train_step(apply, tx, attack=attacked, axis_name=parallel.AXIS)
        step = parallel.data_parallel(step, num_shared=1, num_split=1, devices=count, donate=(0,))
        shards = place(batch, count)
        compiled, *costs = build(step, state, shards)

        def run(calls):
            nonlocal state
            for _ in range(calls):
                state, metrics = compiled(state, shards)
            jax.block_until_ready((state, metrics))

        return Step(run, *costs)

    def make(name):
        if name == "forward":
            return passes(module.apply, batch.images)
        if name == "attack":
            return passes(jax.value_and_grad(loss_fn, argnums=1), batch.images, batch.labels)
        return training(num_attack_steps(name))

    with ThreadPoolExecutor(len(names)) as threads:  # XLA compiles each on a core of its own
        steps = dict(zip(names, threads.map(make, names), strict=True))
    return steps, module, variables


def num_attack_steps(name: str) -> int:
    """Of a training step's name: "clean", "pgd3"."""
    return 0 if name == "clean" else int(name.removeprefix("pgd"))


def torch_steps(
    module: Any,
    variables: Any,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    device: str = "cpu",
    names: Sequence[str] = STEPS,
) -> dict[str, Step]:
    """The same steps in PyTorch: eager in float32 on "cpu"; on "cuda" in bfloat16 by autocast, compiled by
    `torch.compile`, with the fused SGD. Parameters ask for no gradient during the attack."""
    import torch
    import torch.nn.functional as F

    from benchmarks.torch_resnet import make_peer

    torch.set_num_threads(os.cpu_count())
    on_gpu = device == "cuda"
    torch.backends.cudnn.benchmark = True
    x = torch.tensor(images, device=device).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    y = torch.tensor(labels, dtype=torch.int64, device=device)

    def make():
        model = make_peer(module, variables).to(device=device, memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(
            model.parameters(),
            LEARNING_RATE,
            momentum=MOMENTUM,
            weight_decay=WEIGHT_DECAY,
            foreach=not on_gpu,
            fused=on_gpu,
        )
        return model, torch.compile(model) if on_gpu else model, optimizer

    def loss(network, x, reduction):
        with torch.autocast(device, torch.bfloat16, enabled=on_gpu):
            logits = network(x)
        return F.cross_entropy(logits.float(), y, reduction=reduction)

    def input_gradient(network, x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(loss(network, x, "sum"), [x])[0]

    def norm(d):
        return d.flatten(1).norm(dim=1).view(-1, 1, 1, 1)

    def attack(network, num_steps):
        adversarial = x
        for _ in range(num_steps):
            gradient = input_gradient(network, adversarial)
            moved = adversarial + STEP_SIZE * gradient / (norm(gradient) + 1e-10)
            delta = moved - x
            delta = delta * (EPS / norm(delta).clamp_min(1e-12)).clamp_max(1.0)
            adversarial = (x + delta).clamp(0.0, 1.0)
        return adversarial

    def forward(network):
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=on_gpu):
            return network(x)

    model, network, optimizer = make()
    measured, evaluated, _ = make()
    measured.eval().requires_grad_(False)

    def train(num_steps):
        inputs = x
        if num_steps:
            model.eval().requires_grad_(False)
            inputs = attack(network, num_steps)
            model.requires_grad_(True)
        model.train()
        optimizer.zero_grad(set_to_none=True)
        loss(network, inputs, "mean").backward()
        optimizer.step()

    def repeat(function, *args):
        def run(calls):
            for _ in range(calls):
                function(*args)
            if on_gpu:
                torch.cuda.synchronize()

        return Step(run)

    def make_step(name):
        if name == "forward":
            return repeat(forward, evaluated)
        if name == "attack":
            return repeat(input_gradient, evaluated, x)
        return repeat(train, num_attack_steps(name))

    return {name: make_step(name) for name in names}


def seconds(step: Step, calls: int) -> float:
    """Seconds per call."""
    time.sleep(0.02)  # lets the other side's threads fall asleep
    begin = time.perf_counter()
    step.run(calls)
    return (time.perf_counter() - begin) / calls


def alternate(steps: dict[str, Step], turns: int, *, least_seconds: float = 0.2) -> dict[str, list[float]]:
    """Seconds per call of each side, turn by turn in alternating order, after a warm-up."""
    calls = {}
    for side, step in steps.items():
        step.run(2)
        calls[side] = max(1, round(least_seconds / seconds(step, 1)))
    times: dict[str, list[float]] = {side: [] for side in steps}
    for turn in range(turns):
        for side in sorted(steps, reverse=turn % 2 == 1):
            times[side].append(seconds(steps[side], calls[side]))
    return times


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, median, third


def measure(case: Case, sides: dict[str, dict[str, Step]], name: str, turns: int) -> str:
    """One row of the table."""
    times = alternate({side: steps[name] for side, steps in sides.items()}, turns)
    rate = {side: case.batch_size / statistics.median(t) for side, t in times.items()}
    cells = [case.architecture, f"{case.batch_size}×{case.image_size}²", name, f"{rate['ours']:.1f}"]
    if "peer" in sides:
        low, middle, high = quartiles([b / a for a, b in zip(times["ours"], times["peer"], strict=True)])
        cells += [f"{rate['peer']:.1f}", f"{middle:.2f} [{low:.2f}, {high:.2f}]"]
    else:
        low, _, high = quartiles(times["ours"])
        cells += ["-", f"[{case.batch_size / high:.1f}, {case.batch_size / low:.1f}]"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--platform", default="cpu", choices=("cpu", "gpu", "tpu"))
    parser.add_argument("--peer", default="torch", choices=("torch", "one-device", "none"))
    known = ", ".join(CASES)
    parser.add_argument("--case", action="append", help=f"{known} or ARCHITECTURE:BATCH:SIZE; default: those")
    parser.add_argument("--devices", type=int, default=0, help="of ours; default: as the library chooses")
    parser.add_argument("--step", action="append", choices=STEPS, help="default: all")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--batch", type=int, default=None, help="instead of the case's own")
    arguments = parser.parse_args()
    if arguments.platform != "cpu" and arguments.peer == "torch":
        parser.error("the peer runs on the CPU: add --peer=none")
    os.environ["JAX_PLATFORMS"] = {"gpu": "cuda"}.get(arguments.platform, arguments.platform)

    import jax
    import jax.numpy as jnp

    from advtransfer import parallel

    parallel.one_device_per_core()

    dtype = jnp.float32 if arguments.platform == "cpu" else jnp.bfloat16
    versions = f"Python {platform.python_version()}, JAX {jax.__version__}"
    if arguments.peer == "torch":
        import torch

        versions += f", PyTorch {torch.__version__}"
    load = f"load {os.getloadavg()[0]:.1f} before the start"
    device = jax.devices()[0].device_kind
    print(f"{device}, {os.cpu_count()} cores, {versions}, {dtype.__name__}, {load}")
    print("| network | batch | step | ours, images/s | peer, images/s | ratio |")
    print("|---|---|---|---|---|---|")
    for name in arguments.case or CASES:
        architecture, *sizes = name.split(":")
        try:
            case = Case(architecture, *map(int, sizes)) if sizes else CASES[name]
        except (KeyError, TypeError, ValueError):
            parser.error(f"--case={name}: write {known} or ARCHITECTURE:BATCH:SIZE, such as resnet18:64:32")
        case = case._replace(batch_size=arguments.batch or case.batch_size)
        rng = np.random.default_rng(0)
        images = rng.random((case.batch_size, case.image_size, case.image_size, 3), np.float32)
        labels = rng.integers(0, 1000, case.batch_size, np.int32)
        names = arguments.step or STEPS
        ours, module, variables = our_steps(case, images, labels, dtype, names, arguments.devices)
        sides = {"ours": ours}
        if arguments.peer == "torch":
            sides["peer"] = torch_steps(module, variables, images, labels, names=names)
        elif arguments.peer == "one-device":
            sides["peer"] = our_steps(case, images, labels, dtype, names, 1)[0]
        for step in names:
            print(measure(case, sides, step, arguments.repeats), flush=True)


if __name__ == "__main__":
    main()
