"""Images per second of the four steps that adversarial transfer is made of, ours beside PyTorch.

    python -m benchmarks.steps --platform=cpu --peer=torch

Per case (network, batch, resolution): the forward pass; one attack pass (loss and its gradient with
respect to the images, evaluation mode); a clean training step; a PGD-3 training step (ℓ2, attack in
evaluation mode). Training is SGD with momentum and weight decay. Both sides take the same weights
and images in one process, in turn; `ratio` is ours / peer in images per second, taken per turn:
median [quartiles]. The peer is eager PyTorch in channels_last with as many threads as there are
cores, no torch.compile. Run it on an idle machine: a busy core costs PyTorch's threads, which wait
for each other at every operation, far more than XLA's.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

EPS, STEP_SIZE, NUM_STEPS = 3.0, 1.0, 3
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


def our_steps(case: Case, images: np.ndarray, labels: np.ndarray, dtype: Any):
    """Step name -> a call that runs it once and waits; and the weights that all sides start from."""
    import jax
    import jax.numpy as jnp

    from advtransfer.attacks import L2, cross_entropy, pgd
    from advtransfer.data import Batch
    from advtransfer.models import create_module, init_variables
    from advtransfer.optim import sgd
    from advtransfer.train import init_state, make_train_step, module_apply

    module = create_module(case.architecture, num_classes=1000, dtype=dtype)
    variables = init_variables(module, jax.random.key(0))
    tx = sgd(LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    batch = Batch(jnp.asarray(images), jnp.asarray(labels), jax.random.split(jax.random.key(1), len(labels)))

    def attack(logits_fn, images, labels, key):
        return pgd(
            logits_fn,
            images,
            labels,
            L2(EPS),
            num_steps=NUM_STEPS,
            step_size=STEP_SIZE,
            use_best=False,
        )

    def loss_fn(images, variables, labels):
        return cross_entropy(module.apply(variables, images), labels).sum()

    def training(attack):
        step = jax.jit(make_train_step(module_apply(module), tx, attack=attack), donate_argnums=0)
        state = init_state(jax.tree.map(jnp.copy, variables), tx)

        def run():
            nonlocal state
            state, metrics = step(state, batch)
            jax.block_until_ready((state, metrics))

        return run

    forward, attack_pass = jax.jit(module.apply), jax.jit(jax.value_and_grad(loss_fn))
    steps = {
        "forward": lambda: jax.block_until_ready(forward(variables, batch.images)),
        "attack": lambda: jax.block_until_ready(attack_pass(batch.images, variables, batch.labels)),
        "clean": training(None),
        "pgd3": training(attack),
    }
    return steps, module, variables


def torch_steps(
    module: Any, variables: Any, images: np.ndarray, labels: np.ndarray
) -> dict[str, Callable[[], Any]]:
    """The same steps in PyTorch on the CPU."""
    import torch
    import torch.nn.functional as F

    from benchmarks.torch_resnet import make_twin

    torch.set_num_threads(os.cpu_count())
    x = torch.tensor(images).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    y = torch.tensor(labels, dtype=torch.int64)

    def make():
        model = make_twin(module, variables).to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(
            model.parameters(),
            LEARNING_RATE,
            momentum=MOMENTUM,
            weight_decay=WEIGHT_DECAY,
            foreach=True,
        )
        return model, optimizer

    def input_gradient(model, x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), [x])[0]

    def norm(d):
        return d.flatten(1).norm(dim=1).view(-1, 1, 1, 1)

    def attack(model):
        adversarial = x
        for _ in range(NUM_STEPS):
            gradient = input_gradient(model, adversarial)
            moved = adversarial + STEP_SIZE * gradient / (norm(gradient) + 1e-10)
            delta = moved - x
            delta = delta * (EPS / norm(delta).clamp_min(1e-12)).clamp_max(1.0)
            adversarial = (x + delta).clamp(0.0, 1.0)
        return adversarial

    evaluated = make()[0].eval()

    def forward():
        with torch.no_grad():
            return evaluated(x)

    def training(adversarial):
        model, optimizer = make()

        def run():
            inputs = attack(model.eval()) if adversarial else x
            model.train()
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(inputs), y).backward()
            optimizer.step()

        return run

    return {
        "forward": forward,
        "attack": lambda: input_gradient(evaluated, x),
        "clean": training(False),
        "pgd3": training(True),
    }


def seconds(run: Callable[[], Any], calls: int) -> float:
    """Seconds per call."""
    time.sleep(0.02)  # lets the other side's threads fall asleep
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - begin) / calls


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    return tuple(statistics.quantiles(values, n=4, method="inclusive"))


def measure(case: Case, sides: dict[str, dict[str, Callable]], step: str, repeats: int) -> str:
    """One row of the table."""
    calls = {}
    for side, steps in sides.items():
        steps[step]()
        calls[side] = max(1, round(0.2 / seconds(steps[step], 1)))
    times: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(repeats):
        for side in sorted(sides, reverse=turn % 2 == 1):
            times[side].append(seconds(sides[side][step], calls[side]))
    rate = {side: case.batch_size / statistics.median(t) for side, t in times.items()}
    cells = [case.architecture, f"{case.batch_size}×{case.image_size}²", step, f"{rate['ours']:.1f}"]
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
    parser.add_argument("--peer", default="torch", choices=("torch", "none"))
    parser.add_argument("--case", action="append", choices=tuple(CASES), help="default: all")
    parser.add_argument("--step", action="append", choices=STEPS, help="default: all")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--batch", type=int, default=None, help="instead of the case's own")
    arguments = parser.parse_args()
    if arguments.platform != "cpu" and arguments.peer != "none":
        parser.error("the peer runs on the CPU: add --peer=none")
    os.environ["JAX_PLATFORMS"] = {"gpu": "cuda"}.get(arguments.platform, arguments.platform)

    import jax
    import jax.numpy as jnp

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
        case = CASES[name]
        case = case._replace(batch_size=arguments.batch or case.batch_size)
        rng = np.random.default_rng(0)
        images = rng.random((case.batch_size, case.image_size, case.image_size, 3), np.float32)
        labels = rng.integers(0, 1000, case.batch_size, np.int32)
        ours, module, variables = our_steps(case, images, labels, dtype)
        sides = {"ours": ours}
        if arguments.peer == "torch":
            sides["peer"] = torch_steps(module, variables, images, labels)
        for step in arguments.step or STEPS:
            print(measure(case, sides, step, arguments.repeats), flush=True)


if __name__ == "__main__":
    main()
