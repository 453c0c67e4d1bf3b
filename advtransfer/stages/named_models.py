"""Models by name: a folder that was written here, `hf:REPO/FILE[@revision]`, or a PyTorch file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from advtransfer.models import Model, load_model
from advtransfer.torch_checkpoint import import_torch_checkpoint

_SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors")  # of a file that is not there


def find_model(name: str, dtype: Any) -> Model:
    """The named model, computing in `dtype`.

    Raises:
      ValueError: there is no such model, or it cannot be read.
    """
    if _is_checkpoint(name):
        return import_torch_checkpoint(name, dtype=dtype)
    return load_model(name, dtype=dtype)


def model_name(name: str) -> str:
    """What rows call a model: its file without the ending, or its folder; for "model" the folder above it."""
    path = Path(name.removeprefix("hf:").partition("@")[0]).absolute()
    last = path.stem if _is_checkpoint(name) else path.name
    return path.parent.name if last == "model" else last


def _is_checkpoint(name: str) -> bool:
    return name.startswith("hf:") or os.path.isfile(name) or name.endswith(_SUFFIXES)
