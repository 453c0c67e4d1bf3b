"""The safetensors format: the length of a header, the header (JSON), and the tensors one behind the other.

https://github.com/huggingface/safetensors#format. What the format's own library refuses is refused here, and
so are a name that occurs twice, a field that the format does not have, and a header of more than 2 MiB.
"""

from __future__ import annotations

import json
import math
import sys
from typing import Any

from .files import CheckpointError, File, printable
from .tensors import MAX_DIMENSIONS, Storage, Tensor, contiguous

_MAX_HEADER = 1 << 21  # bytes; of a ResNet-50 0.03 MB
# By the format's names: torch's, and the bits of an element. Not all of them can be read.
_DTYPES = {
    "F64": ("float64", 64), "F32": ("float32", 32), "F16": ("float16", 16), "BF16": ("bfloat16", 16),
    "I64": ("int64", 64), "I32": ("int32", 32), "I16": ("int16", 16), "I8": ("int8", 8),
    "U64": ("uint64", 64), "U32": ("uint32", 32), "U16": ("uint16", 16), "U8": ("uint8", 8),
    "BOOL": ("bool", 8), "C64": ("complex64", 64),
    "F8_E4M3": ("float8_e4m3fn", 8), "F8_E5M2": ("float8_e5m2", 8), "F8_E8M0": ("float8_e8m0fnu", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8), "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "F6_E2M3": ("float6_e2m3fn", 6), "F6_E3M2": ("float6_e3m2fn", 6), "F4": ("float4_e2m1fn", 4),
}  # fmt: skip


def read_safetensors(file: File) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file by name, and its metadata.

    Raises:
      CheckpointError: the header is too long, or not as the format says.
    """
    length = int.from_bytes(file.head(8), "little")
    if length > min(_MAX_HEADER, file.size - 8):
        raise CheckpointError(
            f"a truncated or damaged safetensors file: {file.size:,} bytes with a header of {length:,}"
        )
    try:
        header = json.loads(file.read(8, length).tobytes().decode(), object_pairs_hook=_object)
        metadata = header.pop("__metadata__", None)
        if metadata is not None and not (
            type(metadata) is dict and all(type(value) is str for value in metadata.values())
        ):
            raise ValueError("its metadata are not texts")
        return _tensors(file, 8 + length, header), metadata or {}
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"a damaged safetensors file, in its header: {printable(str(error))}"
        ) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice in its header")
    for text in (*found, *found.values()):
        if type(text) is str:
            text.encode()  # no lone surrogates: they cannot be printed
    return found


def _tensors(file: File, start: int, entries: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors that fill the file from byte `start` to its end."""
    tensors = {name: _tensor(file, start, name, entry) for name, entry in entries.items()}
    end = start
    for storage in sorted((x.storage for x in tensors.values()), key=lambda x: (x.start, x.size)):
        if storage.start != end:
            raise ValueError(f"an overlap or a gap before {storage.key}")
        end += storage.size
    if end != file.size:
        raise ValueError(f"its tensors end at byte {end:,} of {file.size:,}: download it again")
    return tensors


def _tensor(file: File, start: int, name: str, entry: Any) -> Tensor:
    if type(entry) is not dict or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"fields other than dtype, shape and data_offsets in {name}")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(code) is not str or code not in _DTYPES:
        raise ValueError(f"an unknown dtype in {name}")
    for sizes, longest in ((shape, MAX_DIMENSIONS), (offsets, 2)):
        if type(sizes) is not list or not all(type(x) is int and 0 <= x < 2**63 for x in sizes):
            raise ValueError(f"a shape or offsets that are not sizes in {name}")
        if len(sizes) > longest:
            raise ValueError(f"a shape or offsets of more than {longest} sizes in {name}")
    dtype, bits = _DTYPES[code]
    if len(offsets) != 2 or 8 * (offsets[1] - offsets[0]) != math.prod(shape) * bits:
        raise ValueError(f"offsets that do not fit the shape in {name}")
    first, last = offsets
    swapped = sys.byteorder != "little"
    return contiguous(Storage(file, name, dtype, last - first, swapped, start + first), tuple(shape))
