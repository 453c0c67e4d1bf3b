"""What a page is made of: data alone, which `render` draws and `kept` writes and reads.

Accuracies and shares are in [0, 1]. Files are named without folder and ending where they are a section's own
(`numbers` names one of `Section.files`), and by their path beside the page otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from advtransfer.norms import SYMBOLS

EMPTY: Mapping[str, Any] = MappingProxyType({})


class SourceInfo(NamedTuple):
    """A source network: `norm` is one of `norms.NORMS`, `eps` its radius in pixel units."""

    name: str
    norm: str
    eps: float

    @property
    def constraint(self) -> str:
        """As a reader writes it: "natural", "ℓ2 (ε = 0.5)", "ℓ∞ (ε = 4/255)"."""
        symbol = SYMBOLS.get(self.norm, self.norm)
        has_radius = self.norm != "none" and not math.isnan(self.eps)
        return f"{symbol} (ε = {format_eps(self.norm, self.eps)})" if has_radius else symbol


def format_eps(norm: str, eps: float) -> str:
    """A radius as it is usually written: ℓ∞ in 255ths, unless the decimal is the shorter one."""
    decimal, steps = f"{eps:g}", f"{255 * eps:.4g}"
    return f"{steps}/255" if norm == "linf" and len(steps) + 4 < len(decimal) else decimal


class Style(NamedTuple):
    """How one source looks in every figure; `line` is one of `figures.DASHES`."""

    label: str
    colour: str
    marker: str
    line: str
    hollow: bool  # markers of natural sources


class Series(NamedTuple):
    """One line: `x`, `mean` (finite) and `ci95` (NaN: no interval), of equal length; `bounds`, the ends of
    every interval, where it is not mean ± ci95."""

    style: Style
    x: Sequence[float]
    mean: Sequence[float]
    ci95: Sequence[float]
    bounds: Sequence[tuple[float, float]] = ()


class Axis(NamedTuple):
    """A horizontal axis. `ticks`, the names of 0, 1, …, make it one of categories, with error bars; `values`
    are numbered and its ends, instead of those of the lines."""

    label: str
    log: bool = False
    ticks: Sequence[str] = ()
    values: Sequence[float] = ()
    joined: bool = True  # neighbouring marks by a line


class Panel(NamedTuple):
    """Lines with their intervals.

    Attributes:
      yrange: limits of the vertical axis; its ticks are in percent or points.
      zero: if given, a reference line at zero with this label at its end.
      behind: thin lines with crosses behind the others, in the style's colour, without intervals.
      file: where the SVG also lies beside the page; "": nowhere.
    """

    title: str
    ylabel: str
    axis: Axis
    series: Sequence[Series]
    yrange: tuple[float, float] = (-0.02, 1.02)
    zero: str = ""
    behind: Sequence[Series] = ()
    file: str = ""


class Dumbbell(NamedTuple):
    """(label, natural, adversarial accuracy) per source, joined by a line; NaN is left out."""

    title: str
    rows: Sequence[tuple[str, float, float]]
    file: str = ""


class Scatter(NamedTuple):
    """A point for each network: its style, and (value, low, high) of two shares, across and up."""

    title: str
    xlabel: str
    ylabel: str
    points: Sequence[tuple[Style, Sequence[float], Sequence[float]]]
    file: str = ""


class Entry(NamedTuple):
    """A table's cell, or a picture's label: text, then some in bold, then some in small print.

    `bar`: (value, low, high) of a share, drawn as a bar beside it.
    """

    text: str = ""
    strong: str = ""
    small: str = ""
    bar: Sequence[float] = ()


class Text(NamedTuple):
    """A paragraph; `look` makes it "muted", a "heading", or a "list" with an item per line."""

    text: str
    look: str = ""


class Table(NamedTuple):
    """Rows of cells, the first of which names the row. A row of one cell heads those below it."""

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str | Entry]]
    numbers: str = ""
    words: bool = False  # aligned to the left


class Plot(NamedTuple):
    """Figures beside one another."""

    caption: str
    panels: Sequence[Panel | Dumbbell | Scatter]
    numbers: str = ""


class PictureRow(NamedTuple):
    """Pictures beside one another."""

    head: str
    images: np.ndarray  # uint8, or floats in [0, 1], [M, H, W, 3]
    labels: Sequence[str | Entry] = ()  # under each
    alts: Sequence[str] = ()  # what each shows; otherwise the row's head and the picture's number


class Pictures(NamedTuple):
    """Groups of rows under one another, in columns; rows without a head are wrapped instead."""

    caption: str
    groups: Sequence[Sequence[PictureRow]]
    numbers: str = ""
    heads: Sequence[str] = ()  # over the columns


class Matrix(NamedTuple):
    """Matrices [C, C] by title, each cell coloured.

    Blue is above zero and orange below, up to the 99th percentile of sizes; NaN stays white. Of a confusion
    matrix (images by label and prediction) the colour is the share of the row, blue where both agree.
    """

    caption: str
    maps: Sequence[tuple[str, np.ndarray]]
    names: Sequence[str]  # of rows and columns
    numbers: str = ""
    confusion: bool = False


Part = Text | Table | Plot | Pictures | Matrix


class Section(NamedTuple):
    """A title, the finding in a sentence or two, its parts, and their tables by name, as equal records."""

    title: str
    finding: str = ""
    parts: Sequence[Part] = ()
    files: Mapping[str, Sequence[Mapping[str, Any]]] = EMPTY


class Page(NamedTuple):
    """A page.

    Attributes:
      headline: sentences at the top; `note`: what a reader must know of them.
      facts: (name, value) in words.
      command: what to type to get this page again; `versions`: package -> version; `config`: any settings.
      files: what else lies beside the page, by path -> what it is.
      folder: where the sections' own tables lie beside the page, "" or ending in "/".
    """

    title: str
    sections: Sequence[Section] = ()
    headline: Sequence[str] = ()
    note: str = ""
    facts: Sequence[tuple[str, str]] = ()
    command: str = ""
    versions: Mapping[str, str] = EMPTY
    config: Mapping[str, Any] = EMPTY
    files: Mapping[str, str] = EMPTY
    folder: str = ""
