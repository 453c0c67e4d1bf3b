"""What a report shows beside the rows: the source networks, adversarial examples, target images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from advtransfer.report import figures
from advtransfer.report.interpretation import Drawn
from advtransfer.report.markup import image, numbers_link, picture_row, scrolling, table, th
from advtransfer.report.plots import Material, add_numbers
from advtransfer.report.summary import Source

MAX_PICTURES = 8
_EMPTY: Mapping[str, Any] = MappingProxyType({})
_KINDS = ("natural", "adversarial")


class Evidence(NamedTuple):
    """What a report shows beside the rows; any part may be empty, and the report then says so.

    Attributes:
      sources: one dict per source network: its `name` (as in the rows) and any of `norm`, `eps`,
        `natural_accuracy` and `adversarial_accuracy` (in [0, 1]), `num_images` (measured on),
        `attack` (in words).
      pictures: `source_images` [M, H, W, 3] in [0, 1]; `adversarial/NAME` [M, H, W, 3], the same images
        attacked against the source NAME; `target_images` [L, h, w, 3]. The first eight of each are shown.
      captions: lists of str that go with them: `source_labels`, `natural_predictions/NAME`,
        `adversarial_predictions/NAME`, `target_labels`.
      config: the run's configuration; `versions`: package -> version.
      command: what to type to get this report again.
      remarks: sentences that the reader should know, such as how ε and the epochs were chosen.
      sections: what the source networks look at.
    """

    sources: Sequence[Mapping[str, Any]] = ()
    pictures: Mapping[str, np.ndarray] = _EMPTY
    captions: Mapping[str, Sequence[str]] = _EMPTY
    config: Mapping[str, Any] = _EMPTY
    versions: Mapping[str, str] = _EMPTY
    command: str = ""
    remarks: Sequence[str] = ()
    sections: Sequence[Drawn] = ()


def source_of(entry: Mapping[str, Any]) -> Source:
    norm = str(entry.get("norm") or "none")
    eps = entry.get("eps")
    return Source(str(entry.get("name", "unnamed")), norm, math.nan if eps is None else float(eps))


def sources_section(material: Material, known: Mapping[str, Source], evidence: Evidence) -> str:
    if not known:
        return ""
    entries = {str(entry.get("name", "unnamed")): entry for entry in evidence.sources}
    parts = ["<h2>The source networks</h2>"]
    measured = [
        (material.styles[name].label, *(_number(entry.get(f"{kind}_accuracy")) for kind in _KINDS))
        for name, entry in entries.items()
    ]
    measured = [row for row in measured if not all(map(math.isnan, row[1:]))]
    if measured:
        svg = figures.dumbbell_panel(measured, title="Natural and adversarial accuracy")
        material.files["figures/source_accuracy.svg"] = svg
        columns = ("source", "natural_accuracy", "adversarial_accuracy")
        records = [dict(zip(columns, row, strict=True)) for row in measured]
        add_numbers(material, "source_accuracy", records, columns)
        told = "; ".join(f"{a}: natural {_percent(b)}, adversarial {_percent(c)}" for a, b, c in measured)
        caption = (
            "What robustness costs and buys on the sources’ own task. Circle: accuracy on clean "
            "test images; diamond: on adversarial examples of them, by the attack named in the table."
        )
        parts.append(
            f"<figure class=plot><div class=panels>{image(svg, 'svg+xml', told)}</div>"
            f"<figcaption>{caption} {numbers_link('source_accuracy')}</figcaption></figure>"
        )
    else:
        parts.append("<p class=caveat>The sources’ own accuracies were not measured in this run.</p>")
    rows = [_source_row(source, entries.get(name, {})) for name, source in known.items()]
    heads = ["Source", "Trained against", "Natural, %", "Adversarial, %", "Images", "Attack"]
    parts.append(table(heads, [rows], "The source networks.", classes="words"))
    return "\n".join(parts)


def _source_row(source: Source, entry: Mapping[str, Any]) -> list[str]:
    threat = "nothing" if source.norm == "none" else source.constraint
    texts = [
        threat,
        *(_percent(_number(entry.get(f"{kind}_accuracy"))) for kind in _KINDS),
        f"{entry['num_images']:,}" if entry.get("num_images") else "–",
        str(entry.get("attack") or "–"),
    ]
    return [th(escape(source.name), "row"), *(f"<td>{escape(text)}</td>" for text in texts)]


def pictures_section(material: Material, evidence: Evidence) -> str:
    parts = [_adversarial_examples(material, evidence), _target_images(evidence)]
    if not any(parts):
        return "<h2>Pictures</h2>\n<p class=caveat>No pictures were handed to this report.</p>"
    return "<h2>Pictures</h2>\n" + "\n".join(filter(None, parts))


def _adversarial_examples(material: Material, evidence: Evidence) -> str:
    """Source images above adversarial examples of them and the magnified differences, image by image."""
    clean = _images(evidence, "source_images")
    prefix = "adversarial/"
    attacked = {
        name.removeprefix(prefix): _images(evidence, name)
        for name in evidence.pictures
        if name.startswith(prefix)
    }
    if not len(clean):
        return ""
    for name, images in attacked.items():
        if images.shape != clean.shape:
            raise ValueError(
                f"pictures[{prefix + name!r}] has shape {images.shape}, but source_images has {clean.shape}"
            )
    gain = figures.difference_gain((images, clean) for images in attacked.values())
    labels = _texts(evidence, "source_labels", len(clean))
    rows = [picture_row("Source image", clean, [escape(label) for label in labels])]
    for name, images in attacked.items():
        label = material.styles[name].label if name in material.styles else name
        before = _texts(evidence, f"natural_predictions/{name}", len(clean))
        after = _texts(evidence, f"adversarial_predictions/{name}", len(clean))
        read = list(map(_reading, labels, before, after))
        rows.append(picture_row(f"{label}: adversarial", images, read, "first"))
        difference = 0.5 + gain * (images - clean)
        rows.append(picture_row(f"{label}: difference × {gain}", difference, [""] * len(clean)))
    caption = "Images of the source task, as the networks see them."
    if attacked:
        caption = (
            "Images of the source task, adversarial examples of them against each source, and what the "
            f"attack added, magnified {gain} times around grey for every source alike. Under "
            "each: what the network takes the clean image for → the adversarial one (✓ the label, ✗ another "
            "class)."
        )
    attacks = sorted({str(entry["attack"]) for entry in evidence.sources if entry.get("attack")})
    caption += f" Attack: {'; '.join(attacks)}." if attacked and attacks else ""
    content = f"<table class=pictures><tbody>{''.join(rows)}</tbody></table>"
    return "<h3>Adversarial examples</h3>\n" + scrolling(content, caption, kind="plot")


def _reading(label: str, before: str, after: str) -> str:
    if not after:
        return ""
    mark = ("✓" if after == label else "✗") if label else ""
    arrow = f"{escape(before)} → " if before else ""
    return f"{mark} {arrow}<b>{escape(after)}</b>"


def _target_images(evidence: Evidence) -> str:
    images = _images(evidence, "target_images")
    if not len(images):
        return ""
    labels = _texts(evidence, "target_labels", len(images))
    items = []
    for pixels, label in zip(images, labels, strict=True):
        alt = f"Target image of class {label}" if label else "Target image"
        picture = image(figures.png(pixels), "png", alt, "picture")
        items.append(f"<li>{picture}<span class=label>{escape(label)}</span></li>")
    return (
        f"<h3>Target images</h3>\n<figure class=plot><ul class=strip>{''.join(items)}</ul>"
        "<figcaption>Images of the target task with their labels.</figcaption></figure>"
    )


def _images(evidence: Evidence, name: str) -> np.ndarray:
    images = np.asarray(evidence.pictures.get(name, ()), float)[:MAX_PICTURES]
    if len(images) and (images.ndim != 4 or images.shape[-1] != 3):
        raise ValueError(f"pictures[{name!r}] has shape {images.shape}; pictures are [M, H, W, 3]")
    return images


def _texts(evidence: Evidence, name: str, number: int) -> list[str]:
    """The first captions of that name, empty ones where there are fewer than pictures."""
    texts = [str(text) for text in evidence.captions.get(name, ())][:number]
    return texts + [""] * (number - len(texts))


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.1f}"
