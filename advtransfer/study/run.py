"""Running a study: group after group, each by one process, what is finished never again."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from advtransfer import parallel, storage
from advtransfer.data import Dataset
from advtransfer.foreign import AnyPath
from advtransfer.models import Model, identity
from advtransfer.options import to_dict
from advtransfer.study.claims import divide
from advtransfer.study.rows import Row, finished_rows, history_rows, holds
from advtransfer.study.search import Search, candidates, choose, with_choices
from advtransfer.study.trials import (
    Cell,
    Grid,
    Source,
    Start,
    Trial,
    check_trainings,
    flatten,
    group,
    make_cells,
    make_trials,
    rates_of,
    trial_steps,
)
from advtransfer.transfer import (
    Prepared,
    Rates,
    Recipe,
    fine_tune_many,
    first_unfrozen_block,
    normalised_by,
    own_statistics,
    prepare,
)

if TYPE_CHECKING:
    from pandas import DataFrame


def run_group(
    trials: Sequence[Trial], model: Model, dataset: Dataset, prepared: Prepared | None = None
) -> list[Row]:
    """Runs a group; one row per trial and evaluated epoch. Out of memory, it is run in halves.

    Args:
      trials: as `group` puts them together.
      model, dataset: their source and target.
      prepared: of `transfer.prepare`, if it is at hand.
    """
    first, train = trials[0], dataset.in_memory("train")
    rates = list(dict.fromkeys(rates_of(trials)))
    seeds = trials[:: len(rates)]
    started = time.monotonic()
    try:
        history = fine_tune_many(
            model,
            train,
            dataset.in_memory(first.split),
            subsets=np.stack([trial.subset(train.labels) for trial in seeds]),
            keys=jnp.stack([trial.key() for trial in seeds]),
            num_classes=len(dataset.class_names),
            num_unfrozen_blocks=first.num_unfrozen_blocks,
            recipe=first.recipe,
            rates=Rates(*jnp.asarray(rates, jnp.float32).T),
            prepared=prepared,
        )
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) or len(seeds) == 1:
            raise
        logging.warning("out of memory with %d trials at once: half as many", len(trials))
        half = len(seeds) // 2 * len(rates)
        parts = trials[:half], trials[half:]
        return [row for part in parts for row in run_group(part, model, dataset, prepared)]
    seconds = (time.monotonic() - started) / len(trials)
    rows = []
    for t, trial in enumerate(trials):
        own = {name: x[divmod(t, len(rates))] for name, x in history.items()}
        rows += history_rows(trial, own, seconds)
    return rows


class GroupRunner:
    """Runs groups one after another; what several share is prepared once for those that follow each other.

    Args:
      groups: of the whole grid, finished ones too: rounding depends on the number of images that are prepared
        together, and must not on what is left.
      models, datasets: as `run_trials`.
    """

    def __init__(
        self,
        groups: Mapping[str, Sequence[Trial]],
        models: Mapping[str, Model],
        datasets: Mapping[str, Dataset],
    ):
        self._groups, self._models, self._datasets = groups, models, datasets
        self._prepared_for: tuple = ()
        self._prepared: Prepared | None = None

    def run(self, trials: Sequence[Trial]) -> list[Row]:
        """Rows of the trials of a group."""
        first = trials[0]
        model, dataset = self._models[first.source.identity], self._datasets[first.data]
        if shared_inputs(first) != self._prepared_for:
            self._prepared = None  # before the next: both may not fit into memory
            self._prepared_for = shared_inputs(first)
            alike = [ts for ts in self._groups.values() if shared_inputs(ts[0]) == self._prepared_for]
            self._prepared = _prepare(list(itertools.chain(*alike)), model, dataset)
        rows = []
        for members in group(trials):
            rows += run_group(members, model, dataset, self._prepared)
        return rows


class Groups(NamedTuple):
    """The groups of a study."""

    folder: AnyPath  # of their files
    all: Mapping[str, Sequence[Trial]]  # by the names of their files
    missing: Mapping[str, Sequence[Trial]]  # the trials of each that are not finished
    models: Mapping[str, Model]
    datasets: Mapping[str, Dataset]

    @property
    def left(self) -> list[str]:
        """Those that are not finished, longest first."""
        return [name for name in _longest_first(self.all) if self.missing[name]]

    def is_done(self, name: str) -> bool:
        return holds(self.folder / f"{name}.jsonl", self.missing[name])

    def write(self, name: str, rows: Iterable[Row]) -> None:
        storage.write(self.folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


Engine = Callable[[Groups], Iterable[str]]  # runs groups, and gives the name of each that is finished


def run_here(groups: Groups) -> Generator[str]:
    """The engine of this process, and of others that share the folder."""
    runner = GroupRunner(groups.all, groups.models, groups.datasets)
    # Closed here, or the traceback of an exception would hold its claim for as long as a notebook keeps it.
    with contextlib.closing(divide(groups.left, groups.folder, groups.is_done)) as own:
        for name in own:
            groups.write(name, runner.run(groups.missing[name]))
            yield name


def run_trials(
    trials: Sequence[Trial],
    models: dict[str, Model],
    datasets: Mapping[str, Dataset],
    folder: str | os.PathLike[str],
    *,
    group_size: int = 0,
    engine: Engine = run_here,
    progress: Callable[[Iterable, int], Iterable] = lambda groups, number: groups,
) -> list[Row]:
    """Rows of all trials; those that `folder` already holds are not run again, damaged files are set aside.

    Args:
      trials: the grid.
      models: the sources' networks by their identity.
      datasets: targets by the digest that trials know them by, `Trial.data`.
      folder: where every finished group leaves its file.
      group_size: as `group`.
      engine: what runs the groups.
      progress: (groups of this process as they are finished, number of all that are left) to the same groups,
        to draw a bar.
    """
    folder = storage.to_path(folder)
    storage.make_folder(folder)
    finished = finished_rows(folder, set_aside=True)
    # The same weights under two names are one trial. Groups are of the whole grid, whatever is finished, so
    # that all processes divide it in the same way.
    every, missing = {}, {}
    for members in group({t.identity(): t for t in trials}.values(), size=group_size):
        name = hashlib.sha256("".join(t.identity() for t in members).encode()).hexdigest()[:32]
        every[name] = members
        missing[name] = [trial for trial in members if trial.identity() not in finished]
    groups = Groups(folder, every, missing, models, datasets)
    for _ in progress(engine(groups), len(groups.left)):
        pass
    finished = finished_rows(folder)
    return [
        row | {"source": trial.source.name, "source_seed": trial.source.seed, "config": trial.config()}
        for trial in trials
        for row in finished[trial.identity()]
    ]


def _longest_first(groups: Mapping[str, Sequence[Trial]]) -> list[str]:
    """The names of groups: the longest last would leave the other processes waiting. What shares its prepared
    inputs stays together."""
    work = {name: sum(map(trial_steps, members)) for name, members in groups.items()}
    shared = {name: shared_inputs(members[0]) for name, members in groups.items()}
    longest: dict[tuple, int] = {}
    for name, inputs in shared.items():
        longest[inputs] = max(longest.get(inputs, 0), work[name])

    def key(name: str) -> tuple:
        # Networks with more to train take longer for a step; -1 unfrozen blocks are more than any number.
        k = shared[name][0] % 10**6
        return -k, -longest[shared[name]], shared[name], -work[name], name

    return sorted(groups, key=key)


def shared_inputs(trial: Trial) -> tuple:
    """What `transfer.prepare` depends on."""
    recipe = trial.recipe
    shared = (trial.source.identity, trial.data, trial.split, recipe.frozen_batch_norm, recipe.num_views)
    return trial.num_unfrozen_blocks, *shared, recipe.augmentation


def _prepare(trials: Sequence[Trial], model: Model, dataset: Dataset) -> Prepared | None:
    """For all `trials`, which share what `transfer.prepare` depends on."""
    first, train = trials[0], dataset.in_memory("train")
    if own_statistics(first.recipe, first.num_unfrozen_blocks):
        return None
    one_each = {trial._replace(source=first.source, recipe=first.recipe) for trial in trials}
    used = np.unique(np.concatenate([trial.subset(train.labels) for trial in one_each]))
    test = dataset.in_memory(first.split)
    prepared = prepare(model, train, test, first.recipe, first.num_unfrozen_blocks, used=used)
    shared = parallel.replicate((prepared.batch_stats, prepared.task), parallel.num_devices())
    return Prepared(*shared, prepared.rows)


class StudyResult(NamedTuple):
    """What a study found."""

    rows: list[Row]  # of all trials
    search: list[dict[str, object]]  # the table of `choose`; empty without a search


def run_cells(
    grid: Grid,
    recipe: Recipe,
    cells: Sequence[Cell],
    start_of: Callable[[Cell, str], Start],
    folder: str | os.PathLike[str],
    *,
    search: Search = Search(),
    stratified: bool = True,
    group_size: int = 0,
    engine: Engine = run_here,
    progress: Callable[[str, Iterable, int], Iterable] = lambda name, groups, number: groups,
) -> StudyResult:
    """Runs the trials of all cells, after the search of hyper-parameters where one is asked for.

    Args:
      grid, recipe, search, stratified: which trials.
      cells: the grid's, in the order of its rows.
      start_of: as for `make_trials`.
      folder: where finished groups leave their rows, in `rows/` and `search/`.
      group_size, engine: as `run_trials`.
      progress: as in `run_trials`, with a name before.

    Raises:
      ValueError: as `make_trial`.
    """
    workdir = storage.to_path(folder)

    def run(name: str, trials: Mapping[Cell, Sequence[Trial]], split: str) -> list[Row]:
        starts = [start_of(cell, split) for cell in trials]
        models = {start.source.identity: start.model for start in starts if start.model is not None}
        datasets = {start.dataset.digest("train", split): start.dataset for start in starts}
        bar = functools.partial(progress, name)
        return run_trials(
            flatten(trials),
            models,
            datasets,
            workdir / name,
            group_size=group_size,
            engine=engine,
            progress=bar,
        )

    trials, table = make_trials(grid, recipe, cells, start_of, stratified=stratified), []
    if search.is_asked:
        validated = make_trials(grid.on("validation"), recipe, cells, start_of, stratified=stratified)
        tried = candidates(search, validated)
        best, table = choose(tried, run("search", tried, "validation"))
        trials = with_choices(trials, best)
    return StudyResult(run("rows", trials, grid.split), table)


def run_study(
    grid: Grid,
    sources: Mapping[str, Model | Sequence[Model]],
    targets: Mapping[str, Dataset],
    *,
    recipe: Recipe = Recipe(),
    folder: str | os.PathLike[str],
    search: Search = Search(),
    stratified: bool = True,
    input_norm: str = "source",
    engine: Engine = run_here,
) -> DataFrame:
    """Fine-tunes every source on every target for every n, k and seed of a grid.

    The same call goes on where an earlier one stopped. Any number of processes may make it at the same time.

    Args:
      grid: which n, k and seeds, and the split that is measured.
      sources, targets: networks and datasets by the names that rows give them; several networks of one name
        are trainings from several seeds, which rows number from 0.
      recipe: how each is fine-tuned.
      folder: where finished trials are kept.
      search: hyper-parameters that are chosen on validation images first.
      stratified: see `subset_indices`.
      input_norm: "source", or "target": natural sources normalise by the target's training images.
      engine: what runs the groups of trials; the default is this process.

    Returns:
      A pandas DataFrame of the columns of `report.COLUMNS`, a row per trial and evaluated epoch, which
      `report.write_report` takes.

    Raises:
      ValueError: more blocks or images than there are, networks of one name that are not of one kind, or
        `folder` holds files of something else.
    """
    import pandas as pd

    folder = storage.to_path(folder)
    storage.check_ours(folder, "study.json", "config.json")
    networks: dict[str, tuple[Model, str, int]] = {}
    for name, own in sources.items():
        several = [own] if isinstance(own, Model) else own
        check_trainings(name, several)
        for seed, model in enumerate(several):
            for k in grid.num_unfrozen_blocks:
                first_unfrozen_block(model.module, k)
            key = f"{name}_seed_{seed}" if seed else name
            if key in networks:
                raise ValueError(f"two sources are called {key!r}: rename one")
            networks[key] = model, name, seed

    @functools.cache
    def start(key: str, target: str) -> Start:
        (model, name, seed), dataset = networks[key], targets[target]
        if input_norm == "target" and model.spec.norm == "none":
            model = normalised_by(model, dataset.in_memory("train").images)
        source = Source(name, model.spec.norm, model.spec.eps, identity(model), seed)
        return Start(source, model, dataset._replace(name=target))

    def start_of(cell: Cell, split: str) -> Start:
        return start(cell.source, cell.target)

    cells = make_cells(grid, networks, targets)
    make_trials(grid, recipe, cells, start_of)  # whether there are as many images, before anything is written
    storage.make_folder(folder)
    storage.write(folder / "study.json", json.dumps(to_dict(grid), indent=1) + "\n")
    found = run_cells(
        grid, recipe, cells, start_of, folder, search=search, stratified=stratified, engine=engine
    )
    return pd.DataFrame(found.rows)
