"""What networks look at in an image: gradients, SmoothGrad, integrated gradients."""

from __future__ import annotations

import jax
import numpy as np
from jaxtyping import Float

from advtransfer.analysis import saliency
from advtransfer.attacks.network import LogitsFn
from advtransfer.evaluate import predict
from advtransfer.explain.case import Case, class_name, column, owns_classes
from advtransfer.intervals import mean_and_ci95
from advtransfer.models import logits_fn
from advtransfer.report.sections import PictureRow, Pictures, Section, Table


def saliency_section(case: Case) -> Section:
    """Gradients, SmoothGrad and integrated gradients of a few images; two statistics of more of them."""
    import pandas as pd

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
        columns = {
            "model": subject.label,
            "dataset": case.dataset.name,
            "split": case.split,
            "index": indices,
            "label": names,
            "predicted": read,
            "low_frequency_share": saliency.low_frequency_share(values),
            "alignment": saliency.alignment(values, images),
            "completeness_error": errors,
        }
        records += pd.DataFrame(columns).to_dict("records")
    parts = [Pictures(_caption(case, worst), groups, "saliency"), _table(case, records)]
    return Section("Saliency", _finding(case, records), parts, {"saliency": records})


def _read(read: list[str], names: list[str], own: bool) -> list[str]:
    """The predictions, marked where they can be right or wrong."""
    return [f"{'✓ ' if a == b else '✗ '}{a}" if own else a for a, b in zip(read, names, strict=False)]


def _more(
    case: Case, network: LogitsFn, images: np.ndarray, labels: np.ndarray
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


def _caption(case: Case, worst: float) -> str:
    settings = case.settings
    foreign = [s.label for s in case.subjects if not owns_classes(s.model, case.dataset)]
    explained = "label"
    if foreign:
        explained = f"label (prediction for {', '.join(foreign)}, which have other classes)"
        explained = explained if len(foreign) < len(case.subjects) else "predicted class"
    more = ""
    if not case.brief:
        baseline = "black" if settings.baseline == 0 else f"grey {settings.baseline:g}"
        more = (
            f" SmoothGrad: mean over {settings.smooth_samples} copies with noise of "
            f"{settings.smooth_noise:g} of the image’s range. Integrated gradients: from {baseline}, at most "
            f"{settings.integration_steps:,} steps, completeness error at most {worst:.1g}."
        )
    return (
        f"Gradients of the loss of the {explained} with respect to the pixels, on {case.dataset.name} "
        f"({case.split}). Grey is zero; cut off at three standard deviations. Below a gradient: the "
        f"prediction.{more}"
    )


def _table(case: Case, records: list[dict]) -> Table:
    rows, natural = [], (s for s in case.subjects if s.model.spec.norm == "none")
    base = next(natural, case.subjects[0]).label
    for label in (subject.label for subject in case.subjects):
        texts = [label]
        for name, scale, digits in (("low_frequency_share", 100, 1), ("alignment", 1, 3)):
            values = scale * column(records, label, name)
            difference = values - scale * column(records, base, name)
            texts.append(plus_minus(values, digits))
            texts.append("–" if label == base else plus_minus(difference, digits, sign="+"))
        rows.append(texts)
    number = len(records) // len(case.subjects)
    caption = (
        f"Gradients of {number:,} images of {case.dataset.name} ({case.split}), mean ± 95 % interval over "
        "images. Low frequencies: share of the energy up to a quarter of the Nyquist frequency (white noise: "
        f"{100 * _white(case.image_size):.1f} %). Alignment: |cosine| of image and gradient. Differences: to "
        f"{base}, paired by image."
    )
    heads = ["Network", "Low frequencies, %", "difference", "Alignment", "difference"]
    return Table(caption, heads, rows, "saliency")


def plus_minus(values: Float[np.ndarray, " n"], digits: int, *, sign: str = "") -> str:
    mean, half = mean_and_ci95(values)
    text = f"{mean:{sign}.{digits}f}".replace("-", "−")
    return text if np.isnan(half) else f"{text} ± {half:.{digits}f}"


def _white(size: int) -> float:
    """The low-frequency share of white noise: that of a single bright pixel, whose spectrum is flat."""
    pixel = np.zeros((1, size, size, 1))
    pixel[0, 0, 0, 0] = 1
    return float(saliency.low_frequency_share(pixel)[0])


def _finding(case: Case, records: list[dict]) -> str:
    shares = (
        f"{s.label} {100 * column(records, s.label, 'low_frequency_share').mean():.1f} %"
        for s in case.subjects
    )
    return (
        f"Share of the gradients’ energy at low frequencies: {', '.join(shares)}; white noise: "
        f"{100 * _white(case.image_size):.1f} %."
    )
