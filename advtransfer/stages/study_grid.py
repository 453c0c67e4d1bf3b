"""What config.study asks for, looked up: sources, targets, and the trials between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from advtransfer.config import names_key, parse_source
from advtransfer.data import Dataset
from advtransfer.models import Model, create_module, identity
from advtransfer.source import check_source, compute_dtype, load_data, load_source_data
from advtransfer.stages.named_models import find_model, is_trained_here, model_name, plan_model
from advtransfer.study import Cell, Source, Trial, make_trials
from advtransfer.transfer import first_unfrozen_block, normalised_by


class Asked(NamedTuple):
    """A source that config.study.sources names."""

    name: str
    norm: str
    eps: float
    config: ConfigDict | None  # of its training; None for one from elsewhere
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


class Start(NamedTuple):
    """What trials start from."""

    source: Source
    model: Model | None  # None: not trained yet


class Grid(NamedTuple):
    """Sources and targets of a study."""

    asked: list[Asked]
    targets: dict[Place, Dataset]

    def place(self, config: ConfigDict, cell: Cell) -> Place:
        """Where a cell's target is: whole if all images are asked for, and nothing is validated."""
        size = next(source.image_size for source in self.asked if source.name == cell.source)
        is_whole = cell.num_train_images == -1 and config.study.split == "test"
        return Place(cell.target, cell.view, size, is_whole)

    def datasets(self, trials: Iterable[Trial]) -> dict[str, Dataset]:
        """The targets by the digest that trials know them by."""
        splits = {trial.split for trial in trials}
        return {
            target.digest("train", split): target
            for target in self.targets.values()
            for split in splits
            if getattr(target, split).num_images
        }


def look_up(config: ConfigDict, workdir: Path, *, searched: bool, planned: bool = False) -> Grid:
    """The sources and the targets, after everything that the config names has been looked up.

    Args:
      config: of the study.
      workdir: where sources are trained.
      searched: whether hyper-parameters are chosen first, on validation images.
      planned: whether nothing is downloaded, and known sets that are not prepared come as placeholders.

    Raises:
      ConfigError: naming the key.
    """
    with names_key("study.sources"):
        find = plan_model if planned else find_model
        asked = [_ask(config, text.strip(), workdir, find) for text in config.study.sources.split(",")]
        names = [source.name for source in asked]
        if twice := next((name for name in names if names.count(name) > 1), ""):
            raise ValueError(f"two sources are called {twice!r}: rename a file, or leave one away")
    for source in asked:
        if source.config is not None:
            check_source(source.config, load_source_data(config, planned=planned))
        with names_key("study.num_unfrozen_blocks"):
            module = create_module(source.architecture, num_classes=1)
            for k in config.study.num_unfrozen_blocks:
                first_unfrozen_block(module, k)
    grid = Grid(asked, {})

    def load(cell):
        places = [grid.place(config, cell)]
        places += [places[0]._replace(is_whole=False)] if searched else []
        for place in places:
            if place not in grid.targets:
                validated = searched and not place.is_whole
                grid.targets[place] = _load_target(config, place, searched=validated, planned=planned)
        return Source(cell.source, "none", 0.0, ""), grid.targets[places[0]]

    with names_key("study.num_train_images"):
        make_trials(config, names, load)
    return grid


def starts(config: ConfigDict, grid: Grid, models: Mapping[str, Model | None]) -> dict[tuple, Start]:
    """What trials start from, by the source's name and the target's place."""
    # Weights that are not there yet are nobody else's.
    own = {
        name: identity(model) if model is not None and model.variables else f"not there yet: {name}"
        for name, model in models.items()
    }
    found = {}
    for source in grid.asked:
        for place, target in grid.targets.items():
            if place.image_size != source.image_size:
                continue
            model, name = models[source.name], own[source.name]
            is_here = model is not None and model.variables and not target.is_placeholder
            if is_here and source.norm == "none" and config.transfer.input_norm == "target":
                with names_key("transfer.input_norm"):
                    model = normalised_by(model, target.train.images)
                name = identity(model)
            start = Start(Source(source.name, source.norm, source.eps, name), model)
            found[source.name, place] = start
    return found


def trials_of(
    config: ConfigDict, grid: Grid, found: Mapping[tuple, Start], *, validate: bool = False
) -> dict[Cell, list[Trial]]:
    """The trials of config.study, cell by cell; with `validate` measured on the validation split."""
    own = config.copy_and_resolve_references()
    own.study.split = "validation" if validate else config.study.split

    def start_of(cell: Cell) -> tuple[Source, Dataset]:
        place = grid.place(own, cell)
        return found[cell.source, place].source, grid.targets[place]

    with names_key("study.num_train_images"):
        return make_trials(own, [source.name for source in grid.asked], start_of)


def _ask(config: ConfigDict, text: str, workdir: Path, find: Callable[[str, Any], Model]) -> Asked:
    """ "natural", "l2:0.5" (both trained here, by the one recipe of config.train), or a model by name."""
    if not is_trained_here(text):
        model = find(text, compute_dtype(config.dtype))
        norm, eps, architecture = model.spec.norm, model.spec.eps, model.spec.architecture
        return Asked(model_name(text), norm, eps, None, model, text, architecture, model.spec.image_size)
    own = config.copy_and_resolve_references()
    own.train.norm, own.train.eps = parse_source(text)
    place = str(workdir / "sources" / text.replace(":", "_"))
    train = own.train
    return Asked(text, train.norm, train.eps, own, None, place, train.architecture, train.image_size)


def _load_target(config: ConfigDict, place: Place, *, searched: bool, planned: bool) -> Dataset:
    own = config.copy_and_resolve_references()
    own.transfer.target = own.study.targets = place.target
    splits = ("train", config.study.split, *(("validation",) if searched else ()))
    return load_data(
        own,
        "study.targets" if config.study.targets else "transfer.target",
        image_size=place.image_size,
        splits=tuple(dict.fromkeys(splits)),
        view=place.view,
        set_aside=not place.is_whole,
        planned=planned,
    )
