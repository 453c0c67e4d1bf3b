"""Pages: sections through the templates into one HTML file that needs nothing beside it, and its files."""

from __future__ import annotations

import base64
import functools
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from advtransfer.foreign import AnyPath, printable
from advtransfer.report import figures
from advtransfer.report.files import add_files, csv_text, write_files
from advtransfer.report.sections import EMPTY, Matrix, Page, Plot, Section

if TYPE_CHECKING:
    from jinja2 import Environment


def write_page(page: Page, folder: str | AnyPath, files: Mapping[str, str | bytes] = EMPTY) -> AnyPath:
    """Writes `files`, by path, the tables and figures of the page's sections, and report.html.

    `folder` is a local or any other path object. Each file appears whole, report.html last; its path is
    returned. The same page gives the same bytes.

    Raises:
      ValueError: two files have one name, one leads out of the folder, or report.html is not ours.
    """
    everything: dict[str, str | bytes] = {}
    add_files(everything, files)
    sections = []
    for section in page.sections:
        views, own = _views(section, page.folder)
        add_files(everything, own)
        sections.append((section, views))
    config = json.dumps(dict(page.config), indent=2, sort_keys=True, default=str)
    text = _templates().get_template("page.html").render(page=page, sections=sections, config=config)
    return write_files(folder, everything | {"report.html": printable(text)})


def draw(section: Section) -> str:
    """The section's HTML, to see whether it can be drawn.

    Raises:
      ValueError, IndexError, KeyError, TypeError or ArithmeticError: it cannot.
    """
    import jinja2

    views, _ = _views(section, "")
    try:
        return _templates().get_template("section.html").render(section=section, views=views, headline=())
    except jinja2.TemplateError as error:
        raise ValueError(f"{section.title}: {error}") from error


def _views(section: Section, folder: str) -> tuple[list[dict[str, Any]], dict[str, str | bytes]]:
    """What the template needs of every part, and the files beside the page by path."""
    files: dict[str, str | bytes] = {
        f"{folder}{name}.csv": csv_text(rows) for name, rows in section.files.items() if rows
    }
    views = []
    for part in section.parts:
        view: dict[str, Any] = {"kind": type(part).__name__, "part": part}
        if numbers := getattr(part, "numbers", ""):
            view["path"] = f"{folder}{numbers}.csv" if numbers in section.files else numbers
        if isinstance(part, Plot):
            drawn = [(panel, figures.draw(panel)) for panel in part.panels]
            add_files(files, {panel.file: svg for panel, svg in drawn if panel.file})
            view["images"] = [(_data("svg+xml", svg), figures.describe(panel)) for panel, svg in drawn]
        if isinstance(part, Matrix):
            view["colours"] = [figures.cell_colours(x, confusion=part.confusion) for _, x in part.maps]
        views.append(view)
    return views, files


@functools.cache
def _templates() -> Environment:
    import jinja2

    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("advtransfer.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"unbroken": _unbroken, "png": lambda pixels: _data("png", figures.png(pixels))}
    return templates


def _unbroken(text: str) -> str:
    """Keeps signs, units, ranges and constraints on one line with their numbers."""
    return re.sub(r" (?=[…=%]|\(ε)|(?<=\d) (?=points|seeds?\b)|(?<=[…=]) ", "\N{NO-BREAK SPACE}", text)


def _data(kind: str, content: bytes) -> str:
    """An image that travels inside the page; `kind` is the part after image/ of its media type."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
