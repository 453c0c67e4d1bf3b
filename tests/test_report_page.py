"""The report as a file: complete, escaped, the same every time, self-contained, fit for screens."""

import csv
import html.parser
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from advtransfer.report import SUMMARY_COLUMNS, Evidence, write_report

EVIL = "<script>alert('x')</script> & $a_b$ \"q\""
VOID = {"meta", "img", "br", "hr", "input", "link"}


def grid(sources, *, sizes=(10, 50, 800), blocks=(0, -1), seeds=3, epochs=(1, 5), target="digits"):
    rng = np.random.default_rng(0)
    rows = []
    for name, norm, eps in sources:
        for n in sizes:
            for k in blocks:
                for seed in range(seeds):
                    trial = f"{name}-{target}-{n}-{k}-{seed}"
                    for epoch in epochs:
                        accuracy = float(rng.uniform(0.3, 0.9))
                        rows.append(
                            {
                                "source": name,
                                "source_norm": norm,
                                "source_eps": eps,
                                "target": target,
                                "num_train_images": n,
                                "num_unfrozen_blocks": k,
                                "seed": seed,
                                "epoch": epoch,
                                "train_accuracy": 1.0,
                                "train_loss": 0.1,
                                "test_accuracy": accuracy,
                                "trial_id": trial,
                            }
                        )
    return rows


SOURCES = (("natural", "none", 0.0), ("l2", "l2", 0.5))


def full_evidence(text=EVIL):
    rng = np.random.default_rng(1)
    clean = rng.uniform(0, 1, (9, 6, 6, 3)).astype(np.float32)
    twin = np.clip(clean + 0.02 * rng.standard_normal(clean.shape), 0, 1)
    return Evidence(
        sources=[
            {"name": "natural", "norm": "none", "eps": 0.0, "natural_accuracy": 0.98},
            {
                "name": "l2",
                "norm": "l2",
                "eps": 0.5,
                "natural_accuracy": 0.95,
                "adversarial_accuracy": 0.7,
                "num_images": 1024,
                "attack": text,
            },
        ],
        pictures={
            "source_images": clean,
            "adversarial/natural": twin,
            "adversarial/l2": twin,
            "target_images": clean[:4],
        },
        captions={
            "source_labels": [text] * 9,
            "natural_predictions/l2": ["A"] * 9,
            "adversarial_predictions/l2": [text] * 9,
            "target_labels": [text, "1"],
        },
        config={"note": text, "eps": 0.5, "list": (1, 2)},
        versions={"jax": "0.10.2", text: "1"},
        command=f"python launch.py {text}",
        remarks=(f"chosen on validation {text}",),
    )


class Page(html.parser.HTMLParser):
    """Checks that tags are balanced, and keeps the elements and the text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.text = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    evil = (("natural", "none", 0.0), (EVIL, "l2", 0.5), ("l2", "l2", 0.5))
    rows = grid(evil, target=EVIL) + grid(SOURCES)
    path = write_report(rows, folder, evidence=full_evidence(), title=EVIL)
    return rows, path


def test_everything_is_escaped_and_balanced(written):
    _, path = written
    text = path.read_text()
    assert "<script" not in text
    page = Page(text)
    assert "".join(page.text).count("alert('x')") >= 8  # title, target, source, labels, config, ...
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.elements}
    for svg in path.parent.glob("figures/*.svg"):
        Page(svg.read_text().partition("<svg")[2].join(["<svg", ""]))
        assert "<script" not in svg.read_text()


def test_the_page_stands_alone(written):
    _, path = written
    text = path.read_text()
    page = Page(text)
    for _, attributes in page.elements:
        assert attributes.get("src", "data:").startswith("data:")
        assert "srcset" not in attributes and "onload" not in attributes
    for link in page.all("a"):
        assert (path.parent / link["href"]).is_file()
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert str(path.parent) not in text


def test_pictures_and_figures_have_words(written):
    _, path = written
    page = Page(path.read_text())
    assert all(attributes["alt"].strip() for attributes in page.all("img"))
    # Accuracy and lead against n and epoch (2 k) and against k (3 n), on 2 targets; against constraint (3 n)
    # where there are three sources; 1 of the sources, 8 of 9 images × (1 + 2 twins × 2), 4 targets.
    assert len(page.all("img")) == 2 * 2 * (2 + 2 + 3) + 2 * 3 + 1 + 40 + 4
    for kind in ("n", "epoch", "k", "constraint"):
        for measure in ("accuracy", "delta"):
            assert list(path.parent.glob(f"figures/{measure}_vs_{kind}_*.svg"))
    headings = [tag for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert headings.count("h1") == 1 and headings[0] == "h1"
    assert set(headings) == {"h1", "h2", "h3"}


def test_same_arguments_same_bytes(written, tmp_path):
    rows, path = written
    again = write_report(rows, tmp_path, evidence=full_evidence(), title=EVIL)
    files = {file.relative_to(path.parent) for file in path.parent.rglob("*") if file.is_file()}
    assert files == {file.relative_to(tmp_path) for file in tmp_path.rglob("*") if file.is_file()}
    for file in files:
        assert (path.parent / file).read_bytes() == (again.parent / file).read_bytes(), file


def test_numbers_stand_beside_the_figures(written):
    rows, path = written
    with open(path.parent / "summary.csv", newline="") as stream:
        summary = list(csv.DictReader(stream))
    assert tuple(summary[0]) == SUMMARY_COLUMNS
    assert len(summary) == 3 * 2 * 3 + 2 * 2 * 3
    by_cell = {tuple(row.values())[:4]: row for row in summary}
    expected = [
        row["test_accuracy"]
        for row in rows
        if (row["source"], row["target"], row["num_train_images"], row["epoch"]) == ("l2", "digits", 50, 5)
        and row["num_unfrozen_blocks"] == -1
    ]
    cell = by_cell["l2", "digits", "50", "-1"]
    assert float(cell["mean"]) == pytest.approx(np.mean(expected), rel=1e-12)
    assert by_cell["natural", "digits", "50", "-1"]["delta"] == ""
    with open(path.parent / "figures" / "delta_vs_n.csv", newline="") as stream:
        deltas = {tuple(row.values())[:4]: row for row in csv.DictReader(stream)}
    assert deltas["l2", "digits", "50", "-1"]["delta"] == cell["delta"]
    kinds = [f"{measure}_vs_{kind}" for measure in ("accuracy", "delta") for kind in ("n", "epoch", "k")]
    for name in (*kinds, "accuracy_vs_constraint", "delta_vs_constraint", "pooled_delta", "source_accuracy"):
        assert (path.parent / "figures" / f"{name}.csv").is_file()


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "no result rows"),
        (grid(SOURCES[:1]), "no robust source"),
        (grid(SOURCES[1:]), "no natural source"),
        (grid(SOURCES, seeds=1, epochs=(3,), sizes=(10,), blocks=(0,)), "one epoch was evaluated"),
        (grid((*SOURCES, ("other", "none", 0.0))), "no single baseline"),
        (grid(SOURCES)[:-7], "1 cell of the grid"),
        (grid(SOURCES)[:-1], "end at different epochs"),
        (
            [row | {"test_accuracy": float("nan")} for row in grid(SOURCES)],
            "share no measured seed",
        ),
    ],
)
def test_what_is_missing_is_said_and_the_rest_is_done(tmp_path, rows, words):
    path = write_report(rows, tmp_path)
    page = Page(path.read_text())
    text = "".join(page.text)
    assert words in text
    assert "No pictures were handed" in text and "No command, versions or configuration" in text
    assert (tmp_path / "summary.csv").is_file()


def test_config_is_whole(written):
    _, path = written
    text = "".join(Page(path.read_text()).text)
    shown = text[text.index("Full configuration") + len("Full configuration") :]
    assert json.JSONDecoder().raw_decode(shown)[0] == {"note": EVIL, "eps": 0.5, "list": [1, 2]}


def test_refused_in_one_line(tmp_path):
    row = grid(SOURCES)[0]
    del row["seed"]
    with pytest.raises(ValueError, match=r"^rows\[0\]: columns missing: seed"):
        write_report([row], tmp_path)
    pictures = {"source_images": np.zeros((2, 4, 4, 3)), "adversarial/l2": np.zeros((2, 5, 5, 3))}
    with pytest.raises(ValueError, match="shape"):
        write_report([], tmp_path, evidence=Evidence(pictures=pictures))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.sweep
def test_a_hundred_thousand_rows(tmp_path):
    rows = grid(SOURCES, sizes=(10, 100, 1000, 3000), blocks=(0, 1, 3, -1), seeds=200, epochs=range(1, 17))
    assert len(rows) == 102_400
    page = write_report(rows, tmp_path).read_text()
    cells = len(SOURCES) * 4 * 4
    assert len((tmp_path / "summary.csv").read_text().splitlines()) == 1 + cells
    assert len(page) < 20e6


# The page is measured in a frame of the width in question: a browser's window has a least width.
MEASURE = """<iframe src="report.html" style="width:{width}px;height:900px;border:0"></iframe>
<script>
onload = () => {{
  const page = document.querySelector("iframe").contentDocument, root = page.documentElement;
  const boxes = [...page.querySelectorAll("body *")].filter((e) => !e.closest(".scroll"));
  document.title = JSON.stringify({{
    width: Math.max(root.scrollWidth, ...boxes.map((e) => e.getBoundingClientRect().right)),
    images: [...page.images].length,
    broken: [...page.images].filter((i) => !(i.complete && i.naturalWidth && i.clientWidth)).length,
    smallest: Math.min(...[...page.querySelectorAll(".panels img")].map((i) => i.clientWidth)),
  }});
}};
</script>"""


@pytest.mark.process
@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium: PAGE NOT LOOKED AT")
@pytest.mark.parametrize("width", [400, 1280])
def test_in_a_browser_nothing_overflows_and_every_image_shows(written, tmp_path, width):
    _, path = written
    shutil.copy(path, tmp_path)
    (tmp_path / "measure.html").write_text(MEASURE.format(width=width))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--allow-file-access-from-files"]
    command += ["--virtual-time-budget=5000", "--dump-dom", f"file://{tmp_path}/measure.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    [title] = re.findall("<title>(.*?)</title>", done.stdout)
    measured = json.loads(html.unescape(title))
    assert measured["images"] == 79 and measured["broken"] == 0
    assert measured["width"] <= width
    assert measured["smallest"] >= 300  # panels are never squeezed beyond reading
