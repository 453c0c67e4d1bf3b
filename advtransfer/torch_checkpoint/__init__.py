"""PyTorch checkpoints without PyTorch: read safely, mapped onto the ResNet family, and written back."""

from advtransfer.torch_checkpoint.catalogue import KNOWN_MODELS, KnownModel, find_known, known_models_table
from advtransfer.torch_checkpoint.convert import (
    CheckpointError,
    export_torch_state_dict,
    import_torch_checkpoint,
)
from advtransfer.torch_checkpoint.hub import fetch

__all__ = [
    "KNOWN_MODELS",
    "CheckpointError",
    "KnownModel",
    "export_torch_state_dict",
    "fetch",
    "find_known",
    "import_torch_checkpoint",
    "known_models_table",
]
