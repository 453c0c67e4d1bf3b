"""stage=import: a PyTorch checkpoint becomes a model folder.

Leaves `model/` in the workdir and, when config.verify names a dataset, `evaluation.json`.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from ml_collections import ConfigDict

from advtransfer import storage
from advtransfer.config import ConfigError, names_key
from advtransfer.data import Dataset
from advtransfer.models import Model, ModelSpec, load_model, save_model
from advtransfer.source import align_classes, check_evaluation, check_head, compute_dtype, load_data
from advtransfer.stages.named_models import model_name
from advtransfer.stages.source import describe, measure_once
from advtransfer.stages.workdir import check_workdir, open_workdir, write_json
from advtransfer.torch_checkpoint import check_hub_name, import_torch_checkpoint, known_models_table


def run(config: ConfigDict, workdir: Path) -> None:
    if config.source == "list":
        print(known_models_table())
        return
    _check(config, workdir)
    model = _import(config)
    dataset = _load_data(config, model.spec)
    open_workdir(config, workdir)
    save_model(model, workdir / "model", overwrite=True)
    print(f"{workdir / 'model'}: {_describe(model.spec)}")
    if dataset is not None:
        model = load_model(workdir / "model", dtype=compute_dtype(config.dtype))
        _verify(config, model, dataset, workdir)


def plan(config: ConfigDict, workdir: Path) -> str:
    if config.source == "list":
        return "print the known models"
    _check(config, workdir)
    if config.source.startswith("hf:"):
        with names_key("source"):
            check_hub_name(config.source)
        return f"fetch {config.source} and import it"
    return f"import {_describe(_import(config).spec)}"


def _check(config: ConfigDict, workdir: Path) -> None:
    with names_key("source"):
        if not config.source:
            raise ValueError(
                "name a PyTorch file or hf:REPO/FILE; config.source=list prints the known models"
            )
        if os.path.isdir(config.source):
            raise ValueError(f"{config.source} is a folder: a model folder needs no import")
    if config.verify:
        check_evaluation(config)
    check_workdir(config, workdir)
    # At an address a killed process may have left weights without their model.json.
    described = storage.is_address(workdir) or (workdir / "model" / "model.json").exists()
    if (workdir / "model").exists() and not described:
        raise ConfigError(
            f"--workdir={workdir} holds a model/ that was not imported: choose another --workdir"
        )


def _import(config: ConfigDict) -> Model:
    """The model of config.source; empty keys of config.checkpoint are left to the file and the table."""
    known = {key: value for key, value in config.checkpoint.items() if value}
    with names_key("source"):
        model = import_torch_checkpoint(config.source, **known)
    if config.verify:
        with names_key("verify"):
            check_head(model.spec)
    return model


def _load_data(config: ConfigDict, spec: ModelSpec) -> Dataset | None:
    if not config.verify:
        return None
    splits = (config.evaluate.split,)
    dataset = load_data(config, "verify", image_size=spec.image_size, splits=splits)
    with names_key("verify"):
        return align_classes(dataset, spec)


def _describe(spec: ModelSpec) -> str:
    """The model in half a sentence, and what its user should know of where it comes from."""
    found = spec.provenance
    head = f"{spec.num_classes:,} classes" if spec.has_head else "a new head"
    size = f"{head}, {spec.image_size} pixels"
    trained = "natural" if spec.norm == "none" else f"{spec.norm} eps {spec.eps:.4g}"
    place = found["format"] + (f", {found['wrapping']}" if found["wrapping"] else "")
    revision = f" at {found['hub']['revision'][:12]}" if found.get("hub", {}).get("revision") else ""
    lines = [f"{spec.architecture}, {size}, {trained}, from {found['file']}{revision} ({place})"]
    if found["normalisation"] == "ImageNet":
        lines.append(
            "nothing says how images are normalised, so ImageNet's mean and standard deviation are taken: "
            "config.checkpoint.mean and .std say otherwise, (0, 0, 0) and (1, 1, 1) for images as they are"
        )
    if found["forward_pass"] == "assumed":
        check = (
            "--config.verify=DATASET, of its classes, measures it" if spec.has_head else "a transfer shows it"
        )
        lines.append(f"names and shapes do not tell that it computes what torchvision's ResNet does: {check}")
    if found["threat_model"] == "unknown":
        lines.append(
            "nothing says how it was trained, so it counts as natural: --config.checkpoint.norm=l2 "
            "--config.checkpoint.eps=3 says otherwise"
        )
    if found["stubs"]:
        lines.append(f"named in the file and not run: {', '.join(found['stubs'])}")
    return "\n".join(lines)


def _verify(config: ConfigDict, model: Model, dataset: Dataset, workdir: Path) -> None:
    evaluation = measure_once(config, model, dataset, workdir, name=model_name(config.source))
    published = model.spec.provenance.get("published", {})
    line = f"{config.verify}: {describe(evaluation)}"
    if published.get("accuracy"):
        points = 100 * (evaluation["natural_accuracy"] - published["accuracy"])
        line += (
            f"; published: {published['accuracy']:.2%} on {published['dataset']} "
            f"({points:+.2f} points here; the standard error of {evaluation['num_images']:,} images is "
            f"{100 * _standard_error(published['accuracy'], evaluation['num_images']):.2f})"
        )
        write_json(workdir / "evaluation.json", evaluation | {"published": published})
    print(line)


def _standard_error(accuracy: float, num_images: int) -> float:
    return math.sqrt(accuracy * (1 - accuracy) / num_images)
