"""Published robust ResNets and natural ones to compare them with, from `known_models.csv`.

The accuracies are the published ones, from the model card of madrylab/robust-imagenet-models, the README of
MadryLab/robustness, RobustBench's model_info/imagenet/Linf (on 5,000 images) and torchvision's
models/resnet.py. The SHA-256 hashes are from the hub's file pages; torchvision's file names contain the first
eight digits of theirs. The timm/ models are torchvision's weights, converted.
"""

from __future__ import annotations

import csv
import itertools
import math
from pathlib import Path
from typing import Any, NamedTuple

from advtransfer import hub
from advtransfer.models import IMAGENET_MEAN, IMAGENET_STD, ModelSpec, create_module
from advtransfer.torch_checkpoint.layout import layout

_NUM_CLASSES = {"ImageNet": 1000, "CIFAR-10": 10}


class KnownModel(NamedTuple):
    """A published checkpoint."""

    file: str
    repo: str  # on the Hugging Face hub; "": not on the hub
    architecture: str
    norm: str  # threat model of its training, one of `norms.NORMS`
    eps: float  # radius of the threat model, in pixel units
    dataset: str
    accuracy: float | None  # published, on clean validation or test images, in [0, 1]
    sha256: str  # of the file; "": unknown
    licence: str
    source: str  # publisher and place
    mean: tuple[float, ...] | None = None  # None if the file contains the normalisation
    std: tuple[float, ...] | None = None
    image_size: int = 224  # pixels; of the published accuracy


def _read_known_models() -> tuple[KnownModel, ...]:
    models = []
    with (Path(__file__).parent / "known_models.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            fields: dict[str, Any] = {**row, "image_size": int(row["image_size"])}
            eps, _, unit = fields.pop("eps").partition("/")  # "4/255" for images in [0, 1], or "3"
            percent, normalisation = fields.pop("accuracy_percent"), fields.pop("normalisation")
            fields |= {"eps": float(eps) / float(unit or 1), "accuracy": float(percent) / 100}
            fields |= {"mean": IMAGENET_MEAN, "std": IMAGENET_STD} if normalisation == "ImageNet" else {}
            models.append(KnownModel(**fields))
    return tuple(models)


KNOWN_MODELS = _read_known_models()


def find_known(file_name: str, sha256: str = "", repo: str = "") -> KnownModel | None:
    """The known model with this hash; else of this repository and file; else of this file name, if unique.

    A match by name is only a claim: compare the hash with the result's `sha256`.
    """
    for known in KNOWN_MODELS:
        if sha256 and known.sha256 == sha256.lower():
            return known
    named = [known for known in KNOWN_MODELS if known.file == file_name]
    found = [known for known in named if repo and known.repo == repo] or named
    return found[0] if len(found) == 1 else None


_ON_HUB = tuple(f"hf:{known.repo}/{known.file}" for known in KNOWN_MODELS if known.repo)


def fetch(name: str, folder: str | Path | None = None) -> hub.Fetched:
    """As `hub.fetch`; of a wrong name a message names the nearest known models."""
    return hub.fetch(name, folder, known=_ON_HUB)


def known_on_hub(name: str) -> KnownModel | None:
    """The known model of this name, in any revision, if it is one. A malformed name is a CheckpointError."""
    file_name = name.partition("@")[0]
    hub.check_hub_name(name)
    return next((known for known in KNOWN_MODELS if f"hf:{known.repo}/{known.file}" == file_name), None)


def known_spec(known: KnownModel) -> ModelSpec:
    """What a known model is, without its file; normalised as ImageNet where only the file says how."""
    return ModelSpec(
        architecture=known.architecture,
        num_classes=_NUM_CLASSES[known.dataset],
        image_size=known.image_size,
        mean=known.mean or IMAGENET_MEAN,
        std=known.std or IMAGENET_STD,
        norm=known.norm,
        eps=known.eps,
    )


def file_bytes(known: KnownModel) -> int:
    """Approximate size of a known file: its float32 weights, and as much momentum in .ckpt files."""
    module = create_module(known.architecture, num_classes=_NUM_CLASSES[known.dataset])
    copies = {"params": 2 if known.file.endswith(".ckpt") else 1, "batch_stats": 1}
    return sum(4 * copies[entry.path[0]] * math.prod(entry.shape) for entry in layout(module).values())


def known_models_table() -> str:
    """The known models and their names for the command line, as text of at most 110 characters a line."""
    lines = [
        "To import a model, pass its name, or the path of a local file:",
        "--config=import_source --config.source=NAME --workdir=FOLDER",
    ]
    groups = itertools.groupby(KNOWN_MODELS, lambda known: (known.dataset, known.source, known.licence))
    for (dataset, source, licence), group in groups:
        rows = [(f"hf:{known.repo}/{known.file}" if known.repo else known.file, known) for known in group]
        width = max(len(name) for name, _ in rows)
        what = "" if rows[0][1].repo else "; pass the path of a local copy"
        lines += ["", f"{dataset}, {source} ({licence}){what}"]
        lines += [f"{name:{width}}  {_describe(known)}".rstrip() for name, known in rows]
    lines += [
        "",
        "Last column: published accuracy on clean validation or test images, in % (RobustBench: 5,000).",
        "l2 radii are for images in [0, 1]. *: the SHA-256 is pinned; other files of that name are rejected.",
        "hf: names need pip install huggingface_hub. The download links of MadryLab/robustness are dead.",
    ]
    return "\n".join(lines)


def _describe(known: KnownModel) -> str:
    radius = f"{known.eps * 255:g}/255" if known.norm == "linf" else f"{known.eps:g}"
    trained = "natural" if known.norm == "none" else f"{known.norm} {radius}"
    accuracy = "-" if known.accuracy is None else f"{100 * known.accuracy:.2f}"
    return f"{known.architecture:16} {trained:12} {accuracy:>5} {'*' if known.sha256 else ''}"
