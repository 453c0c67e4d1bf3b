"""stage=study: trains the sources that are not there yet, runs the grid, writes the report.

Leaves in the workdir: `sources/NAME/` as stage=source does, `rows/` with a file per finished group,
`rows.csv`, `summary.csv`, `figures/`, `report.html`; with a search of hyper-parameters also `search/`
and `search.csv`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from advtransfer import parallel, storage
from advtransfer.data import Dataset, to_float
from advtransfer.evaluate import predict
from advtransfer.models import Model, logits_fn
from advtransfer.progress import progress_bar
from advtransfer.report import Evidence, headline, write_report, write_rows
from advtransfer.source import evaluation_attack, evaluation_key, load_source_data, train_source
from advtransfer.stages.interpret import study_sections
from advtransfer.stages.source import measure_once
from advtransfer.stages.study_grid import Grid, look_up, starts, trials_of
from advtransfer.stages.study_plan import plan_lines
from advtransfer.stages.workdir import check_workdir, open_workdir, versions
from advtransfer.study import (
    Cell,
    Trial,
    candidates,
    choose,
    claim,
    flatten,
    is_asked,
    run_trials,
    to_csv,
    with_choices,
)

_MAX_NAMED = 30  # classes in the report

_SEARCHED = (
    "Learning rate, weight decay and epochs were chosen for every source, target, n and k by the accuracy on "
    "validation images (search.csv); those trials are not among the rows of this report."
)


def run(config: ConfigDict, workdir: Path) -> None:
    grid = look_up(config, workdir, searched=is_asked(config.study))
    open_workdir(config, workdir)
    trained = [source for source in grid.asked if source.config is not None]
    dataset = load_source_data(config) if trained else None
    with _one_at_a_time(workdir / "sources.lock"):
        models = {
            source.name: source.model or train_source(source.config, source.place, name=source.name)
            for source in grid.asked
        }
        evaluations = [
            {"name": source.name, "norm": source.norm, "eps": source.eps}
            | measure_once(
                config, models[source.name], dataset, storage.to_path(source.place), name=source.name
            )
            for source in trained
        ]
    found = starts(config, grid, models)
    remarks = list(config.report.remarks)
    trials = trials_of(config, grid, found)
    if is_asked(config.study):
        trials = _with_choices(config, grid, found, trials, workdir)
        remarks.append(_SEARCHED)
    rows = _run(config, grid, found, trials, workdir / "rows")
    if not parallel.is_main_process():
        return
    place = next(p for p in grid.targets if all((source.name, p) in found for source in trained))
    target, begun = grid.targets[place], {source.name: found[source.name, place].model for source in trained}
    own = {source.name: models[source.name] for source in trained}
    pictures, captions = _pictures(config, own, dataset, target)
    evidence = Evidence(
        sources=evaluations,
        pictures=pictures,
        captions=captions,
        config=config.to_dict(),
        versions=versions(),
        command=config.report.command,
        remarks=(*remarks, *_remarks(dataset, grid)),
        sections=study_sections(config, own, dataset, begun, target, workdir / "sections"),
    )
    shown = {"title": config.report.title, "reference": config.report.reference}
    with _one_at_a_time(workdir / "report.lock"):
        write_rows(rows, workdir / "rows.csv")
        path = write_report(rows, workdir, evidence=evidence, **shown)
    print(*headline(rows), f"report: {path}", sep="\n")


def _with_choices(
    config: ConfigDict, grid: Grid, found: dict, trials: dict[Cell, list[Trial]], workdir: Path
) -> dict[Cell, list[Trial]]:
    """The trials with what is best on validation images; leaves `search/` and `search.csv`."""
    tried = candidates(config, trials_of(config, grid, found, validate=True))
    best, table = choose(tried, _run(config, grid, found, tried, workdir / "search"))
    if parallel.is_main_process():
        storage.write(workdir / "search.csv", to_csv(table))
    return with_choices(trials, best)


def _run(
    config: ConfigDict, grid: Grid, found: dict, trials: dict[Cell, list[Trial]], folder: Path
) -> list[dict]:
    every = flatten(trials)
    said = "fine-tune" if folder.name == "rows" else "search"
    return run_trials(
        every,
        {start.source.identity: start.model for start in found.values()},
        grid.datasets(every),
        folder,
        group_size=config.study.group_size,
        progress=lambda groups, number: progress_bar(groups, said, "groups", total=number),
    )


def _one_at_a_time(lock: Path) -> AbstractContextManager:
    """For processes that know nothing of each other; those of one run work together, or one does it."""
    return nullcontext() if parallel.num_processes() > 1 else claim(lock, wait=True)


def plan(config: ConfigDict, workdir: Path) -> str:
    grid = look_up(config, workdir, searched=is_asked(config.study), planned=True)
    check_workdir(config, workdir)
    return "\n".join(plan_lines(config, grid, workdir))


def _remarks(dataset: Dataset | None, grid: Grid) -> list[str]:
    """What a reader should know of the source's and the targets' images."""
    targets = {place.target: target for place, target in grid.targets.items()}
    remarks = []
    for name, target in targets.items():
        more = f", … ({len(target.class_names)})" if len(target.class_names) > _MAX_NAMED else ""
        remarks.append(f"The classes of {name}: {', '.join(target.class_names[:_MAX_NAMED])}{more}.")
    everything = [*([dataset] if dataset else []), *targets.values()]
    told = {dataset.name: dataset.remarks for dataset in everything}
    return remarks + [f"{name}: {remark}." for name, those in told.items() for remark in those]


def _pictures(
    config: ConfigDict, models: dict[str, Model], dataset: Dataset | None, target: Dataset
) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """Source images with adversarial examples of them, and target images, with what stands under them."""
    number = config.report.num_pictures
    pictures = {"target_images": target.train.images[:number] / np.float32(255)}
    captions = {"target_labels": [target.class_names[i] for i in target.train.labels[:number]]}
    attack = evaluation_attack(config)
    if not models or attack is None or not number:
        return pictures, captions
    names = dataset.class_names
    labels = dataset.test.labels[:number]
    images = to_float(np.asarray(dataset.test.images[:number]), config.train.image_size)
    pictures["source_images"] = np.asarray(images)
    captions["source_labels"] = [names[i] for i in labels]
    for source, model in models.items():
        network = logits_fn(model)
        attacked = attack(network, images, labels, key=evaluation_key(config))
        pictures[f"adversarial/{source}"] = np.asarray(attacked)
        for kind, shown in (("natural", images), ("adversarial", attacked)):
            classes = np.argmax(predict(network, shown), axis=-1)
            captions[f"{kind}_predictions/{source}"] = [names[i] for i in classes]
    return pictures, captions
