"""What comes from outside: names that become paths, text that is shown, files and JSON that are read."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from etils import epath

AnyPath = Path | epath.Path
P = TypeVar("P", bound=AnyPath)
MAX_BYTES = 1 << 29  # of a file of text
_MAX_NAME = 200  # bytes: file systems take 255, and a name beside it for the time of writing is longer

_NOT_SHOWN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but tab and newline
    "\u2028-\u202e\u2066-\u2069"  # separators of lines; marks that turn the direction of what follows
    "\ud800-\udfff\ufffe\uffff]"  # no characters
)


def printable(text: str) -> str:
    """The text without what a terminal would obey or XML forbids: control characters become pictures of them.

    Tab and newline stay. What has no picture becomes U+FFFD.
    """
    return _NOT_SHOWN.sub(_picture, text)


def _picture(match: re.Match[str]) -> str:
    code = ord(match[0])
    return chr(0x2400 + code) if code < 0x20 else "\N{SYMBOL FOR DELETE}" if code == 0x7F else "\ufffd"


def inside(folder: P, name: str) -> P:
    """The path of a file in `folder`; "/" in the name separates folders below it.

    Raises:
      ValueError: the name could lead out of the folder, or is none that every file system takes.
    """
    for part in name.split("/"):
        if part in ("", ".", "..") or _NOT_SHOWN.search(part) or re.search(r'[\\:*?"<>|\t\n]', part):
            raise ValueError(f"{printable(name)!r} is not the name of a file inside a folder")
        if len(part.encode()) > _MAX_NAME:
            raise ValueError(
                f"{printable(name[:40])!r}… is longer than {_MAX_NAME} bytes: give a shorter name"
            )
    return folder / name


def file_name(text: str, taken: set[str]) -> str:
    """A short file name in letters, digits and "-" made of a text, and of no other that is `taken`, whatever
    the capitals; it is added to these. "" becomes a number."""
    base = re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")[:60]
    found, number = base, 0
    while not found or found.casefold() in taken:
        number += 1
        found = f"{base}-{number}".lstrip("-")
    taken.add(found.casefold())
    return found


def read_bytes(path: AnyPath, limit: int = MAX_BYTES) -> bytes:
    """What a file holds, whose size is looked at first.

    Raises:
      ValueError: it is not a regular file, or larger than `limit` bytes.
      OSError: it is not there or cannot be read.
    """
    try:
        found = path.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(f"{path} is a link to itself") from None
        raise
    if isinstance(found, os.stat_result):
        is_regular, size = stat.S_ISREG(found.st_mode), found.st_size
    else:
        is_regular, size = path.is_file(), found.length
    if not is_regular:
        raise ValueError(f"{path} is not a regular file")
    if size > limit:
        raise ValueError(f"{path} has {size:,} bytes, more than {limit:,}: it is not read")
    return path.read_bytes()


def parse_json(text: str | bytes, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value of a JSON text; `pairs` makes the value of an object, instead of a dict.

    Raises:
      ValueError: it is not JSON, or nested too deep.
    """
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def read_json(path: AnyPath, limit: int = MAX_BYTES) -> Any:
    """The value of a file of JSON.

    Raises:
      ValueError: as `read_bytes` and `parse_json`.
      OSError: it is not there or cannot be read.
    """
    return parse_json(read_bytes(path, limit))
