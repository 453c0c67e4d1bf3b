"""The best k, the layout of the paper's table, and its numbers behind the user's."""

import csv
import importlib.resources
import math
import re
import types

import numpy as np
import pytest
from scipy import stats
from test_report_rows import make_row
from test_report_summary import L2, NATURAL, rows_of

from advtransfer.report import figures, summarise, write_report
from advtransfer.report.choices import best_blocks, paper_tables
from advtransfer.report.plots import _published
from advtransfer.report.reference import CITATION, column_of, published_line, target_of
from advtransfer.report.summary import Source, collect

PAPER = importlib.resources.files("advtransfer.report").joinpath("paper_summary_k3.csv").read_text()
SOURCES = {"0": ("none", 0.0), "3": ("l2", 3.0), "4": ("linf", 4 / 255), "8": ("linf", 0.0314)}


def paper_rows(target="{}", change=lambda accuracy: accuracy):
    """The paper's table as rows; `target` shapes the names, `change` the accuracies."""
    return [
        make_row(
            source=f"source {column}",
            source_norm=norm,
            source_eps=eps,
            target=target.format(line["target_ds"]),
            num_train_images=int(line["num_training_images"]),
            test_accuracy=change(float(line[column]) / 100),
        )
        | {"num_unfrozen_blocks": 3}
        for line in csv.DictReader(PAPER.splitlines())
        for column, (norm, eps) in SOURCES.items()
    ]


def test_the_best_k_and_what_it_cannot_be_told_from():
    rng = np.random.default_rng(0)
    base = rng.normal(0, 0.05, 8)
    noise = rng.normal(0, 0.02, 8)
    accuracies = {0: 0.5 + base, 3: 0.6 + base + noise - noise.mean(), -1: 0.605 + base}
    rows = [row for k, values in accuracies.items() for row in rows_of(values, k=k)]
    [found] = best_blocks(collect(rows))
    assert (found["best"], found["second"], found["num_seeds"]) == (-1, 3, 8)
    interval = stats.ttest_rel(accuracies[-1], accuracies[3]).confidence_interval(0.95)
    assert found["lead"] - found["lead_ci95"] == pytest.approx(interval.low)
    assert interval.low < 0 and found["tied"] == "3"  # the head alone is clearly worse
    assert found["mean"] == pytest.approx(accuracies[-1].mean())


def test_one_k_has_no_best_and_one_seed_settles_nothing():
    assert best_blocks(collect(rows_of([0.5, 0.6]))) == []
    [found] = best_blocks(collect(rows_of([0.5]) + rows_of([0.9], k=1)))
    assert found["best"] == 1 and found["tied"] == "0" and math.isnan(found["lead_ci95"])
    [found] = best_blocks(collect(rows_of([0.5, 0.6]) + rows_of([0.5, 0.6], k=1) + rows_of([0.5, 0.5], k=2)))
    assert (found["best"], found["second"], found["lead"], found["tied"]) == (0, 1, 0, "1 2")


def test_the_papers_table_comes_back_cell_by_cell():
    results = collect(paper_rows())
    theirs, mine = list(csv.DictReader(PAPER.splitlines())), paper_tables(results, summarise(results))[3]
    assert list(mine[0]) == list(theirs[0])
    for a, b in zip(mine, theirs, strict=True):
        assert [str(a["num_training_images"]), a["target_ds"]] == [b["num_training_images"], b["target_ds"]]
        np.testing.assert_allclose([a[c] for c in SOURCES], [float(b[c]) for c in SOURCES], rtol=1e-12)


def test_sources_that_share_a_threat_or_have_another_keep_their_names():
    rows = rows_of([0.5]) + rows_of([0.6], source=L2)
    rows += rows_of([0.7], source=("a", "l2", 3.0)) + rows_of([0.8], source=("b", "l2", 3.0), n=20)
    results = collect(rows)
    [first, second] = paper_tables(results, summarise(results))[0]
    assert set(first) == {"num_training_images", "target_ds", "0", "rob", "a", "b"}
    assert first["a"] == pytest.approx(70) and first["b"] is None and second["b"] == pytest.approx(80)
    assert NATURAL[0] not in first


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("cifar10", "cifar10"),
        ("tfds:cifar100:3.0.2:train[:10%]", "cifar100"),
        ("tfds:svhn_cropped", "svhn"),
        ("folder:/data/Fashion-MNIST", "fmnist"),
        ("tfds:/data/kmnist/3.0.1", "kmnist"),
        ("tfds:cifar10:low_pass", None),
        ("tfds:cifar10:validation", None),
        ("tfds:cifar10_corrupted", None),
        ("builtin:digits", None),
    ],
)
def test_targets_are_matched_by_name(name, table):
    assert target_of(name) == table
    assert bool(published_line(Source("s", "none", 0.0), name)) == (table is not None)


def test_sources_are_matched_by_threat():
    threats = [
        ("none", math.nan),
        ("l2", 3.0),
        ("linf", 0.0157),
        ("linf", 8 / 255),
        ("l2", 0.5),
        ("linf", 4.0),
    ]
    assert [column_of(Source("s", *threat)) for threat in threats] == ["0", "3", "4", "8", None, None]
    assert published_line(Source("s", "l2", 3.0), "svhn")[400] == pytest.approx(0.619668087)


def test_published_numbers_are_drawn_behind_and_said_to_be(tmp_path):
    rows = [row for row in paper_rows("tfds:{}", lambda a: a - 0.05) if row["num_train_images"] <= 800]
    rows = [row for row in rows if row["target"] == "tfds:svhn"]
    text = write_report(rows, tmp_path / "with", reference="paper").read_text()
    plain = write_report(rows, tmp_path / "without").read_text()
    assert text.count(CITATION) == 2 and CITATION not in plain  # accuracy and lead
    name = "figures/accuracy_vs_n_tfds-svhn_k3.svg"
    crosses = [(tmp_path / folder / name).read_text().count("<use") for folder in ("with", "without")]
    assert crosses[0] == crosses[1] + 4 * 4  # four sources at four n
    with open(tmp_path / "with/figures/reference.csv", newline="") as stream:
        numbers = {(r["source"], r["target"], r["num_train_images"]): r for r in csv.DictReader(stream)}
    assert len(numbers) == 4 * 4
    assert float(numbers["source 3", "tfds:svhn", "400"]["mean"]) == pytest.approx(0.619668087)
    assert not (tmp_path / "without/figures/reference.csv").exists()
    results = collect(rows)
    shown = types.SimpleNamespace(results=results, styles=figures.styles(results.sources.values()), files={})
    leads = list(_published(shown, "tfds:svhn", dict.fromkeys((200, 800)), lead=True))
    assert [line.x for line in leads] == [[200, 400, 800]] * 3  # as far as the user's n go
    assert leads[0].mean[0] == pytest.approx(0.508854477 - 0.293657803)  # column 3 minus column 0
    rows = [row | {"num_unfrozen_blocks": 0} for row in rows[:4]]
    other = write_report(rows, tmp_path / "other", reference="paper").read_text()
    assert "No published numbers are drawn" in re.sub(r"\s+", " ", other)


def test_an_axis_of_accuracies_ends_where_they_do(tmp_path, monkeypatch):
    """Intervals of two seeds reach far beyond 0 and 100 %."""
    ranges, draw = [], figures.line_panel

    def panel(*args, yrange, zero, **options):
        ranges.extend([] if zero else [yrange])
        return draw(*args, yrange=yrange, zero=zero, **options)

    monkeypatch.setattr(figures, "line_panel", panel)
    wide = rows_of([0.05, 0.3]) + rows_of([0.05, 0.3], n=20)
    wide += rows_of([0.7, 0.99], source=L2) + rows_of([0.7, 0.99], source=L2, n=20)
    write_report([row | {"train_accuracy": 1.0, "train_loss": 0.1} for row in wide], tmp_path)
    assert ranges and set(ranges) == {(-0.02, 1.02)}
