"""A page of sections, and sections as JSON: what a browser finds in the file, and the numbers beside it."""

import base64
import json
import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from pages import Page as Found
from pages import decoded, read_csv, read_page

from advtransfer.report import Evidence, Page, Section, figures, write_page, write_report
from advtransfer.report.kept import from_data, to_data
from advtransfer.report.render import draw
from advtransfer.report.sections import (
    Axis,
    Entry,
    Matrix,
    Panel,
    PictureRow,
    Pictures,
    Plot,
    Series,
    SourceInfo,
    Table,
    Text,
)

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (2, 5, 4, 3))
LOOKS = figures.styles([SourceInfo("a", "none", 0.0), SourceInfo("b", "l2", 0.5)])
VALUES = np.array([[4.0, -2.0], [0.0, math.nan]])


def _section(**changes):
    series = [Series(style, [1, 10], [0.9, 0.25], [math.nan] * 2) for style in LOOKS.values()]
    row = PictureRow("a <b>", PICTURES / 255, ["✓ 1", Entry("", "<i>", "3 %")])
    bars = [["0", Entry("50", bar=(0.5, 0.25, 0.75))], ["1", Entry("–", bar=(math.nan, 0.0, 1.0))]]
    parts = [
        Text("Words & <more>."),
        Text("one\n<two>", "list"),
        Pictures(
            "Pictures & more.", [[row, PictureRow("plain", PICTURES / 255)], [row]], "seen", ["One", "Two"]
        ),
        Table("A table.", ["Network", "Share"], [["Group"], ["a", Entry("1.0", small="± 0.5")]], "seen"),
        Plot("Lines.", [Panel("Test", "Same class, %", Axis("rank", log=True), series)], "seen"),
        Matrix("Heat.", [("a", VALUES)], ("<x>", "y"), "seen"),
        Table("Bars.", ["Class", "a"], bars, "seen"),
    ]
    records = [{"model": "a, b", "value": 0.1 + 0.2, "none": math.nan}]
    return Section("What <it> sees", "Found: 5 % (ε = 1).", parts, {"seen": records})._replace(**changes)


def _write(folder, *sections):
    headline = [section.finding for section in sections if section.parts]
    more = {"command": "python x", "versions": {"jax": "1"}, "config": {"seed": 0}}
    return write_page(Page("A <page>", sections, headline, facts=[("Data", "d")], **more), folder)


def test_every_picture_decodes_to_its_pixels(tmp_path):
    found = [decoded(image) for image in read_page(_write(tmp_path, _section())).images]
    assert [kind for kind, _ in found] == ["png"] * 6 + ["svg+xml"]
    for i, (_, pixels) in enumerate(found[:6]):
        np.testing.assert_array_equal(pixels, PICTURES[i % 2])
    svg = ElementTree.fromstring(found[6][1])
    texts = " ".join(text.text or "" for text in svg.iter("{http://www.w3.org/2000/svg}text"))
    assert "rank" in texts and "natural" in texts and "ℓ2 (ε = 0.5)" in texts


def test_the_text_of_every_part_is_there_and_escaped(tmp_path):
    path = _write(tmp_path, _section())
    text, found = path.read_text("utf-8").replace("\n", ""), read_page(path)
    titles = (
        "A <page>",
        "What <it> sees",
        "Found: 5 % (ε = 1).",
        "Words & <more>.",
        "Pictures & more.",
        "Heat.",
    )
    assert all(words in found.text for words in titles)
    assert found.rows[:2] == [["", "One", "Two"], ["a <b>", "✓ 1", "<i>3 %"]]
    assert ["Group"] in found.rows and ["a", "1.0 ± 0.5"] in found.rows
    assert ["0", "50", ""] in found.rows and ["1", "–", ""] in found.rows and ["Class", "a"] in found.rows
    assert ">–</td><td></td>" in text and ">50</td><td><svg" in text  # no bar of what is not known
    assert "<b>&lt;i&gt;</b>" in text and "<ul><li>one</li><li>&lt;two&gt;</li></ul>" in text
    assert found.text.count("Found: 5 %") == 1  # at the top of the page
    assert '<dl class="facts"><div><dt>Data</dt><dd>d</dd></div></dl>' in text
    classes = re.findall(r'<tr( class=.*?)?><th scope="row">(?:a &lt;b&gt;|plain)</th>', text)
    assert classes == ["", "", ' class="first"']  # of groups after the first
    assert not re.search(r"(src|href)=.?(https?:)?//", text) and all(i["alt"] for i in found.images)


def test_pages_forbid_scripts_and_what_lies_elsewhere(tmp_path):
    text = _write(tmp_path, _section()).read_text("utf-8")
    [policy] = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', text)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:" and "script-src" not in rules
    assert text.index("Content-Security-Policy") < text.index("<title>") < text.index("<style>")


def test_a_heat_map_is_blue_above_zero_and_orange_below():
    """The colours go by the 99th percentile of sizes, whatever the sign."""
    harm = np.array([[-4.0, 2.0], [-1.0, 3.0]])
    maps = [("mixed", VALUES), ("harm", harm), ("nothing", np.zeros((2, 2)))]
    with np.errstate(all="raise"):
        text = draw(_section(parts=[Matrix("Heat.", maps, "xy")]))
    cells = np.array(re.findall(r"background:rgb\((\d+),(\d+),(\d+)\)", text), int).reshape(3, 4, 3)
    assert cells[0, 0].tolist() == [0, 114, 178]  # the largest: the full colour
    assert cells[0, 2:].tolist() == [[255] * 3] * 2  # zero and NaN
    for cell, value in zip(cells[1], harm.ravel(), strict=True):
        share, full = min(abs(value) / 3.97, 1), (0, 114, 178) if value > 0 else (213, 94, 0)
        np.testing.assert_allclose(cell, 255 - share * (255 - np.array(full)), atol=1)
    assert np.all(cells[2] == 255)


@pytest.mark.parametrize(("number", "look"), [(12, "heat"), (13, "heat small"), (30, "heat small"), (31, "")])
def test_up_to_thirty_classes_are_named_beside_a_heat_map(number, look):
    names = [f"class {i}" for i in range(number)]
    text = draw(_section(parts=[Matrix("Heat.", [("a", np.eye(number))], names)]))
    found = Found(text)
    assert found.all("table") == ([{"class": look}] if look else [])
    assert all((f">{name}</th>" in text) == bool(look) for name in names)
    if not look:
        [(_, pixels)] = map(decoded, found.images)
        assert found.images[0]["class"] == "pixels" and pixels.shape == (number, number, 3)
        assert np.all(pixels[~np.eye(number, dtype=bool)] == 255) and np.all(pixels[0, 0] == [0, 114, 178])


def test_the_numbers_lie_where_the_page_says(tmp_path):
    path = _write(tmp_path, _section())
    assert {link["href"] for link in read_page(path).all("a")} == {"seen.csv"}
    assert read_csv(tmp_path / "seen.csv") == [{"model": "a, b", "value": repr(0.1 + 0.2), "none": ""}]
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    _write(str(tmp_path), _section())
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    plot = next(part for part in _section().parts if isinstance(part, Plot))
    assert "Numbers" not in draw(_section(parts=[plot._replace(numbers="")]))


def test_a_section_without_parts_says_why_below_its_heading(tmp_path):
    text = _write(tmp_path, _section(), Section("Shape", "Not measured.")).read_text("utf-8")
    assert "<h2>Shape</h2>\n<p>Not measured.</p>" in text and text.count("Not measured.") == 1


def test_a_report_shows_sections_beside_its_rows(tmp_path):
    found = read_page(write_report([], tmp_path, evidence=Evidence(sections=[_section()])))
    assert "What the networks look at" in found.text and "Found: 5 %" in found.text
    assert len(found.images) == 7
    links = {link["href"] for link in found.all("a")}
    assert "figures/seen.csv" in links and all((tmp_path / link).is_file() for link in links)
    assert read_csv(tmp_path / "figures" / "seen.csv")[0]["value"] == repr(0.1 + 0.2)


def test_two_tables_of_one_name_are_refused(tmp_path):
    other = _section(files={"SEEN": [{"a": 1}]}, parts=[])
    with pytest.raises(ValueError, match=r"two files of this report are called 'SEEN.csv'"):
        _write(tmp_path, _section(), other)
    assert not list(tmp_path.iterdir())


# Sections as JSON.


def test_a_section_that_was_kept_as_json_gives_the_same_page(tmp_path):
    sections = [_section(), Section("Shape", "Not measured.")]
    kept = [from_data(json.loads(json.dumps(to_data(section), sort_keys=True))) for section in sections]
    again, new = _write(tmp_path / "kept", *kept), _write(tmp_path / "new", *sections)
    assert again.read_bytes() == new.read_bytes()
    assert again.with_name("seen.csv").read_bytes() == new.with_name("seen.csv").read_bytes()


def _kept(**changes):
    """A kept section of which fields are changed."""
    return json.loads(json.dumps(to_data(_section()))) | changes


def _with_part(which, **changes):
    data = _kept()
    part = next(part for part in data["parts"] if part["kind"] == which)
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
        _with_part("Table", rows=[["a", {"kind": "Entry", "text": "b"}]]),
        _with_part("Table", kind="Plot"),
        _with_part("Plot", panels=[{"kind": "Panel", "title": "a"}]),
        _with_part("Plot", panels=[_kept()["parts"][4]["panels"][0] | {"file": "figures/a.svg"}]),
        _with_part("Matrix", maps=[["a", ARRAY | {"shape": [2, 10**9]}]]),
        _with_part("Matrix", maps=[["a", ARRAY | {"shape": [-2, -2]}]]),
        _with_part("Matrix", maps=[["a", ARRAY | {"type": "object"}]]),
        _with_part("Matrix", maps=[["a", ARRAY | {"base64": "<>"}]]),
        _with_part("Matrix", maps={"a": [[1.0]]}),
        _with_part("Pictures", groups=[[{"head": "a", "images": ARRAY, "labels": [], "alts": []}]]),
        {},
        {"title": "a", "finding": "b", "parts": [], "files": []},
    ],
)
def test_what_is_no_section_is_refused(data):
    with pytest.raises(ValueError):
        from_data(data)


@pytest.mark.parametrize(
    "data",
    [
        _with_part("Pictures", groups=[]),
        _with_part("Pictures", groups=[[_kept()["parts"][2]["groups"][1][0] | {"labels": ["one"]}]]),
        _with_part("Table", rows=[["a"], ["a", "b", "c"], ["a"]]),
        _with_part(
            "Table", rows=[["a", {"kind": "Entry", "text": "", "strong": "", "small": "", "bar": [1.0]}]]
        ),
        _with_part("Matrix", names=["a", "b", "c"]),
        _with_part("Plot", panels=[_kept()["parts"][4]["panels"][0] | {"yrange": [math.nan, 1.0]}]),
    ],
)
def test_what_cannot_be_drawn_is_refused(data):
    with pytest.raises((ValueError, IndexError)):
        draw(from_data(data))


def test_text_of_a_kept_section_is_text(tmp_path):
    """Whoever can write into a workdir can put words on a page, and nothing that runs."""
    bad = "<script>alert(1)</script>\x1b]0;owned\x07"
    data = _with_part("Table", caption=bad, heads=[bad, bad], rows=[[bad, bad]])
    data |= {"title": bad, "finding": bad}
    data["files"]["seen"] = {"columns": [bad], "rows": [["=1+1"]]}
    page = _write(tmp_path, from_data(data)).read_text("utf-8")
    assert "<script" not in page and "&lt;script&gt;" in page
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f]", page) and "␛]0;owned␇" in page
    assert "'=1+1" in (tmp_path / "seen.csv").read_text()
