"""What `--plan` says of a study: what there is to train, the memory, the operations, the hours."""

from __future__ import annotations

import itertools
import statistics
import time
from pathlib import Path

import jax
from ml_collections import ConfigDict

from advtransfer import parallel, storage
from advtransfer import source as sources
from advtransfer.data import Dataset
from advtransfer.models import Model, ModelSpec, create_module, init_variables
from advtransfer.stages.named_models import find_model
from advtransfer.stages.source import training_plan
from advtransfer.stages.study_grid import Asked, Grid, starts, trials_of
from advtransfer.study import (
    Trial,
    accelerator_hours,
    caches_of,
    candidates,
    choose,
    finished_rows,
    flatten,
    format_seconds,
    group,
    is_asked,
    measure_speed,
    num_steps,
    pieces_of,
    predict_seconds,
    with_choices,
)

_STEPS, _SECONDS = 5, 3.0  # of a source's training that are timed at least


def plan_lines(config: ConfigDict, grid: Grid, workdir: Path) -> list[str]:
    """A line for each source, and what the trials take that are not finished."""
    asked = grid.asked
    missing = [s for s in asked if s.config is not None and not _is_trained(s)]
    trained_here = any(source.config is not None for source in asked)
    source_data = sources.load_source_data(config, planned=True) if trained_here else None
    lines = [
        training_plan(source.config, source_data, storage.to_path(source.place))
        if source.config is not None
        else f"source {source.name}: {source.place}, {source.architecture}"
        for source in asked
    ]
    # One that is not trained or downloaded yet has finished no trials.
    models = {s.name: s.model or (None if s in missing else _load(config, s)) for s in asked}
    found = starts(config, grid, models)
    trials, tried = trials_of(config, grid, found), []
    if is_asked(config.study):
        candidates_of = candidates(config, trials_of(config, grid, found, validate=True))
        rows = finished_rows(workdir / "search")
        tried = [trial for trial in flatten(candidates_of) if trial.identity() not in rows]
        if not tried:
            trials = with_choices(trials, choose(candidates_of, itertools.chain(*rows.values()))[0])
    every = flatten(trials)
    rows = finished_rows(workdir / "rows")
    left = [trial for trial in every if trial.identity() not in rows]
    size = config.study.group_size
    lines.append(
        f"fine-tune {len(left):,} of {len(every):,} models in {len(group(left, size=size)):,} groups, "
        f"{sum(map(num_steps, left)):,} steps of {config.transfer.batch_size} images"
    )
    if tried:
        lines.append(f"before them {len(tried):,} on validation images, to choose hyper-parameters")
    # Nothing is measured for what is not here yet: a large network takes minutes on a CPU.
    datasets = [*grid.targets.values(), *([source_data] if source_data else [])]
    fetched = all(source.model is None or source.model.variables for source in asked)
    is_here = fetched and not any(dataset.is_placeholder for dataset in datasets)
    calibration = config.study.calibration if is_here else 0.0
    if tried or left:
        own = models | _untrained(config, missing)
        lines += _costs(config, grid, [*tried, *left], own, calibration)
    if missing and calibration:
        seconds = sum(_training_seconds(source.config, source_data) for source in missing)
        lines.append(f"predicted here before that, training of the sources: {format_seconds(seconds)}")
    if config.study.calibration and not is_here:
        lines.append("nothing is measured here before all of the following is there")
    return lines


def _costs(
    config: ConfigDict, grid: Grid, trials: list[Trial], models: dict[str, Model], calibration: float
) -> list[str]:
    """What trials take; `calibration` seconds are measured to say how long it is here, 0: it is not said."""
    datasets = grid.datasets(trials)
    networks = {name: (model.module, model.spec.image_size) for name, model in models.items()}
    pieces = pieces_of(trials, networks, datasets)
    caches = caches_of(pieces, datasets)
    flops = sum(piece.number * piece.flops for piece in pieces), sum(cache.flops for cache in caches)
    images = max(target.train.nbytes + target.test.nbytes for target in grid.targets.values())
    largest = max((cache.num_bytes for cache in caches), default=0)
    hours = accelerator_hours(pieces, caches)
    lines = [
        f"{flops[0] / 1e12:,.3g} TFLOP of fine-tuning, {flops[1] / 1e12:,.3g} of {len(caches):,} caches",
        f"on a device: {largest / 1e6:,.1f} MB of activations or {images / 1e6:,.1f} MB of images at most; "
        f"{parallel.free_bytes() / 1e6:,.0f} MB are free here",
        "on one device, by the operations and MLPerf's share of the peak (study/plan.py): "
        + ", ".join(f"{name} {format_seconds(3600 * h)}" for name, h in hours.items()),
    ]
    if calibration:
        speed = measure_speed(pieces, models, datasets, budget=calibration)
        seconds = predict_seconds(pieces, caches, speed)
        device = jax.local_devices()[0].device_kind
        lines.append(
            f"predicted here ({parallel.num_devices()} × {device}), by running the beginning of "
            f"{len(speed.training)} of {len({p.kind for p in pieces})} kinds: {format_seconds(seconds)}"
        )
    return lines


def _is_trained(source: Asked) -> bool:
    return (storage.to_path(source.place) / "model" / "model.json").exists()


def _load(config: ConfigDict, source: Asked) -> Model:
    return find_model(source.place, sources.compute_dtype(config.dtype))


def _untrained(config: ConfigDict, missing: list[Asked]) -> dict[str, Model]:
    """Networks in the place of those that are not trained yet: a step takes as long, whatever the weights."""
    models = {}
    for source in missing:
        train = source.config.train
        module = create_module(
            source.architecture, mean=train.mean, std=train.std, dtype=sources.compute_dtype(config.dtype)
        )
        variables = init_variables(module, jax.random.key(0), source.image_size)
        spec = ModelSpec(source.architecture, module.num_classes, source.image_size, module.mean, module.std)
        models[source.name] = Model(module, variables, spec)
    return models


def _training_seconds(config: ConfigDict, dataset: Dataset) -> float:
    """Of training a source from the beginning, by its first steps."""
    run = sources.prepare(config, dataset)
    try:
        started = time.monotonic()
        state, metrics = run.run_step(run.state, 0)
        jax.block_until_ready(metrics)
        first, number = time.monotonic() - started, sources.num_steps(config, dataset)
        times, deadline = [], time.monotonic() + _SECONDS
        while len(times) < _STEPS or (time.monotonic() < deadline and len(times) < number):
            started = time.monotonic()
            state, metrics = run.run_step(state, len(times) + 1)
            jax.block_until_ready(metrics)
            times.append(time.monotonic() - started)
        return first + number * statistics.median(times)
    finally:
        run.close()
