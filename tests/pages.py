"""A report's page as a browser finds it, for tests."""

import base64
import csv
import io
from html.parser import HTMLParser

import numpy as np
from PIL import Image

VOID = {"meta", "img", "br", "hr", "input", "link", "rect", "line"}


class Page(HTMLParser):
    """Elements with their attributes, the cells of every table row, and text; every element is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.rows, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []
        self.images = self.all("img")

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if "style" in self.open:
            return
        data = data.replace("\N{NO-BREAK SPACE}", " ")
        self.texts.append(data)
        if {"td", "th"} & {*self.open}:
            self.rows[-1][-1] = (self.rows[-1][-1] + data).strip("\n")

    @property
    def text(self):
        return "".join(self.texts)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def read_page(path):
    return Page(path.read_text("utf-8"))


def decoded(image):
    """The kind of an image in the page and its content: pixels, or the bytes of an SVG."""
    kind, _, data = image["src"].removeprefix("data:image/").partition(";base64,")
    content = base64.b64decode(data)
    return kind, content if kind == "svg+xml" else np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
