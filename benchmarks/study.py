"""What a study costs by the engine, and one fine-tuning after another, as ratios taken turn by turn.

    python -m benchmarks.study [--parts=cache,heads,groups,streams,torch,engines] [--turns=7]

cache: a training step of ResNet-50's last k blocks from cached activations, against the same step that
  computes its frozen prefix; the bound is what the floating-point operations alone allow. At k = 0 a training
  of 150 epochs, the making of the cache included; the recomputing one is timed for 2 epochs and multiplied.
heads: trials of 150 epochs on n images, 2,048 features and 10 classes, time for each: a compiled one alone in
  feature space, alone in dual form, 20 seeds in one program, 20 rates on one subset.
groups: 8 seeds of ResNet-50's last k blocks in one program, in turn (lax.map) and side by side (vmap), there
  also with convolutions as matrix products (`ResNet.as_products`), against one compiled trial after another.
streams: 8 trials, one at a time and as many at the same time as there are cores, on both sides of the bound
  that the engine goes by.
torch: a process of PyTorch for every head (n = 400), against a head among 20 seeds, and among 20 rates.
engines: 2,000 trials of `resnet_tiny` in 100 groups, with programs kept from a run before, by a new process
  and by one that gives them to the Ray cluster of this machine, a worker a core (before: `ray start --head`).

`ratio` is the first way's time over each way's: median [quartiles] over the turns.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from advtransfer import parallel
from advtransfer.compilation import keep_programs
from advtransfer.data import Dataset, Split
from advtransfer.models import Model, ModelSpec, block_flops, create_module, identity, init_variables
from advtransfer.source import compute_dtype
from advtransfer.study import Grid, Source, Start, connect, make_cells, run_cells, run_here, run_on
from advtransfer.transfer import (
    Prepared,
    Rates,
    Recipe,
    activation_shape,
    dual,
    fine_tune_many,
    prepare,
    tuning,
)
from advtransfer.transfer.program import Task, make_fine_tune

CLASSES, FEATURES, POOL, SMALL_TRIALS = 10, 2048, 3200, 2000
RATES = Rates(0.01, 5e-4)

TORCH_HEAD = """
import sys, numpy as np, torch
data = np.load(sys.argv[1])
x, y = torch.tensor(data["x"]), torch.tensor(data["y"]).long()
head = torch.nn.Linear(x.shape[1], 10)
optimizer = torch.optim.SGD(head.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
for epoch in range(150):
    order = torch.randperm(len(x))
    for i in range(0, len(x), 128):
        chosen = order[i : i + 128]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(head(x[chosen]), y[chosen]).backward()
        optimizer.step()
"""


class Way(NamedTuple):
    """One way to do the same work."""

    name: str
    run: Callable[[], Any]
    trials: float = 1  # that one call does


Row = tuple[str, dict[str, Any]]  # what was measured, and the figures by name


def compare(case: str, ways: list[Way], turns: int) -> Iterator[Row]:
    """Each way's time for a trial, and the first way's over it: median [quartiles]."""
    for way in ways:
        jax.block_until_ready(way.run())
    times = np.empty((len(ways), turns))
    for turn in range(turns):
        for i, way in enumerate(ways):
            started = time.perf_counter()
            jax.block_until_ready(way.run())
            times[i, turn] = (time.perf_counter() - started) / way.trials
    for way, found in zip(ways, times, strict=True):
        low, ratio, high = np.quantile(times[0] / found, [0.25, 0.5, 0.75])
        milliseconds = float(np.median(found)) * 1e3
        yield f"{case}: {way.name}", {"ms": milliseconds, "ratio": f"{ratio:.2f} [{low:.2f}, {high:.2f}]"}


def rate_grid() -> Rates:
    return Rates(jnp.linspace(0.005, 0.02, 20), jnp.full(20, 5e-4))


@functools.cache
def network() -> tuple[Any, tuple[Any, Any]]:
    module = create_module("resnet50", num_classes=CLASSES, dtype=compute_dtype("auto"))
    variables = init_variables(module, jax.random.key(0))
    return module, (variables["params"], variables["batch_stats"])


def make_task(
    shape: tuple[int, ...], num_images: int, *, images: bool = False, dtype: Any = np.float32
) -> Task:
    """Random images or activations of so many, and one to test on."""
    rng = np.random.default_rng(0)
    if images:
        inputs = rng.integers(0, 256, (num_images, *shape)).astype(np.uint8)
    else:
        inputs = np.maximum(rng.normal(size=(num_images, *shape)), 0).astype(dtype) / 2
    labels = rng.integers(0, CLASSES, num_images).astype(np.int32)
    return Task(*(jnp.asarray(x) for x in (inputs, labels, inputs[:1], labels[:1])))


def make_trial(recipe: Recipe, k: int, *, in_dual: bool = True, as_products: bool = False) -> Callable:
    """(task, indices, key, rates) -> (trained head, history)."""
    module, variables = network()
    run = make_fine_tune(module.clone(as_products=as_products), recipe, k)

    def trial(*args):
        with mock.patch.object(dual, "is_cheaper", lambda *_: in_dual):
            tuned, history = run(*variables, *args)
        return tuned["params"]["fc"], history

    return trial


def train_all(recipe: Recipe, k: int, task: Task) -> Callable[[], Any]:
    """A compiled training on all of the task's images."""
    trial = jax.jit(make_trial(recipe, k))
    return lambda: trial(task, np.arange(len(task.train_labels)), jax.random.key(0), RATES)


def cache(turns: int, size: int, batch_size: int, ks: tuple[int, ...] = (1, 3, 9)) -> Iterator[Row]:
    module, _ = network()
    flops = block_flops(module, size)
    recipe = Recipe(num_epochs=2, evaluate_epochs=(2,), batch_size=batch_size)
    images = make_task((size, size, 3), 2 * batch_size, images=True)
    for k in ks:
        start = module.num_blocks - k
        entering = make_entering(k, size, 2 * batch_size)
        bound = 1 + sum(flops[: start + 1]) / (3 * sum(flops[start + 1 :]))
        # Evaluation takes one image, of 4 batches.
        ways = [
            Way("recomputed", train_all(recipe, k, images), 4),
            Way("cached", train_all(recipe, k, entering), 4),
        ]
        yield from compare(f"step, k = {k}, bound {bound:.2f}", ways, turns)
    yield from whole_training(recipe, images, turns)


def whole_training(recipe: Recipe, images: Task, turns: int) -> Iterator[Row]:
    module, (params, batch_stats) = network()
    enter = jax.jit(
        lambda x: module.apply({"params": params, "batch_stats": batch_stats}, x, stop=module.num_blocks)
    )
    pixels = np.split(np.float32(images.train_inputs) / 255, 2)
    train = train_all(
        replace(recipe, num_epochs=150, evaluate_epochs=(150,)),
        0,
        make_task((FEATURES,), 2 * recipe.batch_size),
    )

    def cached():
        jax.block_until_ready([enter(batch) for batch in pixels])
        return train()

    ways = [
        Way("recomputed", train_all(recipe, 0, images), recipe.num_epochs / 150),
        Way("cached, making included", cached),
    ]
    yield from compare("150 epochs, k = 0", ways, turns)


class Heads(NamedTuple):
    """20 trials on features, in every way."""

    alone: Callable
    alone_in_dual: Callable
    seeds: Callable
    rates: Callable


def make_heads(n: int) -> tuple[Task, Heads]:
    task, recipe = make_task((FEATURES,), POOL), Recipe(batch_size=min(n, 128))
    module, (params, batch_stats) = network()
    keys = jax.random.split(jax.random.key(1), 20)
    subsets = np.stack([jax.random.permutation(key, POOL)[:n] for key in keys])
    primal, in_dual = (make_trial(recipe, 0, in_dual=form) for form in (False, True))
    alone, alone_in_dual = jax.jit(primal), jax.jit(in_dual)
    one = (task, subsets[0], keys[0], RATES)
    spec = ModelSpec("resnet50", CLASSES, 224, module.mean, module.std)
    unused = Split(np.zeros((POOL, 1, 1, 3), np.uint8), np.zeros(POOL, np.int32))  # for what is prepared
    engine = functools.partial(
        fine_tune_many,
        Model(module, {"params": params, "batch_stats": batch_stats}, spec),
        unused,
        unused,
        num_classes=CLASSES,
        recipe=recipe,
        prepared=Prepared(batch_stats, task),
    )
    return task, Heads(
        alone=lambda: alone(*one),
        alone_in_dual=lambda: alone_in_dual(*one),
        seeds=lambda: engine(subsets=subsets, keys=keys),
        rates=lambda: engine(subsets=subsets[:1], keys=keys[:1], rates=rate_grid()),
    )


def heads(turns: int, sizes: tuple[int, ...] = (100, 400, 1600)) -> Iterator[Row]:
    for n in sizes:
        _, ways = make_heads(n)
        named = [
            Way("alone, feature space", ways.alone),
            Way("alone, dual", ways.alone_in_dual),
            Way("20 seeds", ways.seeds, 20),
            Way("20 rates on one subset", ways.rates, 20),
        ]
        yield from compare(f"head, n = {n}", named, turns)


def groups(
    turns: int, size: int, batch_size: int, trials: int = 8, ks: tuple[int, ...] = (1, 3)
) -> Iterator[Row]:
    keys = jax.random.split(jax.random.key(1), trials)
    for k in ks:
        task = make_entering(k, size, 4 * batch_size)
        recipe = Recipe(num_epochs=1, evaluate_epochs=(1,), batch_size=batch_size)
        trial, other = (
            functools.partial(last_metrics, make_trial(recipe, k, as_products=form)) for form in (False, True)
        )
        alone = jax.jit(trial)
        beside, products = (jax.jit(jax.vmap(form, in_axes=(None, 0))) for form in (trial, other))
        in_turn = jax.jit(lambda task, keys, trial=trial: jax.lax.map(lambda key: trial(task, key), keys))
        ways = [
            Way("one after another", lambda f=alone, x=task: [f(x, key) for key in keys], trials),
            Way("in turn (lax.map)", functools.partial(in_turn, task, keys), trials),
            Way("side by side (vmap)", functools.partial(beside, task, keys), trials),
            Way("side by side, as products", functools.partial(products, task, keys), trials),
        ]
        yield from compare(f"k = {k}, {size}², batch {batch_size}", ways, turns)


def make_entering(k: int, size: int, num_images: int) -> Task:
    """Random activations that enter the first of the last k blocks."""
    module, _ = network()
    entering = activation_shape(module, module.num_blocks - k, size)
    return make_task(entering.shape[1:], num_images, dtype=entering.dtype)


def last_metrics(run: Callable, task: Task, key: jax.Array) -> Any:
    return run(task, jnp.arange(len(task.train_labels)), key, RATES)[1]


def streams(turns: int, trials: int = 8) -> Iterator[Row]:
    rng = np.random.default_rng(0)
    for architecture, size, k, n in (
        ("resnet_tiny", 16, 1, 100),
        ("resnet_tiny", 16, 1, 400),
        ("resnet_tiny", 16, -1, 100),
        ("resnet18", 32, 1, 128),
        ("resnet18", 32, 3, 128),
    ):
        module = create_module(architecture, num_classes=CLASSES)
        spec = ModelSpec(architecture, CLASSES, size, module.mean, module.std)
        model = Model(module, init_variables(module, jax.random.key(0), size), spec)
        data = Split(rng.integers(0, 256, (n, size, size, 3)).astype(np.uint8), rng.integers(0, CLASSES, n))
        recipe = Recipe(num_epochs=20, evaluate_epochs=(20,), batch_size=min(n, 128))
        run = functools.partial(
            fine_tune_many,
            model,
            data,
            data,
            subsets=np.tile(np.arange(n), (trials, 1)),
            keys=jax.random.split(jax.random.key(1), trials),
            num_classes=CLASSES,
            num_unfrozen_blocks=k,
            recipe=recipe,
            prepared=prepare(model, data, data, recipe, k),
        )

        def ways(number, run=run):
            with mock.patch.object(tuning, "num_streams", lambda *_, **__: number):
                return run()

        named = [
            Way("one at a time", functools.partial(ways, 1), trials),
            Way("at the same time", functools.partial(ways, parallel.cores_per_device()), trials),
        ]
        engine = "same time" if tuning.num_streams(module, k, size, cached=k >= 0) > 1 else "one"
        yield from compare(f"{architecture} {size}², k = {k}, n = {n} ({engine})", named, turns)


def engines(turns: int) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as programs:
        command = [sys.executable, "-c", "from benchmarks import study; study.small_trials()", programs]
        ways = [
            Way(name, functools.partial(subprocess.run, [*command, *where], check=True), SMALL_TRIALS)
            for name, where in (("here", []), ("on Ray", ["auto"]))
        ]
        # `compare` would wait for what a process returns.
        named = [way._replace(run=lambda run=way.run: run().returncode) for way in ways]
        yield from compare(f"a trial of {SMALL_TRIALS:,}", named, turns)


def small_trials() -> None:
    """What each process of `engines` does: programs are kept in the folder of the first argument; the second
    is the address of a cluster."""
    programs, *address = sys.argv[1:]
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (400, 8, 8, 3)).astype(np.uint8), rng.integers(0, CLASSES, 400)
    split = Split(images, labels.astype(np.int32))
    dataset = Dataset("random", tuple(map(str, range(CLASSES))), split, split, split)
    module = create_module("resnet_tiny", num_classes=CLASSES)
    variables = jax.device_get(init_variables(module, jax.random.key(0), 8))
    model = Model(module, variables, ModelSpec("resnet_tiny", CLASSES, 8, module.mean, module.std))
    sizes = tuple(range(20, 40, 2))
    grid = Grid(num_train_images=sizes, num_unfrozen_blocks=(0, 1), num_seeds=SMALL_TRIALS // 20)
    cells = make_cells(grid, ["natural"], ["random"])
    start = Start(Source("natural", "none", 0.0, identity(model)), model, dataset)
    recipe = Recipe(num_epochs=100, evaluate_epochs=(100,), learning_rate=0.01)
    keep_programs(Path(programs))
    with tempfile.TemporaryDirectory() as folder:
        run = functools.partial(run_cells, grid, recipe, cells, lambda *_: start, folder, group_size=20)
        if address:
            with connect(*address, device="core", programs=Path(programs)) as cluster:
                run(engine=run_on(cluster))
        else:
            run(engine=run_here)


def torch(turns: int) -> Iterator[Row]:
    task, ways = make_heads(400)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "head.npz")
        np.savez(path, x=np.asarray(task.train_inputs[:400]), y=np.asarray(task.train_labels[:400]))
        command = [sys.executable, "-c", TORCH_HEAD, path]
        named = [
            Way("a PyTorch process", lambda: subprocess.run(command, check=True).returncode),
            Way("20 seeds", ways.seeds, 20),
            Way("20 rates on one subset", ways.rates, 20),
        ]
        yield from compare("head, n = 400", named, turns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--parts", default="cache,heads,groups,streams")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args()
    parallel.one_device_per_core()
    device = jax.devices()[0].device_kind
    print(
        f"{device} ({os.cpu_count()} cores, {platform.machine()}), JAX {jax.__version__}, {args.turns} turns"
    )
    shape = {"size": args.image_size, "batch_size": args.batch_size}
    parts = {
        "cache": (cache, shape),
        "heads": (heads, {}),
        "groups": (groups, shape),
        "streams": (streams, {}),
        "torch": (torch, {}),
        "engines": (engines, {}),
    }
    for name in args.parts.split(","):
        part, options = parts[name]
        for what, figures in part(args.turns, **options):
            print(f"{what:60} {figures['ms']:9.2f} ms  {figures['ratio']}", flush=True)


if __name__ == "__main__":
    main()
