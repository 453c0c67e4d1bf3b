"""What `--plan` says of a study: what there is to train, the memory, the operations, the hours."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections import Counter

import jax

from advtransfer import parallel, storage
from advtransfer.data import Dataset
from advtransfer.models import Model, ModelSpec, compute_dtype, create_module, init_variables
from advtransfer.source import SourceRecipe, load_source, num_steps, start_training
from advtransfer.study import (
    Cell,
    Trial,
    accelerator_hours,
    caches_of,
    candidates,
    choose,
    connect,
    finished_rows,
    flatten,
    format_seconds,
    group,
    make_trials,
    measure_speed,
    pieces_of,
    predict_seconds,
    trial_steps,
    with_choices,
)
from advtransfer.tasks.source import training_plan
from advtransfer.tasks.study_inputs import StudyInputs
from advtransfer.tasks.workdir import Job

_STEPS, _SECONDS = 5, 3.0  # of a source's training that are timed at least


def plan_lines(job: Job, inputs: StudyInputs) -> list[str]:
    """A line for each source, and what the trials take that are not finished."""
    options, training = job.options, inputs.training
    dtype = options.run.dtype
    models = {source.key: source.model for source in inputs.sources}
    plans = {x.key: f"source {x.key}: {x.place}, {x.spec.architecture}" for x in inputs.sources}
    missing = []
    for source, recipe, dataset in inputs.trained_here:
        place = storage.to_path(source.place)
        models[source.key] = load_source(recipe, place, dtype=dtype)
        plans[source.key] = training_plan(recipe, dataset, place, name=source.key)
        if models[source.key] is None:
            missing.append((source.name, recipe))
    lines = list(plans.values())
    trials, tried = _trials(job, inputs, models)
    rows = finished_rows(job.workdir / "rows")
    left = [trial for trial in trials if trial.identity() not in rows]
    lines.append(
        f"fine-tune {len(left):,} of {len(trials):,} models in "
        f"{len(group(left, size=options.study.group_size)):,} groups, {sum(map(trial_steps, left)):,} steps "
        f"of {options.recipe.batch_size} images"
    )
    if tried:
        lines.append(f"before them {len(tried):,} on validation images, to choose hyper-parameters")
    # Nothing is measured for what is not here yet: a large network takes minutes on a CPU.
    datasets = [*inputs.targets.values(), *([training] if training else [])]
    fetched = all(source.model is None or source.model.variables for source in inputs.sources)
    is_here = fetched and not any(dataset.is_placeholder for dataset in datasets)
    calibration = options.study.calibration if is_here else 0.0
    workers = 0
    if options.study.engine == "ray":
        groups = len(group([*tried, *left], size=options.study.group_size))
        with connect(options.study.ray_address, device=options.study.ray_device) as cluster:
            workers = cluster.num_workers()
        lines.append(
            f"on Ray: {len(missing):,} trainings of sources and {groups:,} groups, each a task; {workers:,} "
            f"workers with {cluster.device} each"
        )
    if tried or left:
        known = {x.name: model for x in inputs.sources if (model := models[x.key]) is not None}
        known |= {name: _untrained(recipe, dtype) for name, recipe in missing if name not in known}
        lines += _costs(inputs, [*tried, *left], known, calibration, workers)
    if training and missing and calibration:
        recipes = Counter(recipe for _, recipe in missing)  # each is timed once for all seeds
        seconds = sum(recipes[recipe] * _training_seconds(recipe, training, dtype) for recipe in recipes)
        lines.append(f"predicted here before that, training of the sources: {format_seconds(seconds)}")
    if options.study.calibration and not is_here:
        lines.append("nothing is measured here before all of the following is there")
    return lines


def _trials(
    job: Job, inputs: StudyInputs, models: dict[str, Model | None]
) -> tuple[list[Trial], list[Trial]]:
    """The study's trials, and those of the search that are not finished."""
    options, start_of = job.options, inputs.start_of(models)

    def trials_on(split: str) -> dict[Cell, list[Trial]]:
        grid, stratified = options.grid.on(split), options.target.stratified
        return make_trials(grid, options.recipe, inputs.cells, start_of, stratified=stratified)

    trials, tried = trials_on(options.grid.split), []
    if options.search.is_asked:
        found = candidates(options.search, trials_on("validation"))
        rows = finished_rows(job.workdir / "search")
        tried = [trial for trial in flatten(found) if trial.identity() not in rows]
        if not tried:
            trials = with_choices(trials, choose(found, itertools.chain(*rows.values()))[0])
    return flatten(trials), tried


def _costs(
    inputs: StudyInputs, trials: list[Trial], models: dict[str, Model], calibration: float, workers: int
) -> list[str]:
    """What trials take; `calibration` seconds are measured to predict how long it takes here and on Ray's
    workers; 0: no prediction."""
    splits = {trial.split for trial in trials}
    datasets = {
        target.digest("train", split): target
        for target in inputs.targets.values()
        for split in splits
        if getattr(target, split).num_images
    }
    networks = {name: (model.module, model.spec.image_size) for name, model in models.items()}
    pieces = pieces_of(trials, networks, datasets)
    caches = caches_of(pieces, datasets)
    flops = sum(piece.number * piece.flops for piece in pieces), sum(cache.flops for cache in caches)
    images = max(target.train.nbytes + target.test.nbytes for target in inputs.targets.values())
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
        speeds = measure_speed(pieces, models, datasets, budget=calibration)
        device = jax.local_devices()[0].device_kind
        seconds = predict_seconds(pieces, caches, speeds)
        lines.append(
            f"predicted here ({parallel.num_devices()} × {device}), by running the beginning of k = "
            f"{', '.join('all' if k == -1 else str(k) for k in sorted(speeds))}: "
            f"{format_seconds(seconds)}"
        )
        if workers:
            lines.append(
                f"on {workers:,} workers that are as fast: {format_seconds(seconds / workers)}, but no less "
                "than the longest group"
            )
    return lines


def _untrained(recipe: SourceRecipe, dtype: str) -> Model:
    """A network in the place of one that is not trained yet: a step takes as long, whatever the weights."""
    module = create_module(recipe.architecture, mean=recipe.mean, std=recipe.std, dtype=compute_dtype(dtype))
    variables = init_variables(module, jax.random.key(0), recipe.image_size)
    spec = ModelSpec(recipe.architecture, module.num_classes, recipe.image_size, module.mean, module.std)
    return Model(module, variables, spec)


def _training_seconds(recipe: SourceRecipe, dataset: Dataset, dtype: str) -> float:
    """Of training a source from the beginning, by its first steps."""
    run = start_training(recipe, dataset, dtype=dtype)
    times, state, number = [], run.state, num_steps(recipe, dataset)
    try:
        deadline = math.inf
        while len(times) <= _STEPS or (time.monotonic() < deadline and len(times) < number):
            started = time.monotonic()
            state, metrics = run.run_step(state, len(times))
            jax.block_until_ready(metrics)
            times.append(time.monotonic() - started)
            if len(times) == 1:  # it compiles
                deadline = time.monotonic() + _SECONDS
        return times[0] + number * statistics.median(times[1:])
    finally:
        run.close()
