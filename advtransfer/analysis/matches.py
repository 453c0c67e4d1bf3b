"""Who helps and who harms: rankings of training images by influence, and how far their classes match.

The numbers behind figure 6 of Utrera et al., 2021, and section 5.4 of Koh and Liang, 2017 (wrong labels).
Scores are [Q, N], larger more helpful. With `exclude_self` the queries are the training images, in the same
order, and no image is ranked for itself. Of equal scores the image that comes first ranks first.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float64, Int, Integer, Real, Shaped

from advtransfer.arrays import AnyArray
from advtransfer.intervals import Share, share

_BLOCK = 1024  # queries that are sorted at a time


def most_helpful(
    scores: Real[AnyArray, "q n"], num: int, *, exclude_self: bool = False
) -> Int[np.ndarray, "q ranks"]:
    """Indices int [Q, min(num, N)] of each query's training images, the most helpful first."""
    return _ranked(np.asarray(scores), num, -1, exclude_self)


def most_harmful(
    scores: Real[AnyArray, "q n"], num: int, *, exclude_self: bool = False
) -> Int[np.ndarray, "q ranks"]:
    """Indices int [Q, min(num, N)] of each query's training images, the most harmful first."""
    return _ranked(np.asarray(scores), num, 1, exclude_self)


def match_rates(
    scores: Real[AnyArray, "q n"],
    query_labels: Integer[AnyArray, " q"],
    train_labels: Integer[AnyArray, " n"],
    *,
    num_ranks: int = 100,
    exclude_self: bool = False,
) -> Float64[np.ndarray, " ranks"]:
    """Share of the queries whose r-th most helpful training image has their class, [min(num_ranks, N)]."""
    return _matches(scores, query_labels, train_labels, num_ranks, exclude_self).mean(axis=0)


def match_shares(
    scores: Real[AnyArray, "q n"],
    query_labels: Integer[AnyArray, " q"],
    train_labels: Integer[AnyArray, " n"],
    *,
    exclude_self: bool = False,
) -> dict[str, Share]:
    """Shares of the queries whose most helpful training image, "top1", and three or more of whose five most
    helpful, "three_of_five", have their class.

    The intervals are over queries, for one head and one training set.
    """
    matches = _matches(scores, query_labels, train_labels, 5, exclude_self)
    hits = {"top1": matches[:, 0], "three_of_five": matches.sum(axis=1) >= 3}
    return {name: share(np.sum(found), len(found)) for name, found in hits.items()}


def class_heat_map(
    scores: Real[AnyArray, "q n"],
    query_labels: Integer[AnyArray, " q"],
    train_labels: Integer[AnyArray, " n"],
    num_classes: int,
    *,
    bins_per_class: int = 1,
    exclude_self: bool = False,
) -> Float64[np.ndarray, "bins bins"]:
    """Mean scores by the class of the query and of the training image, [C, C].

    With more bins than one the images of a class are taken in as many runs of equal length, in their order:
    the class-sorted matrix made small, [C bins, C bins]. NaN where no pair of images is.
    """
    scores = _checked(scores, query_labels, train_labels, exclude_self)
    rows, columns = (_bins(np.asarray(x), num_classes, bins_per_class) for x in (query_labels, train_labels))
    sums = rows.T @ (scores @ columns)
    counts = np.outer(rows.sum(axis=0), columns.sum(axis=0))
    if exclude_self:
        sums -= (rows * np.diagonal(scores)[:, None]).T @ columns
        counts -= rows.T @ columns
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def harmful_table(
    scores: Real[AnyArray, "q n"],
    train_labels: Integer[AnyArray, " n"],
    *,
    by: str = "harm",
    is_wrong: Bool[AnyArray, " n"] | None = None,
    exclude_self: bool = False,
) -> dict[str, Shaped[np.ndarray, " n"]]:
    """The training images as candidates for a wrong label, the most suspicious first.

    Args:
      scores: [Q, N].
      train_labels: int [N].
      by: "harm" ranks by the harm summed over the queries; "self" by the influence of an image on itself,
        which is large where the others do not explain its label (Koh and Liang, 2017, section 5.4): the
        queries are then the training images.
      is_wrong: bool [N], where the truth is known.
      exclude_self: an image does not count as a query of its own.

    Returns:
      Equal columns of length N, as a table takes them: "rank" from 1, "index", "label", "harm" (minus its
      score, summed over the queries), "share_harmed" (of the queries), "most_harmed" (index of the query that
      it harms most), where scores are square "self_influence", their diagonal, and with `is_wrong` "is_wrong"
      and "precision", the share of wrong ones down to this rank.

    Raises:
      ValueError: shapes that do not match; `by` is neither; "self" with scores that are not square.
    """
    scores = np.asarray(scores)
    is_square = scores.ndim == 2 and scores.shape[0] == scores.shape[1]
    scores = _checked(scores, np.zeros(len(scores), int), train_labels, exclude_self)
    if by not in ("harm", "self"):
        raise ValueError(f"by is {by!r}: pass 'harm' or 'self'")
    if by == "self" and not is_square:
        raise ValueError(f"scores are {scores.shape}: by='self' needs the training images as queries")
    others, itself = scores, 0.0
    if exclude_self:
        others, itself = np.array(scores, np.float64), np.diagonal(scores)
        np.fill_diagonal(others, np.inf)
    columns = {
        "label": np.asarray(train_labels),
        "harm": itself - scores.sum(axis=0),
        "share_harmed": np.sum(others < 0, axis=0) / (len(scores) - exclude_self),
        "most_harmed": np.argmin(others, axis=0),
    }
    if is_square:
        columns["self_influence"] = np.diagonal(scores).copy()
    order = np.argsort(-columns["harm" if by == "harm" else "self_influence"], kind="stable")
    ranks = np.arange(1, len(order) + 1)
    table = {"rank": ranks, "index": order} | {name: column[order] for name, column in columns.items()}
    if is_wrong is not None:
        wrong = np.asarray(is_wrong, bool)
        if wrong.shape != order.shape:
            raise ValueError(
                f"is_wrong has shape {wrong.shape}: pass one truth for each of {len(order)} images"
            )
        table |= {"is_wrong": wrong[order], "precision": np.cumsum(wrong[order]) / ranks}
    return table


def _ranked(scores: np.ndarray, num: int, sign: int, exclude_self: bool) -> np.ndarray:
    scores = _checked(scores, np.zeros(len(scores), int), np.zeros(scores.shape[-1], int), exclude_self)
    num = min(num, scores.shape[1] - exclude_self)
    ranked = np.empty((len(scores), num), int)
    for i in range(0, len(scores), _BLOCK):
        keys = sign * scores[i : i + _BLOCK]
        if exclude_self:
            rows = np.arange(len(keys))
            keys[rows, i + rows] = np.inf
        ranked[i : i + _BLOCK] = np.argsort(keys, axis=1, kind="stable")[:, :num]
    return ranked


def _matches(scores, query_labels, train_labels, num, exclude_self):
    """bool [Q, ranks]."""
    scores = _checked(scores, query_labels, train_labels, exclude_self)
    ranked = most_helpful(scores, num, exclude_self=exclude_self)
    return np.asarray(train_labels)[ranked] == np.asarray(query_labels)[:, None]


def _bins(labels: np.ndarray, num_classes: int, bins_per_class: int) -> np.ndarray:
    """One-hot [N, C bins] of the run of its class that each image is in."""
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"labels run from {labels.min()} to {labels.max()}: there are {num_classes} classes")
    onehot = np.zeros((len(labels), num_classes * bins_per_class))
    for label in range(num_classes):
        members = np.flatnonzero(labels == label)
        runs = np.arange(len(members)) * bins_per_class // max(len(members), 1)
        onehot[members, label * bins_per_class + runs] = 1
    return onehot


def _checked(
    scores: AnyArray, query_labels: AnyArray, train_labels: AnyArray, exclude_self: bool
) -> np.ndarray:
    scores = np.asarray(scores)
    lengths = (np.shape(query_labels), np.shape(train_labels))
    if scores.ndim != 2 or not scores.size or lengths != (scores.shape[:1], scores.shape[1:]):
        raise ValueError(
            f"scores are {scores.shape} for query labels {lengths[0]} and train labels {lengths[1]}: "
            "pass [Q, N], [Q], [N], none of them empty"
        )
    if np.isnan(scores).any():
        raise ValueError("scores hold NaN, which has no rank")
    if exclude_self and (scores.shape[0] != scores.shape[1] or len(scores) < 2):
        raise ValueError(
            f"scores are {scores.shape}: exclude_self needs the training images as queries, two or more"
        )
    return scores
