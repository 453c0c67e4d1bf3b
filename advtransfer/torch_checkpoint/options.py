"""What the user knows of a PyTorch file."""

from __future__ import annotations

from advtransfer.attacks import NORMS
from advtransfer.options import option, options


@options
class CheckpointOptions:
    """What the user knows of a PyTorch file; defaults leave it to the file and the table of known models."""

    architecture: str = option("", "'': found by the names and shapes in the file")
    weights: str = option(
        "", "which of several networks in it, by key or prefix; '': an average before others"
    )
    num_classes: int = option(0, "0: the size of its head", low=0)
    image_size: int = option(0, "pixels; 0: 224, or 32 for a network with a CIFAR stem", low=0)
    mean: tuple[float, ...] = option(
        (), "per channel, of images in [0, 1]; (): the file's, or the publisher's", lengths=(0, 3)
    )
    std: tuple[float, ...] = option((), "as mean", lengths=(0, 3), above=0)
    norm: str = option("", "threat model of its training; '': the table's", choices=("", *NORMS))
    eps: float = option(0.0, "its radius, in pixel units", low=0)
    sha256: str = option("", "the file is refused unless it has this hash; '': the table's, where known")
