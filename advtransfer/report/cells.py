"""Records that anybody wrote, made into rows: types, spellings, percent; what cannot be used is told."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
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
COUNTS = ("num_train_images", "num_unfrozen_blocks", "seed", "epoch")
NUMBERS = (
    *COUNTS,
    "source_eps",
    "train_accuracy",
    "train_loss",
    "test_accuracy",
    "test_loss",
    "seconds",
)
MAX_ROWS = 2_000_000
_ACCURACIES = ("train_accuracy", "test_accuracy")
_ROUNDING = 1e-6
_LARGEST = 1 + _ROUNDING
_MOSTLY = 0.9  # of a file's rows with accuracies above 1: then all of it is in percent
_MAX_NAME = 500  # characters
_MAX_DIGITS = 1000
_MAX_COUNT = 10**12

Row = dict[str, Any]
Record = tuple[str, Mapping[str, Any] | str]  # where it stands, and what: the cells, or why there are none


class Problem(NamedTuple):
    """Cells of one kind that are not as rows want them: the first of them, how many, what became of them."""

    first: str
    number: int
    outcome: str

    @property
    def sentence(self) -> str:
        rows = "1 row" if self.number == 1 else f"{self.number:,} rows"
        return f"{rows}: {self.outcome}; the first is {self.first}."


class _Table(NamedTuple):
    """Rows of one file; where each stands; and of each how its accuracies are written."""

    rows: list[Row]
    places: list[str]
    marked: list[tuple[bool, ...]]  # train and test: with a % sign
    whole: list[bool]  # without a point


def clean_rows(records: Iterable[Record], unit: str = "auto") -> tuple[list[Row], list[Problem]]:
    """`clean_files` of one file."""
    return clean_files([records], unit)


def clean_files(files: Iterable[Iterable[Record]], unit: str = "auto") -> tuple[list[Row], list[Problem]]:
    """Gives every record its columns and types.

    Args:
      files: of pairs (where, record); a record that is a str says why there is none.
      unit: of accuracies: "fraction", "percent", or "auto", which decides it once for all of a file.

    Returns:
      Rows, and one `Problem` per kind of bad cell. A row without a place in the grid (source, target, n, k,
      seed, epoch) is left out; a measurement that is no number counts as missing (NaN). Accuracies in percent
      are divided by 100. All of a file are missing where nobody can tell whether they are fractions or
      percent, and single ones that are not in [0, 1].

    Raises:
      ValueError: more than `MAX_ROWS` rows.
    """
    seen: dict[Any, Problem] = {}
    tables: list[_Table] = []
    for records in files:
        tables.append(_convert(records, seen, MAX_ROWS - sum(len(table.rows) for table in tables)))
    _as_fractions(tables, unit, seen)
    for table in tables:
        _leave_out_strays(table, seen)
    return [row for table in tables for row in table.rows], list(seen.values())


def _convert(records: Iterable[Record], seen: dict[Any, Problem], most: int) -> _Table:
    table = _Table([], [], [], [])
    for where, record in records:
        cells = record if isinstance(record, str) else _named(record)
        if isinstance(cells, str):
            _tell(seen, ("", cells), f"{where}: {cells}", _LEFT_OUT)
            continue
        missing = ", ".join(name for name in REQUIRED if name not in cells)
        if missing:
            needed = f"(rows need {', '.join(REQUIRED)})"
            _tell(seen, ("", missing), f"{where}: columns missing: {missing} {needed}", _LEFT_OUT)
            continue
        row = dict(cells)
        whole = True
        for name, convert in _CONVERSIONS.items():
            try:
                row[name] = convert(cells.get(name))
            except (TypeError, ValueError, OverflowError) as error:
                first = f"{where}: {name} = {_quoted(cells.get(name))}: {error}"
                measured = convert in (_float, _accuracy)
                _tell(seen, (name, str(error)), first, f"{name} {_MISSING}" if measured else _LEFT_OUT)
                whole, row[name] = whole and measured, math.nan
        if whole:
            if len(table.rows) >= most:
                raise ValueError(f"{where}: more than {MAX_ROWS:,} rows: leave some away")
            table.rows.append(row)
            table.places.append(where)
            table.marked.append(tuple(_is_marked(cells[name]) for name in _ACCURACIES))
            table.whole.append(all(_is_whole(cells[name]) for name in _ACCURACIES))
    return table


@functools.lru_cache(4096)
def column(name: str) -> tuple[str, bool]:
    """What a column is called here, and whether its name says that it is in percent.

    `COLUMNS` are known in other spellings: "Test accuracy (%)", "test_acc_percent". Other names stay.
    """
    plain = re.sub(r"[\s-]+", "_", name.strip().lower())
    bare = re.sub(r"_*(in_)?[(\[]?(%|percent|percentage|pct)[)\]]?$", "", plain)
    known = re.sub(r"_acc$", "_accuracy", bare)
    if known in _ACCURACIES:
        return known, bare != plain
    return (plain if plain in COLUMNS else name), False


def _named(record: Mapping[str, Any]) -> dict[str, Any] | str:
    """A record by what its columns are called here, with a % sign in cells of columns in percent; or what is
    wrong with it."""
    cells: dict[str, Any] = {}
    for name, value in record.items():
        known, in_percent = column(name)
        if known in cells:
            return f"two columns are {known}: rename or delete one"
        mark = in_percent and not (value is None or value == "" or value != value or _is_marked(value))
        cells[known] = f"{value}%" if mark else value
    return cells


def _is_marked(value: Any) -> bool:
    return isinstance(value, str) and value.rstrip().endswith("%")


def _is_whole(value: Any) -> bool:
    written = re.fullmatch(r"\s*\d*\s*", value) if isinstance(value, str) else value is None
    return bool(written) or isinstance(value, int)


def _as_fractions(tables: Sequence[_Table], unit: str, seen: dict[Any, Problem]) -> None:
    """Makes fractions of accuracies. Columns with a % sign are each on their own; the others of a file, which
    one program wrote, have one unit."""
    plain = []
    for table in tables:
        marked = {i for i in range(len(_ACCURACIES)) if any(marks[i] for marks in table.marked)}
        for i in marked:
            _apply(table, [i], _unit(table, [i]), unit, seen)
        if others := [i for i in range(len(_ACCURACIES)) if i not in marked]:
            plain.append((table, others))
    units = [_unit(*part) for part in plain]
    known = {*units} & {"fraction", "percent"}
    for part, found in zip(plain, units, strict=True):
        if found == "fraction" and len(known) == 2:
            # Among files in percent: it may be one in fractions, or one in which all is near chance.
            found = "other"
        elif found == "whole" and len(known) == 1:
            [found] = known
        _apply(*part, found, unit, seen)


def _unit(table: _Table, columns: Sequence[int]) -> str:
    """The unit of some columns of a file: "fraction" or "percent"; "mixed" and "whole" (all are 0 or 1) where
    it cannot be told, "" where there is none but zeros."""
    above = known = 0
    whole = True
    for row, marks, is_whole in zip(table.rows, table.marked, table.whole, strict=True):
        largest = max((y for i in columns if (y := row[_ACCURACIES[i]]) > 0), default=0)
        above += largest > _LARGEST or any(marks[i] for i in columns)
        known += largest > 0
        whole = whole and is_whole
    if above:
        return "percent" if above >= _MOSTLY * known else "mixed"
    return "" if not known else "whole" if whole else "fraction"


def _apply(table: _Table, columns: Sequence[int], found: str, unit: str, seen: dict[Any, Problem]) -> None:
    """Makes fractions of some columns whose unit is `found`, unless `unit` says what it is."""
    unknown = unit == "auto" and found in ("mixed", "whole", "other")
    for row, place, marks in zip(table.rows, table.places, table.marked, strict=True):
        for i in columns:
            name, value = _ACCURACIES[i], row[_ACCURACIES[i]]
            first = f"{place}: {name} = {value!r}: accuracies are fractions in [0, 1], or all in percent"
            if unknown:
                row[name] = math.nan
                if value > _LARGEST or marks[i] or (value > 0 and found != "mixed"):
                    _tell(seen, found, first, _UNKNOWN)
            elif marks[i] or (found if unit == "auto" else unit) == "percent":
                row[name] = value / 100
                if value > _LARGEST or marks[i]:
                    _tell(seen, (name, "percent"), first, f"{name} {_PERCENT}")


def _leave_out_strays(table: _Table, seen: dict[Any, Problem]) -> None:
    for row, place in zip(table.rows, table.places, strict=True):
        for name in _ACCURACIES:
            if row[name] < -_ROUNDING or row[name] > _LARGEST:
                first = f"{place}: {name} = {row[name]!r}: accuracies are fractions in [0, 1]"
                _tell(seen, (name, "range"), first, f"{name} {_MISSING}")
                row[name] = math.nan


def _quoted(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def _tell(seen: dict[Any, Problem], kind: Any, first: str, outcome: str) -> None:
    before = seen.get(kind, Problem(first, 0, outcome))
    seen[kind] = before._replace(number=before.number + 1)


_LEFT_OUT = "left out"
_MISSING = "counts as missing"
_PERCENT = "is above 1 or has a % sign, so all of its file were taken as percent and divided by 100"
_UNKNOWN = (
    "it cannot be told whether the accuracies of this file are fractions or percent, so all of them count as "
    "missing (config.report.accuracy_unit=fraction or =percent says it)"
)


def _integer(value: Any) -> int:
    """The number without a float in between, which would round it beyond 2⁵³."""
    value = value.item() if hasattr(value, "item") else value
    if value is None or value == "":
        raise ValueError("is empty")
    if isinstance(value, bool):
        raise ValueError("is not a whole number")
    if isinstance(value, int):
        return value
    if isinstance(value, float) and abs(value) > 2**53:
        raise ValueError("is a float beyond 2⁵³, which is not exact: write it as an integer")
    try:
        number = Decimal(str(value).strip())
    except ArithmeticError:
        number = Decimal("nan")
    if "_" in str(value) or not number.is_finite():
        raise ValueError("is not a whole number")
    if abs(number.as_tuple().exponent) > _MAX_DIGITS or number.adjusted() > _MAX_DIGITS:
        raise ValueError(f"has more than {_MAX_DIGITS:,} digits")
    numerator, denominator = number.as_integer_ratio()
    if denominator != 1:
        raise ValueError("is not a whole number")
    return numerator


def _between(low: int, high: int) -> Callable[[Any], int]:
    def convert(value: Any) -> int:
        number = _integer(value)
        if number < low:
            raise ValueError(f"must be at least {low}")
        if number > high:
            raise ValueError(f"must be at most {high:,}")
        return number

    return convert


def _float(value: Any) -> float:
    if value is None or value == "":
        return math.nan
    if isinstance(value, bool) or (isinstance(value, str) and "_" in value):
        raise ValueError("is no number")
    number = float(value)
    return math.nan if math.isnan(number) else number  # one object: another would be another key of a dict


def _accuracy(value: Any) -> float:
    return _float(value.rstrip()[:-1] if _is_marked(value) else value)


def _name(value: Any) -> str:
    if value is None or value == "" or value != value:
        raise ValueError("is empty")
    text = _text(value) if isinstance(value, str) else str(value)
    if len(text) > _MAX_NAME:
        raise ValueError(f"is longer than {_MAX_NAME} characters")
    return text


def _seed(value: Any) -> int | str:
    """A number where it is one; else a name: seeds only need to be told apart and paired."""
    if isinstance(value, float) and abs(value) > 2**53:
        return _integer(value)
    try:
        return _integer(value)
    except (ValueError, TypeError):
        return _name(value)


def _norm(value: Any) -> str:
    # Writers that know a natural source as None leave an empty cell, or "nan".
    norm = _name("none" if value is None or value == "" else str(value)).lower().translate(_PLAIN)
    return _NORMS.get(norm, norm)


_PLAIN = str.maketrans({" ": "", "_": "", "-": "", "ℓ": "l", "∞": "inf"})
_NORMS = dict.fromkeys(("", "nan", "null", "nat", "natural", "clean"), "none") | {"2": "l2", "inf": "linf"}


def _text(value: Any) -> str:
    if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
        raise ValueError("is not UTF-8: save the file as UTF-8")
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


_CONVERSIONS: dict[str, Callable[[Any], Any]] = {
    "source": _name,
    "source_norm": _norm,
    "source_eps": _float,
    "target": _name,
    "num_train_images": _between(1, _MAX_COUNT),
    "num_unfrozen_blocks": _between(-1, 10_000),
    "seed": _seed,
    "epoch": _between(-_MAX_COUNT, _MAX_COUNT),
    "train_accuracy": _accuracy,
    "train_loss": _float,
    "test_accuracy": _accuracy,
    "test_loss": _float,
    "seconds": _float,
    "trial_id": _text,
    "config": _text,
}
