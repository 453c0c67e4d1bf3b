"""Statistics against SciPy's own routines and cases worked out by hand."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from advtransfer.report import SUMMARY_COLUMNS, figures, headline, summarise
from advtransfer.report.summary import collect, curves, format_eps, mean_and_ci95, pooled_deltas
from advtransfer.report.words import blocks_text, is_clear, notes, points, ratio_notes

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


def test_curves_are_of_the_seeds_that_were_measured_at_an_epoch():
    rows = rows_of([0.2, 0.4, math.nan], epochs=(7,)) + rows_of({0: 0.6}, epochs=(8,))
    (first, second) = curves(collect(rows))
    assert (first["epoch"], first["num_seeds"], first["mean"]) == (7, 2, pytest.approx(0.3))
    assert (second["epoch"], second["num_seeds"], second["mean"]) == (8, 1, 0.6)


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
        (found,) = pooled_deltas(collect(rows))
        several = len(pooled) == 2
        assert found.sizes == pooled and found.num_seeds == (2 if several else 3)
        assert found.delta == pytest.approx(0.15 if several else 0.2)


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
    assert results.repeated == 2 and any(
        "k and seed with another (2 rows)" in note for note in notes(results)
    )
    assert collect(first).repeated == 0 and not any("share source" in note for note in notes(collect(first)))
    # An id per row (not per trial) still means the last epoch only.
    for index, row in enumerate(first):
        row["trial_id"] = str(index)
    assert summarise(first)[0]["mean"] == 0.5


def test_one_name_for_two_networks_is_told_apart():
    rows = rows_of([0.5]) + rows_of([0.6], source=("r", "l2", 1.0)) + rows_of([0.7], source=("r", "l2", 3.0))
    assert [row["source"] for row in summarise(rows)] == ["nat", "r, ℓ2 (ε = 1)", "r, ℓ2 (ε = 3)"]


def test_sources_stand_by_norm_radius_and_name():
    threats = [("e", "l1", 1.0), ("d", "linf", 0.1), ("c", "l2", 3.0), ("b", "l2", 0.5), ("a", "l2", 3.0)]
    rows = [row for source in (*threats, NATURAL) for row in rows_of([0.5], source=source)]
    assert list(collect(rows).sources) == ["nat", "b", "a", "c", "d", "e"]


def test_notes_are_of_what_is_there():
    """Nothing to tell of whole grids; the numbers of what is missing elsewhere."""
    whole = rows_of([0.5, 0.6]) + rows_of([0.6, 0.7], source=L2)
    assert notes(collect(whole)) == []
    said = notes(collect(whole + rows_of([0.5, 0.6, math.nan], n=20) + rows_of([0.7], source=L2, n=20)))
    assert [note.partition(" (")[0] for note in said] == [
        "1 trial without a test accuracy at the last epoch",
        "Cells have between 1 and 2 seeds; a difference uses only the seeds that both sources have, so it "
        "need not equal the difference of the two means.",
        "A single seed has no interval; cells with one seed show the value alone.",
    ]
    assert said[0].endswith("is left out of every mean.")
    assert notes(collect(rows_of([0.5, 0.6]))) == []  # without a robust source there is no difference to miss
    two = collect(
        rows_of([0.5, 0.6], k=3) + rows_of([0.5, 0.6], source=LINF, k=3) + rows_of([0.6, 0.7], n=20)
    )
    assert [note for note in notes(two) if "grid" in note] == [
        "digits: 5 cells of the grid (source × n × k) of 8 have no rows."
    ]


def test_why_there_are_no_factors():
    one = rows_of([0.5, 0.6]) + rows_of([0.6, 0.7], source=L2)
    assert [note.partition(" cannot")[0] for note in ratio_notes(collect(one), [])] == [
        "digits: images needed",
        "digits: epochs needed",
    ]
    known = [{"target": "digits", "quantity": "images"}, {"target": "svhn", "quantity": "epochs"}]
    assert [note.partition(" cannot")[0] for note in ratio_notes(collect(one), known)] == [
        "digits: epochs needed"
    ]
    assert ratio_notes(collect(rows_of([0.5])), []) == []
    second = rows_of([0.5], source=("nat2", "none", 0.0))
    assert ratio_notes(collect(one + second), []) == []  # no single baseline: that is said elsewhere


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
    assert sentence.endswith(" The interval leaves out what training the sources again would change.")


def test_headline_with_one_seed_and_with_many_images_only():
    [sentence] = headline(rows_of([0.5], n=200) + rows_of([0.6], source=L2, n=200))
    assert "with 200 labelled images" in sentence and "no interval" in sentence


def test_headline_names_every_robust_source():
    base = np.array([0.5, 0.4, 0.6, 0.55, 0.45])
    rows = rows_of(base) + rows_of(base + 0.1 + NOISE, source=L2) + rows_of(base + NOISE, source=LINF)
    [sentence] = headline(rows)
    assert "ℓ2 (ε = 0.5) is ahead by +10.0 points" in sentence
    assert "no difference can be told for ℓ∞ (ε = 4/255)" in sentence


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
    equal = headline(rows_of([0.5]) + rows_of([0.5], source=L2))
    assert "is ahead of the natural one by +0.0 points" in equal[0]


def test_trained_blocks_and_clear_leads_in_words():
    texts = ["all blocks", "head only", "head + last block", "head + last 2 blocks"]
    assert [blocks_text(k) for k in (-1, 0, 1, 2)] == texts
    assert [is_clear(*x) for x in ((0.2, 0.1), (-0.2, 0.1), (0.1, 0.1), (0.1, math.nan))] == [
        True,
        True,
        False,
        False,
    ]


def test_numbers_as_they_are_written():
    assert [points(x) for x in (0.031, -0.002, 0.0005, 0.0, 0.0004, math.nan)] == [
        "+3.1",
        "−0.2",
        "+0.1",
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
    high = figures.Series(None, [1], [0.9], [0.05])
    assert figures.value_range([series, [high]]) == pytest.approx((0.1 - 0.051, 0.95 + 0.051))
    assert figures.value_range([[figures.Series(None, [1], [0.5], [0.0])]]) == pytest.approx((0.49, 0.51))
    assert figures.value_range([]) == (0.0, 1.0)
