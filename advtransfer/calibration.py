"""How far a network's probabilities can be trusted: its temperature, and calibration measured with intervals.

logits, labels = at.predict(model, held_out.images), held_out.labels
calibration = at.calibrate(logits, labels)
probabilities = calibration.probabilities(at.predict(model, new_images))
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import scipy
from jaxtyping import Float, Float64, Integer

from advtransfer.intervals import wilson

NUM_FOLDS = 5  # of held-out images, each scaled with the temperature of the others
NUM_BINS = 15  # of the expected calibration error (Guo et al., 2017)
_NUM_SIMULATED = 1000
_NUM_POINTS = 10  # of the reliability curve
_POINT_IMAGES = 10  # at least, in each of them
_WIDEST = 2.0  # factor within which a temperature has to be known to be used
_SMALLEST = 1e-4  # temperature at which softmax is a maximum


class Temperature(NamedTuple):
    """A temperature with its 95 % interval; 1, with the reason, where the images do not tell it."""

    value: float
    low: float
    high: float
    problem: str = ""


class Reliability(NamedTuple):
    """How well the largest probability of N predictions says how many of them are right.

    Attributes:
      ece: expected calibration error: the mean over `NUM_BINS` equally wide bins of |accuracy - mean
        probability|, weighted by their images (Guo et al., ICML 2017, equation 3).
      expected: the range (2.5 to 97.5 %) that the error of a perfectly calibrated network has on as many
        images, which is not 0 (Vaicenavicius et al., AISTATS 2019, section 4).
      loss: mean cross-entropy, nats.
      probability, accuracy, low, high, count: of bins of equal numbers of images, by increasing
        probability, with Wilson's 95 % interval of the accuracy.
    """

    ece: float
    expected: tuple[float, float]
    loss: float
    probability: Float64[np.ndarray, " bins"]
    accuracy: Float64[np.ndarray, " bins"]
    low: Float64[np.ndarray, " bins"]
    high: Float64[np.ndarray, " bins"]
    count: Integer[np.ndarray, " bins"]


class Calibration(NamedTuple):
    """What held-out images say of a network's probabilities.

    Attributes:
      temperature: of all held-out images.
      before, after: calibration without a temperature, and with one that is fitted on other images
        than those it is measured on.
      labels, held_out: of the held-out images [N]: the labels, and the probabilities [N, C] behind `after`.
    """

    temperature: Temperature
    before: Reliability
    after: Reliability
    labels: Integer[np.ndarray, " n"]
    held_out: Float64[np.ndarray, "n classes"]

    def __repr__(self) -> str:
        """Short: the temperature, and both errors."""
        value, low, high, problem = self.temperature
        return (
            f"Calibration(temperature={value:.3g}, {problem or f'interval {low:.3g} to {high:.3g}'}, "
            f"error {self.before.ece:.1%} before, {self.after.ece:.1%} after, {len(self.labels):,} images)"
        )

    def probabilities(self, logits: Float[np.ndarray, "n classes"]) -> Float64[np.ndarray, "n classes"]:
        """softmax(logits / temperature)."""
        return probabilities(logits, self.temperature.value)


def calibrate(logits: Float[np.ndarray, "n classes"], labels: Integer[np.ndarray, " n"]) -> Calibration:
    """The temperature of a network, and its calibration without and with it.

    Both come from the same held-out images: calibration is measured in five folds, each scaled with
    the temperature of the others.

    Args:
      logits, labels: of images that the network was not trained on.

    Raises:
      ValueError: other shapes, logits that are not finite, labels that are not classes.
    """
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    if logits.ndim != 2 or not len(logits) or labels.shape != (len(logits),):
        raise ValueError(f"logits are {logits.shape} and labels {labels.shape}: pass [N, classes] and [N]")
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(f"labels are not integers from 0 to {logits.shape[1] - 1}")
    if not np.isfinite(logits).all():
        raise ValueError("the logits hold values that are not finite")
    temperature = fit_temperature(logits, labels)
    scaled = probabilities(logits)
    before = measure_calibration(scaled, labels)
    if temperature.problem:
        return Calibration(temperature, before, before, labels, scaled)
    folds = np.random.default_rng(0).permutation(len(labels)) % NUM_FOLDS
    for fold in range(NUM_FOLDS):
        own = folds == fold
        scaled[own] = probabilities(logits[own], _most_likely(logits[~own], labels[~own]))
    return Calibration(temperature, before, measure_calibration(scaled, labels), labels, scaled)


def probabilities(
    logits: Float[np.ndarray, "n classes"], temperature: float = 1.0
) -> Float64[np.ndarray, "n classes"]:
    """softmax(logits / temperature)."""
    return scipy.special.softmax(np.asarray(logits, np.float64) / temperature, axis=-1)


def fit_temperature(logits: Float[np.ndarray, "n classes"], labels: Integer[np.ndarray, " n"]) -> Temperature:
    """The most likely temperature (Guo et al., ICML 2017, section 4.2) with its 95 % interval.

    The interval is that of its logarithm, from the observed information. The temperature is 1, and a sentence
    says why, if it is not known within a factor of 2, if every image is classified correctly, so that the
    smaller the likelier, or if the network is no better than chance, so that the larger the likelier.
    """
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    none = Temperature(1.0, math.nan, math.nan)
    images = f"{len(labels):,} held-out image{'s' * (len(labels) != 1)}"
    if _slope(1.0 / _SMALLEST, logits, labels) <= 0:
        return none._replace(problem=f"all {images} are classified correctly, which fits every temperature")
    if _slope(0.0, logits, labels) >= 0:
        return none._replace(problem=f"on the {images} the network is no better than chance")
    value = _most_likely(logits, labels)
    scaled = probabilities(logits, value)
    variance = np.sum(scaled * logits**2, axis=1) - np.sum(scaled * logits, axis=1) ** 2
    # Of 1 / T; that of ln T is the same, relative to 1 / T.
    error = value / math.sqrt(variance.sum())
    factor = math.exp(scipy.special.ndtri(0.975) * error)
    if not factor <= _WIDEST:
        return none._replace(
            problem=f"{images} are too few for a temperature, which would be known within a factor of "
            f"{factor:.2g} only"
        )
    return Temperature(value, value / factor, value * factor)


def _most_likely(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature at which the loss is least; it is convex in 1 / T."""
    low, high = 0.0, 1 / _SMALLEST
    if _slope(low, logits, labels) >= 0 or _slope(high, logits, labels) <= 0:
        return 1.0
    return 1 / scipy.optimize.brentq(_slope, low, high, args=(logits, labels), xtol=1e-12)


def _slope(inverse: float, logits: np.ndarray, labels: np.ndarray) -> float:
    """The derivative of the loss with respect to 1 / T."""
    mean = np.sum(scipy.special.softmax(inverse * logits, axis=1) * logits, axis=1)
    return float(np.mean(mean - np.take_along_axis(logits, labels[:, None], axis=1)[:, 0]))


def measure_calibration(
    probabilities: Float[np.ndarray, "n classes"], labels: Integer[np.ndarray, " n"]
) -> Reliability:
    """Calibration of the largest of each image's probabilities."""
    largest, is_correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    bins = np.minimum((largest * NUM_BINS).astype(int), NUM_BINS - 1)

    def error(is_correct: np.ndarray) -> float:
        return float(np.abs(np.bincount(bins, is_correct - largest)).sum() / len(labels))

    rng = np.random.default_rng(0)
    simulated = [error(rng.random(len(largest)) < largest) for _ in range(_NUM_SIMULATED)]
    low, high = np.quantile(simulated, (0.025, 0.975))
    own = np.take_along_axis(probabilities, np.asarray(labels)[:, None], axis=1)
    loss = -np.log(np.maximum(own, np.finfo(float).tiny)).mean()
    number = max(1, min(_NUM_POINTS, len(labels) // _POINT_IMAGES))
    groups = np.array_split(np.argsort(largest, kind="stable"), number)
    count = np.array([len(group) for group in groups])
    correct = np.array([is_correct[group].sum() for group in groups])
    return Reliability(
        error(is_correct),
        (float(low), float(high)),
        float(loss),
        np.array([largest[group].mean() for group in groups]),
        correct / count,
        *wilson(correct, count),
        count,
    )
