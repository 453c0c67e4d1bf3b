"""PyTorch checkpoints without PyTorch: read safely, mapped onto the ResNet family, and written back."""

from advtransfer.torch_checkpoint.catalogue import KNOWN_MODELS, KnownModel, find_known, known_models_table
from advtransfer.torch_checkpoint.convert import import_torch_checkpoint
from advtransfer.torch_checkpoint.export import export_torch_state_dict
from advtransfer.torch_checkpoint.hub import check_hub_name, fetch
from advtransfer.torch_checkpoint.reader import CheckpointError

__all__ = [
    "KNOWN_MODELS",
    "CheckpointError",
    "KnownModel",
    "check_hub_name",
    "export_torch_state_dict",
    "fetch",
    "find_known",
    "import_torch_checkpoint",
    "known_models_table",
]
