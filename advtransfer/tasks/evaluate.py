"""stage=evaluate: natural and adversarial accuracy of a model; leaves `evaluation.json`."""

from __future__ import annotations

from advtransfer import parallel
from advtransfer.config import names_key
from advtransfer.data import Dataset
from advtransfer.evaluate import align_classes, check_head, describe
from advtransfer.models import Model
from advtransfer.tasks.inputs import find_model, load_data, model_name
from advtransfer.tasks.source import check_evaluation, measure_once
from advtransfer.tasks.workdir import Job, check_workdir, open_workdir


def run(job: Job) -> None:
    model, dataset = _check(job)
    open_workdir(job)
    name = model_name(job.options.measured.model)
    found = measure_once(job.options, model, dataset, job.workdir, name=name)
    if parallel.is_main_process():
        print(describe(found))


def plan(job: Job) -> str:
    model, dataset = _check(job, planned=True)
    evaluation, measured = job.options.evaluation, job.options.measured
    number = len(getattr(dataset, measured.split).labels)
    number = min(evaluation.num_images or number, number)
    attack = "" if evaluation.norm == "none" else f", {evaluation.num_restarts} × PGD-{evaluation.num_steps}"
    return f"evaluate {model.spec.architecture} on {number:,} images of {measured.dataset}{attack}"


def _check(job: Job, *, planned: bool = False) -> tuple[Model, Dataset]:
    options, measured = job.options, job.options.measured
    with names_key("evaluate.model"):
        model = find_model(measured.model, options.run.dtype, planned=planned)
        check_head(model.spec)
    dataset = load_data(
        options.run,
        "evaluate.dataset",
        measured.dataset,
        image_size=model.spec.image_size,
        splits=(measured.split,),
        planned=planned,
    )
    with names_key("evaluate.dataset"):
        dataset = align_classes(dataset, model.spec)
    check_evaluation(options.evaluation)
    check_workdir(job)
    return model, dataset
