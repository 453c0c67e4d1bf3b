"""stage=report: rows from anywhere to `summary.csv`, `figures/` and `report.html`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from advtransfer import storage
from advtransfer.config import names_key
from advtransfer.report import Evidence, headline, write_report
from advtransfer.report.rows import read_table
from advtransfer.report.statistics import collect
from advtransfer.tasks.workdir import Job, check_workdir, versions

if TYPE_CHECKING:
    from pandas import DataFrame


def run(job: Job) -> None:
    table, problems = _read(job)
    check_workdir(job)
    report, results = job.options.report, collect(table)
    evidence = Evidence(versions=versions(), command=job.command, remarks=(*report.remarks, *problems))
    path = write_report(
        results, job.workdir, evidence=evidence, title=report.title, reference=report.reference
    )
    print(*problems, *headline(results), f"report: {path}", sep="\n")


def plan(job: Job) -> str:
    table, problems = _read(job)
    check_workdir(job)
    return "\n".join([*problems, f"report on {len(table):,} rows of {job.options.run.rows} in {job.workdir}"])


def _read(job: Job) -> tuple[DataFrame, list[str]]:
    with names_key("rows"):
        if not job.options.run.rows:
            raise ValueError("name a file or folder of rows (CSV, Parquet or JSON lines)")
        rows = storage.to_path(job.options.run.rows)
        with storage.reading(rows):
            return read_table(rows, job.options.report.accuracy_unit)
