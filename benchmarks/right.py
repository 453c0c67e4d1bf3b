"""Whether an accelerator computes what it should, against float64, the CPU and itself.

    python -m benchmarks.accelerator --sections=right

Each check gives a row of `benchmarks.accelerator`: what was compared, the difference, and the most that it
may be. Networks have random weights, and BatchNorm statistics of the images that they are shown.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import advtransfer.transfer.activation_cache as caching
from advtransfer import parallel
from advtransfer.attacks import L2, Linf, cross_entropy, pgd
from advtransfer.checkpoint import Checkpoints
from advtransfer.data import Batch, Split
from advtransfer.models import Model, ModelSpec, create_module, init_variables, logits_fn, resnet
from advtransfer.optim import sgd
from advtransfer.train import init_state, make_train_step, module_apply
from advtransfer.transfer import Recipe, fine_tune_many

CLASSES = 10
NUM_ATTACK_STEPS = 20


class Check(NamedTuple):
    """A difference, and the largest that is right."""

    what: str
    found: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.found <= self.bound  # NaN does not pass


def make_network(architecture: str, size: int, batch: int) -> tuple[Any, Any, np.ndarray, np.ndarray]:
    """A float32 module, its variables on the host, and images [batch, size, size, 3] with labels."""
    rng = np.random.default_rng(0)
    coarse = rng.random((batch, 4, 4, 3), np.float32)
    fine = rng.normal(0, 0.05, (batch, size, size, 3)).astype(np.float32)
    images = np.clip(coarse.repeat(size // 4, 1).repeat(size // 4, 2) + fine, 0, 1)
    module = create_module(architecture, num_classes=CLASSES)
    variables = init_variables(module, jax.random.key(0), size)
    for name in module.block_names:
        # Small residual branches, as a trained network has: with full ones depth alone multiplies an error of
        # rounding by thousands.
        last = variables["params"][name]["bn3" if module.bottleneck else "bn2"]
        last["scale"] = 0.25 * last["scale"]
    with jax.default_matmul_precision("highest"):
        _, changed = jax.jit(
            functools.partial(module.clone(momentum=0.0).apply, train=True, mutable=["batch_stats"])
        )(variables, images)
    labels = rng.integers(0, CLASSES, batch).astype(np.int32)
    return module, jax.device_get({**variables, **changed}), images, labels


def silu(x: jax.Array, train: bool) -> jax.Array:
    return nn.silu(x)


def ours(module: Any, variables: Any, images: np.ndarray, labels: np.ndarray, precision: str | None):
    """Logits, and the gradient of the summed cross-entropy to the images; SiLU stands for ReLU."""

    def loss(images, variables):
        logits = module.apply(variables, images)
        return cross_entropy(logits, labels).sum(), logits

    with jax.default_matmul_precision(precision), mock.patch.object(resnet, "relu", silu):
        (_, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(images, variables)
    return np.float64(logits), np.float64(gradient)


def theirs(module: Any, variables: Any, images: np.ndarray, labels: np.ndarray, device: str, bfloat16: bool):
    """The same by PyTorch, in float64 or under autocast to bfloat16."""
    import torch
    import torch.nn.functional as F

    from benchmarks.torch_resnet import make_peer

    dtype = torch.float32 if bfloat16 else torch.float64
    network = make_peer(module, variables).to(device, dtype).eval().requires_grad_(False)
    for part in network.modules():
        if hasattr(part, "relu"):
            part.relu = torch.nn.SiLU()
    x = torch.tensor(images, dtype=dtype, device=device).permute(0, 3, 1, 2).contiguous().requires_grad_()
    with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
        logits = network(x)
    loss = F.cross_entropy(logits.to(dtype), torch.tensor(labels, device=device).long(), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, [x])
    return logits.detach().double().cpu().numpy(), gradient.permute(0, 2, 3, 1).double().cpu().numpy()


def _error(found: np.ndarray, truth: np.ndarray) -> float:
    """The largest difference, as a share of the largest entry."""
    return float(np.max(np.abs(found - truth)) / np.max(np.abs(truth)))


def check_precision(architecture: str, size: int, batch: int, *, peer: bool) -> Iterator[Check]:
    """Logits and input gradients, against float64 on the CPU.

    With SiLU in place of ReLU, whose gradient jumps: of millions of units some lie so near 0 that rounding
    moves them across, and one is enough to change a pixel's gradient by a percent.
    """
    module, *rest = network = make_network(architecture, size, batch)
    gpu = "cuda" if parallel.platform() == "gpu" else "cpu"
    if peer:
        truth, reference = theirs(*network, "cpu", bfloat16=False), "float64"
    else:
        with jax.default_device(jax.devices("cpu")[0]):
            truth, reference = ours(*network, "highest"), "float32 on the CPU"
    exact = ours(*network, "highest")
    default = ours(*network, None)
    half = ours(module.clone(dtype=jnp.bfloat16), *rest, None)
    half_theirs = theirs(*network, gpu, bfloat16=True) if peer else None
    for i, what in enumerate(("logits", "input gradients")):
        name = f"{architecture} {size}² with SiLU, {what}"
        yield Check(
            f"{name}: float32 at highest precision, from {reference}", _error(exact[i], truth[i]), 1e-5
        )
        yield Check(f"{name}: float32 as by default, from {reference}", _error(default[i], truth[i]), np.inf)
        bound = 1.5 * _error(half_theirs[i], truth[i]) if half_theirs else np.inf
        yield Check(f"{name}: bfloat16, at most 1.5 of PyTorch's", _error(half[i], truth[i]), bound)


def check_attacks(architecture: str, size: int, batch: int) -> Iterator[Check]:
    """PGD of 20 steps, against the CPU: the mean loss reached, and the share of images fooled."""
    module, variables, images, _ = make_network(architecture, size, batch)
    model = Model(module, variables, ModelSpec(architecture, CLASSES, size, module.mean, module.std))
    cpu = jax.devices("cpu")[0]

    @jax.jit
    def attack(network, images, labels, threat_model):
        moved = pgd(
            network,
            images,
            labels,
            threat_model,
            num_steps=NUM_ATTACK_STEPS,
            step_size=2.5 / NUM_ATTACK_STEPS * threat_model.eps,
        )
        logits = network(moved)
        return cross_entropy(logits, labels).mean(), jnp.mean(jnp.argmax(logits, -1) != labels)

    with jax.default_matmul_precision("highest"):
        network = jax.device_put(logits_fn(model), jax.local_devices()[0])
        labels = np.asarray(jnp.argmax(network(images), -1).astype(jnp.int32))
        for norm, radii in ((L2, (0.01, 0.03, 0.1, 0.3, 1.0)), (Linf, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2))):
            for eps in radii:  # one that fools some images and leaves others
                loss, fooled = map(float, attack(network, images, labels, norm(jnp.float32(eps))))
                if fooled > 0.4:
                    break
            known = attack(*jax.device_put((network, images, labels, norm(jnp.float32(eps))), cpu))
            known_loss, known_fooled = map(float, known)
            name = f"{architecture}, {norm.__name__} {eps}, PGD-{NUM_ATTACK_STEPS}, {fooled:.0%} fooled"
            yield Check(f"{name}: mean loss from the CPU's", abs(loss / known_loss - 1), 1e-3)
            yield Check(f"{name}: share fooled from the CPU's", abs(fooled - known_fooled), 0.01)


def _training(architecture: str, size: int, batch: int, dtype: Any, axis_name: str | None):
    """A PGD-1 training step, its first state and a batch."""
    module, variables, images, labels = make_network(architecture, size, batch)
    tx = sgd(0.01, momentum=0.9, weight_decay=5e-4)
    attack = functools.partial(pgd, threat_model=L2(0.5), num_steps=1, step_size=0.5, use_best=False)
    apply = module_apply(module.clone(dtype=dtype, axis_name=axis_name))
    step = make_train_step(apply, tx, attack=attack, axis_name=axis_name)
    data = Batch(jnp.asarray(images), jnp.asarray(labels), jax.random.split(jax.random.key(1), batch))
    return step, init_state(jax.tree.map(jnp.asarray, variables), tx), data


def check_pmap(architecture: str, size: int, batch: int) -> Iterator[Check]:
    """A training step mapped over the devices, against the same step jitted on one."""
    devices = parallel.choose_devices(batch)
    with jax.default_matmul_precision("highest"):
        step, state, data = _training(architecture, size, batch, jnp.float32, None)
        alone = jax.jit(step)(state, data)[0]
        step, _, _ = _training(architecture, size, batch, jnp.float32, parallel.AXIS)
        mapped = parallel.data_parallel(step, num_shared=1, num_split=1, devices=devices)
        together = mapped(parallel.replicate(state, devices), parallel.split(data, devices))[0]
    moved, difference = (
        max(
            np.max(np.abs(np.asarray(x) - y))
            for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        )
        for a, b in ((alone.params, state.params), (together.params, alone.params))
    )
    yield Check(
        f"{architecture}, one step under pmap on {devices} device(s) from jit, of the largest update",
        difference / moved,
        1e-3,
    )


def check_cache(architecture: str, size: int, n: int) -> Iterator[Check]:
    """A fine-tuning from cached activations, against the same one that computes its frozen blocks."""
    module, variables, images, labels = make_network(architecture, size, n)
    model = Model(module, variables, ModelSpec(architecture, CLASSES, size, module.mean, module.std))
    data = Split((images * 255).astype(np.uint8), labels)
    recipe = Recipe(num_epochs=3, evaluate_epochs=(3,), batch_size=n // 2, learning_rate=0.01)
    for k in (0, 1, 3):
        run = functools.partial(
            fine_tune_many,
            model,
            data,
            data,
            subsets=np.arange(n)[None],
            keys=jax.random.split(jax.random.key(0), 1),
            num_classes=CLASSES,
            num_unfrozen_blocks=k,
            recipe=recipe,
        )
        with jax.default_matmul_precision("highest"):
            cached = run()
            with mock.patch.object(caching, "is_cached", lambda *_: False):
                computed = run()
        found = abs(float(cached["test_loss"][0, 0] / computed["test_loss"][0, 0]) - 1)
        yield Check(f"{architecture}, k = {k}, 3 epochs: loss with a cache from without", found, 1e-3)


def check_resume(architecture: str, size: int, batch: int) -> Iterator[Check]:
    """A training that goes on from its checkpoint against one that never stopped, to the bit, in a process of
    its own, whose operations are deterministic."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true"
    arguments = [architecture, str(size), str(batch)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.right", *arguments],
        env=os.environ | {"XLA_FLAGS": flags, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = float(done.stdout.split()[-1])
    yield Check(f"{architecture}, 6 steps, resumed after 3: largest difference", found, 0.0)


def _resume(architecture: str, size: int, batch: int) -> float:
    step, state, data = _training(architecture, size, batch, jnp.bfloat16, None)
    step = jax.jit(step)
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(3):
            state, _ = step(state, data)
        checkpoints = Checkpoints(f"{folder}/checkpoints", keep=1)
        checkpoints.save(3, state)
        resumed = jax.tree.map(jnp.asarray, checkpoints.restore(state))
    for _ in range(3):
        state, _ = step(state, data)
        resumed, _ = step(resumed, data)
    pairs = zip(*(jax.tree.leaves(jax.device_get(x)) for x in (state, resumed)), strict=True)
    return max(float(np.max(np.abs(np.float64(x) - np.float64(y)))) for x, y in pairs)


def checks(*, tiny: bool, peer: bool) -> list[Callable[[], Iterator[Check]]]:
    """All of them, ready to run; `tiny` for a CPU."""
    small = ("resnet_tiny", 16) if tiny else ("resnet18_cifar", 32)
    large = ("resnet18_cifar", 16) if tiny else ("resnet50", 224)
    batch = 16 if tiny else 64
    return [
        functools.partial(check_precision, *large, batch // 8, peer=peer),
        functools.partial(check_precision, *small, batch, peer=peer),
        functools.partial(check_attacks, *small, batch),
        functools.partial(check_pmap, *small, batch),
        functools.partial(check_cache, *small, 2 * batch),
        functools.partial(check_resume, *small, batch),
    ]


if __name__ == "__main__":
    print(_resume(sys.argv[1], *map(int, sys.argv[2:])))
