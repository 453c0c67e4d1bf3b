"""Safe import of PyTorch ResNet checkpoints, and export to PyTorch's names, without PyTorch."""

from advtransfer.torch_checkpoint.catalogue import (
    KNOWN_MODELS,
    KnownModel,
    fetch,
    file_bytes,
    find_known,
    known_models_table,
    known_on_hub,
    known_spec,
)
from advtransfer.torch_checkpoint.convert import import_torch_checkpoint
from advtransfer.torch_checkpoint.export import export_torch_state_dict
from advtransfer.torch_reader import CheckpointError

__all__ = [
    "KNOWN_MODELS",
    "CheckpointError",
    "KnownModel",
    "export_torch_state_dict",
    "fetch",
    "file_bytes",
    "find_known",
    "import_torch_checkpoint",
    "known_models_table",
    "known_on_hub",
    "known_spec",
]
