"""What config.study names, looked up: sources, targets, and what trials start from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from advtransfer.config import names_key
from advtransfer.data import Dataset
from advtransfer.models import Model, create_module, identity
from advtransfer.source import SourceRecipe, against
from advtransfer.study import Cell, Source, Start, make_cells, make_trials
from advtransfer.tasks.inputs import find_model, is_trained_here, load_data, model_name, split_names
from advtransfer.tasks.source import load_source_data
from advtransfer.tasks.workdir import Job
from advtransfer.transfer import first_unfrozen_block, normalised_by


class StudySource(NamedTuple):
    """A source that config.study.sources names."""

    name: str
    norm: str
    eps: float
    recipe: SourceRecipe | None  # of its training; None for one from elsewhere
    model: Model | None  # one from elsewhere; has no variables where it is to be downloaded
    place: str  # the folder where it is trained, or the name of the model
    architecture: str
    image_size: int


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
        return [(x, x.recipe, data) for x in self.sources if x.recipe is not None and data is not None]

    def place(self, cell: Cell, split: str) -> Place:
        """Where a cell's target is: whole if all images are asked for, and nothing is validated."""
        size = next(source.image_size for source in self.sources if source.name == cell.source)
        return Place(cell.target, cell.view, size, cell.num_train_images == -1 and split == "test")

    def starts(self, models: Mapping[str, Model | None]) -> dict[tuple[str, Place], Start]:
        """What trials start from, by the source's name and the target's place.

        Raises:
          ConfigError: images of a target that cannot be normalised by.
        """
        found = {}
        for source in self.sources:
            model = models[source.name]
            is_here = model is not None and model.variables
            # Weights that are not there yet are nobody else's.
            name = identity(model) if is_here else f"not there yet: {source.name}"
            for place, target in self.targets.items():
                if place.image_size != source.image_size:
                    continue
                own, own_name = model, name
                normalise = source.norm == "none" and self.input_norm == "target"
                if normalise and is_here and not target.is_placeholder:
                    with names_key("transfer.input_norm"):
                        own = normalised_by(model, target.in_memory("train").images)
                    own_name = identity(own)
                start = Start(Source(source.name, source.norm, source.eps, own_name), own, target)
                found[source.name, place] = start
        return found


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
    is_training = any(source.recipe is not None for source in sources)
    training = load_source_data(options, planned=planned) if is_training else None
    for source in sources:
        with names_key("study.num_unfrozen_blocks"):
            for k in grid.num_unfrozen_blocks:
                first_unfrozen_block(create_module(source.architecture, num_classes=1), k)
    targets = split_names(options.study.targets or options.target.target)
    views = options.study.views or (options.target.view,)
    cells = make_cells(grid, names, targets, views)
    inputs = StudyInputs(sources, training, cells, {}, options.target.input_norm)
    searched = options.search.is_asked
    for cell in cells:
        for split in (grid.split, *(("validation",) if searched else ())):
            place = inputs.place(cell, split)
            if place not in inputs.targets:
                splits = ("train", grid.split, *(("validation",) if searched and not place.is_whole else ()))
                inputs.targets[place] = load_data(
                    options.run,
                    "study.targets" if options.study.targets else "transfer.target",
                    place.target,
                    image_size=place.image_size,
                    splits=tuple(dict.fromkeys(splits)),
                    view=place.view,
                    set_aside=not place.is_whole,
                    planned=planned,
                )
    with names_key("study.num_train_images"):  # whether there are as many images, before anything is trained
        starts = inputs.starts(dict.fromkeys(names))
        once = replace(grid, num_seeds=1, seeds=())
        make_trials(
            once, options.recipe, cells, lambda cell: starts[cell.source, inputs.place(cell, grid.split)]
        )
    return inputs


def _find_source(job: Job, text: str, *, planned: bool) -> StudySource:
    """ "natural", "l2:0.5" (both trained here, by the one recipe of config.train), or a model by name."""
    if not is_trained_here(text):
        model = find_model(text, job.options.run.dtype, planned=planned)
        spec = model.spec
        return StudySource(
            model_name(text), spec.norm, spec.eps, None, model, text, spec.architecture, spec.image_size
        )
    recipe = against(job.options.training, text)
    place = str(job.workdir / "sources" / text.replace(":", "_"))
    return StudySource(
        text, recipe.norm, recipe.eps, recipe, None, place, recipe.architecture, recipe.image_size
    )
