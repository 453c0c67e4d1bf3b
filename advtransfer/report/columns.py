"""The columns of rows: their names and spellings, and what a cell of each becomes."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

_MAX_NAME = 500  # characters
_MAX_DIGITS = 1000
_MAX_COUNT = 10**12


def is_marked(value: Any) -> bool:
    return isinstance(value, str) and value.rstrip().endswith("%")


def is_whole(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().isdecimal() or not value.strip()
    return value is None or isinstance(value, int)


def _integer(value: Any) -> int:
    """The number without a float in between, which would round it beyond 2⁵³."""
    value = value.item() if hasattr(value, "item") else value
    if type(value) is int:
        return value
    if value is None or value == "":
        raise ValueError("is empty")
    if isinstance(value, float) and abs(value) > 2**53:
        raise ValueError("is a float beyond 2⁵³, which is not exact: write it as an integer")
    try:
        number = Decimal("nan" if isinstance(value, bool) or "_" in str(value) else str(value).strip())
    except ArithmeticError:
        number = Decimal("nan")
    if not number.is_finite() or number != number.to_integral_value():
        raise ValueError("is not a whole number")
    if number.adjusted() > _MAX_DIGITS:
        raise ValueError(f"has more than {_MAX_DIGITS:,} digits")
    return int(number)


def _between(low: int, high: int) -> Callable[[Any], int]:
    def convert(value: Any) -> int:
        number = _integer(value)
        if not low <= number <= high:
            raise ValueError(f"must be at least {low}" if number < low else f"must be at most {high:,}")
        return number

    return convert


def _seed(value: Any) -> int | str:
    """A number where it is one; else a name: seeds only need to be told apart and paired."""
    try:
        return _integer(value)
    except ValueError:
        if isinstance(value, float) and abs(value) > 2**53:
            raise
        return _name(value)


def _source_seed(value: Any) -> int | str:
    """0 where there is none: of a source that was trained once."""
    return 0 if value is None or value == "" or value != value else _seed(value)


def _float(value: Any) -> float:
    if value is None or value == "":
        return math.nan
    if isinstance(value, bool) or (isinstance(value, str) and "_" in value):
        raise ValueError("is not a number")
    return float(value)


def _accuracy(value: Any) -> float:
    return _float(value.rstrip()[:-1] if is_marked(value) else value)


def _name(value: Any) -> str:
    if value is None or value == "" or value != value:
        raise ValueError("is empty")
    text = _text(value) if isinstance(value, str) else str(value)
    if len(text) > _MAX_NAME:
        raise ValueError(f"is longer than {_MAX_NAME} characters")
    return text


def _norm(value: Any) -> str:
    # Writers that know a natural source as None leave an empty cell, or "nan".
    norm = _name("none" if value is None or value == "" else str(value)).lower().translate(_LETTERS)
    return _NORMS.get(norm, norm)


_LETTERS = str.maketrans({" ": "", "_": "", "-": "", "ℓ": "l", "∞": "inf"})
_NORMS = dict.fromkeys(("", "nan", "null", "nat", "natural", "clean"), "none") | {"2": "l2", "inf": "linf"}


def _text(value: Any) -> str:
    if isinstance(value, str) and not value.isascii() and _SURROGATES.search(value):
        raise ValueError("is not UTF-8: save the file as UTF-8")
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


_SURROGATES = re.compile("[\ud800-\udfff]")
CONVERSIONS: dict[str, tuple[Callable[[Any], Any], str]] = {  # and the dtype of the column
    "source": (_name, "object"),
    "source_norm": (_norm, "object"),
    "source_eps": (_float, "float64"),
    "target": (_name, "object"),
    "num_train_images": (_between(1, _MAX_COUNT), "int64"),
    "num_unfrozen_blocks": (_between(-1, 10_000), "int64"),
    "seed": (_seed, "object"),
    "epoch": (_between(-_MAX_COUNT, _MAX_COUNT), "int64"),
    "train_accuracy": (_accuracy, "float64"),
    "train_loss": (_float, "float64"),
    "test_accuracy": (_accuracy, "float64"),
    "test_loss": (_float, "float64"),
    "seconds": (_float, "float64"),
    "source_seed": (_source_seed, "object"),
    "trial_id": (_text, "object"),
    "config": (_text, "object"),
}
#: Of rows. Those as far as `test_accuracy` are needed, the others may be missing.
COLUMNS = tuple(CONVERSIONS)
REQUIRED = COLUMNS[:11]
ACCURACIES = ["train_accuracy", "test_accuracy"]
MEASURED = [name for name, (_, dtype) in CONVERSIONS.items() if dtype == "float64"]
COUNTS = ["seed", "source_seed", *(name for name, (_, dtype) in CONVERSIONS.items() if dtype == "int64")]


@functools.lru_cache(4096)
def column_name(name: str) -> tuple[str, bool]:
    """What a column is called here, and whether its name says that it is in percent.

    `COLUMNS` are known in other spellings: "Test accuracy (%)", "test_acc_percent". Other names stay.
    """
    plain = re.sub(r"[\s-]+", "_", name.strip().lower())
    bare = re.sub(r"_*(in_)?[(\[]?(%|percent|percentage|pct)[)\]]?$", "", plain)
    known = re.sub(r"_acc$", "_accuracy", bare)
    if known in ACCURACIES:
        return known, bare != plain
    return (plain if plain in COLUMNS else name), False
