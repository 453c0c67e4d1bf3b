"""Every configuration key, with its unit and default, and what makes a configuration impossible.

Experiments start from `default()` and change what they need. Keys that name something (datasets,
architectures, folders) are checked where the thing is known; everything else is checked by `validate`
before any work starts.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ml_collections import ConfigDict

STAGES = ("source", "transfer", "study", "evaluate", "report")
NORMS = ("none", "l2", "linf")

# Keys that change what is computed or shown beside the results, but not the results that a workdir holds.
_FREE_KEYS = (
    "report.",
    "rows",
    "study.",
    "cache_dir",
    "train.save_every",
    "train.keep",
    "train.log_every",
)


class ConfigError(ValueError):
    """One line that names the key and the fix."""


def default() -> ConfigDict:
    """The configuration that experiments start from."""
    config = ConfigDict()
    config.stage = "study"  # one of STAGES
    config.seed = 0  # of initial weights, batch order, augmentation and attacks of the sources
    config.dtype = "auto"  # of networks' computation: float32 | bfloat16; auto: float32 on CPU only
    config.cache_dir = ""  # where drawn or decoded datasets are kept; "": the user's cache folder
    config.source = ""  # stage=transfer: the model folder to start from
    config.rows = ""  # stage=report: a file or folder of rows (CSV, Parquet, JSON lines)
    config.train = _train()
    config.transfer = _transfer()
    config.study = _study()
    config.evaluate = _evaluate()
    config.report = _report()
    return config.lock()


def _train() -> ConfigDict:
    """How a source network is trained. Natural and robust twins share all of it but norm and eps."""
    train = ConfigDict()
    train.dataset = "builtin:glyphs"
    train.architecture = "resnet_tiny"
    train.image_size = 16  # pixels
    train.mean = (0.5, 0.5, 0.5)  # per channel, of images in [0, 1]
    train.std = (0.25, 0.25, 0.25)
    train.norm = "none"  # threat model of adversarial training: none | l2 | linf
    train.eps = 0.0  # its radius, pixel units
    train.attack_steps = 3  # PGD-3 (Salman et al., 2020, appendix A)
    train.attack_step_ratio = 2 / 3  # step size divided by eps (same place)
    train.attack_random_start = False
    train.attack_batch_norm = "running"  # statistics that the attack sees: running | batch
    train.num_epochs = 8
    train.batch_size = 128  # over all devices
    train.learning_rate = 0.1
    train.schedule = "cyclic"  # constant | step | cosine | cyclic (optim.make_schedule)
    train.momentum = 0.9
    train.nesterov = False
    train.weight_decay = 5e-4
    train.label_smoothing = 0.0
    train.augmentation = _augmentation()
    train.sync_batch_norm = True  # BatchNorm statistics over all devices, not one by one
    train.save_every = 200  # steps
    train.keep = 2  # checkpoints
    train.log_every = 50  # steps
    return train


def _transfer() -> ConfigDict:
    """How a network is fine-tuned on a target set; rate, schedule, decay and epochs are the paper's."""
    transfer = ConfigDict()
    transfer.target = "builtin:digits"
    transfer.num_train_images = 200  # stage=transfer
    transfer.num_unfrozen_blocks = 0  # stage=transfer; -1: everything
    transfer.stratified = True  # subsets hold every class's share to within one image
    transfer.nested = True  # a subset contains the smaller ones of the same seed
    transfer.head_init = "torch"  # torch (uniform) | normal | zeros
    transfer.head_scale = 1.0  # standard deviation of head_init=normal
    transfer.frozen_batch_norm = "source"  # statistics of frozen layers: update | source | target
    transfer.num_epochs = 150
    transfer.evaluate_epochs = (150,)  # counted from 1; rows are written after each of them
    transfer.batch_size = 128
    transfer.learning_rate = 0.1
    transfer.schedule = "step"  # divided by 10 every third of the epochs
    transfer.momentum = 0.9
    transfer.nesterov = False
    transfer.weight_decay = 5e-4
    transfer.label_smoothing = 0.0
    transfer.augmentation = _augmentation()
    return transfer


def _study() -> ConfigDict:
    """The grid: every source × num_train_images × num_unfrozen_blocks × seed is one trial."""
    study = ConfigDict()
    # Comma-separated: natural and NORM:EPS are trained by the recipe of config.train; else model folders.
    study.sources = "natural,l2:0.25"
    study.num_train_images = (200, 400, 800)
    study.num_unfrozen_blocks = (0, 1)  # -1: everything
    study.num_seeds = 20
    study.split = "test"  # what rows are measured on: test | validation (to choose hyper-parameters)
    study.group_size = 0  # trials compiled into one program; 0: all of one shape
    return study


def _evaluate() -> ConfigDict:
    """How a network's natural and adversarial accuracy is measured."""
    evaluate = ConfigDict()
    evaluate.model = ""  # stage=evaluate: a model folder
    evaluate.dataset = "builtin:glyphs"  # stage=evaluate
    evaluate.split = "test"
    evaluate.norm = "l2"  # of the attack; none measures natural accuracy only
    evaluate.eps = 0.25  # pixel units
    evaluate.num_steps = 20
    evaluate.step_ratio = 0.125  # step size divided by eps: 2.5 / num_steps (Madry et al., 2018)
    evaluate.num_restarts = 1
    evaluate.num_images = 0  # first images of the split; 0: all
    evaluate.batch_size = 256  # over all devices
    return evaluate


def _report() -> ConfigDict:
    """What the report is made of, and what it says beside the rows."""
    report = ConfigDict()
    report.title = "Do robust sources transfer better?"
    report.command = ""  # what a reader types to get the report again; launch.py fills it in
    report.remarks = ()  # sentences for the reader, such as how hyper-parameters were chosen
    report.num_pictures = 8  # source images shown with their adversarial twins, at most 8
    return report


def _augmentation() -> ConfigDict:
    return ConfigDict(
        {
            "crop_padding": 0,  # pixels, then a random crop of the old size
            "flip": False,  # left to right, half of the time
            "jitter": 0.0,  # brightness, contrast, saturation by a factor in 1 ± jitter
            "rotation": 0.0,  # degrees, uniform in ± rotation
        }
    )


_POSITIVE = (lambda x: x > 0, "must be positive")
_NOT_NEGATIVE = (lambda x: x >= 0, "must not be negative")
_FRACTION = (lambda x: 0 <= x < 1, "must be in [0, 1)")


def _one_of(*names: str):
    return (lambda x: x in names, f"must be one of {', '.join(names)}")


_CHECKS = {
    "stage": _one_of(*STAGES),
    "seed": _NOT_NEGATIVE,
    "dtype": _one_of("auto", "float32", "bfloat16"),
    "train.image_size": _POSITIVE,
    "train.mean": (lambda x: len(x) == 3, "must have three entries"),
    "train.std": (lambda x: len(x) == 3 and min(x) > 0, "must have three positive entries"),
    "train.norm": _one_of(*NORMS),
    "train.eps": _NOT_NEGATIVE,
    "train.attack_steps": _POSITIVE,
    "train.attack_step_ratio": _POSITIVE,
    "train.attack_batch_norm": _one_of("running", "batch"),
    "train.save_every": _POSITIVE,
    "train.keep": _POSITIVE,
    "train.log_every": _POSITIVE,
    "transfer.num_train_images": _POSITIVE,
    "transfer.num_unfrozen_blocks": (lambda x: x >= -1, "must be >= -1 (-1: everything)"),
    "transfer.head_init": _one_of("torch", "normal", "zeros"),
    "transfer.head_scale": _NOT_NEGATIVE,
    "transfer.frozen_batch_norm": _one_of("update", "source", "target"),
    "study.num_train_images": (lambda x: x and min(x) > 0, "must be positive numbers"),
    "study.num_unfrozen_blocks": (lambda x: x and min(x) >= -1, "must be numbers >= -1"),
    "study.num_seeds": _POSITIVE,
    "study.split": _one_of("test", "validation"),
    "study.group_size": _NOT_NEGATIVE,
    "evaluate.split": _one_of("train", "test", "validation"),
    "evaluate.norm": _one_of(*NORMS),
    "evaluate.eps": _NOT_NEGATIVE,
    "evaluate.num_steps": _POSITIVE,
    "evaluate.step_ratio": _POSITIVE,
    "evaluate.num_restarts": _POSITIVE,
    "evaluate.num_images": _NOT_NEGATIVE,
    "evaluate.batch_size": _POSITIVE,
    "report.num_pictures": _NOT_NEGATIVE,
} | {
    f"{stage}.{key}": check
    for stage in ("train", "transfer")
    for key, check in {
        "num_epochs": _POSITIVE,
        "batch_size": _POSITIVE,
        "learning_rate": _POSITIVE,
        "schedule": _one_of("constant", "step", "cosine", "cyclic"),
        "momentum": _FRACTION,
        "weight_decay": _NOT_NEGATIVE,
        "label_smoothing": _FRACTION,
        "augmentation.crop_padding": _NOT_NEGATIVE,
        "augmentation.jitter": _FRACTION,
        "augmentation.rotation": _NOT_NEGATIVE,
    }.items()
}


def validate(config: ConfigDict) -> None:
    """Checks every value that can be judged without loading anything.

    Raises:
      ConfigError: naming the first bad key, its value and the fix.
    """
    values = flatten(config)
    for key in values.keys() - flatten(default()).keys():
        near = difflib.get_close_matches(key, flatten(default()), n=2)
        raise ConfigError(f"config.{key} is no key{_did_you_mean(near)}")
    for key, example in flatten(default()).items():
        if isinstance(example, tuple):
            _check_elements(key, values[key], type(example[0]) if example else str)
    for key, (is_good, complaint) in _CHECKS.items():
        if not is_good(values[key]):
            raise ConfigError(f"config.{key}={values[key]!r} {complaint}")
    if (config.train.norm == "none") != (config.train.eps == 0):
        raise ConfigError(
            f"config.train.eps={config.train.eps:g} does not go with config.train.norm="
            f"{config.train.norm}: set a norm (l2, linf) and a positive eps, or neither"
        )
    epochs = config.transfer.evaluate_epochs
    if not epochs or min(epochs) < 1 or max(epochs) > config.transfer.num_epochs:
        raise ConfigError(
            f"config.transfer.evaluate_epochs={tuple(epochs)} must be epochs from 1 to "
            f"config.transfer.num_epochs={config.transfer.num_epochs}"
        )
    smallest = {
        "study": min(config.study.num_train_images),
        "transfer": config.transfer.num_train_images,
    }.get(config.stage)
    if smallest is not None and config.transfer.batch_size > smallest:
        raise ConfigError(
            f"config.transfer.batch_size={config.transfer.batch_size} is larger than the smallest subset of "
            f"{smallest} images: lower it to {smallest} or drop that subset"
        )


def _check_elements(key: str, values: tuple, kind: type) -> None:
    """A tuple's elements are of the kind of its default's; whole numbers will do for floats."""
    allowed = (int, float) if kind is float else kind
    for value in values:
        if isinstance(value, bool) or not isinstance(value, allowed):
            raise ConfigError(f"config.{key}={tuple(values)}: {value!r} is no {kind.__name__}")


@contextmanager
def names_key(key: str) -> Iterator[None]:
    """Prefixes a ValueError raised inside with the configuration key that caused it."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"config.{key}: {error}") from error


def flatten(config: ConfigDict) -> dict[str, Any]:
    """{"train.eps": 0.5, ...}."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= {f"{key}.{inner}": x for inner, x in flatten(value).items()}
        else:
            flat[key] = value
    return flat


def to_json(config: ConfigDict) -> str:
    """The configuration as sorted, indented JSON."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True)


def conflicts(config: ConfigDict, saved: str) -> list[str]:
    """Keys whose values in the saved JSON make its results another experiment's, as "key: saved != asked"."""
    old = flatten(ConfigDict(json.loads(saved)))
    new = flatten(ConfigDict(json.loads(to_json(config))))
    return [
        f"{key}: {old.get(key)!r} there, {new.get(key)!r} now"
        for key in sorted(old.keys() | new.keys())
        if not key.startswith(_FREE_KEYS) and old.get(key) != new.get(key)
    ]


def _did_you_mean(names: list[str]) -> str:
    return f": did you mean {' or '.join(names)}?" if names else ""
