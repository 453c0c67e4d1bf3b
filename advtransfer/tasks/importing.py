"""stage=import: a PyTorch checkpoint becomes a model folder.

Leaves `model/` in the workdir and, when config.verify names a dataset, `evaluation.json`.
"""

from __future__ import annotations

import math
import os

from advtransfer import storage
from advtransfer.config import ConfigError, Options, names_key
from advtransfer.data import Dataset
from advtransfer.evaluate import align_classes, check_head, describe
from advtransfer.hub import check_hub_name
from advtransfer.models import Model, ModelSpec, compute_dtype, load_model, save_model
from advtransfer.tasks.inputs import load_data, model_name
from advtransfer.tasks.source import check_evaluation, measure_once
from advtransfer.tasks.workdir import Job, check_workdir, open_workdir, write_json
from advtransfer.torch_checkpoint import import_torch_checkpoint, known_models_table


def run(job: Job) -> None:
    options = job.options
    if options.run.source == "list":
        print(known_models_table())
        return
    _check(job)
    model = _import(options)
    dataset = None
    if verify := options.run.verify:
        splits = (options.measured.split,)
        dataset = load_data(options.run, "verify", verify, image_size=model.spec.image_size, splits=splits)
        with names_key("verify"):
            dataset = align_classes(dataset, model.spec)
    open_workdir(job)
    save_model(model, job.workdir / "model", overwrite=True)
    print(f"{job.workdir / 'model'}: {_describe(model.spec)}")
    if dataset is not None:
        _verify(job, load_model(job.workdir / "model", dtype=compute_dtype(options.run.dtype)), dataset)


def plan(job: Job) -> str:
    source = job.options.run.source
    if source == "list":
        return "print the known models"
    _check(job)
    if source.startswith("hf:"):
        with names_key("source"):
            check_hub_name(source)
        return f"fetch {source} and import it"
    return f"import {_describe(_import(job.options).spec)}"


def _check(job: Job) -> None:
    source, workdir = job.options.run.source, job.workdir
    with names_key("source"):
        if not source:
            raise ValueError(
                "name a PyTorch file or hf:REPO/FILE; config.source=list prints the known models"
            )
        if os.path.isdir(source):
            raise ValueError(f"{source} is a folder: a model folder needs no import")
    if job.options.run.verify:
        check_evaluation(job.options.evaluation)
    check_workdir(job)
    # At an address a killed process may have left weights without their model.json.
    described = storage.is_address(workdir) or (workdir / "model" / "model.json").exists()
    if (workdir / "model").exists() and not described:
        raise ConfigError(
            f"--workdir={workdir} holds a model/ that was not imported: choose another --workdir"
        )


def _import(options: Options) -> Model:
    """The model of config.source; empty keys of config.checkpoint are left to the file and the table."""
    known = {key: value for key, value in vars(options.checkpoint).items() if value}
    with names_key("source"):
        model = import_torch_checkpoint(options.run.source, **known)
    if options.run.verify:
        with names_key("verify"):
            check_head(model.spec)
    return model


def _describe(spec: ModelSpec) -> str:
    """The model in half a sentence, and what its user should know of where it comes from."""
    found = spec.provenance
    head = f"{spec.num_classes:,} classes" if spec.has_head else "a new head"
    trained = "natural" if spec.norm == "none" else f"{spec.norm} eps {spec.eps:.4g}"
    place = found["format"] + (f", {found['wrapping']}" if found["wrapping"] else "")
    revision = f" at {found['hub']['revision'][:12]}" if found.get("hub", {}).get("revision") else ""
    lines = [
        f"{spec.architecture}, {head}, {spec.image_size} pixels, {trained}, from {found['file']}{revision} "
        f"({place})"
    ]
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


def _verify(job: Job, model: Model, dataset: Dataset) -> None:
    run = job.options.run
    found = measure_once(job.options, model, dataset, job.workdir, name=model_name(run.source))
    published = model.spec.provenance.get("published", {})
    line = f"{run.verify}: {describe(found)}"
    if published.get("accuracy"):
        points = 100 * (found["natural_accuracy"] - published["accuracy"])
        error = 100 * math.sqrt(published["accuracy"] * (1 - published["accuracy"]) / found["num_images"])
        line += (
            f"; published: {published['accuracy']:.2%} on {published['dataset']} "
            f"({points:+.2f} points here; the standard error of {found['num_images']:,} images is "
            f"{error:.2f})"
        )
        write_json(job.workdir / "evaluation.json", found | {"published": published})
    print(line)
