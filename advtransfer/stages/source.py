"""stage=source: trains the network of config.train and measures it.

Leaves in the workdir: `log.jsonl` and TensorBoard events, `checkpoints/` while it trains, `model/`,
`evaluation.json`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from advtransfer import parallel
from advtransfer.data import Dataset
from advtransfer.models import Model, identity
from advtransfer.source import check_source, load_source_data, measure, num_steps, state_bytes, train_source
from advtransfer.stages.workdir import check_workdir, claimed, keep, open_workdir


def run(config: ConfigDict, workdir: Path) -> None:
    dataset = load_source_data(config)
    check_source(config, dataset)
    open_workdir(config, workdir)
    name = source_name(config)
    with claimed(workdir):
        model = train_source(config, workdir, name=name)
        evaluation = measure_once(config, model, dataset, workdir, name=name)
    if parallel.is_main_process():
        print(f"{workdir / 'model'}: {describe(evaluation)}")


def plan(config: ConfigDict, workdir: Path) -> str:
    dataset = load_source_data(config, planned=True)
    check_source(config, dataset)
    check_workdir(config, workdir)
    return training_plan(config, dataset, workdir)


def source_name(config: ConfigDict) -> str:
    """ "natural", or "l2:0.5"."""
    norm = config.train.norm
    return "natural" if norm == "none" else f"{norm}:{config.train.eps:g}"


def training_plan(config: ConfigDict, dataset: Dataset, folder: Path) -> str:
    """One line: what training this source in `folder` takes."""
    recipe = config.train
    line = f"source {source_name(config)}: "
    if (folder / "model" / "model.json").exists():
        return line + "done"
    attack = "" if recipe.norm == "none" else f" against PGD-{recipe.attack_steps}"
    size = state_bytes(config, dataset) + dataset.train.nbytes
    return line + (
        f"train {recipe.architecture}, {num_steps(config, dataset):,} steps of "
        f"{recipe.batch_size} images{attack}; state and images {size / 1e6:,.1f} MB a device"
    )


def measure_once(
    config: ConfigDict, model: Model, dataset: Dataset, folder: Path, *, name: str
) -> dict[str, Any]:
    """`measure`, kept in `folder`/evaluation.json for as long as the model and the images stay the same."""
    data = dataset.digest(config.evaluate.split)
    subject = {"model": identity(model), "dataset": dataset.name, "data": data}
    return keep(folder / "evaluation.json", subject, lambda: measure(model, dataset, config, name=name))


def describe(evaluation: dict[str, Any]) -> str:
    """An evaluation as half a sentence."""
    text = f"natural accuracy {evaluation['natural_accuracy']:.1%}"
    if "adversarial_accuracy" in evaluation:
        text += f", adversarial accuracy {evaluation['adversarial_accuracy']:.1%} ({evaluation['attack']})"
        if unmoved := evaluation.get("adversarial_unmoved"):
            text += f", of which {unmoved:.1%} where the attack changed nothing: no gradient leads it"
    return f"{text}, {evaluation['num_images']:,} images"
