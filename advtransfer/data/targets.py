"""The target datasets of two studies of robust transfer, with their augmentation and metric.

Utrera et al., "Adversarially-trained deep nets transfer better" (ICLR 2021), section 3; Salman et al., "Do
adversarially robust ImageNet models transfer better?" (NeurIPS 2020), appendix A, and the code of both. A
dataset with `dataset` "" is not in TFDS: put its authors' files into a folder (`folder:/path`). The numbers
are used to plan with datasets that are not prepared (module `planned`).

Numbers of images are as published; a test verifies CIFAR-10's. Those of SVHN, Fashion-MNIST, KMNIST,
Caltech-101 (version 3.0.0), cars, DTD, flowers, Food-101, pets and SUN397 are from the TFDS catalogue
(tensorflow.org/datasets/catalog), train and validation added up if both are for training. Which datasets have
a per-class metric is not checked against Salman et al.'s table. Download sizes are those of the files that
TFDS lists (`builder.url_infos`); ImageNet's numbers of images are those of its catalogue.
"""

from __future__ import annotations

from typing import NamedTuple


class Target(NamedTuple):
    """A target dataset; `num_train` includes images that are later held out for validation."""

    dataset: str  # name for `load_dataset`
    num_classes: int
    num_train: int
    num_test: int
    side: int | None  # pixels, as recorded; None: photographs of different sizes
    augmentation: str  # one of `AUGMENTATIONS`
    metric: str = "accuracy"  # or mean_per_class: the mean of the per-class accuracies
    num_channels: int = 3  # of the recorded images; 1 if they are grey


TARGETS: dict[str, dict[str, Target]] = {
    "utrera": {
        "cifar10": Target("tfds:cifar10", 10, 50_000, 10_000, 32, "utrera_color"),
        "cifar100": Target("tfds:cifar100", 100, 50_000, 10_000, 32, "utrera_color"),
        "svhn": Target("tfds:svhn_cropped", 10, 73_257, 26_032, 32, "utrera_color"),
        "mnist": Target("tfds:mnist", 10, 60_000, 10_000, 28, "none", num_channels=1),
        "fashion_mnist": Target("tfds:fashion_mnist", 10, 60_000, 10_000, 28, "none", num_channels=1),
        "kmnist": Target("tfds:kmnist", 10, 60_000, 10_000, 28, "none", num_channels=1),
    },
    "salman": {
        "aircraft": Target("", 100, 6_667, 3_333, None, "salman", "mean_per_class"),
        "birdsnap": Target("", 500, 32_677, 8_171, None, "salman"),
        "caltech101": Target("tfds:caltech101", 102, 3_060, 6_084, None, "salman", "mean_per_class"),
        "caltech256": Target("", 257, 15_420, 15_187, None, "salman", "mean_per_class"),
        "cars": Target("tfds:cars196", 196, 8_144, 8_041, None, "salman"),
        "cifar10": Target("tfds:cifar10", 10, 50_000, 10_000, 32, "salman"),
        "cifar100": Target("tfds:cifar100", 100, 50_000, 10_000, 32, "salman"),
        "dtd": Target("tfds:dtd:train+validation", 47, 3_760, 1_880, None, "salman"),
        "flowers": Target(
            "tfds:oxford_flowers102:train+validation", 102, 2_040, 6_149, None, "salman", "mean_per_class"
        ),
        "food": Target("tfds:food101", 101, 75_750, 25_250, None, "salman"),
        "pets": Target("tfds:oxford_iiit_pet", 37, 3_680, 3_669, None, "salman", "mean_per_class"),
        "sun397": Target("tfds:sun397/standard-part1-120k", 397, 19_850, 19_850, None, "salman"),
    },
}

# The source dataset of both studies; TFDS calls its test images "validation".
IMAGENET = Target("tfds:imagenet2012", 1000, 1_281_167, 50_000, None, "robustness")

# Megabytes (10^6 bytes) of the files that TFDS prepares a dataset from, for all of its configurations.
DOWNLOAD_MB = {
    "caltech101": 137,
    "cars196": 1957,
    "cifar10": 170,
    "cifar100": 169,
    "dtd": 625,
    "fashion_mnist": 31,
    "food101": 4996,
    "imagenet2012": 154_642,
    "kmnist": 21,
    "mnist": 12,
    "oxford_flowers102": 345,
    "oxford_iiit_pet": 811,
    "sun397": 39_096,
    "svhn_cropped": 1576,
}
BY_HAND = ("imagenet2012",)  # not downloaded by TFDS


def find_target(name: str) -> Target | None:
    """The target with this name for `load_dataset`; None if it is not listed."""
    known = [IMAGENET, *(target for targets in TARGETS.values() for target in targets.values())]
    return next((target for target in known if name and target.dataset == name), None)
