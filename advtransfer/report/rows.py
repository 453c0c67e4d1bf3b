"""Result rows on disk: one dict per evaluated epoch of one trial, as JSON lines, CSV or Parquet.

Files are reached through the path object that is given, with methods that `pathlib.Path` and
`etils.epath.Path` share, so rows and reports may lie in a bucket.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import logging
import math
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from advtransfer.foreign import inside, parse_json, read_bytes
from advtransfer.report.cells import (
    COLUMNS,
    COUNTS,
    MAX_ROWS,
    NUMBERS,
    REQUIRED,
    Problem,
    Record,
    Row,
    clean_files,
    column,
)


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
    """Reads a .jsonl, .csv or .parquet file of rows, or a folder of them.

    A folder is searched to the bottom for JSON lines; if it holds none, for CSV; then for
    Parquet. Files that are plainly something else (a training log, a summary) are passed over.

    Returns:
      Rows with every column of `COLUMNS`: counts as int, measurements as float (NaN where the
      cell was empty), the rest as str; a seed that is no number stays a str. Of a trial and epoch
      that occurs twice the last is kept.

    Raises:
      ValueError: in one line, with the file (and the line): nothing to read, columns missing, a
        line that is not a row, a value of the wrong kind, accuracies outside [0, 1].
    """
    rows, problems, repeats = _read(path)
    if problems:
        raise ValueError(problems[0].first)
    if repeats:
        logging.getLogger(__name__).info("%s: %s", path, _repeated(repeats))
    return rows


def read_foreign_rows(path: str | os.PathLike[str], unit: str = "auto") -> tuple[list[Row], list[str]]:
    """As `read_rows`, but what cannot be used is left out, and told: rows, and a sentence on each kind.

    Args:
      unit: of accuracies, "fraction" or "percent"; "auto": told from all that a file holds.

    Raises:
      ValueError: in one line: nothing to read, columns missing, no row that can be used.
    """
    rows, problems, repeats = _read(path, unit)
    if not rows:
        raise ValueError(problems[0].first)
    told = [problem.sentence for problem in problems]
    return rows, [*told, _repeated(repeats)] if repeats else told


def _read(path: str | os.PathLike[str], unit: str = "auto") -> tuple[list[Row], list[Problem], int]:
    path = Path(path) if isinstance(path, str) else path
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder of rows")
    read, problems = clean_files((_records(file) for file in _row_files(path)), unit)
    if not read and not problems:
        raise ValueError(f"{path}: holds no rows")
    rows = drop_duplicates(read)
    return rows, problems, len(read) - len(rows)


def _repeated(number: int) -> str:
    rows = "1 duplicate row" if number == 1 else f"{number:,} duplicate rows"
    return f"{rows} dropped: same trial and epoch, the last of each kept."


def write_rows(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> Path:
    """Writes rows to a .csv or .jsonl file, whole or not at all; NaN becomes an empty cell or null.

    Raises:
      ValueError: the ending of `path` is neither .csv nor .jsonl.
    """
    path = Path(path) if isinstance(path, str) else path
    if path.suffix == ".csv":
        extra = {name: None for row in rows for name in row if name not in COLUMNS}
        text = csv_text(rows, (*COLUMNS, *extra))
    elif path.suffix == ".jsonl":
        text = "".join(f"{json.dumps({k: _null(v) for k, v in row.items()})}\n" for row in rows)
    else:
        raise ValueError(f"{path}: rows are written as .csv or .jsonl")
    write_atomically(path, text)
    return path


def csv_text(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """`rows` as CSV with these columns; None and NaN are empty cells, floats keep every digit."""
    return csv_lines([columns, *([row.get(name) for name in columns] for row in rows)])


def csv_lines(lines: Iterable[Iterable[Any]]) -> str:
    """Lines of cells as CSV. Text that a spreadsheet would take for a formula has an apostrophe before it,
    which our own reader takes away."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\r\n")  # a \r in a cell is quoted if it ends lines
    for line in lines:
        writer.writerow([_no_formula(_null(cell)) for cell in line])
        buffer.seek(buffer.truncate(buffer.tell() - 2))
        buffer.write("\n")
    return buffer.getvalue()


def _no_formula(cell: Any) -> Any:
    is_formula = isinstance(cell, str) and _FORMULA.match(cell) and not _NUMBERS.fullmatch(cell)
    return f"'{cell}" if is_formula else cell


# As OWASP lists them, and their wide forms; text that begins so after apostrophes has to keep these.
_NUMBERS = re.compile(r"[-+]?[\d.]+( [-+]?[\d.]+)*")
_FORMULA = re.compile("'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")


def add_files(files: dict[str, str | bytes], more: Mapping[str, str | bytes]) -> None:
    """Adds files by name to others.

    Raises:
      ValueError: two have one name, or names that differ in capitals alone.
    """
    taken = {name.casefold() for name in files}
    for name, content in more.items():
        if name.casefold() in taken:
            raise ValueError(f"two files of this report are called {name!r}")
        taken.add(name.casefold())
        files[name] = content


def write_files(folder: str | os.PathLike[str], files: Mapping[str, str | bytes]) -> Path:
    """Writes files into a folder, each whole, the last one last; returns the path of that.

    Raises:
      ValueError: a name leads out of the folder, or the last file is there and is no page of ours; nothing is
        written then.
    """
    folder = Path(folder) if isinstance(folder, str) else folder
    paths = [inside(folder, name) for name in files]
    if paths[-1].exists() and b"advtransfer" not in paths[-1].read_bytes():
        raise ValueError(f"{paths[-1]} is no page of advtransfer's: move it, or choose another folder")
    for path, content in zip(paths, files.values(), strict=True):
        write_atomically(path, content)
    return paths[-1]


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a whole file or none: a local one beside `path` and renamed, one in a bucket as one object."""
    content = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(path, Path):
        path.write_bytes(content)
        return
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def drop_duplicates(rows: Iterable[Row]) -> list[Row]:
    """Keeps the last row of each trial and epoch, in the order of their first appearance."""
    # trial_id alone would do for our own rows; other writers may number trials anew in every cell.
    identity = ("trial_id", "epoch", *COLUMNS[:7])
    return list({tuple(map(str, map(row.get, identity))): row for row in rows}.values())


def _row_files(path: Path) -> list[Path]:
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


def _files(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """Every regular file below, in order; hidden ones and links back up are passed over."""
    place = os.path.realpath(folder) if isinstance(folder, Path) else str(folder)
    if place in above:
        return
    for entry in sorted(folder.iterdir(), key=str):
        if entry.is_dir():
            yield from _files(entry, (*above, place))
        elif not entry.name.startswith(".") and entry.is_file():
            yield entry


def _looks_like_rows(file: Path) -> bool:
    """At least half of the required columns in the first record: then it is meant to be rows."""
    _, first = next(_records(file), ("", ""))
    names = set() if isinstance(first, str) else {column(name)[0] for name in first}
    return 2 * len(names & {*REQUIRED}) >= len(REQUIRED)


def _records(file: Path) -> Iterator[Record]:
    reader = _READERS.get(file.suffix)
    if reader is None:
        raise ValueError(f"{file}: rows are read from {', '.join(_READERS)} files")
    return reader(file)


def _text(file: Path) -> str:
    """A file's text: UTF-8, or what its first bytes say. What is no UTF-8 becomes surrogates, for which names
    are refused."""
    content = read_bytes(file)
    for mark, encoding in _MARKS.items():
        if content.startswith(mark):
            return content.decode(encoding)
    if b"\0" in content[:1000]:
        raise ValueError("it holds zero bytes, so it is no UTF-8: save it as UTF-8")
    return content.decode(errors="surrogateescape")


_MARKS = {  # UTF-32's begins with UTF-16's
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def _read_jsonl(file: Path) -> Iterator[Record]:
    try:
        text = _text(file)
    except ValueError as error:
        yield str(file), f"no text ({error})"
        return
    for number, line in enumerate(io.StringIO(text, newline="\n"), start=1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            record = parse_json(line, _fields)
        except _Twice as error:
            yield where, f"two fields are called {error}: rename or delete one"
        except ValueError:
            yield where, "not a line of JSON"
        else:
            yield where, record if isinstance(record, dict) else "no JSON object"


class _Twice(ValueError):
    """A name that two fields have."""


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise _Twice(name)
        fields[name] = value
    return fields


def _read_csv(file: Path) -> Iterator[Record]:
    try:
        text = _text(file)
    except ValueError as error:
        yield str(file), f"no text ({error})"
        return
    told = re.match(r"sep=([,;\t])\r?\n", text)  # a line for Excel
    start = told.end() if told else 0
    first = re.split("[\r\n]", text[start : start + 100_000])[0]
    separator = told[1] if told else max(",;\t", key=lambda mark: _num_columns(first, mark))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    try:
        if told:
            next(reader)
        header = [_unquoted(name).strip() for name in next(reader, [])]
        if twice := next((name for name in header if name and header.count(name) > 1), ""):
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


def _num_columns(line: str, separator: str) -> int:
    """How many of the columns of rows a line names."""
    return len({column(name)[0] for name in next(csv.reader([line], delimiter=separator), [])} & {*COLUMNS})


def _unquoted(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def _with_points(record: Mapping[str, str]) -> Mapping[str, str] | str:
    """The cells with points for decimal commas; or what is wrong with one that could be two numbers."""
    points = dict(record)
    for name, cell in record.items():
        known, _ = column(name)
        if known in NUMBERS and re.fullmatch(r"\s*[+-]?\d*,\d+(e[+-]?\d+)?\s*%?\s*", cell, re.IGNORECASE):
            points[name] = cell.replace(",", ".")
        elif known in COUNTS and re.fullmatch(r"\s*\d{1,3}(\.\d{3})+\s*", cell):
            return f"{name} = {cell!r} has a point, or a mark of thousands: write digits alone"
    return points


def _read_parquet(file: Path) -> Iterator[Record]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{file}: reading Parquet needs pyarrow: pip install pyarrow") from None
    try:
        table = pyarrow.parquet.ParquetFile(io.BytesIO(read_bytes(file)))
        if table.metadata.num_rows > MAX_ROWS:
            raise ValueError(f"{table.metadata.num_rows:,} rows, more than {MAX_ROWS:,}")
        names = table.schema_arrow.names
        wanted = [name for name in names if column(name)[0] in COLUMNS]
        if twice := next((name for name in wanted if names.count(name) > 1), ""):
            raise ValueError(f"two columns are called {twice}: rename or delete one")
        number = 0
        for batch in table.iter_batches(1000, columns=wanted):
            for record in batch.to_pylist():
                number += 1
                yield f"{file}:{number}", record
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        yield str(file), f"not a Parquet file of rows ({str(error).splitlines()[0]})"


_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _null(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value  # NumPy's scalars are no JSON
    return None if isinstance(value, float) and math.isnan(value) else value
