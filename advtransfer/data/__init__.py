"""Datasets as host arrays, subsets of them, and batches assembled on the device."""

from advtransfer.data.batches import Batch, check_batch, make_batch
from advtransfer.data.cache import image_hashes
from advtransfer.data.datasets import (
    BROKEN,
    DATASETS,
    LOADING,
    Dataset,
    Split,
    check_dataset_name,
    check_split,
    load_dataset,
)
from advtransfer.data.feed import Feed, make_feed
from advtransfer.data.glyphs import LETTERS, render_glyphs
from advtransfer.data.planned import known_sizes, plan_dataset
from advtransfer.data.recorded import SPLITS
from advtransfer.data.stream import LostWorker, StreamedSplit
from advtransfer.data.subsets import check_subset, subset_indices
from advtransfer.data.targets import TARGETS, Target
from advtransfer.data.tfds import NotPrepared
from advtransfer.data.transforms import (
    AUGMENTATIONS,
    Augmentation,
    augment,
    choose_augmentation,
    resize,
    to_float,
)
from advtransfer.data.unlabelled import read_images
from advtransfer.data.views import VIEWS

__all__ = [
    "AUGMENTATIONS",
    "BROKEN",
    "DATASETS",
    "LETTERS",
    "LOADING",
    "SPLITS",
    "TARGETS",
    "VIEWS",
    "Augmentation",
    "Batch",
    "Dataset",
    "Feed",
    "LostWorker",
    "NotPrepared",
    "Split",
    "StreamedSplit",
    "Target",
    "augment",
    "check_batch",
    "check_dataset_name",
    "check_split",
    "check_subset",
    "choose_augmentation",
    "image_hashes",
    "known_sizes",
    "load_dataset",
    "make_batch",
    "make_feed",
    "plan_dataset",
    "read_images",
    "render_glyphs",
    "resize",
    "subset_indices",
    "to_float",
]
