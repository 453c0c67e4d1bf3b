"""Tensors in a file: what they look like, and how one is read when it is asked for."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from .files import CheckpointError, File, printable
from .plain_data import PLAIN_DATA, argument, nothing
from .unpickle import Constructors, Stub

MAX_DIMENSIONS = 32
_MAX_EXPANDED = 1 << 22  # elements of a tensor that repeats its storage's, beyond the storage's own number
_CHUNK = 1 << 20  # bytes

DTYPES: dict[str, np.dtype] = {  # by torch's names
    **{name: np.dtype(name) for name in ("float16", "float32", "float64", "bool", "complex64", "complex128")},
    **{f"{sign}int{bits}": np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)},
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_STORAGES = {  # dtypes by the names of storages in a pickle
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16",
    "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool", "UntypedStorage": "uint8",
    "ComplexDoubleStorage": "complex128", "ComplexFloatStorage": "complex64", "QInt8Storage": "qint8",
    "QUInt8Storage": "quint8", "QUInt4x2Storage": "quint4x2", "QUInt2x4Storage": "quint2x4",
    "QInt32Storage": "qint32",
}  # fmt: skip


def numpy_type(dtype: str) -> np.dtype:
    """The NumPy type of a torch dtype, named without "torch.".

    Raises:
      CheckpointError: there is none.
    """
    if dtype not in DTYPES:
        raise CheckpointError(
            f"tensors of type {dtype} are not supported: convert them to float32 in PyTorch"
        )
    return DTYPES[dtype]


def _itemsize(dtype: str) -> int:
    """Bytes of an element; of a type that cannot be read, those of quantised integers."""
    return DTYPES[dtype].itemsize if dtype in DTYPES else 4 if dtype == "qint32" else 1


@dataclass(eq=False)
class Storage:
    """The memory that tensors are views of: one run of bytes of the file."""

    file: File
    key: str
    dtype: str
    size: int  # bytes
    swapped: bool  # whether its byte order is not the machine's
    start: int = 0  # byte of the file; of a pickle's storage it is found later
    crc: int = 0  # CRC-32 of the bytes; 0: not known
    damaged: bool = False  # whether its CRC was found to differ

    @property
    def count(self) -> int:
        """Elements."""
        return self.size // _itemsize(self.dtype)

    def read(self, start: int, size: int) -> np.ndarray:
        """`size` bytes from byte `start` of the storage; the CRC of the whole is checked once."""
        data = self.file.read(self.start + start, size)
        if self.crc and not self.damaged:
            self.damaged = (zlib.crc32(data.data) if size == self.size else self._crc()) != self.crc
            self.crc = 0
        if self.damaged:
            raise CheckpointError(f"storage {self.key} is damaged (its CRC-32 differs): download it again")
        return data

    def _crc(self) -> int:
        crc = 0
        for first in range(0, self.size, _CHUNK):
            crc = zlib.crc32(self.file.read(self.start + first, min(_CHUNK, self.size - first)).data, crc)
        return crc


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor in a file, not yet read."""

    storage: Storage = field(repr=False)
    first: int = field(repr=False)  # element of the storage that it begins with
    shape: tuple[int, ...]
    strides: tuple[int, ...] = field(repr=False)  # elements
    dtype: str  # torch's name without "torch."

    def read(self) -> np.ndarray:
        """Reads it, while its file is open.

        Returns:
          An array of `shape`, in C order and the machine's byte order, in memory of its own; bfloat16 is
          ml_dtypes.bfloat16.

        Raises:
          CheckpointError: a type that NumPy does not have, an absurd size, a damaged file.
        """
        kind, shape, storage = numpy_type(self.dtype), self.shape, self.storage
        count = math.prod(shape)
        # The second is of a shape with zeros, which NumPy multiplies without them.
        if (
            count > max(storage.size // kind.itemsize, _MAX_EXPANDED)
            or math.prod(x or 1 for x in shape) > 2**48
        ):
            raise CheckpointError(
                f"a tensor of shape {shape} in a storage of {storage.size:,} bytes is absurd"
            )
        if count == 0:
            return np.zeros(shape, kind)
        span = _span(shape, self.strides)
        if span > 4 * count + _MAX_EXPANDED:
            raise CheckpointError(f"a tensor of {count:,} elements spread over {span:,} is absurd")
        raw = storage.read(self.first * kind.itemsize, span * kind.itemsize)
        if storage.swapped:
            part = kind.itemsize // 2 if kind.kind == "c" else kind.itemsize
            raw.view(f"u{part}").byteswap(inplace=True)
        values = raw != 0 if self.dtype == "bool" else raw.view(kind)
        steps = [stride * kind.itemsize for stride in self.strides]
        view = np.lib.stride_tricks.as_strided(values, shape, steps)
        return np.ascontiguousarray(view).reshape(shape)

    def same_memory(self, other: Tensor) -> bool:
        """Whether both are the same elements of the file, in the same order: equal without reading."""
        ours, theirs = (
            (x.storage, x.first, x.shape, x.strides, x.dtype) for x in (self, other)
        )  # storages are equal if they are the same object
        return ours == theirs


def contiguous(storage: Storage, shape: tuple[int, ...]) -> Tensor:
    """A tensor that is the whole storage, in C order."""
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return Tensor(storage, 0, shape, strides, storage.dtype)


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first to the last of a tensor."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


class _View(Stub):
    """Elements `first` to `first + count` of a storage. Alone in a tree it is a stub."""

    __slots__ = ("count", "first", "storage")

    def __init__(self, storage: Storage, first: int, count: int):
        super().__init__("a storage")
        self.storage, self.first, self.count = storage, first, count


class Storages:
    """The storages that a pickle refers to, one for each key; where they are in the file is found later.

    A reference is ("storage", type, key, location, count), and in the legacy format a sixth value behind
    it: None, or (key, first, count) of a storage that is a part of another.
    """

    def __init__(self, file: File, swapped: bool, length: int):
        self.file, self.swapped, self.length = file, swapped, length
        self.by_key: dict[str, Storage] = {}

    def load(self, reference: Any) -> Stub:
        """The elements that a pickle refers to; of a storage of an unknown type its stub.

        Raises:
          CheckpointError: it refers to something else, or to one storage in two ways.
        """
        if type(reference) is not tuple or len(reference) != self.length or reference[0] != "storage":
            raise CheckpointError("it refers to data in a way that PyTorch does not")
        _, kind, key, _, count, *view = reference
        is_described = isinstance(kind, Stub) and type(key) is str and printable(key) == key
        if not is_described or type(count) is not int or not 0 <= count < 2**60:
            raise CheckpointError("it refers to a storage in a way that PyTorch does not")
        module, _, name = kind.name.rpartition(".")
        if module.split(".")[0] != "torch" or name not in _STORAGES:
            return kind
        dtype, size = _STORAGES[name], count * _itemsize(_STORAGES[name])
        storage = self.by_key.setdefault(key, Storage(self.file, key, dtype, size, self.swapped))
        if (storage.dtype, storage.size) != (dtype, size):
            raise CheckpointError(f"storage {key} is described in two ways")
        if not view or view[0] is None:
            return _View(storage, 0, count)
        if type(view[0]) is not tuple or len(view[0]) != 3:
            raise CheckpointError(f"the view of storage {key} has an unknown form")
        _, first, size = view[0]
        if not type(first) is type(size) is int or min(first, size, count - first - size) < 0:
            raise CheckpointError(f"a view reaches out of storage {key}")
        return _View(storage, first, size)


def _rebuild(arguments: tuple) -> Any:
    """torch._utils._rebuild_tensor(storage, offset, shape, strides) and _v2(..., hooks, metadata)."""
    if len(arguments) < 4 or not isinstance(arguments[0], _View) or any(arguments[6:7]):
        return NotImplemented  # of a storage that is a stub; a lazily conjugated or negated view
    return _tensor(*arguments[:4], arguments[0].storage.dtype)


def _rebuild_v3(arguments: tuple) -> Any:
    """torch._utils._rebuild_tensor_v3(storage, offset, shape, strides, grad, hooks, dtype, metadata)."""
    are_known = len(arguments) >= 7 and isinstance(arguments[0], _View) and isinstance(arguments[6], Stub)
    if not are_known or any(arguments[7:8]):
        return NotImplemented
    return _tensor(*arguments[:4], arguments[6].name.removeprefix("torch."))


def _tensor(view: _View, offset: Any, shape: Any, strides: Any, dtype: str) -> Tensor:
    if not all(type(x) in (tuple, list) and len(x) <= MAX_DIMENSIONS for x in (shape, strides)):
        raise CheckpointError(f"a tensor's shape or strides are not a list of at most {MAX_DIMENSIONS} sizes")
    sizes = (offset, *shape, *strides)
    if len(shape) != len(strides) or not all(type(x) is int and 0 <= x < 2**60 for x in sizes):
        raise CheckpointError("a tensor's shape, strides or offset are not sizes")
    # An untyped storage is one of bytes; `first` and `count` of a view are in elements of its storage.
    scale, shape, strides = _itemsize(view.storage.dtype), tuple(shape), tuple(strides)
    span, count = _span(shape, strides), view.count * scale // _itemsize(dtype)
    if span and offset + span > count:
        raise CheckpointError(
            f"a tensor of shape {shape} reaches {offset + span:,} elements into a storage of {count:,}"
        )
    return Tensor(view.storage, view.first * scale // _itemsize(dtype) + offset, shape, strides, dtype)


def _rebuild_from_type(arguments: tuple) -> Any:
    """torch._tensor._rebuild_from_type_v2(function, type, arguments, state)."""
    if len(arguments) < 3 or not isinstance(arguments[0], Stub) or type(arguments[2]) is not tuple:
        return NotImplemented
    make = _TENSORS.get(arguments[0].name)
    return make(arguments[2]) if make else NotImplemented


_TENSORS: Constructors = {
    "torch._utils._rebuild_tensor": _rebuild,
    "torch._utils._rebuild_tensor_v2": _rebuild,
    "torch._utils._rebuild_tensor_v3": _rebuild_v3,
    "torch._utils._rebuild_parameter": argument(Tensor),
    "torch._utils._rebuild_parameter_with_state": argument(Tensor),
    "torch.nn.parameter.Parameter": argument(Tensor),
    "torch.nn.parameter.Buffer": argument(Tensor),
}
CONSTRUCTORS: Constructors = {  # what a pickle of PyTorch may build
    **PLAIN_DATA,
    **_TENSORS,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.Size": argument(tuple),
    "torch.device": argument(str),
    "torch.Tensor": nothing,
    **{f"torch.{name}": nothing for name in DTYPES},
    **{f"{m}.{name}": nothing for name in _STORAGES for m in ("torch", "torch.cuda", "torch.storage")},
}
