"""Subsets of the training images, for small target datasets."""

from __future__ import annotations

import hashlib

import chex
import numpy as np
from jaxtyping import Int32, Integer

from advtransfer.arrays import AnyArray
from advtransfer.labels import check_labels


def subset_indices(
    labels: Integer[AnyArray, " all"],
    num_images: int,
    *,
    dataset: str,
    seed: int,
    stratified: bool = True,
) -> Int32[np.ndarray, " {num_images}"]:
    """Draws `num_images` distinct images, the same ones for every source network.

    The draw depends only on (dataset, seed), not on the machine; a subset contains every smaller one of the
    same seed.

    Args:
      labels: of the images to draw from.
      num_images: 1 to N.
      dataset, seed: of the draw.
      stratified: whether each class is represented in proportion, to within one image; otherwise images are
        taken in random order, with the last places reserved for classes that have none yet (the code of
        Utrera et al., 2021).

    Returns:
      Indices into `labels`, each at most once.

    Raises:
      ValueError: labels that are not class indices, or `num_images` below 1 or above N.
    """
    labels = np.asarray(labels)
    check_labels(labels, labels.size)
    check_subset(num_images, len(labels), dataset)
    # Python's hash of a string differs between processes.
    digest = hashlib.sha256(f"{dataset}|{seed}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:16], "big"))
    if stratified:
        return stratified_order(labels, num_images, rng)
    return _covering(labels, rng.permutation(len(labels)), num_images)


def _covering(labels: np.ndarray, order: np.ndarray, num_images: int) -> np.ndarray:
    """The first images of `order`, and the first image of every class missing among them, in this order."""
    _, first = np.unique(labels[order], return_index=True)
    first.sort()  # places at which a new class first occurs
    # `head`: the most images that can be taken in sequence and leave a place for every missing class.
    taken = np.arange(num_images + 1)
    head = taken[taken + np.sum(first[None] >= taken[:, None], axis=1) <= num_images].max(initial=0)
    rest = first[first >= head][: num_images - head]
    return order[np.concatenate([np.arange(head), rest])].astype(np.int32)


def check_subset(num_images: int, num_all: int, dataset: str) -> None:
    """Raises a ValueError for a subset that is empty or larger than the dataset."""
    if not 1 <= num_images <= num_all:
        raise ValueError(
            f"cannot draw {num_images} images from {dataset}: choose 1 to {num_all}, "
            "the number of its training images"
        )


def stratified_order(
    labels: Integer[np.ndarray, " all"], length: int, rng: np.random.Generator
) -> Int32[np.ndarray, " {length}"]:
    """First `length` places of a random order in which every prefix is stratified.

    Of the first n places, a class that makes up a fraction p of the labels has n * p to within one, whatever
    the fractions are. Rounding n * p for each class would not add up to n, so the next class is the one with
    the earliest deadline (R. Tijdeman, "The chairman assignment problem", Discrete Mathematics 32, 1980,
    section 2). Ties, and the order within classes, are decided at random.

    Returns:
      Indices into `labels`, each at most once.
    """
    chex.assert_rank(labels, 1)
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    members = [rng.permutation(np.flatnonzero(classes == c)) for c in range(len(counts))]
    if len(counts) == 1:
        return members[0][:length].astype(np.int32)
    # Integers, in units of 1 / (total * scale) of an image, so that ties are exact.
    total, scale = len(labels), 2 * len(counts) - 2
    taken = np.zeros(len(counts), np.int64)
    order = np.empty(length, np.int32)
    for place in range(length):
        owed = scale * ((place + 1) * counts - total * taken)
        places_left = np.where(owed >= total, (total * (scale - 1) - owed) / counts, np.inf)
        urgent = np.flatnonzero(places_left == places_left.min())
        chosen = urgent[rng.integers(len(urgent))]
        order[place] = members[chosen][taken[chosen]]
        taken[chosen] += 1
    return order
