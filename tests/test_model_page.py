"""The page of one network: numbers against brute force, and what a browser finds in the file."""

import csv
import io
import math
import re

import numpy as np
import pytest
from pages import decoded, read_csv, read_page
from scipy.stats import binomtest

from advtransfer.intervals import wilson
from advtransfer.report import ModelPage, figures, make_outcome, write_model_page
from advtransfer.report.outcome import class_table, confused_pairs, mistake_table

RNG = np.random.default_rng(0)
HISTORY = {"epoch": [1, 10], "train_accuracy": [0.5, 0.75], "test_accuracy": [0.25, 0.5]}


def _outcome(num_classes, num_images, names=None):
    """The last class has no image; ties in probability are there too."""
    labels = RNG.integers(0, num_classes - 1, num_images)
    logits = RNG.normal(size=(num_images, num_classes)).round(1)
    logits[np.arange(num_images), labels] += 1
    return labels, logits, make_outcome(labels, logits, names or [f"c{i}" for i in range(num_classes)])


def _written(page, folder):
    return read_page(write_model_page(page, folder))


def test_counts_and_mistakes_are_those_of_a_loop():
    labels, logits, outcome = _outcome(5, 200)
    confusion, wrong = [[0] * 5 for _ in range(5)], []
    for i, (label, row) in enumerate(zip(labels, logits, strict=True)):
        predicted = max(range(5), key=lambda c, row=row: row[c])
        probability = math.exp(row[predicted]) / sum(map(math.exp, row))
        assert outcome.predictions[i] == predicted
        assert outcome.probabilities[i] == pytest.approx(probability, rel=1e-12)
        confusion[label][predicted] += 1
        if predicted != label:
            wrong.append(i)
    assert outcome.confusion.tolist() == confusion
    assert sorted(outcome.mistakes.tolist()) == wrong
    certain = outcome.probabilities[outcome.mistakes]
    assert (np.diff(certain) <= 0).all() and 0 < len(wrong) < 200
    assert outcome.accuracy == pytest.approx(1 - len(wrong) / 200)
    shares = [row[c] / sum(row) if sum(row) else math.nan for c, row in enumerate(confusion)]
    np.testing.assert_allclose(outcome.class_accuracy, shares)
    assert math.isnan(shares[-1])
    for record, row, c in zip(class_table(outcome).to_dict("records"), confusion, range(5), strict=True):
        assert (record["num_images"], record["num_correct"]) == (sum(row), row[c])
        ends = (math.nan, math.nan)
        if sum(row):
            ends = binomtest(row[c], sum(row)).proportion_ci(0.95, method="wilson")
        assert (record["low95"], record["high95"]) == pytest.approx(ends, abs=1e-12, nan_ok=True)
    pairs = [(-confusion[a][b], a, b) for a in range(5) for b in range(5) if a != b and confusion[a][b]]
    expected = [(f"c{a}", f"c{b}", -n, -n / sum(confusion[a])) for n, a, b in sorted(pairs)]
    for number in (3, 99):
        assert list(confused_pairs(outcome, number).itertuples(index=False, name=None)) == expected[:number]


@pytest.mark.parametrize(("correct", "total"), [(0, 1), (1, 1), (0, 30), (17, 30), (30, 30), (9_990, 10_000)])
def test_intervals_are_wilsons(correct, total):
    reference = binomtest(correct, total).proportion_ci(0.95, method="wilson")
    assert wilson(correct, total) == pytest.approx((reference.low, reference.high), abs=1e-12)
    assert all(map(math.isnan, wilson(0, 0)))


@pytest.mark.parametrize(
    ("labels", "logits"), [((3,), (2, 2)), ((2,), (2, 3)), ((2, 1), (2, 2)), ((2,), (2,))]
)
def test_labels_and_logits_that_do_not_belong_together_are_refused(labels, logits):
    with pytest.raises(ValueError, match=r"pass \[N\] and \[N, 2\]"):
        make_outcome(np.zeros(labels), np.zeros(logits), ("a", "b"))


def test_a_browser_finds_every_number_and_picture(tmp_path):
    names = ("cat & dog", "<b>", "7")
    labels, _, outcome = _outcome(3, 60, names)
    pictures = RNG.uniform(size=(16, 6, 6, 3))
    rows = [
        {"num_unfrozen_blocks": 0, "mean_accuracy": 0.5, "standard_error": 0.1, "chosen": 1},
        {"num_unfrozen_blocks": -1, "mean_accuracy": math.nan, "standard_error": math.nan, "chosen": 0},
    ]
    more = {"command": "python launch.py --x='<y>'", "versions": {"jax": "1.2"}, "config": {"batch_size": 7}}
    more |= {"facts": [("Source", "l2 <x>")], "choice": "Chosen by hand.", "choice_rows": rows}
    page = _written(ModelPage("A title <&>", HISTORY, outcome=outcome, pictures=pictures, **more), tmp_path)
    correct = int(np.trace(outcome.confusion))
    low, high = (100 * x for x in wilson(correct, 60))
    assert f"{correct / 0.6:.1f} % of 60 test images are classified correctly" in page.text
    assert f"95 % interval {low:.1f} … {high:.1f} %" in page.text
    commonest = outcome.confusion.sum(axis=1).max() / 0.6
    assert f"The most frequent class alone would be right for {commonest:.1f} %." in page.text
    for words in ("A title <&>", "l2 <x>", "Chosen by hand.", "--x='<y>'", "jax 1.2", '"batch_size": 7'):
        assert words in page.text
    for i, name in enumerate(names[:2]):
        counts = [str(n or "·") for n in outcome.confusion[i]]
        assert [name, *counts] in page.rows
        total = outcome.confusion[i].sum()
        found = next(row for row in page.rows if row[:2] == [name, str(total)] and len(row) == 5)
        assert found[2] == f"{100 * outcome.confusion[i, i] / total:.1f}"
    assert ["head alone", "50.0 ± 10.0", "chosen"] in page.rows
    assert ["everything", "diverged", ""] in page.rows

    drawn, *shown = page.images
    assert decoded(drawn)[0] == "svg+xml" and len(shown) == min(16, len(outcome.mistakes))
    for picture, pixels, record in zip(
        shown, pictures, mistake_table(outcome).to_dict("records"), strict=False
    ):
        np.testing.assert_array_equal(decoded(picture)[1], np.round(255 * pixels))
        alt = f"Test image {record['index']}: {record['label']}, classified as {record['predicted']}"
        assert picture["alt"].startswith(alt)

    assert [row["test_accuracy"] for row in read_csv(tmp_path / "epochs.csv")] == ["0.25", "0.5"]
    assert [row["mean_accuracy"] for row in read_csv(tmp_path / "choice.csv")] == ["0.5", ""]
    table = list(csv.reader(io.StringIO((tmp_path / "confusion.csv").read_text())))
    assert table[0] == ["label", *names]
    assert [[int(n) for n in row[1:]] for row in table[1:]] == outcome.confusion.tolist()
    assert [int(row["index"]) for row in read_csv(tmp_path / "mistakes.csv")] == outcome.mistakes.tolist()
    assert [row["class"] for row in read_csv(tmp_path / "classes.csv")] == list(names)
    assert sum(int(row["num_images"]) for row in read_csv(tmp_path / "classes.csv")) == len(labels)


def test_a_matrix_is_coloured_by_the_share_of_its_row_up_to_thirty_classes(tmp_path):
    labels = np.array([0, 0, 0, 0, 1, 2])
    logits = np.eye(30)[[0, 0, 0, 1, 1, 0]]
    names = [f"c{i}" for i in range(30)]
    path = write_model_page(ModelPage("Page", HISTORY, outcome=make_outcome(labels, logits, names)), tmp_path)
    cells = re.findall(r"background:rgb\((.*?)\)\">", path.read_text("utf-8"))
    coloured = {i: [int(x) for x in cell.split(",")] for i, cell in enumerate(cells) if cell != "255,255,255"}
    shares = {
        0: (0.75, (0, 114, 178)),
        1: (0.25, (213, 94, 0)),
        31: (1, (0, 114, 178)),
        60: (1, (213, 94, 0)),
    }
    assert len(cells) == 900 and coloured.keys() == shares.keys()
    for i, (share, full) in shares.items():
        np.testing.assert_allclose(
            coloured[i], 255 - (0.08 + 0.47 * share) * (255 - np.array(full)), atol=0.51
        )
    outcome = make_outcome(labels, np.pad(logits, ((0, 0), (0, 1))), [*names, "c30"])
    page = _written(ModelPage("Page", HISTORY, outcome=outcome), tmp_path)
    assert ["Label", "Prediction", "Images", "% of the label’s"] in page.rows


def test_long_names_stand_below_one_another(tmp_path):
    for names, lines in ((("a" * 6, "b" * 6), 2), (("a" * 7, "b" * 6), 3)):
        outcome = make_outcome(np.array([0]), np.array([[0.0, 1.0]]), names)
        page = ModelPage("Page", HISTORY, outcome=outcome, pictures=np.zeros((1, 2, 2, 3)))
        assert _written(page, tmp_path).all("span").count({"class": "label"}) == lines


def test_the_axis_ends_where_accuracies_do_and_what_is_not_known_is_not_drawn(tmp_path, monkeypatch):
    panels, draw = [], figures.draw
    monkeypatch.setattr(figures, "draw", lambda panel: (panels.append(panel), draw(panel))[1])
    history = {"epoch": [1, 2, 10], "train_accuracy": [0.0, 0.5, 1.0], "test_accuracy": [math.nan, 0.5, 0.75]}
    page = _written(ModelPage("Page", history), tmp_path)
    assert "training images: 100.0 % after epoch 10; test images: 75.0 % after epoch 10" in page.text
    _written(ModelPage("Page", {"epoch": [1, 10], "train_accuracy": [0.5, 0.6]}), tmp_path)
    whole, inside = ((panel.yrange, panel.title, [line.x for line in panel.series]) for panel in panels)
    assert whole == ((-0.02, 1.02), "Training and test images", [(1, 2, 10), (2, 10)])
    assert inside == ((pytest.approx(0.494), pytest.approx(0.606)), "Training images", [(1, 10)])


def test_of_many_classes_the_worst_are_shown(tmp_path):
    _, _, outcome = _outcome(200, 3000)
    page = _written(ModelPage("Many", HISTORY, outcome=outcome, pictures=np.zeros((20, 2, 2, 3))), tmp_path)
    assert len(outcome.mistakes) > 16 and len(page.images) == 1 + 16
    assert max(map(len, page.rows)) == 5 and len(page.rows) == 2 * (1 + 20)
    assert [int(row[2]) for row in page.rows[1:21]] == confused_pairs(outcome, 20)["num_images"].tolist()
    uppers = sorted(r["high95"] for r in class_table(outcome).to_dict("records") if r["num_images"])
    assert page.rows[22][3].endswith(f"… {100 * uppers[0]:.1f}")
    assert len(list(csv.reader(io.StringIO((tmp_path / "confusion.csv").read_text())))) == 201


def test_the_same_page_has_the_same_bytes_and_an_older_ones_tables_go(tmp_path):
    _, _, outcome = _outcome(3, 20)
    page = ModelPage("Page", HISTORY, outcome=outcome, pictures=np.zeros((16, 2, 2, 3)))
    first = write_model_page(page, str(tmp_path)).read_bytes()
    assert write_model_page(page, tmp_path).read_bytes() == first
    (tmp_path / "kept.txt").write_text("of somebody else")
    page = _written(ModelPage("Page", {"epoch": [3], "train_accuracy": [0.5]}), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epochs.csv", "kept.txt", "report.html"]
    assert "No test images were given" in page.text and "test images: " not in page.text
    assert "50.0 % after epoch 3" in page.text and not page.images


def test_a_network_without_mistakes_says_so(tmp_path):
    labels = np.array([0, 1, 1])
    outcome = make_outcome(labels, 5.0 * np.eye(2)[labels], ("a", "b"))
    page = _written(ModelPage("Perfect", HISTORY, outcome=outcome), tmp_path)
    assert "every test image is classified correctly" in page.text
    assert read_csv(tmp_path / "mistakes.csv") == []
