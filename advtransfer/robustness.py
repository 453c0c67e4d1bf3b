"""Accuracy against the size of an attack: curves over ε, AutoAttack, and warnings where they mislead."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float32, Integer, Key

from advtransfer import parallel
from advtransfer.attacks import (
    THREAT_MODELS,
    VERSIONS,
    LogitsFn,
    RobustnessWarning,
    as_network,
    auto_attack,
    check_large_eps,
    check_network,
    check_steps,
    cross_entropy,
    jit_for,
    pgd,
)
from advtransfer.data import Split, check_split, to_float
from advtransfer.evaluate import Evaluation, check_head, evaluation_key
from advtransfer.intervals import wilson
from advtransfer.labels import check_labels
from advtransfer.models import Model, logits_fn
from advtransfer.norms import SYMBOLS
from advtransfer.options import option, options
from advtransfer.progress import progress_bar

COLUMNS = ("norm", "eps", "attack", "num_steps", "accuracy", "lower", "upper", "loss", "num_images")
NATURAL, PGD, PROBE, LARGE, AUTO_ATTACK = "none", "PGD", "PGD, all steps", "PGD, large ε", "AutoAttack"
NUM_PROBED = 256  # images on which losses and warnings are measured
_STEPS = (0, 1)  # of the losses that are compared with the loss after all steps


@options
class Curves:
    """What is measured beside natural accuracy and one attack; with several models, too."""

    l2_epsilons: tuple[float, ...] = option((), "stage=evaluate: radii of a curve under ℓ2 attacks", low=0)
    linf_epsilons: tuple[float, ...] = option(
        (),
        "stage=evaluate: radii of a curve under ℓ∞ attacks, as parts of 1, so 4/255 is 0.0157",
        low=0,
        below=1,
    )
    auto_attack: str = option(
        "none",
        "stage=evaluate: version of AutoAttack (Croce & Hein, 2020), in the threat model norm and eps",
        choices=("none", *VERSIONS),
    )

    @property
    def is_asked(self) -> bool:
        return self != Curves()

    def check_with(self, evaluation: Evaluation) -> None:
        """Raises a ValueError unless they go together."""
        if evaluation.norm == "none" and self.is_asked:
            raise ValueError("norm=none measures natural accuracy alone: set norm and eps as well")
        if self.auto_attack != "none" and not evaluation.eps:
            raise ValueError(f"eps=0 leaves auto_attack={self.auto_attack} nothing to change: set eps")

    def radii(self, evaluation: Evaluation) -> dict[str, list[float]]:
        """Of every norm in ascending order, without 0; that of `evaluation` is always among them."""
        asked = {"l2": {*self.l2_epsilons}, "linf": {*self.linf_epsilons}}
        if evaluation.norm != "none":
            asked[evaluation.norm].add(evaluation.eps)
        found = {norm: sorted(values - {0.0}) for norm, values in asked.items()}
        return {norm: values for norm, values in found.items() if values}


class Robustness(NamedTuple):
    """What was measured of a network.

    Rows have "norm", "eps", "attack", "num_steps", "accuracy" with Wilson's 95 % interval ("lower", "upper"),
    "loss" (cross-entropy, None where attacks stop at the first error) and "num_images". "attack" is "none";
    "PGD"; "PGD, all steps", which does not stop at the first error, on fewer images; "PGD, large ε", within
    which every image can become grey; or, with what it has run so far, "AutoAttack (VERSION): ATTACK".
    """

    rows: list[dict[str, Any]]
    warnings: tuple[RobustnessWarning, ...]


class _Settings(NamedTuple):
    """How PGD searches."""

    num_steps: int
    step_ratio: float
    num_restarts: int
    early_finish: bool


class _Subject(NamedTuple):
    """A network and the images that it is measured on."""

    logits_fn: LogitsFn  # as it was given
    network: Partial  # for the batches of one device
    split: Split
    keys: Key[Array, " n"]
    image_size: int | None
    batch_size: int
    name: str


def measure_robustness(
    network: Model | LogitsFn,
    split: Split,
    evaluation: Evaluation,
    curves: Curves = Curves(),
    *,
    seed: int = 0,
    image_size: int | None = None,
    name: str = "model",
) -> Robustness:
    """Natural accuracy, accuracy under PGD against ε, AutoAttack, and signs that these are not robustness.

    An image that is fooled at one ε is fooled at every larger one, as the smaller ball lies in the larger. So
    as ε grows only those that are still classified rightly are attacked: curves never rise, and cost less
    than their points one by one. PGD stops at an image's first error; losses are measured apart, with all
    steps, on `probed` images, in each norm at the ε of `evaluation` or in the middle of the curve.

    Args:
      network, image_size: as for `evaluate.evaluate`; a model's image size is known.
      split: uint8 images and labels.
      evaluation: how PGD searches; its norm and eps are those of AutoAttack, and a point of the curve.
      curves: radii, and AutoAttack.
      seed: of random starts, and of the images that are probed.
      name: in the progress bar.

    Raises:
      ValueError: a model without a head, labels that are not classes, logits that are not finite, or an
        evaluation that does not go with the curves.
    """
    check_split(split)
    curves.check_with(evaluation)
    if isinstance(network, Model):
        check_head(network.spec)
        network, image_size = logits_fn(network), network.spec.image_size
    if evaluation.num_images:
        split = Split(*(array[: evaluation.num_images] for array in split))
    subject = _subject(network, split, evaluation, seed, image_size, name)
    everything = np.arange(split.num_images)
    natural = _attacked_logits(subject, everything, "linf", 0.0, _Settings(0, 1.0, 1, False))
    right = everything[natural.argmax(1) == split.labels]
    rows = [_row("none", 0.0, NATURAL, len(right), len(everything), loss=_loss(natural, split.labels))]
    settings = _Settings(evaluation.num_steps, evaluation.step_ratio, evaluation.num_restarts, True)
    radii = curves.radii(evaluation)
    for norm, epsilons in radii.items():
        standing = right
        for eps in epsilons:
            standing = _still_right(subject, standing, norm, eps, settings)
            rows.append(_row(norm, eps, PGD, len(standing), len(everything), settings.num_steps))
    warnings = ()
    if radii:
        some = _subject(network, probed(split, seed), evaluation, seed, image_size, name)
        more, warnings = _probe(some, evaluation, radii)
        rows += more
        if curves.auto_attack == "none":  # which checks the network itself
            warnings = _check_network(some, evaluation) + warnings
    if curves.auto_attack != "none":
        more, flags = _run_auto_attack(subject, evaluation, curves.auto_attack, seed)
        rows += more
        warnings = flags + warnings
    return Robustness(rows, warnings)


def num_gradients(num_images: int, evaluation: Evaluation, curves: Curves) -> int:
    """Images × steps of PGD, at most, for one network, the sensitivity of its features included."""
    radii, steps = curves.radii(evaluation).values(), evaluation.num_steps
    probes = min(num_images, NUM_PROBED) * (len(radii) * (2 * steps + 1) + steps * bool(radii))
    return evaluation.num_restarts * (num_images * sum(map(len, radii)) * steps + probes)


def probed(split: Split, seed: int) -> Split:
    """The `NUM_PROBED` images, or all, whose losses are measured: the same for every network."""
    chosen = np.random.default_rng(seed).permutation(split.num_images)[:NUM_PROBED]
    return Split(*(array[np.sort(chosen)] for array in split))


def _subject(
    logits_fn: LogitsFn, split: Split, evaluation: Evaluation, seed: int, image_size: int | None, name: str
) -> _Subject:
    sides = (image_size, image_size) if image_size else split.images.shape[1:3]
    rows = evaluation.batch_size // parallel.choose_devices(evaluation.batch_size)
    batch = jax.ShapeDtypeStruct((rows, *sides, 3), jnp.float32)
    network = as_network(logits_fn, batch)
    check_labels(split.labels, split.num_images, jax.eval_shape(network, batch).shape[1])
    keys = jax.random.split(evaluation_key(seed), split.num_images)
    return _Subject(logits_fn, network, split, keys, image_size, evaluation.batch_size, name)


def _still_right(
    subject: _Subject, standing: Integer[np.ndarray, " m"], norm: str, eps: float, settings: _Settings
) -> Integer[np.ndarray, " k"]:
    """Those of the images whose attacked versions are classified rightly."""
    logits = _attacked_logits(subject, standing, norm, eps, settings)
    return standing[logits.argmax(1) == subject.split.labels[standing]]


def _attacked_logits(
    subject: _Subject, chosen: Integer[np.ndarray, " m"], norm: str, eps: float, settings: _Settings
) -> Float32[np.ndarray, "m classes"]:
    """Logits of the attacked images of these numbers, on all devices; one program whatever eps is."""
    size, split = subject.batch_size, subject.split
    devices = parallel.choose_devices(size)
    step = jit_for(subject.network, _on_devices(settings, devices))
    shared = parallel.replicate((subject.network, THREAT_MODELS[norm](jnp.float32(eps))), devices)
    starts = range(0, len(chosen), size)
    if settings.num_steps:
        starts = progress_bar(starts, f"{SYMBOLS[norm]} ε = {eps:.3g} {subject.name}", "batches")
    found = []
    for start in starts:
        own = chosen[start : start + size]
        images = to_float(jnp.asarray(split.images[own]), subject.image_size)
        batch, _ = parallel.pad((images, jnp.asarray(split.labels[own]), subject.keys[own]), size)
        logits = step(*shared, *parallel.split_locally(batch, devices))
        found.append(np.asarray(parallel.join(logits))[: len(own)])
    logits = np.concatenate(found) if found else np.zeros((0, 1), np.float32)
    if lost := int(np.sum(~np.isfinite(logits).all(axis=1))):
        raise ValueError(f"the logits of {lost:,} of {len(chosen):,} images are not finite numbers")
    return logits


@functools.lru_cache(maxsize=32)
def _on_devices(settings: _Settings, devices: int) -> Callable[..., Array]:
    """(network, threat model, images, labels, keys) to the logits of attacked images, on devices."""

    def attacked_logits(network, threat_model, images, labels, keys):
        found = pgd(
            network,
            images,
            labels,
            threat_model,
            num_steps=settings.num_steps,
            step_size=settings.step_ratio * threat_model.eps,
            key=keys,
            random_start=settings.num_restarts > 1,
            num_restarts=settings.num_restarts,
            early_finish=settings.early_finish,
        )
        return network(found).astype(jnp.float32)

    return parallel.map_parallel(attacked_logits, num_shared=2, num_split=3, devices=devices)


def _probe(
    subject: _Subject, evaluation: Evaluation, radii: dict[str, list[float]]
) -> tuple[list[dict[str, Any]], tuple[RobustnessWarning, ...]]:
    """Losses by the number of steps, and accuracy at an ε at which there can be none; what warns of what."""
    labels, num_images = subject.split.labels, subject.split.num_images
    everything, rows, warnings = np.arange(num_images), [], ()
    num_pixels = 3 * subject.image_size**2 if subject.image_size else subject.split.images[0].size
    # One answer for grey, which every ball holds, is right for no more images than this.
    chance = float(np.bincount(labels).max() / num_images)
    restarts = evaluation.num_restarts
    for norm, epsilons in radii.items():
        is_named = norm == evaluation.norm and evaluation.eps in epsilons
        eps, losses = evaluation.eps if is_named else epsilons[len(epsilons) // 2], {}
        for num_steps in sorted({*_STEPS, evaluation.num_steps}):
            # A step of 2.5 eps / num_steps reaches the edge, however few there are.
            ratio = evaluation.step_ratio if num_steps == evaluation.num_steps else 2.5 / max(num_steps, 1)
            settings = _Settings(num_steps, ratio, restarts if num_steps else 1, False)
            logits = _attacked_logits(subject, everything, norm, eps, settings)
            losses[num_steps] = _loss(logits, labels)
            right = int(np.sum(logits.argmax(1) == labels))
            rows.append(_row(norm, eps, PROBE, right, num_images, num_steps, losses[num_steps]))
        warnings += check_steps(losses, attack=f"{SYMBOLS[norm]} PGD, ε = {eps:.3g}")
        large = 0.5 if norm == "linf" else 0.5 * float(np.sqrt(num_pixels))
        settings = _Settings(evaluation.num_steps, evaluation.step_ratio, restarts, True)
        standing = len(_still_right(subject, everything, norm, large, settings))
        rows.append(_row(norm, large, LARGE, standing, num_images, evaluation.num_steps))
        attack = f"{SYMBOLS[norm]} PGD-{evaluation.num_steps}, ε = {large:.3g}"
        warnings += check_large_eps(rows[-1]["lower"], chance, attack=attack)
    return rows, warnings


def _check_network(subject: _Subject, evaluation: Evaluation) -> tuple[RobustnessWarning, ...]:
    some = slice(max(1, evaluation.batch_size // parallel.choose_devices(evaluation.batch_size)))
    images = to_float(jnp.asarray(subject.split.images[some]), subject.image_size)
    return check_network(subject.logits_fn, images, subject.split.labels[some])


def _run_auto_attack(
    subject: _Subject, evaluation: Evaluation, version: str, seed: int
) -> tuple[list[dict[str, Any]], tuple[RobustnessWarning, ...]]:
    """Robust accuracy after each attack, and its flags."""
    size, split = evaluation.batch_size, subject.split
    images = [
        np.asarray(to_float(jnp.asarray(split.images[i : i + size]), subject.image_size))
        for i in range(0, split.num_images, size)
    ]
    found = auto_attack(
        subject.logits_fn,
        np.concatenate(images),
        split.labels,
        THREAT_MODELS[evaluation.norm](evaluation.eps),
        version=version,
        key=evaluation_key(seed),
        batch_size=size,
    )
    accuracy = {attack: float(share) for attack, share in found.accuracy.items() if attack != "clean"}
    rows = [
        _row(evaluation.norm, evaluation.eps, f"{AUTO_ATTACK} ({version}): {attack}", right, split.num_images)
        for attack, right in ((attack, round(share * split.num_images)) for attack, share in accuracy.items())
    ]
    return rows, found.warnings


def _loss(logits: Float32[np.ndarray, "n classes"], labels: Integer[np.ndarray, " n"]) -> float:
    return float(np.asarray(cross_entropy(logits, labels), np.float64).mean())


def _row(
    norm: str,
    eps: float,
    attack: str,
    right: int,
    total: int,
    num_steps: int | None = None,
    loss: float | None = None,
) -> dict[str, Any]:
    lower, upper = map(float, wilson(right, total))
    values = norm, eps, attack, num_steps, right / total, lower, upper, loss, total
    return dict(zip(COLUMNS, values, strict=True))
