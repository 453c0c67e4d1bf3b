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
from advtransfer.study import Cell, Source, Start, check_trainings, make_cells, make_trials
from advtransfer.tasks.inputs import (
    find_model,
    find_source_models,
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
    """A network of a source that config.study.sources names."""

    key: str  # in cells; the name, but for other seeds than the first
    name: str  # in rows
    seed: int  # that it is trained from, or the number of a model from elsewhere
    place: str  # the folder where it is trained, or the name of the model
    spec: SourceRecipe | ModelSpec  # how it is trained, or what a model from elsewhere is
    model: Model | None  # one from elsewhere; has no variables where it is to be downloaded

    @property
    def is_first(self) -> bool:
        """Whether it is the one that pictures show of its source."""
        return self.key == self.name


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
        size = next(source.spec.image_size for source in self.sources if source.key == cell.source)
        return Place(cell.target, cell.view, size, cell.num_train_images == -1 and split == "test")

    def start_of(self, models: Mapping[str, Model | None]) -> Callable[[Cell, str], Start]:
        """(cell, split) to what its trials start from; `models` are the networks by the sources' keys.

        What is returned raises a ConfigError for images that a source cannot be normalised by.
        """
        sources = {source.key: source for source in self.sources}
        # Weights that are not there yet are nobody else's.
        identities = {
            key: identity(model) if model is not None and model.variables else f"not there yet: {key}"
            for key, model in models.items()
        }

        @functools.cache
        def start(key: str, place: Place) -> Start:
            source, model, target, own = sources[key], models[key], self.targets[place], identities[key]
            spec = source.spec
            is_normalised = self.input_norm == "target" and spec.norm == "none" and not target.is_placeholder
            if is_normalised and model is not None and model.variables:
                with names_key("transfer.input_norm"):
                    model = normalised_by(model, target.in_memory("train").images)
                own = identity(model)
            return Start(Source(source.name, spec.norm, spec.eps, own, source.seed), model, target)

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
        named = split_names(options.study.sources)
        sources = [source for text in named for source in _find_sources(job, text, planned=planned)]
        if not sources:
            raise ValueError("name sources, comma-separated: natural, NORM:EPS or models by name")
        keys = [source.key for source in sources]
        if twice := next((key for key in keys if keys.count(key) > 1), ""):
            raise ValueError(f"two sources are called {twice!r}: rename a file, or leave one away")
    is_training = any(source.model is None for source in sources)
    training = load_source_data(options, planned=planned) if is_training else None
    with names_key("study.num_unfrozen_blocks"):
        for source, k in itertools.product(sources, grid.num_unfrozen_blocks):
            first_unfrozen_block(create_module(source.spec.architecture, num_classes=1), k)
    key, targets = study_targets(options)
    cells = make_cells(grid, keys, targets, options.study.views or (options.target.view,))
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
        make_trials(once, options.recipe, cells, inputs.start_of(dict.fromkeys(keys)))
    return inputs


def _find_sources(job: Job, text: str, *, planned: bool) -> list[StudySource]:
    """ "natural", "l2:0.5" (both trained here, by the one recipe of config.train, once for each seed), a
    model by name, or several of one source, NAME=PATTERN."""
    options = job.options

    def key(name: str, number: int, seed: int) -> str:
        return f"{name}_seed_{seed}" if number else name

    if is_trained_here(text):
        recipe, first = against(options.training, text), options.run.seed
        found = []
        for number in range(options.study.source_seeds):
            own = key(text, number, first + number)
            place = job.workdir / "sources" / own.replace(":", "_")
            found.append(StudySource(own, text, first + number, str(place), recipe, None))
        return found
    if "*" not in text:
        model = find_model(text, options.run.dtype, planned=planned)
        name = model_name(text)
        return [StudySource(name, name, 0, text, model.spec, model)]
    name, models = find_source_models(text, options.run.dtype)
    check_trainings(name, [model for _, model in models])
    return [
        StudySource(key(name, i, i), name, i, place, model.spec, model)
        for i, (place, model) in enumerate(models)
    ]
