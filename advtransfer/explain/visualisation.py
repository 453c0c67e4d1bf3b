"""Feature visualisation and inversion: a section that compares networks."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from advtransfer.analysis import visualise
from advtransfer.attacks import L2
from advtransfer.evaluate import predict
from advtransfer.explain.case import Case, class_name, column
from advtransfer.explain.options import Interpretation
from advtransfer.models import Model
from advtransfer.report.sections import PictureRow, Pictures, Section


def visualisation_section(case: Case) -> Section:
    """Images that maximise a class or a unit, from noise and from images, and inverted representations."""
    settings, number = case.settings, case.settings.num_images
    indices = case.draw(number)
    images, _ = case.images(indices)
    shape = (number, case.image_size, case.image_size, 3)
    starts = {"noise": np.asarray(visualise.noise(jax.random.key(case.seed), shape))}
    starts |= {} if case.brief else {"image": images}
    kinds = ("class",) if case.brief else ("class", "unit")
    groups = {
        (kind, start): [PictureRow(f"Start: {start}", x)] for kind in kinds for start, x in starts.items()
    }
    inverted, records = [PictureRow("Image", images)], []
    for subject in case.subjects:
        model = subject.model
        for kind in kinds:
            chosen = _chosen(model, kind, number)
            tiled, start = np.tile(chosen, len(starts)), np.concatenate([*starts.values()])
            found = _climb(_OBJECTIVES[kind](model, tiled), start, settings)
            for i, name in enumerate(starts):
                part = Climbed(*(x[i * number : (i + 1) * number] for x in found))
                what = [class_name(model, c) if kind == "class" else f"unit {c}" for c in chosen]
                labels = [
                    f"{w}: {a:.1f}→{b:.1f}".replace("-", "−")
                    for w, a, b in zip(what, part.before, part.after, strict=True)
                ]
                groups[kind, name].append(PictureRow(subject.label, part.images, labels))
                records += _records(subject.label, kind, name, what, part)
        if not case.brief:
            top = visualise.features_fn(model, model.module.num_blocks)
            objective = visualise.match(top, top(jnp.asarray(images)))
            found = _climb(objective, starts["noise"], settings)
            found = found._replace(before=np.sqrt(-found.before), after=np.sqrt(np.maximum(-found.after, 0)))
            inverted.append(
                PictureRow(subject.label, found.images, [f"{100 * x:.1f} %" for x in found.after])
            )
            what = [f"image {i}" for i in indices]
            records += _records(subject.label, "inversion", "noise", what, found)
    parts = [
        Pictures(_climb_caption(case, kind), [groups[kind, start] for start in starts], "visualisation")
        for kind in kinds
    ]
    if not case.brief:
        parts.append(Pictures(_inversion_caption(case), [inverted], "visualisation"))
    return Section("Feature visualisation", _finding(case, records), parts, {"visualisation": records})


_OBJECTIVES = {
    "class": visualise.logit,
    "unit": lambda model, channels: visualise.unit(model, model.module.num_blocks - 1, channels),
}


class Climbed(NamedTuple):
    """Results of `visualise` from N starts, and the objective before and after."""

    images: Float32[np.ndarray, "n h w 3"]
    before: Float32[np.ndarray, " n"]
    after: Float32[np.ndarray, " n"]


def _chosen(model: Model, kind: str, number: int) -> np.ndarray:
    """The first classes, repeated if there are fewer, or units spread evenly over the representation."""
    if kind == "class":
        return np.arange(number) % model.spec.num_classes
    return np.linspace(0, model.module.num_features - 1, number).round().astype(int)


def _climb(objective: visualise.Objective, start: np.ndarray, settings: Interpretation) -> Climbed:
    def values(images):
        scores = np.asarray(predict(objective.scores_fn, images, batch_size=len(images)))
        return scores[np.arange(len(images)), objective.chosen]

    images = visualise.visualise(
        objective,
        start,
        threat_model=L2(settings.eps),
        step_size=settings.step_size,
        num_steps=settings.num_steps,
        parameterisation=settings.parameterisation,
    )
    return Climbed(np.asarray(images), values(start), values(images))


def _records(label: str, kind: str, start: str, what: list[str], found: Climbed) -> list[dict]:
    return [
        {"model": label, "kind": kind, "start": start, "what": w, "before": float(a), "after": float(b)}
        for w, a, b in zip(what, found.before, found.after, strict=True)
    ]


def _how(case: Case) -> str:
    settings = case.settings
    where = "Fourier coordinates" if settings.parameterisation == "fourier" else "pixels"
    return (
        f"{settings.num_steps:,} steps of length {settings.step_size:g} in {where}, within an ℓ2 ball of "
        f"radius {settings.eps:g} and [0, 1]"
    )


def _climb_caption(case: Case, kind: str) -> str:
    what = "the logit of a class" if kind == "class" else "one unit of the pooled representation"
    begin = "noise, N(0.5, 1/20)" if case.brief else "noise, N(0.5, 1/20), and from images"
    return (
        f"Images that raise {what}, from {begin}: projected gradient ascent, {_how(case)}; the last ReLU "
        "passes all gradients. Below: value before→after, on each network’s own scale."
    )


def _inversion_caption(case: Case) -> str:
    return (
        f"Inversion: from noise to the pooled representation of the image above, {_how(case)}. Below: "
        "distance of the representations, in % of the image’s norm."
    )


def _finding(case: Case, records: list[dict]) -> str:
    if case.brief:
        return "Images that raise the logit of a class, by gradient ascent from noise."
    rows = [record for record in records if record["kind"] == "inversion"]
    distances = (f"{s.label} {100 * column(rows, s.label, 'after').mean():.0f} %" for s in case.subjects)
    return (
        f"Mean distance of inverted representations from the image’s: {', '.join(distances)}. Whether the "
        "pictures look alike is for the eye."
    )
