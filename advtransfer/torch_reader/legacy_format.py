"""PyTorch's format before 1.6: five pickles, then the data.

The pickles: a magic number, the protocol, the machine, the object, the list of the keys of its storages.
"""

from __future__ import annotations

import io
import sys
from typing import Any

from .files import CheckpointError, File
from .tensors import CONSTRUCTORS, Storage, Storages
from .unpickle import MAX_BYTES, Stub, unpickle

_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
_PROTOCOL = 1001


def read_legacy(file: File) -> tuple[Any, set[str]]:
    """The tree of a PyTorch legacy file, and the names of what was stubbed in it.

    Raises:
      CheckpointError: another pickle, or a damaged file.
    """
    if _MAGIC_NUMBER not in file.head(64):
        raise CheckpointError("an ordinary pickle, not a file that torch.save wrote: save it with torch.save")
    pickles = _Pickles(_Beginning(file), 1 << 16)
    unpickle(pickles, {})
    if unpickle(pickles, {})[0] != _PROTOCOL:
        raise CheckpointError("a PyTorch file of an unknown protocol: save it again with a newer PyTorch")
    unpickle(pickles, {})  # of the machine that wrote it; the data is little-endian on every one
    storages = Storages(file, swapped=sys.byteorder != "little", length=6)

    def load(reference: Any) -> Stub:
        is_tuple = type(reference) is tuple and len(reference) > 1
        if is_tuple and reference[0] == "module" and isinstance(reference[1], Stub):
            return reference[1]  # a class, with its source code
        found = storages.load(reference)
        if found is reference[1]:
            raise CheckpointError(f"its storages of type {found.name} are not supported")
        return found

    tree, stubbed = unpickle(pickles, CONSTRUCTORS, load)
    keys, _ = unpickle(pickles, {})
    _locate(file, storages.by_key, keys, pickles.tell())
    return tree, stubbed


class _Beginning(io.RawIOBase):
    """The first MAX_BYTES of a file, read as they are asked for."""

    def __init__(self, file: File):
        self.file, self.place, self.end = file, 0, min(file.size, MAX_BYTES)

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), self.end - self.place)
        buffer[:size] = self.file.read(self.place, size).tobytes()
        self.place += size
        return size


class _Pickles(io.BufferedReader):
    def read(self, size: int | None = None, /) -> bytes:
        # The reader takes as much memory as it is asked for.
        return super().read(MAX_BYTES if size is None else min(size, MAX_BYTES))


def _locate(file: File, storages: dict[str, Storage], keys: Any, position: int) -> None:
    """Finds every storage, from the file's list of their keys and the position behind that list."""
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise CheckpointError("its list of storages is damaged")
    if len(set(keys)) < len(keys) or set(keys) != set(storages):
        raise CheckpointError("its list of storages does not name those that its tensors use, each once")
    for key in keys:
        storage = storages[key]
        count = int(file.read(position, 8).view("<i8")[0])
        if count != storage.count:
            raise CheckpointError(
                f"storage {key} at byte {position} has {count:,} elements, not the {storage.count:,} that "
                "its tensors expect"
            )
        storage.start = position + 8
        position = storage.start + storage.size
    if position > file.size:
        raise CheckpointError(
            f"the file is truncated: it has {file.size:,} bytes, not {position:,}: download it again"
        )
