"""stage=interpret: what networks look at, side by side; leaves `report.html` and the numbers as CSV."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from advtransfer import storage
from advtransfer.analysis import cue_conflict, influence
from advtransfer.config import names_key, to_json
from advtransfer.data import Dataset
from advtransfer.data.cache import fingerprint
from advtransfer.models import Model, identity
from advtransfer.report.figures import styles
from advtransfer.report.kept import from_data, to_data
from advtransfer.report.render import draw, write_page
from advtransfer.report.sections import Page, Section, SourceInfo
from advtransfer.source import compute_dtype, load_data
from advtransfer.stages.explain_cues import shape_section
from advtransfer.stages.explain_data import influence_cost, influence_section
from advtransfer.stages.explain_pixels import (
    Case,
    Subject,
    owns_classes,
    saliency_section,
    visualisation_section,
)
from advtransfer.stages.named_models import find_model, model_name, plan_model
from advtransfer.stages.workdir import check_workdir, keep, open_workdir, versions

# In a study's report pictures are few, and so are the images behind the numbers.
_BRIEF = {
    "num_measured": 128,
    "num_steps": 200,
    "step_size": 0.1,
    "parameterisation": "fourier",
    "num_train": 200,
    "num_queries": 200,
}


def run(config: ConfigDict, workdir: Path) -> None:
    case = _check(config, workdir)
    open_workdir(config, workdir)
    sections = _sections(case, case, config, config.interpret.analyses, workdir / "sections")
    settings = json.loads(to_json(config))
    page = Page(
        title="What networks look at",
        sections=sections,
        headline=[section.finding for section in sections if section.parts],
        facts=_facts(case, config),
        command=config.report.command,
        versions=versions(),
        config={
            name: settings[name] for name in ("models", "data", "interpret", "transfer", "seed", "dtype")
        },
    )
    path = write_page(page, workdir)
    print(*(section.finding for section in sections), f"report: {path}", sep="\n")


def plan(config: ConfigDict, workdir: Path) -> str:
    case, settings = _check(config, workdir, planned=True), config.interpret
    lines = [f"explain {len(case.subjects)} networks with images of {config.data} ({settings.split}):"]
    saliency = (
        f"  saliency: {settings.num_images:,} images shown, {settings.num_measured:,} measured; SmoothGrad "
        f"of {settings.smooth_samples:,} copies, integrated gradients in at most "
        f"{settings.integration_steps:,} steps"
    )
    visualisation = (
        f"  visualisation: 5 × {settings.num_images:,} pictures a network, {settings.num_steps:,} steps each"
    )
    told = {
        "saliency": [saliency],
        "visualisation": [visualisation],
        "influence": [],
        "shape": ["  shape bias"],
    }
    for subject in case.subjects if "influence" in settings.analyses else ():
        price = influence_cost(case, subject)
        new = "" if owns_classes(subject.model, case.dataset) else "a new head, then "
        seconds = influence.expected_seconds(price)
        told["influence"].append(
            f"  influence, {subject.label}: {new}{settings.num_queries:,} + {settings.num_train:,} queries "
            f"of {settings.num_train:,} training images, {price.num_parameters:,} parameters, "
            f"{settings.solver}: about {seconds:.0f} s and {price.num_bytes / 1e9:.2f} GB"
        )
    return "\n".join([*lines, *(line for name in settings.analyses for line in told[name])])


def study_sections(
    config: ConfigDict,
    models: dict[str, Model],
    dataset: Dataset | None,
    starts: dict[str, Model],
    target: Dataset,
    folder: Path,
) -> list[Section]:
    """The most telling pictures of config.report.analyses, of the sources that a study trained.

    Saliency, visualisation and shape of the models on their own data, influence by heads that are trained on
    the target, from what its trials start from. They are kept in `folder`.
    """
    wanted = config.report.analyses
    if not wanted or not models:
        return []
    specs = {name: model.spec for name, model in models.items()}
    looks = styles(SourceInfo(name, spec.norm, spec.eps) for name, spec in specs.items())
    cases = []
    for networks, data, split in (
        (models, dataset, config.evaluate.split),
        (starts, target, config.study.split),
    ):
        subjects = [Subject(looks[name], model) for name, model in networks.items()]
        settings = config.interpret.copy_and_resolve_references()
        with settings.unlocked():
            settings.update(_BRIEF)
            known = {"num_train": data.train.num_images}
            for key in ("num_images", "num_measured", "num_queries", "num_train"):
                settings[key] = min(settings[key], known.get(key, getattr(data, split).num_images))
        cases.append(Case(subjects, data, split, settings, config.seed, brief=True))
    return _sections(*cases, config, wanted, folder)


def _sections(
    case: Case, ranked: Case, config: ConfigDict, wanted: Sequence[str], folder: Path
) -> list[Section]:
    """In the order of `wanted`; influence, of `ranked`, can fail and is computed first.

    The data of each are kept in `folder` as soon as they are there, for the same command when it is given
    again.
    """
    storage.make_folder(folder)
    compute = {
        "saliency": lambda: saliency_section(case),
        "visualisation": lambda: visualisation_section(case),
        "influence": lambda: influence_section(ranked, config),
        "shape": lambda: shape_section(case),
    }
    found = {}

    def read(kept):
        try:
            section = from_data(kept)
            draw(section)
            return section
        except (IndexError, KeyError, TypeError, ArithmeticError) as error:  # data that cannot be drawn
            raise ValueError(str(error)) from error

    for name in sorted(wanted, key=lambda name: name != "influence"):

        def make(name=name):
            begin = time.monotonic()
            section = compute[name]()
            print(f"{name}: {time.monotonic() - begin:.1f} s", flush=True)
            return to_data(section)

        subject = _subject(ranked if name == "influence" else case, config)
        found[name] = keep(folder / f"{name}.json", {"subject": subject}, make, read)
    return [found[name] for name in wanted]


def _subject(case: Case, config: ConfigDict) -> str:
    """SHA-256 of all that decides what a section of a case shows."""
    cues = case.settings.cue_conflict and Path(case.settings.cue_conflict).expanduser()
    parts = {
        "networks": [
            (subject.label, identity(subject.model), subject.model.spec.class_names)
            for subject in case.subjects
        ],
        "data": (case.dataset.name, case.dataset.digest("train", case.split), case.split),
        "cue_conflict": cues and fingerprint(cues, cue_conflict.image_paths(cues)),
        "settings": case.settings.to_dict(),
        "transfer": config.transfer.to_dict(),
        "run": (case.seed, case.brief, versions()),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _check(config: ConfigDict, workdir: Path, *, planned: bool = False) -> Case:
    settings = config.interpret
    models = _models(config, plan_model if planned else find_model)
    with names_key("data"):
        if not config.data:
            raise ValueError("name a dataset: builtin:digits, tfds:NAME or folder:/path")
    splits = (settings.split, "train") if "influence" in settings.analyses else (settings.split,)
    size = next(iter(models.values())).spec.image_size
    splits = tuple(dict.fromkeys(splits))
    dataset = load_data(config, "data", image_size=size, splits=splits, planned=planned)
    numbers = {"num_images": settings.split, "num_measured": settings.split}
    if "influence" in settings.analyses:
        numbers |= {"num_queries": settings.split, "num_train": "train"}
    for key, split in numbers.items():
        with names_key(f"interpret.{key}"):
            number, known = settings[key], getattr(dataset, split).num_images
            if number > known:
                raise ValueError(f"{number:,} is too many: {config.data} has {known:,} {split} images")
    if settings.cue_conflict and not Path(settings.cue_conflict).expanduser().is_dir():
        with names_key("interpret.cue_conflict"):
            raise ValueError(f"{settings.cue_conflict} is no folder")
    check_workdir(config, workdir)
    looks = styles(SourceInfo(name, model.spec.norm, model.spec.eps) for name, model in models.items())
    subjects = [Subject(looks[name], model) for name, model in models.items()]
    return Case(subjects, dataset, settings.split, settings, config.seed)


def _models(config: ConfigDict, find: Callable[[str, Any], Model]) -> dict[str, Model]:
    """The networks by what they are called; they take images of one size."""
    names = [name.strip() for name in config.models.split(",") if name.strip()]
    with names_key("models"):
        if not names:
            raise ValueError("name models, comma-separated: folders, hf:REPO/FILE or PyTorch files")
        models: dict[str, Model] = {}
        for name in names:
            called = model_name(name)
            if called in models:
                raise ValueError(f"two models are called {called!r}: rename a folder, or leave one away")
            models[called] = find(name, compute_dtype(config.dtype))
            if not models[called].spec.has_head and {*config.interpret.analyses} - {"influence"}:
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


def _facts(case: Case, config: ConfigDict) -> list[tuple[str, str]]:
    names = [name.strip() for name in config.models.split(",") if name.strip()]
    networks = [
        (
            subject.label[0].upper() + subject.label[1:],
            f"{model_name(name)}, {subject.model.spec.architecture}",
        )
        for name, subject in zip(names, case.subjects, strict=True)
    ]
    return [*networks, ("Data", f"{config.data} ({case.split})"), ("Image size", f"{case.image_size} pixels")]
