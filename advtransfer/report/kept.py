"""Sections as JSON: data alone, which is drawn again; whatever is not of its field's type is refused.

A tuple with names is an object of its fields, one of several kinds with its "kind"; a mapping is a list of
pairs, in its order; an array is its bytes in base64. Pictures have 8 bits.
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
from advtransfer.report.interpretation import Row, Section

Scalar = str | int | float | bool | None


def to_data(section: Section) -> dict[str, Any]:
    """The section as what JSON can hold."""
    fields = {name: _encode(kind, getattr(section, name)) for name, kind in _FIELDS.items()}
    return fields | {"files": {name: _table(rows) for name, rows in section.files.items() if rows}}


def from_data(data: Mapping[str, Any]) -> Section:
    """The section that `to_data` made this of.

    Raises:
      ValueError: it is something else.
    """
    try:
        fields = {name: _decode(kind, data[name]) for name, kind in _FIELDS.items()}
        files = {_checked(name): _records(**table) for name, table in data["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no section of a page: {error!r}") from error
    if any(part.numbers not in ("", *files) for part in fields["parts"]):
        raise ValueError("no section of a page: a part names a table that the section has not")
    return Section(**fields, files=files)


def _checked(name: str) -> str:
    if not re.fullmatch(r"\w{1,60}", name, re.ASCII):
        raise ValueError("no name of a table")
    return name


def _table(rows: Sequence[Mapping[str, Any]]) -> dict[str, list]:
    values = [[_scalar(row.get(name)) for name in rows[0]] for row in rows]
    return {"columns": list(rows[0]), "rows": values}


def _records(columns: list[str], rows: list[list[Scalar]]) -> list[dict[str, Scalar]]:
    columns = _decode(Sequence[str], columns)
    rows = _decode(Sequence[Sequence[Scalar]], rows)
    return [dict(zip(columns, row, strict=True)) for row in rows]


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _encode(kind: Any, value: Any) -> Any:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return (
            _encode(type(value), value) | {"kind": type(value).__name__} if _named(value) else _scalar(value)
        )
    if kind is np.ndarray:
        array = np.ascontiguousarray(value, value.dtype if value.dtype == np.uint8 else "<f8")
        content = base64.b64encode(array.tobytes()).decode()
        return {"type": array.dtype.name, "shape": list(array.shape), "base64": content}
    if _named(value):
        value = value._replace(images=to_bytes(value.images)) if kind is Row else value
        return {name: _encode(hint, getattr(value, name)) for name, hint in _hints(kind).items()}
    if origin is Mapping:
        return [[_scalar(key), _encode(inner[1], x)] for key, x in value.items()]
    if origin is tuple and inner[1:] != (...,):
        return [_encode(hint, x) for hint, x in zip(inner, value, strict=True)]
    if origin in (Sequence, tuple):
        return [_encode(inner[0], x) for x in value]
    return _scalar(value)


def _decode(kind: Any, value: Any) -> Any:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return _decode(_chosen(inner, value), value)
    if kind is np.ndarray:
        return _array(**value)
    if isinstance(kind, type) and hasattr(kind, "_fields"):
        found = kind(**{name: _decode(hint, value[name]) for name, hint in _hints(kind).items()})
        return found._replace(images=_pictures(found)) if kind is Row else found
    if origin is Mapping:
        return {_decode(inner[0], key): _decode(inner[1], x) for key, x in _list(value)}
    if origin is tuple and inner[1:] != (...,):
        return tuple(_decode(hint, x) for hint, x in zip(inner, _list(value), strict=True))
    if origin in (Sequence, tuple):
        return (list if origin is Sequence else tuple)(_decode(inner[0], x) for x in _list(value))
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise ValueError(f"{kind} is wanted, not {type(value).__name__}")
    return value


def _chosen(kinds: Sequence[Any], value: Any) -> Any:
    """Of several types that of the value."""
    for kind in kinds:
        plain = typing.get_origin(kind) or kind
        if isinstance(value, dict) and value.get("kind") == plain.__name__:
            return kind
        if type(value) is plain or (type(value), plain) == (list, tuple):
            return kind
    raise ValueError(f"none of {len(kinds)} types")


def _named(value: Any) -> bool:
    return hasattr(value, "_fields")


def _scalar(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_scalar(x) for x in value]
    return value.item() if hasattr(value, "item") else value


def _list(value: Any) -> list:
    if type(value) is not list:
        raise ValueError(f"a list is wanted, not {type(value).__name__}")
    return value


def _array(type: str, shape: list[int], **content: str) -> np.ndarray:
    if type not in ("uint8", "float64") or min(shape := _decode(Sequence[int], shape), default=0) < 0:
        raise ValueError("no array")
    data = base64.b64decode(_decode(str, content["base64"]), validate=True)
    if len(data) != math.prod(shape) * np.dtype(type).itemsize:
        raise ValueError("an array's bytes do not fit its shape")
    return np.frombuffer(data, np.dtype(type).newbyteorder("<")).reshape(shape)


def _pictures(row: Row) -> np.ndarray:
    if row.images.dtype != np.uint8 or row.images.ndim != 4 or row.images.shape[-1] != 3:
        raise ValueError("no pictures")
    return row.images / 255


_FIELDS = {name: hint for name, hint in _hints(Section).items() if name != "files"}
