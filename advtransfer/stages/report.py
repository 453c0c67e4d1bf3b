"""stage=report: rows from anywhere to `summary.csv`, `figures/` and `report.html`."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from advtransfer.config import names_key
from advtransfer.report import Evidence, headline, read_rows, write_report
from advtransfer.stages.workdir import check_workdir, versions


def run(config: ConfigDict, workdir: Path) -> None:
    rows = _read(config)
    check_workdir(config, workdir)
    evidence = Evidence(versions=versions(), command=config.report.command, remarks=config.report.remarks)
    path = write_report(rows, workdir, evidence=evidence, title=config.report.title)
    print(*headline(rows), f"report: {path}", sep="\n")


def plan(config: ConfigDict, workdir: Path) -> str:
    rows = _read(config)
    check_workdir(config, workdir)
    return f"report on {len(rows):,} rows of {config.rows} in {workdir}"


def _read(config: ConfigDict) -> list[dict]:
    with names_key("rows"):
        if not config.rows:
            raise ValueError("name a file or folder of rows (CSV, Parquet or JSON lines)")
        return read_rows(config.rows)
