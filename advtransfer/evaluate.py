"""Natural and adversarial accuracy, every example counted once, on all devices."""

from __future__ import annotations

import base64
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, Float32, Integer, Key, PRNGKeyArray, UInt8

from advtransfer import parallel
from advtransfer.arrays import AnyArray
from advtransfer.attacks import (
    Attack,
    LogitsFn,
    as_network,
    check_images,
    cross_entropy,
    in_batches,
    jit_for,
    make_attack,
)
from advtransfer.data import SPLITS, Batch, Dataset, Split, check_batch, check_split, image_hashes, to_float
from advtransfer.labels import check_labels
from advtransfer.models import Model, ModelSpec, logits_fn
from advtransfer.norms import NORMS, SYMBOLS, check_radius
from advtransfer.options import option, options
from advtransfer.progress import progress_bar
from advtransfer.train import Metrics, sum_metrics

Number = Float[AnyArray | np.floating, " ..."]

# Folded into the seed, so that evaluation draws nothing that training has drawn.
_EVALUATION_STREAM = 0xE7A1


@options
class Evaluation:
    """How a network's natural and adversarial accuracy is measured."""

    norm: str = option("l2", "threat model of the attack; none: natural accuracy only", choices=NORMS)
    eps: float = option(0.25, "radius of the threat model, in pixel units", low=0)
    num_steps: int = option(20, "steps of PGD", low=1)
    step_ratio: float = option(
        0.125,
        "PGD's step size divided by eps; the default is 2.5 / num_steps (Madry et al., 2018) at 20",
        above=0,
    )
    num_restarts: int = option(
        1, "random starts, of which the worst counts for each image; 1: one start, at the image", low=1
    )
    num_images: int = option(0, "first images of the split; 0: all", low=0)
    batch_size: int = option(256, "images per batch, over all devices", low=1)

    def check(self) -> None:
        check_radius(self.norm, self.eps)

    @property
    def attack(self) -> Attack | None:
        """The attack, or None."""
        return make_attack(
            self.norm,
            self.eps,
            num_steps=self.num_steps,
            step_ratio=self.step_ratio,
            num_restarts=self.num_restarts,
            random_start=self.num_restarts > 1,
        )

    @property
    def attack_name(self) -> str:
        """In words."""
        if self.norm == "none":
            return "none"
        restarts = f", {self.num_restarts} restarts" if self.num_restarts > 1 else ""
        return f"{SYMBOLS[self.norm]} PGD-{self.num_steps}, ε = {self.eps:.3g}{restarts}"


def make_evaluate_step(
    attack: Attack | None = None, *, axis_name: str | None = None
) -> Callable[[LogitsFn, Batch, Float[Array, " n"]], Metrics]:
    """A pure function (logits_fn, batch, mask) -> metrics, as `evaluation_metrics` gives them, and (sum,
    count) of "not_finite", the examples with a logit that is not a finite number.

    With an attack, images are replaced by `attack(logits_fn, images, labels, key=batch.keys)` first, and
    "unmoved" are those that it left as they were, and right. Examples whose mask is 0 count for nothing.
    """

    def evaluate_step(logits_fn, batch, mask):
        check_batch(batch)
        chex.assert_shape(mask, batch.labels.shape)
        images = batch.images
        if attack is not None:
            images = attack(logits_fn, images, batch.labels, key=batch.keys)
        logits = logits_fn(images)
        odd = {"not_finite": ~_is_finite(logits)}
        if attack is not None:
            moved = jnp.any(images != batch.images, axis=(1, 2, 3))
            odd["unmoved"] = ~moved & (jnp.argmax(logits, axis=-1) == batch.labels)
        counts = {name: (jnp.sum(flags * mask), jnp.sum(mask)) for name, flags in odd.items()}
        return parallel.total(evaluation_metrics(logits, batch.labels, mask) | counts, axis_name)

    return evaluate_step


def _is_finite(logits: AnyArray) -> Array:
    return jnp.all(jnp.isfinite(logits), axis=-1)


def evaluation_metrics(
    logits: Float[AnyArray, "n classes"], labels: Integer[AnyArray, " n"], mask: Float[AnyArray, " n"]
) -> Metrics:
    """(sum, count) of the examples whose mask [N] is 1: of "loss", "accuracy" and, [classes] each, of
    "class_accuracy", the accuracy on the images of each class. Logits that are not finite count as wrong."""
    chex.assert_rank(logits, 2)
    chex.assert_shape([labels, mask], logits.shape[:1])
    chex.assert_type(labels, int)
    of_class = jax.nn.one_hot(labels, logits.shape[-1]) * mask[:, None]
    correct = ((jnp.argmax(logits, axis=-1) == labels) & _is_finite(logits)).astype(jnp.float32)
    by_class = (jnp.sum(of_class * correct[:, None], axis=0), jnp.sum(of_class, axis=0))
    metrics = sum_metrics(cross_entropy(logits, labels), logits, labels, mask)
    return metrics | {"class_accuracy": by_class}


def evaluation_means(metrics: Mapping[str, tuple[Number, Number]]) -> dict[str, Number]:
    """{"loss", "accuracy", "mean_per_class_accuracy"} of summed metrics, scalars in their type.

    The last is the mean over the classes of the accuracy on each (Salman et al., 2020, appendix A); classes
    without an image do not count.
    """
    correct, count = metrics["class_accuracy"]
    shares = correct / (count + (count == 0).astype(count.dtype))
    mean_per_class = shares.sum() / (count > 0).sum().astype(count.dtype)
    return {name: metrics[name][0] / metrics[name][1] for name in ("loss", "accuracy")} | {
        "mean_per_class_accuracy": mean_per_class
    }


def evaluate(
    network: Model | LogitsFn,
    split: Split,
    *,
    batch_size: int = 256,
    attack: Attack | None = None,
    key: PRNGKeyArray | None = None,
    image_size: int | None = None,
    steps: Callable[[range], Iterator[int]] = iter,
) -> dict[str, float]:
    """Mean loss and accuracy over a split.

    The last batch is padded and masked. Randomness of the attack is per example and depends on the
    example's place in the split alone, so the result depends neither on the batch size nor on the number
    of devices.

    Args:
      network: a model, or any callable from images [N, H, W, 3] in [0, 1] to logits that JAX can trace (see
        `attacks.as_network`). For many networks of one kind pass a `jax.tree_util.Partial` of one
        function: any other callable is compiled separately.
      split: uint8 images and labels on the host.
      batch_size: over all devices; accelerators must divide it.
      attack: (logits_fn, images, labels, key=keys) to images; None measures natural accuracy.
      key: for the attack's randomness.
      image_size: side of the network's images, to which those of the split are resized on the device; None
        leaves them as they are.
      steps: wraps the range of batches, to draw a progress bar.

    Returns:
      {"loss", "accuracy", "mean_per_class_accuracy"}; the last is the mean over the classes of the accuracy
      on each (Salman et al., 2020, appendix A). With an attack also "unmoved", the share of the images that
      it left as they were, and right: where the gradient is zero, say.

    Raises:
      ValueError: labels that are not classes, or logits that are not finite.
    """
    check_split(split)
    sides = (image_size, image_size) if image_size else split.images.shape[1:3]
    devices = parallel.choose_devices(batch_size)
    batch = jax.ShapeDtypeStruct((batch_size // devices, *sides, 3), jnp.float32)
    network = as_network(logits_fn(network) if isinstance(network, Model) else network, batch)
    check_labels(split.labels, split.num_images, jax.eval_shape(network, batch).shape[1])
    step = _evaluate_on_devices(attack, devices)
    if parallel.num_processes() == 1:
        # `jax.pmap` never lets go of what it has compiled; inside a `jax.jit` it compiles nothing itself.
        step = jit_for(network, step)
    network = parallel.replicate(network, devices)
    num_images = len(split.labels)
    keys = jax.random.split(jax.random.key(0) if key is None else key, num_images)
    totals = []
    for i in steps(range(-(-num_images // batch_size))):
        chosen = slice(i * batch_size, (i + 1) * batch_size)
        images = to_float(jnp.asarray(split.images[chosen]), image_size)
        batch = Batch(images, jnp.asarray(split.labels[chosen]), keys[chosen])
        batch, mask = parallel.pad(batch, batch_size)
        totals.append(step(network, *parallel.split((batch, mask), devices)))
    totals = jax.tree.map(lambda *x: np.sum(np.asarray(x, np.float64), axis=0), *jax.device_get(totals))
    if lost := int(totals["not_finite"][0]):
        raise ValueError(f"the logits of {lost:,} of {num_images:,} images are not finite numbers")
    means = evaluation_means(totals)
    if attack is not None:
        means["unmoved"] = totals["unmoved"][0] / totals["unmoved"][1]
    return {name: float(x) for name, x in means.items()}


@functools.lru_cache(maxsize=32)
def _evaluate_on_devices(attack: Attack | None, devices: int) -> Callable[..., Metrics]:
    """Compiled once for every attack (the same object) and shape, whatever the network's weights are."""
    return parallel.data_parallel(
        make_evaluate_step(attack, axis_name=parallel.AXIS), num_shared=1, num_split=2, devices=devices
    )


def predict(
    network: Model | LogitsFn,
    images: UInt8[AnyArray, "n h w c"] | Float[AnyArray, "n h w c"],
    *,
    batch_size: int = 256,
) -> Float32[np.ndarray, "n classes"]:
    """Logits, float32 [N, classes], computed in batches on one device.

    Args:
      network: a model, which takes images of every size (see `logits_fn`), or any callable from images in
        [0, 1] to logits that JAX can trace (see `attacks.as_network`).
      images: [N, H, W, C], uint8 or floats in [0, 1]; squares in colour for a model.
      batch_size: images at a time.

    Raises:
      ValueError: images of another shape, type or range.
    """
    images = images if isinstance(images, jax.Array) else np.asarray(images)
    _check_pixels(images, of_model=isinstance(network, Model))
    batch_size = min(batch_size, len(images))
    batch = jax.ShapeDtypeStruct((batch_size, *images.shape[1:]), jnp.float32)
    network = as_network(logits_fn(network) if isinstance(network, Model) else network, batch)
    return in_batches(network, _apply, images, batch_size)


def _check_pixels(images: AnyArray, *, of_model: bool) -> None:
    colour = images.ndim == 4 and images.shape[1] == images.shape[2] and images.shape[3] == 3
    if images.ndim != 4 or not len(images) or (of_model and not colour):
        raise ValueError(
            f"images have the shape {images.shape}, not {'[N, H, H, 3]' if of_model else '[N, H, W, C]'}: a "
            "single one is images[None]; at.read_images(folder, model.spec.image_size) reads files as colour "
            "squares, and a PIL image gets three channels by convert('RGB')"
        )
    if jnp.issubdtype(images.dtype, jnp.floating):
        check_images(images)
    elif images.dtype != jnp.uint8:
        raise ValueError(f"images are {images.dtype}: pass uint8, or floats in [0, 1]")


def _apply(network: Partial, images: Array) -> Array:
    return network(to_float(images) if images.dtype == jnp.uint8 else images.astype(jnp.float32))


def measure(
    model: Model, split: Split, evaluation: Evaluation, *, seed: int = 0, name: str = "model"
) -> dict[str, Any]:
    """What `evaluate` finds of a model, without and with the attack.

    Returns:
      `natural_accuracy`, `natural_loss`, `natural_mean_per_class_accuracy`, `num_images`, `attack` (in words)
      and, with an attack, the first three as `adversarial_...`, and `adversarial_unmoved` (see `evaluate`).

    Raises:
      ValueError: as `evaluate`, or a model without a head.
    """
    check_head(model.spec)
    if evaluation.num_images:
        split = type(split)(*(array[: evaluation.num_images] for array in split))
    attacks = {"natural": None, "adversarial": evaluation.attack}
    results: dict[str, Any] = {"num_images": len(split.labels), "attack": evaluation.attack_name}
    for kind, attack in attacks.items():
        if kind == "adversarial" and attack is None:
            continue
        found = evaluate(
            model,
            split,
            batch_size=evaluation.batch_size,
            attack=attack,
            key=evaluation_key(seed),
            image_size=model.spec.image_size,
            steps=lambda steps, kind=kind: progress_bar(steps, f"{kind} {name}", "batches"),
        )
        results |= {f"{kind}_{metric}": value for metric, value in found.items()}
    return results


def evaluation_key(seed: int) -> Key[Array, ""]:
    """Of the attack's random starts; apart from every key that training draws from."""
    return jax.random.fold_in(jax.random.key(seed), _EVALUATION_STREAM)


def describe(found: dict[str, Any]) -> str:
    """What `measure` returned, in half a sentence."""
    text = f"natural accuracy {found['natural_accuracy']:.1%}"
    if "adversarial_accuracy" in found:
        text += f", adversarial accuracy {found['adversarial_accuracy']:.1%} ({found['attack']})"
        if unmoved := found.get("adversarial_unmoved"):
            text += f", of which {unmoved:.1%} had a zero gradient, so the attack changed nothing"
    return f"{text}, {found['num_images']:,} images"


def check_head(spec: ModelSpec) -> None:
    """Raises a ValueError if the model was imported without a head, so that its logits mean nothing."""
    if not spec.has_head:
        raise ValueError(
            "this model was imported without a head, so it has no accuracy: fine-tune it first, with "
            "config.stage=transfer and this model as config.source"
        )


def unseen(split: Split, spec: ModelSpec) -> Split:
    """The images, of those in memory, that no fine-tuning of this model had among its own, pixel for pixel.

    They have to be prepared as those were: of the same size, cropped alike, in the same view.

    Raises:
      ValueError: images that are not uint8 [N, H, W, 3], or labels that are not theirs.
    """
    check_split(split)
    known, provenance = [np.empty(0, np.uint64)], spec.provenance
    while provenance:
        known.append(np.frombuffer(base64.b64decode(provenance.get("image_hashes", "")), np.uint64))
        source = provenance.get("source")
        provenance = source.get("provenance") if isinstance(source, dict) else None
    is_new = ~np.isin(image_hashes(split.images), np.concatenate(known))
    return Split(*(array[is_new] for array in split))


def align_classes(dataset: Dataset, spec: ModelSpec) -> Dataset:
    """The dataset with the model's labels for its classes, which may be fewer and in another order.

    Classes are matched by name; where one side only numbers them, by their number.

    Raises:
      ValueError: a class that the model does not know; without names, another number of classes, or the
        numbering of ImageNet's development kit; a model without a head.
    """
    check_head(spec)
    theirs, ours, count = dataset.class_names, spec.class_names, spec.num_classes
    numbered = tuple(map(str, range(count)))
    if ours in ((), numbered) or theirs == numbered:
        if len(theirs) != count:
            raise ValueError(f"{dataset.name} has {len(theirs)} classes, the model {count}")
        if count == 1000 and {*theirs} == {str(i) for i in range(1, 1001)}:
            raise ValueError(
                f"{dataset.name} numbers its classes from 1 to 1000, as ImageNet's development kit does, in"
                " an order that is not the networks': name the folders by WordNet ids (n01440764, ...)"
            )
        return dataset
    if unknown := [name for name in theirs if name not in ours]:
        raise ValueError(
            f"{dataset.name} has the classes {_few(unknown)}, which the model does not know; "
            f"it has {_few(ours)}"
        )
    if theirs == ours:
        return dataset
    places = np.array([ours.index(name) for name in theirs], np.int32)
    logging.info("%s: %d of the model's %d classes, matched by name", dataset.name, len(theirs), count)
    splits = {
        name: split._replace(labels=places[split.labels])
        for name in SPLITS
        if isinstance(split := getattr(dataset, name), Split)
    }
    return dataset._replace(class_names=ours, digests={}, **splits)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")
