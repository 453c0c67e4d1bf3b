"""Shape against texture: what a network goes by where the two cues point to different classes.

    conflict = read_cue_conflict("cue-conflict", image_size=224)      # the images of Geirhos et al., or alike
    found = measure(at.logits_fn(model), conflict)
    found.overall.shape_bias.value, found.per_class.shape.value       # and .lower, .upper, .count, .total

    conflict = glyph_cue_conflict(0.06, opacity=0.2)                  # the same without a download
    found = measure(at.logits_fn(model), conflict, LETTER_OUTPUTS)

Geirhos et al., "ImageNet-trained CNNs are biased towards texture; increasing shape bias improves accuracy and
robustness" (ICLR 2019). Classes go by their names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import chex
import numpy as np
import scipy
from jaxtyping import Float, Real, Shaped

from advtransfer.analysis.cue_conflict import CueConflict
from advtransfer.analysis.imagenet16 import IMAGENET16
from advtransfer.arrays import AnyArray
from advtransfer.attacks import LogitsFn
from advtransfer.evaluate import predict
from advtransfer.intervals import Share, share

_Counts = np.ndarray | np.integer


class Cues(NamedTuple):
    """How decisions divide; the last three are shares of all images and add up to 1."""

    shape_bias: Share  # for the shape, of those for shape or texture
    shape: Share  # accuracy on the shape cue
    texture: Share  # accuracy on the texture cue
    neither: Share


class ShapeBias(NamedTuple):
    """Over all images whose cues disagree, and by the class of their shape."""

    overall: Cues
    class_names: tuple[str, ...]  # [C] in alphabetical order, those of the shapes
    per_class: Cues  # [C]


def decide(
    logits: Float[AnyArray, "n outputs"], groups: Mapping[str, Sequence[int]] = IMAGENET16
) -> Shaped[np.ndarray, " n"]:
    """The class of each image, names [N]: the one whose outputs have the highest mean probability.

    Probabilities are the softmax over all outputs [N, outputs], those of no class included; the mean is what
    Geirhos et al. recommend (texture-vs-shape, README; "Generalisation in humans and deep neural networks",
    NeurIPS 2018, arXiv:1808.08750, appendix). Of equals the first of `groups` is taken.

    Raises:
      ValueError: a class has no outputs, or one that is not there.
    """
    chex.assert_rank(logits, 2)
    for name, outputs in groups.items():
        if not outputs or not 0 <= min(outputs) <= max(outputs) < logits.shape[1]:
            raise ValueError(
                f"class {name!r} needs some of the outputs 0 to {logits.shape[1] - 1}, not {list(outputs)}"
            )
    probabilities = scipy.special.softmax(np.asarray(logits, np.float64), axis=1)
    means = np.stack([probabilities[:, list(outputs)].mean(axis=1) for outputs in groups.values()], axis=1)
    return np.array(list(groups))[means.argmax(axis=1)]


def shape_bias(
    decisions: Shaped[np.ndarray, " n"], shapes: Shaped[np.ndarray, " n"], textures: Shaped[np.ndarray, " n"]
) -> ShapeBias:
    """Decisions for the shape over those for shape or texture (Geirhos et al., section 2), and other shares.

    Images whose shape and texture are of one class do not count. Intervals are those of independent images;
    images that share a shape or a texture are not quite that.

    Args:
      decisions, shapes, textures: class names [N].

    Raises:
      ValueError: no image has cues of two classes.
    """
    chex.assert_rank(decisions, 1)
    chex.assert_equal_shape([decisions, shapes, textures])
    conflict = shapes != textures
    if not conflict.any():
        raise ValueError("no image has the shape of one class and the texture of another")
    decisions, shapes, textures = (names[conflict] for names in (decisions, shapes, textures))
    class_names, of = np.unique(shapes, return_inverse=True)
    shape, texture, total = (
        np.bincount(of[chosen], minlength=len(class_names))
        for chosen in (decisions == shapes, decisions == textures, np.full(len(of), True))
    )
    return ShapeBias(
        overall=_cues(shape.sum(), texture.sum(), total.sum()),
        class_names=tuple(class_names.tolist()),
        per_class=_cues(shape, texture, total),
    )


def measure(
    logits_fn: LogitsFn,
    conflict: CueConflict,
    groups: Mapping[str, Sequence[int]] = IMAGENET16,
    *,
    batch_size: int = 64,
) -> ShapeBias:
    """The shape bias of a network; see `decide` for `groups`, `shape_bias` for the rest."""
    chex.assert_shape(conflict.images, (None, None, None, 3))
    chex.assert_type(conflict.images, np.uint8)
    chex.assert_shape([conflict.shapes, conflict.textures], conflict.images.shape[:1])
    logits = [
        predict(logits_fn, conflict.images[i : i + batch_size] / np.float32(255), batch_size=batch_size)
        for i in range(0, len(conflict.images), batch_size)
    ]
    return shape_bias(decide(np.concatenate(logits), groups), conflict.shapes, conflict.textures)


def half_point(
    strengths: Sequence[float] | Real[np.ndarray, " m"], biases: Sequence[float] | Real[np.ndarray, " m"]
) -> float:
    """The strength of a cue [M] at which the shape bias [M] first comes to one half, interpolated linearly.

    NaN if it does not.
    """
    above = np.asarray(biases, np.float64) - 0.5
    chex.assert_rank(above, 1)
    chex.assert_shape(np.asarray(strengths), above.shape)
    for i in range(len(above) - 1):
        if above[i] * above[i + 1] <= 0 and above[i] != above[i + 1]:
            return float(
                strengths[i] + above[i] / (above[i] - above[i + 1]) * (strengths[i + 1] - strengths[i])
            )
    return float("nan")


def _cues(shape: _Counts, texture: _Counts, total: _Counts) -> Cues:
    return Cues(
        share(shape, shape + texture),
        *(share(count, total) for count in (shape, texture, total - shape - texture)),
    )
