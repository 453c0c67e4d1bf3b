"""Safe import of PyTorch ResNet checkpoints, and export to PyTorch's names, without PyTorch."""

from advtransfer.torch_checkpoint.catalogue import (
    KNOWN_MODELS,
    KnownModel,
    file_bytes,
    find_known,
    known_models_table,
    known_spec,
)
from advtransfer.torch_checkpoint.convert import import_torch_checkpoint
from advtransfer.torch_checkpoint.export import export_torch_state_dict
from advtransfer.torch_checkpoint.hub import check_hub_name, fetch, is_on_this_machine, known_on_hub
from advtransfer.torch_reader import CheckpointError

__all__ = [
    "KNOWN_MODELS",
    "CheckpointError",
    "KnownModel",
    "check_hub_name",
    "export_torch_state_dict",
    "fetch",
    "file_bytes",
    "find_known",
    "import_torch_checkpoint",
    "is_on_this_machine",
    "known_models_table",
    "known_on_hub",
    "known_spec",
]
