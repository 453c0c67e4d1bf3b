"""Images and epochs needed: closed forms, other implementations, and how often intervals cover the truth."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from pages import read_csv, read_page
from scipy import stats
from scipy.optimize import isotonic_regression
from test_report_rows import make_row
from test_report_statistics import records

from advtransfer.report import read_rows, write_report
from advtransfer.report.ratios import _factor, _first_reach, _mean_shift, _resamples, _rising, compare, ratios
from advtransfer.report.sections import Entry
from advtransfer.report.statistics import SeedTable, collect
from advtransfer.report.target_tables import factor_entry

SIZES = (100, 200, 400, 800, 1600)


def line(n, factor=1.0):
    """Accuracy a + b log n; `factor` times fewer images are needed."""
    return 0.2 + 0.08 * np.log(factor * n)


def curve(factor=1.0, seeds=5, sizes=SIZES, noise=0.0):
    return SeedTable(
        np.arange(seeds), np.array(sizes), line(np.array(sizes), factor) + noise * np.ones((seeds, 1))
    )


def rows_of(by_source, **fixed):
    """Rows from source -> seed -> n -> epoch -> accuracy."""
    fixed = {"target": "digits", "num_unfrozen_blocks": 3} | fixed
    natural, robust = ({"source_norm": norm, "source_eps": eps} for norm, eps in (("none", 0.0), ("l2", 3.0)))
    return [
        make_row(source=source, num_train_images=n, seed=seed, epoch=epoch, test_accuracy=accuracy)
        | (natural if source == "nat" else robust)
        | fixed
        for source, seeds in by_source.items()
        for seed, sizes in seeds.items()
        for n, epochs in sizes.items()
        for epoch, accuracy in epochs.items()
    ]


@pytest.mark.parametrize("factor", [3.0, 1.0, 0.4])
def test_a_shift_in_log_n_is_found_exactly(factor):
    shared = np.random.default_rng(0).normal(0, 0.05, (5, 1)) * np.ones((1, 5))  # a seed's luck
    found = compare(curve(noise=shared), curve(factor, noise=shared))
    assert found.whole[:3] == pytest.approx((factor,) * 3, rel=1e-9) and found.whole.bound == ""
    for n, one in zip(found.places, found.factors, strict=True):
        if n / factor < 100 - 1e-6:
            assert one.bound == "at least" and one.value == pytest.approx(n / 100)
            assert one.low == pytest.approx(n / 100) and one.high == math.inf
        elif n / factor > 1600 + 1e-6:
            assert one.bound == "not reached" and one.value == pytest.approx(n / 1600)
            assert one.low == 0 and one.high == pytest.approx(n / 1600)
        else:
            assert one[:3] == pytest.approx((factor,) * 3, rel=1e-9)


def test_one_better_everywhere_has_a_bound_and_no_factor():
    ahead = compare(curve(), curve(100)).whole
    assert ahead.bound == "at least" and ahead.value == pytest.approx(16) and ahead.high == math.inf
    behind = compare(curve(), curve(0.01)).whole
    assert behind.bound == "not reached" and behind.value == pytest.approx(1 / 16) and behind.low == 0
    flat = curve()._replace(values=np.full((5, 5), 0.5))
    assert math.isnan(compare(flat, flat).whole.value)


def test_what_has_no_interval_or_no_curve():
    assert compare(curve(sizes=SIZES[:1]), curve()) is None
    assert compare(curve(), curve(sizes=SIZES[:1])) is None
    one = compare(curve(seeds=1), curve(2, seeds=1)).whole
    assert one.value == pytest.approx(2) and math.isnan(one.low) and math.isnan(one.high)
    # A seed that lacks some n, and one that only one source has, still count where they are.
    natural, robust = curve(), curve(2, seeds=7)
    natural.values[3, 2] = natural.values[2, 0] = math.nan
    assert compare(natural, robust).whole.value == pytest.approx(2)
    assert compare(natural, robust).num_seeds == compare(robust, natural).num_seeds == 5


def test_two_points_are_a_curve_and_forty_become_twenty_four():
    """What stands at zero has no logarithm and is left out."""
    short = curve(sizes=SIZES[:2])
    short = SeedTable(short.seeds, np.append(0, short.places), np.pad(short.values, ((0, 0), (1, 0))))
    assert compare(short, curve(1.5)).whole.value == pytest.approx(1.5)
    assert compare(short, curve(1.5)).places.tolist() == [100, 200]
    assert compare(curve(), curve(1.5, sizes=SIZES[:2])).whole.value == pytest.approx(1.5)
    np.testing.assert_allclose(compare(short, curve()).accuracies, line(np.array([100, 200])))
    sizes = range(1, 41)
    found = compare(curve(sizes=sizes), curve(2, sizes=sizes))
    expected = 1 + np.linspace(0, 39, 24).round()
    assert found.places.tolist() == expected.tolist() and len(found.factors) == 24
    assert len(compare(curve(sizes=range(1, 26)), curve()).places) == 24


def test_seeds_are_resampled_among_their_like():
    weights = _resamples((0, 1, 0, 1, 1, 2))
    assert weights.shape == (2001, 6) and np.all(weights[0] == 1)
    assert np.all(weights[:, [0, 2]].sum(axis=1) == 2) and np.all(weights[:, [1, 3, 4]].sum(axis=1) == 3)
    assert np.all(weights[:, 5] == 1)
    np.testing.assert_allclose(weights[1:, 1].mean(), 1, atol=0.06)
    np.testing.assert_allclose(weights[1:, 1].var(), 3 * (1 / 3) * (2 / 3), atol=0.1)


def test_an_interval_is_students_t_or_of_widened_percentiles():
    """Under six seeds the first; the second where a resample is beyond an end of the robust curve."""
    drawn = np.random.default_rng(0).normal(0.5, 0.2, 2000)
    shifts, ends = np.append(0.5, drawn), {"least": 2.0, "most": -2.0}

    def widened(seeds, low, high):
        t = stats.t.ppf(0.975, seeds - 1) * math.sqrt(seeds / (seeds - 1))
        levels = stats.norm.cdf([-t, t])
        places = (math.floor(levels[0] * 1999), math.ceil(levels[1] * 1999))
        return [math.exp(np.sort(values)[place]) for values, place in zip((low, high), places, strict=True)]

    for seeds in (2, 5):
        half = stats.t.ppf(0.975, seeds - 1) * math.sqrt(seeds / (seeds - 1)) * drawn.std()
        found = _factor(shifts, seeds, **ends)
        assert found[:3] == pytest.approx(np.exp([0.5, 0.5 - half, 0.5 + half]))
    for seeds in (6, 9):
        found = _factor(shifts, seeds, **ends)
        assert found[1:3] == pytest.approx(widened(seeds, drawn, drawn)) and found.bound == ""
    far = np.copy(drawn)
    far[:400], far[400:800], far[800:1000] = math.inf, -math.inf, math.nan
    low = np.where(np.isnan(far), -math.inf, np.where(far == math.inf, 2.0, far))
    high = np.where(np.isnan(far), math.inf, np.where(far == -math.inf, -2.0, far))
    for seeds in (5, 9):
        assert _factor(np.append(0.5, far), seeds, **ends)[1:3] == pytest.approx(widened(seeds, low, high))
    assert _factor(np.append(math.inf, far), 9, **ends)[::3] == (pytest.approx(math.exp(2)), "at least")
    assert _factor(np.append(-math.inf, far), 9, **ends)[::3] == (pytest.approx(math.exp(-2)), "not reached")
    assert all(map(math.isnan, _factor(np.append(math.nan, far), 9, **ends)[:3]))


def test_curves_are_made_to_rise_as_scipy_does():
    rng = np.random.default_rng(1)
    table = rng.uniform(0, 1, (6, 8))
    table[rng.uniform(size=table.shape) < 0.3] = np.nan
    table[0] = 0.5
    weights = np.isfinite(table).sum(0)
    expected = isotonic_regression(np.nanmean(table, 0), weights=weights).x
    np.testing.assert_allclose(_rising(table, np.ones((1, 6)))[0], expected, rtol=1e-12)


def test_inverse_and_mean_shift_equal_a_fine_grid():
    rng = np.random.default_rng(2)
    x, z = np.log([10, 20, 50, 400, 900]), np.log([10, 30, 70, 300])
    y, v = np.sort(rng.uniform(0, 1, (4, 5))), np.sort(rng.uniform(0, 1, (4, 4)))
    y[0, 2] = y[0, 3] = y[0, 1]  # a plateau: the first place of it counts
    for i in range(4):
        levels = np.linspace(max(y[i, 0], v[i, 0]), min(y[i, -1], v[i, -1]), 20_001)
        at = [_first_reach(p, q[i : i + 1], levels[None])[0] for p, q in ((x, y), (z, v))]
        np.testing.assert_allclose(at[1], np.interp(levels, v[i], z), atol=1e-9)
        if levels[-1] > levels[0]:
            expected = np.mean((at[0] - at[1])[1:])
            np.testing.assert_allclose(_mean_shift(x, y, z, v)[i], expected, atol=2e-3)
    assert _first_reach(x, y[:1], y[:1, 2:3])[0, 0] == pytest.approx(x[1])


@pytest.mark.parametrize("seeds", [3, 10])
def test_intervals_cover_the_truth_as_often_as_they_say(seeds):
    rng = np.random.default_rng(seeds)
    hits, trials = np.zeros(2), 300
    for _ in range(trials):
        luck = rng.normal(0, 0.02, (seeds, 1))
        natural, robust = (
            curve(factor, seeds, noise=luck + rng.normal(0, 0.02, (seeds, 5))) for factor in (1, 3)
        )
        found = compare(natural, robust)
        hits += [f.low <= 3 <= f.high for f in (found.whole, found.factors[3])]
    # 95 % of 300 with a binomial's three standard deviations, and a little for the bootstrap itself
    assert np.all(hits / trials >= 0.90) and np.all(hits / trials <= 0.99)


def test_seeds_are_resampled_together_where_both_sources_have_them():
    rng = np.random.default_rng(3)
    luck = rng.normal(0, 0.05, (10, 1))
    natural = curve(seeds=10, noise=luck + rng.normal(0, 0.002, (10, 5)))
    robust = curve(3, 10, noise=luck + rng.normal(0, 0.002, (10, 5)))
    paired = compare(natural, robust).whole
    apart = compare(natural, robust._replace(seeds=robust.seeds + 10)).whole
    assert paired.value == pytest.approx(apart.value)
    assert math.log(paired.high / paired.low) < math.log(apart.high / apart.low) / 5


def test_epochs_needed_are_compared_at_every_n():
    epochs = (11, 21, 41, 81, 150)
    accuracy = {"nat": 1.0, "rob": 2.5}
    rows = rows_of(
        {
            s: {seed: {n: {e: line(e, f) - 5 / n for e in epochs} for n in (100, 3200)} for seed in range(3)}
            for s, f in accuracy.items()
        }
    )
    found = [row for row in records(ratios(collect(rows))) if row["quantity"] == "epochs"]
    whole = [row for row in found if math.isnan(row["accuracy"])]
    assert [row["num_train_images"] for row in whole] == [100, 3200]
    assert [row["factor"] for row in whole] == pytest.approx([2.5, 2.5])
    [last] = [row for row in found if row["epoch"] == 150 and row["num_train_images"] == 100]
    assert last["factor"] == pytest.approx(2.5) and last["accuracy"] == pytest.approx(line(150) - 0.05)


def test_each_k_is_compared_with_its_own():
    by_k = {0: 2.0, 3: 4.0}
    rows = [
        row
        for k, f in by_k.items()
        for row in rows_of(
            {s: {0: {n: {1: line(n, g) + 0.1 * k} for n in SIZES}} for s, g in (("nat", 1), ("rob", f))},
            num_unfrozen_blocks=k,
        )
    ]
    found = [row for row in records(ratios(collect(rows))) if math.isnan(row["accuracy"])]
    assert {row["num_unfrozen_blocks"]: row["factor"] for row in found} == pytest.approx(by_k)


def test_a_table_of_factors_is_of_its_target_quantity_and_n(tmp_path):
    """Epochs are those of the largest n up to 100, where a lead of 0.08 log f is a factor f^(0.08 / 0.05)."""

    def accuracy(factor, n, epoch):
        return line(n, factor) - 0.2 + (0.05 if n == 100 else 0.1) * np.log(epoch / 8)

    rows = [
        row
        for target, factor in (("digits", 3), ("letters", 2))
        for row in rows_of(
            {
                source: {
                    s: {n: {e: accuracy(f, n, e) for e in (1, 2, 4, 8)} for n in (50, 100, 200)}
                    for s in (0, 1)
                }
                for source, f in (("nat", 1), ("rob", factor))
            },
            target=target,
        )
    ]
    shown = read_page(write_report(rows, tmp_path)).rows
    tables = [shown[i + 1] for i, row in enumerate(shown) if row[0] == "Trained layers"]
    found = [cell for name, cell in tables if "×" in cell]
    factors = [f"{factor:.2f}×" for base in (3, 2) for factor in (base, base**1.6)]
    assert [cell.split(" ")[0] for cell in found] == factors
    overview = [row for row in shown if row[0].endswith((", images", ", epochs"))]
    assert [row[1].split(" ")[0] for row in overview] == factors and overview[1][0] == "digits, epochs"


def test_factors_as_they_are_written():
    row = {"factor": 3.0, "bound": "", "ci95_low": 1.25, "ci95_high": 9.99}
    for changes, shown in (
        ({}, Entry(strong="3.00×", small="(1.25 … 9.99)")),
        ({"ci95_low": 1.0}, Entry("3.00×", small="(1.00 … 9.99)")),
        ({"factor": 0.5, "ci95_low": 0.25, "ci95_high": 1.0}, Entry("0.50×", small="(0.25 … 1.00)")),
        ({"factor": 0.5, "ci95_low": 0.25, "ci95_high": 0.75}, Entry("", "0.50×", "(0.25 … 0.75)")),
        ({"ci95_low": 0.5, "ci95_high": np.inf}, Entry("3.00×", small="(0.50 … ∞)")),
        ({"factor": 9.995, "ci95_low": np.nan}, Entry("10×", small="(1 seed)")),
        ({"factor": 16.0, "bound": "at least"}, Entry("≥ 16×")),
        ({"factor": 0.1, "bound": "not reached"}, Entry("not reached")),
        ({"factor": np.nan}, Entry("–")),
    ):
        assert factor_entry(SimpleNamespace(**row | changes)) == shown


def test_they_stand_in_a_file_and_in_the_report(tmp_path):
    rows = rows_of(
        {
            source: {s: {n: {1: line(n, f) - 0.2 + 0.001 * s} for n in SIZES} for s in range(4)}
            for source, f in {"nat": 1, "rob": 3, "far": 100}.items()
        }
    )
    text = write_report(rows, tmp_path).read_text()
    written = read_csv(tmp_path / "ratios.csv")
    [whole] = [row for row in written if not row["accuracy"] and row["source"] == "rob"]
    assert float(whole["factor"]) == pytest.approx(3) and whole["bound"] == ""
    assert len([row for row in written if row["accuracy"]]) == 2 * len(SIZES)
    assert "<b>3.00×</b>" in text and "≥ 16×" in text
    assert "epochs needed cannot be computed" in text
    alone = write_report([row for row in rows if row["num_train_images"] == 100], tmp_path).read_text()
    assert "images needed cannot be computed" in alone
    with pytest.raises(ValueError):
        read_rows(tmp_path)  # none of its own tables passes for rows
