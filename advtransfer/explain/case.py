"""Networks and the images that they are explained with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from advtransfer.data import Dataset, subset_indices, to_float
from advtransfer.explain.options import Interpretation
from advtransfer.models import Model
from advtransfer.report.sections import Style


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


def column(records: list[dict], label: str, name: str) -> np.ndarray:
    """A column of the records of one network."""
    return np.array([record[name] for record in records if record["model"] == label])


# In a study's report pictures are few, and so are the images behind the numbers.
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
    """The most telling pictures alone, of as many images as there are."""
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
