"""PyTorch's format before 1.6: five pickles, then the data.

The pickles: a magic number, the protocol, the machine, the object, the list of the keys of its storages.
"""

from __future__ import annotations

import io
import sys
from typing import Any

from advtransfer.torch_checkpoint.tensors import CONSTRUCTORS, File, Storage, View, parse_storage_id
from advtransfer.torch_checkpoint.unpickle import MAX_BYTES, CheckpointError, Stub, unpickle

_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
_PROTOCOL = 1001


def read_legacy(file: File) -> tuple[Any, set[str]]:
    """The tree of a PyTorch legacy file, and the names of what was stubbed in it.

    Raises:
      CheckpointError: another pickle, or a damaged file.
    """
    if _MAGIC_NUMBER not in file.read(0, min(file.size, 64)).tobytes():
        raise CheckpointError("an ordinary pickle, not a file that torch.save wrote: save it with torch.save")
    pickles = _Pickles(_Beginning(file), 1 << 16)
    unpickle(pickles, {})
    if unpickle(pickles, {})[0] != _PROTOCOL:
        raise CheckpointError("a PyTorch file of an unknown protocol: save it again with a newer PyTorch")
    unpickle(pickles, {})  # of the machine that wrote it; the data is little-endian on every one
    storages = _Storages(file)
    tree, stubbed = unpickle(pickles, CONSTRUCTORS, storages.load)
    keys, _ = unpickle(pickles, {})
    storages.locate(keys, pickles.tell())
    return tree, stubbed


class _Beginning(io.RawIOBase):
    """The first MAX_BYTES of a file, read as they are asked for."""

    def __init__(self, file: File):
        self.file, self.place, self.end = file, 0, min(file.size, MAX_BYTES)

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def readinto(self, buffer: memoryview) -> int:
        size = min(len(buffer), self.end - self.place)
        buffer[:size] = self.file.read(self.place, size).tobytes()
        self.place += size
        return size


class _Pickles(io.BufferedReader):
    def read(self, size: int = -1) -> bytes:
        return super().read(min(size, MAX_BYTES))  # which takes as much memory as it is asked for


class _Storages:
    """The storages that the pickle asked for, one for each key."""

    def __init__(self, file: File):
        self.file = file
        self.storages: dict[str, Storage] = {}

    def load(self, value: Any) -> View | Stub:
        if type(value) is tuple and len(value) > 1 and value[0] == "module" and isinstance(value[1], Stub):
            return value[1]  # a class, with its source code
        name = parse_storage_id(value, 6)
        if isinstance(name, Stub):
            raise CheckpointError(f"its storages of type {name.name} are not supported")
        storage = self.storages.get(name.key)
        if storage is None:
            size = name.count * name.itemsize
            storage = Storage(
                self.file, name.key, name.dtype, name.itemsize, size, swapped=sys.byteorder != "little"
            )
            self.storages[name.key] = storage
        if (storage.dtype, storage.size) != (name.dtype, name.count * name.itemsize):
            raise CheckpointError(f"storage {name.key} is described in two ways")
        if name.view is None:
            return View(storage, 0, name.count)
        if type(name.view) is not tuple or len(name.view) != 3:
            raise CheckpointError(f"a view of storage {name.key} is described in no known way")
        _, first, count = name.view
        if (
            type(first) is not int
            or type(count) is not int
            or min(first, count, name.count - first - count) < 0
        ):
            raise CheckpointError(f"a view reaches out of storage {name.key}")
        return View(storage, first, count)

    def locate(self, keys: Any, position: int) -> None:
        """Finds every storage, from the file's list of their keys and the position behind that list."""
        if type(keys) is not list or not all(type(key) is str for key in keys):
            raise CheckpointError("its list of storages is damaged")
        if len(set(keys)) < len(keys) or set(keys) != set(self.storages):
            raise CheckpointError("its list of storages does not name those that its tensors use, each once")
        for key in keys:
            storage = self.storages[key]
            count = int(self.file.read(position, 8).view("<i8")[0])
            if count * storage.itemsize != storage.size:
                raise CheckpointError(
                    f"storage {key} at byte {position} has {count:,} elements, not the "
                    f"{storage.size // storage.itemsize:,} that its tensors expect"
                )
            storage.start = position + 8
            position = storage.start + storage.size
        if position > self.file.size:
            raise CheckpointError(
                f"the file is truncated: it has {self.file.size:,} bytes, not {position:,}: download it again"
            )
