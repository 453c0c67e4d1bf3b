"""Signs that attacks failed and a network is not robust: of the network alone, and of what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, Integer

from advtransfer.arrays import AnyArray
from advtransfer.attacks.losses import log_odds
from advtransfer.attacks.network import LogitsFn, as_network, jit_for
from advtransfer.attacks.pgd import check_images
from advtransfer.labels import check_labels

_FLAGS = (
    "Croce & Hein, 2020: AutoAttack’s flags"  # flags_doc.md and checks.py of github.com/fra31/auto-attack
)
_NUM_CALLS, _DIFFERENCE = 5, 1e-4  # of randomness
_PROBABILITY = 1e-5  # that a sum of probabilities may be off
_LEAD = 0.002  # of a black-box attack, in accuracy
_FALL = 0.01  # of the loss, from fewer steps to more, as a share of its rise


class RobustnessWarning(NamedTuple):
    """A sign that an accuracy under attack is not robustness."""

    name: str  # in a word or two, the same for all of a kind
    message: str  # a sentence
    source: str  # who says so, and where


def check_network(
    logits_fn: LogitsFn, images: Float[AnyArray, "n h w c"], labels: Integer[AnyArray, " n"]
) -> tuple[RobustnessWarning, ...]:
    """What of a network alone misleads attacks, in this order:

    - "randomness": calls that should be equal differ, by 1e-4 in logits of unit length or in accuracy;
    - "probabilities": the outputs are no logits;
    - "saturation": of images that are classified rightly, the float32 softmax is exactly one-hot, so the
      gradient of cross-entropy is zero. `pgd`'s own default loss does not saturate;
    - "zero gradient": of images that are classified rightly, that of `log_odds` is zero.

    Args:
      logits_fn: as for `pgd`; images [N, H, W, C] in [0, 1] to logits [N, classes].
      images: float [N, H, W, C] in [0, 1], taken in one batch; a few hundred will do.
      labels: int [N]; the true classes.

    Raises:
      ValueError: images outside [0, 1], or labels that are not classes.
    """
    chex.assert_rank(images, 4)
    chex.assert_type(images, float)
    check_images(images)
    images, calls = jnp.asarray(images, jnp.float32), []
    for _ in range(_NUM_CALLS):
        # Traced anew: what a callable draws from its own state is in its arrays.
        network = as_network(logits_fn, images)
        calls.append(np.asarray(jit_for(network, _logits)(network, images)))
    logits, found = calls[0], []
    check_labels(labels, len(images), logits.shape[1])
    directions = np.stack([x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-10) for x in calls])
    apart = max(np.linalg.norm(directions - one, axis=2).max() for one in directions)
    if apart > _DIFFERENCE or len({int(np.sum(x.argmax(1) == labels)) for x in calls}) > 1:
        message = (
            f"Equal calls of the network gave outputs that differ by up to {apart:.2g} of their length: each "
            "step of an attack climbs another network. Attack the expectation over the randomness."
        )
        found.append(RobustnessWarning("randomness", message, f"{_FLAGS}; Carlini et al., 2019, §4.6"))
    sums_to_1 = np.abs(logits.sum(1) - 1).max() < _PROBABILITY
    if logits.min() > -_PROBABILITY and logits.max() < 1 + _PROBABILITY and sums_to_1:
        message = (
            "The network’s outputs are probabilities, not logits: a softmax of them flattens the loss, and "
            "gradients vanish. Attack what comes before the softmax."
        )
        found.append(RobustnessWarning("probabilities", message, _FLAGS))
    right = logits.argmax(1) == labels
    # All other probabilities, exp of these, are below float32's smallest normal number.
    one_hot = right & (np.asarray(log_odds(logits, labels)) < np.log(np.finfo(np.float32).tiny))
    if one_hot.any():
        message = (
            f"{_images(one_hot, right)} have a softmax that is exactly one-hot in float32: the gradient of "
            "cross-entropy is zero there. Attack a loss that does not saturate, such as log-odds or DLR."
        )
        source = f"Carlini & Wagner, 2017; {_FLAGS}"
        found.append(RobustnessWarning("saturation", message, source))
    gradients = jit_for(network, _gradients)(network, images, labels)
    flat = right & ~np.asarray(jnp.any(gradients != 0, axis=(1, 2, 3)))
    if flat.any():
        message = (
            f"{_images(flat, right)} have a gradient of exactly zero with respect to their pixels: attacks "
            "by gradients cannot move them. Attack a differentiable stand-in, or without gradients."
        )
        source = f"{_FLAGS}; Carlini et al., 2019, §4.7"
        found.append(RobustnessWarning("zero gradient", message, source))
    return tuple(found)


def check_steps(losses: Mapping[int, float]) -> tuple[RobustnessWarning, ...]:
    """Whether more steps of an attack raise the loss, as they should.

    Args:
      losses: mean loss of the attacked images by number of steps, with 0 (no attack) among them, and 1.

    Returns:
      "steps", where the most steps raise the loss not at all, or by less than fewer steps do.
    """
    numbers, natural = sorted(losses), losses[0]
    last, best = losses[numbers[-1]], max(losses, key=lambda number: losses[number])
    source = "Carlini et al., 2019, §5.2"
    if last <= natural:
        message = f"{numbers[-1]} steps of PGD do not raise the loss, which is {natural:.3g}."
    elif last < losses[best] - _FALL * (losses[best] - natural):
        message = (
            f"The loss does not rise with the steps of PGD: {losses[best]:.3g} after {best}, "
            f"{last:.3g} after {numbers[-1]}."
        )
    else:
        return ()
    return (RobustnessWarning("steps", f"{message} Gradients may be masked.", source),)


def check_large_eps(accuracy: float, chance: float, *, attack: str) -> tuple[RobustnessWarning, ...]:
    """Whether accuracy falls to chance where the threat model holds one image for all, as plain grey within
    ℓ∞ 0.5.

    Args:
      accuracy: under attack; the lower end of its interval, say.
      chance: the best accuracy of one answer for all images: the largest share of a class.
      attack: in words.
    """
    if accuracy <= chance:
        return ()
    message = (
        f"Accuracy under {attack} is at least {accuracy:.1%}, but these balls share an image, and one answer "
        f"is right for {chance:.1%} at most: the attack fails to find what is there."
    )
    return (RobustnessWarning("large ε", message, "Carlini et al., 2019, §5.2"),)


def check_black_box(white_box: float, black_box: float) -> tuple[RobustnessWarning, ...]:
    """Whether an attack without gradients, such as Square, leaves more than 0.2 points less accuracy than
    those with gradients; both in [0, 1]."""
    if black_box >= white_box - _LEAD:
        return ()
    message = (
        f"An attack without gradients lowers the accuracy to {black_box:.1%}, those with gradients to "
        f"{white_box:.1%} only: gradients may be masked."
    )
    return (RobustnessWarning("black box", message, f"{_FLAGS}; Carlini et al., 2019, §5.4"),)


def _images(flags: np.ndarray, right: np.ndarray) -> str:
    return f"{flags.sum():,} of {right.sum():,} images that are classified rightly"


def _logits(network: Partial, images: Array) -> Array:
    return network(images).astype(jnp.float32)


def _gradients(network: Partial, images: Array, labels: Array) -> Array:
    return jax.grad(lambda x: jnp.sum(log_odds(network(x), labels)))(images)
