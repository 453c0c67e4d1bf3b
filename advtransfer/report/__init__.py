"""Rows and pictures in, summary tables, figures and one HTML file out; knows no JAX."""

from advtransfer.report.evidence import Evidence
from advtransfer.report.page import write_report
from advtransfer.report.rows import COLUMNS, read_foreign_rows, read_rows, write_rows
from advtransfer.report.summary import SUMMARY_COLUMNS, summarise
from advtransfer.report.words import headline

__all__ = [
    "COLUMNS",
    "SUMMARY_COLUMNS",
    "Evidence",
    "headline",
    "read_foreign_rows",
    "read_rows",
    "summarise",
    "write_report",
    "write_rows",
]
