"""Feature visualisation and inversion: images that maximise a unit, or share another image's representation.

    start = noise(key, (8, 224, 224, 3))                       # or images
    pictures = visualise(unit(model, block=15, channels=np.arange(8)), start)
    found = visualise(match(features_fn(model, 16), features_fn(model, 16)(images)), start)
    grid([start, pictures])                                    # uint8, one picture

The search is the attack's own (`pgd`), in any threat model around the start; an objective takes the place of
the loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, Float32, Integer, Key, PRNGKeyArray, UInt8

from advtransfer.arrays import AnyArray
from advtransfer.attacks import L2, ThreatModel, pgd
from advtransfer.attacks.threat_models import Images, Size
from advtransfer.models import Model, ResNet


class Objective(NamedTuple):
    """What to maximise: for image i the score `scores_fn(images)[i, chosen[i]]`."""

    scores_fn: Partial  # images [N, H, W, 3] in [0, 1] -> [N, K]
    chosen: Integer[AnyArray, " n"] | int  # or one for all


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Boundary:
    """Which activation of which network, as part of a pytree's structure."""

    module: ResNet
    stop: int | None
    fake_relu: bool


def _features(boundary: _Boundary, variables, images):
    return boundary.module.apply(variables, images, stop=boundary.stop, fake_relu=boundary.fake_relu)


def features_fn(model: Model, stop: int | None = None, *, fake_relu: bool = True) -> Partial:
    """images [N, H, W, 3] in [0, 1] -> the activation at boundary `stop` (see `ResNet.__call__`), or the
    logits.

    A pytree whose leaves are the weights. `fake_relu`: gradients pass the last ReLU before that boundary as
    if it were the identity, so that a unit can be maximised from where it is silent. Activations are
    unchanged.
    """
    return Partial(_features, _Boundary(model.module, stop, fake_relu), model.variables)


def unit(
    model: Model, block: int, channels: int | Integer[AnyArray, " n"], *, fake_relu: bool = True
) -> Objective:
    """The mean over positions of a channel of what leaves residual block 0 ... B-1; of the last block that is
    a component of the pooled representation, what the paper maximises.

    Args:
      model: the network.
      block: the residual block.
      channels: one for all images, or int [N].
      fake_relu: as in `features_fn`.

    Raises:
      ValueError: no such block; `visualise` raises one for a channel that does not exist.
    """
    if not 0 <= block < model.module.num_blocks:
        raise ValueError(f"there is no block {block}: this network has 0 to {model.module.num_blocks - 1}")
    return Objective(Partial(_pooled, features_fn(model, block + 1, fake_relu=fake_relu)), channels)


def logit(model: Model, classes: int | Integer[AnyArray, " n"], *, fake_relu: bool = True) -> Objective:
    """The logit of a class, one for all images or int [N]; as `unit`."""
    return Objective(features_fn(model, fake_relu=fake_relu), classes)


def match(features_fn: Partial, representation: Float[AnyArray, "n ..."]) -> Objective:
    """Minus ‖features - representation‖² / ‖representation‖²: inversion (Mahendran & Vedaldi, 2015,
    eq. 2; from noise in robust networks, Engstrom et al., 2019, arXiv:1906.00945).

    Args:
      features_fn: images to activations [N, ...], such as this module's `features_fn`.
      representation: what is to be matched, [N, ...], or [1, ...] for all images.
    """
    return Objective(Partial(_nearness, features_fn, jnp.asarray(representation, jnp.float32)), 0)


def _pooled(features_fn, images):
    features = features_fn(images).astype(jnp.float32)
    return jnp.mean(features, axis=tuple(range(1, features.ndim - 1)))


def _nearness(features_fn, representation, images):
    features = features_fn(images).astype(jnp.float32)
    if features.shape[1:] != representation.shape[1:]:
        raise ValueError(
            f"the representation is {representation.shape[1:]} and the network's there "
            f"{features.shape[1:]}: take both at the same boundary and image size"
        )
    axes = tuple(range(1, features.ndim))
    scale = jnp.maximum(jnp.sum(representation**2, axis=axes), 1e-12)
    return -(jnp.sum((features - representation) ** 2, axis=axes) / scale)[:, None]


def _chosen_scores(scores, chosen):
    return jnp.take_along_axis(scores, chosen[:, None], axis=1)[:, 0]


class Fourier(NamedTuple):
    """A threat model climbed in Fourier coordinates: smooth changes come first, the allowed set is the same.

    The image is parametrised as the transform of coefficients that are each scaled by 1 / max(f, f_min), f
    the spatial frequency and f_min that of one cycle per longer side (Olah et al., 2017, "Feature
    Visualization", distill.pub, on preconditioning; without its decorrelation of ImageNet's colours).
    Steepest ascent there is, in pixels, a step along the gradient filtered by the squared scale, which the
    threat model takes as it would take any gradient; `step_size` keeps its unit.
    """

    inner: ThreatModel

    def project(self, images: Images, centers: Images) -> Float[Array, " n *image"]:
        return self.inner.project(images, centers)

    def step(self, images: Images, gradients: Images, step_size: Size) -> Images:
        return self.inner.step(images, scale_spectrum(gradients, 2), step_size)

    def random_start(self, keys: Key[Array, " n"], centers: Images) -> Float[Array, " n *image"]:
        return self.inner.random_start(keys, centers)


def scale_spectrum(images: Float[AnyArray, "n h w c"], power: int) -> Float[Array, "n h w c"]:
    """Images [N, H, W, C] with every frequency f multiplied by (f_min / max(f, f_min))^power; see `Fourier`.
    Power 1 turns the coordinates into an image, -1 an image into its coordinates."""
    chex.assert_rank(images, 4)
    height, width = images.shape[1:3]
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    lowest = 1.0 / max(height, width)
    scale = ((lowest / np.maximum(frequency, lowest)) ** power).astype(np.float32)[None, :, :, None]
    return jnp.fft.irfft2(jnp.fft.rfft2(images, axes=(1, 2)) * scale, (height, width), axes=(1, 2))


WHOLE_BOX = L2(1000.0)  # the paper's: larger than the diagonal of [0, 1] at 224²
PARAMETERISATIONS = {"pixels": lambda threat_model: threat_model, "fourier": Fourier}


def visualise(
    objective: Objective,
    images: Float[AnyArray, "n h w 3"],
    *,
    threat_model: ThreatModel = WHOLE_BOX,
    step_size: float = 2.0,
    num_steps: int = 1000,
    parameterisation: str = "pixels",
) -> Float32[Array, "n h w 3"]:
    """Climbs the objective from `images` by projected gradient ascent.

    The defaults are the paper's (Utrera et al., 2021, on 224² pixels): ℓ2, ε = 1000, where only [0, 1] is a
    bound, 1000 steps of 2. Of the iterates the best is returned, not the last. All images are on the device
    at once, and each is climbed on its own.

    Args:
      objective: of `unit`, `logit` or `match`.
      images: where to start, float [N, H, W, 3] in [0, 1]; see `noise`.
      threat_model: the allowed set around `images`.
      step_size: length of a step in the threat model's norm, pixel units.
      num_steps: gradient steps.
      parameterisation: "pixels", or "fourier" for `Fourier`.

    Returns:
      float32 [N, H, W, 3] in the threat model's set and in [0, 1].

    Raises:
      ValueError: no such unit, class or parameterisation; a representation that does not fit; images that
        are no floats.
    """
    if parameterisation not in PARAMETERISATIONS:
        raise ValueError(f"unknown parameterisation {parameterisation!r}: {', '.join(PARAMETERISATIONS)}")
    chex.assert_rank(images, 4)
    chex.assert_type(objective.chosen, int)
    num_units = jax.eval_shape(objective.scores_fn, images).shape[-1]
    chosen = np.broadcast_to(np.asarray(objective.chosen, np.int32), len(images))
    missing = chosen[(chosen < 0) | (chosen >= num_units)]
    if missing.size:
        raise ValueError(f"there is no unit or class {missing[0]}: there are 0 to {num_units - 1}")
    return pgd(
        objective.scores_fn,
        jnp.asarray(images),
        jnp.asarray(chosen),
        PARAMETERISATIONS[parameterisation](threat_model),
        num_steps=num_steps,
        step_size=step_size,
        loss_fn=_chosen_scores,
    )


def noise(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float32[Array, " ..."]:
    """The paper's noise to start from: N(0.5, 1/20), the latter the standard deviation, clipped to [0, 1]."""
    return jnp.clip(0.5 + jax.random.normal(key, shape, jnp.float32) / 20.0, 0.0, 1.0)


def grid(
    pictures: Float[AnyArray, "rows columns h w 3"] | Sequence, *, border: int = 2
) -> UInt8[np.ndarray, "_ _ 3"]:
    """Rows of pictures as one, uint8 [R·(H + border) + border, C·(W + border) + border, 3], white between.

    Args:
      pictures: [R, C, H, W, 3] in [0, 1], or nested lists of this form.
      border: pixels.
    """
    pictures = np.stack([np.asarray(row, np.float32) for row in pictures])
    chex.assert_rank(pictures, 5)
    framed = np.pad(
        pictures, ((0, 0), (0, 0), (border, 0), (border, 0), (0, 0)), constant_values=1.0
    ).transpose(0, 2, 1, 3, 4)
    rows, height, columns, width, colours = framed.shape
    whole = framed.reshape(rows * height, columns * width, colours)
    whole = np.pad(whole, ((0, border), (0, border), (0, 0)), constant_values=1.0)
    return np.round(255 * np.clip(whole, 0.0, 1.0)).astype(np.uint8)
