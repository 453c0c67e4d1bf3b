"""The report as a file: complete, escaped, the same every time, self-contained, fit for screens."""

import html
import itertools
import json
import re
import shutil
import subprocess
from xml.etree import ElementTree

import numpy as np
import pytest
from pages import decoded, read_csv, read_page
from scipy import stats
from test_report_statistics import L2, LINF, NATURAL, paper_rows, rows_of

from advtransfer.report import SUMMARY_COLUMNS, Evidence, figures, write_report
from advtransfer.report.figures import difference_gain
from advtransfer.report.reference import CITATION
from advtransfer.report.statistics import collect
from advtransfer.report.target_figures import slug

EVIL = "<script>alert('x')</script> & $a_b$ \"q\""
SOURCES = (("natural", "none", 0.0), ("l2", "l2", 0.5))


def grid(sources, *, sizes=(10, 50, 800), blocks=(0, -1), seeds=3, epochs=(1, 5), target="digits"):
    rng = np.random.default_rng(0)
    return [
        row
        for source, n, k in itertools.product(sources, sizes, blocks)
        for row in rows_of(
            rng.uniform(0.3, 0.9, seeds), source=source, target=target, n=n, k=k, epochs=epochs
        )
    ]


def full_evidence(text=EVIL):
    rng = np.random.default_rng(1)
    clean = rng.uniform(0, 1, (9, 6, 6, 3)).astype(np.float32)
    attacked = np.clip(clean + 0.02 * rng.standard_normal(clean.shape), 0, 1)
    robust = {"name": "l2", "norm": "l2", "eps": 0.5, "natural_accuracy": 0.95, "adversarial_accuracy": 0.7}
    return Evidence(
        sources=[
            {"name": "natural", "norm": "none", "eps": 0.0, "natural_accuracy": 0.98},
            robust | {"num_images": 1024, "attack": text},
        ],
        pictures={
            "source_images": clean,
            "adversarial/natural": attacked,
            "adversarial/l2": attacked,
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


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    evil = (("natural", "none", 0.0), (EVIL, "l2", 0.5), ("l2", "l2", 0.5))
    rows = grid(evil, target=EVIL) + grid(SOURCES)
    path = write_report(rows, folder, evidence=full_evidence(), title=EVIL)
    return rows, path, read_page(path)


# The file.


def test_the_page_stands_alone_and_everything_is_escaped(written):
    _, path, page = written
    text = path.read_text()
    assert "<script" not in text
    assert page.text.count("alert('x')") >= 8  # title, target, source, labels, config, ...
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.elements}
    for svg in path.parent.glob("figures/*.svg"):
        ElementTree.parse(svg)
        assert "<script" not in svg.read_text()
    for _, attributes in page.elements:
        assert attributes.get("src", "data:").startswith("data:")
        assert "srcset" not in attributes and "onload" not in attributes
    for link in page.all("a"):
        assert (path.parent / link["href"]).is_file()
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert str(path.parent) not in text
    shown = page.text[page.text.index("Configuration") + len("Configuration") :]
    assert json.JSONDecoder().raw_decode(shown)[0] == {"note": EVIL, "eps": 0.5, "list": [1, 2]}


def test_pictures_and_figures_have_words(written):
    _, path, page = written
    assert all(attributes["alt"].strip() for attributes in page.images)
    # Accuracy and lead against n and epoch (2 k) and against k (3 n), on 2 targets; against constraint (3 n)
    # where there are three sources; 1 of the sources, 8 of 9 images × (1 + 2 adversarial × 2), 4 targets.
    assert len(page.images) == 2 * 2 * (2 + 2 + 3) + 2 * 3 + 1 + 40 + 4
    for kind in ("n", "epoch", "k", "constraint"):
        for measure in ("accuracy", "delta"):
            assert list(path.parent.glob(f"figures/{measure}_vs_{kind}_*.svg"))
    headings = [tag for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert headings.count("h1") == 1 and headings[0] == "h1" and set(headings) == {"h1", "h2", "h3"}


def test_same_arguments_same_bytes(written, tmp_path):
    rows, path, _ = written
    write_report(rows, tmp_path, evidence=full_evidence(), title=EVIL)
    before, after = (
        {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        for folder in (path.parent, tmp_path)
    )
    assert before == after


def test_numbers_stand_beside_the_figures(written):
    rows, path, page = written
    summary = read_csv(path.parent / "summary.csv")
    assert tuple(summary[0]) == SUMMARY_COLUMNS and len(summary) == 3 * 2 * 3 + 2 * 2 * 3
    by_cell = {tuple(row.values())[:4]: row for row in summary}
    place = {
        "source": "l2",
        "target": "digits",
        "num_train_images": 50,
        "epoch": 5,
        "num_unfrozen_blocks": -1,
    }
    expected = [row["test_accuracy"] for row in rows if place.items() <= row.items()]
    cell = by_cell["l2", "digits", "50", "-1"]
    assert float(cell["mean"]) == pytest.approx(np.mean(expected), rel=1e-12)
    assert by_cell["natural", "digits", "50", "-1"]["delta"] == ""
    assert page.text.count("Epochs needed, fine-tuned on n = 50: how many times fewer") == 2  # targets
    deltas = read_csv(path.parent / "figures" / "delta_vs_n.csv")
    assert {tuple(row.values())[:4]: row for row in deltas}["l2", "digits", "50", "-1"] == cell
    kinds = [f"{m}_vs_{kind}" for m in ("accuracy", "delta") for kind in ("n", "epoch", "k", "constraint")]
    for name in (*kinds, "pooled_delta", "source_accuracy"):
        assert (path.parent / "figures" / f"{name}.csv").is_file()


def test_figures_of_names_with_control_characters_are_xml(tmp_path):
    rows = [
        row
        for source in (("a", "none", 0), ("\0", "l2", 1), ("c\x1b]\x07", "l2", 1), ("\u202e", "l2", 2))
        for n in (10, 20)
        for row in rows_of([0.5], source=source, n=n, target="t\x0b\x1b[31m")
    ]
    text = write_report(rows, tmp_path).read_text("utf-8")
    drawn = list(tmp_path.rglob("*.svg"))
    for figure in drawn:
        ElementTree.parse(figure)
    assert drawn and not any(ord(c) < 32 and c not in "\t\n" for c in text) and "\u202e" not in text


def test_targets_have_file_names_of_their_own():
    targets = ["tfds:a b", "tfds:a-b", "c", "%"]
    assert [slug(targets, target) for target in targets] == ["tfds-a-b", "tfds-a-b-1", "c", "1"]
    # One that looks like what is made of another, capitals that some file systems do not tell apart, no end.
    targets = ["a b", "a-b", "a-b-1", "A B", "x" * 300, "x" * 301]
    names = [slug(targets, target) for target in targets]
    assert len({name.lower() for name in names}) == 6 and max(map(len, names)) < 70


def test_a_page_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "report.html").write_text("<h1>years of work</h1>")
    with pytest.raises(ValueError, match="is not a page of advtransfer: move it"):
        write_report(grid(SOURCES), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    for _ in range(2):
        assert write_report([], tmp_path / "own").exists()


def test_refused_in_one_line(tmp_path):
    row = grid(SOURCES)[0]
    del row["seed"]
    with pytest.raises(ValueError, match=r"^rows\[0\]: columns missing: seed"):
        write_report([row], tmp_path)
    for pictures, words in (
        ({"source_images": np.zeros((2, 4, 4))}, r"pictures\['source_images'\] has shape \(2, 4, 4\)"),
        ({"target_images": np.zeros((2, 4, 4, 1))}, r"pictures\['target_images'\] has shape \(2, 4, 4, 1\)"),
        (
            {"source_images": np.zeros((2, 4, 4, 3)), "adversarial/l2": np.zeros((2, 5, 5, 3))},
            r"pictures\['adversarial/l2'\] has shape \(2, 5, 5, 3\), but source_images has \(2, 4, 4, 3\)",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            write_report([], tmp_path, evidence=Evidence(pictures=pictures))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "no result rows"),
        (grid(SOURCES[:1]), "no robust source"),
        (grid(SOURCES[1:]), "no natural source"),
        (grid(SOURCES, seeds=1, epochs=(3,), sizes=(10,), blocks=(0,)), "one epoch was evaluated"),
        (grid((*SOURCES, ("other", "none", 0.0))), "no single baseline"),
        (grid(SOURCES)[:-6], "1 cell of the grid"),
        (grid(SOURCES)[:-1], "end at different epochs"),
        ([row | {"test_accuracy": float("nan")} for row in grid(SOURCES)], "share no measured seed"),
    ],
)
def test_what_is_missing_is_reported_and_the_rest_is_done(tmp_path, rows, words):
    page = read_page(write_report(rows, tmp_path))
    assert words in page.text and "There are no pictures." in page.text
    assert (tmp_path / "summary.csv").is_file()


# The tables of a target.


def _signed(x):
    return f"{100 * x:+.1f}".replace("-", "−")


def _lead(mine, base):
    """A paired lead in points and its interval, as SciPy has it."""
    difference = np.subtract(mine, base)
    low, high = stats.ttest_1samp(difference, 0).confidence_interval(0.95)
    return difference.mean(), low, high


BASE = {10: [0.5, 0.6, 0.7], 20: [0.6, 0.72, 0.75]}
ROBUST = {10: [0.55, 0.66, 0.74], 20: [0.6, 0.75]}
CLEAR = [0.8, 0.91, 0.99]
ALL = [0.42, 0.5, 0.61]  # of the natural source with all blocks trained


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Three sources, unequal seeds, and cells that are not there."""
    rows = rows_of(BASE[10]) + rows_of(BASE[20], n=20) + rows_of(ALL, k=-1)
    rows += rows_of(ROBUST[10], source=L2) + rows_of(ROBUST[20], source=L2, n=20)
    rows += rows_of([0.3], source=L2, k=-1) + rows_of(CLEAR, source=LINF)
    path = write_report(rows, tmp_path_factory.mktemp("small"))
    return read_page(path), path


def test_the_tables_of_a_target_say_what_its_rows_do(small):
    page, path = small
    labels, shown = ["natural", "ℓ2 (ε = 0.5)", "ℓ∞ (ε = 4/255)"], page.rows
    # Few images: two seeds are at both n, the third source has only one n, and all blocks only one seed.
    pooled = np.subtract([ROBUST[10][:2], ROBUST[20]], [BASE[10][:2], BASE[20][:2]]).mean(axis=0)
    texts = []
    for (mean, low, high), seeds in ((_lead(pooled, 0 * pooled), 2), (_lead(CLEAR, BASE[10]), 3)):
        texts.append(f"{_signed(mean)} ({_signed(low)} … {_signed(high)}, {seeds} seeds)")
    at = shown.index(["Trained layers", *labels[1:]])
    assert shown[at + 1 : at + 3] == [["head only", *texts], ["all blocks", "−12.0 (1 seed)", "–"]]
    assert "n = 10 and 20, where both sources have them, and its 95 % interval" in page.text
    assert "Images needed: how many times fewer than" in page.text and "Epochs needed" not in page.text
    assert shown.count(["Trained layers", *labels[1:]]) == 2
    # The best k, of the n that have two.
    lead, low, high = _lead(BASE[10], ALL)
    tied = " [or all]" if low < 0 else ""
    at = shown.index(["n", *labels[:2]])
    best = f"0{tied} {_signed(lead)} ± {100 * (high - low) / 2:.1f}"
    assert shown[at + 1] == ["10", best, "0 [or all] +25.0"] and shown[at + 2][0] != "20"
    # All numbers: fewer seeds than three are in brackets.
    at = shown.index(["n", *labels, *(f"{label} − natural" for label in labels[1:])])
    assert [row[0] for row in shown[at + 1 : at + 7]] == ["Head only", "10", "20", "All blocks", "10", "20"]

    def cell(values):
        interval = ""
        if len(values) > 1:
            low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
            interval = f" ± {100 * (high - low) / 2:.1f}"
        return f"{100 * np.mean(values):.1f}{interval}{f' [{len(values)}]' if len(values) < 3 else ''}"

    def lead(mine, base):
        mean, low, high = _lead(mine, base[: len(mine)])
        return f"{_signed(mean)} ± {100 * (high - low) / 2:.1f}"

    leads = [lead(ROBUST[10], BASE[10]), lead(CLEAR, BASE[10])]
    assert shown[at + 2] == ["10", cell(BASE[10]), cell(ROBUST[10]), cell(CLEAR), *leads]
    leads = [lead(ROBUST[20], BASE[20]), "–"]
    assert shown[at + 3] == ["20", cell(BASE[20]), cell(ROBUST[20]), "–", *leads]
    assert shown[at + 5] == ["10", cell(ALL), "30.0 [1]", "–", "−12.0", "–"]
    assert shown[at + 6] == ["20"] + 5 * ["–"]
    assert "interval over 3 seeds, fewer where given in brackets. Differences are in points" in page.text
    group = '<th class="group" colspan="6" scope="rowgroup">Head only</th>'
    assert group in path.read_text("utf-8").replace("\n", "")


def test_clear_leads_alone_are_bold(small):
    text = small[1].read_text("utf-8").replace("\n", "")
    mean, low, _ = _lead(CLEAR, BASE[10])
    robust, unclear, _ = _lead(ROBUST[20], BASE[20][:2])
    assert unclear < 0 < low  # the clear one twice: among few images, and among all numbers
    assert text.count(f"<td><b>{_signed(mean)}</b> <small>") == 2
    assert f"<td>{_signed(robust)} <small>" in text
    assert "<td><b>0</b> <small>" in text and "<td>0 [or all] <small>" in text  # the best k


def test_the_top_of_a_page_counts_what_is_below(small, tmp_path):
    page, path = small
    assert re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", path.read_text("utf-8")) == [
        ("Sources", "3"),
        ("Targets", "1"),
        ("Labelled images", "10–20"),
        ("Unfrozen blocks", "0, all"),
        ("Seeds", "1–3"),
        ("Fine-tuned models", "18"),
    ]
    at = page.rows.index(["", "ℓ2 (ε = 0.5)", "ℓ∞ (ε = 4/255)"])
    assert page.rows[at + 1][0] == "digits, images" and page.rows[at + 2][0] != "digits, epochs"
    assert "for the same accuracy (head only; below" in page.text
    assert page.text.count("Student’s t over seeds. It covers") == 1
    assert [link["href"] for link in page.all("a")][-2:] == ["table_k0.csv", "table_kall.csv"]
    # Of several targets, and of one seed alone.
    cells = itertools.product("ab", (NATURAL, L2))
    rows = [row for target, source in cells for row in rows_of([0.5], source=source, target=target)]
    several = read_page(write_report(rows, tmp_path))
    for shown, classes in ((page, "headline"), (several, "headline several")):
        assert {"class": classes} in shown.all("div")
    assert "One seed says nothing" in several.text
    assert "Student’s t over seeds. It covers" not in several.text
    assert "How many times fewer images" not in several.text


def test_the_table_of_few_images_is_of_what_has_a_lead(tmp_path):
    """A source without a common seed has no column; beyond 100 images none are few."""
    for n, said in (
        (100, "over n = 100, and"),
        (101, "over n = 101 (the fewest there are; none is ≤ 100), and"),
    ):
        rows = rows_of([0.5, 0.6], n=n) + rows_of([0.6, 0.8], source=L2, n=n)
        page = read_page(write_report(rows + rows_of({9: 0.7}, source=LINF, n=n), tmp_path))
        assert said in page.text and ["Trained layers", "ℓ2 (ε = 0.5)"] in page.rows


# The figures of a target.


def test_the_figures_of_a_target_say_both_ends_of_their_lines(small):
    page, path = small
    alt = [image["alt"] for image in page.images]
    for words in (
        "Head only: Test accuracy, % against labelled target images, n (logarithmic). natural 60.0 at 10 to "
        "69.0 at 20; ℓ2 (ε = 0.5) 65.0 at 10 to 67.5 at 20; ℓ∞ (ε = 4/255) 90.0 at 10.",
        "n = 10: Test accuracy, % against trained blocks, k. natural 60.0 at head to 51.0 at all; "
        "ℓ2 (ε = 0.5) 65.0 at head to 30.0 at all; ℓ∞ (ε = 4/255) 90.0 at head.",
        "n = 20: Lead over the natural source, points against trained blocks, k. ℓ2 (ε = 0.5) 1.5 at head.",
        "n = 10: Test accuracy, % against source. head 60.0 at natural to 90.0 at ℓ∞ 4/255; "
        "all 51.0 at natural to 30.0 at ℓ2 0.5.",
    ):
        assert words in alt
    assert {file.name for file in path.parent.glob("figures/accuracy_*.svg")} == {
        *(f"accuracy_vs_n_digits_k{k}.svg" for k in ("0", "all")),
        *(f"accuracy_vs_{kind}_digits_n{n}.svg" for kind in ("k", "constraint") for n in (10, 20)),
    }
    assert "over 1–3 seeds" in page.text and "Every n has its own vertical axis." in page.text
    assert "Accuracy against epoch is left out: one epoch was evaluated." in page.text


def test_figures_against_k_show_four_of_many_n(tmp_path):
    rows = [row for n in range(10, 80, 10) for k in (0, 1, -1) for row in rows_of([n / 100], n=n, k=k)]
    page = read_page(write_report(rows, tmp_path))
    titles = [image["alt"].partition(":")[0] for image in page.images if "trained blocks" in image["alt"]]
    assert titles == ["n = 10", "n = 30", "n = 50", "n = 70"]
    assert "at each seed’s last epoch (1), n = 10, 30, 50 and 70" in page.text
    assert "one seed, so no interval" in page.text
    assert "left out: there is one source, which the figures above show." in page.text
    assert [cells for cells in page.rows if cells[0] == "Trained layers"] == []
    assert "Differences are in points, paired" not in page.text  # there is no robust source
    assert "Lead over the natural source" not in page.text
    blocks = next(image["alt"] for image in page.images if "n = 10" in image["alt"])
    assert blocks.endswith("natural 10.0 at head to 10.0 at all.")


@pytest.fixture
def panels(monkeypatch):
    """What is drawn."""
    kept, draw = [], figures.draw
    monkeypatch.setattr(figures, "draw", lambda panel: (kept.append(panel), draw(panel))[1])
    return kept


def test_panels_share_a_vertical_axis_unless_they_are_accuracies_at_several_n(tmp_path, panels):
    """Leads are measured from zero, and their axis is as long as their intervals."""
    rows = []
    for (n, k), base in {(10, 0): 0.1, (100, 0): 0.5, (10, 1): 0.15, (100, 1): 0.6}.items():
        rows += rows_of([base, base + 0.01], n=n, k=k, epochs=(0, 4))
        rows += rows_of([base + 0.2, base + 0.24], source=L2, n=n, k=k, epochs=(0, 4))
    page = read_page(write_report(rows, tmp_path))
    groups = {}
    for panel in panels:
        groups.setdefault((panel.axis.label, panel.zero), []).append(panel)
        assert not panel.behind
    assert {place: [panel.title for panel in shown] for place, shown in groups.items()} == {
        (label, zero): titles
        for label, titles in {
            "labelled target images, n (logarithmic)": ["Head only", "Head + last block"],
            "epoch": ["Head only", "Head + last block"],  # from epoch 0, which has no logarithm
            "trained blocks, k": ["n = 10", "n = 100"],
        }.items()
        for zero in ("", "natural")
    }
    for (label, zero), shown in groups.items():
        for panel in shown:
            alone = "blocks" in label and not zero
            lines = panel.series if alone else [line for other in shown for line in other.series]
            assert panel.yrange == pytest.approx(figures.value_range(lines, lead=bool(zero)))
            assert panel.ylabel == ("Lead over the natural source, points" if zero else "Test accuracy, %")
    assert "fine-tuned on n = 100 images. Line: mean; band: 95 % interval" in page.text
    assert "n = 10 and 100. Mark: mean; bar: 95 % interval (Student’s t) over 2 seeds" in page.text
    assert "Accuracy against constraint is left out: there are 2 sources" in page.text
    assert [row["epoch"] for row in read_csv(tmp_path / "figures" / "delta_vs_epoch.csv")] == ["0", "4"] * 2


def test_an_axis_of_accuracies_ends_where_they_do(tmp_path, panels):
    """Intervals of two seeds reach far beyond 0 and 100 %."""
    wide = [row for n in (10, 20) for row in rows_of([0.05, 0.3], n=n)]
    wide += [row for n in (10, 20) for row in rows_of([0.7, 0.99], source=L2, n=n)]
    write_report(wide, tmp_path)
    ranges = {panel.yrange for panel in panels if not panel.zero}
    assert ranges == {(-0.02, 1.02)}


def test_a_figure_of_one_n_and_one_of_nothing(tmp_path):
    page = read_page(write_report(rows_of([0.5]) + rows_of([0.6], source=L2), tmp_path))
    assert [image["alt"].split(". ")[0] for image in page.images] == [
        f"Head only: {what} against labelled target images, n (logarithmic)"
        for what in ("Test accuracy, %", "Lead over the natural source, points")
    ]
    assert "Accuracy against k is left out: there is one k." in page.text
    page = read_page(write_report(rows_of([np.nan]), tmp_path))
    assert "Accuracy against the number of labelled images is left out: nothing was measured." in page.text
    assert not page.images
    names = ["a source of a long name", "another of a long name", "the third"]
    rows = [row for i, name in enumerate(names) for row in rows_of([0.1 + i / 10], source=(name, "l2", 1.0))]
    assert read_page(write_report(rows, tmp_path)).images[-1]["alt"] == (
        "n = 10: Test accuracy, % against source. head 10.0 at a source of a  to 30.0 at the third."
    )


def test_the_n_whose_epochs_are_shown():
    """Of those with the most epochs the largest up to 100, or else the smallest."""
    for sizes, most, expected in (
        ((50, 100, 200), (50, 100, 200), 100),
        ((50, 100, 200), (50, 200), 50),
        ((101, 200), (101, 200), 101),
    ):
        rows = [r for n in sizes for r in rows_of([0.5], n=n, epochs=(1, 2, 3) if n in most else (1, 2))]
        assert collect(rows).epoch_size("digits") == expected


def test_published_numbers_are_drawn_behind_and_labelled(tmp_path, panels):
    rows = [row for row in paper_rows("tfds:{}", lambda a: a - 0.05) if row["target"] == "tfds:svhn"]
    rows = [row for row in rows if 200 <= row["num_train_images"] <= 800]
    text = write_report(rows, tmp_path / "with", reference="paper").read_text()
    accuracy, lead = (panel.behind for panel in panels if panel.title == "Head + last 3 blocks")
    assert [len(accuracy), len(lead)] == [4, 3] and text.count(CITATION) == 2
    assert {tuple(line.x) for line in (*accuracy, *lead)} == {(200, 400, 800)}  # as far as the user's n go
    assert lead[0].mean[0] == pytest.approx(0.508854477 - 0.293657803)  # column 3 minus column 0
    numbers = read_csv(tmp_path / "with/figures/reference.csv")
    assert len(numbers) == 4 * 3
    [found] = [r for r in numbers if (r["source"], r["num_train_images"]) == ("source 3", "400")]
    assert float(found["mean"]) == pytest.approx(0.619668087) and found["target"] == "tfds:svhn"
    assert CITATION not in write_report(rows, tmp_path / "without").read_text()
    assert not (tmp_path / "without/figures/reference.csv").exists()
    rows = [row | {"num_unfrozen_blocks": 0} for row in rows[:4]]
    other = read_page(write_report(rows, tmp_path / "other", reference="paper"))
    assert "No published numbers are drawn" in other.text


# The sources and their pictures.


def test_the_source_networks_and_their_pictures(tmp_path):
    """Adversarial images of two sources, more pictures than captions, and a source that was not measured."""
    clean = np.linspace(0.2, 0.8, 2 * 3 * 4 * 3).reshape(2, 3, 4, 3)
    adversarial = {"a": clean + 0.01 * (-1) ** np.arange(72).reshape(clean.shape), "b": clean[::-1]}
    sources = [
        {"name": "a", "norm": None, "natural_accuracy": 0.5, "num_images": 2048},
        {"name": "b", "norm": "l2", "eps": 0.5, "adversarial_accuracy": 0.25, "attack": "PGD <20>"},
        {"norm": "linf"},
    ]
    evidence = Evidence(
        sources=sources,
        pictures={"source_images": clean, "target_images": clean}
        | {f"adversarial/{n}": x for n, x in adversarial.items()},
        captions={
            "source_labels": ["cat", "dog"],
            "natural_predictions/b": ["cat"],
            "adversarial_predictions/b": ["cat", "fox", "too many"],
            "target_labels": ["7"],
        },
    )
    page = read_page(write_report([], tmp_path, evidence=evidence))
    at = page.rows.index(["Source", "Trained against", "Natural, %", "Adversarial, %", "Images", "Attack"])
    assert page.rows[at + 1 : at + 4] == [
        ["a", "nothing", "50.0", "–", "2,048", "–"],
        ["b", "ℓ2 (ε = 0.5)", "–", "25.0", "–", "PGD <20>"],
        ["unnamed", "ℓ∞", "–", "–", "–", "–"],
    ]
    alt = "natural: natural 50.0, adversarial –; ℓ2 (ε = 0.5): natural –, adversarial 25.0"
    assert page.images[0]["alt"] == alt  # not of the third
    gain = difference_gain([(x, clean) for x in adversarial.values()])
    assert page.rows[at + 4 :] == [
        ["Source image", "cat", "dog"],
        ["natural: adversarial", "", ""],
        [f"natural: difference × {gain}", "", ""],
        ["ℓ2 (ε = 0.5): adversarial", "✓ cat → cat", "✗ fox"],
        [f"ℓ2 (ε = 0.5): difference × {gain}", "", ""],
    ]
    assert f"magnified {gain} times" in page.text and "Attack: PGD <20>." in page.text
    pictures = [image for image in page.images if image.get("class") == "picture"]
    shown = [clean]
    for images in adversarial.values():
        shown += [images, 0.5 + gain * (images - clean)]
    for image, pixels in zip(pictures, np.concatenate([*shown, clean]), strict=True):
        np.testing.assert_array_equal(decoded(image)[1], np.round(255 * np.clip(pixels, 0, 1)))
    assert [image["alt"] for image in pictures[-2:]] == ["Target image of class 7", "Target image"]
    alone = Evidence([sources[2] | {"attack": "PGD"}], pictures={"source_images": clean})
    plain = read_page(write_report([], tmp_path, evidence=alone)).text
    assert "accuracies were not measured in this run" in plain
    assert "Images of the source task, as the networks see them." in plain
    assert "Attack: PGD" not in plain  # no adversarial images


@pytest.mark.sweep
def test_a_hundred_thousand_rows(tmp_path):
    rows = grid(SOURCES, sizes=(10, 100, 1000, 3000), blocks=(0, 1, 3, -1), seeds=200, epochs=range(1, 17))
    assert len(rows) == 102_400
    page = write_report(rows, tmp_path).read_text()
    assert len(read_csv(tmp_path / "summary.csv")) == len(SOURCES) * 4 * 4
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
    shutil.copy(written[1], tmp_path)
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
