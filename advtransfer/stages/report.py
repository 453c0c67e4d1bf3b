"""stage=report: rows from anywhere to `summary.csv`, `figures/` and `report.html`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from advtransfer import storage
from advtransfer.config import names_key
from advtransfer.report import Evidence, headline, write_report
from advtransfer.report.rows import read_table
from advtransfer.report.statistics import collect
from advtransfer.stages.workdir import check_workdir, versions

if TYPE_CHECKING:
    from pandas import DataFrame


def run(config: ConfigDict, workdir: Path) -> None:
    table, told = _read(config)
    check_workdir(config, workdir)
    results = collect(table)
    remarks = (*config.report.remarks, *told)
    evidence = Evidence(versions=versions(), command=config.report.command, remarks=remarks)
    shown = {"title": config.report.title, "reference": config.report.reference}
    path = write_report(results, workdir, evidence=evidence, **shown)
    print(*told, *headline(results), f"report: {path}", sep="\n")


def plan(config: ConfigDict, workdir: Path) -> str:
    table, told = _read(config)
    check_workdir(config, workdir)
    return "\n".join([*told, f"report on {len(table):,} rows of {config.rows} in {workdir}"])


def _read(config: ConfigDict) -> tuple[DataFrame, list[str]]:
    with names_key("rows"):
        if not config.rows:
            raise ValueError("name a file or folder of rows (CSV, Parquet or JSON lines)")
        rows = storage.to_path(config.rows)
        with storage.reading(rows):
            return read_table(rows, config.report.accuracy_unit)
