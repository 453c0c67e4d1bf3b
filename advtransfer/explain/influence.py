"""Which training images networks owe their answers to: a section that compares them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Int32

from advtransfer.analysis import influence, matches
from advtransfer.data import Split
from advtransfer.explain.case import Case, Subject, owns_classes, percent
from advtransfer.intervals import Share
from advtransfer.models import Model
from advtransfer.report.sections import (
    Axis,
    Matrix,
    Panel,
    PictureRow,
    Pictures,
    Plot,
    Section,
    Series,
    Table,
)
from advtransfer.transfer import Recipe, activations, fine_tune_one

SHOWN_QUERIES, SHOWN_RANKS = 4, 4
_LISTED = 5  # most helpful and most harmful images of every query in influence.csv
_NUM_RANKS = 100  # Utrera et al., 2021, figure 6
_DRAWN_RANKS = (1, 2, 3, 4, 5, 7, 10, 14, 20, 28, 40, 56, 75, 100)
_ORDERS = {"helpful": matches.most_helpful, "harmful": matches.most_harmful}


def influence_section(case: Case, recipe: Recipe) -> Section:
    """The most helpful and harmful training images, how often classes match, and the influence by class."""
    settings, names = case.settings, case.dataset.class_names
    chosen, indices = case.draw(settings.num_train, "train"), case.draw(settings.num_queries)
    train, queries = case.recorded("train", chosen), case.recorded(case.split, indices)
    labels = {"query": queries.labels, "train": train.labels}
    scores, rates, shares = {}, {}, {}  # by network and set of queries
    for subject in case.subjects:
        for kind, found in zip(labels, _scores(case, subject, train, queries, recipe), strict=True):
            key, given, itself = (subject.label, kind), (found, labels[kind], train.labels), kind == "train"
            scores[key] = found
            rates[key] = matches.match_rates(*given, num_ranks=_NUM_RANKS, exclude_self=itself)
            shares[key] = matches.match_shares(*given, exclude_self=itself)
    tested, trained = ({s.label: scores[s.label, kind] for s in case.subjects} for kind in labels)
    files = {
        "influence": _ranked(case, tested, train, queries, chosen, indices),
        "matches": [
            {
                "model": label,
                "queries": case.split if kind == "query" else "training images",
                "rank": rank,
                "match_rate": rate,
            }
            for (label, kind), found in rates.items()
            for rank, rate in enumerate(found.tolist(), start=1)
        ],
    }
    parts = [_query_pictures(case, tested, train, queries), _curves(case, rates, labels)]
    parts.append(_shares_table(case, shares))
    if not case.brief:
        maps = {
            label: matches.class_heat_map(found, queries.labels, train.labels, len(names))
            for label, found in tested.items()
        }
        caption = (
            f"Mean influence by class of the query ({case.split}, rows) and of the training image (columns): "
            "blue helps, orange harms; one scale per network, cut off at its 99th percentile."
        )
        parts.append(Matrix(caption, list(maps.items()), names, "influence_classes"))
        files |= {
            "influence_classes": _class_records(maps, names),
            "harmful": _harmful(trained, train.labels, names, chosen),
        }
    matching = (f"{s.label} {100 * shares[s.label, 'query']['top1'].value:.1f} %" for s in case.subjects)
    finding = (
        f"{case.split.capitalize()} images whose most helpful training image is of their class: "
        f"{', '.join(matching)} of {len(indices):,}."
    )
    return Section("Influence of training images", finding, parts, files)


def influence_cost(case: Case, subject: Subject) -> influence.Cost:
    """What one network's scores take."""
    settings, num_classes = case.settings, len(case.dataset.class_names)
    queries = settings.num_queries + settings.num_train
    width = subject.model.module.num_features
    return influence.cost(settings.num_train, queries, width, num_classes, solver=settings.solver)


def _scores(
    case: Case, subject: Subject, train: Split, queries: Split, recipe: Recipe
) -> Sequence[np.ndarray]:
    """Scores of the training images: for the queries, [Q, N], and for themselves, [N, N]."""
    settings, model = case.settings, subject.model
    if not owns_classes(model, case.dataset):
        names, key = case.dataset.class_names, jax.random.key(case.seed)
        model, _ = fine_tune_one(model, train, None, key=key, class_names=names, recipe=recipe)
    features = [_features(model, part.images, case.image_size) for part in (queries, train)]
    head = model.variables["params"]["fc"]
    try:
        scores = influence.last_layer_scores(
            features[1],
            train.labels,
            np.concatenate(features),
            np.concatenate([queries.labels, train.labels]),
            head["kernel"],
            head["bias"],
            solver=settings.solver,
            damping=settings.damping or None,
            rcond=settings.rcond,
            tell=lambda line: print(f"{subject.label}: {line}", flush=True),
        )
    except RuntimeError as error:
        raise ValueError(f"solver={settings.solver}: {error}") from error
    return np.split(scores, [len(queries.labels)])


def _features(model: Model, images: np.ndarray, size: int) -> np.ndarray:
    """The inputs of the head, float32 [N, D]."""
    return np.asarray(activations(model.module, model.variables, images, model.module.num_blocks, size))


def _ranked(
    case: Case,
    tested: dict[str, np.ndarray],
    train: Split,
    queries: Split,
    chosen: np.ndarray,
    indices: np.ndarray,
) -> list[dict]:
    """The most helpful and most harmful training images of every query from the split."""
    names = case.dataset.class_names
    return [
        {
            "model": label,
            "split": case.split,
            "query": int(indices[query]),
            "query_label": names[queries.labels[query]],
            "kind": kind,
            "rank": rank,
            "train_index": int(chosen[i]),
            "train_label": names[train.labels[i]],
            "score": float(scores[query, i]),
        }
        for label, scores in tested.items()
        for kind, order in _ORDERS.items()
        for query, ranked in enumerate(order(scores, _LISTED))
        for rank, i in enumerate(ranked.tolist(), start=1)
    ]


def _harmful(
    trained: dict[str, np.ndarray], labels: np.ndarray, names: Sequence[str], chosen: np.ndarray
) -> list[dict]:
    """`harmful_table` over the other training images, with indices into the dataset's training images."""
    records = []
    for label, scores in trained.items():
        table = matches.harmful_table(scores, labels, exclude_self=True)
        table |= {
            "index": chosen[table["index"]],
            "label": np.array(names)[table["label"]],
            "most_harmed": chosen[table["most_harmed"]],
        }
        for row in zip(*(column.tolist() for column in table.values()), strict=True):
            records.append({"model": label} | dict(zip(table, row, strict=True)))
    return records


def _class_records(maps: dict[str, np.ndarray], names: Sequence[str]) -> list[dict]:
    """Mean scores of pairs of classes; pairs without images are left out."""
    return [
        {"model": label, "query_class": a, "train_class": b, "mean_score": value}
        for label, values in maps.items()
        for a, row in zip(names, values.tolist(), strict=True)
        for b, value in zip(names, row, strict=True)
        if not math.isnan(value)
    ]


def _query_pictures(case: Case, tested: dict[str, np.ndarray], train: Split, queries: Split) -> Pictures:
    names, groups = case.dataset.class_names, []
    shown = 2 if case.brief else SHOWN_QUERIES
    for query, wanted in enumerate(queries.labels[:shown]):
        rows = []
        for label, scores in tested.items():
            one = scores[query : query + 1]
            ranked = np.concatenate([order(one, SHOWN_RANKS)[0] for order in _ORDERS.values()])
            marks = [f"{'✓' if y == wanted else '✗'} {names[y]}" for y in train.labels[ranked]]
            images = np.concatenate([queries.images[query : query + 1], train.images[ranked]])
            rows.append(PictureRow(label, images / np.float32(255), [names[wanted], *marks]))
        groups.append(rows)
    num_ranks = min(SHOWN_RANKS, len(train.labels))
    heads = ["Query"] + [f"{kind.capitalize()} {i + 1}" for kind in _ORDERS for i in range(num_ranks)]
    caption = (
        f"Images of {case.dataset.name} ({case.split}), and which of {len(train.labels):,} training images "
        f"lower (helpful) and raise their loss most (harmful). {_method(case)} ✓: same class."
    )
    return Pictures(caption, groups, "influence", heads)


def _method(case: Case) -> str:
    settings = case.settings
    damping = settings.damping or influence.WEIGHT_DECAY * settings.num_train
    how = {
        "damped": f"H with {damping:g} on its diagonal",
        "truncated": f"pseudo-inverse above {settings.rcond:g} of H’s largest eigenvalue",
        "cg": f"H with {damping:g} on its diagonal, conjugate gradients",
    }[settings.solver]
    new = [s.label for s in case.subjects if not owns_classes(s.model, case.dataset)]
    head = "each network’s own head"
    if new:
        whom = "all" if len(new) == len(case.subjects) else ", ".join(new)
        head = f"a new head, trained on these images, for {whom}"
    return f"Influence through the head ({head}): {how}, H the Hessian of the summed training loss."


def _curves(
    case: Case, rates: dict[tuple[str, str], np.ndarray], labels: dict[str, Int32[np.ndarray, " n"]]
) -> Plot:
    panels = []
    for kind, title in (("query", f"Queries: {case.split} images"), ("train", "Queries: training images")):
        series = []
        for subject in case.subjects:
            y = rates[subject.label, kind].tolist()
            x = [rank for rank in _DRAWN_RANKS if rank <= len(y)]
            series.append(Series(subject.style, x, [y[rank - 1] for rank in x], [math.nan] * len(x)))
        axis = Axis("rank of the training image", log=True)
        panels.append(Panel(title, "Same class, %", axis, series))
    chance = np.mean(labels["query"][:, None] == labels["train"])
    caption = (
        "Share of queries with the class of their training image of this rank, most helpful first: "
        f"{len(labels['query']):,} {case.split} images, and the {len(labels['train']):,} training images, "
        f"without themselves. Chance: {100 * chance:.1f} %."
    )
    return Plot(caption, panels, "matches")


def _shares_table(case: Case, shares: dict[tuple[str, str], dict[str, Share]]) -> Table:
    rows = []
    for subject in case.subjects:
        found = [share for kind in ("query", "train") for share in shares[subject.label, kind].values()]
        rows.append([subject.label, *map(percent, found)])
    heads = ["Network"]
    for kind in (case.split, "training"):
        heads += [f"{kind}: most helpful, %", f"{kind}: three of five, %"]
    caption = (
        "Queries with the class of their most helpful training image, and of at least three of the five most "
        "helpful; 95 % intervals (Wilson) over queries, for this head and training set."
    )
    return Table(caption, heads, rows, "matches")
