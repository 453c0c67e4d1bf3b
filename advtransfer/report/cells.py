"""Records that anybody wrote, made into rows: types, spellings, percent; what cannot be used is told."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

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
_MOSTLY = 0.9  # of a column's accuracies above 1: then all of it is in percent

Row = dict[str, Any]


class Problem(NamedTuple):
    """Cells of one kind that are not as rows want them: the first of them, how many, what became of them."""

    first: str
    number: int
    outcome: str

    @property
    def sentence(self) -> str:
        rows = "1 row" if self.number == 1 else f"{self.number:,} rows"
        return f"{rows}: {self.outcome}; the first is {self.first}."


def clean_rows(records: Iterable[tuple[str, Mapping[str, Any] | str]]) -> tuple[list[Row], list[Problem]]:
    """Gives every record its columns and types.

    Args:
      records: pairs (where, record); a record that is a str says why there is none.

    Returns:
      Rows, and one `Problem` per kind of bad cell. A row without a place in the grid (source, target, n, k,
      seed, epoch) is left out; a measurement that is no number counts as missing (NaN). A column of
      accuracies nearly all above 1 is percent and divided by 100; single ones outside [0, 1] are missing.
    """
    rows, places, seen = [], [], {}
    for where, record in records:
        if isinstance(record, str):
            _tell(seen, ("", record), f"{where}: {record}", _LEFT_OUT)
            continue
        missing = ", ".join(name for name in REQUIRED if name not in record)
        if missing:
            needed = f"(rows need {', '.join(REQUIRED)})"
            _tell(seen, ("", missing), f"{where}: columns missing: {missing} {needed}", _LEFT_OUT)
            continue
        row = dict(record)
        whole = True
        for name, convert in _CONVERSIONS.items():
            try:
                row[name] = convert(row.get(name))
            except (TypeError, ValueError, OverflowError) as error:
                first = f"{where}: {name} = {row.get(name)!r}: {error}"
                measured = convert is _float
                _tell(seen, (name, str(error)), first, f"{name} {_MISSING}" if measured else _LEFT_OUT)
                whole, row[name] = whole and measured, math.nan
        if whole:
            rows.append(row)
            places.append(where)
    for name in ("train_accuracy", "test_accuracy"):
        _as_fractions(rows, places, name, seen)
    return rows, list(seen.values())


def _as_fractions(rows: list[Row], places: list[str], name: str, seen: dict[Any, Problem]) -> None:
    """Accuracies in percent become fractions if the whole column is so; single strays are missing."""
    strays = [i for i, row in enumerate(rows) if not -1e-6 <= row[name] <= 1 + 1e-6]
    strays = [i for i in strays if not math.isnan(rows[i][name])]
    if not strays:
        return
    known = [i for i, row in enumerate(rows) if not math.isnan(row[name])]
    percent = len(strays) >= _MOSTLY * len(known) and all(0 <= rows[i][name] <= 100 for i in known)
    outcome = f"{name} {_MISSING}"
    if percent:
        outcome = f"{name} is above 1, so all {len(known):,} were taken as percent and divided by 100"
    for i in strays:
        first = f"{places[i]}: {name} = {rows[i][name]!r}: accuracies are fractions in [0, 1], not percent"
        _tell(seen, (name, "range"), first, outcome)
    for i in known if percent else strays:
        rows[i][name] = rows[i][name] / 100 if percent else math.nan


def _tell(seen: dict[Any, Problem], kind: Any, first: str, outcome: str) -> None:
    before = seen.get(kind, Problem(first, 0, outcome))
    seen[kind] = before._replace(number=before.number + 1)


_LEFT_OUT = "left out"
_MISSING = "counts as missing"


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


def _name(value: Any) -> str:
    if value is None or value == "" or value != value:
        raise ValueError("is empty")
    return str(value)


def _seed(value: Any) -> int | str:
    """A number where it is one; else a name: seeds only need to be told apart and paired."""
    try:
        return _integer(value)
    except (ValueError, TypeError, OverflowError):
        return _name(value)


def _norm(value: Any) -> str:
    # Writers that know a natural source as None leave an empty cell, or "nan".
    norm = str("" if value is None else value).lower().translate(_PLAIN)
    return _NORMS.get(norm, norm)


_PLAIN = str.maketrans({" ": "", "_": "", "-": "", "ℓ": "l", "∞": "inf"})
_NORMS = dict.fromkeys(("", "nan", "null", "nat", "natural", "clean"), "none") | {"2": "l2", "inf": "linf"}


def _text(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


_CONVERSIONS: dict[str, Callable[[Any], Any]] = {
    "source": _name,
    "source_norm": _norm,
    "source_eps": _float,
    "target": _name,
    "num_train_images": _positive,
    "num_unfrozen_blocks": _integer,
    "seed": _seed,
    "epoch": _integer,
    "train_accuracy": _float,
    "train_loss": _float,
    "test_accuracy": _float,
    "test_loss": _float,
    "seconds": _float,
    "trial_id": _text,
    "config": _text,
}
