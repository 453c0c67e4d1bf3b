"""stage=export: a model as `model.stablehlo`, which runs without this package, with `.json` and `.py`."""

from __future__ import annotations

from advtransfer.config import names_key
from advtransfer.evaluate import check_head
from advtransfer.models import Model, export
from advtransfer.tasks.inputs import find_model
from advtransfer.tasks.workdir import Job, check_workdir, open_workdir


def run(job: Job) -> None:
    model, options = _check(job), job.options.export
    open_workdir(job)
    with names_key("export"):
        path = export(
            model,
            job.workdir / "model.stablehlo",
            inputs=options.inputs,
            image_size=options.image_size,
            batch_size=options.batch_size,
            temperature=options.temperature,
            platforms=options.platforms,
        )
    print(f"{path}; python {path}.py FILE classifies images with it")


def plan(job: Job) -> str:
    model, options = _check(job, planned=True), job.options.export
    return f"export {model.spec.architecture} for {', '.join(options.platforms)}"


def _check(job: Job, *, planned: bool = False) -> Model:
    with names_key("export.model"):
        model = find_model(job.options.export.model, job.options.run.dtype, planned=planned)
        check_head(model.spec)
    check_workdir(job)
    return model
