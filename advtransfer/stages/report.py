"""stage=report: rows from anywhere to `summary.csv`, `figures/` and `report.html`."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from advtransfer import storage
from advtransfer.config import names_key
from advtransfer.report import Evidence, headline, read_foreign_rows, write_report
from advtransfer.stages.workdir import check_workdir, versions


def run(config: ConfigDict, workdir: Path) -> None:
    rows, told = _read(config)
    check_workdir(config, workdir)
    remarks = (*config.report.remarks, *told)
    evidence = Evidence(versions=versions(), command=config.report.command, remarks=remarks)
    shown = {"title": config.report.title, "reference": config.report.reference}
    path = write_report(rows, workdir, evidence=evidence, **shown)
    print(*told, *headline(rows), f"report: {path}", sep="\n")


def plan(config: ConfigDict, workdir: Path) -> str:
    rows, told = _read(config)
    check_workdir(config, workdir)
    return "\n".join([*told, f"report on {len(rows):,} rows of {config.rows} in {workdir}"])


def _read(config: ConfigDict) -> tuple[list[dict], list[str]]:
    with names_key("rows"):
        if not config.rows:
            raise ValueError("name a file or folder of rows (CSV, Parquet or JSON lines)")
        rows = storage.to_path(config.rows)
        with storage.reading(rows):
            return read_foreign_rows(rows, config.report.accuracy_unit)
