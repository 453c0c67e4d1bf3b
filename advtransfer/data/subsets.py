"""Which images a small target set consists of."""

from __future__ import annotations

import hashlib

import chex
import numpy as np

from advtransfer.labels import check_labels


def subset_indices(
    labels: np.ndarray,
    num_images: int,
    *,
    dataset: str,
    seed: int,
    stratified: bool = True,
) -> np.ndarray:
    """Draws `num_images` different images, the same ones for every source network.

    The draw depends on (dataset, seed) and on nothing else, on every machine; a subset contains every smaller
    one of the same seed.

    Args:
      labels: integers [N], the labels of the images to draw from.
      num_images: how many to draw, 1 to N.
      dataset: name of the dataset, part of the seed.
      seed: which of the many subsets.
      stratified: every class has its share of the subset to within one image; otherwise images are taken in
        random order, but the last places are kept for classes that have none yet (Utrera et al., 2021, their
        code).

    Returns:
      int32 [num_images], indices into `labels`, each at most once.

    Raises:
      ValueError: labels that are no classes, or `num_images` below 1 or above N.
    """
    labels = np.asarray(labels)
    check_labels(labels, labels.size)
    check_subset(num_images, len(labels), dataset)
    # Python's own hash of a string differs from process to process.
    digest = hashlib.sha256(f"{dataset}|{seed}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:16], "big"))
    if stratified:
        return stratified_order(labels, num_images, rng)
    return _covering(labels, rng.permutation(len(labels)), num_images)


def _covering(labels: np.ndarray, order: np.ndarray, num_images: int) -> np.ndarray:
    """The first images of `order`, and the first of every class that they have none of; in its sequence."""
    _, first = np.unique(labels[order], return_index=True)
    first.sort()  # places at which the order comes to a new class
    # With so many taken in sequence, all that is left is wanted for the classes that are still to come.
    taken = np.arange(num_images + 1)
    head = taken[taken + np.sum(first[None] >= taken[:, None], axis=1) <= num_images].max(initial=0)
    rest = first[first >= head][: num_images - head]
    return order[np.concatenate([np.arange(head), rest])].astype(np.int32)


def check_subset(num_images: int, num_all: int, dataset: str) -> None:
    """Raises the ValueError of a subset that is empty or larger than the set."""
    if not 1 <= num_images <= num_all:
        raise ValueError(
            f"cannot draw {num_images} images from {dataset}: choose 1 to {num_all}, "
            "the number of its training images"
        )


def stratified_order(labels: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    """First `length` places of a random order in which every prefix is stratified.

    After n places a class that makes up a share p of the labels has had n * p of them to within
    one, whatever the shares are. Rounding n * p class by class would not add up to n, so the next
    class is the one whose turn is most urgent (R. Tijdeman, "The chairman assignment problem",
    Discrete Mathematics 32, 1980, section 2). Equally urgent classes come in random order.

    Args:
      labels: integers [N].
      length: number of places, at most N.
      rng: decides within the classes and between equally urgent classes.

    Returns:
      int32 [length], indices into `labels`, each at most once.
    """
    chex.assert_rank(labels, 1)
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    members = [rng.permutation(np.flatnonzero(classes == c)) for c in range(len(counts))]
    if len(counts) == 1:
        return members[0][:length].astype(np.int32)
    # Whole numbers, in units of 1 / (total * scale) of an image, so that equal means equal.
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
