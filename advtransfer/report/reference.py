"""The paper's published numbers, to be drawn behind a user's: `paper_summary_k3.csv`.

Mean test accuracies in %, of a ResNet-50 from ImageNet at 224², head and last three blocks fine-tuned.
Sources are matched by threat (natural; ℓ2 with ε = 3; ℓ∞ with ε = 4/255 or 8/255), targets by name: a part of
the name between ":" and "/" is a dataset's, whatever the capitals, "-" and "_" (`tfds:fashion_mnist`,
`folder:/data/CIFAR-10`). A target that is another view or the validation split is not matched.
"""

from __future__ import annotations

import csv
import functools
import re
from importlib import resources

from advtransfer.report.sections import SourceInfo

NUM_UNFROZEN_BLOCKS = 3
CITATION = (
    "Utrera, Kravitz, Erichson, Khanna and Mahoney, “Adversarially-Trained Deep Nets Transfer Better: "
    "Illustration on Image Classification”, ICLR 2021, arXiv:2007.05869"
)
COLUMNS = {("none", 0.0): "0", ("l2", 3.0): "3", ("linf", 4 / 255): "4", ("linf", 8 / 255): "8"}
_TARGETS = {name: name for name in ("cifar10", "cifar100", "fmnist", "kmnist", "mnist", "svhn")}
_TARGETS |= {"fashionmnist": "fmnist", "svhncropped": "svhn"}
_OTHER = {"lowpass", "grey", "validation"}


@functools.cache
def published() -> dict[tuple[str, str], dict[int, float]]:
    """Accuracies in [0, 1] by the table's target and column, and n."""
    text = resources.files("advtransfer.report").joinpath("paper_summary_k3.csv").read_text("utf-8")
    table: dict[tuple[str, str], dict[int, float]] = {}
    for row in csv.DictReader(text.splitlines()):
        for column in COLUMNS.values():
            line = table.setdefault((row["target_ds"], column), {})
            line[int(row["num_training_images"])] = float(row[column]) / 100
    return table


def column_of(source: SourceInfo) -> str | None:
    """The table's column for a source of this threat; ε within 1 %, as people round 4/255."""
    for (norm, eps), column in COLUMNS.items():
        if source.norm == norm and (norm == "none" or abs(source.eps - eps) <= 0.01 * eps):
            return column
    return None


def target_of(name: str) -> str | None:
    """The table's name of a target."""
    parts = [re.sub(r"[-_ ]", "", part).lower() for part in re.split("[:/]", name)]
    found = [_TARGETS[part] for part in parts if part in _TARGETS]
    return found[0] if found and not _OTHER & set(parts) else None


def published_line(source: SourceInfo, target: str) -> dict[int, float]:
    """Published accuracies by n; empty where the paper has no such source or target."""
    return published().get((target_of(target) or "", column_of(source) or ""), {})
