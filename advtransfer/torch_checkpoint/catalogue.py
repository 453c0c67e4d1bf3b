"""The known robust ResNets, and the natural ones to compare them with: `known_models.csv`, one line a model.

Its numbers are as published: by the model card of madrylab/robust-imagenet-models, the README of
MadryLab/robustness, RobustBench's model_info/imagenet/Linf (accuracy on 5,000 images) and torchvision's
models/resnet.py. A SHA-256 is that on the hub's page of the file; torchvision's file names hold the first
eight digits of theirs. The models of timm/ are torchvision's, converted.
"""

from __future__ import annotations

import csv
import itertools
import math
from pathlib import Path
from typing import NamedTuple

from advtransfer.models import IMAGENET_MEAN, IMAGENET_STD, ModelSpec, create_module
from advtransfer.torch_checkpoint.layout import layout

_NUM_CLASSES = {"ImageNet": 1000, "CIFAR-10": 10}


class KnownModel(NamedTuple):
    """A published checkpoint."""

    file: str
    repo: str  # on the Hugging Face hub; "": not there
    architecture: str
    norm: str  # threat model of its training: none | l2 | linf
    eps: float  # its radius, pixel units
    dataset: str
    accuracy: float | None  # published, of the clean validation or test images; a fraction
    sha256: str  # of the file; "": not known
    licence: str
    source: str  # who published it, where
    mean: tuple[float, ...] | None = None  # where the file does not hold its normalisation
    std: tuple[float, ...] | None = None
    image_size: int = 224  # pixels; what the accuracy is of


def _read_known_models() -> tuple[KnownModel, ...]:
    models = []
    with (Path(__file__).parent / "known_models.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            eps, _, unit = row.pop("eps").partition("/")  # 4/255 of images in [0, 1], or 3
            percent, normalisation = row.pop("accuracy_percent"), row.pop("normalisation")
            row |= {"eps": float(eps) / float(unit or 1), "accuracy": float(percent) / 100}
            row |= {"mean": IMAGENET_MEAN, "std": IMAGENET_STD} if normalisation == "ImageNet" else {}
            models.append(KnownModel(**row | {"image_size": int(row["image_size"])}))
    return tuple(models)


KNOWN_MODELS = _read_known_models()


def find_known(file_name: str, sha256: str = "", repo: str = "") -> KnownModel | None:
    """The known model that a file is, or by its name should be.

    A hash decides, whatever the file is called; then the repository with the file's name; then the name
    alone, if only one known model has it. Compare the result's `sha256` before you believe a name.
    """
    for known in KNOWN_MODELS:
        if sha256 and known.sha256 == sha256.lower():
            return known
    named = [known for known in KNOWN_MODELS if known.file == file_name]
    found = [known for known in named if repo and known.repo == repo] or named
    return found[0] if len(found) == 1 else None


def known_spec(known: KnownModel) -> ModelSpec:
    """What the model of a known file is, as far as that is known without it: the normalisation is ImageNet's
    where only the file has it."""
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
    """Bytes of a known file, nearly: of its float32 weights, and of as many of momentum in those of training
    runs (.ckpt), whose ResNet-50s have 205 MB."""
    module = create_module(known.architecture, num_classes=_NUM_CLASSES[known.dataset])
    copies = {"params": 2 if known.file.endswith(".ckpt") else 1, "batch_stats": 1}
    return sum(4 * copies[entry.path[0]] * math.prod(entry.shape) for entry in layout(module).values())


def known_models_table() -> str:
    """The known models as text, with what to type for each; no line has more than 110 characters."""
    lines = [
        "To import a model, pass its name, or the path of a file that you have:",
        "python launch.py --config=experiments/import_source.py --config.source=NAME --workdir=FOLDER",
    ]
    groups = itertools.groupby(KNOWN_MODELS, lambda known: (known.dataset, known.source, known.licence))
    for (dataset, source, licence), group in groups:
        rows = [(f"hf:{known.repo}/{known.file}" if known.repo else known.file, known) for known in group]
        width = max(len(name) for name, _ in rows)
        what = "" if rows[0][1].repo else "; pass the path of your copy"
        lines += ["", f"{dataset}, {source} ({licence}){what}"]
        lines += [f"{name:{width}}  {_describe(known)}".rstrip() for name, known in rows]
    lines += [
        "",
        "Last column: % of the clean validation or test images, as published (RobustBench: of 5,000 images).",
        "l2 radii are for images in [0, 1]. *: the SHA-256 is pinned, another file of that name is refused.",
        "hf: names need pip install huggingface_hub. The links of MadryLab/robustness are dead.",
    ]
    return "\n".join(lines)


def _describe(known: KnownModel) -> str:
    radius = f"{known.eps * 255:g}/255" if known.norm == "linf" else f"{known.eps:g}"
    trained = "natural" if known.norm == "none" else f"{known.norm} {radius}"
    accuracy = "-" if known.accuracy is None else f"{100 * known.accuracy:.2f}"
    return f"{known.architecture:16} {trained:12} {accuracy:>5} {'*' if known.sha256 else ''}"
