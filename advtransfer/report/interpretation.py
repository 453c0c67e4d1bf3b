"""What networks look at, side by side: sections of pictures, tables and figures, on a page or in a report."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from advtransfer.report import figures, markup
from advtransfer.report.markup import image, numbers_link, picture_row, scrolling, table, th
from advtransfer.report.model_page import bar, reproduction
from advtransfer.report.rows import add_files, csv_text, write_files

MAX_NAMED = 30  # classes that have room beside a heat map
_EMPTY: Mapping[str, Any] = MappingProxyType({})


class Row(NamedTuple):
    """Pictures beside one another."""

    head: str
    images: np.ndarray  # [M, H, W, 3] in [0, 1]
    labels: Sequence[str] = ()  # what stands under each


class Pictures(NamedTuple):
    """Groups of rows under one another. `numbers` is the name of a file of the section, or ""."""

    caption: str
    groups: Sequence[Sequence[Row]]
    numbers: str = ""
    heads: Sequence[str] = ()  # over the columns


class Table(NamedTuple):
    """Rows of text; the first cell names the row."""

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: str = ""


class Lines(NamedTuple):
    """Panels of lines by title, which share a vertical axis from 0 to 100 %."""

    caption: str
    panels: Mapping[str, tuple[figures.Axis, Sequence[figures.Series]]]
    ylabel: str
    numbers: str = ""


class HeatMaps(NamedTuple):
    """Matrices [C, C] by title, each coloured up to the 99th percentile of its sizes; NaN stays white."""

    caption: str
    maps: Mapping[str, np.ndarray]
    names: Sequence[str]  # of rows and columns
    numbers: str = ""


class Bars(NamedTuple):
    """Shares (value, low, high) in [0, 1], a row per name and a column per head; NaN is a dash."""

    caption: str
    heads: Sequence[str]
    rows: Sequence[tuple[str, Sequence[tuple[float, float, float]]]]
    numbers: str = ""


class Section(NamedTuple):
    """One analysis: its finding in a sentence or two, its parts, and its tables by name, as equal records."""

    title: str
    finding: str
    parts: Sequence[Pictures | Table | Lines | HeatMaps | Bars] = ()
    files: Mapping[str, Sequence[Mapping[str, Any]]] = _EMPTY


class Drawn(NamedTuple):
    """A section as it stands on a page."""

    title: str
    finding: str
    parts: str  # HTML
    files: Mapping[str, str]  # CSV by file name


class Interpretation(NamedTuple):
    """A page of sections; `facts`, `command`, `versions` and `config` as in `ModelPage`."""

    title: str
    sections: Sequence[Drawn]
    facts: Sequence[tuple[str, str]] = ()
    command: str = ""
    versions: Mapping[str, str] = _EMPTY
    config: Mapping[str, Any] = _EMPTY


def write_interpretation(page: Interpretation, folder: str | os.PathLike[str]) -> Path:
    """Writes the tables of all sections as CSV, and `report.html`, into `folder`; returns the latter's path.

    Each file appears whole, report.html last. The same page gives the same bytes.
    """
    told = "".join(f"<p>{_unbroken(section.finding)}</p>" for section in page.sections if section.parts)
    facts = "".join(f"<div><dt>{escape(a)}</dt><dd>{escape(b)}</dd></div>" for a, b in page.facts)
    body = [
        f'<h1>{escape(page.title)}</h1>\n<div class="headline several">{told}</div>',
        f"<dl class=facts>{facts}</dl>" if facts else "",
        *map(section_html, page.sections),
        reproduction(page),
    ]
    files: dict[str, str | bytes] = {}
    for section in page.sections:
        add_files(files, section.files)
    return write_files(folder, files | {"report.html": markup.page(page.title, body)})


def draw(section: Section, *, beside: str = "") -> Drawn:
    """The section for a page; `beside` is "../" where its tables lie beside the page, not in figures/."""
    parts = "\n".join(_PARTS[type(part)](part, beside) for part in section.parts)
    files = {f"{name}.csv": csv_text(rows, list(rows[0])) for name, rows in section.files.items() if rows}
    return Drawn(section.title, section.finding, parts, files)


def section_html(section: Drawn, *, level: int = 2) -> str:
    """The section. At level 2 the finding stands at the top of the page, unless it is all there is."""
    head = f"<h{level}>{escape(section.title)}</h{level}>"
    told = "" if level == 2 and section.parts else f"<p>{_unbroken(section.finding)}</p>"
    return "\n".join(filter(None, [head, told, section.parts]))


def _unbroken(text: str) -> str:
    """Keeps units and constraints on one line with their numbers."""
    for mark in (" %", " (ε", "ε =", "= "):
        text = text.replace(mark, mark.replace(" ", "\N{NO-BREAK SPACE}"))
    return escape(text)


def _numbers(part: Any, beside: str) -> str:
    return f"{beside}{part.numbers}" if part.numbers else ""


def _pictures(part: Pictures, beside: str) -> str:
    rows = []
    for group in part.groups:
        for i, row in enumerate(group):
            labels = [escape(label) for label in row.labels] or [""] * len(row.images)
            first = "first" if rows and not i else ""
            rows.append(picture_row(row.head, row.images, labels, first))
    heads = "".join(
        f'<th scope=col style="min-width:0;position:static;text-align:center">{escape(text)}</th>'
        for text in part.heads
    )
    head = f"<thead><tr><td></td>{heads}</tr></thead>" if heads else ""
    content = f"<table class=pictures>{head}<tbody>{''.join(rows)}</tbody></table>"
    return scrolling(content, part.caption, numbers=_numbers(part, beside), kind="plot")


def _table(part: Table, beside: str) -> str:
    rows = [
        [th(escape(first), "row"), *(f"<td>{escape(text)}</td>" for text in rest)]
        for first, *rest in part.rows
    ]
    heads = [head.replace(" %", "\N{NO-BREAK SPACE}%") for head in part.heads]
    return table(heads, [rows], part.caption, numbers=_numbers(part, beside))


def _lines(part: Lines, beside: str) -> str:
    drawn = []
    for title, (axis, series) in part.panels.items():
        svg = figures.line_panel(series, axis, title=title, ylabel=part.ylabel, yrange=(-0.02, 1.02))
        ends = (
            f"{line.style.label} {100 * line.mean[0]:.1f} at {line.x[0]:g}, "
            f"{100 * line.mean[-1]:.1f} at {line.x[-1]:g}"
            for line in series
        )
        told = f"{title}: {part.ylabel} against {axis.label}. {'; '.join(ends)}."
        drawn.append(image(svg, "svg+xml", told))
    return _figure("".join(drawn), part, beside)


def _figure(panels: str, part: Any, beside: str) -> str:
    link = f" {numbers_link(_numbers(part, beside))}" if part.numbers else ""
    return (
        f"<figure class=plot><div class=panels>{panels}</div>"
        f"<figcaption>{escape(part.caption)}{link}</figcaption></figure>"
    )


def _heat_maps(part: HeatMaps, beside: str) -> str:
    drawn = []
    for title, values in part.maps.items():
        largest = max(np.nanquantile(np.abs(values), 0.99), np.finfo(float).tiny)
        scaled = np.clip(np.nan_to_num(values / largest), -1, 1)
        ends = np.where(scaled[..., None] > 0, (0.0, 0.447, 0.698), (0.835, 0.369, 0.0))
        colours = 1 - np.abs(scaled[..., None]) * (1 - ends)
        named = len(part.names) <= MAX_NAMED
        body = _cells(part, colours, values) if named else _pixels(title, colours)
        drawn.append(f"<div><b>{escape(title)}</b>{body}</div>")
    return _figure("".join(drawn), part, beside)


def _pixels(title: str, colours: np.ndarray) -> str:
    picture = image(figures.png(colours), "png", f"{title}: class by class")
    return picture.replace("<img", '<img style="image-rendering:pixelated"', 1)


def _cells(part: HeatMaps, colours: np.ndarray, values: np.ndarray) -> str:
    cell = "padding:0;text-align:center;border:0"
    size = 1.75 if len(part.names) <= 12 else 0.9
    heads = "".join(f'<th scope=col style="{cell}">{escape(name[:3])}</th>' for name in part.names)
    rows = []
    for name, row, numbers in zip(part.names, colours, values, strict=True):
        cells = "".join(
            f'<td style="{cell};height:{size}rem;min-width:{size}rem;background:rgb({r},{g},{b})" '
            f'title="{number:.3g}"></td>'
            for (r, g, b), number in zip(np.rint(255 * row).astype(int).tolist(), numbers, strict=True)
        )
        first = f'<th scope=row style="padding:0 .4rem 0 0;border:0">{escape(name)}</th>'
        rows.append(f"<tr>{first}{cells}</tr>")
    content = f"<table><thead><tr><td></td>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f"<div class=scroll tabindex=0>{content}</div>"


def _bars(part: Bars, beside: str) -> str:
    rows = []
    for name, shares in part.rows:
        cells = [th(escape(name), "row")]
        for value, low, high in shares:
            known = "–" if np.isnan(value) else f"{100 * value:.0f}"
            drawn = "" if np.isnan(value) else bar({"accuracy": value, "low95": low, "high95": high})
            cells += [f"<td>{known}</td>", f"<td>{drawn}</td>"]
        rows.append(cells)
    heads = [part.heads[0], *(text for head in part.heads[1:] for text in (head, ""))]
    return table(heads, [rows], part.caption, numbers=_numbers(part, beside))


_PARTS = {Pictures: _pictures, Table: _table, Lines: _lines, HeatMaps: _heat_maps, Bars: _bars}
