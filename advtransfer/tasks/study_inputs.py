"""What config.study names, looked up: sources, targets, and what trials start from."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

from advtransfer.config import names_key
from advtransfer.data import Dataset
from advtransfer.models import Model, ModelSpec, create_module, identity
from advtransfer.source import SourceRecipe, against
from advtransfer.study import Cell, Source, Start, make_cells, make_trials
from advtransfer.tasks.inputs import (
    find_model,
    is_trained_here,
    load_data,
    model_name,
    split_names,
    study_targets,
)
from advtransfer.tasks.source import load_source_data
from advtransfer.tasks.workdir import Job
from advtransfer.transfer import first_unfrozen_block, normalised_by


class StudySource(NamedTuple):
    """A source that config.study.sources names."""

    name: str
    place: str  # the folder where it is trained, or the name of the model
    spec: SourceRecipe | ModelSpec  # how it is trained, or what a model from elsewhere is
    model: Model | None  # one from elsewhere; has no variables where it is to be downloaded


class Place(NamedTuple):
    """How a target is loaded."""

    target: str
    view: str
    image_size: int
    is_whole: bool  # nothing is set aside for validation


class StudyInputs(NamedTuple):
    """Sources, targets and cells of a study."""

    sources: list[StudySource]
    training: Dataset | None  # what sources are trained on, if any are
    cells: list[Cell]
    targets: dict[Place, Dataset]
    input_norm: str

    @property
    def trained_here(self) -> list[tuple[StudySource, SourceRecipe, Dataset]]:
        """The sources that the study trains, each with its recipe and what it is trained on."""
        data = self.training
        return [(x, x.spec, data) for x in self.sources if isinstance(x.spec, SourceRecipe) and data]

    def place(self, cell: Cell, split: str) -> Place:
        """Where a cell's target is: whole if all images are asked for, and nothing is validated."""
        size = next(source.spec.image_size for source in self.sources if source.name == cell.source)
        return Place(cell.target, cell.view, size, cell.num_train_images == -1 and split == "test")

    def start_of(self, models: Mapping[str, Model | None]) -> Callable[[Cell, str], Start]:
        """(cell, split) to what its trials start from; `models` are the networks by the sources' names.

        What is returned raises a ConfigError for images that a source cannot be normalised by.
        """
        specs = {source.name: source.spec for source in self.sources}
        # Weights that are not there yet are nobody else's.
        identities = {
            name: identity(model) if model is not None and model.variables else f"not there yet: {name}"
            for name, model in models.items()
        }

        @functools.cache
        def start(name: str, place: Place) -> Start:
            spec, model, target, own = specs[name], models[name], self.targets[place], identities[name]
            is_normalised = self.input_norm == "target" and spec.norm == "none" and not target.is_placeholder
            if is_normalised and model is not None and model.variables:
                with names_key("transfer.input_norm"):
                    model = normalised_by(model, target.in_memory("train").images)
                own = identity(model)
            return Start(Source(name, spec.norm, spec.eps, own), model, target)

        return lambda cell, split: start(cell.source, self.place(cell, split))


def look_up(job: Job, *, planned: bool = False) -> StudyInputs:
    """The sources and the targets, after everything that the config names has been looked up.

    Args:
      job: of the study.
      planned: whether nothing is downloaded, and known sets that are not prepared come as placeholders.

    Raises:
      ConfigError: naming the key.
    """
    options, grid = job.options, job.options.grid
    with names_key("study.sources"):
        sources = [_find_source(job, text, planned=planned) for text in split_names(options.study.sources)]
        if not sources:
            raise ValueError("name sources, comma-separated: natural, NORM:EPS or models by name")
        names = [source.name for source in sources]
        if twice := next((name for name in names if names.count(name) > 1), ""):
            raise ValueError(f"two sources are called {twice!r}: rename a file, or leave one away")
    is_training = any(source.model is None for source in sources)
    training = load_source_data(options, planned=planned) if is_training else None
    with names_key("study.num_unfrozen_blocks"):
        for source, k in itertools.product(sources, grid.num_unfrozen_blocks):
            first_unfrozen_block(create_module(source.spec.architecture, num_classes=1), k)
    key, targets = study_targets(options)
    cells = make_cells(grid, names, targets, options.study.views or (options.target.view,))
    inputs = StudyInputs(sources, training, cells, {}, options.target.input_norm)
    also = ("validation",) if options.search.is_asked else ()
    for cell, split in itertools.product(cells, (grid.split, *also)):
        place = inputs.place(cell, split)
        if place not in inputs.targets:
            inputs.targets[place] = load_data(
                options.run,
                key,
                place.target,
                image_size=place.image_size,
                splits=("train", grid.split, *(() if place.is_whole else also)),
                view=place.view,
                set_aside=not place.is_whole,
                planned=planned,
            )
    with names_key("study.num_train_images"):  # whether there are as many images, before anything is trained
        once = replace(grid, num_seeds=1, seeds=())
        make_trials(once, options.recipe, cells, inputs.start_of(dict.fromkeys(names)))
    return inputs


def _find_source(job: Job, text: str, *, planned: bool) -> StudySource:
    """ "natural", "l2:0.5" (both trained here, by the one recipe of config.train), or a model by name."""
    if is_trained_here(text):
        place = job.workdir / "sources" / text.replace(":", "_")
        return StudySource(text, str(place), against(job.options.training, text), None)
    model = find_model(text, job.options.run.dtype, planned=planned)
    return StudySource(model_name(text), text, model.spec, model)
