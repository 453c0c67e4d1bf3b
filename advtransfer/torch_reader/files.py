"""Files of a known size, read piece by piece, and the error that every file which cannot be read ends in."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import stat
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_CHUNK = 1 << 22  # bytes


class CheckpointError(ValueError):
    """A file that cannot be read as a checkpoint: one line that says what was found and what to do."""

    path: Path | None = None  # of the file, once the message begins with it


def printable(text: str) -> str:
    """At most 100 characters of a text from a file, without control characters."""
    return "".join(c if c.isprintable() else "?" for c in text[:100])


@dataclass(frozen=True)
class File:
    """An open file of a known size."""

    path: Path
    raw: io.FileIO
    size: int  # bytes

    def read(self, start: int, size: int) -> np.ndarray:
        """`size` bytes from byte `start`, as uint8."""
        if self.raw.closed:
            raise CheckpointError("the file is closed: read its tensors while it is open")
        if start < 0 or start + size > self.size:
            raise CheckpointError(
                f"the file is truncated: it has {self.size:,} bytes, not {start + size:,}: download it again"
            )
        data = np.empty(size, np.uint8)
        view, done = data.data, 0
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

    def head(self, size: int) -> bytes:
        """The first `size` bytes, or all of a shorter file."""
        return self.read(0, min(size, self.size)).tobytes()

    def sha256(self) -> str:
        """SHA-256 in hexadecimal, read piece by piece."""
        sha = hashlib.sha256()
        for start in range(0, self.size, _CHUNK):
            sha.update(self.read(start, min(_CHUNK, self.size - start)).data)
        return sha.hexdigest()


@contextlib.contextmanager
def open_file(path: str | Path) -> Generator[File]:
    """Opens a file once for everything that is done with it, so that what is hashed is what is read.

    A `CheckpointError` that leaves the block gets the path in front of its message.

    Raises:
      CheckpointError: there is no such file, or it is not a regular one.
    """
    path = Path(path)
    try:
        with _open(path) as raw:
            yield File(path, raw, os.fstat(raw.fileno()).st_size)
    except CheckpointError as error:
        if error.path is None:
            error.path, error.args = path, (f"{path}: {error}",)
        raise


def _open(path: Path) -> io.FileIO:
    try:
        mode = path.stat().st_mode  # before it is opened, which would wait for the other end of a pipe
        if stat.S_ISREG(mode):
            return open(path, "rb", buffering=0)
    except FileNotFoundError as error:
        url = "; it looks like a URL: download it and pass the file's path" if ":/" in str(path) else ""
        raise CheckpointError(f"there is no such file{url}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot be opened ({getattr(error, 'strerror', error)})") from error
    is_folder = stat.S_ISDIR(mode)
    raise CheckpointError("a folder, not a file: name the file in it" if is_folder else "not a regular file")
