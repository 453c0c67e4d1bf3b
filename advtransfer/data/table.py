"""Tables of images and their classes.

`table:/path/labels.csv` (or .tsv) has a header and one row per image: a column of paths, relative to the
table's folder, a column of classes, and perhaps a column of splits, under usual names (`find_columns`). If
there is no column of splits, a file that is called train, test or validation (see `split_of`) is that split,
and any other is split as in `load_parts`. A path may lack the suffix of its file. Classes are ordered as in
module `folder`.

`table:/path/data.parquet` may also contain the images, as on the Hugging Face hub: a column `image` of
structs {bytes, path} or of bytes, and a column `label` of text, or of integers whose names the file declares.
To read one image, its whole row group is read: streaming is slow if that is of more than some 100 images.

`table:/path/data`, a folder with `train-00000-of-00002.parquet` and others, or a pattern such as
`table:/path/t*.csv`, is one table in several files. `:TRAIN` at the end selects the training images as in
module `folder`.
"""

from __future__ import annotations

import glob
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from advtransfer.data.cache import fingerprint
from advtransfer.data.layout import split_of
from advtransfer.data.listed import check_classes, class_order, printable, select_training
from advtransfer.data.recorded import SPLITS, Recording, split_name
from advtransfer.data.table_files import Row, Table, read_table
from advtransfer.data.table_images import Found, Image, find_images, make_records

_PATTERN = "select files with a pattern, such as table:/path/t*.csv"
_NUMBERS = re.compile(r"([-_]\d+)?(-of-\d+)?(-[0-9a-f]{16})?\Z")  # at the end of a file's name
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(-[0-9a-f]{16})?\.parquet")


def open_table(name: str) -> Recording:
    """Reads a table. The images are read later, and made upright by their EXIF orientation.

    Raises:
      ValueError: there is no such table, or it is damaged, incomplete, contradicts itself or could be read in
        two ways.
    """
    files, train = _find_files(name)
    tables = [_read(name, file) for file in files]
    first = tables[0]
    for file, table in zip(files, tables, strict=True):
        if (file.suffix.lower(), *table[1:4]) != (files[0].suffix.lower(), *first[1:4]):
            raise ValueError(
                f"{name}: {files[0].name} and {file.name} differ in format, columns, class names or kind of "
                f"images, so they are not one table: {_PATTERN}"
            )
    rows, remarks = _split(name, files, tables)
    class_names, labelled = _label(name, rows, first.class_names)
    if first.image_column is None:
        _refuse(name, "no path", [row for row in _all(rows) if not row.image], "fill in or delete")
        listed, missing, more = find_images(name, labelled)
    else:
        inside = {split: [(Image(row, row.file), i) for row, i in pairs] for split, pairs in labelled.items()}
        listed, missing, more = Found(inside, set(), [])
    paths = [] if first.image_column else [image.path for images in listed.values() for image, _ in images]
    if train not in (None, "train"):
        listed = select_training(name, listed, train)
    if others := [f"{column} as {role}" for role, column in first.columns.items() if column != role]:
        remarks.append(f"read the columns {printable(', '.join(others))}")
    return Recording(
        name=name,
        class_names=class_names,
        splits={split: make_records(files, tables, images) for split, images in listed.items()},
        identity={
            "files": fingerprint(files[0].parent, [*files, *paths]),
            "classes": class_names,
            "train": train or "train",
        },
        upright=True,
        remarks=(*remarks, *more),
        missing=tuple(
            printable(f"{image.row.image}, {image.row}")
            for images in listed.values()
            for image, _ in images
            if missing and image.path in missing
        ),
    )


def _find_files(name: str) -> tuple[list[Path], str | None]:
    """The files of the table, and what selects the training images."""
    where = name.partition(":")[2]
    for place, train in ((where, None), split_name(where)):  # a path may itself contain a colon
        path = Path(place).expanduser()
        if path.is_dir():
            return _find_shards(name, path), train
        if files := [path] if path.exists() else sorted(map(Path, glob.glob(str(path)))):
            return files, train
    raise ValueError(f"{name}: there is no table {path}")


def _find_shards(name: str, folder: Path) -> list[Path]:
    files = sorted(file for file in folder.glob("*.parquet") if not file.name.startswith("."))
    if not files:
        others = (*folder.glob("*.[ct]sv"), *(file.parent for file in folder.glob("*/*.parquet")))
        hint = f": name the table itself, such as table:{min(others)}" if others else ""
        raise ValueError(f"{name}: {folder} contains no .parquet files{hint}")
    found: dict[tuple[str, str], set[int]] = {}
    for file in files:
        if shard := _SHARD.fullmatch(file.name):
            found.setdefault((shard[1], shard[3]), set()).add(int(shard[2]))
    for (split, count), numbers in found.items():
        if lacking := set(range(int(count))) - numbers:
            raise ValueError(
                f"{name}: {folder} lacks {len(lacking):,} of {int(count):,} files of {split}, such as "
                f"{split}-{min(lacking):05}-of-{count}.parquet: copy them there"
            )
    return files


def _read(name: str, file: Path) -> Table:
    if not file.is_file():
        raise ValueError(f"{name}: {file} is not a file")
    try:
        return read_table(file)
    except ValueError as error:
        raise ValueError(f"{name}: cannot read {file.name}: {error}") from error


def _split(
    name: str, files: Sequence[Path], tables: Sequence[Table]
) -> tuple[dict[str, list[Row]], list[str]]:
    """The rows of each split, and remarks."""
    rows, column = [row for table in tables for row in table.rows], tables[0].columns.get("split")
    if not rows:
        raise ValueError(f"{name}: {files[0].name} has no rows")
    stems = {file: _NUMBERS.sub("", file.stem) for file in files}
    told, remarks = {file: split_of(stem) for file, stem in stems.items()}, list[str]()
    if column:
        _refuse(name, "no split", [row for row in rows if not row.split], "write train, validation or test")
        known = {value: split_of(value) for value in {row.split for row in rows}}
        if odd := [row for row in rows if not known[row.split]]:
            raise ValueError(
                f"{name}: {odd[0].split!r} in {odd[0]} is not train, validation or test: correct it, or "
                f"rename the column {column!r} if it has another meaning"
            )
        if len(files) > 1:
            odd = [row for row in rows if told[row.file] not in (None, known[row.split])]
            _refuse(name, "another split than in the file's name", odd, f"rename the column {column!r}")
        splits = [known[row.split] or "" for row in rows]
    else:
        nameless = [file.name for file in files if not told[file]]
        if 0 < len(nameless) < len(files):
            raise ValueError(
                f"{name}: {', '.join(nameless[:5])} is not called train, validation or test, as other files "
                f"are: rename it, or {_PATTERN}"
            )
        splits = [told[row.file] or "train" for row in rows]
        remarks += [
            f"read {file.name} as {told[file]}" for file in files if told[file] not in (None, stems[file])
        ]
    found: dict[str, list[Row]] = {}
    for row, split in zip(rows, splits, strict=True):
        found.setdefault(split, []).append(row)
    if len(found) > 1 and "test" in found and not any(row.label for row in found["test"]):
        remarks.append(f"left out {len(found.pop('test')):,} test images, which have no class")
    return {split: found[split] for split in SPLITS if split in found}, remarks


def _all(rows: dict[str, list[Row]]) -> list[Row]:
    return [row for some in rows.values() for row in some]


def _refuse(name: str, what: str, rows: Sequence[Row], how: str) -> None:
    """Raises a ValueError that names the first five of `rows`, if there are any."""
    if rows:
        more = f" and {len(rows) - 5:,} more" if len(rows) > 5 else ""
        raise ValueError(f"{name}: {what} in {', '.join(map(str, rows[:5]))}{more}: {how}")


def _label(
    name: str, rows: dict[str, list[Row]], declared: tuple[str, ...] | None
) -> tuple[tuple[str, ...], dict[str, list[tuple[Row, int]]]]:
    """The class names, and the rows of each split with their labels.

    Raises:
      ValueError: a row without a class, classes that differ only in capitals or blanks, without training
        images, or that do not occur in training.
    """
    everything = _all(rows)
    _refuse(name, "no class", [row for row in everything if not row.label.strip()], "fill in or delete")
    names = {label: unicodedata.normalize("NFC", label) for label in {row.label for row in everything}}
    if declared is None:
        firsts: dict[str, Row] = {}
        for row in everything:
            firsts.setdefault(names[row.label], row)
        _check_spelling(name, firsts)
        names = {label: printable(text.strip()) for label, text in names.items()}
    else:
        names = {label: label for label in names}
    classes = {split: {names[row.label] for row in some} for split, some in rows.items()}
    class_names = declared or tuple(sorted(next(iter(classes.values())), key=class_order))
    if unused := [one for one in class_names if one not in classes.get("train", class_names)]:
        more = f" and {len(unused) - 5:,} more" if len(unused) > 5 else ""
        raise ValueError(f"{name}: there are no training images of {', '.join(unused[:5])}{more}")
    for split, found in classes.items():
        check_classes(name, split, found, class_names)
    index = {class_name: i for i, class_name in enumerate(class_names)}
    return class_names, {
        split: [(row, index[names[row.label]]) for row in some] for split, some in rows.items()
    }


def _check_spelling(name: str, rows: dict[str, Row]) -> None:
    """Raises a ValueError if two classes, each with one of its rows, differ only in capitals or blanks."""
    known: dict[str, str] = {}
    for label in rows:
        other = known.setdefault("".join(label.split()).casefold(), label)
        if other != label:
            raise ValueError(
                f"{name}: the classes {other!r} in {rows[other]} and {label!r} in {rows[label]} differ only "
                "in capitals or blanks: write both alike"
            )
