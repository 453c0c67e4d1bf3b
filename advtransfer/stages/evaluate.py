"""stage=evaluate: natural and adversarial accuracy of a model folder; leaves `evaluation.json`."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from advtransfer.config import names_key
from advtransfer.data import Dataset, load_dataset
from advtransfer.models import ModelSpec, load_model, load_spec
from advtransfer.source import check_evaluation, compute_dtype
from advtransfer.stages.source import describe, measure_once, model_name
from advtransfer.stages.workdir import check_workdir, open_workdir


def run(config: ConfigDict, workdir: Path) -> None:
    _, dataset = _check(config, workdir)
    with names_key("evaluate.model"):
        model = load_model(config.evaluate.model, dtype=compute_dtype(config.dtype))
    open_workdir(config, workdir)
    name = model_name(config.evaluate.model)
    print(describe(measure_once(config, model, dataset, workdir, name=name)))


def plan(config: ConfigDict, workdir: Path) -> str:
    spec, dataset = _check(config, workdir)
    recipe = config.evaluate
    number = len(getattr(dataset, recipe.split).labels)
    number = min(recipe.num_images or number, number)
    attack = "" if recipe.norm == "none" else f", {recipe.num_restarts} × PGD-{recipe.num_steps}"
    return f"evaluate {spec.architecture} on {number:,} images of {recipe.dataset}{attack}"


def _check(config: ConfigDict, workdir: Path) -> tuple[ModelSpec, Dataset]:
    with names_key("evaluate.model"):
        if not config.evaluate.model:
            raise ValueError("name a model folder")
        spec = load_spec(config.evaluate.model)
    with names_key("evaluate.dataset"):
        dataset = load_dataset(
            config.evaluate.dataset, image_size=spec.image_size, cache_dir=config.cache_dir or None
        )
        if len(dataset.class_names) != spec.num_classes:
            raise ValueError(
                f"{config.evaluate.dataset} has {len(dataset.class_names)} classes, "
                f"the model {spec.num_classes}"
            )
    check_evaluation(config)
    check_workdir(config, workdir)
    return spec, dataset
