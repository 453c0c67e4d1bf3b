"""Result rows on disk: one dict per evaluated epoch of one trial, as JSON lines, CSV or Parquet.

Files are reached through the path object that is given, with methods that `pathlib.Path` and
`etils.epath.Path` share, so rows and reports may lie in a bucket.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from advtransfer.report.cells import COLUMNS, REQUIRED, Problem, Row, clean_rows

Record = tuple[str, Mapping[str, Any] | str]  # where it stands, and what: the cells, or why there are none


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


def read_foreign_rows(path: str | os.PathLike[str]) -> tuple[list[Row], list[str]]:
    """As `read_rows`, but what cannot be used is left out, and told: rows, and a sentence on each kind.

    Raises:
      ValueError: in one line: nothing to read, columns missing, no row that can be used.
    """
    rows, problems, repeats = _read(path)
    if not rows:
        raise ValueError(problems[0].first)
    told = [problem.sentence for problem in problems]
    return rows, [*told, _repeated(repeats)] if repeats else told


def _read(path: str | os.PathLike[str]) -> tuple[list[Row], list[Problem], int]:
    path = Path(path) if isinstance(path, str) else path
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder of rows")
    read, problems = clean_rows(record for file in _row_files(path) for record in _records(file))
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
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_null(row.get(name)) for name in columns] for row in rows)
    return buffer.getvalue()


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a whole file or none: a local one beside `path` and renamed, one in a bucket as one object."""
    content = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(path, Path):
        path.write_bytes(content)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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
    files = list(_files(path))
    for suffix in _READERS:
        rows = [file for file in files if file.suffix == suffix and _looks_like_rows(file)]
        if rows:
            return rows
    raise ValueError(f"{path}: no rows found in this folder ({', '.join(_READERS)})")


def _files(folder: Path) -> Iterator[Path]:
    """Every file below, in order; hidden files are passed over."""
    for entry in sorted(folder.iterdir(), key=str):
        if entry.is_dir():
            yield from _files(entry)
        elif not entry.name.startswith("."):
            yield entry


def _looks_like_rows(file: Path) -> bool:
    """At least half of the required columns in the first record: then it is meant to be rows."""
    _, first = next(_records(file), ("", ""))
    return not isinstance(first, str) and 2 * sum(name in first for name in REQUIRED) >= len(REQUIRED)


def _records(file: Path) -> Iterator[Record]:
    reader = _READERS.get(file.suffix)
    if reader is None:
        raise ValueError(f"{file}: rows are read from {', '.join(_READERS)} files")
    return reader(file)


def _read_jsonl(file: Path) -> Iterator[Record]:
    for number, line in enumerate(io.BytesIO(file.read_bytes()), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            yield f"{file}:{number}", record if isinstance(record, dict) else "no JSON object"
        except ValueError:
            yield f"{file}:{number}", "not a line of JSON"


def _read_csv(file: Path) -> Iterator[Record]:
    reader = csv.reader(io.StringIO(file.read_bytes().decode("utf-8-sig", errors="replace"), newline=""))
    header = next(reader, [])
    try:
        for cells in reader:
            where = f"{file}:{reader.line_num}"
            if cells and len(cells) != len(header):
                yield where, f"{len(cells)} cells under {len(header)} columns"
            elif cells:
                yield where, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        yield f"{file}:{reader.line_num}", f"not a line of CSV ({error}), and nothing after it was read"


def _read_parquet(file: Path) -> Iterator[Record]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{file}: reading Parquet needs pyarrow: pip install pyarrow") from None
    try:
        records = pyarrow.parquet.read_table(io.BytesIO(file.read_bytes())).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{file}: not a Parquet file ({str(error).splitlines()[0]})") from None
    for number, record in enumerate(records, start=1):
        yield f"{file}:{number}", record


_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _null(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value  # NumPy's scalars are no JSON
    return None if isinstance(value, float) and math.isnan(value) else value
