"""Rankings, match rates and label errors, against loops and made-up scores whose answer is known."""

import math

import numpy as np
import pytest
import scipy.stats
from sklearn.linear_model import LogisticRegression

from advtransfer import load_dataset
from advtransfer.analysis import influence, matches

CLASSES = 3


@pytest.fixture(scope="module")
def scores():
    """Rounded, so that there are ties."""
    rng = np.random.default_rng(0)
    return rng.integers(-4, 5, (12, 12)) / 2, rng.integers(0, CLASSES, 12)


def ranked(row, itself, helpful):
    order = sorted(range(len(row)), key=lambda i: (-row[i] if helpful else row[i], i))
    return [i for i in order if i != itself]


@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("block", [5, 1024])
def test_rankings_are_those_of_a_sort_by_hand(scores, exclude_self, block, monkeypatch):
    monkeypatch.setattr(matches, "_BLOCK", block)
    for rank, helpful in ((matches.most_helpful, True), (matches.most_harmful, False)):
        found = rank(scores[0], 50, exclude_self=exclude_self)
        truth = [ranked(row, i if exclude_self else -1, helpful) for i, row in enumerate(scores[0])]
        np.testing.assert_array_equal(found, truth)
        np.testing.assert_array_equal(rank(scores[0], 4, exclude_self=exclude_self), found[:, :4])


@pytest.mark.parametrize("exclude_self", [False, True])
def test_match_rates_count_queries(scores, exclude_self):
    scores, labels = scores
    orders = [ranked(row, i if exclude_self else -1, True) for i, row in enumerate(scores)]
    hits = np.array([[labels[j] == labels[i] for j in order] for i, order in enumerate(orders)])
    rates = matches.match_rates(scores, labels, labels, num_ranks=100, exclude_self=exclude_self)
    assert rates.tolist() == [sum(rank) / 12 for rank in hits.T]
    shares = matches.match_shares(scores, labels, labels, exclude_self=exclude_self)
    assert shares["top1"].value == rates[0]
    assert shares["three_of_five"].value == sum(sum(row[:5]) >= 3 for row in hits) / 12


def test_queries_of_their_own_number_and_classes(scores):
    """Seven that are none of the twelve training images."""
    scores, labels = scores
    mine, queries = scores[:7], np.array([2, 0, 1, 1, 2, 2, 0])
    order = np.array([ranked(row, -1, True) for row in mine])
    hits = labels[order] == queries[:, None]
    np.testing.assert_allclose(
        matches.match_rates(mine, queries, labels, num_ranks=4), hits[:, :4].mean(axis=0)
    )
    shares = matches.match_shares(mine, queries, labels)
    assert shares["top1"].value == np.mean(hits[:, 0])
    assert shares["three_of_five"].value == np.mean(hits[:, :5].sum(axis=1) >= 3)
    means = [[mine[np.ix_(queries == a, labels == b)].mean() for b in range(3)] for a in range(3)]
    np.testing.assert_allclose(matches.class_heat_map(mine, queries, labels, 3), means)
    two = matches.most_helpful(np.array([[5.0, 1.0], [1.0, 5.0]]), 9, exclude_self=True)
    assert two.tolist() == [[1], [0]]


@pytest.mark.parametrize("hits, total", [(0, 7), (3, 7), (7, 7), (786, 1000)])
def test_intervals_are_wilsons(hits, total):
    scores = np.ones((total, 1))
    labels = np.repeat([0, 1], [hits, total - hits])
    found = matches.match_shares(scores, labels, np.array([0]))["top1"]
    truth = scipy.stats.binomtest(hits, total).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose(found[:3], (hits / total, truth.low, truth.high), atol=1e-7)
    assert found[3:] == (hits, total)


@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("bins", [1, 2])
def test_the_heat_map_averages_pairs(scores, exclude_self, bins):
    scores, labels = scores
    runs = np.empty(12, int)
    for label in range(CLASSES):
        for run, members in enumerate(np.array_split(np.flatnonzero(labels == label), bins)):
            runs[members] = label * bins + run
    found = matches.class_heat_map(
        scores, labels, labels, CLASSES + 1, bins_per_class=bins, exclude_self=exclude_self
    )
    for row in range((CLASSES + 1) * bins):
        for column in range((CLASSES + 1) * bins):
            pairs = [
                scores[i, j]
                for i in np.flatnonzero(runs == row)
                for j in np.flatnonzero(runs == column)
                if not (exclude_self and i == j)
            ]
            truth = np.mean(pairs) if pairs else math.nan
            np.testing.assert_allclose(found[row, column], truth, atol=1e-12)


def test_the_table_has_the_sums_of_a_loop(scores):
    scores, labels = scores[0].copy(), scores[1]
    scores[:, 0] = 2  # harms nobody
    wrong = labels == 1
    table = matches.harmful_table(scores, labels, is_wrong=wrong, exclude_self=True)
    assert {len(column) for column in table.values()} == {12}
    assert sorted(table["index"]) == list(range(12))
    assert np.all(np.diff(table["harm"]) <= 0)
    for place, i in enumerate(table["index"]):
        others = {q: scores[q, i] for q in range(12) if q != i}
        assert table["rank"][place] == place + 1
        assert table["label"][place] == labels[i]
        assert table["harm"][place] == -sum(others.values())
        assert table["share_harmed"][place] == sum(x < 0 for x in others.values()) / 11
        assert scores[table["most_harmed"][place], i] == min(others.values())
        assert table["self_influence"][place] == scores[i, i]
        assert table["precision"][place] == np.mean(wrong[table["index"][: place + 1]])
    by_self = matches.harmful_table(scores, labels, by="self")
    assert by_self["self_influence"].tolist() == sorted(np.diagonal(scores), reverse=True)
    assert "self_influence" not in matches.harmful_table(scores[:5], labels)


def test_flipped_labels_of_digits_are_found():
    """5 % of 600 labels flipped: chance finds 5 % of them among the first 30."""
    data = load_dataset("builtin:digits")
    rng = np.random.default_rng(0)
    chosen = rng.permutation(len(data.train.labels))[:600]
    features = data.train.images[chosen].mean(axis=-1).reshape(600, -1) / 255
    labels = data.train.labels[chosen].astype(int)
    wrong = np.zeros(600, bool)
    wrong[rng.permutation(600)[:30]] = True
    labels[wrong] = (labels[wrong] + rng.integers(1, 10, 30)) % 10
    fitted = LogisticRegression(C=1 / (influence.WEIGHT_DECAY * len(labels)), max_iter=1000)
    fitted.fit(features, labels)
    head = fitted.coef_.T, fitted.intercept_
    scores = influence.last_layer_scores(features, labels, features, labels, *head, tell=lambda line: None)
    for by in ("harm", "self"):
        table = matches.harmful_table(scores, labels, by=by, is_wrong=wrong, exclude_self=True)
        print(by, table["precision"][[9, 29, 59]])
        assert table["precision"][29] > 0.5


def test_bad_input_is_named(scores):
    scores, labels = scores
    for call, message in [
        (
            lambda: matches.match_rates(scores, labels[:-1], labels),
            "scores are .12, 12. for query labels .11,.",
        ),
        (
            lambda: matches.match_rates(scores[:5], labels[:5], labels, exclude_self=True),
            "exclude_self needs",
        ),
        (lambda: matches.most_helpful(scores * np.nan, 3), "scores hold NaN"),
        (lambda: matches.harmful_table(scores, labels, by="charm"), "by is 'charm'"),
        (lambda: matches.harmful_table(scores[:5], labels, by="self"), "by='self' needs the training images"),
        (lambda: matches.harmful_table(scores, labels, is_wrong=[True]), "is_wrong has shape .1,."),
        (lambda: matches.class_heat_map(scores, labels, labels, 2), "labels run from 0 to 2: there are 2"),
        (lambda: matches.class_heat_map(scores, labels - 1, labels, 3), "labels run from -1 to 1"),
        (lambda: matches.most_helpful(np.zeros((0, 3)), 1), "none of them empty"),
        (lambda: matches.most_helpful([[1.0]], 1, exclude_self=True), "two or more"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
