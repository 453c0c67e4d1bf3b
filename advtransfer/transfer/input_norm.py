"""What images are normalised with when a network is transferred."""

from __future__ import annotations

import dataclasses

import chex
import numpy as np
from jaxtyping import UInt8

from advtransfer.models import Model


def normalised_by(model: Model, images: UInt8[np.ndarray, "n h w 3"]) -> Model:
    """The model with the mean and standard deviation of a target's images in the place of its source's.

    Utrera et al. (2021) start from a natural network whose loader normalises by the target's statistics, and
    from robust ones that carry their own (their code).

    Args:
      model: any.
      images: the target's training images at their own size.

    Raises:
      ValueError: a channel is the same in all images.
    """
    chex.assert_shape(images, (None, None, None, 3))
    chex.assert_type(images, np.uint8)
    # Whole numbers have exact sums; a histogram needs no copy of the images.
    counts = np.stack([np.bincount(images[..., c].reshape(-1), minlength=256) for c in range(3)])
    values = np.arange(256) / 255
    mean = counts @ values / counts.sum(axis=1)
    std = np.sqrt(counts @ values**2 / counts.sum(axis=1) - mean**2)
    if std.min() < 1e-6:
        raise ValueError(
            f"channel {std.argmin()} of the target is the same everywhere, so images cannot be normalised "
            "by their own statistics: take those of the source"
        )
    mean, std = (tuple(float(np.float32(x)) for x in statistics) for statistics in (mean, std))
    return Model(
        model.module.clone(mean=mean, std=std),
        model.variables,
        dataclasses.replace(model.spec, mean=mean, std=std),
    )
