"""Pieces of HTML that the report's sections share."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from importlib import resources
from string import Template

import numpy as np

from advtransfer.foreign import printable
from advtransfer.report import figures


def page(title: str, parts: Sequence[str]) -> str:
    """The HTML file of a title, as text, and of ready-made parts; empty ones are left out."""
    template = Template(resources.files(__package__).joinpath("template.html").read_text("utf-8"))
    return printable(template.substitute(title=escape(title), body="\n".join(filter(None, parts))))


def table(
    heads: Sequence[str],
    groups: Sequence[Sequence[Sequence[str]]],
    caption: str,
    *,
    numbers: str = "",
    classes: str = "",
) -> str:
    """A table in a box that scrolls by itself.

    `heads` and `caption` are text, the cells ready-made HTML; each group of rows is one tbody.
    """
    head = "".join(th(escape(text), "col") for text in heads)
    body = "".join(map(_body, groups))
    content = f"<table{attribute('class', classes)}><thead><tr>{head}</tr></thead>{body}</table>"
    return scrolling(content, caption, numbers=numbers)


def scrolling(content: str, caption: str, *, numbers: str = "", kind: str = "table") -> str:
    """Wide content with its caption; the box takes the focus, so that a keyboard can scroll it."""
    label = escape(caption)
    link = f" {numbers_link(numbers)}" if numbers else ""
    return (
        f"<figure class={kind}><figcaption>{label}{link}</figcaption>"
        f'<div class=scroll tabindex=0 role=region aria-label="{label}">{content}</div></figure>'
    )


def th(content: str, scope: str) -> str:
    return f"<th scope={scope}>{content}</th>"


def image(content: bytes, kind: str, alt: str, classes: str = "") -> str:
    """An image that travels inside the page; `kind` is the part after image/ of its media type."""
    data = base64.b64encode(content).decode()
    source = attribute("src", f"data:image/{kind};base64,{data}")
    return f"<img{attribute('class', classes)}{source}{attribute('alt', alt)}>"


def picture_row(head: str, images: np.ndarray, labels: Sequence[str], classes: str = "") -> str:
    """A row of the table of pictures; `labels` are ready-made HTML."""
    cells = "".join(
        f"<td>{image(figures.png(pixels), 'png', f'{head}, image {number}', 'picture')}"
        f"<span class=label>{label}</span></td>"
        for number, (pixels, label) in enumerate(zip(images, labels, strict=True), start=1)
    )
    return f"<tr{attribute('class', classes)}>{th(escape(head), 'row')}{cells}</tr>"


def attribute(name: str, value: str) -> str:
    """An attribute with the space before it; nothing at all where the value is empty."""
    return f' {name}="{escape(value)}"' if value else ""


def numbers_link(name: str, what: str = "Numbers") -> str:
    path = escape(f"figures/{name}.csv".replace("figures/../", ""))
    return f"{what}: <a href='{path}'>{path}</a>."


def span(values: Sequence[int]) -> str:
    """Sorted numbers as "20" or "10–800"."""
    if not values:
        return "no"
    return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,}–{values[-1]:,}"


def listing(values: Sequence[int]) -> str:
    """Numbers as "10, 20 and 50"."""
    texts = [f"{value:,}" for value in values]
    return " and ".join(filter(None, [", ".join(texts[:-1]), texts[-1]]))


def _body(rows: Sequence[Sequence[str]]) -> str:
    joined = "".join(f"<tr>{''.join(cells)}</tr>" for cells in rows)
    return f"<tbody>{joined}</tbody>"
