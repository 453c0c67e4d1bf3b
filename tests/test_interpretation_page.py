"""The page of an interpretation: what a browser would find in the file, and the numbers beside it."""

import base64
import io
import json
import math
import re
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from test_model_page import _csv, _Page

from advtransfer.report import (
    Evidence,
    Interpretation,
    Section,
    draw,
    figures,
    write_interpretation,
    write_report,
)
from advtransfer.report.interpretation import Bars, HeatMaps, Lines, Pictures, Row, Table
from advtransfer.report.kept import from_data, to_data
from advtransfer.report.summary import Source

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (2, 5, 4, 3))
LOOKS = figures.styles([Source("a", "none", 0.0), Source("b", "l2", 0.5)])
VALUES = np.array([[4.0, -2.0], [0.0, math.nan]])


def _section(**changes):
    series = [figures.Series(style, [1, 10], [0.9, 0.25], [math.nan] * 2) for style in LOOKS.values()]
    row = Row("a <b>", PICTURES / 255, ["✓ 1", "<i>"])
    parts = [
        Pictures("Pictures & more.", [[row, Row("plain", PICTURES / 255)], [row]], "seen", ["One", "Two"]),
        Table("A table.", ["Network", "Share"], [["a", "1.0 ± 0.5"]], "seen"),
        Lines("Lines.", {"Test": (figures.Axis("rank", log=True), series)}, "Same class, %", "seen"),
        HeatMaps("Heat.", {"a": VALUES}, ("<x>", "y"), "seen"),
        Bars("Bars.", ["Class", "a"], [("0", [(0.5, 0.25, 0.75)]), ("1", [(math.nan, 0.0, 1.0)])], "seen"),
    ]
    records = [{"model": "a, b", "value": 0.1 + 0.2, "none": math.nan}]
    return Section("What <it> sees", "Found: 5 % (ε = 1).", parts, {"seen": records})._replace(**changes)


def _page(*sections):
    drawn = [draw(section, beside="../") for section in sections]
    return Interpretation("A <page>", drawn, [("Data", "d")], "python x", {"jax": "1"}, {"seed": 0})


def _pixels(source):
    kind, _, data = source.removeprefix("data:image/").partition(";base64,")
    return kind, base64.b64decode(data)


def test_every_picture_decodes_to_its_pixels(tmp_path):
    found = _Page(write_interpretation(_page(_section()), tmp_path).read_text("utf-8"))
    kinds = [_pixels(image["src"])[0] for image in found.images]
    assert kinds == ["png"] * 6 + ["svg+xml"] and all(image["alt"] for image in found.images)
    for i, image in enumerate(found.images[:6]):
        pixels = np.asarray(Image.open(io.BytesIO(_pixels(image["src"])[1])).convert("RGB"))
        np.testing.assert_array_equal(pixels, PICTURES[i % 2])
    svg = ElementTree.fromstring(_pixels(found.images[6]["src"])[1])
    texts = " ".join(text.text or "" for text in svg.iter("{http://www.w3.org/2000/svg}text"))
    assert "rank" in texts and "natural" in texts and "ℓ2 (ε = 0.5)" in texts


def test_the_text_of_every_part_is_there_and_escaped(tmp_path):
    text = write_interpretation(_page(_section()), tmp_path).read_text("utf-8")
    found = _Page(text)
    for said in (
        "A <page>",
        "What <it> sees",
        "Found: 5 % (ε = 1).",
        "Pictures & more.",
        "A table.",
        "Heat.",
    ):
        assert said in found.text
    assert found.rows[:2] == [["", "One", "Two"], ["a <b>", "✓ 1", "<i>"]]
    assert ["a", "1.0 ± 0.5"] in found.rows and ["0", "50", ""] in found.rows and ["1", "–", ""] in found.rows
    assert ["Class", "a", ""] in found.rows
    assert ">–</td><td></td>" in text and ">50</td><td><svg" in text  # no bar of what is not known
    assert found.text.count("Found: 5 %") == 1
    assert "<dl class=facts><div><dt>Data</dt><dd>d</dd></div></dl>" in text
    classes = re.findall(r"<tr( class=.*?)?><th scope=row>(?:a &lt;b&gt;|plain)</th>", text)
    assert classes == ["", "", ' class="first"']  # of groups after the first
    assert not re.search(r"(src|href)=.?(https?:)?//", text)


def test_a_heat_map_is_blue_above_zero_and_orange_below(tmp_path):
    text = write_interpretation(_page(_section()), tmp_path).read_text("utf-8")
    cells = re.findall(r"background:rgb\((\d+),(\d+),(\d+)\)", text)
    (top, below), (zero, nothing) = np.array(cells, int).reshape(2, 2, 3)
    assert top.tolist() == [0, 114, 178]  # the largest: the full colour
    assert below[0] == 255 - round((255 - 213) * 2 / np.nanquantile(np.abs(VALUES), 0.99))
    assert below[0] > below[1] > below[2]
    assert zero.tolist() == nothing.tolist() == [255] * 3


def test_a_heat_map_of_harm_and_one_of_nothing():
    """The colours go by the 99th percentile of sizes, whatever the sign."""
    maps = {"harm": np.array([[-4.0, 2.0], [-1.0, 3.0]]), "nothing": np.zeros((2, 2))}
    with np.errstate(all="raise"):
        text = draw(_section(parts=[HeatMaps("Heat.", maps, "xy")])).parts
    cells = np.array(re.findall(r"background:rgb\((\d+),(\d+),(\d+)\)", text), int).reshape(2, 4, 3)
    colours = {-4.0: (213, 94, 0), 2.0: (0, 114, 178), -1.0: (213, 94, 0), 3.0: (0, 114, 178)}
    largest = 3.97  # 97 % of the way from 3 to 4
    for cell, (value, full) in zip(cells[0], colours.items(), strict=True):
        share = min(abs(value) / largest, 1)
        np.testing.assert_allclose(cell, 255 - share * (255 - np.array(full)), atol=1)
    assert np.all(cells[1] == 255)


@pytest.mark.parametrize(("number", "size"), [(12, "1.75"), (13, "0.9"), (30, "0.9")])
def test_up_to_thirty_classes_are_named_beside_a_heat_map(number, size):
    names = [f"class {i}" for i in range(number)]
    text = draw(_section(parts=[HeatMaps("Heat.", {"a": np.eye(number)}, names)])).parts
    assert re.findall(r"height:(.*?)rem", text) == [size] * number**2
    assert all(f">{name}</th>" in text for name in names) and "<img" not in text


def test_lines_stand_between_nothing_and_all(monkeypatch):
    """With the numbers' link only where there are numbers."""
    seen = []
    panel = figures.line_panel

    def kept(*args, yrange, **options):
        seen.append(yrange)
        return panel(*args, yrange=yrange, **options)

    monkeypatch.setattr(figures, "line_panel", kept)
    lines = next(part for part in _section().parts if isinstance(part, Lines))
    assert "Numbers: <a href='figures/seen.csv'>" in draw(_section(parts=[lines])).parts
    assert "Numbers" not in draw(_section(parts=[lines._replace(numbers="")])).parts
    assert all(low <= 0 < 1 <= high for low, high in seen) and len(seen) == 2


def test_many_classes_become_one_picture(tmp_path):
    number = 31
    part = HeatMaps("Heat.", {"a": np.eye(number)}, [str(i) for i in range(number)])
    section = _section(parts=[part])
    found = _Page(write_interpretation(_page(section), str(tmp_path)).read_text("utf-8"))
    (image,) = found.images
    assert image["style"] == "image-rendering:pixelated"
    pixels = np.asarray(Image.open(io.BytesIO(_pixels(image["src"])[1])).convert("RGB"))
    assert pixels.shape == (number, number, 3)
    assert np.all(pixels[~np.eye(number, dtype=bool)] == 255) and np.all(pixels[0, 0] == [0, 114, 178])


def test_the_numbers_lie_where_the_page_says(tmp_path):
    page = write_interpretation(_page(_section()), tmp_path)
    links = set(re.findall(r"href='([^']*)'", page.read_text("utf-8")))
    assert links == {"seen.csv"}
    assert _csv(tmp_path / "seen.csv") == [{"model": "a, b", "value": repr(0.1 + 0.2), "none": ""}]
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_interpretation(_page(_section()), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_section_without_parts_says_why_below_its_heading(tmp_path):
    text = write_interpretation(_page(_section(), Section("Shape", "Not measured.")), tmp_path).read_text(
        "utf-8"
    )
    assert "<h2>Shape</h2>\n<p>Not measured.</p>" in text and text.count("Not measured.") == 1


def test_a_report_shows_sections_beside_its_rows(tmp_path):
    path = write_report([], tmp_path, evidence=Evidence(sections=[draw(_section())]))
    text = path.read_text("utf-8")
    found = _Page(text)
    assert "What the networks look at" in found.text and "Found: 5 %" in found.text
    assert len(found.images) == 7
    for link in re.findall(r"href='([^']*)'", text):
        assert (tmp_path / unquote(link)).is_file()
    assert _csv(tmp_path / "figures" / "seen.csv")[0]["value"] == repr(0.1 + 0.2)


def test_a_section_that_was_kept_as_json_gives_the_same_page(tmp_path):
    sections = [_section(), Section("Shape", "Not measured.")]
    page = _page(*sections)
    kept = [from_data(json.loads(json.dumps(to_data(section), sort_keys=True))) for section in sections]
    again = write_interpretation(_page(*kept), tmp_path / "kept")
    assert again.read_bytes() == write_interpretation(page, tmp_path / "new").read_bytes()
    assert (tmp_path / "kept" / "seen.csv").read_bytes() == (tmp_path / "new" / "seen.csv").read_bytes()


def _kept(**changes):
    """A kept section of which fields are changed."""
    return json.loads(json.dumps(to_data(_section()))) | changes


def _with_part(which, **changes):
    data = _kept()
    [part] = [part for part in data["parts"] if part["kind"] == which]
    part.update(changes)
    return data


ARRAY = {"type": "float64", "shape": [2, 2], "base64": base64.b64encode(bytes(32)).decode()}


@pytest.mark.parametrize(
    "data",
    [
        _kept(parts="<script>alert(1)</script>"),
        _kept(parts=["<script>alert(1)</script>"]),
        _kept(parts=[{"kind": "Section"}]),
        _kept(title=["a"]),
        _kept(files={"../../escaped": {"columns": [], "rows": []}}),
        _kept(files={"/tmp/escaped": {"columns": [], "rows": []}}),
        _kept(files={"seen": "text"}),
        _kept(files={"seen": {"columns": ["a"], "rows": [[{"b": 1}]]}}),
        _kept(files={}),  # its parts name a table
        _with_part("Table", numbers="../../../etc/passwd"),
        _with_part("Table", rows=[["a", 1]]),
        _with_part("Table", kind="Bars"),
        _with_part("HeatMaps", maps=[["a", ARRAY | {"shape": [2, 10**9]}]]),
        _with_part("HeatMaps", maps=[["a", ARRAY | {"shape": [-2, -2]}]]),
        _with_part("HeatMaps", maps=[["a", ARRAY | {"type": "object"}]]),
        _with_part("HeatMaps", maps=[["a", ARRAY | {"base64": "<>"}]]),
        _with_part("HeatMaps", maps={"a": [[1.0]]}),
        _with_part("Pictures", groups=[[{"head": "a", "images": ARRAY, "labels": []}]]),
        {},
        {"title": "a", "finding": "b", "parts": [], "files": []},
    ],
)
def test_what_is_no_section_is_refused(data):
    with pytest.raises(ValueError):
        from_data(data)


def test_text_of_a_kept_section_is_text(tmp_path):
    """Whoever can write into a workdir can put words on a page, and nothing that runs."""
    bad = "<script>alert(1)</script>\x1b]0;owned\x07"
    data = _with_part("Table", caption=bad, heads=[bad, bad], rows=[[bad, bad]])
    data |= {"title": bad, "finding": bad}
    data["files"]["seen"] = {"columns": [bad], "rows": [["=1+1"]]}
    page = write_interpretation(_page(from_data(data)), tmp_path).read_text("utf-8")
    assert "<script" not in page and "&lt;script&gt;" in page
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f]", page) and "␛]0;owned␇" in page
    assert "'=1+1" in (tmp_path / "seen.csv").read_text()


def test_pages_forbid_scripts_and_what_lies_elsewhere(tmp_path):
    text = write_interpretation(_page(_section()), tmp_path).read_text("utf-8")
    [policy] = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', text)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:" and "script-src" not in rules
    assert text.index("Content-Security-Policy") < text.index("<title>") < text.index("<style>")


def test_two_tables_of_one_name_are_refused(tmp_path):
    other = _section(files={"SEEN": [{"a": 1}]}, parts=[])
    with pytest.raises(ValueError, match=r"two files of this report are called 'SEEN.csv'"):
        write_interpretation(_page(_section(), other), tmp_path)
    assert not list(tmp_path.iterdir())
