"""stage=evaluate: natural and adversarial accuracy of a model; leaves `evaluation.json`. With several models,
curves or AutoAttack a page that compares: `report.html`, `evaluation.csv`."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from advtransfer import parallel, storage
from advtransfer.analysis import visualise
from advtransfer.analysis.head_bound import feature_sensitivity, head_bound
from advtransfer.attacks import THREAT_MODELS
from advtransfer.config import ConfigError, Options, names_key
from advtransfer.data import Dataset, to_float
from advtransfer.evaluate import align_classes, check_head, describe, evaluation_key, predict
from advtransfer.models import Model, identity
from advtransfer.report.render import write_page
from advtransfer.report.robustness_page import Measured, robustness_sections
from advtransfer.report.sections import Page, SourceInfo
from advtransfer.robustness import PROBE, measure_robustness, num_gradients, probed
from advtransfer.tasks.inputs import find_models, load_data
from advtransfer.tasks.source import check_evaluation, measure_once
from advtransfer.tasks.workdir import Job, check_workdir, keep, open_workdir, versions


class _Compared(NamedTuple):
    model: Model
    dataset: Dataset  # with the model's labels


def run(job: Job) -> None:
    compared = _check(job)
    open_workdir(job)
    if _is_comparison(job.options, compared):
        _compare(job, compared)
        return
    ((name, (model, dataset)),) = compared.items()
    found = measure_once(job.options, model, dataset, job.workdir, name=name)
    if parallel.is_main_process():
        print(describe(found))


def plan(job: Job) -> str:
    compared = _check(job, planned=True)
    evaluation, measured, curves = job.options.evaluation, job.options.measured, job.options.curves
    number = len(getattr(next(iter(compared.values())).dataset, measured.split).labels)
    number = min(evaluation.num_images or number, number)
    attack = "" if evaluation.norm == "none" else f", {evaluation.num_restarts} × PGD-{evaluation.num_steps}"
    names = ", ".join(dict.fromkeys(one.model.spec.architecture for one in compared.values()))
    if not _is_comparison(job.options, compared):
        return f"evaluate {names} on {number:,} images of {measured.dataset}{attack}"
    radii = " and ".join(f"{len(values)} ε of {norm}" for norm, values in curves.radii(evaluation).items())
    at = f"{attack} at {radii}" if radii else ""
    steps = num_gradients(number, evaluation, curves)
    more = f", then AutoAttack ({curves.auto_attack})" if curves.auto_attack != "none" else ""
    return (
        f"evaluate {len(compared)} model{'s' * (len(compared) > 1)} ({names}) on {number:,} images of "
        f"{measured.dataset}{at}: at most {steps:,} images × steps a model{more}"
    )


def _is_comparison(options: Options, compared: dict[str, _Compared]) -> bool:
    return len(compared) > 1 or options.curves.is_asked


def _check(job: Job, *, planned: bool = False) -> dict[str, _Compared]:
    """The models by name, each with the images at its size."""
    options, measured = job.options, job.options.measured
    with names_key("evaluate.model"):
        models = find_models(measured.model, options.run.dtype, planned=planned)
        for model in models.values():
            check_head(model.spec)
    datasets = {
        size: load_data(
            options.run,
            "evaluate.dataset",
            measured.dataset,
            image_size=size,
            splits=(measured.split,),
            planned=planned,
        )
        for size in dict.fromkeys(model.spec.image_size for model in models.values())
    }
    with names_key("evaluate.dataset"):
        compared = {
            name: _Compared(model, align_classes(datasets[model.spec.image_size], model.spec))
            for name, model in models.items()
        }
    with names_key("evaluate"):
        options.curves.check_with(options.evaluation)
    check_evaluation(options.evaluation)
    if _is_comparison(options, compared) and parallel.num_processes() > 1:
        raise ConfigError(
            "config.evaluate: several models, curves and AutoAttack run in one process: leave --multihost "
            "away, and start one process"
        )
    check_workdir(job)
    return compared


def _compare(job: Job, compared: dict[str, _Compared]) -> None:
    options, evaluation = job.options, job.options.evaluation
    storage.make_folder(job.workdir / "measured")
    measured = [_measure_once(job, name, one) for name, one in compared.items()]
    sections = robustness_sections(measured, norm=evaluation.norm, eps=evaluation.eps)
    findings = [section.finding for section in sections if section.finding]
    facts = [
        ("Data", f"{options.measured.dataset} ({options.measured.split})"),
        ("Images", f"{measured[0].rows[0]['num_images']:,}"),
        ("Attack", evaluation.attack_name),
    ]
    page = Page(
        title="Accuracy and robustness",
        sections=sections,
        headline=findings,
        facts=facts,
        command=job.command,
        versions=versions(),
        config={name: job.settings[name] for name in ("evaluate", "seed", "dtype")},
    )
    path = write_page(page, job.workdir)
    print(*findings, f"report: {path}", sep="\n")


def _measure_once(job: Job, name: str, one: _Compared) -> Measured:
    """What is kept in `measured`/NAME.json, as long as the model and the images stay the same."""
    options, (model, dataset) = job.options, one
    split, spec = options.measured.split, model.spec
    known = {"model": identity(model), "dataset": dataset.name, "data": dataset.digest(split)}
    source = spec.provenance.get("source")
    is_transferred = isinstance(source, dict) and {"norm", "eps"} <= source.keys()
    threat = (source["norm"], source["eps"]) if is_transferred else (spec.norm, spec.eps)

    def read(kept: dict[str, Any]) -> Measured:
        return Measured(
            SourceInfo(name, *threat),
            is_transferred,
            kept["rows"],
            [(sign["name"], sign["message"], sign["source"]) for sign in kept["warnings"]],
            kept["bound"],
        )

    with names_key("evaluate"):
        path = job.workdir / "measured" / f"{name}.json"
        return keep(path, known, lambda: _measure(options, name, one), read)


def _measure(options: Options, name: str, one: _Compared) -> dict[str, Any]:
    evaluation, seed = options.evaluation, options.run.seed
    split = getattr(one.dataset, options.measured.split)
    found = measure_robustness(one.model, split, evaluation, options.curves, seed=seed, name=name)
    signs = [warning._asdict() for warning in found.warnings]
    return {"rows": found.rows, "warnings": signs, "bound": _bound(options, one, found.rows)}


def _bound(options: Options, one: _Compared, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the features' sensitivity says of the head, on the images that were probed; nothing without an
    attack."""
    evaluation, model = options.evaluation, one.model
    at = {"norm": evaluation.norm, "eps": evaluation.eps}
    probes = [row for row in rows if row["attack"] == PROBE and at.items() <= row.items()]
    if not probes:
        return {}
    split = getattr(one.dataset, options.measured.split)
    chosen = probed(type(split)(*(x[: evaluation.num_images or None] for x in split)), options.run.seed)
    images = np.asarray(to_float(jnp.asarray(chosen.images), model.spec.image_size))
    features_fn = visualise.features_fn(model, model.module.num_blocks, fake_relu=False)
    sensitivity = feature_sensitivity(
        features_fn,
        images,
        THREAT_MODELS[evaluation.norm](evaluation.eps),
        key=evaluation_key(options.run.seed),
        num_steps=evaluation.num_steps,
        num_restarts=evaluation.num_restarts,
        batch_size=evaluation.batch_size,
    )
    head = {name: np.asarray(x) for name, x in model.variables["params"]["fc"].items()}
    features = predict(features_fn, images, batch_size=evaluation.batch_size)
    found = head_bound(features, chosen.labels, head["kernel"], head["bias"], sensitivity)
    means = found._asdict() | {"sensitivity": sensitivity}
    attacked = {"attacked_loss": probes[-1]["loss"], "attacked_accuracy": probes[-1]["accuracy"]}
    return (
        at
        | {"num_images": chosen.num_images}
        | {name: float(np.mean(x)) for name, x in means.items()}
        | attacked
    )
