"""stage=study: trains the sources that are not there yet, runs the grid, writes the report.

Leaves in the workdir: `sources/NAME/` as stage=source does (`sources/NAME_seed_SEED/` for other seeds than
the first), `rows/` with a file per finished group,
`rows.csv`, `summary.csv`, `figures/`, `report.html`; with a search of hyper-parameters also `search/` and
`search.csv`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np

from advtransfer import parallel, storage
from advtransfer.config import ConfigError, Options
from advtransfer.data import Dataset, to_float
from advtransfer.data.cache import cache_folder
from advtransfer.evaluate import evaluation_key, predict
from advtransfer.foreign import AnyPath
from advtransfer.models import Model, logits_fn
from advtransfer.progress import progress_bar
from advtransfer.report import Evidence, headline, write_report, write_rows
from advtransfer.report.files import csv_text
from advtransfer.study import Cluster, call_each, claim, connect, run_cells, run_here, run_on
from advtransfer.tasks.interpret import study_sections
from advtransfer.tasks.source import train_and_measure
from advtransfer.tasks.study_inputs import StudyInputs, look_up
from advtransfer.tasks.study_plan import plan_lines
from advtransfer.tasks.workdir import Job, check_workdir, open_workdir, versions

_MAX_NAMED = 30  # classes in the report

_SEARCHED = (
    "Learning rate, weight decay and epochs were chosen for every source, target, n and k by the accuracy on "
    "validation images (search.csv); those trials are not among the rows of this report."
)


def run(job: Job) -> None:
    inputs, options, workdir = look_up(job), job.options, job.workdir
    with _cluster(job, inputs) as cluster:
        open_workdir(job)
        with _one_at_a_time(workdir / "sources.lock"):
            own, evaluations = _sources(options, inputs, cluster)
        start_of = inputs.start_of({source.key: source.model for source in inputs.sources} | own)
        result = run_cells(
            options.grid,
            options.recipe,
            inputs.cells,
            start_of,
            workdir,
            search=options.search,
            stratified=options.target.stratified,
            group_size=options.study.group_size,
            engine=run_on(cluster) if cluster else run_here,
            progress=_progress,
        )
    if not parallel.is_main_process():
        return
    split = options.grid.split
    shown = {
        source.name: own[source.key] for source in inputs.sources if source.key in own and source.is_first
    }
    first = next((cell for cell in inputs.cells if cell.source in shown), inputs.cells[0])
    starts = {name: m for name in shown if (m := start_of(first._replace(source=name), split).model)}
    target = start_of(first, split).dataset
    pictures, captions = _pictures(options, shown, inputs.training, target)
    evidence = Evidence(
        sources=evaluations,
        pictures=pictures,
        captions=captions,
        config=job.settings,
        versions=versions(),
        command=job.command,
        remarks=(*options.report.remarks, *([_SEARCHED] if result.search else []), *_remarks(inputs)),
        sections=study_sections(options, shown, inputs.training, starts, target, workdir / "sections"),
    )
    with _one_at_a_time(workdir / "report.lock"):
        if result.search:
            storage.write(workdir / "search.csv", csv_text(result.search, list(result.search[0])))
        write_rows(result.rows, workdir / "rows.csv")
        about = options.report
        path = write_report(
            result.rows, workdir, evidence=evidence, title=about.title, reference=about.reference
        )
    print(*headline(result.rows), f"report: {path}", sep="\n")


def plan(job: Job) -> str:
    inputs = look_up(job, planned=True)
    check_workdir(job)
    return "\n".join(plan_lines(job, inputs))


@contextlib.contextmanager
def _cluster(job: Job, inputs: StudyInputs) -> Generator[Cluster | None]:
    """The Ray cluster that config.study asks for; None: this process runs everything."""
    options = job.options
    if options.study.engine == "local":
        yield None
        return
    if parallel.num_processes() > 1:
        raise ConfigError("config.study.engine=ray runs in one process: leave --multihost away")
    check_workdir(job)
    run = options.run
    with connect(
        options.study.ray_address,
        device=options.study.ray_device,
        folder=job.workdir if inputs.trained_here else None,
        programs=cache_folder(run.cache_dir) / "programs" if run.keep_programs else None,
    ) as cluster:
        yield cluster


def _sources(
    options: Options, inputs: StudyInputs, cluster: Cluster | None
) -> tuple[dict[str, Model], list[dict[str, Any]]]:
    """The sources that the study trains, by key, and what was measured of each."""
    trained = inputs.trained_here
    if cluster:  # which leaves each in its folder, where the following finds it
        left = {
            x.key: (_from_seed(options, x.seed), recipe, dataset, storage.to_path(x.place))
            for x, recipe, dataset in trained
            if not (storage.to_path(x.place) / "evaluation.json").exists()
        }
        for _ in progress_bar(
            call_each(cluster, train_and_measure, left), "train", "sources", total=len(left)
        ):
            pass
    own, evaluations = {}, []
    for source, recipe, dataset in trained:
        from_seed, place = _from_seed(options, source.seed), storage.to_path(source.place)
        own[source.key], found = train_and_measure(from_seed, recipe, dataset, place)
        about = {"name": source.name, "seed": source.seed, "norm": recipe.norm, "eps": recipe.eps}
        evaluations.append(about | found)
    return own, evaluations


def _from_seed(options: Options, seed: int) -> Options:
    return options._replace(run=replace(options.run, seed=seed))


def _progress(name: str, groups: Iterable, number: int) -> Iterable:
    return progress_bar(groups, {"rows": "fine-tune"}.get(name, name), "groups", total=number)


def _one_at_a_time(lock: AnyPath) -> AbstractContextManager:
    """For processes that know nothing of each other; those of one run work together, or one does it."""
    return nullcontext() if parallel.num_processes() > 1 else claim(lock, wait=True)


def _remarks(inputs: StudyInputs) -> list[str]:
    """What a reader should know of the source's and the targets' images."""
    targets = {place.target: target for place, target in inputs.targets.items()}
    remarks = []
    for name, target in targets.items():
        more = f", … ({len(target.class_names)})" if len(target.class_names) > _MAX_NAMED else ""
        remarks.append(f"The classes of {name}: {', '.join(target.class_names[:_MAX_NAMED])}{more}.")
    everything = [*([inputs.training] if inputs.training else []), *targets.values()]
    known = {dataset.name: dataset.remarks for dataset in everything}
    return remarks + [f"{name}: {remark}." for name, those in known.items() for remark in those]


def _pictures(
    options: Options, models: dict[str, Model], dataset: Dataset | None, target: Dataset
) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """Source images with adversarial examples of them, and target images, with their captions."""
    number = options.report.num_pictures
    train = target.in_memory("train")
    pictures = {"target_images": train.images[:number] / np.float32(255)}
    captions = {"target_labels": [target.class_names[i] for i in train.labels[:number]]}
    attack = options.evaluation.attack
    if dataset is None or attack is None or not number:
        return pictures, captions
    measured = dataset.in_memory(options.measured.split)
    names, labels = dataset.class_names, measured.labels[:number]
    images = to_float(np.asarray(measured.images[:number]), options.training.image_size)
    pictures["source_images"] = np.asarray(images)
    captions["source_labels"] = [names[i] for i in labels]
    for source, model in models.items():
        network = logits_fn(model)
        attacked = attack(network, images, labels, key=evaluation_key(options.run.seed))
        pictures[f"adversarial/{source}"] = np.asarray(attacked)
        for kind, shown in (("natural", images), ("adversarial", attacked)):
            classes = np.argmax(predict(network, shown), axis=-1)
            captions[f"{kind}_predictions/{source}"] = [names[i] for i in classes]
    return pictures, captions
