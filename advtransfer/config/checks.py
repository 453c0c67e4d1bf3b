"""What makes a configuration impossible, or another one than a workdir's."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ml_collections import ConfigDict

from advtransfer import foreign
from advtransfer.config.keys import NORMS, STAGES, default

# Keys that change what is computed or shown beside the results, but not the results that a workdir holds.
FREE_KEYS = (
    "interpret.",
    "report.",
    "rows",
    "verify",
    "study.",
    "cache_dir",
    "train.save_every",
    "train.keep",
    "train.log_every",
    "train.num_workers",
    "train.validate_every",
)


class ConfigError(ValueError):
    """One line that names the key and the fix."""


ANALYSES = default().interpret.analyses
VIEWS = ("natural", "low_pass", "grey", "patch_shuffle", "amplitude_swap", "edges", "silhouette")

_POSITIVE = (lambda x: x > 0, "must be positive")
_NOT_NEGATIVE = (lambda x: x >= 0, "must not be negative")
_FRACTION = (lambda x: 0 <= x < 1, "must be in [0, 1)")


def _one_of(*names: str):
    return (lambda x: x in names, f"must be one of {', '.join(names)}")


_CHECKS = {
    "stage": _one_of(*STAGES),
    "seed": (lambda x: 0 <= x < 2**32, "must be a whole number from 0 to 2**32 - 1"),
    "dtype": _one_of("auto", "float32", "bfloat16"),
    "broken_images": _one_of("refuse", "skip"),
    "checkpoint.num_classes": _NOT_NEGATIVE,
    "checkpoint.image_size": _NOT_NEGATIVE,
    "checkpoint.mean": (lambda x: len(x) in (0, 3), "must have three entries, or none"),
    "checkpoint.std": (
        lambda x: not x or (len(x) == 3 and min(x) > 0),
        "must have three positive entries, or none",
    ),
    "checkpoint.norm": _one_of("", *NORMS),
    "checkpoint.eps": _NOT_NEGATIVE,
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
    "train.loading": _one_of("auto", "memory", "stream"),
    "train.num_workers": (lambda x: x >= -1, "must be >= -1 (-1: one a core)"),
    "train.num_parts": _POSITIVE,
    "train.average_decay": _FRACTION,
    "train.validate_every": _NOT_NEGATIVE,
    "transfer.view": _one_of(*VIEWS),
    "transfer.num_train_images": (lambda x: x > 0 or x == -1, "must be positive, or -1 (all)"),
    "transfer.num_unfrozen_blocks": (lambda x: x >= -1, "must be >= -1 (-1: everything)"),
    "transfer.choose_num_unfrozen_blocks": _one_of("given", "rule", "cross_validation"),
    "transfer.num_folds": (lambda x: x >= 2, "must be at least 2"),
    "transfer.head_init": _one_of("torch", "normal", "zeros"),
    "transfer.head_scale": _NOT_NEGATIVE,
    "transfer.num_views": (lambda x: x >= 0, "must be >= 0 (0: drawn anew in every step)"),
    "transfer.frozen_batch_norm": _one_of("update", "source", "target"),
    "transfer.input_norm": _one_of("source", "target"),
    "transfer.max_steps": _NOT_NEGATIVE,
    "study.num_train_images": (
        lambda x: x and all(n > 0 or n == -1 for n in x),
        "must be positive numbers, or -1 (all)",
    ),
    "study.num_unfrozen_blocks": (lambda x: x and min(x) >= -1, "must be numbers >= -1"),
    "study.views": (lambda x: {*x} <= {*VIEWS}, f"must be some of {', '.join(VIEWS)}"),
    "study.num_seeds": _POSITIVE,
    "study.seeds": (
        lambda x: all(0 <= s < 2**32 for s in x),
        "must be whole numbers from 0 to 2**32 - 1",
    ),
    "study.fewer_seeds": (
        lambda x: all(len(p) == 2 and all(type(q) is int and q > 0 for q in p) for p in x),
        "must be pairs of positive numbers (images, seeds)",
    ),
    "study.learning_rates": (lambda x: all(r > 0 for r in x), "must be positive numbers"),
    "study.weight_decays": (lambda x: all(d >= 0 for d in x), "must be numbers, not negative"),
    "study.epochs": (lambda x: all(e > 0 for e in x), "must be positive numbers"),
    "study.search_seeds": _POSITIVE,
    "study.calibration": _NOT_NEGATIVE,
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
    "interpret.analyses": (
        lambda x: x and {*x} <= {*ANALYSES},
        f"must be some of {', '.join(ANALYSES)}",
    ),
    "report.analyses": (lambda x: {*x} <= {*ANALYSES}, f"must be some of {', '.join(ANALYSES)}"),
    "interpret.split": _one_of("train", "test", "validation"),
    **{
        f"interpret.{key}": _POSITIVE
        for key in (
            *("num_images", "num_measured", "smooth_samples", "integration_steps"),
            *("num_steps", "step_size", "eps", "num_queries"),
        )
    },
    "interpret.num_train": (lambda x: x > 1, "must be at least 2"),
    "interpret.smooth_noise": _NOT_NEGATIVE,
    "interpret.baseline": (lambda x: 0 <= x <= 1, "must be in [0, 1]"),
    "interpret.parameterisation": _one_of("pixels", "fourier"),
    "interpret.solver": _one_of("damped", "truncated", "cg"),
    "interpret.damping": _NOT_NEGATIVE,
    "interpret.rcond": (lambda x: 0 < x < 1, "must be between 0 and 1"),
    "report.num_pictures": _NOT_NEGATIVE,
    "report.reference": _one_of("none", "paper"),
    "report.accuracy_unit": _one_of("auto", "fraction", "percent"),
}
_CHECKS |= {
    f"{stage}.augmentation.preset": _one_of("", "none", "utrera_color", "salman", "robustness", *more)
    for stage, more in (("train", ()), ("transfer", ("utrera",)))
}
_CHECKS |= {
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
        "augmentation.lighting": _NOT_NEGATIVE,
        "augmentation.resized_crop": _FRACTION,
    }.items()
}


# What stands in the tuples that are empty by default.
_EMPTY = {
    "report.remarks": str,
    "report.analyses": str,
    "checkpoint.mean": float,
    "checkpoint.std": float,
    "study.views": str,
    "study.seeds": int,
    "study.fewer_seeds": tuple,
    "study.learning_rates": float,
    "study.weight_decays": float,
    "study.epochs": int,
}


def check_keys(config: ConfigDict) -> None:
    """Raises a ConfigError unless the configuration has the keys that there are, and no other."""
    values, known = flatten(config), flatten(default())
    for key in sorted(values.keys() - known.keys()):
        near = difflib.get_close_matches(key, known, n=2)
        raise ConfigError(f"config.{key} is no key{_did_you_mean(near)}")
    if missing := [key for key in known if key not in values]:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ConfigError(
            f"the config has no {', '.join(missing[:3])}{more}: begin it with advtransfer.config.default()"
        )


def validate(config: ConfigDict) -> None:
    """Checks every value that can be judged without loading anything.

    Raises:
      ConfigError: naming the first bad key, its value and the fix.
    """
    check_keys(config)
    values = flatten(config)
    for key, value in values.items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise ConfigError(f"config.{key}={value!r} must be finite")
    for key, example in flatten(default()).items():
        if isinstance(example, tuple):
            _check_elements(key, values[key], type(example[0]) if example else _EMPTY[key])
    for key, (is_good, complaint) in _CHECKS.items():
        if not is_good(values[key]):
            raise ConfigError(f"config.{key}={values[key]!r} {complaint}")
    for key, value in flatten(default()).items():
        if config.stage != "import" and key.startswith("checkpoint.") and values[key] != value:
            raise ConfigError(
                f"config.{key} is for config.stage=import: import the file first "
                "(experiments/import_source.py), and name the workdir of the import"
            )
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
    _check_choice_of_blocks(values)
    _check_presets(values)
    if config.study.split != "test" and any(
        values[f"study.{key}"] for key in ("learning_rates", "weight_decays", "epochs")
    ):
        raise ConfigError(
            "config.study.split=validation, but hyper-parameters are chosen on these images: report on test"
        )


def _check_choice_of_blocks(values: dict[str, Any]) -> None:
    """A study has its own numbers of blocks, and a number that is given is no choice."""
    usual = flatten(default())
    chosen, given, folds = (
        f"transfer.{name}" for name in ("choose_num_unfrozen_blocks", "num_unfrozen_blocks", "num_folds")
    )
    for key in (chosen, folds):
        if values["stage"] == "study" and values[key] != usual[key]:
            raise ConfigError(
                f"config.{key}={values[key]} is for config.stage=transfer: a study compares the numbers of "
                "config.study.num_unfrozen_blocks"
            )
    if values[chosen] != "given" and values[given] != usual[given]:
        raise ConfigError(
            f"config.{chosen}={values[chosen]} and config.{given}={values[given]} exclude each other: leave "
            "one of them away"
        )


def _check_presets(values: dict[str, Any]) -> None:
    """A preset is what somebody published: keys beside it would make it something else."""
    for stage in ("train", "transfer"):
        folder = f"{stage}.augmentation."
        preset = values[f"{folder}preset"]
        own = [key for key in values if key.startswith(folder) and key != f"{folder}preset" and values[key]]
        if preset and own:
            raise ConfigError(
                f"config.{folder}preset={preset} and config.{own[0]}={values[own[0]]} exclude each other: "
                "leave one of them away"
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
    fields = foreign.parse_json(saved)
    if not isinstance(fields, dict):
        raise ValueError("it is no JSON object")
    old = flatten(ConfigDict(fields))
    new = flatten(ConfigDict(json.loads(to_json(config))))
    return [
        f"{key}: {old.get(key)!r} there, {new.get(key)!r} now"
        for key in sorted(old.keys() | new.keys())
        if not key.startswith(FREE_KEYS) and old.get(key) != new.get(key)
    ]


def _did_you_mean(names: list[str]) -> str:
    return f": did you mean {' or '.join(names)}?" if names else ""
