"""Statistics against SciPy's own routines and cases worked out by hand."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from advtransfer.report import SUMMARY_COLUMNS, figures, headline, summarise
from advtransfer.report.summary import collect, curves, format_eps, mean_and_ci95, pooled_deltas
from advtransfer.report.words import notes, points

NATURAL, L2, LINF = ("nat", "none", 0.0), ("rob", "l2", 0.5), ("inf", "linf", 4 / 255)


def rows_of(values, *, source=NATURAL, target="digits", n=10, k=0, epochs=(1,)):
    """One row per seed and epoch; a dict of seed -> accuracy, or a list of accuracies."""
    values = values if isinstance(values, dict) else dict(enumerate(values))
    name, norm, eps = source
    return [
        {
            "source": name,
            "source_norm": norm,
            "source_eps": eps,
            "target": target,
            "num_train_images": n,
            "num_unfrozen_blocks": k,
            "seed": seed,
            "epoch": epoch,
            "test_accuracy": accuracy if epoch == max(epochs) else 0.01 * epoch,
            "trial_id": f"{name}-{target}-{n}-{k}-{seed}",
        }
        for seed, accuracy in values.items()
        for epoch in epochs
    ]


def find(summary, source, **where):
    [row] = [
        row
        for row in summary
        if row["source"] == source and all(row[key] == value for key, value in where.items())
    ]
    return row


@pytest.fixture(scope="module")
def study():
    """Two robust sources, two targets, three n, two k, seven seeds; and the truth as arrays."""
    rng = np.random.default_rng(0)
    grid = list(itertools.product((NATURAL, L2, LINF), ("digits", "svhn"), (10, 100, 1000), (0, -1)))
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
    assert len(summary) == len(truth)
    for (source, target, n, k), values in truth.items():
        row = find(summary, source[0], target=target, num_train_images=n, num_unfrozen_blocks=k)
        assert tuple(row) == SUMMARY_COLUMNS
        low, high = stats.t.interval(0.95, 6, values.mean(), stats.sem(values))
        np.testing.assert_allclose(row["mean"], values.mean(), rtol=1e-12)
        np.testing.assert_allclose(row["ci95"], (high - low) / 2, rtol=1e-9)
        assert row["num_seeds"] == 7
        if source is NATURAL:
            assert math.isnan(row["delta"]) and math.isnan(row["delta_ci95"])
            continue
        base = truth[NATURAL, target, n, k]
        interval = stats.ttest_rel(values, base).confidence_interval(0.95)
        np.testing.assert_allclose(row["delta"], (values - base).mean(), rtol=1e-9)
        np.testing.assert_allclose(
            [row["delta"] - row["delta_ci95"], row["delta"] + row["delta_ci95"]],
            interval,
            rtol=1e-9,
        )


def test_curves_are_the_summary_at_every_epoch(study):
    rows, _ = study
    points = curves(collect(rows))
    assert [point["epoch"] for point in points[:3]] == [1, 2, 5]
    last = [{name: p[name] for name in SUMMARY_COLUMNS} for p in points if p["epoch"] == 5]
    for point, row in zip(last, summarise(rows), strict=True):
        assert tuple(point.values())[:4] == tuple(row.values())[:4]
        np.testing.assert_allclose(list(point.values())[4:], list(row.values())[4:], rtol=1e-12)
    early = [p for p in points if p["epoch"] == 2 and p["source"] == "rob"]
    assert early and all(p["mean"] == pytest.approx(0.02) and p["delta"] == 0 for p in early)


def test_pooling_averages_within_a_seed_first(study):
    rows, truth = study
    for p in pooled_deltas(collect(rows)):
        source = {"rob": L2, "inf": LINF}[p.source.name]
        cells = [
            truth[source, p.target, n, p.num_unfrozen_blocks]
            - truth[NATURAL, p.target, n, p.num_unfrozen_blocks]
            for n in (10, 100)
        ]
        interval = stats.ttest_1samp(np.mean(cells, axis=0), 0).confidence_interval(0.95)
        assert p.sizes == (10, 100) and p.num_seeds == 7
        np.testing.assert_allclose([p.delta - p.ci95, p.delta + p.ci95], interval, rtol=1e-9)


def test_by_hand():
    # Three seeds 0.1 apart: s = 0.1, t(0.975, 2) = 4.302653.
    mean, half = mean_and_ci95([0.4, 0.5, 0.6])
    assert mean == pytest.approx(0.5) and half == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6)
    assert mean_and_ci95([0.4])[0] == 0.4 and math.isnan(mean_and_ci95([0.4])[1])
    assert all(map(math.isnan, mean_and_ci95([])))


def test_unequal_seeds_are_paired_where_both_exist():
    rows = rows_of({0: 0.5, 1: 0.6, 2: 0.9}) + rows_of({1: 0.7, 2: 0.8, 3: 0.1}, source=L2)
    row = find(summarise(rows), "rob")
    assert row["num_seeds"] == 3
    assert row["mean"] == pytest.approx(1.6 / 3)
    assert row["delta"] == pytest.approx((0.1 - 0.1) / 2)
    assert row["delta_ci95"] == pytest.approx(stats.t.ppf(0.975, 1) * np.std([0.1, -0.1], ddof=1) / 2**0.5)
    apart = find(summarise(rows_of({0: 0.5}) + rows_of({1: 0.7}, source=L2)), "rob")
    assert math.isnan(apart["delta"]) and math.isnan(apart["delta_ci95"])


def test_nan_accuracies_leave_the_seed_out_and_are_told():
    rows = rows_of([0.5, 0.6, math.nan]) + rows_of([0.6, math.nan, 0.7], source=L2)
    summary = summarise(rows)
    assert find(summary, "nat")["num_seeds"] == 2
    assert find(summary, "rob")["delta"] == pytest.approx(0.1)
    assert any("2 trials without a test accuracy" in note for note in notes(collect(rows)))
    silent = summarise(rows_of([math.nan]))
    assert silent[0]["num_seeds"] == 0 and math.isnan(silent[0]["mean"])


@pytest.mark.parametrize("naturals", [(), (NATURAL, ("nat2", "none", 0.0))])
def test_no_single_natural_source_leaves_delta_empty(naturals):
    rows = [row for source in (*naturals, L2) for row in rows_of([0.5, 0.6], source=source)]
    assert all(math.isnan(row["delta"]) for row in summarise(rows))
    [sentence] = headline(rows)
    assert "natural source" in sentence
    assert any("no differences, because" in note for note in notes(collect(rows)))


def test_several_trials_of_one_seed_count_once():
    first, second = rows_of([0.5], epochs=(1, 2)), rows_of([0.7], epochs=(1, 2))
    for row in second:
        row["trial_id"] = "other learning rate"
    results = collect(first + second)
    assert summarise(results)[0]["mean"] == pytest.approx(0.6)
    assert summarise(results)[0]["num_seeds"] == 1
    assert any("share source" in note for note in notes(results))
    # An id per row (not per trial) still means the last epoch only.
    for index, row in enumerate(first):
        row["trial_id"] = str(index)
    assert summarise(first)[0]["mean"] == 0.5


def test_one_name_for_two_networks_is_told_apart():
    rows = rows_of([0.5]) + rows_of([0.6], source=("r", "l2", 1.0)) + rows_of([0.7], source=("r", "l2", 3.0))
    assert [row["source"] for row in summarise(rows)] == ["nat", "r, ℓ2 (ε = 1)", "r, ℓ2 (ε = 3)"]


def test_missing_cells_are_told():
    rows = rows_of([0.5, 0.6]) + rows_of([0.6, 0.7], source=L2) + rows_of([0.7, 0.8], n=20)
    assert any("1 cell of the grid (source × n × k) of 4 have no rows" in n for n in notes(collect(rows)))
    assert math.isnan(find(summarise(rows), "nat", num_train_images=20)["delta"])


NOISE = np.array([0.01, -0.01, 0.02, -0.02, 0.0])


@pytest.mark.parametrize(
    ("gap", "words"),
    [
        (
            0.031,
            "the ℓ2 source (ε = 0.5) is ahead of the natural one by +3.1 points (95 % interval +",
        ),
        (-0.05, "the ℓ2 source (ε = 0.5) is behind the natural one by 5.0 points (95 % interval −"),
        (
            0.004,
            "no difference can be told between the ℓ2 source (ε = 0.5) and the natural one: +0.4",
        ),
    ],
)
def test_headline_in_its_three_outcomes(gap, words):
    base = np.array([0.5, 0.4, 0.6, 0.55, 0.45])
    rows = []
    for n, k in itertools.product((10, 100, 1000), (0, -1)):
        rows += rows_of(base, n=n, k=k)
        # Beyond 100 images, and with more than the head trained, the sign is the other way round.
        few = gap if (n <= 100 and k == 0) else -gap
        rows += rows_of(base + few + NOISE, source=L2, n=n, k=k)
    [sentence] = headline(rows)
    assert words in sentence
    assert sentence.startswith("On digits, with at most 100 labelled images, ")
    assert "5 seeds, head only" in sentence
    assert ("includes zero" in sentence) == (gap == 0.004)


def test_headline_with_one_seed_and_with_many_images_only():
    [sentence] = headline(rows_of([0.5], n=200) + rows_of([0.6], source=L2, n=200))
    assert "with 200 labelled images" in sentence and "no interval" in sentence


def test_headline_names_every_robust_source():
    base = np.array([0.5, 0.4, 0.6, 0.55, 0.45])
    rows = rows_of(base) + rows_of(base + 0.1 + NOISE, source=L2) + rows_of(base + NOISE, source=LINF)
    [sentence] = headline(rows)
    assert "ℓ2 (ε = 0.5) is ahead by +10.0 points" in sentence
    assert "no difference can be told for ℓ∞ (ε = 4/255)" in sentence


def test_numbers_as_they_are_written():
    assert [points(x) for x in (0.031, -0.002, 0.0, 0.0004, math.nan)] == [
        "+3.1",
        "−0.2",
        "+0.0",
        "+0.04",
        "–",
    ]
    assert [format_eps("linf", e) for e in (4 / 255, 0.5 / 255, 0.1)] == ["4/255", "0.5/255", "0.1"]
    assert format_eps("l2", 3.0) == "3"


def test_a_range_holds_every_interval():
    series = [
        figures.Series(None, [1, 2], [0.2, 0.5], [0.1, math.nan]),
        figures.Series(None, [1], [math.nan], [9.0]),
    ]
    # From 0.1 to 0.5, and 6 % of that on either side.
    assert figures.value_range([series]) == pytest.approx((0.076, 0.524))
    assert figures.value_range([series], include=(0.0,)) == pytest.approx((-0.03, 0.53))
    assert figures.value_range([[figures.Series(None, [1], [0.5], [0.0])]]) == pytest.approx((0.49, 0.51))
    assert figures.value_range([]) == (0.0, 1.0)
