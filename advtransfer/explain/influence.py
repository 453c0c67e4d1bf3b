"""Which training images networks owe their answers to: a section that compares them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from advtransfer.analysis import influence, matches
from advtransfer.data import Split
from advtransfer.explain.case import Case, Subject, owns_classes
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


class _Influence(NamedTuple):
    """Scores of the training images, for one network."""

    scores: dict[str, np.ndarray]  # by set of queries, "test" and "train": [Q, N]
    queries: dict[str, np.ndarray]  # labels
    labels: np.ndarray  # of the training images
    own: bool  # of the network's own head; otherwise of one that was trained for this


def influence_section(case: Case, recipe: Recipe) -> Section:
    """The most helpful and harmful training images, how often classes match, and the influence by class."""
    settings, dataset = case.settings, case.dataset
    chosen, indices = case.draw(settings.num_train, "train"), case.draw(settings.num_queries)
    train = case.recorded("train", chosen)
    queries = case.recorded(case.split, indices)
    found = {s.label: _influence(case, s, train, queries, recipe) for s in case.subjects}
    names = dataset.class_names
    rates = [
        {"model": label, "queries": kind, "rank": rank, "match_rate": rate}
        for label, result in found.items()
        for kind, scores in result.scores.items()
        for rank, rate in enumerate(_rates(result, kind, scores).tolist(), start=1)
    ]
    shares = {
        (label, kind): matches.match_shares(
            scores, result.queries[kind], result.labels, exclude_self=kind == "train"
        )
        for label, result in found.items()
        for kind, scores in result.scores.items()
    }
    files = {
        "influence": [
            row for label, x in found.items() for row in _ranked(label, x, names, case.split, indices, chosen)
        ],
        "matches": rates,
    }
    parts = [_query_pictures(case, found, train, queries), _curves(case, found, rates)]
    parts.append(_shares_table(case, found, shares))
    if not case.brief:
        maps = {
            label: matches.class_heat_map(x.scores["test"], x.queries["test"], x.labels, len(names))
            for label, x in found.items()
        }
        parts.append(Matrix(_heat_caption(case), list(maps.items()), names, "influence_classes"))
        files |= {
            "influence_classes": _class_records(maps, names),
            "harmful": _harmful(found, names, chosen),
        }
    matching = (f"{s.label} {100 * shares[s.label, 'test']['top1'][0]:.1f} %" for s in case.subjects)
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


def _influence(case: Case, subject: Subject, train: Split, queries: Split, recipe: Recipe) -> _Influence:
    settings, model = case.settings, subject.model
    own = owns_classes(model, case.dataset)
    if not own:
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
    scores = dict(zip(("test", "train"), np.split(scores, [len(queries.labels)]), strict=True))
    return _Influence(scores, {"test": queries.labels, "train": train.labels}, train.labels, own)


def _features(model: Model, images: np.ndarray, size: int) -> np.ndarray:
    """The inputs of the head, float32 [N, D]."""
    return np.asarray(activations(model.module, model.variables, images, model.module.num_blocks, size))


def _rates(result: _Influence, kind: str, scores: np.ndarray) -> np.ndarray:
    options = {"num_ranks": _NUM_RANKS, "exclude_self": kind == "train"}
    return matches.match_rates(scores, result.queries[kind], result.labels, **options)


def _ranked(
    label: str, result: _Influence, names: Sequence[str], split: str, indices: np.ndarray, chosen: np.ndarray
) -> list[dict]:
    """The most helpful and most harmful training images of every query from the split."""
    scores, records = result.scores["test"], []
    for kind, rank_them in (("helpful", matches.most_helpful), ("harmful", matches.most_harmful)):
        for query, ranked in enumerate(rank_them(scores, _LISTED)):
            records += [
                {
                    "model": label,
                    "split": split,
                    "query": int(indices[query]),
                    "query_label": names[result.queries["test"][query]],
                    "kind": kind,
                    "rank": rank,
                    "train_index": int(chosen[i]),
                    "train_label": names[result.labels[i]],
                    "score": float(scores[query, i]),
                }
                for rank, i in enumerate(ranked.tolist(), start=1)
            ]
    return records


def _harmful(found: dict[str, _Influence], names: Sequence[str], chosen: np.ndarray) -> list[dict]:
    """`harmful_table` over the other training images, with indices into the dataset's training images."""
    records = []
    for label, result in found.items():
        table = matches.harmful_table(result.scores["train"], result.labels, exclude_self=True)
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


def _query_pictures(case: Case, found: dict[str, _Influence], train: Split, queries: Split) -> Pictures:
    names, groups = case.dataset.class_names, []
    shown = 2 if case.brief else SHOWN_QUERIES
    for query in range(min(shown, len(queries.labels))):
        rows = []
        for label, result in found.items():
            scores = result.scores["test"][query : query + 1]
            ranked = np.concatenate(
                [order(scores, SHOWN_RANKS)[0] for order in (matches.most_helpful, matches.most_harmful)]
            )
            wanted = queries.labels[query]
            marks = [f"{'✓' if y == wanted else '✗'} {names[y]}" for y in train.labels[ranked]]
            images = np.concatenate([queries.images[query : query + 1], train.images[ranked]])
            rows.append(PictureRow(label, images / np.float32(255), [names[wanted], *marks]))
        groups.append(rows)
    num_ranks = min(SHOWN_RANKS, len(train.labels))
    heads = ["Query"] + [f"{kind} {i + 1}" for kind in ("Helpful", "Harmful") for i in range(num_ranks)]
    caption = (
        f"Images of {case.dataset.name} ({case.split}), and which of {len(train.labels):,} training images "
        f"lower (helpful) and raise their loss most (harmful). {_method(case, found)} ✓: same class."
    )
    return Pictures(caption, groups, "influence", heads)


def _method(case: Case, found: dict[str, _Influence]) -> str:
    settings = case.settings
    damping = settings.damping or influence.WEIGHT_DECAY * settings.num_train
    how = {
        "damped": f"H with {damping:g} on its diagonal",
        "truncated": f"pseudo-inverse above {settings.rcond:g} of H’s largest eigenvalue",
        "cg": f"H with {damping:g} on its diagonal, conjugate gradients",
    }[settings.solver]
    new = [label for label, result in found.items() if not result.own]
    head = "each network’s own head"
    if new:
        head = (
            f"a new head, trained on these images, for {'all' if len(new) == len(found) else ', '.join(new)}"
        )
    return f"Influence through the head ({head}): {how}, H the Hessian of the summed training loss."


def _curves(case: Case, found: dict[str, _Influence], rates: list[dict]) -> Plot:
    panels = []
    for kind, title in (("test", f"Queries: {case.split} images"), ("train", "Queries: training images")):
        series = []
        for subject in case.subjects:
            y = [r["match_rate"] for r in rates if (r["model"], r["queries"]) == (subject.label, kind)]
            x = [rank for rank in _DRAWN_RANKS if rank <= len(y)]
            series.append(Series(subject.style, x, [y[rank - 1] for rank in x], [math.nan] * len(x)))
        axis = Axis("rank of the training image", log=True)
        panels.append(Panel(title, "Same class, %", axis, series))
    result = next(iter(found.values()))
    chance = np.mean(result.queries["test"][:, None] == result.labels[None])
    caption = (
        "Share of queries with the class of their training image of this rank, most helpful first: "
        f"{len(result.queries['test']):,} {case.split} images, and the {len(result.labels):,} training "
        f"images, without themselves. Chance: {100 * chance:.1f} %."
    )
    return Plot(caption, panels, "matches")


def _shares_table(
    case: Case, found: dict[str, _Influence], shares: dict[tuple[str, str], dict[str, Share]]
) -> Table:
    rows = []
    for label in found:
        texts = [label]
        for kind in ("test", "train"):
            for name in ("top1", "three_of_five"):
                value, low, high = (100 * float(x) for x in shares[label, kind][name][:3])
                texts.append(f"{value:.1f} ({low:.1f} … {high:.1f})")
        rows.append(texts)
    heads = ["Network"]
    for kind in (case.split, "training"):
        heads += [f"{kind}: most helpful, %", f"{kind}: three of five, %"]
    caption = (
        "Queries with the class of their most helpful training image, and of at least three of the five most "
        "helpful; 95 % intervals (Wilson) over queries, for this head and training set."
    )
    return Table(caption, heads, rows, "matches")


def _heat_caption(case: Case) -> str:
    return (
        f"Mean influence by class of the query ({case.split}, rows) and of the training image (columns): "
        "blue helps, orange harms; one scale per network, cut off at its 99th percentile."
    )
