"""Rows and sections in; summary tables, figures and HTML pages out; knows no JAX."""

from advtransfer.report.columns import COLUMNS
from advtransfer.report.model_page import ModelPage, write_model_page
from advtransfer.report.outcome import Outcome, make_outcome
from advtransfer.report.render import write_page
from advtransfer.report.rows import read_foreign_rows, read_rows, write_rows
from advtransfer.report.sections import Page, Section
from advtransfer.report.statistics import SUMMARY_COLUMNS, summarise
from advtransfer.report.study_page import Evidence, write_report
from advtransfer.report.words import headline

__all__ = [
    "COLUMNS",
    "SUMMARY_COLUMNS",
    "Evidence",
    "ModelPage",
    "Outcome",
    "Page",
    "Section",
    "headline",
    "make_outcome",
    "read_foreign_rows",
    "read_rows",
    "summarise",
    "write_model_page",
    "write_page",
    "write_report",
    "write_rows",
]
