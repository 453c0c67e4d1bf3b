"""stage=interpret: what networks look at, side by side; leaves `report.html` and the numbers as CSV."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

from advtransfer import storage
from advtransfer.analysis import cue_conflict, influence
from advtransfer.config import Options, names_key
from advtransfer.data import Dataset
from advtransfer.data.cache import fingerprint
from advtransfer.explain import Case, Subject, brief, explain, influence_cost, owns_classes
from advtransfer.foreign import AnyPath
from advtransfer.models import Model, identity
from advtransfer.options import to_dict
from advtransfer.report.figures import styles
from advtransfer.report.kept import from_data, to_data
from advtransfer.report.render import draw, write_page
from advtransfer.report.sections import Page, Section, SourceInfo
from advtransfer.tasks.inputs import find_models, load_data, model_name, split_names
from advtransfer.tasks.workdir import Job, check_workdir, keep, open_workdir, versions
from advtransfer.transfer import Recipe


def run(job: Job) -> None:
    case, options = _check(job), job.options
    open_workdir(job)
    analyses = options.interpretation.analyses
    sections = _sections(case, case, options.recipe, analyses, job.workdir / "sections")
    shown = ("models", "data", "interpret", "transfer", "seed", "dtype")
    page = Page(
        title="What networks look at",
        sections=sections,
        headline=[section.finding for section in sections if section.parts],
        facts=_facts(case, options),
        command=job.command,
        versions=versions(),
        config={name: job.settings[name] for name in shown},
    )
    path = write_page(page, job.workdir)
    print(*(section.finding for section in sections), f"report: {path}", sep="\n")


def plan(job: Job) -> str:
    case, settings = _check(job, planned=True), job.options.interpretation
    told = {
        "saliency": f"  saliency: {settings.num_images:,} images shown, {settings.num_measured:,} measured; "
        f"SmoothGrad of {settings.smooth_samples:,} copies, integrated gradients in at most "
        f"{settings.integration_steps:,} steps",
        "visualisation": f"  visualisation: 5 × {settings.num_images:,} pictures a network, "
        f"{settings.num_steps:,} steps each",
        "shape": "  shape bias",
    }
    if "influence" in settings.analyses:
        told["influence"] = "\n".join(_influence_plan(case, subject) for subject in case.subjects)
    start = f"explain {len(case.subjects)} networks with images of {job.options.run.data} ({settings.split}):"
    return "\n".join([start, *(told[name] for name in settings.analyses)])


def _influence_plan(case: Case, subject: Subject) -> str:
    settings, price = case.settings, influence_cost(case, subject)
    new = "" if owns_classes(subject.model, case.dataset) else "a new head, then "
    return (
        f"  influence, {subject.label}: {new}{settings.num_queries:,} + {settings.num_train:,} queries of "
        f"{settings.num_train:,} training images, {price.num_parameters:,} parameters, {settings.solver}: "
        f"about {influence.expected_seconds(price):.0f} s and {price.num_bytes / 1e9:.2f} GB"
    )


def study_sections(
    options: Options,
    models: dict[str, Model],
    dataset: Dataset | None,
    starts: dict[str, Model],
    target: Dataset,
    folder: AnyPath,
) -> list[Section]:
    """The most telling pictures of the report's analyses, of the sources that a study trained.

    Saliency, visualisation and shape of the models on their own data, influence by heads that are trained on
    the target, from what its trials start from. They are kept in `folder`.
    """
    wanted = options.report.analyses
    if not wanted or dataset is None:
        return []
    settings, seed = options.interpretation, options.run.seed
    case = brief(_subjects(models), dataset, options.measured.split, settings, seed)
    ranked = brief(_subjects(starts), target, options.grid.split, settings, seed)
    return _sections(case, ranked, options.recipe, wanted, folder)


def _subjects(models: dict[str, Model]) -> list[Subject]:
    looks = styles(SourceInfo(name, model.spec.norm, model.spec.eps) for name, model in models.items())
    return [Subject(looks[name], model) for name, model in models.items()]


def _sections(
    case: Case, ranked: Case, recipe: Recipe, wanted: Sequence[str], folder: AnyPath
) -> list[Section]:
    """In the order of `wanted`; influence, of `ranked`, can fail and is computed first.

    The data of each are kept in `folder` as soon as they are there, for the same command when it is given
    again.
    """
    storage.make_folder(folder)
    found = {}

    def read(kept):
        try:
            section = from_data(kept)
            draw(section)
            return section
        except (IndexError, KeyError, TypeError, ArithmeticError) as error:  # data that cannot be drawn
            raise ValueError(str(error)) from error

    for name in sorted(wanted, key=lambda name: name != "influence"):
        own = ranked if name == "influence" else case

        def make(name=name, own=own):
            begin = time.monotonic()
            with names_key("interpret"):
                section = explain(name, own, recipe)
            print(f"{name}: {time.monotonic() - begin:.1f} s", flush=True)
            return to_data(section)

        subject = _subject(own, recipe)
        found[name] = keep(folder / f"{name}.json", {"subject": subject}, make, read)
    return [found[name] for name in wanted]


def _subject(case: Case, recipe: Recipe) -> str:
    """SHA-256 of all that decides what a section of a case shows."""
    cues = Path(case.settings.cue_conflict).expanduser() if case.settings.cue_conflict else None
    parts = {
        "networks": [
            (subject.label, identity(subject.model), subject.model.spec.class_names)
            for subject in case.subjects
        ],
        "data": (case.dataset.name, case.dataset.digest("train", case.split), case.split),
        "cue_conflict": fingerprint(cues, cue_conflict.image_paths(cues)) if cues else "",
        "settings": to_dict(case.settings),
        "recipe": to_dict(recipe),
        "run": (case.seed, case.brief, versions()),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _check(job: Job, *, planned: bool = False) -> Case:
    options, settings, data = job.options, job.options.interpretation, job.options.run.data
    models = _models(options, planned=planned)
    with names_key("data"):
        if not data:
            raise ValueError(
                "name a dataset: builtin:digits, tfds:NAME, folder:/path or table:/path/labels.csv"
            )
    numbers = {"num_images": settings.split, "num_measured": settings.split}
    if "influence" in settings.analyses:
        numbers |= {"num_queries": settings.split, "num_train": "train"}
    size = next(iter(models.values())).spec.image_size
    splits = tuple(dict.fromkeys(numbers.values()))
    dataset = load_data(options.run, "data", data, image_size=size, splits=splits, planned=planned)
    for key, split in numbers.items():
        with names_key(f"interpret.{key}"):
            number, known = getattr(settings, key), getattr(dataset, split).num_images
            if number > known:
                raise ValueError(f"{number:,} is too many: {data} has {known:,} {split} images")
    if settings.cue_conflict and not Path(settings.cue_conflict).expanduser().is_dir():
        with names_key("interpret.cue_conflict"):
            raise ValueError(f"{settings.cue_conflict} is not a folder")
    check_workdir(job)
    return Case(_subjects(models), dataset, settings.split, settings, options.run.seed)


def _models(options: Options, *, planned: bool) -> dict[str, Model]:
    """The networks by what they are called; they take images of one size."""
    with names_key("models"):
        if not split_names(options.run.models):
            raise ValueError("name models, comma-separated: folders, hf:REPO/FILE or PyTorch files")
        models = find_models(options.run.models, options.run.dtype, planned=planned)
        for called, model in models.items():
            if not model.spec.has_head and {*options.interpretation.analyses} - {"influence"}:
                raise ValueError(
                    f"{called} was imported without a head, and only influence trains one: fine-tune it "
                    "first, or ask for --config.interpret.analyses=influence alone"
                )
        sizes = {model.spec.image_size for model in models.values()}
        if len(sizes) > 1:
            raise ValueError(
                f"these networks take images of {' and '.join(map(str, sorted(sizes)))} pixels: compare "
                "those of one size"
            )
    return models


def _facts(case: Case, options: Options) -> list[tuple[str, str]]:
    facts = [
        (x.label[0].upper() + x.label[1:], f"{model_name(name)}, {x.model.spec.architecture}")
        for name, x in zip(split_names(options.run.models), case.subjects, strict=True)
    ]
    data = f"{options.run.data} ({case.split})"
    return [*facts, ("Data", data), ("Image size", f"{case.image_size} pixels")]
