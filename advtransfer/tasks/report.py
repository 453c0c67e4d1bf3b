"""stage=report: rows from anywhere to `summary.csv`, `figures/` and `report.html`."""

from __future__ import annotations

from advtransfer import storage
from advtransfer.config import names_key
from advtransfer.report import Evidence, headline, read_foreign_rows, write_report
from advtransfer.tasks.workdir import Job, check_workdir, versions


def run(job: Job) -> None:
    rows, told = _read(job)
    check_workdir(job)
    report = job.options.report
    evidence = Evidence(versions=versions(), command=job.command, remarks=(*report.remarks, *told))
    path = write_report(rows, job.workdir, evidence=evidence, title=report.title, reference=report.reference)
    print(*told, *headline(rows), f"report: {path}", sep="\n")


def plan(job: Job) -> str:
    rows, told = _read(job)
    check_workdir(job)
    return "\n".join([*told, f"report on {len(rows):,} rows of {job.options.run.rows} in {job.workdir}"])


def _read(job: Job) -> tuple[list[dict], list[str]]:
    with names_key("rows"):
        if not job.options.run.rows:
            raise ValueError("name a file or folder of rows (CSV, Parquet or JSON lines)")
        rows = storage.to_path(job.options.run.rows)
        with storage.reading(rows):
            return read_foreign_rows(rows, job.options.report.accuracy_unit)
