"""Sections as JSON: data alone, which is drawn again; whatever is not of its field's type is refused.

A tuple with names is an object of its fields and its kind; an array is its bytes in base64. Pictures have 8
bits.
"""

from __future__ import annotations

import base64
import functools
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from advtransfer.report.figures import to_bytes
from advtransfer.report.sections import PictureRow, Plot, Section

Scalar = str | int | float | bool | None


def to_data(section: Section) -> dict[str, Any]:
    """The section as what JSON can hold: "title", "finding", "parts" (a list), "files" (an object)."""
    files = {
        name: {"columns": list(rows[0]), "rows": [[_encode(row.get(c)) for c in rows[0]] for row in rows]}
        for name, rows in section.files.items()
        if rows
    }
    return _encode(section._replace(files={})) | {"files": files}


def from_data(data: Mapping[str, Any]) -> Section:
    """The section that `to_data` made this of.

    Raises:
      ValueError: it is something else.
    """
    try:
        fields = {
            name: _decode(hint, data[name]) for name, hint in _hints(Section).items() if name != "files"
        }
        files = {_name(name): _records(**table) for name, table in data["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a section of a page: {error!r}") from error
    panels = [panel for part in fields["parts"] if isinstance(part, Plot) for panel in part.panels]
    if any(getattr(part, "numbers", "") not in ("", *files) for part in fields["parts"]):
        raise ValueError("not a section of a page: a part names a table that the section does not have")
    if any(panel.file for panel in panels):
        raise ValueError("not a section of a page: a figure would be written beside it")
    return Section(**fields, files=files)


def _name(name: str) -> str:
    if not re.fullmatch(r"\w{1,60}", name, re.ASCII):
        raise ValueError("not the name of a table")
    return name


def _records(columns: list[str], rows: list[list[Scalar]]) -> list[dict[str, Scalar]]:
    columns = _decode(Sequence[str], columns)
    rows = _decode(Sequence[Sequence[Scalar]], rows)
    return [dict(zip(columns, row, strict=True)) for row in rows]


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _encode(value: Any) -> Any:
    if isinstance(value, PictureRow):
        value = value._replace(images=to_bytes(value.images))
    if hasattr(value, "_fields"):
        return {"kind": type(value).__name__} | {k: _encode(x) for k, x in value._asdict().items()}
    if isinstance(value, np.ndarray) and value.ndim > 1:
        array = np.ascontiguousarray(value, value.dtype if value.dtype == np.uint8 else "<f8")
        content = base64.b64encode(array.tobytes()).decode()
        return {"type": array.dtype.name, "shape": list(array.shape), "base64": content}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_encode(x) for x in value]
    return value.item() if hasattr(value, "item") else value


def _decode(kind: Any, value: Any) -> Any:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        found = value.get("kind") if isinstance(value, dict) else type(value).__name__
        [chosen] = [each for each in inner if each.__name__ == found]
        return _decode(chosen, value)
    if kind is np.ndarray:
        return _array(**value)
    if hasattr(kind, "_fields"):
        made = kind(**{name: _decode(hint, value[name]) for name, hint in _hints(kind).items()})
        if kind is PictureRow and (made.images.dtype != np.uint8 or made.images.shape[3:] != (3,)):
            raise ValueError("not pictures")
        return made
    if origin in (Sequence, tuple):
        if type(value) is not list:
            raise ValueError(f"a list is wanted, not {type(value).__name__}")
        if origin is tuple:
            return tuple(_decode(hint, x) for hint, x in zip(inner, value, strict=True))
        return [_decode(inner[0], x) for x in value]
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise ValueError(f"{kind} is wanted, not {type(value).__name__}")
    return value


def _array(type: str, shape: list[int], **content: str) -> np.ndarray:
    shape = _decode(Sequence[int], shape)
    if type not in ("uint8", "float64") or min(shape, default=0) < 0:
        raise ValueError("not an array")
    data = base64.b64decode(_decode(str, content["base64"]), validate=True)
    if len(data) != math.prod(shape) * np.dtype(type).itemsize:
        raise ValueError("the bytes of an array do not fit its shape")
    return np.frombuffer(data, np.dtype(type).newbyteorder("<")).reshape(shape)
