"""Result rows on disk: one dict per evaluated epoch of one trial, as JSON lines, CSV or Parquet."""

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

COLUMNS = (
    "source",
    "source_norm",
    "source_eps",
    "target",
    "num_train_images",
    "num_unfrozen_blocks",
    "seed",
    "epoch",
    "train_accuracy",
    "train_loss",
    "test_accuracy",
    "test_loss",
    "seconds",
    "trial_id",
    "config",
)
REQUIRED = COLUMNS[:11]

Row = dict[str, Any]


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
    """Reads a .jsonl, .csv or .parquet file of rows, or a folder of them.

    A folder is searched to the bottom for JSON lines; if it holds none, for CSV; then for
    Parquet. Files that are plainly something else (a training log, a summary) are passed over.

    Returns:
      Rows with every column of `COLUMNS`: counts as int, measurements as float (NaN where the
      cell was empty), the rest as str. Of a trial and epoch that occurs twice the last is kept.

    Raises:
      ValueError: in one line, with the file (and the line): nothing to read, columns missing, a
        line that is not a row, a value of the wrong kind, accuracies outside [0, 1].
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder of rows")
    read = [row for file in _row_files(path) for row in coerce_rows(_records(file))]
    if not read:
        raise ValueError(f"{path}: holds no rows")
    rows = drop_duplicates(read)
    if len(rows) < len(read):
        logging.getLogger(__name__).info(
            "%s: %d duplicate rows dropped, the last of each kept", path, len(read) - len(rows)
        )
    return rows


def write_rows(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> Path:
    """Writes rows to a .csv or .jsonl file, whole or not at all; NaN becomes an empty cell or null.

    Raises:
      ValueError: the ending of `path` is neither .csv nor .jsonl.
    """
    path = Path(path)
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
    """Writes beside `path` and renames: a reader sees the old file or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def coerce_rows(records: Iterable[tuple[str, Mapping[str, Any]]]) -> list[Row]:
    """Gives every record its columns and types; `records` are pairs (where, record)."""
    rows = []
    for where, record in records:
        missing = [name for name in REQUIRED if name not in record]
        if missing:
            raise ValueError(
                f"{where}: columns missing: {', '.join(missing)} (rows need {', '.join(REQUIRED)})"
            )
        row = dict(record)
        for name, convert in _CONVERSIONS.items():
            try:
                row[name] = convert(row.get(name))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{where}: {name} = {row.get(name)!r}: {error}") from None
        rows.append(row)
    return rows


def drop_duplicates(rows: Iterable[Row]) -> list[Row]:
    """Keeps the last row of each trial and epoch, in the order of their first appearance."""
    # trial_id alone would do for our own rows; other writers may number trials anew in every cell.
    identity = ("trial_id", "epoch", *COLUMNS[:7])
    return list({tuple(map(str, map(row.get, identity))): row for row in rows}.values())


def _row_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    for suffix in _READERS:
        files = sorted(file for file in path.rglob(f"*{suffix}") if not file.name.startswith("."))
        files = [file for file in files if _looks_like_rows(file)]
        if files:
            return files
    raise ValueError(f"{path}: no rows found in this folder ({', '.join(_READERS)})")


def _looks_like_rows(file: Path) -> bool:
    """At least half of the required columns in the first record: then it is meant to be rows."""
    _, first = next(_records(file), ("", {}))
    return 2 * sum(name in first for name in REQUIRED) >= len(REQUIRED)


def _records(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    reader = _READERS.get(file.suffix)
    if reader is None:
        raise ValueError(f"{file}: rows are read from {', '.join(_READERS)} files")
    return reader(file)


def _read_jsonl(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with open(file, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{file}:{number}: not a line of JSON ({error})") from None
            if not isinstance(record, dict):
                raise ValueError(f"{file}:{number}: a row is a JSON object, not {line[:40]!r}")
            yield f"{file}:{number}", record


def _read_csv(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with open(file, newline="", encoding="utf-8-sig", errors="replace") as stream:
        reader = csv.reader(stream)
        header = next(reader, [])
        try:
            for cells in reader:
                where = f"{file}:{reader.line_num}"
                if cells and len(cells) != len(header):
                    raise ValueError(f"{where}: {len(cells)} cells under {len(header)} columns")
                if cells:
                    yield where, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise ValueError(f"{file}:{reader.line_num}: not a line of CSV ({error})") from None


def _read_parquet(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{file}: reading Parquet needs pyarrow: pip install pyarrow") from None
    try:
        records = pyarrow.parquet.read_table(file).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{file}: not a Parquet file ({str(error).splitlines()[0]})") from None
    for number, record in enumerate(records, start=1):
        yield f"{file}:{number}", record


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Mapping[str, Any]]]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _integer(value: Any) -> int:
    if value is None or value == "":
        raise ValueError("is empty")
    number = float(value)
    if not number.is_integer():
        raise ValueError("is not a whole number")
    return int(number)


def _positive(value: Any) -> int:
    number = _integer(value)
    if number < 1:
        raise ValueError("must be at least 1")
    return number


def _float(value: Any) -> float:
    return math.nan if value is None or value == "" else float(value)


def _accuracy(value: Any) -> float:
    number = _float(value)
    if not (math.isnan(number) or -1e-6 <= number <= 1 + 1e-6):
        raise ValueError("accuracies are fractions in [0, 1], not percent")
    return number


def _name(value: Any) -> str:
    if value is None or value == "":
        raise ValueError("is empty")
    return str(value)


def _norm(value: Any) -> str:
    # Writers that know a natural source as None leave an empty cell.
    return "none" if value is None else str(value).strip().lower() or "none"


def _text(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


def _null(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value  # NumPy's scalars are no JSON
    return None if isinstance(value, float) and math.isnan(value) else value


_CONVERSIONS: dict[str, Callable[[Any], Any]] = {
    "source": _name,
    "source_norm": _norm,
    "source_eps": _float,
    "target": _name,
    "num_train_images": _positive,
    "num_unfrozen_blocks": _integer,
    "seed": _integer,
    "epoch": _integer,
    "train_accuracy": _accuracy,
    "train_loss": _float,
    "test_accuracy": _accuracy,
    "test_loss": _float,
    "seconds": _float,
    "trial_id": _text,
    "config": _text,
}
