"""Options for importing a PyTorch file."""

from __future__ import annotations

from advtransfer.norms import NORMS, check_radius
from advtransfer.options import option, options


@options
class CheckpointOptions:
    """Properties of a PyTorch file; by default they are taken from the file and the table of known models."""

    architecture: str = option("", "architecture; '': inferred from the names and shapes in the file")
    weights: str = option(
        "", "which of several networks in the file, by key or prefix; '': an averaged one if there is any"
    )
    num_classes: int = option(0, "classes of the head; 0: as many as in the file", low=0)
    image_size: int = option(
        0, "side of the network's images in pixels; 0: 224, or 32 with a CIFAR stem", low=0
    )
    mean: tuple[float, ...] = option(
        (), "mean per channel, of images in [0, 1]; (): the file's, or as published", lengths=(0, 3)
    )
    std: tuple[float, ...] = option((), "standard deviation, like mean", lengths=(0, 3), above=0)
    norm: str = option("", "threat model of its training; '': as published", choices=("", *NORMS))
    eps: float = option(0.0, "radius of the threat model, in pixel units", low=0)
    sha256: str = option("", "required hash of the file; '': that of the table, if known")

    def check(self) -> None:
        check_radius(self.norm, self.eps)
