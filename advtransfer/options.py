"""Options: frozen dataclasses that say what each field means and check its value.

    @options
    class Recipe:
        \"\"\"How a network is fine-tuned.\"\"\"

        num_epochs: int = option(150, "epochs", low=1)

A value of the wrong type, or outside its limits, is a ValueError when the object is made. The configuration
of the command line (config.py) is composed of these types.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import operator
import textwrap
import typing
from collections.abc import Container
from typing import Any, NamedTuple

NOT_EMPTY = range(1, 10**9)  # lengths of a tuple


class Option(NamedTuple):
    """What is known of a field beside its type and default."""

    about: str  # with the unit
    choices: tuple[str, ...] = ()
    low: float = -math.inf  # smallest value, of a tuple's elements too
    high: float = math.inf
    above: float = -math.inf  # the value is larger than this
    below: float = math.inf
    also: tuple[float, ...] = ()  # allowed beside the range
    lengths: Container[int] | None = None  # of a tuple
    decides: bool = True  # whether results depend on it


def option(default: Any, about: str, **known: Any) -> Any:
    """A field of an options class; `known` are fields of `Option`."""
    return dataclasses.field(default=default, metadata={"option": Option(about, **known)})


@typing.dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(option,))
def options(cls: type[Any]) -> type[Any]:
    """Makes a class a frozen, keyword-only dataclass whose values are checked when it is made, one by one
    and then, if it has one, by its method `check` of several fields together."""
    cls.__post_init__ = _check
    cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    lines = [
        textwrap.fill(f"{name}: {explain(cls, name)}", 100, initial_indent="  ", subsequent_indent="    ")
        for name in cls.__dataclass_fields__
    ]
    cls.__doc__ = "\n".join([inspect.cleandoc(cls.__doc__ or ""), "", "Attributes:", *lines])
    return cls


def find(cls: type[Any], name: str) -> Option:
    """What is known of a field."""
    return cls.__dataclass_fields__[name].metadata["option"]


def explain(cls: type[Any], name: str) -> str:
    """A field in a line: its meaning, its values, its default."""
    known, default = find(cls, name), cls.__dataclass_fields__[name].default
    values = "" if dataclasses.is_dataclass(default) else f"; {_expected(_types(cls)[name], known)}"
    return f"{known.about}{values}; default {default!r}"


def to_dict(values: Any) -> dict[str, Any]:
    """The fields by name, and those of options within as dicts again."""
    return dataclasses.asdict(values)


def deciding(values: Any) -> dict[str, Any]:
    """As `to_dict`, without the fields that results do not depend on."""
    return {name: x for name, x in to_dict(values).items() if find(type(values), name).decides}


def _check(self: Any) -> None:
    for name, kind in _types(type(self)).items():
        given, known = getattr(self, name), find(type(self), name)
        try:
            value = _convert(kind, given, known)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"{name}={given!r} must be {_expected(kind, known)}") from None
        object.__setattr__(self, name, value)
    if hasattr(self, "check"):
        self.check()


@functools.cache
def _types(cls: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _convert(kind: Any, value: Any, known: Option) -> Any:
    """The value in its type, or a TypeError, ValueError or OverflowError."""
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)
        if not isinstance(value, tuple | list):
            raise TypeError
        if known.lengths is not None and len(value) not in known.lengths:
            raise ValueError
        kinds = [inner[0]] * len(value) if inner[1:] == (...,) else inner
        known = known._replace(lengths=None)
        return tuple(_convert(own, x, known) for own, x in zip(kinds, value, strict=True))
    if kind in (int, float):
        # NumPy's numbers and JAX's scalars become Python's; truth values and text are no numbers.
        if isinstance(value, bool | str | bytes) or str(getattr(value, "dtype", "")) == "bool":
            raise TypeError
        value = operator.index(value) if kind is int else float(value)
        in_range = known.low <= value <= known.high and known.above < value < known.below
        if not math.isfinite(value) or not (in_range or value in known.also):
            raise ValueError
        return value
    if type(value) is not kind or value not in (known.choices or (value,)):
        raise ValueError
    return value


def _expected(kind: Any, known: Option) -> str:
    """In words, what a value must be."""
    if typing.get_origin(kind) is not tuple:
        if known.choices:
            return f"one of {_list(known.choices)}"
        named = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}
        return named.get(kind, kind.__name__) + _range(known)
    inner = typing.get_args(kind)[0]
    if typing.get_origin(inner) is tuple:
        return f"a tuple of pairs of whole numbers{_range(known)}"
    noun = {int: "whole numbers", float: "numbers", str: "names"}[inner]
    number = {NOT_EMPTY: "one or more ", (3,): "three ", (0, 3): "three "}.get(known.lengths, "")
    values = f" of {_list(known.choices)}" if known.choices else _range(known)
    return f"a tuple of {number}{noun}{values}" + (", or none" if known.lengths == (0, 3) else "")


def _list(names: tuple[str, ...]) -> str:
    return ", ".join(name or "''" for name in names)


def _range(known: Option) -> str:
    low, high = (f"{x:,.10g}" for x in (max(known.low, known.above), min(known.high, known.below)))
    if min(known.high, known.below) < 1e30:
        below = "below " if known.below < math.inf else ""
        text = f" from {low} to {below}{high}" if known.above == -math.inf else f" between {low} and {high}"
    elif known.low > -math.inf:
        text = f", {low} or more"
    else:
        text = f" above {low}" if known.above > -math.inf else ""
    return text + (f", or {' or '.join(map(str, known.also))}" if known.also else "")
