"""Which analyses are made of networks, and with which settings."""

from __future__ import annotations

from advtransfer.analysis.influence import SOLVERS
from advtransfer.analysis.visualise import PARAMETERISATIONS
from advtransfer.options import NOT_EMPTY, option, options

ANALYSES = ("saliency", "visualisation", "influence", "shape")


@options
class Interpretation:
    """The analyses of networks and their settings; those of visualisation suit images of 16²."""

    analyses: tuple[str, ...] = option(
        ANALYSES, "analyses, in the order of the page", choices=ANALYSES, lengths=NOT_EMPTY
    )
    split: str = option("test", "split of config.data", choices=("train", "test", "validation"))
    num_images: int = option(8, "images in each row of pictures", low=1)
    num_measured: int = option(256, "images behind the statistics of gradients", low=1)
    smooth_samples: int = option(50, "noisy copies of each image in SmoothGrad", low=1)
    smooth_noise: float = option(
        0.15, "standard deviation of SmoothGrad's noise, as a share of the image's range", low=0
    )
    baseline: float = option(0.0, "baseline of integrated gradients, a grey value", low=0, high=1)
    integration_steps: int = option(2048, "maximum steps of integrated gradients", low=1)
    num_steps: int = option(
        200, "steps of visualisation (the paper's at 224²: 1000 steps of 2, in pixels)", low=1
    )
    step_size: float = option(0.1, "ℓ2 step size of visualisation, in pixel units", above=0)
    eps: float = option(1000.0, "radius of the ℓ2 ball around the start, in pixel units", above=0)
    parameterisation: str = option(
        "fourier", "coordinates in which images are optimised", choices=tuple(PARAMETERISATIONS)
    )
    solver: str = option(
        "damped", "solver of influence functions (the paper's: truncated)", choices=tuple(SOLVERS)
    )
    damping: float = option(
        0.0, "constant added to the Hessian's diagonal; 0: 5e-4 × num_train, and none if truncated", low=0
    )
    rcond: float = option(0.05, "cut-off of solver=truncated", above=0, below=1)
    num_train: int = option(800, "training images to rank by influence", low=2)
    num_queries: int = option(200, "images for which training images are ranked by influence", low=1)
    cue_conflict: str = option("", "folder of SHAPE1-TEXTURE2.png, for networks of ImageNet's classes")
