"""What a checkpoint of any of the formats holds, or what the file is instead."""

from __future__ import annotations

import contextlib
import html
import re
from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

from .files import CheckpointError, File, open_file, printable
from .legacy_format import read_legacy
from .safetensors_format import read_safetensors
from .zip_format import read_zip

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
def open_checkpoint(path: str | Path) -> Generator[Contents]:
    """Opens a file of torch.save (zip or legacy format) or a safetensors file. None of its code is run.

    Its tensors are read one by one, by `Tensor.read`, while it is open. Its pickle may have 32 MiB.

    Raises:
      CheckpointError: no such file, something else, or a damaged file; one line that says what to do.
    """
    with open_file(path) as file:
        yield read_contents(file)


def read_contents(file: File) -> Contents:
    """What an open file holds; raises as `open_checkpoint`."""
    kind = file_format(file)
    if kind == "safetensors":
        tensors, metadata = read_safetensors(file)
        return Contents(tensors, kind, (), metadata)
    tree, stubbed = read_zip(file) if kind == "PyTorch zip" else read_legacy(file)
    return Contents(tree, kind, tuple(sorted(stubbed)), {})


def file_format(file: File) -> str:
    """The format of an open file, from its first bytes alone: see `Contents.format`.

    Raises:
      CheckpointError: it has none of the formats; the message says what it is instead.
    """
    head = file.head(1024)
    # First: the length of its header is the eight bytes before, which may begin as the other formats do.
    if head[8:9] == b"{":
        return "safetensors"
    if head.startswith(b"PK"):
        return "PyTorch zip"
    if head.startswith(b"\x80"):
        return "PyTorch legacy"
    raise CheckpointError(_what_it_is(file, head))


def _what_it_is(file: File, head: bytes) -> str:
    if not head:
        return "an empty file: download it again"
    text = file.head(1 << 16).decode("utf-8", "replace").lstrip("\ufeff \t\r\n")
    if re.match(r"<(!doctype html|html|head|body|!--)", text, re.IGNORECASE):
        title = re.search(r"<title[^>]*>([^<]*)", text, re.IGNORECASE)
        titled = f' titled "{printable(" ".join(html.unescape(title[1]).split()))}"' if title else ""
        return (
            f"an HTML page{titled}, not weights: the link is dead or wants a login; download it in a browser"
        )
    for magic, what in _OTHER_FILES:
        if head.startswith(magic) or text.startswith(magic.decode("latin-1")):
            return what
    if head[257:262] == b"ustar":
        return (
            "a tar archive: unpack it (PyTorch before 0.1.10 saved such: save it again with a newer PyTorch)"
        )
    return f"not a PyTorch checkpoint: it begins with the bytes {head[:8].hex(' ')}"
