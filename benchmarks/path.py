"""The paper's path on one accelerator: sources on CIFAR-10, each trained for so many seconds, and what they
transfer to few images of MNIST.

    python -m benchmarks.accelerator --sections=path --data=runs/subsets

Trains a ResNet-18 (CIFAR stem) naturally and against ℓ2 PGD-3 of radius 0.25, 0.5 and 1, measures it on
test images, and fine-tunes from n images at k = 0, 1, 3, over 20 subsets each, which all sources share. The
lead is the robust source's accuracy minus the natural one's, paired by subset, with a 95 % interval of
Student's t over subsets. The sources are one each: what another training would give is not in it.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from advtransfer.attacks import L2, make_attack, pgd
from advtransfer.data import (
    Augmentation,
    Batch,
    Dataset,
    Split,
    augment,
    load_dataset,
    subset_indices,
    to_float,
)
from advtransfer.evaluate import evaluate
from advtransfer.models import Model, ModelSpec, create_module, init_variables
from advtransfer.optim import sgd
from advtransfer.train import init_state, make_train_step, module_apply
from advtransfer.transfer import Recipe, fine_tune_many, prepare

EPS = (0.0, 0.25, 0.5, 1.0)  # 0: natural
DEPTHS = (0, 1, 3)
SIZES = (20, 80, 320, 1280, 3200)
SEEDS = 20
ATTACK_STEPS, PEAK_RATE, WEIGHT_DECAY = 3, 0.2, 5e-4
EVALUATION_EPS = 0.25


class Setting(NamedTuple):
    """What is trained on what."""

    architecture: str
    source: Dataset
    target: Dataset
    size: int
    batch_size: int
    dtype: Any
    seconds: float  # of training for each source
    sizes: tuple[int, ...]
    num_epochs: int  # of a fine-tuning
    num_measured: int  # test images


def setting(data: str | None, *, tiny: bool, dtype: Any, seconds: float) -> Setting:
    """CIFAR-10 to MNIST out of the folder `data`, or letters to digits."""
    names, size = ("builtin:glyphs", "builtin:digits"), 16
    if data:
        folder = Path(data).resolve()
        names, size = (f"tfds:{folder}/cifar10", f"tfds:{folder}/mnist_t10k"), 32
    source, target = (load_dataset(name, image_size=size) for name in names)
    if tiny:
        return Setting("resnet_tiny", source, target, size, 128, dtype, seconds, (20,), 3, 200)
    return Setting("resnet18_cifar", source, target, size, 512, dtype, seconds, SIZES, 50, 2000)


def train_sources(made: Setting, clock: Any) -> Iterator[tuple[float, Model, int, float]]:
    """(eps, model, steps, seconds of compiling) of each source; robust ones share a program."""
    train, num_classes = made.source.in_memory("train"), len(made.source.class_names)
    module = create_module(made.architecture, num_classes=num_classes, dtype=made.dtype)
    images, labels = jnp.asarray(train.images), jnp.asarray(train.labels)
    augmentation = Augmentation(crop_padding=4, flip=made.size == 32)

    def take(robust, state, progress, eps, step_key, images, labels):
        index_key, *keys = jax.random.split(step_key, 1 + made.batch_size)
        chosen = jax.random.randint(index_key, (made.batch_size,), 0, len(labels))
        keys = jnp.stack(keys)
        inputs = augment(keys, to_float(images[chosen]), augmentation)
        # Up over the first fifth of the time, then down to 0; the time is known only while it runs.
        rate = PEAK_RATE * jnp.minimum(progress / 0.2, (1 - progress) / 0.8)
        attack = functools.partial(
            pgd,
            threat_model=L2(eps),
            num_steps=ATTACK_STEPS,
            step_size=2 / ATTACK_STEPS * eps,
            use_best=False,
        )
        tx = sgd(lambda _: rate, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY)
        step = make_train_step(module_apply(module), tx, attack=attack if robust else None)
        return step(state, Batch(inputs, labels[chosen], keys))[0]

    programs, costs = {}, {}
    for eps in EPS:
        robust = eps > 0
        variables = init_variables(module, jax.random.key(0), made.size)
        state = init_state(variables, sgd(lambda _: 0.0, momentum=0.9, nesterov=True))
        key = jax.random.key(1)
        args = (state, jnp.float32(0), jnp.float32(eps), key, images, labels)
        if robust not in programs:
            started = time.perf_counter()
            function = jax.jit(functools.partial(take, robust), donate_argnums=0)
            programs[robust] = function.lower(*args).compile()
            costs[robust] = time.perf_counter() - started
        budget = min(made.seconds, clock() / 8)
        started, steps = time.perf_counter(), 0
        while (progress := (time.perf_counter() - started) / budget) < 1:
            for _ in range(4):
                args = (state, jnp.float32(progress), jnp.float32(eps), jax.random.fold_in(key, steps))
                state, steps = programs[robust](*args, images, labels), steps + 1
            jax.block_until_ready(state)
        spec = ModelSpec(
            made.architecture,
            num_classes,
            made.size,
            module.mean,
            module.std,
            norm="l2" if robust else "none",
            eps=eps,
            class_names=made.source.class_names,
        )
        yield eps, Model(module, jax.device_get(state.variables), spec), steps, costs[robust]


def name_of(eps: float) -> str:
    return f"ℓ2 {eps:g}" if eps else "natural"


def run(made: Setting, clock: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of the table: sources first, then each (n, k) while `clock()`, the seconds left, allows."""
    models = {}
    threat: Any = L2(EVALUATION_EPS)
    attack = make_attack(threat, num_steps=20, step_size=0.125 * EVALUATION_EPS)
    test = Split(*(x[: made.num_measured] for x in made.source.test))
    for eps, model, steps, compiling in train_sources(made, clock):
        models[eps] = model
        started = time.perf_counter()
        measure = functools.partial(evaluate, model, test, batch_size=min(500, made.num_measured))
        yield (
            f"source {name_of(eps)}",
            {
                "epochs": steps * made.batch_size / made.source.train.num_images,
                "accuracy": measure()["accuracy"],
                f"accuracy, ℓ2 {EVALUATION_EPS} PGD-20": measure(attack=attack)["accuracy"],
                "compile s": compiling,
                "measuring s": time.perf_counter() - started,
            },
        )
    yield from transfer(made, models, clock)


def transfer(made: Setting, models: dict[float, Model], clock: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """A row for each (n, k): accuracy from the natural source, and the leads of the robust ones."""
    recipe = Recipe(num_epochs=made.num_epochs, evaluate_epochs=(made.num_epochs,), learning_rate=0.05)
    train, test = made.target.in_memory("train"), Split(*(x[: made.num_measured] for x in made.target.test))
    keys = jax.random.split(jax.random.key(2), SEEDS)
    started = time.perf_counter()
    prepared = {(eps, k): prepare(models[eps], train, test, recipe, k) for eps in models for k in DEPTHS}

    def tune(n: int, k: int) -> dict[float, np.ndarray]:
        subsets = [subset_indices(train.labels, n, dataset=made.target.name, seed=i) for i in range(SEEDS)]
        return {
            eps: fine_tune_many(
                model,
                train,
                test,
                subsets=np.stack(subsets),
                keys=keys,
                num_classes=len(made.target.class_names),
                num_unfrozen_blocks=k,
                recipe=replace(recipe, batch_size=min(128, n)),
                prepared=prepared[eps, k],
            )["test_accuracy"][:, 0]
            for eps, model in models.items()
        }

    grid = [(n, k) for n in made.sizes for k in DEPTHS if n <= train.num_images]
    with ThreadPoolExecutor(max(1, min(6, (os.cpu_count() or 1) // 2))) as threads:  # to compile side by side
        waiting = {place: threads.submit(tune, *place) for place in grid}
        for (n, k), found in waiting.items():
            if clock() < 15:
                threads.shutdown(wait=False, cancel_futures=True)
                return
            found = found.result()
            row: dict[str, Any] = {"natural, %": 100 * float(found[0.0].mean())}
            row |= {f"lead of {name_of(eps)}": lead(x, found[0.0]) for eps, x in found.items() if eps}
            yield f"n = {n}, k = {k}", row | {"since the sources, s": time.perf_counter() - started}


def lead(robust: np.ndarray, natural: np.ndarray) -> str:
    """Percentage points, with the 95 % interval of their mean over subsets."""
    differences = 100 * (np.float64(robust) - natural)
    half = stats.t.ppf(0.975, len(differences) - 1) * differences.std(ddof=1) / len(differences) ** 0.5
    return f"{differences.mean():+.1f} [{differences.mean() - half:+.1f}, {differences.mean() + half:+.1f}]"
