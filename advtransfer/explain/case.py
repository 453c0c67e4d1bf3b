"""The networks to explain, and the images to explain them with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, SupportsIndex

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int32, Integer, Shaped

from advtransfer.data import Dataset, Split, subset_indices, to_float
from advtransfer.explain.options import Interpretation
from advtransfer.intervals import Share
from advtransfer.models import Model
from advtransfer.report.sections import Style


class Subject(NamedTuple):
    """A network to explain, and how it is drawn."""

    style: Style
    model: Model

    @property
    def label(self) -> str:
        return self.style.label


class Case(NamedTuple):
    """Networks of one image size, and the images to explain them with."""

    subjects: Sequence[Subject]
    dataset: Dataset
    split: str
    settings: Interpretation
    seed: int
    brief: bool = False  # few pictures, for a study's report

    @property
    def image_size(self) -> int:
        return self.subjects[0].model.spec.image_size

    def draw(self, number: int, split: str = "") -> Integer[np.ndarray, " {number}"]:
        """Indices of images of a split (default: the case's own); smaller draws are prefixes of larger."""
        labels = getattr(self.dataset, split or self.split).labels
        return subset_indices(labels, number, dataset=self.dataset.name, seed=self.seed)

    def recorded(self, split: str, indices: Integer[np.ndarray, " n"]) -> Split:
        """Images and labels of a split, at the size of the dataset."""
        images, labels = getattr(self.dataset, split)
        return Split(images[indices], labels[indices])

    def images(
        self, indices: Integer[np.ndarray, " n"]
    ) -> tuple[Float32[np.ndarray, "n h w 3"], Int32[np.ndarray, " n"]]:
        """Images of the case's split, at the networks' size, and labels."""
        images, labels = self.recorded(self.split, indices)
        return np.asarray(to_float(jnp.asarray(images), self.image_size)), labels


def owns_classes(model: Model, dataset: Dataset) -> bool:
    """Whether the model's outputs are the dataset's classes: by name, or by number where it has no names."""
    if not model.spec.has_head:
        return False
    if model.spec.class_names:
        return tuple(model.spec.class_names) == tuple(dataset.class_names)
    return model.spec.num_classes == len(dataset.class_names)


def class_name(model: Model, index: SupportsIndex) -> str:
    names = model.spec.class_names
    return names[index] if names else f"class {index}"


def column(records: list[dict], label: str, name: str) -> Shaped[np.ndarray, " n"]:
    """A column of the records of one network."""
    return np.array([record[name] for record in records if record["model"] == label])


def percent(share: Share) -> str:
    """With its 95 % interval; "–" if it is a share of nothing."""
    if np.isnan(share.value):
        return "–"
    return f"{100 * share.value:.1f} ({100 * share.lower:.1f} … {100 * share.upper:.1f})"


# A study's report has few pictures, and statistics of few images.
_BRIEF = {
    "num_measured": 128,
    "num_steps": 200,
    "step_size": 0.1,
    "parameterisation": "fourier",
    "num_train": 200,
    "num_queries": 200,
}


def brief(
    subjects: Sequence[Subject], dataset: Dataset, split: str, settings: Interpretation, seed: int
) -> Case:
    """The case of a study's report, with no more images than there are."""
    settings = replace(settings, **_BRIEF)
    here, train = getattr(dataset, split).num_images, dataset.train.num_images
    settings = replace(
        settings,
        num_images=min(settings.num_images, here),
        num_measured=min(settings.num_measured, here),
        num_queries=min(settings.num_queries, here),
        num_train=min(settings.num_train, train),
    )
    return Case(subjects, dataset, split, settings, seed, brief=True)
