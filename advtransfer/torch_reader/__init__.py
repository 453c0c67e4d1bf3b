"""PyTorch checkpoints and safetensors files as NumPy arrays, without PyTorch; no code of a file is run.

with open_checkpoint("resnet50.pth") as contents:
    for name, tensor in contents.tree.items():
        array = tensor.read()
"""

from .contents import Contents, file_format, open_checkpoint, read_contents
from .files import CheckpointError, File, open_file
from .tensors import Tensor, numpy_type
from .unpickle import Stub

__all__ = [
    "CheckpointError",
    "Contents",
    "File",
    "Stub",
    "Tensor",
    "file_format",
    "numpy_type",
    "open_checkpoint",
    "open_file",
    "read_contents",
]
