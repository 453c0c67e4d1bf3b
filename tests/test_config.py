"""What values every key takes: both sides of every bound, by the options class that owns the key."""

import pytest

from advtransfer import config as base
from advtransfer.config import STAGES, ConfigError, read
from advtransfer.norms import NORMS

BOUNDS = {
    "stage": (STAGES, ["", "sauce"]),
    "seed": ([0, 2**32 - 1], [-1, 2**32, 0.5, True, "1"]),
    "dtype": (["auto", "float32", "bfloat16"], ["float16"]),
    "broken_images": (["refuse", "skip"], ["repair"]),
    "checkpoint.mean": ([(), (0, 0, 0)], [(0,), (0,) * 4, "abc"]),
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
    "study.engine": (["local", "ray"], ["slurm"]),
    "study.ray_device": (["auto", "gpu", "core"], ["tpu"]),
    "interpret.analyses": ([("shape", "influence")], [(), ("shape", "size")]),
    "report.analyses": ([(), ("shape", "influence")], [("shape", "size")]),
    "evaluate.l2_epsilons": ([(), (0, 3.0)], [(0.1, -1e-9), 0.1]),
    "evaluate.linf_epsilons": ([(), (0, 1 - 1e-9)], [(1,), (-1e-9,)]),
    "evaluate.auto_attack": (["none", "standard", "plus"], ["rand", ""]),
    "predict.splits": ([("validation", "test")], [(), ("train",)]),
    "predict.abstain_below": ([0, 1], [-1e-9, 1 + 1e-9]),
    "export.inputs": (["uint8", "float", "normalised"], ["int8"]),
    "export.platforms": ([("cpu",)], [(), ("gpu",)]),
    "interpret.num_train": ([2], [1]),
    "interpret.baseline": ([0, 1], [-1e-9, 1 + 1e-9]),
    "interpret.parameterisation": (["pixels", "fourier"], ["wavelet"]),
    "interpret.solver": (["damped", "truncated", "cg"], ["exact"]),
    "interpret.rcond": ([1e-9, 1 - 1e-9], [0, 1]),
    "report.reference": (["none", "paper"], ["blog"]),
    "report.accuracy_unit": (["auto", "fraction", "percent"], ["", "ratio"]),
    "transfer.view": (["natural", "low_pass"], ["red"]),
    **dict.fromkeys(
        ("train.augmentation.preset", "transfer.augmentation.preset"),
        (["", "none", "utrera", "utrera_color", "salman", "robustness"], ["madry"]),
    ),
    **dict.fromkeys(
        ("train.schedule", "transfer.schedule"), (["constant", "step", "cosine", "cyclic"], ["linear"])
    ),
    **dict.fromkeys(("evaluate.split", "interpret.split"), (["train", "test", "validation"], ["all"])),
    **dict.fromkeys(("train.norm", "evaluate.norm"), (NORMS, ["", "l1"])),
}


KINDS = {  # (accepted, refused): the keys
    ((1e-9, 1), (0, -1, float("nan"), float("inf"), "1")): (
        "train.attack_step_ratio train.learning_rate transfer.learning_rate evaluate.step_ratio "
        "interpret.step_size interpret.eps"
    ),
    ((0, 1e-9), (-1e-9, float("nan"))): (
        "checkpoint.eps train.eps train.weight_decay transfer.weight_decay transfer.head_scale evaluate.eps "
        "interpret.smooth_noise interpret.damping export.temperature study.calibration "
        "train.augmentation.rotation "
        "transfer.augmentation.rotation train.augmentation.lighting transfer.augmentation.lighting"
    ),
    ((0, 1 - 1e-9), (-1e-9, 1)): (
        "train.momentum transfer.momentum train.label_smoothing transfer.label_smoothing "
        "train.augmentation.jitter transfer.augmentation.jitter train.average_decay "
        "train.augmentation.resized_crop transfer.augmentation.resized_crop"
    ),
    ((1, 2**40), (0, -1, 1.5, True, 10**400)): (
        "train.image_size train.attack_steps train.num_epochs train.batch_size train.num_parts "
        "train.save_every train.log_every transfer.num_epochs transfer.batch_size study.num_seeds "
        "study.source_seeds study.search_seeds evaluate.num_steps evaluate.num_restarts evaluate.batch_size "
        "predict.num_listed predict.batch_size "
        "interpret.num_images interpret.num_measured interpret.num_steps interpret.smooth_samples "
        "interpret.integration_steps interpret.num_queries"
    ),
    ((0, 1), (-1, 0.5)): (
        "checkpoint.num_classes checkpoint.image_size train.validate_every train.num_devices "
        "transfer.max_steps "
        "export.image_size export.batch_size "
        "transfer.num_views study.group_size evaluate.num_images report.num_pictures "
        "train.augmentation.crop_padding transfer.augmentation.crop_padding"
    ),
    (((), (1,)), ((0,), (1.5,), 1)): "transfer.evaluate_epochs",
    ((True, False), (1, "yes")): (
        "train.attack_random_start train.sync_batch_norm transfer.stratified train.augmentation.flip "
        "transfer.augmentation.flip keep_programs"
    ),
    (("", "text"), (1, None)): (
        "cache_dir source verify models data rows checkpoint.architecture checkpoint.weights "
        "checkpoint.sha256 train.dataset train.architecture transfer.target study.sources study.targets "
        "study.ray_address "
        "evaluate.model evaluate.dataset predict.model predict.images predict.held_out export.model "
        "report.title "
        "interpret.cue_conflict"
    ),
    (((), ("text",)), ((1,), "text")): "report.remarks",
}
CASES = BOUNDS | {key: values for values, keys in KINDS.items() for key in keys.split()}


def _refusal(key, value):
    """What the owner of a key says of a value, if it is this key that is wrong."""
    cls, name = base.keys()[key]
    try:
        cls(**{name: value})
    except ValueError as error:
        return str(error) if str(error).startswith(f"{name}={value!r} must be ") else ""
    return ""


@pytest.mark.parametrize("key", base.keys())
def test_both_sides_of_every_bound(key):
    accepted, refused = CASES[key]
    assert not any(_refusal(key, value) for value in accepted)
    assert all(_refusal(key, value) for value in refused)


def test_a_bad_value_is_named_by_its_key():
    config = base.default().unlock()
    config.transfer.augmentation.jitter = 2.0
    with pytest.raises(ConfigError, match="^config.transfer.augmentation.jitter=2.0 must be a number"):
        read(config)
    config.transfer.augmentation.jitter, config.train.eps = 0.1, 0.5
    with pytest.raises(ConfigError, match=r"^config.train.eps=0.5 does not go with norm=none"):
        read(config)


def test_the_last_source_seed_is_a_seed():
    config = base.default()
    config.seed, config.study.source_seeds = 2**32 - 5, 5
    read(config)
    config.study.source_seeds = 6
    with pytest.raises(
        ConfigError, match=r"config.study.source_seeds=6 from config.seed=4294967291 goes beyond"
    ):
        read(config)


def test_every_key_is_explained():
    lines = base.explain().splitlines()
    assert [line.partition(":")[0] for line in lines] == [f"config.{key}" for key in sorted(base.keys())]
    assert "a whole number, 1 or more; default 128" in next(
        x for x in lines if "config.train.batch_size" in x
    )
