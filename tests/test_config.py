"""Where the values of a key end, on both sides of every bound."""

import pytest

from advtransfer.config import NORMS, STAGES
from advtransfer.config.checks import _CHECKS

POSITIVE, NOT_NEGATIVE, FRACTION = ([1e-9, 1], [0, -1]), ([0, 1e-9], [-1e-9]), ([0, 1 - 1e-9], [-1e-9, 1])
BOUNDS = {
    "stage": (STAGES, ["", "sauce"]),
    "seed": ([0, 2**32 - 1], [-1, 2**32]),
    "dtype": (["auto", "float32", "bfloat16"], ["float16"]),
    "broken_images": (["refuse", "skip"], ["repair"]),
    "checkpoint.mean": ([(), (0, 0, 0)], [(0,), (0,) * 4]),
    "checkpoint.std": ([(), (1e-9, 1, 1)], [(1,), (0, 1, 1), (1,) * 4]),
    "checkpoint.norm": (["", *NORMS], ["l1"]),
    "train.mean": ([(0, 0, 0)], [(), (0, 0)]),
    "train.std": ([(1e-9, 1, 1)], [(), (1, 1), (1, 0, 1)]),
    "train.attack_batch_norm": (["running", "batch"], ["train"]),
    "train.loading": (["auto", "memory", "stream"], ["disk"]),
    "train.num_workers": ([-1, 0], [-2]),
    "transfer.num_train_images": ([1, -1], [0, -2]),
    "transfer.num_unfrozen_blocks": ([-1, 0], [-2]),
    "transfer.choose_num_unfrozen_blocks": (["given", "rule", "cross_validation"], [""]),
    "transfer.num_folds": ([2], [1]),
    "transfer.head_init": (["torch", "normal", "zeros"], ["ones"]),
    "transfer.num_views": ([0], [-1]),
    "transfer.frozen_batch_norm": (["update", "source", "target"], ["none"]),
    "transfer.input_norm": (["source", "target"], ["none"]),
    "study.num_train_images": ([(1, -1)], [(), (1, 0), (-2,)]),
    "study.num_unfrozen_blocks": ([(-1, 0)], [(), (0, -2)]),
    "study.views": ([(), ("grey", "edges")], [("grey", "red")]),
    "study.seeds": ([(), (0, 2**32 - 1)], [(-1,), (2**32,)]),
    "study.fewer_seeds": ([(), ((1, 1),)], [((0, 1),), ((1, 0),), ((1, 1.0),), ((1, 1, 1),), ((1,),)]),
    "study.learning_rates": ([(), (1e-9,)], [(0.1, 0.0)]),
    "study.weight_decays": ([(), (0.0,)], [(0.1, -1e-9)]),
    "study.epochs": ([(), (1,)], [(1, 0)]),
    "study.split": (["test", "validation"], ["train"]),
    "interpret.analyses": ([("shape", "influence")], [(), ("shape", "size")]),
    "report.analyses": ([(), ("shape", "influence")], [("shape", "size")]),
    "interpret.num_train": ([2], [1]),
    "interpret.baseline": ([0, 1], [-1e-9, 1 + 1e-9]),
    "interpret.parameterisation": (["pixels", "fourier"], ["wavelet"]),
    "interpret.solver": (["damped", "truncated", "cg"], ["exact"]),
    "interpret.rcond": ([1e-9, 1 - 1e-9], [0, 1]),
    "report.reference": (["none", "paper"], ["blog"]),
    "report.accuracy_unit": (["auto", "fraction", "percent"], ["", "ratio"]),
    "transfer.view": (["natural", "low_pass"], ["red"]),
    "train.augmentation.preset": (["", "none", "utrera_color", "salman", "robustness"], ["utrera"]),
    "transfer.augmentation.preset": (["", "none", "utrera", "robustness"], ["madry"]),
    **dict.fromkeys(
        ("train.schedule", "transfer.schedule"), (["constant", "step", "cosine", "cyclic"], ["linear"])
    ),
    **dict.fromkeys(("evaluate.split", "interpret.split"), (["train", "test", "validation"], ["all"])),
    **dict.fromkeys(("train.norm", "evaluate.norm"), (NORMS, ["", "l1"])),
}

WORDS = {"must be positive": POSITIVE, "must not be negative": NOT_NEGATIVE, "must be in [0, 1)": FRACTION}


@pytest.mark.parametrize("key", _CHECKS)
def test_both_sides_of_every_bound(key):
    is_good, complaint = _CHECKS[key]
    accepted, refused = BOUNDS.get(key) or WORDS[complaint]
    assert all(map(is_good, accepted))
    assert not any(map(is_good, refused))


def test_what_may_be_zero():
    """As the configuration says of these keys."""
    zero = {key for key, (is_good, complaint) in _CHECKS.items() if complaint in WORDS and is_good(0)}
    assert zero == {
        *("checkpoint.num_classes", "checkpoint.image_size", "checkpoint.eps", "train.eps"),
        *("train.validate_every", "train.average_decay", "transfer.head_scale", "transfer.max_steps"),
        *("study.calibration", "study.group_size", "evaluate.eps", "evaluate.num_images"),
        *("interpret.smooth_noise", "interpret.damping", "report.num_pictures"),
        *(
            f"{stage}.{key}"
            for stage in ("train", "transfer")
            for key in (
                *("weight_decay", "momentum", "label_smoothing", "augmentation.crop_padding"),
                *("augmentation.rotation", "augmentation.lighting", "augmentation.jitter"),
                "augmentation.resized_crop",
            )
        ),
    }
