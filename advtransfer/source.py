"""Source networks: trained naturally or adversarially on one dataset, and kept as model folders."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax
import numpy as np
import optax

from advtransfer import parallel, storage
from advtransfer.attacks import cross_entropy, make_attack
from advtransfer.checkpoint import Checkpoints
from advtransfer.data import Augmentation, Batch, Dataset, Feed, StreamedSplit, choose_augmentation, make_feed
from advtransfer.evaluate import Evaluation, measure
from advtransfer.foreign import AnyPath
from advtransfer.models import (
    Model,
    ModelSpec,
    ResNet,
    compute_dtype,
    create_module,
    flops_per_weight,
    init_variables,
    load_model,
    save_model,
)
from advtransfer.norms import NORMS, check_radius
from advtransfer.optim import SCHEDULES, make_schedule, sgd
from advtransfer.options import deciding, option, options, to_dict
from advtransfer.progress import RunLog, progress_bar
from advtransfer.train import Metrics, TrainState, fit, init_state, make_train_step, module_apply

_KEPT = 2  # checkpoints


@options
class SourceRecipe:
    """How a source network is trained. A natural and a robust one may differ in norm and eps alone."""

    architecture: str = option("resnet_tiny", "a key of models.ARCHITECTURES")
    image_size: int = option(16, "side of the network's images, in pixels", low=1)
    mean: tuple[float, ...] = option((0.5, 0.5, 0.5), "mean per channel, of images in [0, 1]", lengths=(3,))
    std: tuple[float, ...] = option(
        (0.25, 0.25, 0.25), "standard deviation per channel, of images in [0, 1]", lengths=(3,), above=0
    )
    norm: str = option("none", "threat model of adversarial training", choices=NORMS)
    eps: float = option(0.0, "radius of the threat model, in pixel units", low=0)
    attack_steps: int = option(3, "steps of PGD (Salman et al., 2020, appendix A)", low=1)
    attack_step_ratio: float = option(
        2 / 3, "PGD's step size divided by eps (Salman et al., 2020, appendix A)", above=0
    )
    attack_random_start: bool = option(False, "PGD starts at random inside the threat model")
    attack_batch_norm: str = option(
        "running", "BatchNorm statistics that the attack sees", choices=("running", "batch")
    )
    num_epochs: int = option(8, "epochs; each drops the images of an incomplete last batch", low=1)
    batch_size: int = option(128, "images per step, over all devices", low=1)
    num_devices: int = option(
        0,
        "devices of each process that a step is divided among; 0: all accelerators; CPU cores while it pays",
        low=0,
        decides=False,
    )
    num_parts: int = option(
        1, "parts into which a batch is divided for gradient accumulation, to save memory", low=1
    )
    learning_rate: float = option(0.1, "peak learning rate", above=0)
    schedule: str = option("cyclic", "schedule of the learning rate (optim.make_schedule)", choices=SCHEDULES)
    momentum: float = option(0.9, "momentum of SGD", low=0, below=1)
    weight_decay: float = option(5e-4, "weight decay of all parameters, added to the gradient", low=0)
    label_smoothing: float = option(0.0, "weight of the uniform distribution in the targets", low=0, below=1)
    average_decay: float = option(
        0.0, "decay of a moving average of the weights, which becomes the model; 0: none", low=0, below=1
    )
    augmentation: Augmentation = option(Augmentation(), "augmentation of the training images")
    sync_batch_norm: bool = option(True, "whether BatchNorm statistics are over all devices or per device")
    num_workers: int = option(
        -1, "processes that decode a stream; -1: one per core; 0: threads", low=-1, decides=False
    )
    save_every: int = option(200, "steps between checkpoints", low=1, decides=False)
    log_every: int = option(50, "steps between lines of log.jsonl", low=1, decides=False)
    validate_every: int = option(
        0, "epochs between measurements on validation images; 0: none", low=0, decides=False
    )

    def check(self) -> None:
        if (self.norm == "none") != (self.eps == 0):
            raise ValueError(
                f"eps={self.eps:g} does not go with norm={self.norm}: set a norm ({', '.join(NORMS[1:])}) "
                "and a positive eps, or neither"
            )
        check_radius(self.norm, self.eps)

    @property
    def name(self) -> str:
        """ "natural", or "l2:0.5"."""
        return "natural" if self.norm == "none" else f"{self.norm}:{self.eps:g}"


def parse_source(text: str) -> tuple[str, float]:
    """The threat model and its radius in pixel units: ("none", 0.0) for a natural source.

    Args:
      text: natural; NORM:EPS in pixel units (l2:0.5, linf:0.03); or, as published models are named, l2_3 in
        pixel units and linf_4 in 255ths of them.

    Raises:
      ValueError: anything else.
    """
    if text == "natural":
        return "none", 0.0
    separator = ":" if ":" in text else "_"
    norm, _, radius = text.partition(separator)
    unit = 255 if (norm, separator) == ("linf", "_") else 1
    try:
        eps = float(radius) / unit
    except ValueError:
        eps = 0.0
    if norm not in NORMS[1:] or not 0 < eps < math.inf:
        raise ValueError(
            f"{text!r}: write natural, NORM:EPS with a positive number of pixel units, such as l2:0.5, or "
            "l2_3, linf_4 (255ths) and the like"
        )
    return norm, eps


def check_source(recipe: SourceRecipe, dataset: Dataset) -> None:
    """Raises a ValueError for a batch size, a number of parts or an architecture that cannot be."""
    if recipe.batch_size > dataset.train.num_images:
        raise ValueError(
            f"batch_size={recipe.batch_size} is larger than the {dataset.train.num_images} training images"
        )
    devices = choose_devices(recipe, dataset)
    (shards,) = {len(shard) for shard in parallel.split(np.empty(recipe.batch_size), devices)}
    if shards % recipe.num_parts:
        raise ValueError(f"num_parts={recipe.num_parts} must divide the {shards} images of a device")


def choose_devices(recipe: SourceRecipe, dataset: Dataset) -> int:
    """How many devices of each process a step is divided among.

    Raises:
      ValueError: recipe.num_devices is more than there are, or an unknown architecture.
    """
    module = create_source_module(recipe, dataset)
    if recipe.num_devices > jax.local_device_count():
        raise ValueError(
            f"num_devices={recipe.num_devices} is more than the {jax.local_device_count()} that there are"
        )
    # With BatchNorm statistics per device or part, another number would be another training.
    alike = recipe.sync_batch_norm and recipe.num_parts == 1
    work = flops_per_weight(module, recipe.image_size) if alike else 0.0
    return recipe.num_devices or parallel.choose_devices(recipe.batch_size, flops_per_weight=work)


def create_source_module(recipe: SourceRecipe, dataset: Dataset, dtype: str = "auto") -> ResNet:
    """The untrained network, computing in `dtype` (see `compute_dtype`)."""
    return create_module(
        recipe.architecture,
        num_classes=len(dataset.class_names),
        mean=recipe.mean,
        std=recipe.std,
        dtype=compute_dtype(dtype),
        axis_name=parallel.AXIS if recipe.sync_batch_norm else None,
    )


def steps_per_epoch(recipe: SourceRecipe, dataset: Dataset) -> int:
    """An epoch drops the images that fill no batch."""
    return dataset.train.num_images // recipe.batch_size


def num_steps(recipe: SourceRecipe, dataset: Dataset) -> int:
    """Of the whole training."""
    return recipe.num_epochs * steps_per_epoch(recipe, dataset)


def state_bytes(recipe: SourceRecipe, dataset: Dataset) -> int:
    """Bytes of a training state: parameters, momentum, BatchNorm statistics and their moving average."""
    module = create_source_module(recipe, dataset)
    tx = sgd(recipe.learning_rate, momentum=recipe.momentum)
    variables = functools.partial(init_variables, module, jax.random.key(0))
    state = jax.eval_shape(lambda: init_state(variables(), tx, average=recipe.average_decay > 0))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


RunStep = Callable[[TrainState, int], tuple[TrainState, Metrics]]


class Training(NamedTuple):
    """A source training, ready to start: its fresh state and what takes it further."""

    module: ResNet
    state: TrainState
    run_step: RunStep
    schedule: optax.Schedule
    close: Callable[[], None]  # ends the workers that decode images


def start_training(
    recipe: SourceRecipe, dataset: Dataset, *, seed: int = 0, dtype: str = "auto", devices: int | None = None
) -> Training:
    """The training that a recipe describes, from nothing but these arguments; `devices` are those of
    `choose_devices` where they are None.

    Raises:
      ValueError: as `check_source`.
    """
    check_source(recipe, dataset)
    devices = devices or choose_devices(recipe, dataset)
    module = create_source_module(recipe, dataset, dtype)
    schedule = make_schedule(recipe.schedule, recipe.learning_rate, num_steps(recipe, dataset))
    tx = sgd(schedule, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    train_step = make_train_step(
        module_apply(module),
        tx,
        attack=make_attack(
            recipe.norm,
            recipe.eps,
            num_steps=recipe.attack_steps,
            step_ratio=recipe.attack_step_ratio,
            random_start=recipe.attack_random_start,
            use_best=False,
            # As in MadryLab/robustness: it saturates, so images that the network is sure of barely move.
            loss_fn=cross_entropy,
        ),
        attack_in_train_mode=recipe.attack_batch_norm == "batch",
        label_smoothing=recipe.label_smoothing,
        num_parts=recipe.num_parts,
        average_decay=recipe.average_decay,
        axis_name=parallel.AXIS,
    )
    init_key, batch_key = jax.random.split(jax.random.key(seed))
    variables = init_variables(module, init_key, recipe.image_size)
    state = init_state(variables, tx, average=recipe.average_decay > 0)
    images = None if isinstance(dataset.train, StreamedSplit) else dataset.train.images
    feed = make_feed(
        dataset.train,
        choose_augmentation(recipe.augmentation, images),
        batch_key,
        batch_size=recipe.batch_size,
        num_steps=num_steps(recipe, dataset),
        seed=seed,
        num_workers=recipe.num_workers,
        image_size=recipe.image_size,
        devices=devices,
    )
    run_step = _make_run_step(train_step, feed, devices)
    return Training(module, parallel.replicate(state, devices), run_step, schedule, feed.close)


def _make_run_step(
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]], feed: Feed, devices: int
) -> RunStep:
    """The step on so many devices."""

    def step_on_device(state, shared, rows):
        return train_step(state, feed.make_batch(shared, rows, state.step))

    step_on_devices = parallel.data_parallel(
        step_on_device, num_shared=2, num_split=1, devices=devices, donate=(0,)
    )
    return lambda state, step: step_on_devices(state, feed.shared, feed.rows(step))


def train_source(
    recipe: SourceRecipe,
    dataset: Dataset,
    *,
    folder: str | os.PathLike[str],
    seed: int = 0,
    dtype: str = "auto",
    evaluation: Evaluation | None = None,
    name: str = "source",
) -> Model:
    """Trains a source network, or resumes an earlier run.

    Writes `folder`/source.json, checkpoints, log.jsonl, TensorBoard events, and at the end `folder`/model. A
    finished model is loaded and returned as it is. Over several processes, which share `folder`, all write
    and read the checkpoints, and process 0 the rest.

    Args:
      recipe: how it is trained.
      dataset: on what.
      folder: empty, or of an earlier call with the same recipe, dataset and seed.
      seed: of initial weights, batch order, augmentation and attacks.
      dtype: of the network's computation; see `compute_dtype`.
      evaluation: of recipe.validate_every.
      name: on the progress bar.

    Raises:
      ValueError: the dataset does not fit the recipe, or `folder` holds the model of another source, or
        foreign files.
      DivergedError, Preempted: as `fit`.
      UnreadableCheckpoints, SaveError: no checkpoint can be read; one cannot be written.
    """
    folder = storage.to_path(folder)
    if (model := load_source(recipe, folder, dtype=dtype)) is not None:
        return model
    storage.check_ours(folder, "source.json", "config.json")
    devices = _devices_as_before(recipe, dataset, folder / "source.json")
    run = start_training(recipe, dataset, seed=seed, dtype=dtype, devices=devices)
    decided = deciding(recipe) | {"seed": seed, "dtype": dtype, "classes": dataset.class_names}
    described = json.dumps(decided, sort_keys=True).encode()
    if parallel.is_main_process():
        storage.make_folder(folder)
        about = json.dumps(decided | {"num_devices": devices}, sort_keys=True)
        storage.write(folder / "source.json", about.encode())
    checkpoints = Checkpoints(folder / "checkpoints", keep=_KEPT, run=hashlib.sha256(described).hexdigest())

    def to_model(state: TrainState) -> Model:
        spec = ModelSpec(
            architecture=recipe.architecture,
            num_classes=len(dataset.class_names),
            image_size=recipe.image_size,
            mean=run.module.mean,
            std=run.module.std,
            norm=recipe.norm,
            eps=recipe.eps,
            class_names=dataset.class_names,
            provenance={"seed": seed, "recipe": to_dict(recipe)},
        )
        return Model(run.module.clone(axis_name=None), jax.device_get(state.variables), spec)

    def validate(state: TrainState) -> dict[str, float]:
        measured = evaluation or Evaluation()
        found = measure(to_model(state), dataset.validation, measured, seed=seed, name="validation")
        return {f"validation_{key}": value for key, value in found.items() if key.endswith("accuracy")}

    with contextlib.closing(run):
        restored = checkpoints.restore(run.state)
        state = run.state if restored is None else parallel.replicate(restored, devices)
        first_step = int(state.step)
        with RunLog(folder, first_step=first_step) as log:
            state = fit(
                state,
                run.run_step,
                num_steps=num_steps(recipe, dataset),
                schedule=run.schedule,
                checkpoints=checkpoints,
                save_every=recipe.save_every,
                log_every=recipe.log_every,
                log=log,
                steps=lambda steps: progress_bar(steps, f"train {name}", "steps", done=first_step),
                validate=validate,
                validate_every=recipe.validate_every * steps_per_epoch(recipe, dataset),
            )
    model = to_model(state)
    if parallel.is_main_process():
        save_model(model, folder / "model")
        storage.remove(folder / "checkpoints")
    return model


def _devices_as_before(recipe: SourceRecipe, dataset: Dataset, file: AnyPath) -> int:
    """`choose_devices`; on a CPU, what an earlier call has chosen and written to `file`, so that a resumed
    training goes on as it began, if there are still so many."""
    devices = choose_devices(recipe, dataset)
    if parallel.is_main_process() and parallel.platform() == "cpu" and not recipe.num_devices:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            before = replace(recipe, num_devices=json.loads(file.read_bytes())["num_devices"])
            check_source(before, dataset)
            devices = before.num_devices or devices
    devices = int(parallel.from_main(np.int32(devices)))
    logging.info("%s: a step is divided among %d devices of each process", recipe.name, devices)
    return devices


def load_source(recipe: SourceRecipe, folder: str | os.PathLike[str], *, dtype: str = "auto") -> Model | None:
    """The finished model of an earlier `train_source`; None if there is none.

    Raises:
      ValueError: it is the model of another source, or cannot be read.
    """
    folder = storage.to_path(folder)
    if not parallel.from_main(np.bool_((folder / "model" / "model.json").exists())):
        return None
    if parallel.is_main_process():
        storage.remove(folder / "checkpoints")  # left by a kill right after the save
    model = load_model(folder / "model", dtype=compute_dtype(dtype))
    for field in ("norm", "eps", "architecture", "image_size"):
        asked, found = getattr(recipe, field), getattr(model.spec, field)
        if asked != found:
            raise ValueError(
                f"{folder / 'model'} is a model of {field} {found}, and {field}={asked} is asked for: "
                "choose another folder, or delete that model"
            )
    return model


def against(recipe: SourceRecipe, text: str) -> SourceRecipe:
    """The recipe of the source that a text names, see `parse_source`."""
    norm, eps = parse_source(text)
    return replace(recipe, norm=norm, eps=eps)
