"""Source networks: trained naturally or adversarially on one dataset, measured, and kept as model folders."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from advtransfer import parallel, storage
from advtransfer.attacks import cross_entropy, make_attack
from advtransfer.checkpoint import Checkpoints
from advtransfer.config import FREE_KEYS, ConfigError, flatten, names_key
from advtransfer.data import (
    SPLITS,
    Dataset,
    Feed,
    Split,
    StreamedSplit,
    choose_augmentation,
    load_dataset,
    make_feed,
    plan_dataset,
)
from advtransfer.evaluate import evaluate
from advtransfer.models import (
    Model,
    ModelSpec,
    create_module,
    init_variables,
    load_model,
    logits_fn,
    save_model,
)
from advtransfer.optim import make_schedule, sgd
from advtransfer.progress import RunLog, progress_bar
from advtransfer.train import TrainState, fit, init_state, make_train_step, module_apply

# Folded into the seed for evaluation, which shares it with training.
_EVALUATION_STREAM = 0xE7A1


def compute_dtype(name: str) -> Any:
    """config.dtype as a type: bfloat16 where accelerators have units for it, float32 on CPU."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def load_data(
    config: ConfigDict,
    key: str,
    *,
    image_size: int,
    splits: tuple[str, ...],
    planned: bool = False,
    **options: Any,
) -> Dataset:
    """The dataset that config.`key` names; small squares keep their size, and skipped images are said.

    Args:
      config: beside the name it says where decoded images are kept and what becomes of broken ones.
      key: of the name.
      image_size, splits, options: as for `load_dataset`.
      planned: whether a known set that is not prepared comes as a placeholder (see `plan_dataset`).

    Raises:
      ConfigError: naming the key: no such dataset, or no images in one of `splits`.
    """
    name = flatten(config)[key]
    with names_key(key):
        dataset = (plan_dataset if planned else load_dataset)(
            name,
            image_size=image_size,
            cache_dir=config.cache_dir or None,
            splits=splits,
            broken=config.broken_images,
            enlarge=False,
            **options,
        )
        for split in splits:
            if not getattr(dataset, split).num_images:
                raise ValueError(f"{name} has no {split} images")
    return dataset


def load_source_data(config: ConfigDict, *, planned: bool = False) -> Dataset:
    """The dataset of config.train, at its resolution: to train on, and to measure the network on."""
    validation = ("validation",) if config.train.validate_every else ()
    splits = tuple(dict.fromkeys(("train", *validation, config.evaluate.split)))
    options = {"image_size": config.train.image_size, "loading": config.train.loading}
    return load_data(config, "train.dataset", splits=splits, planned=planned, **options)


def check_source(config: ConfigDict, dataset: Dataset) -> None:
    """Raises a ConfigError for an architecture or a batch size that cannot be."""
    with names_key("train.batch_size"):
        if config.train.batch_size > dataset.train.num_images:
            raise ValueError(
                f"{config.train.batch_size} is larger than the {dataset.train.num_images} training images"
            )
        (shards,) = {len(shard) for shard in parallel.split(np.empty(config.train.batch_size))}
    if shards % config.train.num_parts:
        raise ConfigError(
            f"config.train.num_parts={config.train.num_parts} must divide the {shards} images of a device"
        )
    with names_key("evaluate.split"):
        if isinstance(getattr(dataset, config.evaluate.split), StreamedSplit):
            raise ValueError("the training images are streamed: measure on test or validation")
    check_evaluation(config)
    create_source_module(config, dataset)


def check_evaluation(config: ConfigDict) -> None:
    """Raises a ConfigError for an evaluation batch that the devices do not divide."""
    with names_key("evaluate.batch_size"):
        parallel.split(np.empty(config.evaluate.batch_size))


def check_head(spec: ModelSpec) -> None:
    """Raises a ValueError if the model was imported without a head: its logits are all the same."""
    if not spec.has_head:
        raise ValueError(
            "this model was imported without a head, so that it has no accuracy: fine-tune it first, with "
            "config.stage=transfer and this model as config.source"
        )


def align_classes(dataset: Dataset, spec: ModelSpec) -> Dataset:
    """The dataset with the model's labels for its classes, which may be fewer and in another order.

    Classes are matched by name; where one side only numbers them, by their number.

    Raises:
      ValueError: a class that the model does not know; without names, another number of classes, or the
        numbering of ImageNet's development kit; a model without a head.
    """
    check_head(spec)
    theirs, ours, count = dataset.class_names, spec.class_names, spec.num_classes
    numbered = tuple(map(str, range(count)))
    if ours in ((), numbered) or theirs == numbered:
        if len(theirs) != count:
            raise ValueError(f"{dataset.name} has {len(theirs)} classes, the model {count}")
        if count == 1000 and {*theirs} == {str(i) for i in range(1, 1001)}:
            raise ValueError(
                f"{dataset.name} numbers its classes from 1 to 1000, as ImageNet's development kit does, in"
                " an order that is not the networks': name the folders by WordNet ids (n01440764, ...)"
            )
        return dataset
    if unknown := [name for name in theirs if name not in ours]:
        raise ValueError(
            f"{dataset.name} has the classes {_few(unknown)}, which the model does not know; "
            f"it has {_few(ours)}"
        )
    if theirs == ours:
        return dataset
    places = np.array([ours.index(name) for name in theirs], np.int32)
    logging.info("%s: %d of the model's %d classes, matched by name", dataset.name, len(theirs), count)
    splits = {
        name: split._replace(labels=places[split.labels])
        for name in SPLITS
        if isinstance(split := getattr(dataset, name), Split)
    }
    return dataset._replace(class_names=ours, digests={}, **splits)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")


def num_steps(config: ConfigDict, dataset: Dataset) -> int:
    """Steps of the whole training; an epoch drops the images that fill no batch."""
    return config.train.num_epochs * steps_per_epoch(config, dataset)


def steps_per_epoch(config: ConfigDict, dataset: Dataset) -> int:
    return dataset.train.num_images // config.train.batch_size


def state_bytes(config: ConfigDict, dataset: Dataset) -> int:
    """Bytes of a training state: parameters, momentum, BatchNorm statistics and their moving average."""
    module = create_source_module(config, dataset)
    tx = sgd(config.train.learning_rate, momentum=config.train.momentum)
    average = config.train.average_decay > 0
    variables = functools.partial(init_variables, module, jax.random.key(0))
    state = jax.eval_shape(lambda: init_state(variables(), tx, average=average))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


class Run(NamedTuple):
    """A source training, ready to start: its fresh state and what takes it further."""

    module: Any
    state: TrainState
    run_step: Any  # (state, step) -> (state, metrics)
    schedule: Any
    close: Any  # () -> None; ends what decodes images


def prepare(config: ConfigDict, dataset: Dataset) -> Run:
    """Builds the training run that config.train describes, from nothing but the config and the data.

    Raises:
      ConfigError: as `check_source`.
    """
    check_source(config, dataset)
    recipe = config.train
    module = create_source_module(config, dataset)
    schedule = make_schedule(recipe.schedule, recipe.learning_rate, num_steps(config, dataset))
    tx = sgd(
        schedule,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
    )
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
    init_key, batch_key = jax.random.split(jax.random.key(config.seed))
    variables = init_variables(module, init_key, recipe.image_size)
    state = init_state(variables, tx, average=recipe.average_decay > 0)
    feed = make_feed(
        dataset.train,
        choose_augmentation(recipe.augmentation),
        batch_key,
        batch_size=recipe.batch_size,
        num_steps=num_steps(config, dataset),
        seed=config.seed,
        num_workers=recipe.num_workers,
        image_size=recipe.image_size,
    )
    run_step = _make_run_step(train_step, feed)
    return Run(module, parallel.replicate(state), run_step, schedule, feed.close)


def _make_run_step(train_step, feed: Feed):
    """(state, step) -> (state, metrics) on all devices."""

    def step_on_device(state, shared, rows):
        return train_step(state, feed.make_batch(shared, rows, state.step))

    step_on_devices = parallel.data_parallel(step_on_device, num_shared=2, num_split=1, donate=(0,))

    def run_step(state, step):
        with names_key("train.dataset"):
            rows = feed.rows(step)
        return step_on_devices(state, feed.shared, rows)

    return run_step


def create_source_module(config: ConfigDict, dataset: Dataset) -> Any:
    """The untrained network of config.train."""
    with names_key("train.architecture"):
        return create_module(
            config.train.architecture,
            num_classes=len(dataset.class_names),
            mean=config.train.mean,
            std=config.train.std,
            dtype=compute_dtype(config.dtype),
            axis_name=parallel.AXIS if config.train.sync_batch_norm else None,
        )


def train_source(config: ConfigDict, folder: str | Path, *, name: str = "source") -> Model:
    """Trains the network that config.train describes, or goes on where an earlier run stopped.

    Writes `folder`/source.json, checkpoints, log.jsonl, TensorBoard events, and at the end `folder`/model. A
    finished model is loaded and returned as it is. Over several processes, which share `folder`, all write
    and read the checkpoints, and process 0 the rest.

    Raises:
      ConfigError: as `prepare`, or `folder` holds the model of another source, or what is not ours.
      DivergedError, Preempted: as `train.fit`.
      UnreadableCheckpoints, SaveError: as `Checkpoints`.
    """
    folder = storage.to_path(folder)
    if parallel.from_main(np.bool_((folder / "model" / "model.json").exists())):
        if parallel.is_main_process():
            storage.remove(folder / "checkpoints")  # left by a kill right after the save
        model = load_model(folder / "model", dtype=compute_dtype(config.dtype))
        _check_model(config, model, folder / "model")
        return model
    try:
        storage.check_ours(folder, "source.json", "config.json")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    dataset = load_source_data(config)
    run = prepare(config, dataset)
    recipe = config.train.to_dict().items()
    asked = {key: value for key, value in recipe if f"train.{key}" not in FREE_KEYS}
    asked |= {"seed": config.seed, "dtype": config.dtype, "classes": dataset.class_names}
    described = json.dumps(asked, sort_keys=True).encode()
    identity = hashlib.sha256(described).hexdigest()
    if parallel.is_main_process():
        storage.make_folder(folder)
        storage.write(folder / "source.json", described)
    checkpoints = Checkpoints(folder / "checkpoints", keep=config.train.keep, run=identity)
    with contextlib.closing(run):
        restored = checkpoints.restore(run.state)
        state = run.state if restored is None else parallel.replicate(restored)
        first_step = int(state.step)
        with RunLog(folder, first_step=first_step) as log:
            state = fit(
                state,
                run.run_step,
                num_steps=num_steps(config, dataset),
                schedule=run.schedule,
                checkpoints=checkpoints,
                save_every=config.train.save_every,
                log_every=config.train.log_every,
                log=log,
                steps=lambda steps: progress_bar(steps, f"train {name}", "steps", done=first_step),
                validate=lambda state: _validate(config, dataset, run.module, state),
                validate_every=config.train.validate_every * steps_per_epoch(config, dataset),
            )
    model = _to_model(config, dataset, run.module, state)
    if parallel.is_main_process():
        save_model(model, folder / "model")
        storage.remove(folder / "checkpoints")
    return model


def _check_model(config: ConfigDict, model: Model, folder: Any) -> None:
    """Raises a ConfigError if a finished model is no source that config.train describes."""
    for key in ("norm", "eps", "architecture", "image_size"):
        asked, found = config.train[key], getattr(model.spec, key)
        if asked != found:
            raise ConfigError(
                f"{folder} is a model of {key} {found}, and config.train.{key} is {asked}: choose another "
                "folder or workdir, or delete that model"
            )


def _validate(config: ConfigDict, dataset: Dataset, module: Any, state: TrainState) -> dict[str, float]:
    """Accuracies of a state on the validation images, under the attack of config.evaluate too."""
    config = config.copy_and_resolve_references()
    config.evaluate.split = "validation"
    found = measure(_to_model(config, dataset, module, state), dataset, config, name="validation")
    return {f"validation_{key}": value for key, value in found.items() if key.endswith("accuracy")}


def _to_model(config: ConfigDict, dataset: Dataset, module: Any, state: TrainState) -> Model:
    spec = ModelSpec(
        architecture=config.train.architecture,
        num_classes=len(dataset.class_names),
        image_size=config.train.image_size,
        mean=module.mean,
        std=module.std,
        norm=config.train.norm,
        eps=config.train.eps,
        class_names=dataset.class_names,
        provenance={"seed": config.seed, "recipe": config.train.to_dict()},
    )
    return Model(module.clone(axis_name=None), jax.device_get(state.variables), spec)


def measure(model: Model, dataset: Dataset, config: ConfigDict, *, name: str) -> dict[str, Any]:
    """What `evaluate` says of a model, under the attack of config.evaluate too.

    Returns:
      {"natural_accuracy", "natural_loss", "natural_mean_per_class_accuracy", "num_images", "attack"} and the
      first three with "adversarial_" when there is an attack, and "adversarial_unmoved" (see `evaluate`);
      "attack" is a sentence's worth of its settings.
    """
    recipe = config.evaluate
    split = getattr(dataset, recipe.split)
    if recipe.num_images:
        split = type(split)(*(array[: recipe.num_images] for array in split))
    attacks = {"natural": None}
    if recipe.norm != "none":
        attacks["adversarial"] = evaluation_attack(config)
    results: dict[str, Any] = {"num_images": len(split.labels), "attack": _describe(recipe)}
    for kind, attack in attacks.items():
        with names_key("evaluate"):
            found = evaluate(
                logits_fn(model),
                split,
                batch_size=recipe.batch_size,
                attack=attack,
                key=evaluation_key(config),
                image_size=model.spec.image_size,
                steps=lambda steps, kind=kind: progress_bar(steps, f"{kind} {name}", "batches"),
            )
        results |= {f"{kind}_{metric}": value for metric, value in found.items()}
    return results


def evaluation_key(config: ConfigDict) -> jax.Array:
    """Of the attack's random starts; apart from every key that training draws from."""
    return jax.random.fold_in(jax.random.key(config.seed), _EVALUATION_STREAM)


def evaluation_attack(config: ConfigDict):
    """The attack of config.evaluate, or None."""
    recipe = config.evaluate
    return make_attack(
        recipe.norm,
        recipe.eps,
        num_steps=recipe.num_steps,
        step_ratio=recipe.step_ratio,
        num_restarts=recipe.num_restarts,
        random_start=recipe.num_restarts > 1,
    )


def _describe(recipe: ConfigDict) -> str:
    if recipe.norm == "none":
        return "none"
    norm = {"l2": "ℓ2", "linf": "ℓ∞"}[recipe.norm]
    restarts = f", {recipe.num_restarts} restarts" if recipe.num_restarts > 1 else ""
    return f"{norm} PGD-{recipe.num_steps}, ε = {recipe.eps:.3g}{restarts}"
