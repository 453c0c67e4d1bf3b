"""Models as PyTorch files: torchvision's names in a safetensors file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from advtransfer.models import Model, ModelSpec, ResNet
from advtransfer.torch_checkpoint.layout import layout
from advtransfer.torch_checkpoint.metadata import make_metadata


def export_torch_state_dict(model: Model, path: str | Path | None = None) -> dict[str, np.ndarray]:
    """A model's weights by torchvision's names, as torchvision's and timm's ResNets load them (strict=True).

    Those networks take images that are normalised with `model.spec.mean` and `model.spec.std`. A network with
    a CIFAR stem gets torchvision's names too, but torchvision has no such network.

    Args:
        model: a model.
        path: a safetensors file to write, whole or not at all. With the metadata that it gets,
            `import_torch_checkpoint` makes the same model of it.

    Returns:
        float32 arrays, convolutions [O, I, H, W] and the head [out, in], and int64 zeros for
        num_batches_tracked, in torchvision's order. Of a model that was imported without a head, no fc.

    Raises:
        ValueError: `path` does not end in .safetensors.
    """
    tensors = torch_tensors(model.module, model.variables)
    if not model.spec.has_head:
        tensors = {name: array for name, array in tensors.items() if not name.startswith("fc.")}
    if path is not None:
        _write(tensors, model.spec, Path(path).absolute())
    return tensors


def torch_tensors(module: ResNet, variables: dict[str, Any]) -> dict[str, np.ndarray]:
    """The variables of a network as `export_torch_state_dict` gives them."""
    tensors = {}
    for name, entry in layout(module).items():
        array = variables
        for key in entry.path:
            array = array[key]
        array = np.asarray(array, np.float32)
        if entry.path[-1] == "kernel":
            array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
        tensors[name] = np.array(array, order="C")
        if name.endswith(".running_var"):
            tensors[name.replace("running_var", "num_batches_tracked")] = np.zeros((), np.int64)
    return tensors


def _write(tensors: dict[str, np.ndarray], spec: ModelSpec, path: Path) -> None:
    if path.suffix != ".safetensors" or path.is_dir():
        raise ValueError(f"{path} does not end in .safetensors, which it will be: name it so")
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new{os.getpid()}")
    try:
        new.write_bytes(safetensors.numpy.save(tensors, make_metadata(spec)))
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
