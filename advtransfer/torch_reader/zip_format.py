"""PyTorch's zip format (1.6 and later): `NAME/data.pkl`, `NAME/data/KEY`, `NAME/byteorder`."""

from __future__ import annotations

import io
import struct
import sys
import zipfile
import zlib
from typing import Any, NamedTuple

from .files import CheckpointError, File, printable
from .tensors import CONSTRUCTORS, Storages
from .unpickle import MAX_BYTES, SAVE_ALONE, unpickle

_MAX_DIRECTORY = 1 << 22  # bytes; of a ResNet-50 and its optimiser 0.05 MB
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of the name and of the extra field


class _Record(NamedTuple):
    start: int  # byte of the file
    size: int  # bytes
    crc: int  # CRC-32; 0 if PyTorch left it out


def read_zip(file: File) -> tuple[Any, set[str]]:
    """The tree of a PyTorch zip file, and the names of what was stubbed in it.

    Raises:
      CheckpointError: another kind of zip file, or a damaged one.
    """
    entries = _directory(file)
    pickles = [name for name in entries if name.split("/", 1)[-1] == "data.pkl"]
    if len(pickles) != 1:
        names = ", ".join(printable(name) for name in list(entries)[:3]) + ", ..." * (len(entries) > 3)
        raise CheckpointError(f"a zip file that PyTorch did not save: it holds {names or 'nothing'}")
    prefix = pickles[0].removesuffix("data.pkl")
    if prefix + "constants.pkl" in entries:
        raise CheckpointError("a TorchScript archive, which is a program: save its state_dict() in PyTorch")
    inside = {name.removeprefix(prefix): e for name, e in entries.items() if name.startswith(prefix)}
    records = {name: _record(file, entry) for name, entry in inside.items()}
    order = _content(file, records, "byteorder", 16) if "byteorder" in records else b"little"
    if order not in (b"little", b"big"):
        raise CheckpointError("its byte order is neither little nor big")
    storages = Storages(file, swapped=order.decode() != sys.byteorder, length=5)
    pickle = io.BytesIO(_content(file, records, "data.pkl", MAX_BYTES))
    tree, stubbed = unpickle(pickle, CONSTRUCTORS, storages.load)
    for key, storage in storages.by_key.items():
        record = records.get(f"data/{key}")
        if record is None:
            raise CheckpointError(f"storage {key} is not in the file")
        if record.size != storage.size:
            raise CheckpointError(
                f"storage {key} has {record.size:,} bytes, not the {storage.size:,} that its tensors expect"
            )
        storage.start, storage.crc = record.start, record.crc
    return tree, stubbed


def _directory(file: File) -> dict[str, zipfile.ZipInfo]:
    """The records by name: beside each other, each name once."""
    try:
        with zipfile.ZipFile(_Directory(file.raw)) as archive:
            entries, end = archive.infolist(), archive.start_dir
    except CheckpointError:
        raise
    except Exception as error:  # zipfile raises whatever its parsing of damaged bytes runs into
        raise CheckpointError(
            f"a truncated or damaged zip file: it has no directory at the end of its {file.size:,} bytes: "
            "download it again"
        ) from error
    by_name = {entry.filename: entry for entry in entries}
    if len(by_name) < len(entries):
        raise CheckpointError("a damaged zip file: two records have one name")
    for entry in sorted(entries, key=lambda entry: entry.header_offset, reverse=True):
        last = entry.header_offset + _LOCAL_HEADER.size + entry.compress_size
        if entry.header_offset < 0 or last > end:
            raise CheckpointError("a damaged zip file: its records overlap or lie outside it")
        end = entry.header_offset
    return by_name


class _Directory:
    """A file that gives `zipfile` no more than a directory of a sane size."""

    def __init__(self, raw: io.FileIO):
        self.tell, self.seekable, self.raw = raw.tell, raw.seekable, raw

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self.raw.seek(offset, whence)

    def read(self, size: int = -1) -> bytes:
        data = self.raw.read(min(size, _MAX_DIRECTORY + 1) if size >= 0 else _MAX_DIRECTORY + 1)
        if len(data) > _MAX_DIRECTORY:
            raise CheckpointError(f"a zip file with a directory of more than {_MAX_DIRECTORY:,} bytes")
        return data


def _record(file: File, entry: zipfile.ZipInfo) -> _Record:
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise CheckpointError(
            f"a zip file with compressed or encrypted records ({printable(entry.filename)}): PyTorch writes "
            "none; unzip it if it was zipped again"
        )
    header = file.read(entry.header_offset, _LOCAL_HEADER.size).tobytes()
    signature, name, extra = _LOCAL_HEADER.unpack(header)
    start = entry.header_offset + _LOCAL_HEADER.size + name + extra
    is_stored = entry.file_size == entry.compress_size and start + entry.file_size <= file.size
    if signature != b"PK\3\4" or not is_stored:
        raise CheckpointError(f"a damaged zip file: {printable(entry.filename)} is not where it should be")
    return _Record(start, entry.file_size, entry.CRC)


def _content(file: File, records: dict[str, _Record], name: str, limit: int) -> bytes:
    record = records[name]
    if record.size > limit:
        raise CheckpointError(
            f"its {name} has {record.size:,} bytes; at most {limit:,} are read: {SAVE_ALONE}"
        )
    data = file.read(record.start, record.size).tobytes()
    if record.crc and zlib.crc32(data) != record.crc:
        raise CheckpointError(f"its {name} is damaged (the CRC-32 differs): download it again")
    return data
