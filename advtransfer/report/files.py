"""Files beside a page, written whole or not at all, on a local disk or in a bucket; CSV without formulas."""

from __future__ import annotations

import csv
import io
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advtransfer.foreign import AnyPath, inside

if TYPE_CHECKING:
    from pandas import DataFrame


def csv_text(rows: DataFrame | Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> str:
    """A table, or records with these columns or else the first one's, as CSV; None and NaN are empty cells,
    floats keep every digit."""
    import pandas as pd

    if isinstance(rows, pd.DataFrame):
        return csv_lines([list(rows), *rows.itertuples(index=False, name=None)])
    columns = columns or list(rows[0])
    return csv_lines([columns, *(map(row.get, columns) for row in rows)])


def csv_lines(lines: Iterable[Iterable[Any]]) -> str:
    """Lines of cells as CSV. Text that a spreadsheet would take for a formula has an apostrophe before it,
    which our own reader takes away."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\r\n")  # a \r in a cell is quoted if it ends lines
    for line in lines:
        writer.writerow([_no_formula(null(cell)) for cell in line])
        buffer.seek(buffer.truncate(buffer.tell() - 2))
        buffer.write("\n")
    return buffer.getvalue()


def null(value: Any) -> Any:
    """None for NaN, and NumPy's scalars as Python's: what JSON and CSV can hold."""
    value = value.item() if hasattr(value, "item") else value
    return None if value != value else value


def _no_formula(cell: Any) -> Any:
    is_formula = isinstance(cell, str) and FORMULA.match(cell) and not _NUMBERS.fullmatch(cell)
    return f"'{cell}" if is_formula else cell


# As OWASP lists them, and their wide forms; text that begins so after apostrophes has to keep these.
FORMULA = re.compile("'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
_NUMBERS = re.compile(r"[-+]?[\d.]+( [-+]?[\d.]+)*")


def add_files(files: dict[str, str | bytes], more: Mapping[str, str | bytes]) -> None:
    """Adds files by path to others.

    Raises:
      ValueError: two have one name, or names that differ in capitals alone.
    """
    taken = {name.casefold() for name in files}
    for name, content in more.items():
        if name.casefold() in taken:
            raise ValueError(f"two files of this report are called {name!r}")
        taken.add(name.casefold())
        files[name] = content


def write_files(folder: str | AnyPath, files: Mapping[str, str | bytes]) -> AnyPath:
    """Writes files into a folder, each whole, the last one last; returns the path of that.

    Raises:
      ValueError: a name leads out of the folder, or the last file exists and is not a page of ours; nothing
        is written then.
    """
    folder = Path(folder) if isinstance(folder, str) else folder
    paths = [inside(folder, name) for name in files]
    if paths[-1].exists() and b"advtransfer" not in paths[-1].read_bytes():
        raise ValueError(f"{paths[-1]} is not a page of advtransfer: move it, or choose another folder")
    for path, content in zip(paths, files.values(), strict=True):
        write_atomically(path, content)
    return paths[-1]


def write_atomically(path: AnyPath, content: str | bytes) -> None:
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
