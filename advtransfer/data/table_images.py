"""The images of tables: files that are named in them, or stored in Parquet files."""

from __future__ import annotations

import bisect
import functools
import io
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
from jaxtyping import Integer

from advtransfer.data.layout import SUFFIXES
from advtransfer.data.listed import file_records, printable
from advtransfer.data.recorded import Records
from advtransfer.data.table_files import Row, Table, import_parquet, row_name

_NUM_GROUPS = 2  # row groups that a process keeps
_LOCK = threading.Lock()  # threads that need the same row group read it once


class Image(NamedTuple):
    """One image of a table."""

    row: Row
    path: Path  # of the table, if that contains the image


class Found(NamedTuple):
    """The images of a table that names files."""

    listed: dict[str, list[tuple[Image, int]]]  # images and labels of each split, by label and path
    missing: set[Path]  # those that do not exist
    remarks: list[str]


def find_images(name: str, rows: dict[str, list[tuple[Row, int]]]) -> Found:
    """Finds the files of the images, each once.

    Args:
      name: of the dataset.
      rows: of each split, with their labels.

    Raises:
      ValueError: a path that is an address, a folder, no image, or that fits several files; an image with two
        classes or in two splits; or not one of the images exists.
    """

    @functools.cache
    def suffixes(folder: str) -> dict[str, list[str]]:
        """The suffixes of the images in a folder, by the rest of their names."""
        found: dict[str, list[str]] = {}
        for file in sorted(os.listdir(folder or ".")) if os.path.isdir(folder or ".") else ():
            stem, suffix = os.path.splitext(file)
            if suffix.lower() in SUFFIXES:
                found.setdefault(stem, []).append(suffix)
        return found

    listed: dict[str, list[tuple[Image, int]]] = {split: [] for split in rows}
    known: dict[str, tuple[Row, int, str]] = {}
    missing, added, num_repeated = set[Path](), Counter[str](), 0
    for split, row, label in ((split, *pair) for split, pairs in rows.items() for pair in pairs):
        path, suffix = _locate(name, row, suffixes)
        first = known.setdefault(os.path.normpath(path), (row, label, split))
        if first[0] is row:
            listed[split].append((Image(row, path), label))
            added[suffix or ""] += 1
            if suffix is None:
                missing.add(path)
        elif first[1:] == (label, split):
            num_repeated += 1
        else:
            what = "classes" if first[1] != label else "splits"
            raise ValueError(
                f"{name}: {_shown(row)} has two {what}, in {first[0]} and in {row}: delete one of the rows"
            )
    if len(missing) == len(known):
        raise ValueError(
            f"{name}: none of its {len(known):,} images exists, such as {printable(str(min(missing)))}: "
            "paths have to be relative to the folder of the table"
        )
    for images in listed.values():
        images.sort(key=lambda pair: (pair[1], str(pair[0].path.parent).split(os.sep), pair[0].path.name))
    remarks = [f"added {suffix} to {count:,} paths" for suffix, count in added.items() if suffix]
    if num_repeated:
        remarks.append(
            f"left out {num_repeated:,} row{'s' * (num_repeated != 1)} repeating an image with its class"
        )
    return Found(listed, missing, remarks)


def _locate(name: str, row: Row, suffixes: Callable[[str], dict[str, list[str]]]) -> tuple[Path, str | None]:
    """The path of an image, and the suffix that was added to it, or None if there is no such file."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", row.image):
        raise ValueError(
            f"{name}: {_shown(row)} in {row} is an address: download the images, write their paths"
        )
    path = ""
    for text in dict.fromkeys((row.image, row.image.replace("\\", "/"))):
        path = os.path.join(os.path.dirname(row.file), text)
        if os.path.exists(path):
            suffix = os.path.splitext(path)[1]
            if os.path.isdir(path):
                raise ValueError(
                    f"{name}: {_shown(row)} in {row} is a folder, not an image: write a file's path"
                )
            if suffix and suffix.lower() not in SUFFIXES:
                raise ValueError(
                    f"{name}: {_shown(row)} in {row} is no image: files called {suffix} are not read"
                )
            return Path(path), ""
        folder, stem = os.path.split(path)
        found = suffixes(folder).get(stem, [])
        if len(found) > 1:
            raise ValueError(
                f"{name}: {_shown(row)} in {row} could be the file with {' or '.join(found)}: add the suffix"
            )
        if found:
            return Path(path + found[0]), found[0]
    return Path(path), None


def _shown(row: Row) -> str:
    return repr(printable(row.image))


def make_records(
    files: Sequence[Path], tables: Sequence[Table], images: Sequence[tuple[Image, int]]
) -> Records:
    """The records of images with labels, from the tables in `files`."""
    numbers = {file: i for i, file in enumerate(files)}
    places = np.array([(numbers[image.row.file], image.row.number) for image, _ in images], np.int64)
    labels, column = np.array([label for _, label in images], np.int32), tables[0].image_column
    if column is None:
        records = file_records(files[0].parent, [(image.path, label) for image, label in images])
        return records._replace(describe=functools.partial(_describe, files, places, records.describe))
    groups = [table.groups for table in tables]
    _read_group.cache_clear()  # of an earlier file with the same name
    return Records(
        count=len(images),
        labels=lambda: labels,
        read=functools.partial(read_images, files, groups, column, places, labels),
        describe=functools.partial(_describe, files, places, None),
    )


def _describe(
    files: Sequence[Path],
    places: Integer[np.ndarray, "n 2"],
    name: Callable[[int], str] | None,
    index: SupportsIndex,
) -> str:
    file, number = places[index].tolist()
    return (f"{name(int(index))}, " if name else "") + row_name(files[file], number)


def read_images(
    files: Sequence[Path],
    groups: Sequence[tuple[int, ...]],
    column: str,
    places: Integer[np.ndarray, "n 2"],
    labels: Integer[np.ndarray, " n"],
    indices: Iterable[SupportsIndex],
) -> list[tuple[io.BytesIO, int]]:
    """Encoded images with their labels, by index, out of Parquet files.

    A row group is read as a whole, once for all of its images.

    Args:
      files: Parquet files.
      groups: of each file, the first rows of its row groups.
      column: that contains the images.
      places: file and row of each image.
      labels: of each image.
      indices: which images.

    Raises:
      ValueError: a file cannot be read.
    """
    wanted, found = [int(index) for index in indices], {}
    for index in sorted(wanted, key=lambda index: tuple(places[index])):
        file, row = places[index]
        group = bisect.bisect_right(groups[file], row) - 1
        with _LOCK:
            images = _read_group(files[file], group, column)
        start, stop = groups[file][group : group + 2]
        if len(images) != stop - start:
            raise ValueError(f"{files[file]} has changed or is damaged in row group {group}")
        found[index] = images[int(row) - start].as_py() or b""
    return [(io.BytesIO(found[index]), int(labels[index])) for index in wanted]


@functools.lru_cache(maxsize=_NUM_GROUPS)
def _read_group(file: Path, group: int, column: str) -> Any:
    try:
        with import_parquet().ParquetFile(file) as opened:
            return opened.read_row_group(group, columns=[column]).flatten().column(0).combine_chunks()
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
