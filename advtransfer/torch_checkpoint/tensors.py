"""Tensors that lie in a file: what they look like, and how one is read when it is asked for."""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from advtransfer.torch_checkpoint.plain_data import PLAIN_DATA, nothing
from advtransfer.torch_checkpoint.unpickle import CheckpointError, Constructors, Stub, printable

_MAX_DIMENSIONS = 32
_MAX_EXPANDED = 1 << 22  # elements of a tensor that repeats its storage's, beyond the storage's own number
_CHUNK = 1 << 20  # bytes

DTYPES: dict[str, np.dtype] = {  # by torch's names
    **{name: np.dtype(name) for name in ("float16", "float32", "float64", "bool", "complex64", "complex128")},
    **{f"{sign}int{bits}": np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)},
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_STORAGES = {  # by their names in a pickle: dtype, bytes of an element
    **{f"{word}Storage": (name, DTYPES[name].itemsize) for word, name in {
        "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64",
        "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool",
        "ComplexDouble": "complex128", "ComplexFloat": "complex64", "Untyped": "uint8",
    }.items()},
    "QInt8Storage": ("qint8", 1),
    "QUInt8Storage": ("quint8", 1),
    "QUInt4x2Storage": ("quint4x2", 1),
    "QUInt2x4Storage": ("quint2x4", 1),
    "QInt32Storage": ("qint32", 4),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor in a file, not yet read."""

    shape: tuple[int, ...]
    dtype: str  # torch's name without "torch."
    place: tuple[Any, ...] = field(repr=False)  # what makes it the same memory as another
    load: Callable[[], np.ndarray] = field(repr=False)

    def read(self) -> np.ndarray:
        """Reads it, while its file is open.

        Returns:
          An array of `shape`, in C order and the machine's byte order, in memory of its own; bfloat16 is
          ml_dtypes.bfloat16.

        Raises:
          CheckpointError: a type that numpy has not, an absurd size, a damaged file.
        """
        return self.load()

    def same_memory(self, other: Tensor) -> bool:
        """Whether both are the same elements of the file, in the same order: equal without reading."""
        return (self.shape, self.dtype, self.place) == (other.shape, other.dtype, other.place)


@dataclass(frozen=True)
class File:
    """An open file of a known size."""

    path: Path
    raw: BinaryIO  # unbuffered
    size: int

    def read(self, start: int, size: int) -> np.ndarray:
        """`size` bytes from `start`, as uint8."""
        if self.raw.closed:
            raise CheckpointError("it is closed: read its tensors while it is open")
        if start < 0 or start + size > self.size:
            raise CheckpointError(
                f"the file is truncated: it has {self.size:,} bytes, not {start + size:,}: download it again"
            )
        data = np.empty(size, np.uint8)
        view, done = memoryview(data), 0
        try:
            self.raw.seek(start)
            while done < size:
                count = self.raw.readinto(view[done:])
                if not count:
                    raise CheckpointError("the file became shorter while it was read")
                done += count
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error.strerror}") from error
        return data


@dataclass(eq=False)
class Storage:
    """The memory that tensors are views of: one run of bytes of the file."""

    file: File
    key: str
    dtype: str
    itemsize: int  # bytes
    size: int  # bytes
    start: int = -1  # byte of the file; -1: not known yet
    crc: int = 0  # CRC-32 of the bytes; 0: not known
    swapped: bool = False  # whether its byte order is not the machine's
    damaged: bool = False  # whether its CRC was found to differ

    def read(self, start: int, size: int) -> np.ndarray:
        """`size` bytes from byte `start` of the storage; the CRC of the whole is checked once."""
        if self.start < 0:
            raise CheckpointError(f"storage {self.key} is not in the file")
        data = self.file.read(self.start + start, size)
        if self.crc:
            if not self.damaged:
                self.damaged = (zlib.crc32(data) if size == self.size else self._crc()) != self.crc
            if self.damaged:
                raise CheckpointError(
                    f"storage {self.key} is damaged (its CRC-32 differs): download it again"
                )
            self.crc = 0
        return data

    def _crc(self) -> int:
        crc = 0
        for first in range(0, self.size, _CHUNK):
            crc = zlib.crc32(self.file.read(self.start + first, min(_CHUNK, self.size - first)), crc)
        return crc


class View(Stub):
    """A storage, or elements `first` to `first + count` of one. Alone in a tree it is a stub."""

    __slots__ = ("count", "first", "storage")

    def __init__(self, storage: Storage, first: int, count: int):
        super().__init__("a storage")
        self.storage, self.first, self.count = storage, first, count


class StorageId(NamedTuple):
    """What a pickle says of a storage."""

    dtype: str
    itemsize: int  # bytes
    key: str
    count: int  # elements
    view: Any  # None, or (key, first, count) in the legacy format


def parse_storage_id(value: Any, length: int) -> StorageId | Stub:
    """Reads ("storage", type, key, location, count[, view]); an unknown type gives its stub.

    Raises:
      CheckpointError: something else.
    """
    if type(value) is not tuple or len(value) != length or value[0] != "storage":
        raise CheckpointError("it refers to data in a way that PyTorch does not")
    _, kind, key, _, count = value[:5]
    is_described = isinstance(kind, Stub) and type(key) is str and printable(key) == key
    if not is_described or type(count) is not int or not 0 <= count < 2**60:
        raise CheckpointError("it refers to a storage in a way that PyTorch does not")
    module, _, name = kind.name.rpartition(".")
    if module.split(".")[0] != "torch" or name not in _STORAGES:
        return kind
    return StorageId(*_STORAGES[name], key, count, value[5] if length == 6 else None)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts the file's name before what is wrong with it."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _rebuild(arguments: tuple) -> Any:
    """torch._utils._rebuild_tensor(storage, offset, shape, strides) and _v2(..., hooks, metadata)."""
    if len(arguments) < 4 or not isinstance(arguments[0], View) or (len(arguments) > 6 and arguments[6]):
        return NotImplemented  # of a storage that is a stub; a lazily conjugated or negated view
    view = arguments[0]
    return _view(*arguments[:4], view.storage.dtype, view.storage.itemsize)


def _rebuild_v3(arguments: tuple) -> Any:
    """torch._utils._rebuild_tensor_v3(storage, offset, shape, strides, grad, hooks, dtype, metadata)."""
    is_tensor = len(arguments) >= 7 and isinstance(arguments[0], View) and isinstance(arguments[6], Stub)
    if not is_tensor or (len(arguments) > 7 and arguments[7]):
        return NotImplemented
    dtype = arguments[6].name.removeprefix("torch.")
    return _view(*arguments[:4], dtype, DTYPES[dtype].itemsize if dtype in DTYPES else 1)


def _view(view: View, offset: Any, shape: Any, strides: Any, dtype: str, itemsize: int) -> Tensor:
    if not all(type(x) in (tuple, list) and len(x) <= _MAX_DIMENSIONS for x in (shape, strides)):
        raise CheckpointError(f"a tensor's shape or strides are no list of at most {_MAX_DIMENSIONS} sizes")
    if len(shape) != len(strides) or not all(
        type(x) is int and 0 <= x < 2**60 for x in (offset, *shape, *strides)
    ):
        raise CheckpointError("a tensor's shape, strides or offset are no sizes")
    storage, shape, strides = view.storage, tuple(shape), tuple(strides)
    span = _span(shape, strides)
    count = view.count * storage.itemsize // itemsize
    if span and offset + span > count:
        raise CheckpointError(
            f"a tensor of shape {shape} reaches {offset + span:,} elements into a storage of {count:,}"
        )
    first = view.first * storage.itemsize // itemsize + offset
    load = partial(_read, storage, first, shape, strides, dtype)
    return Tensor(shape, dtype, (storage, first, strides), load)


def contiguous(storage: Storage, shape: tuple[int, ...]) -> Tensor:
    """A tensor that is the whole storage, in C order."""
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return Tensor(
        shape, storage.dtype, (storage, 0, strides), partial(_read, storage, 0, shape, strides, storage.dtype)
    )


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first to the last of a tensor."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _read(storage: Storage, first: int, shape: tuple, strides: tuple, dtype: str) -> np.ndarray:
    with naming(storage.file.path):
        kind = numpy_type(dtype)
        count = math.prod(shape)
        if (
            count > max(storage.size // kind.itemsize, _MAX_EXPANDED)
            or math.prod(x or 1 for x in shape) > 2**48
        ):
            raise CheckpointError(
                f"a tensor of shape {shape} in a storage of {storage.size:,} bytes is absurd"
            )
        if count == 0:
            return np.zeros(shape, kind)
        span = _span(shape, strides)
        if span > 4 * count + _MAX_EXPANDED:
            raise CheckpointError(f"a tensor of {count:,} elements spread over {span:,} is absurd")
        raw = storage.read(first * kind.itemsize, span * kind.itemsize)
        if storage.swapped:
            part = kind.itemsize // 2 if kind.kind == "c" else kind.itemsize
            raw.view(f"u{part}").byteswap(inplace=True)
        values = raw != 0 if dtype == "bool" else raw.view(kind)
        steps = [stride * kind.itemsize for stride in strides]
        view = np.lib.stride_tricks.as_strided(values, shape, steps)
        return np.ascontiguousarray(view).reshape(shape)


def numpy_type(dtype: str) -> np.dtype:
    """The numpy type of a torch dtype.

    Raises:
      CheckpointError: there is none.
    """
    if dtype not in DTYPES:
        raise CheckpointError(
            f"tensors of type {dtype} are not supported: convert them to float32 in PyTorch"
        )
    return DTYPES[dtype]


def _parameter(arguments: tuple) -> Any:
    return arguments[0] if arguments and isinstance(arguments[0], Tensor) else NotImplemented


def _rebuild_from_type(arguments: tuple) -> Any:
    """torch._tensor._rebuild_from_type_v2(function, type, arguments, state)."""
    if len(arguments) < 3 or not isinstance(arguments[0], Stub) or type(arguments[2]) is not tuple:
        return NotImplemented
    make = _TENSORS.get(arguments[0].name)
    return make(arguments[2]) if make else NotImplemented


def _size(arguments: tuple) -> Any:
    return arguments[0] if arguments and type(arguments[0]) is tuple else NotImplemented


def _device(arguments: tuple) -> Any:
    return arguments[0] if arguments and type(arguments[0]) is str else NotImplemented


_TENSORS: Constructors = {
    "torch._utils._rebuild_tensor": _rebuild,
    "torch._utils._rebuild_tensor_v2": _rebuild,
    "torch._utils._rebuild_tensor_v3": _rebuild_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.nn.parameter.Parameter": _parameter,
    "torch.nn.parameter.Buffer": _parameter,
}
CONSTRUCTORS: Constructors = {  # what a pickle of PyTorch may build
    **PLAIN_DATA,
    **_TENSORS,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.Size": _size,
    "torch.device": _device,
    "torch.Tensor": nothing,
    **{f"torch.{name}": nothing for name in DTYPES},
    **{f"{m}.{name}": nothing for name in _STORAGES for m in ("torch", "torch.cuda", "torch.storage")},
}
