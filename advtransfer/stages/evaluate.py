"""stage=evaluate: natural and adversarial accuracy of a model folder; leaves `evaluation.json`."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from advtransfer import parallel
from advtransfer.config import names_key
from advtransfer.data import Dataset
from advtransfer.models import Model
from advtransfer.source import align_classes, check_evaluation, check_head, compute_dtype, load_data
from advtransfer.stages.named_models import find_model, model_name, plan_model
from advtransfer.stages.source import describe, measure_once
from advtransfer.stages.workdir import check_workdir, open_workdir


def run(config: ConfigDict, workdir: Path) -> None:
    model, dataset = _check(config, workdir)
    open_workdir(config, workdir)
    name = model_name(config.evaluate.model)
    evaluation = measure_once(config, model, dataset, workdir, name=name)
    if parallel.is_main_process():
        print(describe(evaluation))


def plan(config: ConfigDict, workdir: Path) -> str:
    model, dataset = _check(config, workdir, planned=True)
    recipe = config.evaluate
    number = len(getattr(dataset, recipe.split).labels)
    number = min(recipe.num_images or number, number)
    attack = "" if recipe.norm == "none" else f", {recipe.num_restarts} × PGD-{recipe.num_steps}"
    return f"evaluate {model.spec.architecture} on {number:,} images of {recipe.dataset}{attack}"


def _check(config: ConfigDict, workdir: Path, *, planned: bool = False) -> tuple[Model, Dataset]:
    find = plan_model if planned else find_model
    with names_key("evaluate.model"):
        if not config.evaluate.model:
            raise ValueError("name a model: a folder, hf:REPO/FILE or a PyTorch file")
        model = find(config.evaluate.model, compute_dtype(config.dtype))
        check_head(model.spec)
    splits = (config.evaluate.split,)
    size = model.spec.image_size
    dataset = load_data(config, "evaluate.dataset", image_size=size, splits=splits, planned=planned)
    with names_key("evaluate.dataset"):
        dataset = align_classes(dataset, model.spec)
    check_evaluation(config)
    check_workdir(config, workdir)
    return model, dataset
