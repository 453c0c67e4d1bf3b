"""stage=study: trains the sources that are not there yet, runs the grid, writes the report.

Leaves in the workdir: `sources/NAME/` as stage=source does, `rows/` with a file per finished group,
`rows.csv`, `summary.csv`, `figures/`, `report.html`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from advtransfer.config import names_key
from advtransfer.data import Dataset, subset_indices, to_float
from advtransfer.evaluate import predict
from advtransfer.models import Model, create_module, identity, logits_fn
from advtransfer.progress import progress_bar
from advtransfer.report import Evidence, headline, write_report, write_rows
from advtransfer.source import (
    check_source,
    compute_dtype,
    evaluation_attack,
    evaluation_key,
    load_data,
    load_source_data,
    train_source,
)
from advtransfer.stages.named_models import find_model, find_spec, model_name
from advtransfer.stages.source import measure_once, training_plan
from advtransfer.stages.workdir import check_workdir, open_workdir, versions
from advtransfer.study import Source, finished_rows, group, make_recipe, make_trials, num_steps, run_trials
from advtransfer.transfer import activation_shape, first_unfrozen_block, prefix_is_constant


class Asked(NamedTuple):
    """A source that config.study.sources names."""

    name: str
    norm: str
    eps: float
    config: ConfigDict | None  # of its training; None for a model from elsewhere
    place: str  # the folder where it is trained, or the name of the model
    architecture: str
    image_size: int


def run(config: ConfigDict, workdir: Path) -> None:
    asked = check(config, workdir)
    open_workdir(config, workdir)
    models = {source.name: _get_model(config, source) for source in asked}
    dataset = load_source_data(config)
    trained = [source for source in asked if source.config is not None]
    evaluations = [
        {"name": source.name, "norm": source.norm, "eps": source.eps}
        | measure_once(config, models[source.name], dataset, Path(source.place), name=source.name)
        for source in trained
    ]
    sources = [Source(s.name, s.norm, s.eps, identity(models[s.name])) for s in asked]
    targets = {size: _load_target(config, size) for size in {s.image_size for s in asked}}
    rows = run_trials(
        make_trials(config, sources),
        models,
        lambda model: targets[model.spec.image_size],
        workdir / "rows",
        group_size=config.study.group_size,
        progress=lambda groups: progress_bar(groups, "fine-tune", "groups"),
    )
    write_rows(rows, workdir / "rows.csv")
    twins = {source.name: models[source.name] for source in trained}
    pictures, captions = _pictures(config, twins, dataset, next(iter(targets.values())))
    evidence = Evidence(
        sources=evaluations,
        pictures=pictures,
        captions=captions,
        config=config.to_dict(),
        versions=versions(),
        command=config.report.command,
        remarks=config.report.remarks,
    )
    path = write_report(rows, workdir, evidence=evidence, title=config.report.title)
    print(*headline(rows), f"report: {path}", sep="\n")


def plan(config: ConfigDict, workdir: Path) -> str:
    asked = check(config, workdir)
    dataset = load_source_data(config)
    lines = [
        training_plan(source.config, dataset, Path(source.place))
        if source.config is not None
        else f"source {source.name}: {source.place}"
        for source in asked
    ]
    trials = make_trials(config, [_planned_source(config, source) for source in asked])
    rows = finished_rows(workdir / "rows")
    left = [trial for trial in trials if trial.identity() not in rows]
    steps = sum(num_steps(trial) for trial in left)
    num_groups = len(group(left, size=config.study.group_size))
    lines.append(
        f"fine-tune {len(left):,} of {len(trials):,} models in {num_groups:,} groups, "
        f"{steps:,} steps of {config.transfer.batch_size} images"
    )
    bytes_needed = max(_input_bytes(config, source) for source in asked)
    return "\n".join([*lines, f"inputs on the device: {bytes_needed / 1e6:,.1f} MB at most"])


def _planned_source(config: ConfigDict, source: Asked) -> Source:
    """The source of a trial; one that is not trained yet has finished none."""
    trained = source.config is None or (Path(source.place) / "model" / "model.json").exists()
    model = find_model(source.place, compute_dtype(config.dtype)) if trained else None
    return Source(source.name, source.norm, source.eps, identity(model) if model else "")


def _input_bytes(config: ConfigDict, source: Asked) -> int:
    """Bytes of the images, or of their activations at the first trained block, over all of the grid's k."""
    target = _load_target(config, source.image_size)
    num_images = len(target.train.labels) + len(getattr(target, config.study.split).labels)
    module = create_module(source.architecture, dtype=compute_dtype(config.dtype))
    recipe = make_recipe(config.transfer)
    sizes = []
    for k in config.study.num_unfrozen_blocks:
        if prefix_is_constant(k, recipe.frozen_batch_norm, recipe.augmentation):
            entering = activation_shape(module, first_unfrozen_block(module, k), source.image_size)
            sizes.append(num_images * entering.size * entering.dtype.itemsize)
        else:
            sizes.append(num_images * 3 * source.image_size**2)
    return max(sizes)


def check(config: ConfigDict, workdir: Path) -> list[Asked]:
    """The sources, after everything that the config names has been looked up.

    Raises:
      ConfigError: naming the key.
    """
    with names_key("study.sources"):
        asked = [_ask(config, text.strip(), workdir) for text in config.study.sources.split(",")]
        names = [source.name for source in asked]
        if len(set(names)) < len(names):
            raise ValueError(f"{config.study.sources!r} names a source twice")
    for source in asked:
        if source.config is not None:
            check_source(source.config, load_source_data(config))
        with names_key("study.num_unfrozen_blocks"):
            module = create_module(source.architecture, num_classes=1)
            for k in config.study.num_unfrozen_blocks:
                first_unfrozen_block(module, k)
    labels = _load_target(config, asked[0].image_size).train.labels
    with names_key("study.num_train_images"):
        for n in config.study.num_train_images:
            subset_indices(labels, n, dataset=config.transfer.target, seed=0)
    check_workdir(config, workdir)
    return asked


def _ask(config: ConfigDict, text: str, workdir: Path) -> Asked:
    """ "natural", "l2:0.5" (both trained here, by the one recipe of config.train), or a model by name."""
    norm, colon, eps = text.partition(":")
    if text != "natural" and not (colon and norm in ("l2", "linf")):
        spec = find_spec(text)
        return Asked(model_name(text), spec.norm, spec.eps, None, text, spec.architecture, spec.image_size)
    try:
        radius = float(eps) if colon else 0.0
    except ValueError:
        radius = -1.0
    if colon and not 0 < radius < math.inf:
        raise ValueError(f"{text!r}: write NORM:EPS with a positive number, such as l2:0.5")
    own = config.copy_and_resolve_references()
    own.train.norm, own.train.eps = (norm, radius) if colon else ("none", 0.0)
    place = str(workdir / "sources" / text.replace(":", "_"))
    return Asked(text, own.train.norm, radius, own, place, own.train.architecture, own.train.image_size)


def _get_model(config: ConfigDict, source: Asked) -> Model:
    if source.config is None:
        with names_key("study.sources"):
            return find_model(source.place, compute_dtype(config.dtype))
    return train_source(source.config, source.place, name=source.name)


def _load_target(config: ConfigDict, image_size: int) -> Dataset:
    splits = ("train", config.study.split)
    return load_data(
        config, "transfer.target", image_size=image_size, splits=splits, view=config.transfer.view
    )


def _pictures(
    config: ConfigDict, models: dict[str, Model], dataset: Dataset, target: Dataset
) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """Source images with their adversarial twins, and target images, with what stands under them."""
    number = config.report.num_pictures
    pictures = {"target_images": target.train.images[:number] / np.float32(255)}
    captions = {"target_labels": [target.class_names[i] for i in target.train.labels[:number]]}
    attack = evaluation_attack(config)
    if not models or attack is None or not number:
        return pictures, captions
    names = dataset.class_names
    labels = dataset.test.labels[:number]
    images = to_float(np.asarray(dataset.test.images[:number]))
    pictures["source_images"] = np.asarray(images)
    captions["source_labels"] = [names[i] for i in labels]
    for source, model in models.items():
        network = logits_fn(model)
        twins = attack(network, images, labels, key=evaluation_key(config))
        pictures[f"adversarial/{source}"] = np.asarray(twins)
        for kind, shown in (("natural", images), ("adversarial", twins)):
            classes = np.argmax(predict(network, shown), axis=-1)
            captions[f"{kind}_predictions/{source}"] = [names[i] for i in classes]
    return pictures, captions
