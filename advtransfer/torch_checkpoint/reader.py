"""Opens a checkpoint of any of PyTorch's formats, or says what the file is instead."""

from __future__ import annotations

import contextlib
import hashlib
import html
import json
import math
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open

from advtransfer.torch_checkpoint.legacy_format import read_legacy
from advtransfer.torch_checkpoint.tensors import DTYPES, File, Storage, Tensor, contiguous, naming
from advtransfer.torch_checkpoint.unpickle import CheckpointError, Stub, printable
from advtransfer.torch_checkpoint.zip_format import read_zip

__all__ = [
    "CheckpointError",
    "Contents",
    "File",
    "Stub",
    "Tensor",
    "check_format",
    "file_sha256",
    "open_checkpoint",
    "open_file",
    "read_contents",
]

_CHUNK = 1 << 22  # bytes

_MAX_HEADER = 1 << 21  # bytes of the header of a safetensors file; of a ResNet-50 0.03 MB
_SAFETENSORS_TYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
    "BOOL": "bool", "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
_OTHER_FILES = (  # how they begin, what they are
    (b"version https://git-lfs", "a git-lfs pointer, not the file that it points to: run git lfs pull"),
    (b"\x1f\x8b", "a gzip archive: unpack it"),
    (b"\xfd7zXZ\0", "an xz archive: unpack it"),
    (b"BZh", "a bzip2 archive: unpack it"),
    (b"7z\xbc\xaf", "a 7-zip archive: unpack it"),
    (b"\x28\xb5\x2f\xfd", "a zstandard archive: unpack it"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras?), not a PyTorch checkpoint"),
    (b"\x93NUMPY", "a numpy array, not a PyTorch checkpoint"),
    (b"GGUF", "a GGUF file, not a PyTorch checkpoint"),
    (b"<?xml", "an XML answer of a server instead of the file: download it again"),
    (b"{", "a JSON file, not a PyTorch checkpoint"),
)


class Contents(NamedTuple):
    """What a checkpoint holds, its tensors not yet read."""

    tree: Any  # dict, list, tuple, str, int, float, complex, bool, None, bytes, Tensor, Stub; may hold itself
    format: str  # "PyTorch zip", "PyTorch legacy" or "safetensors"
    stubs: tuple[str, ...]  # "module.name" of all that was replaced by an inert placeholder, sorted
    metadata: dict[str, str]  # of a safetensors file


@contextlib.contextmanager
def open_checkpoint(path: str | Path) -> Iterator[Contents]:
    """Opens a file of torch.save (zip or legacy format) or a safetensors file. None of its code is run.

    Its tensors are read one by one, by `Tensor.read`, while it is open. Its pickle may have 32 MiB.

    Raises:
      CheckpointError: no such file, something else, or a damaged file; one line that says what to do.
    """
    with open_file(path) as file:
        yield read_contents(file)


@contextlib.contextmanager
def open_file(path: str | Path) -> Iterator[File]:
    """Opens a file once for all that is done with it, so that what is hashed is what is read.

    Raises:
      CheckpointError: it is not there, or no regular file.
    """
    path = Path(path)
    with naming(path):
        file = _open(path)
    with file.raw:
        yield file


def file_sha256(file: File) -> str:
    """SHA-256 of a file, in hexadecimal, read piece by piece."""
    sha = hashlib.sha256()
    with naming(file.path):
        for start in range(0, file.size, _CHUNK):
            sha.update(file.read(start, min(_CHUNK, file.size - start)))
    return sha.hexdigest()


def check_format(file: File) -> None:
    """Raises a CheckpointError for a file that by its first bytes is no checkpoint."""
    with naming(file.path):
        head = _head(file)
        if not (head[8:9] == b"{" or head.startswith((b"PK", b"\x80"))):
            raise CheckpointError(_what_it_is(file, head))


def read_contents(file: File) -> Contents:
    """What an open file holds; raises as `open_checkpoint`."""
    with naming(file.path):
        return _read(file)


def _open(path: Path) -> File:
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise CheckpointError("a folder, not a file: name the file in it")
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError("not a regular file")
        return File(path, open(path, "rb", buffering=0), status.st_size)
    except FileNotFoundError as error:
        url = "; it looks like a URL: download it and pass the file's path" if ":/" in str(path) else ""
        raise CheckpointError(f"there is no such file{url}") from error
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"cannot be opened ({getattr(error, 'strerror', error)})") from error


def _head(file: File) -> bytes:
    return file.read(0, min(file.size, 1024)).tobytes()


def _read(file: File) -> Contents:
    head = _head(file)
    # First: the length of its header is the eight bytes before, which may begin as the other formats do.
    if head[8:9] == b"{":
        return _read_safetensors(file, int.from_bytes(head[:8], "little"))
    if head.startswith(b"PK"):
        tree, stubbed = read_zip(file)
        return Contents(tree, "PyTorch zip", tuple(sorted(stubbed)), {})
    if head.startswith(b"\x80"):
        tree, stubbed = read_legacy(file)
        return Contents(tree, "PyTorch legacy", tuple(sorted(stubbed)), {})
    raise CheckpointError(_what_it_is(file, head))


def _read_safetensors(file: File, header: int) -> Contents:
    if header > min(_MAX_HEADER, file.size - 8):
        raise CheckpointError(
            f"a truncated or damaged safetensors file: {file.size:,} bytes with a header of {header:,}"
        )
    try:
        with safe_open(file.path, framework="numpy"):  # the library checks the header
            pass
        entries = json.loads(file.read(8, header).tobytes())
        metadata = entries.pop("__metadata__", None) or {}
        tensors = {name: _safetensor(file, 8 + header, name, **entry) for name, entry in entries.items()}
    except (KeyboardInterrupt, SystemExit, CheckpointError):
        raise
    except BaseException as error:  # a panic of the library is no Exception
        raise CheckpointError(f"a damaged safetensors file: {printable(str(error))}") from error
    return Contents(tensors, "safetensors", (), metadata)


def _safetensor(
    file: File, start: int, name: str, dtype: str, shape: list[int], data_offsets: list[int]
) -> Tensor:
    """A tensor at `data_offsets` behind `start`; the library would keep in memory what it reads."""
    first, last = data_offsets
    dtype = _SAFETENSORS_TYPES.get(dtype, dtype.lower())
    itemsize = DTYPES[dtype].itemsize if dtype in DTYPES else 1
    size = last - first
    if min(first, size, *shape) < 0 or (dtype in DTYPES and size != math.prod(shape) * itemsize):
        raise ValueError("the offsets of a tensor do not fit its shape")
    swapped = sys.byteorder != "little"
    return contiguous(
        Storage(file, name, dtype, itemsize, size, start + first, swapped=swapped), tuple(shape)
    )


def _what_it_is(file: File, head: bytes) -> str:
    if not head:
        return "an empty file: download it again"
    text = file.read(0, min(file.size, 1 << 16)).tobytes().decode("utf-8", "replace").lstrip("\ufeff \t\r\n")
    if re.match(r"<(!doctype html|html|head|body|!--)", text, re.IGNORECASE):
        title = re.search(r"<title[^>]*>([^<]*)", text, re.IGNORECASE)
        named = f' titled "{printable(" ".join(html.unescape(title[1]).split()))}"' if title else ""
        return (
            f"an HTML page{named}, not weights: the link is dead or wants a login; download it in a browser"
        )
    for magic, what in _OTHER_FILES:
        if head.startswith(magic) or text.startswith(magic.decode("latin-1")):
            return what
    if head[257:262] == b"ustar":
        return (
            "a tar archive: unpack it (PyTorch before 0.1.10 saved such: save it again with a newer PyTorch)"
        )
    return f"not a PyTorch checkpoint: it begins with the bytes {head[:8].hex(' ')}"
