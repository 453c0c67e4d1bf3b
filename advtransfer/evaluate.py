"""Natural and adversarial accuracy, every example counted once, on all devices."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from advtransfer import parallel
from advtransfer.attacks import LogitsFn, cross_entropy
from advtransfer.data import Batch, Split, to_float
from advtransfer.train import Metrics, means, sum_metrics

Attack = Callable[..., jax.Array]


def make_evaluate_step(
    attack: Attack | None = None, *, axis_name: str | None = None
) -> Callable[[LogitsFn, Batch, jax.Array], Metrics]:
    """A pure function (logits_fn, batch, mask) -> {"loss": (sum, count), "accuracy": (sum, count)}.

    With an attack, images are replaced by `attack(logits_fn, images, labels, key=batch.keys)` first.
    Examples whose mask is 0 count for nothing.
    """

    def evaluate_step(logits_fn, batch, mask):
        images = batch.images
        if attack is not None:
            images = attack(logits_fn, images, batch.labels, key=batch.keys)
        logits = logits_fn(images)
        losses = cross_entropy(logits, batch.labels)
        return parallel.total(sum_metrics(losses, logits, batch.labels, mask), axis_name)

    return evaluate_step


def evaluate(
    logits_fn: LogitsFn,
    split: Split,
    *,
    batch_size: int,
    attack: Attack | None = None,
    key: jax.Array | None = None,
    steps: Callable[[range], Iterator[int]] = iter,
) -> dict[str, float]:
    """Mean loss and accuracy over a split.

    The last batch is padded and masked. Randomness of the attack is per example and depends on the
    example's place in the split alone, so the result depends neither on the batch size nor on the number
    of devices.

    Args:
      logits_fn: a pytree callable, such as `logits_fn(model)`: images [N, H, W, 3] in [0, 1] to logits.
      split: uint8 images and labels on the host.
      batch_size: over all devices, which must divide it.
      attack: (logits_fn, images, labels, key=keys) to images; None measures natural accuracy.
      key: for the attack's randomness.
      steps: wraps the range of batches, to draw a progress bar.

    Returns:
      {"loss", "accuracy"}.
    """
    step = _evaluate_on_devices(attack)
    logits_fn = parallel.replicate(logits_fn)
    num_images = len(split.labels)
    keys = jax.random.split(jax.random.key(0) if key is None else key, num_images)
    totals = []
    for i in steps(range(-(-num_images // batch_size))):
        chosen = slice(i * batch_size, min((i + 1) * batch_size, num_images))
        batch = Batch(to_float(jnp.asarray(split.images[chosen])), split.labels[chosen], keys[chosen])
        batch, mask = parallel.pad(batch, batch_size)
        totals.append(step(logits_fn, *parallel.split((batch, mask))))
    return means(jax.tree.map(lambda *x: np.sum(x), *jax.device_get(totals)))


@functools.lru_cache(maxsize=32)
def _evaluate_on_devices(attack: Attack | None) -> Callable[..., Metrics]:
    """Compiled once for every attack (the same object) and shape, whatever the network's weights are."""
    return parallel.data_parallel(
        make_evaluate_step(attack, axis_name=parallel.AXIS), num_shared=1, num_split=2
    )


def predict(logits_fn: LogitsFn, images: np.ndarray | jax.Array, *, batch_size: int = 256) -> Any:
    """Logits [N, classes] of float images [N, H, W, 3] in [0, 1], computed in batches on one device."""
    batch_size = min(batch_size, len(images))
    batches = [
        _apply(logits_fn, parallel.pad(images[i : i + batch_size], batch_size)[0])
        for i in range(0, len(images), batch_size)
    ]
    return np.concatenate([np.asarray(batch) for batch in batches])[: len(images)]


@jax.jit
def _apply(logits_fn: LogitsFn, images: jax.Array) -> jax.Array:
    return logits_fn(images)
