"""Statistics against SciPy's own routines and cases worked out by hand, and the sentences made of them."""

import csv
import importlib.resources
import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from test_report_rows import make_row

from advtransfer.intervals import mean_and_ci95
from advtransfer.report import SUMMARY_COLUMNS, headline, summarise
from advtransfer.report.ratios import ratios
from advtransfer.report.reference import column_of, published_line, target_of
from advtransfer.report.sections import SourceInfo, format_eps
from advtransfer.report.statistics import collect, paper_tables
from advtransfer.report.words import blocks_text, is_clear, notes, points

NATURAL, L2, LINF = ("nat", "none", 0.0), ("rob", "l2", 0.5), ("inf", "linf", 4 / 255)
NOISE = np.array([0.01, -0.01, 0.02, -0.02, 0.0])
PAPER = importlib.resources.files("advtransfer.report").joinpath("paper_summary_k3.csv").read_text()
PAPER_SOURCES = {"0": ("none", 0.0), "3": ("l2", 3.0), "4": ("linf", 4 / 255), "8": ("linf", 0.0314)}


def rows_of(values, *, source=NATURAL, target="digits", n=10, k=0, epochs=(1,)):
    """One row per seed and epoch; a dict of seed -> accuracy, or a list of accuracies."""
    values = values if isinstance(values, dict) else dict(enumerate(values))
    name, norm, eps = source
    place = {"source_eps": eps, "target": target, "num_train_images": n, "num_unfrozen_blocks": k}
    return [
        make_row(
            source=name,
            source_norm=norm,
            seed=seed,
            epoch=epoch,
            test_accuracy=accuracy if epoch == max(epochs) else 0.01 * epoch,
            trial_id=f"{name}-{target}-{n}-{k}-{seed}",
            **place,
        )
        for seed, accuracy in values.items()
        for epoch in epochs
    ]


def paper_rows(target="{}", change=lambda accuracy: accuracy):
    """The paper's table as rows; `target` shapes the names, `change` the accuracies."""
    return [
        make_row(
            source=f"source {column}",
            source_norm=norm,
            source_eps=eps,
            target=target.format(line["target_ds"]),
            num_train_images=int(line["num_training_images"]),
            num_unfrozen_blocks=3,
            test_accuracy=change(float(line[column]) / 100),
        )
        for line in csv.DictReader(PAPER.splitlines())
        for column, (norm, eps) in PAPER_SOURCES.items()
    ]


def records(table):
    return table.to_dict("records")


def find(summary, source, **where):
    [row] = [row for row in records(summary) if {"source": source, **where}.items() <= row.items()]
    return row


def remarks(rows):
    results = collect(rows)
    return notes(results, ratios(results))


@pytest.fixture(scope="module")
def study():
    """Two robust sources, two targets, three n, two k, seven seeds; and the truth as arrays."""
    rng = np.random.default_rng(0)
    grid = list(itertools.product((NATURAL, L2, LINF), ("digits", "svhn"), (10, 100, 101), (0, -1)))
    truth = {cell: rng.uniform(0.3, 0.9, 7) for cell in grid}
    rows = [
        row
        for (source, target, n, k), values in truth.items()
        for row in rows_of(values, source=source, target=target, n=n, k=k, epochs=(1, 2, 5))
    ]
    rng.shuffle(rows)
    return rows, truth


def test_summary_equals_scipy(study):
    rows, truth = study
    summary = summarise(rows)
    assert tuple(summary) == SUMMARY_COLUMNS and len(summary) == len(truth)
    pd.testing.assert_frame_equal(summarise(pd.DataFrame(rows)), summary)
    for (source, target, n, k), values in truth.items():
        row = find(summary, source[0], target=target, num_train_images=n, num_unfrozen_blocks=k)
        low, high = stats.t.interval(0.95, 6, values.mean(), stats.sem(values))
        np.testing.assert_allclose(row["mean"], values.mean(), rtol=1e-12)
        np.testing.assert_allclose(row["ci95"], (high - low) / 2, rtol=1e-9)
        assert row["num_seeds"] == 7
        if source is NATURAL:
            assert math.isnan(row["delta"]) and math.isnan(row["delta_ci95"])
            continue
        base = truth[NATURAL, target, n, k]
        interval = stats.ttest_rel(values, base).confidence_interval(0.95)
        ends = [row["delta"] - row["delta_ci95"], row["delta"] + row["delta_ci95"]]
        np.testing.assert_allclose(row["delta"], (values - base).mean(), rtol=1e-9)
        np.testing.assert_allclose(ends, interval, rtol=1e-9)


def test_curves_are_the_summary_at_every_epoch(study):
    rows, _ = study
    found = collect(rows).curves
    assert found["epoch"][:3].tolist() == [1, 2, 5]
    last = found[found["epoch"] == 5].drop(columns="epoch").reset_index(drop=True)
    pd.testing.assert_frame_equal(last, summarise(rows), rtol=1e-12)
    early = found[(found["epoch"] == 2) & (found["source"] == "rob")]
    assert len(early) and np.allclose(early["mean"], 0.02) and (early["delta"] == 0).all()
    # Of the seeds that were measured at an epoch; in the order of epochs, whoever has them.
    rows = rows_of([0.2, 0.4, math.nan], epochs=(7,)) + rows_of({0: 0.6}, epochs=(9,))
    first, second, third = records(collect(rows + rows_of({1: 0.5}, epochs=(8,))).curves)
    assert (first["epoch"], first["num_seeds"], first["mean"]) == (7, 2, pytest.approx(0.3))
    assert (second["epoch"], third["epoch"], third["num_seeds"], third["mean"]) == (8, 9, 1, 0.6)


def test_pooling_averages_within_a_seed_first(study):
    rows, truth = study
    pooled = collect(rows).pooled
    assert len(pooled) == 2 * 2 * 2
    for p in pooled:
        source = {"rob": L2, "inf": LINF}[p.source.name]
        k = p.num_unfrozen_blocks
        cells = [truth[source, p.target, n, k] - truth[NATURAL, p.target, n, k] for n in (10, 100)]
        interval = stats.ttest_1samp(np.mean(cells, axis=0), 0).confidence_interval(0.95)
        assert p.sizes == (10, 100) and p.num_seeds == 7
        np.testing.assert_allclose([p.delta - p.ci95, p.delta + p.ci95], interval, rtol=1e-9)


def test_pooling_takes_the_smallest_n_where_seeds_or_few_images_lack():
    """Two seeds at every n are pooled, one is not; beyond 100 images the smallest n stands alone."""
    for sizes, seeds, pooled in (
        ((10, 50), (0, 1), (10, 50)),
        ((10, 50), (1,), (10,)),
        ((101, 200), (0, 1), (101,)),
        ((100, 200), (0, 1), (100,)),
    ):
        rows = []
        for n, known in zip(sizes, ((0, 1, 2), seeds), strict=True):
            rows += rows_of(dict.fromkeys(known, 0.5), n=n)
            rows += rows_of({seed: 0.6 + 0.1 * seed for seed in known}, source=L2, n=n)
        (found,) = collect(rows).pooled
        several = len(pooled) == 2
        assert found.sizes == pooled and found.num_seeds == (2 if several else 3)
        assert found.delta == pytest.approx(0.15 if several else 0.2)


@pytest.mark.filterwarnings("error")
def test_by_hand():
    # Three seeds 0.1 apart: s = 0.1, t(0.975, 2) = 4.302653.
    mean, half = mean_and_ci95([0.4, 0.5, 0.6])
    assert mean == pytest.approx(0.5) and half == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6)
    assert mean_and_ci95([0.4])[0] == 0.4 and math.isnan(mean_and_ci95([0.4])[1])
    assert all(map(math.isnan, mean_and_ci95([])))


def test_unequal_seeds_are_paired_where_both_exist():
    rows = rows_of({0: 0.5, 1: 0.6, 2: 0.9}) + rows_of({1: 0.7, 2: 0.8, 3: 0.1}, source=L2)
    row = find(summarise(rows), "rob")
    assert row["num_seeds"] == 3 and row["mean"] == pytest.approx(1.6 / 3)
    assert row["delta"] == pytest.approx((0.1 - 0.1) / 2)
    assert row["delta_ci95"] == pytest.approx(stats.t.ppf(0.975, 1) * np.std([0.1, -0.1], ddof=1) / 2**0.5)
    # Seeds of any kind: names, and numbers that are one as a float.
    for seeds in ((0, 1), ("a", 1), (2**70, 2**70 + 1)):
        apart = find(summarise(rows_of({seeds[0]: 0.5}) + rows_of({seeds[1]: 0.7}, source=L2)), "rob")
        assert math.isnan(apart["delta"]) and math.isnan(apart["delta_ci95"])


def test_nan_accuracies_leave_the_seed_out():
    rows = rows_of([0.5, 0.6, math.nan]) + rows_of([0.6, math.nan, 0.7], source=L2)
    assert find(summarise(rows), "nat")["num_seeds"] == 2
    assert find(summarise(rows), "rob")["delta"] == pytest.approx(0.1)
    assert any("2 trials without a test accuracy" in note for note in remarks(rows))
    silent = find(summarise(rows_of([math.nan])), "nat")
    assert silent["num_seeds"] == 0 and math.isnan(silent["mean"])


@pytest.mark.parametrize("naturals", [(), (NATURAL, ("nat2", "none", 0.0))])
def test_no_single_natural_source_leaves_delta_empty(naturals):
    rows = [row for source in (*naturals, L2) for row in rows_of([0.5, 0.6], source=source)]
    assert summarise(rows)["delta"].isna().all()
    [sentence] = headline(rows)
    assert "natural source" in sentence
    assert any("no differences, because" in note for note in remarks(rows))


def test_several_trials_of_one_seed_count_once():
    first, second = rows_of([0.5], epochs=(1, 2)), rows_of([0.7], epochs=(1, 2))
    for row in second:
        row["trial_id"] = "other learning rate"
    row = find(summarise(first + second), "nat")
    assert row["mean"] == pytest.approx(0.6) and row["num_seeds"] == 1
    assert any("k and seed with another (2 rows)" in note for note in remarks(first + second))
    assert not any("share source" in note for note in remarks(first))
    # An id per row (not per trial) still means the last epoch only.
    for index, row in enumerate(first):
        row["trial_id"] = str(index)
    assert summarise(first)["mean"].tolist() == [0.5]


def test_networks_of_one_name_are_told_apart():
    """By the constraint, and by a number where ε is equal to six digits or another has that name."""
    rows = rows_of([0.5]) + rows_of([0.6], source=("r", "l2", 1.0)) + rows_of([0.7], source=("r", "l2", 3.0))
    assert summarise(rows)["source"].tolist() == ["nat", "r, ℓ2 (ε = 1)", "r, ℓ2 (ε = 3)"]
    rows = rows_of([0.1], source=("r", "l2", 0.5)) + rows_of([0.2], source=("r", "l2", 0.50000001))
    rows += rows_of([0.3], source=("r, ℓ2 (ε = 0.5)", "l2", 1))
    assert sorted(summarise(rows)["mean"]) == [0.1, 0.2, 0.3]
    unknown = rows_of([0.5, 0.6], source=("r", "l2", math.nan))  # one network, whatever its ε
    assert summarise(unknown)["source"].tolist() == ["r"]


def test_sources_stand_by_norm_radius_and_name():
    threats = [("e", "l1", 1.0), ("d", "linf", 0.1), ("c", "l2", 3.0), ("b", "l2", 0.5), ("a", "l2", 3.0)]
    rows = [row for source in (*threats, NATURAL) for row in rows_of([0.5], source=source)]
    assert list(collect(rows).sources) == ["nat", "b", "a", "c", "d", "e"]


def test_notes_are_of_what_is_there():
    """Nothing to tell of whole grids; the numbers of what is missing elsewhere."""

    def kinds(rows):
        return [note.partition(" (")[0] for note in remarks(rows) if "cannot be computed" not in note]

    whole = rows_of([0.5, 0.6]) + rows_of([0.6, 0.7], source=L2)
    assert kinds(whole) == kinds(rows_of([0.5, 0.6])) == []  # without a robust source nothing is missing
    some = whole + rows_of([0.5, 0.6, math.nan], n=20) + rows_of([0.7], source=L2, n=20)
    assert kinds(some) == [
        "1 trial without a test accuracy at the last epoch",
        "Cells have between 1 and 2 seeds; a difference uses only the seeds that both sources have, so it "
        "need not equal the difference of the two means.",
        "A single seed has no interval; cells with one seed show the value alone.",
    ]
    absent = rows_of([0.5, 0.6], k=3) + rows_of([0.5, 0.6], source=LINF, k=3) + rows_of([0.6, 0.7], n=20)
    assert kinds(absent) == ["digits: 5 cells of the grid"]
    rows = whole + rows_of([0.5], n=20) + rows_of([0.5], n=20, epochs=(1, 2), source=L2)
    assert not any("end at different epochs" in note for note in remarks(rows))
    assert any(
        "end at different epochs" in note for note in remarks(rows + rows_of({1: 0.5}, n=20, epochs=(3,)))
    )


def test_why_there_are_no_factors():
    def reasons(rows):
        return [note.partition(" cannot")[0] for note in remarks(rows) if "cannot be computed" in note]

    one = rows_of([0.5, 0.6]) + rows_of([0.6, 0.7], source=L2)
    assert reasons(one) == ["digits: images needed", "digits: epochs needed"]
    two = one + rows_of([0.6, 0.7], n=20) + rows_of([0.7, 0.8], source=L2, n=20)
    assert reasons(two) == ["digits: epochs needed"]
    assert reasons(rows_of([0.5])) == []
    assert reasons(one + rows_of([0.5], source=("nat2", "none", 0.0))) == []  # that is said elsewhere


@pytest.mark.parametrize(
    ("gap", "words"),
    [
        (0.031, "the ℓ2 source (ε = 0.5) is ahead of the natural one by +3.1 points (95 % interval +"),
        (-0.05, "the ℓ2 source (ε = 0.5) is behind the natural one by 5.0 points (95 % interval −"),
        (0.004, "no difference can be shown between the ℓ2 source (ε = 0.5) and the natural one: +0.4"),
    ],
)
def test_headline_in_its_three_outcomes(gap, words):
    base = np.array([0.5, 0.4, 0.6, 0.55, 0.45])
    rows = []
    for n, k in itertools.product((10, 100, 1000), (0, -1)):
        # Beyond 100 images, and with more than the head trained, the sign is the other way round.
        few = gap if (n <= 100 and k == 0) else -gap
        rows += rows_of(base, n=n, k=k) + rows_of(base + few + NOISE, source=L2, n=n, k=k)
    [sentence] = headline(rows)
    assert words in sentence
    assert sentence.startswith("On digits, with at most 100 labelled images, ")
    assert "5 seeds, head only" in sentence
    assert ("includes zero" in sentence) == (gap == 0.004)
    assert sentence.endswith(" The interval leaves out what training the sources again would change.")


def test_headline_names_every_robust_source():
    base = np.array([0.5, 0.4, 0.6, 0.55, 0.45])
    rows = rows_of(base) + rows_of(base + 0.1 + NOISE, source=L2) + rows_of(base + NOISE, source=LINF)
    [sentence] = headline(rows)
    assert "ℓ2 (ε = 0.5) is ahead by +10.0 points" in sentence
    assert "no difference can be shown for ℓ∞ (ε = 4/255)" in sentence


def test_headline_speaks_of_the_fewest_blocks_and_images():
    """Of one n the headline does not say "at most", and of one seed it has no interval."""
    base = np.array([0.5, 0.4, 0.6])
    rows = rows_of(base, k=3) + rows_of(base + 0.1 + NOISE[:3], source=L2, k=3)
    rows += rows_of(base[:1], k=0) + rows_of(base[:1] - 0.05, source=L2, k=0)
    assert headline(rows) == [
        "On digits, with 10 labelled images, the ℓ2 source (ε = 0.5) is behind the natural one by 5.0 "
        "points, with no interval to go by (1 seed, head only)."
    ]
    rows += rows_of(base[:2], k=0, n=60) + rows_of(base[:2] + 0.1, source=LINF, k=0, n=60)
    (sentence,) = headline(rows)
    assert sentence.startswith("On digits, with 60 labelled images ")
    assert "(head only), against the natural source: ℓ2 (ε = 0.5) is behind by 5.0 points" in sentence
    [equal] = headline(rows_of([0.5], n=200) + rows_of([0.5], source=L2, n=200))
    assert "with 200 labelled images" in equal and "is ahead of the natural one by +0.0 points" in equal


def test_numbers_as_they_are_written():
    assert [blocks_text(k) for k in (-1, 0, 1, 2)] == [
        "all blocks",
        "head only",
        "head + last block",
        "head + last 2 blocks",
    ]
    assert [is_clear(*x) for x in ((0.2, 0.1), (-0.2, 0.1), (0.1, 0.1), (0.1, math.nan))] == [
        True,
        True,
        False,
        False,
    ]
    written = [points(x) for x in (0.031, -0.002, 0.0005, 0.0, 0.0004, math.nan)]
    assert written == ["+3.1", "−0.2", "+0.1", "+0.0", "+0.04", "–"]
    radii = [format_eps(*x) for x in (("linf", 4 / 255), ("linf", 0.5 / 255), ("linf", 0.1), ("l2", 3.0))]
    assert radii == ["4/255", "0.5/255", "0.1", "3"]


# The best k, and the paper's table.


def test_the_best_k_and_what_it_cannot_be_told_from():
    rng = np.random.default_rng(0)
    base = rng.normal(0, 0.05, 8)
    noise = rng.normal(0, 0.02, 8)
    accuracies = {0: 0.5 + base, 3: 0.6 + base + noise - noise.mean(), -1: 0.605 + base}
    [found] = records(collect([r for k, y in accuracies.items() for r in rows_of(y, k=k)]).best)
    assert (found["best"], found["second"], found["num_seeds"]) == (-1, 3, 8)
    interval = stats.ttest_rel(accuracies[-1], accuracies[3]).confidence_interval(0.95)
    assert found["lead"] - found["lead_ci95"] == pytest.approx(interval.low)
    assert interval.low < 0 and found["tied"] == "3"  # the head alone is clearly worse
    assert found["mean"] == pytest.approx(accuracies[-1].mean())


def test_one_k_has_no_best_and_one_seed_settles_nothing():
    assert collect(rows_of([0.5, 0.6])).best.empty
    [found] = records(collect(rows_of([0.5]) + rows_of([0.9], k=1)).best)
    assert found["best"] == 1 and found["tied"] == "0" and math.isnan(found["lead_ci95"])
    rows = rows_of([0.5, 0.6], k=-1) + rows_of([0.5, 0.6], k=1) + rows_of([0.5, 0.5], k=2)
    [found] = records(collect(rows).best)
    assert (found["best"], found["second"], found["lead"], found["tied"]) == (1, -1, 0, "-1 2")


def test_the_papers_table_comes_back_cell_by_cell():
    results = collect(paper_rows())
    theirs = list(csv.DictReader(PAPER.splitlines()))
    mine = paper_tables(results)[3]
    assert list(mine) == list(theirs[0])
    for a, b in zip(records(mine), theirs, strict=True):
        assert [str(a["num_training_images"]), a["target_ds"]] == [b["num_training_images"], b["target_ds"]]
        np.testing.assert_allclose(
            [a[c] for c in PAPER_SOURCES], [float(b[c]) for c in PAPER_SOURCES], rtol=1e-12
        )


def test_sources_that_share_a_threat_or_have_another_keep_their_names():
    rows = rows_of([0.5]) + rows_of([0.6], source=("target_ds", "l2", 0.5))
    rows += rows_of([0.7], source=("a", "l2", 3.0)) + rows_of([0.8], source=("0", "l2", 3.0), n=20)
    results = collect(rows)
    first, second = records(paper_tables(results)[0])
    place = {"num_training_images", "target_ds"}
    assert {*first} == {*place, "0", "source target_ds", "a", "source 0"}
    assert first["a"] == pytest.approx(70) and math.isnan(first["source 0"])
    assert second["source 0"] == pytest.approx(80) and first["0"] == pytest.approx(50)


def test_trials_that_end_anywhere_are_bounded(monkeypatch):
    rows = [row for seed in range(9) for row in rows_of({seed: 0.5}, epochs=(seed,))]
    assert ratios(collect(rows)).empty
    monkeypatch.setattr("advtransfer.report.statistics._MAX_CELLS", 80)
    with pytest.raises(ValueError, match="9 seeds at 9 epoch are too many"):
        ratios(collect(rows))


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
    assert bool(published_line(SourceInfo("s", "none", 0.0), name)) == (table is not None)


def test_sources_are_matched_by_threat():
    threats = {("none", math.nan): "0", ("l2", 3.0): "3", ("linf", 0.0157): "4", ("linf", 8 / 255): "8"}
    threats |= {("l2", 0.5): None, ("linf", 4.0): None}
    assert [column_of(SourceInfo("s", *threat)) for threat in threats] == [*threats.values()]
    assert published_line(SourceInfo("s", "l2", 3.0), "svhn")[400] == pytest.approx(0.619668087)
