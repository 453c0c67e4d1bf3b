"""Sources that were trained from several seeds: intervals against enumeration, SciPy and known components."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from pages import read_csv, read_page
from scipy import stats
from test_report_ratios import curve
from test_report_rows import make_row
from test_report_statistics import L2, NATURAL, find, remarks, rows_of

from advtransfer.intervals import Crossed, crossed_mean_and_ci95, mean_and_ci95
from advtransfer.report import headline, read_rows, summarise, write_report, write_rows
from advtransfer.report.ratios import compare
from advtransfer.report.statistics import collect

NUM_STUDIES = 400
COMPONENTS = {"network": 0.015, "subset": 0.02, "both": 0.007, "rest": 0.015}


def crossed(table, first=0):
    """A table [networks, subsets] whose missing values are NaN."""
    networks, subsets = np.nonzero(np.isfinite(table))
    return Crossed(table[networks, subsets], networks, subsets + first)


def several(tables, source=NATURAL, **place):
    """Rows of a table [networks, subsets]."""
    return [
        row | {"source_seed": network, "trial_id": f"{row['trial_id']}-{network}"}
        for network, values in enumerate(tables)
        for row in rows_of(list(values), source=source, **place)
    ]


def simulate(rng, networks, subsets, gap=0.0):
    """Accuracies of a natural and a robust source [2, networks, subsets]; each kind and network has its own
    luck, and so has a subset, one that both kinds share and one of its own."""

    def draw(name, *shape):
        return rng.normal(0, COMPONENTS[name], shape)

    shared = draw("subset", 1, subsets)
    kinds = [
        draw("network", networks, 1) + shared + draw("both", 1, subsets) + draw("rest", networks, subsets)
        for _ in range(2)
    ]
    return np.stack(kinds) + 0.5 + np.array([0.0, gap])[:, None, None]


def all_draws(number):
    return np.array(list(itertools.product(range(number), repeat=number)))


@pytest.mark.parametrize("has_base", [False, True])
def test_the_variance_is_that_of_every_bootstrap_sample_of_each_level(has_base):
    rng = np.random.default_rng(0)
    table, base = rng.normal(size=(3, 4)), rng.normal(size=(2, 4)) * has_base
    mean, half, number = crossed_mean_and_ci95(crossed(table), crossed(base) if has_base else None)
    levels = [(table.mean(axis=1)[all_draws(3)].mean(axis=1).var(), 3)]
    levels += [(base.mean(axis=1)[all_draws(2)].mean(axis=1).var(), 2)] * has_base
    levels += [((table.mean(axis=0) - base.mean(axis=0))[all_draws(4)].mean(axis=1).var(), 4)]
    parts = [(variance * m / (m - 1), m - 1) for variance, m in levels]
    total = sum(variance for variance, _ in parts)
    freedom = total**2 / sum(variance**2 / own for variance, own in parts)
    assert mean == pytest.approx(table.mean() - base.mean()) and number == 4
    assert half == pytest.approx(stats.t.ppf(0.975, freedom) * math.sqrt(total))


def test_of_one_network_it_is_students_t_and_of_a_subset_each_too():
    values = np.random.default_rng(0).normal(size=7)
    expected = pytest.approx(mean_and_ci95(values))
    assert crossed_mean_and_ci95(crossed(values[None]))[:2] == expected
    assert crossed_mean_and_ci95(Crossed(values, np.arange(7), np.arange(7)))[:2] == expected
    assert crossed_mean_and_ci95(crossed(np.full((3, 4), 0.5))) == (0.5, 0.0, 4)


def test_what_is_missing_and_what_only_one_has():
    rng = np.random.default_rng(1)
    table, base = rng.normal(size=(3, 5)), rng.normal(size=(2, 6))
    table[1, 2] = math.nan
    mean, half, number = crossed_mean_and_ci95(crossed(table, first=3), crossed(base))
    assert number == 3 and half > 0  # subsets 3, 4, 5
    assert mean == pytest.approx(np.nanmean(table[:, :3], axis=1).mean() - base[:, 3:].mean())
    mean, half, number = crossed_mean_and_ci95(crossed(table[:, :1]))
    assert mean == pytest.approx(table[:, 0].mean()) and math.isnan(half) and number == 1
    assert crossed_mean_and_ci95(crossed(table), crossed(base, first=9))[2] == 0


@pytest.mark.parametrize("networks", [3, 5])
def test_intervals_cover_the_truth_as_often_as_they_say_and_those_of_one_network_do_not(networks):
    """Each target is a study of its own, whose robust source leads by two points."""
    rng = np.random.default_rng(networks)
    shape = (NUM_STUDIES, 2, networks, 20)
    accuracies = np.stack([simulate(rng, networks, 20, gap=0.02) for _ in range(NUM_STUDIES)])
    study, kind, network, subset = (x.ravel() for x in np.indices(shape))
    norms = np.array(["none", "l2"], object)
    rows = pd.DataFrame({"source": norms[kind], "source_norm": norms[kind], "source_eps": kind * 0.5})
    rows = rows.assign(target=np.char.add("t", study.astype(str)).astype(object), num_train_images=10)
    rows = rows.assign(num_unfrozen_blocks=0, seed=subset, epoch=1, test_accuracy=accuracies.ravel())
    rows = rows.assign(trial_id=np.arange(len(rows)).astype(str), source_seed=network)

    def share(means, halves, truth):
        return float((np.abs(np.array(means) - truth) <= np.array(halves)).mean())

    def covered(some):
        results = collect(some)
        summary, pooled = results.summary, results.pooled
        means = share(summary["mean"], summary["ci95"], 0.5 + 0.02 * (summary["source"] == "l2"))
        led = summary[summary["source"] == "l2"]
        assert [p.delta for p in pooled] == pytest.approx(led["delta"].tolist())
        assert [p.ci95 for p in pooled] == pytest.approx(led["delta_ci95"].tolist())
        return share(led["delta"], led["delta_ci95"], 0.02), means

    low, high = (end / NUM_STUDIES for end in stats.binom.interval(0.999, NUM_STUDIES, 0.95))
    lead, mean = covered(rows)
    assert low <= lead <= high
    assert 0.9 <= mean <= high
    alone, _ = covered(rows[rows["source_seed"] == 0])
    assert alone < 0.6


@pytest.mark.parametrize("networks", [3, 5])
def test_intervals_of_factors_cover_the_truth_and_those_of_one_network_do_not(networks):
    """A source's luck moves its whole curve, as that of a subset does."""
    rng = np.random.default_rng(networks)
    hits, number = np.zeros(2), 200
    for _ in range(number):
        luck = simulate(rng, networks, 10)[..., None] + rng.normal(0, 0.005, (2, networks, 10, 5)) - 0.5
        both = []
        for factor, own in ((1, luck[0]), (3, luck[1])):
            flat = curve(factor, networks * 10, noise=own.reshape(-1, 5))
            seeds = np.tile(np.arange(10), networks)
            both.append(flat._replace(seeds=seeds, source_seeds=np.repeat(np.arange(networks), 10)))
        one = [curve(factor, 10, noise=own[0]) for factor, own in ((1, luck[0]), (3, luck[1]))]
        hits += [found.whole.low <= 3 <= found.whole.high for found in (compare(*both), compare(*one))]
    assert hits[0] / number >= stats.binom.ppf(0.0005, number, 0.95) / number
    assert hits[1] / number < 0.75


def test_factors_of_several_networks_are_of_their_mean_curve():
    luck = np.random.default_rng(0).normal(0, 0.02, (4, 1))
    networks = np.repeat([0, 1], 2)
    both = [
        curve(factor, 4, noise=luck)._replace(seeds=np.tile([0, 1], 2), source_seeds=networks)
        for factor in (1, 3)
    ]
    found = compare(*both)
    assert found.num_seeds == 2 and found.whole.value == pytest.approx(3)
    assert 0 < found.whole.low < 3 < found.whole.high
    # One network of the natural source, and a point that one of the robust ones lacks, which counts nowhere.
    both[1].values[:2, 1] = math.nan
    single = curve(1, 2, noise=luck.mean())
    lacking = compare(single, both[1])
    assert lacking.whole.value == pytest.approx(compare(single, curve(3, 2, noise=luck.mean())).whole.value)
    # Beyond an end of the robust curve there are percentiles of all levels at once, on one side.
    far = compare(both[0], curve(100, 4)._replace(seeds=np.tile([0, 1], 2), source_seeds=networks)).whole
    assert far.bound == "at least" and far.low <= 16 + 1e-9 and far.high == math.inf


def test_what_all_sources_share_of_a_subset_cancels_in_differences_alone():
    rng = np.random.default_rng(2)
    natural, robust = simulate(rng, 3, 6, gap=0.05)
    luck = rng.normal(0, 0.2, 6)
    both = [summarise(several(natural + own) + several(robust + own, source=L2)) for own in (0 * luck, luck)]
    before, after = (find(table, "rob") for table in both)
    assert (after["delta"], after["delta_ci95"]) == pytest.approx((before["delta"], before["delta_ci95"]))
    assert after["ci95"] > 2 * before["ci95"]
    assert (after["num_seeds"], after["num_source_seeds"]) == (6, 3)


def test_the_best_k_is_compared_on_the_same_networks_and_subsets():
    rng = np.random.default_rng(3)
    first = simulate(rng, 3, 6)[0]
    second = first + 0.01 + rng.normal(0, 0.002, first.shape)
    [row] = collect(several(first, k=0) + several(second, k=1)).best.to_dict("records")
    expected = crossed_mean_and_ci95(crossed(second - first))
    assert (row["best"], row["tied"], row["num_seeds"]) == (1, "", 6)
    assert (row["lead"], row["lead_ci95"]) == pytest.approx(expected[:2])


@pytest.mark.parametrize(
    ("networks", "words", "left_out"),
    [
        ((1, 1), "(95 % interval +4.0 … +6.0, 3 seeds, head only)", "the sources"),
        ((3, 3), "3 sources of each kind × 3 subsets, head only)", ""),
        ((1, 3), "3 robust sources and 1 natural × 3 subsets, head only)", "the natural source"),
        ((2, 1), "1 robust source and 2 natural × 3 subsets, head only)", "the ℓ2 (ε = 0.5) source"),
    ],
)
def test_the_headline_says_how_many_were_trained(networks, words, left_out, tmp_path):
    gap = np.array([0.046, 0.05, 0.054])  # 0.4 points apart: t(0.975, 2) s / √3 is 1.0
    natural, robust = (np.full((number, 3), 0.5) for number in networks)
    rows = several(natural) + several(robust + gap, source=L2)
    [sentence] = headline(rows)
    assert words in sentence
    end = f" The interval leaves out what training {left_out} again would change."
    assert sentence.endswith(end if left_out else "head only).")
    different = [note for note in remarks(rows) if "different numbers of seeds" in note]
    assert bool(different) == (networks[0] != networks[1])
    page = read_page(write_report(rows, tmp_path))
    text = " ".join(page.text.split())
    assert ("over networks and seeds" in text) == (networks != (1, 1))
    assert sentence in text


def test_without_several_networks_the_column_changes_nothing(tmp_path):
    """Rows of others lack it; in a workdir of another seed it is that seed."""
    rows = [row | {"source_seed": 7} for row in several(np.eye(1, 4) + 0.1)]
    rows += several(np.eye(1, 4, 1) + 0.2, source=L2)
    bare = [{name: x for name, x in row.items() if name != "source_seed"} for row in rows]
    assert summarise(bare).equals(summarise(rows)) and headline(bare) == headline(rows)
    write_report(rows, tmp_path / "with"), write_report(bare, tmp_path / "without")
    for name in ("report.html", "summary.csv", "ratios.csv"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()
    assert "num_source_seeds" not in read_csv(tmp_path / "with/summary.csv")[0]


def test_source_seeds_are_read_from_files_and_told_apart(tmp_path):
    rows = [make_row(source_seed=seed) for seed in (0, 1, "first", None)]
    read = read_rows(write_rows(rows, tmp_path / "rows.csv"))
    assert [row["source_seed"] for row in read] == [1, "first", 0]  # the last of two that are 0
    results = collect(read)
    assert results.num_networks == {"natural": 3} and results.repeated == 0
