"""Result rows, one per evaluated epoch of one trial: CSV, JSON lines or Parquet of ours or of anybody.

Each file becomes a table of raw cells and their places (file:line), which is cleaned column by column: types,
spellings, decimal commas, percent. What cannot be used is left out and reported. Files are reached through
methods that `pathlib.Path` and `etils.epath.Path` share, so rows may lie in a bucket.
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from advtransfer.foreign import AnyPath, parse_json, read_bytes
from advtransfer.report.columns import (
    ACCURACIES,
    COLUMNS,
    CONVERSIONS,
    COUNTS,
    MEASURED,
    REQUIRED,
    column_name,
    is_marked,
    is_whole,
)
from advtransfer.report.files import FORMULA, csv_text, null, write_atomically
from advtransfer.report.words import count

if TYPE_CHECKING:
    from pandas import DataFrame

MAX_ROWS = 2_000_000
_ROUNDING = 1e-6
_LARGEST = 1 + _ROUNDING
_MOSTLY = 0.9  # of a file's rows with accuracies above 1: then all of it is in percent

Record = tuple[str, Mapping[str, Any] | str]  # its place, and its cells or why there are none


def read_rows(path: str | AnyPath) -> list[dict[str, Any]]:
    """Reads a .jsonl, .csv or .parquet file of rows, or a folder of them.

    A folder is searched to the bottom for JSON lines; if it holds none, for CSV; then for
    Parquet. Files that are plainly something else (a training log, a summary) are passed over.

    Returns:
      Rows with every column of `COLUMNS`: counts as int, measurements as float (NaN where the cell was
      empty), the rest as str; a seed that is not a number stays a str. Other columns, as the first row of a
      file has them, stay as they are. Of a trial and epoch that occurs twice the last is kept.

    Raises:
      ValueError: in one line, with the file (and the line): nothing to read, columns missing, a
        line that is not a row, a value of the wrong kind, accuracies outside [0, 1].
    """
    table, problems, repeats = _read(path, "auto")
    if problems:
        raise ValueError(problems[0].first)
    for sentence in repeats:
        logging.getLogger(__name__).info("%s: %s", path, sentence)
    return table.to_dict("records")


def read_foreign_rows(path: str | AnyPath, unit: str = "auto") -> tuple[list[dict[str, Any]], list[str]]:
    """As `read_rows`, but what cannot be used is left out: rows, and a sentence on each kind of problem.

    Args:
      unit: of accuracies, "fraction" or "percent"; "auto": decided from all that a file holds.

    Raises:
      ValueError: in one line: nothing to read, columns missing, no row that can be used.
    """
    table, sentences = read_table(path, unit)
    return table.to_dict("records"), sentences


def read_table(path: str | AnyPath, unit: str = "auto") -> tuple[DataFrame, list[str]]:
    """As `read_foreign_rows`, the rows as a table."""
    return _usable(*_read(path, unit))


def clean(rows: DataFrame | Iterable[Mapping[str, Any]]) -> tuple[DataFrame, list[str]]:
    """Rows that a caller made, as `read_table` gives them.

    Raises:
      ValueError: no row can be used.
    """
    import pandas as pd

    records = rows.to_dict("records") if isinstance(rows, pd.DataFrame) else rows
    return _usable(*_clean([((f"rows[{i}]", row) for i, row in enumerate(records))], "auto"))


def write_rows(rows: Sequence[Mapping[str, Any]], path: str | AnyPath) -> AnyPath:
    """Writes rows to a .csv or .jsonl file, whole or not at all; NaN becomes an empty cell or null.

    Raises:
      ValueError: the ending of `path` is neither .csv nor .jsonl.
    """
    path = Path(path) if isinstance(path, str) else path
    if path.suffix == ".csv":
        others = dict.fromkeys(name for row in rows for name in row if name not in COLUMNS)
        text = csv_text(rows, (*COLUMNS, *others))
    elif path.suffix == ".jsonl":
        text = "".join(f"{json.dumps({k: null(v) for k, v in row.items()})}\n" for row in rows)
    else:
        raise ValueError(f"{path}: rows are written as .csv or .jsonl")
    write_atomically(path, text)
    return path


class _Problem(NamedTuple):
    """Cells of one kind that cannot be used as they are: the first of them, how many, and the consequence."""

    first: str
    number: int
    outcome: str


def _usable(table: DataFrame, problems: list[_Problem], repeats: list[str]) -> tuple[DataFrame, list[str]]:
    if problems and table.empty:
        raise ValueError(problems[0].first)
    sentences = [f"{count(p.number, 'row')}: {p.outcome}; the first is {p.first}." for p in problems]
    return table, sentences + repeats


# Reading.


def _read(path: str | AnyPath, unit: str) -> tuple[DataFrame, list[_Problem], list[str]]:
    path = Path(path) if isinstance(path, str) else path
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder of rows")
    table, problems, repeats = _clean(map(_records, _row_files(path)), unit)
    if table.empty and not problems:
        raise ValueError(f"{path}: holds no rows")
    return table, problems, repeats


def _row_files(path: AnyPath) -> list[AnyPath]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path} is neither a regular file nor a folder")
    files = list(_files(path))
    for suffix in _READERS:
        rows = [file for file in files if file.suffix == suffix and _looks_like_rows(file)]
        if rows:
            return rows
    raise ValueError(f"{path}: no rows found in this folder ({', '.join(_READERS)})")


def _files(folder: AnyPath, above: tuple[str, ...] = ()) -> Iterator[AnyPath]:
    """Every regular file below, in order; hidden ones and links back up are passed over."""
    place = os.path.realpath(folder) if isinstance(folder, Path) else str(folder)
    if place in above:
        return
    for entry in sorted(folder.iterdir(), key=str):
        if entry.is_dir():
            yield from _files(entry, (*above, place))
        elif not entry.name.startswith(".") and entry.is_file():
            yield entry


def _looks_like_rows(file: AnyPath) -> bool:
    """At least half of the required columns in the first record: then it is meant to be rows."""
    _, first = next(_records(file), ("", ""))
    known = set() if isinstance(first, str) else _known(first)
    return 2 * len(known & {*REQUIRED}) >= len(REQUIRED)


def _known(names: Iterable[str]) -> set[str]:
    return {column_name(name)[0] for name in names} & {*COLUMNS}


def _records(file: AnyPath) -> Iterator[Record]:
    if file.suffix not in _READERS:
        raise ValueError(f"{file}: rows are read from {', '.join(_READERS)} files")
    try:
        yield from _READERS[file.suffix](file)
    except ValueError as error:
        yield str(file), f"cannot be read ({str(error).splitlines()[0]})"


def _text(file: AnyPath) -> str:
    """UTF-8, or what the first bytes say. Other bytes become surrogates, and names with these are refused."""
    content = read_bytes(file)
    for mark, encoding in _MARKS.items():
        if content.startswith(mark):
            return content.decode(encoding)
    if b"\0" in content[:1000]:
        raise ValueError("it holds zero bytes, so it is not UTF-8: save it as UTF-8")
    return content.decode(errors="surrogateescape")


_MARKS = {  # UTF-32's begins with UTF-16's
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def _read_jsonl(file: AnyPath) -> Iterator[Record]:
    for number, line in enumerate(io.StringIO(_text(file), newline="\n"), start=1):
        if not line.strip():
            continue
        try:
            record = parse_json(line, _fields)
            record = record if isinstance(record, dict) else "not a JSON object"
        except KeyError as error:
            record = f"two fields are called {error.args[0]}: rename or delete one"
        except ValueError:
            record = "not a line of JSON"
        yield f"{file}:{number}", record


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise KeyError(_repeated(name for name, _ in pairs))
    return fields


def _repeated(names: Iterable[str]) -> str:
    return next((name for name, times in Counter(names).items() if times > 1), "")


def _read_csv(file: AnyPath) -> Iterator[Record]:
    text = _text(file)
    for_excel = re.match(r"sep=([,;\t])\r?\n", text)
    start = for_excel.end() if for_excel else 0
    first = re.split("[\r\n]", text[start : start + 100_000])[0]
    heads = {mark: next(csv.reader([first], delimiter=mark), []) for mark in ",;\t"}
    separator = for_excel[1] if for_excel else max(heads, key=lambda mark: len(_known(heads[mark])))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    try:
        if for_excel:
            next(reader)
        header = [_unquoted(name).strip() for name in next(reader, [])]
        if twice := _repeated(filter(None, header)):
            yield f"{file}:{reader.line_num}", f"two columns are called {twice}: rename or delete one"
            return
        for cells in reader:
            where = f"{file}:{reader.line_num}"
            if cells and len(cells) != len(header):
                yield where, f"{len(cells)} cells under {len(header)} columns"
            elif cells:
                record = dict(zip(header, map(_unquoted, cells), strict=True))
                yield where, record if separator == "," else _with_points(record)
    except csv.Error as error:
        yield f"{file}:{reader.line_num}", f"not a line of CSV ({error}), and nothing after it was read"


def _unquoted(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and FORMULA.match(cell) else cell


def _with_points(record: Mapping[str, str]) -> Mapping[str, str] | str:
    """The cells with points for decimal commas; or what is wrong with one that could be two numbers."""
    points = dict(record)
    for name, cell in record.items():
        known, _ = column_name(name)
        if known in (*COUNTS, *MEASURED) and _DECIMAL_COMMA.fullmatch(cell):
            points[name] = cell.replace(",", ".")
        elif known in COUNTS and re.fullmatch(r"\s*\d{1,3}(\.\d{3})+\s*", cell):
            return f"{name} = {cell!r} has a point, or a mark of thousands: write digits alone"
    return points


_DECIMAL_COMMA = re.compile(r"\s*[+-]?\d*,\d+(e[+-]?\d+)?\s*%?\s*", re.IGNORECASE)


def _read_parquet(file: AnyPath) -> Iterator[Record]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError("reading Parquet needs pyarrow: pip install pyarrow") from None
    try:
        table = pyarrow.parquet.ParquetFile(io.BytesIO(read_bytes(file)))
        if table.metadata.num_rows > MAX_ROWS:
            raise ValueError(f"{table.metadata.num_rows:,} rows, more than {MAX_ROWS:,}")
        wanted = [name for name in table.schema_arrow.names if column_name(name)[0] in COLUMNS]
        if twice := _repeated(wanted):
            raise ValueError(f"two columns are called {twice}: rename or delete one")
        records = (row for batch in table.iter_batches(1000, columns=wanted) for row in batch.to_pylist())
        yield from ((f"{file}:{number}", record) for number, record in enumerate(records, start=1))
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"not a Parquet file of rows: {error}") from error


_READERS: dict[str, Callable[[AnyPath], Iterator[Record]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


# Cleaning.


def _clean(files: Iterable[Iterable[Record]], unit: str) -> tuple[DataFrame, list[_Problem], list[str]]:
    """The rows of all files with their columns and types, what was wrong, and a sentence on repeated rows."""
    import pandas as pd

    problems: dict[Any, _Problem] = {}
    tables: list[DataFrame] = []
    for records in files:
        tables.append(_raw(records, problems, MAX_ROWS - sum(map(len, tables))))
    raw = pd.concat(tables, ignore_index=True)
    table, usable = raw.copy(), np.ones(len(raw), bool)
    for name, (convert, dtype) in CONVERSIONS.items():
        values = raw[name].tolist()
        for row, value in enumerate(values):
            try:
                values[row] = convert(value)
            except (TypeError, ValueError, OverflowError) as error:
                first = f"{raw['place'][row]}: {name} = {_shortened(repr(value))}: {error}"
                measured = name in MEASURED  # then it is missing; otherwise the row has no place in the grid
                _note(problems, (name, str(error)), first, f"{name} {_MISSING}" if measured else _LEFT_OUT)
                usable[row] &= measured
                values[row] = math.nan if measured else 0
        table[name] = pd.Series(values, dtype=dtype)
    ends = np.cumsum([0, *map(len, tables)])
    of_file = [start + np.flatnonzero(usable[start:end]) for start, end in itertools.pairwise(ends)]
    table[ACCURACIES] = _fractions(raw, table[ACCURACIES].to_numpy(), of_file, unit, problems)
    table = table[usable].drop(columns="place")
    # trial_id alone would do for our own rows; other writers may number trials anew in every cell.
    kept = table.drop_duplicates(
        ["trial_id", "epoch", *COLUMNS[:7], "source_seed"], keep="last", ignore_index=True
    )
    repeats = []
    if dropped := len(table) - len(kept):
        rows = count(dropped, "duplicate row")
        repeats = [f"{rows} dropped: same trial and epoch, the last of each kept."]
    return kept, list(problems.values()), repeats


def _raw(records: Iterable[Record], problems: dict[Any, _Problem], most: int) -> DataFrame:
    """The cells of a file under the names that columns have here, and the `place` of every row."""
    import pandas as pd

    names, lines = [*COLUMNS], []
    for where, record in records:
        cells = record if isinstance(record, str) else _named(record)
        if not isinstance(cells, str) and (missing := [name for name in REQUIRED if name not in cells]):
            cells = f"columns missing: {', '.join(missing)} (rows need {', '.join(REQUIRED)})"
        if isinstance(cells, str):
            _note(problems, cells, f"{where}: {cells}", _LEFT_OUT)
        elif len(lines) == most:
            raise ValueError(f"{where}: more than {MAX_ROWS:,} rows: leave some out")
        else:
            names = names if lines else [*COLUMNS, *(name for name in cells if name not in COLUMNS)]
            lines.append([where, *map(cells.get, names)])
    return pd.DataFrame(lines, columns=["place", *names], dtype=object)


def _named(record: Mapping[str, Any]) -> dict[str, Any] | str:
    """The cells by their columns' names here, with % where the column is in percent; or what is wrong."""
    cells: dict[str, Any] = {}
    for name, value in record.items():
        known, in_percent = column_name(name)
        if known in cells:
            return f"two columns are {known}: rename or delete one"
        mark = in_percent and not (value is None or value == "" or value != value or is_marked(value))
        cells[known] = f"{value}%" if mark else value
    return cells


def _note(problems: dict[Any, _Problem], kind: Any, first: str, outcome: str, number: int = 1) -> None:
    before = problems.get(kind, _Problem(first, 0, outcome))
    problems[kind] = before._replace(number=before.number + number)


def _shortened(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:100]}…"


_LEFT_OUT = "left out"
_MISSING = "counts as missing"
_PERCENT = "is above 1 or has a % sign, so all of its file were taken as percent and divided by 100"
_IN_RANGE = "accuracies are fractions in [0, 1], or all in percent"
_UNKNOWN = (
    "it cannot be known whether the accuracies of this file are fractions or percent, so all of them count "
    "as missing (set config.report.accuracy_unit=fraction or =percent)"
)


def _fractions(
    raw: DataFrame, values: np.ndarray, files: list[np.ndarray], unit: str, problems: dict[Any, _Problem]
) -> np.ndarray:
    """Accuracies as fractions, float64 [rows, 2]; `files` are the usable rows of each."""
    marked = np.array([list(map(is_marked, raw[name])) for name in ACCURACIES], bool).T
    whole = np.logical_and.reduce([list(map(is_whole, raw[name])) for name in ACCURACIES])
    parts = []
    for rows in files:  # A column with a % sign has its own unit; the others, of one program, share one.
        for columns in ([0], [1]) if marked[rows].any() else ([0, 1],):
            y, marks = values[rows][:, columns], marked[rows][:, columns]
            parts.append((rows, columns, marks.any(), _unit(y, marks, whole[rows])))
    known = {found for _, _, is_signed, found in parts if not is_signed} & {"fraction", "percent"}

    def note(rows: np.ndarray, column: int, kind: Any, outcome: str) -> None:
        if rows.size:
            first = f"{raw['place'][rows[0]]}: {ACCURACIES[column]} = {values[rows[0], column].item()!r}"
            _note(problems, kind, f"{first}: {_IN_RANGE}", outcome, rows.size)

    fractions = values.copy()
    for rows, columns, is_signed, found in parts:
        if unit != "auto":
            found = unit
        elif not is_signed and found == "fraction" and len(known) == 2:
            # Among files in percent: it may be one in fractions, or one in which all is near chance.
            found = "other"
        elif not is_signed and found == "whole" and len(known) == 1:
            [found] = known
        for column in columns:
            y, marks, name = values[rows, column], marked[rows, column], ACCURACIES[column]
            large = (y > _LARGEST) | marks
            if found in ("mixed", "whole", "other"):
                note(rows[large if found == "mixed" else large | (y > 0)], column, found, _UNKNOWN)
                fractions[rows, column] = math.nan
            else:
                percent = marks | (found == "percent")
                note(rows[large & percent], column, (name, "percent"), f"{name} {_PERCENT}")
                fractions[rows[percent], column] /= 100
            y = fractions[rows, column]
            strays = rows[(y < -_ROUNDING) | (y > _LARGEST)]
            note(strays, column, (name, "range"), f"{name} {_MISSING}")
            fractions[strays, column] = math.nan
    return fractions


def _unit(values: np.ndarray, marked: np.ndarray, whole: np.ndarray) -> str:
    """Of columns [m, c]: "fraction", "percent"; unknown: "mixed", "whole" (no point at all); "": all zero."""
    largest = np.where(values > 0, values, 0).max(axis=1)
    above, known = ((largest > _LARGEST) | marked.any(axis=1)).sum(), (largest > 0).sum()
    if above:
        return "percent" if above >= _MOSTLY * known else "mixed"
    return "" if not known else "whole" if whole.all() else "fraction"
