"""Datasets as host arrays, subsets of them, and batches made from them on the device."""

from advtransfer.data.batches import Batch, make_batch
from advtransfer.data.datasets import DATASETS, Dataset, Split, check_dataset_name, load_dataset
from advtransfer.data.glyphs import LETTERS, render_glyphs
from advtransfer.data.subsets import subset_indices
from advtransfer.data.transforms import Augmentation, augment, resize, to_float

__all__ = [
    "DATASETS",
    "LETTERS",
    "Augmentation",
    "Batch",
    "Dataset",
    "Split",
    "augment",
    "check_dataset_name",
    "load_dataset",
    "make_batch",
    "render_glyphs",
    "resize",
    "subset_indices",
    "to_float",
]
