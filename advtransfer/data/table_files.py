"""The rows of tables: CSV, TSV and Parquet.

Rows are numbered as programs show them: in CSV from 1, which is the header, in Parquet from 0.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from advtransfer import foreign
from advtransfer.data.listed import printable

# Names of columns in small letters, without "-", "_", "." and blanks.
_USUAL = {
    "image": (
        *("image", "path", "file", "filename", "filepath", "img", "imgname", "imgpath"),
        *("imagefile", "imagefilename", "imagename", "imagepath"),
    ),
    "label": (
        *("label", "class", "category", "species", "target"),
        *("labels", "labelname", "classlabel", "classname", "categoryname"),
    ),
    "split": ("split", "set", "subset", "partition"),
}
_IDS = ("imageid", "imgid", "id", "idcode")  # name images only in tables without any of the above
_MAX_BYTES = 1 << 31  # of the images of a row group: Arrow reads no more at once


class Row(NamedTuple):
    """One image as written in a table; what is missing is empty."""

    file: Path  # of the table
    number: int
    image: str  # its path; empty if the table contains the image
    label: str
    split: str

    def __str__(self) -> str:
        return row_name(self.file, self.number)


def row_name(file: Path, number: int) -> str:
    return f"row {number} of {file.name}"


class Table(NamedTuple):
    """The content of one file, without images."""

    rows: list[Row]
    columns: dict[str, str]  # image, label and perhaps split: the names of their columns
    class_names: tuple[str, ...] | None = None  # declared in the file, in this order
    image_column: str | None = None  # contains the images
    groups: tuple[int, ...] = ()  # the first rows of the row groups, and the number of rows


def read_table(file: Path) -> Table:
    """Reads the file of a table, without images that it contains.

    Raises:
      ValueError: it is no table, its columns are not recognised, or their types are not supported; in one
        line.
    """
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet}
    if (reader := readers.get(file.suffix.lower())) is None:
        raise ValueError("only .csv, .tsv and .parquet are read: save the table as CSV UTF-8")
    try:
        return reader(file)
    except (OSError, ValueError, NotImplementedError) as error:  # of pandas and pyarrow, too
        raise ValueError(" ".join(str(error).split())) from error


def find_columns(names: Sequence[str]) -> dict[str, int]:
    """The places of the images, their labels and perhaps their splits among the columns, by usual names.

    Raises:
      ValueError: no column, or several, could be the images or the labels.
    """
    plain = [re.sub(r"[-_. ]", "", name).casefold() for name in names]
    shown = [printable(name)[:40] for name in names]
    found = {}
    for role, usual in _USUAL.items():
        places = [i for i, name in enumerate(plain) if name in usual]
        if role == "image" and not places:
            places = [i for i, name in enumerate(plain) if name in _IDS]
        if len(places) == 1:
            (found[role],) = places
        elif places or role != "split":
            listed = ", ".join(shown[:20]) + (", …" if len(shown) > 20 else "")
            if places:
                raise ValueError(
                    f"{' and '.join(shown[i] for i in places)} could each be the {role}; the columns are "
                    f"{listed}: rename or delete all but one of them"
                )
            raise ValueError(
                f"no column is called {', '.join(usual[:4])} or alike; the columns are {listed}: rename one "
                f"to {role} in the header, which is the first row"
            )
    return found


def _read_csv(file: Path) -> Table:
    import pandas as pd

    data = foreign.read_bytes(file)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"byte 0x{data[error.start]:02x} in line {line} is not UTF-8: save the table as CSV UTF-8"
        ) from None
    if not text.strip():
        raise ValueError("the file is empty")
    names = re.sub(r'"[^"]*"', "", re.split(r"[\r\n]", text, maxsplit=1)[0])
    marks = "\t,;" if file.suffix.lower() == ".tsv" else ",;\t"
    mark = next((mark for mark in marks if mark in names), ",")
    try:
        frame = pd.read_csv(
            io.StringIO(text),
            sep=mark,
            header=None,  # as pandas renames columns of the same name
            dtype=str,
            na_filter=False,  # a class may be called NA
            skip_blank_lines=False,  # they count as rows
            skipinitialspace=mark + " " in names,
        )
    except pd.errors.ParserError as error:
        what = str(error).rpartition("C error: ")[2].strip()
        raise ValueError(f"{what}: check the quotes and the number of {mark!r} there") from None
    header = [str(cell).strip() for cell in frame.iloc[0]]
    frame = frame.iloc[1:][(frame.iloc[1:] != "").any(axis=1)]
    columns = find_columns(header)
    texts = {role: frame[place].tolist() for role, place in columns.items()}
    numbers = (index + 1 for index in frame.index)
    return Table(_rows(file, numbers, texts), {role: header[place] for role, place in columns.items()})


def _rows(file: Path, numbers: Iterable[int], texts: dict[str, list[str]]) -> list[Row]:
    splits = texts.get("split", [""] * len(texts["label"]))
    cells = zip(numbers, texts["image"], texts["label"], splits, strict=True)
    return [Row(file, number, image.strip(), label, split.strip()) for number, image, label, split in cells]


def _read_parquet(file: Path) -> Table:
    parquet = import_parquet()
    with parquet.ParquetFile(file) as opened:
        schema, metadata = opened.schema_arrow, opened.metadata
        columns = {role: schema.names[place] for role, place in find_columns(schema.names).items()}
        image, is_inside = _image_column(schema.field(columns["image"]), metadata)
        others = [columns[role] for role in columns if role != "image"]
        read = opened.read(columns=others if is_inside else [image, *others]).flatten()
    texts = {role: _to_text(read.column(columns[role]), columns[role]) for role in columns if role != "image"}
    texts["image"] = [""] * metadata.num_rows if is_inside else _to_text(read.column(image), image)
    class_names = _declared_names(schema, columns["label"])
    if class_names is not None:
        texts["label"] = [_class_name(class_names, i, label) for i, label in enumerate(texts["label"])]
    rows = _rows(file, range(metadata.num_rows), texts)
    sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    groups = tuple(np.cumsum([0, *sizes]).tolist())
    return Table(rows, columns, class_names, image if is_inside else None, groups)


def import_parquet() -> Any:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ValueError("reading Parquet needs pyarrow: pip install pyarrow") from None
    return parquet


def _image_column(field: Any, metadata: Any) -> tuple[str, bool]:
    """The column, or the part of a struct, with the encoded images or their paths; whether it is images."""
    from pyarrow import types

    parts = {field.name: field.type}
    if types.is_struct(field.type):
        inner = (field.type.field(i) for i in range(field.type.num_fields))
        parts = {f"{field.name}.{part.name}": part.type for part in inner if part.name in ("bytes", "path")}
    for i in range(metadata.num_columns):
        path = metadata.schema.column(i).path
        if path in parts and (types.is_binary(parts[path]) or types.is_large_binary(parts[path])):
            chunks = [metadata.row_group(group).column(i) for group in range(metadata.num_row_groups)]
            if (size := max((chunk.total_uncompressed_size for chunk in chunks), default=0)) >= _MAX_BYTES:
                raise ValueError(
                    f"a row group has {size / 1e9:,.1f} GB of images, and a whole row group is read at once: "
                    "write the table with row groups of about 100 rows"
                )
            if any(not c.statistics or (c.statistics.null_count or 0) < c.num_values for c in chunks):
                return path, True
    for path, kind in parts.items():
        if types.is_string(kind) or types.is_large_string(kind):
            return path, False
    raise ValueError(f"the column {field.name} is {field.type}, not images as bytes or paths")


def _to_text(column: Any, name: str) -> list[str]:
    from pyarrow import types

    kind = column.type.value_type if types.is_dictionary(column.type) else column.type
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_integer(kind)):
        raise ValueError(f"the column {name} is {kind}, not text or integers")
    return ["" if value is None else str(value) for value in column.to_pylist()]


def _declared_names(schema: Any, label: str) -> tuple[str, ...] | None:
    """The class names of integer labels as the library `datasets` declares them, if it does."""
    from pyarrow import types

    declared = (schema.metadata or {}).get(b"huggingface")
    if declared is None or not types.is_integer(schema.field(label).type):
        return None
    try:
        feature = foreign.parse_json(declared)["info"]["features"].get(label, {})
        names = feature["names"] if feature.get("_type") == "ClassLabel" else None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError("its metadata called huggingface do not describe its columns") from None
    return None if names is None else tuple(printable(str(name)) for name in names)


def _class_name(class_names: Sequence[str], row: int, label: str) -> str:
    if label in ("", "-1"):  # not labelled
        return ""
    if not 0 <= int(label) < len(class_names):
        raise ValueError(f"row {row} has the label {label}, but class names for 0 to {len(class_names) - 1}")
    return class_names[int(label)]
