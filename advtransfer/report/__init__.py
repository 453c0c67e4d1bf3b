"""Rows and pictures in, summary tables, figures and one HTML file out; knows no JAX."""

from advtransfer.report.evidence import Evidence
from advtransfer.report.interpretation import Drawn, Interpretation, Section, draw, write_interpretation
from advtransfer.report.model_page import ModelPage, write_model_page
from advtransfer.report.outcome import Outcome, make_outcome
from advtransfer.report.page import write_report
from advtransfer.report.rows import COLUMNS, read_foreign_rows, read_rows, write_rows
from advtransfer.report.summary import SUMMARY_COLUMNS, summarise
from advtransfer.report.words import headline

__all__ = [
    "COLUMNS",
    "SUMMARY_COLUMNS",
    "Drawn",
    "Evidence",
    "Interpretation",
    "ModelPage",
    "Outcome",
    "Section",
    "draw",
    "headline",
    "make_outcome",
    "read_foreign_rows",
    "read_rows",
    "summarise",
    "write_interpretation",
    "write_model_page",
    "write_report",
    "write_rows",
]
