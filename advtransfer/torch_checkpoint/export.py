"""Export of models to safetensors files with torchvision's names and the model's description as metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict

from advtransfer import storage
from advtransfer.arrays import Variables
from advtransfer.foreign import parse_json
from advtransfer.models import Model, ModelSpec, ResNet
from advtransfer.models.bundle import check_spec
from advtransfer.torch_checkpoint.layout import brief, layout
from advtransfer.torch_reader import CheckpointError

_KEY = "advtransfer"  # metadata key of a JSON object with these fields of the ModelSpec
_FIELDS = ("mean", "std", "norm", "eps", "image_size", "class_names")


def export_torch_state_dict(model: Model, path: str | Path | None = None) -> dict[str, np.ndarray]:
    """A model's weights as a state dict that torchvision's and timm's ResNets load with strict=True.

    In PyTorch, normalise the images with `model.spec.mean` and `model.spec.std`. Networks with a CIFAR stem
    are named in the same way, but torchvision has no such network.

    Args:
        model: a model.
        path: a safetensors file to write (atomically). It includes the metadata from which
            `import_torch_checkpoint` restores the same model.

    Returns:
        float32 arrays, convolutions [O, I, H, W] and the head [out, in], and int64 zeros for
        num_batches_tracked, in torchvision's order; without fc if the model has no head.

    Raises:
        ValueError: `path` does not end in .safetensors.
    """
    tensors = torch_tensors(model.module, model.variables)
    if not model.spec.has_head:
        tensors = {name: array for name, array in tensors.items() if not name.startswith("fc.")}
    if path is not None:
        path = Path(path).absolute()
        if path.suffix != ".safetensors" or path.is_dir():
            raise ValueError(f"{path} must end in .safetensors, the only format that is written")
        path.parent.mkdir(parents=True, exist_ok=True)
        fields = {field: getattr(model.spec, field) for field in _FIELDS}
        metadata = {"architecture": model.spec.architecture, _KEY: json.dumps(fields, default=float)}
        metadata["format"] = "pt"  # required by transformers and timm
        storage.write(path, safetensors.numpy.save(tensors, metadata))
    return tensors


def torch_tensors(module: ResNet, variables: Variables) -> dict[str, np.ndarray]:
    """The variables of a network in the form of `export_torch_state_dict`."""
    tensors, arrays = {}, flatten_dict(variables)
    for name, entry in layout(module).items():
        array = np.asarray(arrays[entry.path], np.float32)
        if entry.path[-1] == "kernel":
            array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
        tensors[name] = np.array(array, order="C")
        if name.endswith(".running_var"):
            tensors[name.replace("running_var", "num_batches_tracked")] = np.zeros((), np.int64)
    return tensors


def parse_metadata(
    metadata: dict[str, str], architecture: str, num_classes: int, has_head: bool
) -> dict[str, Any]:
    """The fields of a `ModelSpec` written by `export_torch_state_dict`; {} for files of other programs."""
    if _KEY not in metadata:
        return {}
    try:
        fields = parse_json(metadata[_KEY])
        found: dict[str, Any] = {field: fields[field] for field in ("norm", "image_size")}
        found["eps"] = float(fields["eps"])
        found |= {field: tuple(map(float, fields[field])) for field in ("mean", "std")}
        found["class_names"] = tuple(fields["class_names"]) if has_head else ()
        check_spec(ModelSpec(architecture, num_classes, **found))
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise CheckpointError(f"its metadata is damaged ({brief(error)}): export it again") from error
    return found
