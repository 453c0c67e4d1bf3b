"""stage=study: trains the sources that are not there yet, runs the grid, writes the report.

Leaves in the workdir: `sources/NAME/` as stage=source does, `rows/` with a file per finished group,
`rows.csv`, `summary.csv`, `figures/`, `report.html`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from advtransfer import parallel, storage
from advtransfer.config import names_key, parse_source
from advtransfer.data import Dataset, to_float
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
from advtransfer.stages.named_models import find_model, model_name
from advtransfer.stages.source import measure_once, training_plan
from advtransfer.stages.workdir import check_workdir, open_workdir, versions
from advtransfer.study import (
    Source,
    Trial,
    claim,
    finished_rows,
    group,
    make_recipe,
    make_trials,
    num_steps,
    run_trials,
)
from advtransfer.transfer import (
    activation_shape,
    fine_tune_flops,
    first_unfrozen_block,
    prefix_is_constant,
)

Targets = dict[tuple[int, bool], Dataset]  # by image size, and whether nothing is set aside

_MAX_NAMED = 30  # classes in the report


class Asked(NamedTuple):
    """A source that config.study.sources names."""

    name: str
    norm: str
    eps: float
    config: ConfigDict | None  # of its training; None for one from elsewhere
    model: Model | None  # one from elsewhere
    place: str  # the folder where it is trained, or the name of the model
    architecture: str
    image_size: int


def run(config: ConfigDict, workdir: Path) -> None:
    asked, targets = check(config, workdir)
    open_workdir(config, workdir)
    dataset = load_source_data(config)
    trained = [source for source in asked if source.config is not None]
    with _one_at_a_time(workdir / "sources.lock"):
        models = {
            source.name: source.model or train_source(source.config, source.place, name=source.name)
            for source in asked
        }
        evaluations = [
            {"name": source.name, "norm": source.norm, "eps": source.eps}
            | measure_once(
                config, models[source.name], dataset, storage.to_path(source.place), name=source.name
            )
            for source in trained
        ]
    sources = [Source(s.name, s.norm, s.eps, identity(models[s.name])) for s in asked]
    rows = run_trials(
        _make_trials(config, asked, sources, targets),
        models,
        {target.digest("train", config.study.split): target for target in targets.values()},
        workdir / "rows",
        group_size=config.study.group_size,
        progress=lambda groups, number: progress_bar(groups, "fine-tune", "groups", total=number),
    )
    if not parallel.is_main_process():
        return
    twins = {source.name: models[source.name] for source in trained}
    target = next(iter(targets.values()))
    pictures, captions = _pictures(config, twins, dataset, target)
    evidence = Evidence(
        sources=evaluations,
        pictures=pictures,
        captions=captions,
        config=config.to_dict(),
        versions=versions(),
        command=config.report.command,
        remarks=(*config.report.remarks, *_remarks(dataset, target)),
    )
    shown = {"title": config.report.title, "reference": config.report.reference}
    with _one_at_a_time(workdir / "report.lock"):
        write_rows(rows, workdir / "rows.csv")
        path = write_report(rows, workdir, evidence=evidence, **shown)
    print(*headline(rows), f"report: {path}", sep="\n")


def _one_at_a_time(lock: Path) -> AbstractContextManager:
    """For processes that know nothing of each other; those of one run work together, or one does it."""
    return nullcontext() if parallel.num_processes() > 1 else claim(lock, wait=True)


def plan(config: ConfigDict, workdir: Path) -> str:
    asked, targets = check(config, workdir)
    dataset = load_source_data(config)
    lines = [
        training_plan(source.config, dataset, storage.to_path(source.place))
        if source.config is not None
        else f"source {source.name}: {source.place}"
        for source in asked
    ]
    sources = [_planned_source(config, source) for source in asked]
    trials = _make_trials(config, asked, sources, targets)
    rows = finished_rows(workdir / "rows")
    left = [trial for trial in trials if trial.identity() not in rows]
    steps = sum(num_steps(trial) for trial in left)
    groups = group(left, size=config.study.group_size)
    flops = sum(len(members) * _flops(members[0], asked, targets) for members in groups)
    bytes_needed = max(_input_bytes(config, source, targets) for source in asked)
    lines += [
        f"fine-tune {len(left):,} of {len(trials):,} models in {len(groups):,} groups, "
        f"{steps:,} steps of {config.transfer.batch_size} images, {flops / 1e12:,.3g} TFLOP",
        f"inputs on the device: {bytes_needed / 1e6:,.1f} MB at most",
    ]
    return "\n".join(lines)


def _flops(trial: Trial, asked: list[Asked], targets: Targets) -> float:
    source = next(source for source in asked if source.name == trial.source.name)
    target = next(target for (size, _), target in targets.items() if size == source.image_size)
    return fine_tune_flops(
        create_module(source.architecture, num_classes=len(target.class_names)),
        source.image_size,
        trial.recipe,
        num_unfrozen_blocks=trial.num_unfrozen_blocks,
        num_train=trial.num_train_images,
        num_test=getattr(target, trial.split).num_images,
    )


def _planned_source(config: ConfigDict, source: Asked) -> Source:
    """The source of a trial; one that is not trained yet has finished none."""
    model = source.model
    if source.config is not None and (storage.to_path(source.place) / "model" / "model.json").exists():
        model = find_model(source.place, compute_dtype(config.dtype))
    return Source(source.name, source.norm, source.eps, identity(model) if model else "")


def _input_bytes(config: ConfigDict, source: Asked, targets: Targets) -> int:
    """Bytes of the images, or of their activations at the first trained block, over all of the grid's k."""
    ours = [target for (size, _), target in targets.items() if size == source.image_size]
    largest = max(ours, key=lambda target: target.train.num_images)
    splits = largest.train, getattr(largest, config.study.split)
    num_views = max(1, config.transfer.num_views)
    num_images = num_views * splits[0].num_images + splits[1].num_images
    module = create_module(source.architecture, dtype=compute_dtype(config.dtype))
    recipe = make_recipe(config.transfer)
    sizes = []
    for k in config.study.num_unfrozen_blocks:
        if prefix_is_constant(k, recipe):
            entering = activation_shape(module, first_unfrozen_block(module, k), source.image_size)
            sizes.append(num_images * entering.size * entering.dtype.itemsize)
        else:
            sizes.append(sum(split.nbytes for split in splits))
    return max(sizes)


def check(config: ConfigDict, workdir: Path) -> tuple[list[Asked], Targets]:
    """The sources and the target, after everything that the config names has been looked up.

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
    targets = _load_targets(config, asked)
    with names_key("study.num_train_images"):
        _make_trials(config, asked, [Source(s.name, s.norm, s.eps, "") for s in asked], targets)
    check_workdir(config, workdir)
    return asked, targets


def _ask(config: ConfigDict, text: str, workdir: Path) -> Asked:
    """ "natural", "l2:0.5" (both trained here, by the one recipe of config.train), or a model by name."""
    norm, colon, _ = text.partition(":")
    if text != "natural" and not (colon and norm in ("l2", "linf")):
        model = find_model(text, compute_dtype(config.dtype))
        norm, eps, architecture = model.spec.norm, model.spec.eps, model.spec.architecture
        return Asked(model_name(text), norm, eps, None, model, text, architecture, model.spec.image_size)
    own = config.copy_and_resolve_references()
    own.train.norm, own.train.eps = parse_source(text)
    place = str(workdir / "sources" / text.replace(":", "_"))
    train = own.train
    return Asked(text, train.norm, train.eps, own, None, place, train.architecture, train.image_size)


def _load_targets(config: ConfigDict, asked: list[Asked]) -> Targets:
    splits, view = ("train", config.study.split), config.transfer.view
    return {
        (size, whole): load_data(
            config, "transfer.target", image_size=size, splits=splits, view=view, set_aside=not whole
        )
        for size in sorted({source.image_size for source in asked})
        for whole in sorted({_is_whole(config, n) for n in config.study.num_train_images})
    }


def _is_whole(config: ConfigDict, num_train_images: int) -> bool:
    """Whether nothing is set aside for validation: all images are asked for, and nothing is validated."""
    return num_train_images == -1 and config.study.split == "test"


def _make_trials(
    config: ConfigDict, asked: list[Asked], sources: list[Source], targets: Targets
) -> list[Trial]:
    sizes = {source.name: source.image_size for source in asked}
    return make_trials(config, sources, lambda source, n: targets[sizes[source.name], _is_whole(config, n)])


def _remarks(*datasets: Dataset) -> list[str]:
    """What a reader should know of the source's and the target's images."""
    *_, target = datasets
    more = f", … ({len(target.class_names)})" if len(target.class_names) > _MAX_NAMED else ""
    names = ", ".join(target.class_names[:_MAX_NAMED])
    skipped = {dataset.name: dataset.skipped for dataset in datasets if dataset.skipped}
    return [f"The classes of {target.name}: {names}{more}."] + [
        f"{len(images):,} images of {name} could not be decoded and were left out: {'; '.join(images[:5])}"
        + ("; …" if len(images) > 5 else ".")
        for name, images in skipped.items()
    ]


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
    images = to_float(np.asarray(dataset.test.images[:number]), config.train.image_size)
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
