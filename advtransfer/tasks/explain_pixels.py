"""What networks look at in an image, and what they make of one: sections of a page, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from advtransfer.analysis import saliency, visualise
from advtransfer.attacks import L2
from advtransfer.data import Dataset, subset_indices, to_float
from advtransfer.evaluate import predict
from advtransfer.explain import Interpretation
from advtransfer.models import Model, logits_fn
from advtransfer.report.intervals import mean_and_ci95
from advtransfer.report.sections import PictureRow, Pictures, Section, Style, Table


class Subject(NamedTuple):
    """A network that is looked into, and how it is shown."""

    style: Style
    model: Model

    @property
    def label(self) -> str:
        return self.style.label


class Case(NamedTuple):
    """Networks of one image size, and the images that they are shown."""

    subjects: Sequence[Subject]
    dataset: Dataset
    split: str
    settings: Interpretation
    seed: int
    brief: bool = False  # the most telling pictures alone

    @property
    def image_size(self) -> int:
        return self.subjects[0].model.spec.image_size

    def draw(self, number: int) -> np.ndarray:
        """int32 [number], images of the split, stratified; a smaller number's come first."""
        labels = getattr(self.dataset, self.split).labels
        return subset_indices(labels, number, dataset=self.dataset.name, seed=self.seed)

    def images(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """float32 [N, H, W, 3] of the networks' size, and labels [N]."""
        images, labels = (array[indices] for array in getattr(self.dataset, self.split))
        return np.asarray(to_float(jnp.asarray(images), self.image_size)), labels


def owns_classes(model: Model, dataset: Dataset) -> bool:
    """Whether the model's outputs are the dataset's classes: by name, or by number where it has no names."""
    if not model.spec.has_head:
        return False
    if model.spec.class_names:
        return tuple(model.spec.class_names) == tuple(dataset.class_names)
    return model.spec.num_classes == len(dataset.class_names)


def class_name(model: Model, index: int) -> str:
    names = model.spec.class_names
    return names[index] if names else f"class {index}"


def saliency_section(case: Case) -> Section:
    """Gradients, SmoothGrad and integrated gradients of a few images; two numbers about more of them."""
    settings, shown = case.settings, case.settings.num_images
    indices = case.draw(max(settings.num_measured, shown))
    images, labels = case.images(indices)
    names = [case.dataset.class_names[i] for i in labels]
    groups, records, worst = [[PictureRow("Image", images[:shown], names[:shown])]], [], 0.0
    for subject in case.subjects:
        network = logits_fn(subject.model)
        predicted = predict(network, images).argmax(axis=-1)
        own = owns_classes(subject.model, case.dataset)
        explained = labels if own else predicted
        read = [class_name(subject.model, i) for i in predicted]
        values = saliency.gradients(network, images, explained)
        pictures = saliency.to_picture(values[:shown])
        group = [PictureRow(f"{subject.label}: gradient", pictures, _read(read[:shown], names, own))]
        errors = [""] * len(images)
        if not case.brief:
            smooth, found = _more(case, network, images[:shown], explained[:shown])
            group.append(PictureRow(f"{subject.label}: SmoothGrad", saliency.to_picture(smooth)))
            group.append(PictureRow(f"{subject.label}: integrated", saliency.to_picture(found.attributions)))
            errors[:shown], worst = found.errors.tolist(), max(worst, float(found.errors.max()))
        groups.append(group)
        numbers = (saliency.low_frequency_share(values), saliency.alignment(values, images))
        columns = (indices, names, read, *numbers, errors)
        records += [
            dict(zip(_SALIENCY, (subject.label, case.dataset.name, case.split, *row), strict=True))
            for row in zip(*(np.asarray(x).tolist() for x in columns), strict=True)
        ]
    parts = [Pictures(_saliency_caption(case, worst), groups, "saliency"), _saliency_table(case, records)]
    return Section("Saliency", _saliency_finding(case, records), parts, {"saliency": records})


_SALIENCY = (
    "model",
    "dataset",
    "split",
    "index",
    "label",
    "predicted",
    "low_frequency_share",
    "alignment",
    "completeness_error",
)


def _read(read: list[str], names: list[str], own: bool) -> list[str]:
    """What the network reads, with a mark where that can be right or wrong."""
    return [f"{'✓ ' if a == b else '✗ '}{a}" if own else a for a, b in zip(read, names, strict=False)]


def _more(
    case: Case, network: Any, images: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, saliency.IntegratedGradients]:
    """SmoothGrad and integrated gradients."""
    settings, most = case.settings, case.settings.integration_steps
    smooth = saliency.smooth_grad(
        network,
        images,
        labels,
        key=jax.random.key(case.seed),
        num_samples=settings.smooth_samples,
        noise=settings.smooth_noise,
    )
    return smooth, saliency.integrated_gradients(
        network, images, labels, baseline=settings.baseline, num_steps=min(256, most), max_steps=most
    )


def _saliency_caption(case: Case, worst: float) -> str:
    settings = case.settings
    foreign = [s.label for s in case.subjects if not owns_classes(s.model, case.dataset)]
    explained = "of each image’s own label"
    if foreign:
        explained = f"of the label, or where the classes are others ({', '.join(foreign)}) of the class read"
        explained = explained if len(foreign) < len(case.subjects) else "of the class that the network reads"
    more = ""
    if not case.brief:
        baseline = "black" if settings.baseline == 0 else f"grey {settings.baseline:g}"
        more = (
            f" SmoothGrad: mean over {settings.smooth_samples} copies with noise of "
            f"{settings.smooth_noise:g} of the image’s range. Integrated: along the way from {baseline}, in "
            f"at most {settings.integration_steps:,} steps; the sums miss the change of the loss by at most "
            f"{worst:.1g} of it."
        )
    return (
        f"Gradients of the loss {explained}, with respect to the pixels; images of {case.dataset.name} "
        f"({case.split}). Grey is zero, and each picture is cut off at three standard deviations. Under "
        f"a gradient: what the network reads.{more}"
    )


def _reference(case: Case) -> Subject:
    """The network that others are compared with: the first natural one, or the first."""
    return next((s for s in case.subjects if s.model.spec.norm == "none"), case.subjects[0])


def _column(records: list[dict], label: str, name: str) -> np.ndarray:
    return np.array([record[name] for record in records if record["model"] == label])


def _saliency_table(case: Case, records: list[dict]) -> Table:
    base, rows, white = _reference(case).label, [], 100 * _white(case.image_size)
    for label in (subject.label for subject in case.subjects):
        texts = [label]
        for name, scale, digits in (("low_frequency_share", 100, 1), ("alignment", 1, 3)):
            values = scale * _column(records, label, name)
            difference = values - scale * _column(records, base, name)
            texts.append(plus_minus(values, digits))
            texts.append("–" if label == base else plus_minus(difference, digits, sign="+"))
        rows.append(texts)
    number = len(records) // len(case.subjects)
    caption = (
        f"The plain gradients of {number:,} images of {case.dataset.name} ({case.split}), mean ± 95 % "
        "interval (Student’s t over images). Low frequencies: share of a gradient’s energy at or below a "
        f"quarter of the Nyquist frequency, in %; white noise has {white:.1f}. Alignment: |cosine| "
        f"between image and gradient. Differences are to {base}, paired by image."
    )
    heads = ["Network", "Low frequencies, %", "difference", "Alignment", "difference"]
    return Table(caption, heads, rows, "saliency")


def plus_minus(values: np.ndarray, digits: int, *, sign: str = "") -> str:
    mean, half = mean_and_ci95(values)
    text = f"{mean:{sign}.{digits}f}".replace("-", "−")
    return text if np.isnan(half) else f"{text} ± {half:.{digits}f}"


def _white(size: int) -> float:
    """The share of low frequencies among all: a single bright pixel has every frequency alike."""
    pixel = np.zeros((1, size, size, 1))
    pixel[0, 0, 0, 0] = 1
    return float(saliency.low_frequency_share(pixel)[0])


def _saliency_finding(case: Case, records: list[dict]) -> str:
    shares = (
        f"{s.label} {100 * _column(records, s.label, 'low_frequency_share').mean():.1f} %"
        for s in case.subjects
    )
    return (
        f"Share of the gradients’ energy at low frequencies: {', '.join(shares)}; of white noise it is "
        f"{100 * _white(case.image_size):.1f} %."
    )


def visualisation_section(case: Case) -> Section:
    """Images that maximise a class or a unit, from noise and from images, and images read back."""
    settings, number = case.settings, case.settings.num_images
    indices = case.draw(number)
    images, _ = case.images(indices)
    shape = (number, case.image_size, case.image_size, 3)
    starts = {"noise": np.asarray(visualise.noise(jax.random.key(case.seed), shape))}
    if not case.brief:
        starts["image"] = images
    groups = {
        (kind, start): [PictureRow(f"Start: {start}", x)] for kind in _KINDS for start, x in starts.items()
    }
    inverted, records = [PictureRow("Image", images)], []
    for subject in case.subjects:
        model = subject.model
        for kind in _KINDS if not case.brief else _KINDS[:1]:
            chosen = _chosen(model, kind, number)
            tiled, start = np.tile(chosen, len(starts)), np.concatenate([*starts.values()])
            found = _climb(_KIND_OBJECTIVES[kind](model, tiled), start, settings)
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
        for kind in (_KINDS if not case.brief else _KINDS[:1])
    ]
    if not case.brief:
        parts.append(Pictures(_inversion_caption(case), [inverted], "visualisation"))
    finding = _visualisation_finding(case, records)
    return Section("Feature visualisation", finding, parts, {"visualisation": records})


_KINDS = ("class", "unit")
_KIND_OBJECTIVES = {
    "class": visualise.logit,
    "unit": lambda model, channels: visualise.unit(model, model.module.num_blocks - 1, channels),
}


class Climbed(NamedTuple):
    """What `visualise` made of N starts, and the objective there before and after."""

    images: np.ndarray  # float32 [N, H, W, 3]
    before: np.ndarray  # float32 [N]
    after: np.ndarray


def _chosen(model: Model, kind: str, number: int) -> np.ndarray:
    """The first classes, or units spread evenly over the representation; repeated where there are fewer."""
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
    what = (
        "the logit of a class"
        if kind == "class"
        else "one component of the pooled representation (units spread evenly over it)"
    )
    begin = "noise, N(0.5, 1/20)" if case.brief else "noise, N(0.5, 1/20), and from images of the data"
    return (
        f"Images that raise {what}, from {begin}: projected gradient ascent, {_how(case)}; gradients pass "
        "the last ReLU as if it were the identity. Under a picture: what is raised, its value at the "
        "start→end; different networks have no common scale."
    )


def _inversion_caption(case: Case) -> str:
    return (
        "Inversion: from noise towards the pooled representation of the image above, "
        f"{_how(case)}. Under a picture: distance of the representations, in % of the image’s own length."
    )


def _visualisation_finding(case: Case, records: list[dict]) -> str:
    if case.brief:
        return "What each network would most like to see of a class, drawn by gradient ascent from noise."
    rows = [record for record in records if record["kind"] == "inversion"]
    distances = (f"{s.label} {100 * _column(rows, s.label, 'after').mean():.0f} %" for s in case.subjects)
    return (
        "Pictures made from noise to have an image’s representation miss it by a mean distance of: "
        f"{', '.join(distances)}. Whether they look like the image is for the eye."
    )
