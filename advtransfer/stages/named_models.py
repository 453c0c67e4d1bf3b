"""Models by name: a folder that was written here, `hf:REPO/FILE[@revision]`, or a PyTorch file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from advtransfer.models import Model, create_module, load_model
from advtransfer.torch_checkpoint import (
    import_torch_checkpoint,
    is_on_this_machine,
    known_on_hub,
    known_spec,
)

_SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors")  # of a file that is not there


def find_model(name: str, dtype: Any) -> Model:
    """The named model, computing in `dtype`.

    Raises:
      ValueError: there is no such model, or it cannot be read.
    """
    if _is_checkpoint(name):
        return import_torch_checkpoint(name, dtype=dtype)
    return load_model(name, dtype=dtype)


def plan_model(name: str, dtype: Any) -> Model:
    """As `find_model`, but nothing is downloaded: a known model of the hub has no variables until it is.

    Raises:
      ValueError: as `find_model`, or the file is not here and nothing is known of it.
    """
    if not is_missing(name):
        return find_model(name, dtype)
    known = known_on_hub(name)
    if known is None:
        raise ValueError(
            f"{name} is not on this machine, and what it is cannot be told without it: fetch it first "
            "(hf download REPO FILE), or start the run, which does"
        )
    spec = known_spec(known)
    module = create_module(
        spec.architecture, num_classes=spec.num_classes, mean=spec.mean, std=spec.std, dtype=dtype
    )
    return Model(module, {}, spec)


def is_trained_here(source: str) -> bool:
    """Whether a name in config.study.sources, natural or NORM:EPS, is of a network that the study trains."""
    return source == "natural" or source.startswith(("l2:", "linf:"))


def is_missing(name: str) -> bool:
    """Whether a model has to be downloaded."""
    return name.startswith("hf:") and not is_on_this_machine(name)


def model_name(name: str) -> str:
    """What rows call a model: its file without the ending, or its folder; for "model" the folder above it."""
    path = Path(name.removeprefix("hf:").partition("@")[0]).absolute()
    last = path.stem if _is_checkpoint(name) else path.name
    return path.parent.name if last == "model" else last


def _is_checkpoint(name: str) -> bool:
    return name.startswith("hf:") or os.path.isfile(name) or name.endswith(_SUFFIXES)
