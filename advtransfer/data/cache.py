"""Arrays that are costly to make, kept on disk under the digest of everything they depend on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

_UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)


def cached_arrays(
    kind: str,
    identity: dict,
    make: Callable[[], dict[str, np.ndarray]],
    *,
    cache_dir: str | os.PathLike | None = None,
) -> dict[str, np.ndarray]:
    """Reads the arrays of `identity`, or makes and keeps them.

    A file that cannot be read whole (the zip's checksums are verified) is made again, and a folder
    that cannot be written costs the time of making the arrays, never an error.

    Args:
      kind: first part of the file's name.
      identity: everything that the arrays depend on, as JSON can write it.
      make: called without arguments when there is no good file.
      cache_dir: folder of the files; None is `$XDG_CACHE_HOME/advtransfer` or
        `~/.cache/advtransfer`.
    """
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    folder = Path(cache_dir) if cache_dir is not None else _default_folder()
    path = folder / f"{kind}-{digest[:16]}.npz"
    with contextlib.suppress(*_UNREADABLE), path.open("rb") as file, np.load(file) as archive:
        return dict(archive)
    arrays = make()
    with contextlib.suppress(OSError):
        _write_by_rename(path, arrays)
    return arrays


def fingerprint(root: Path, paths: Iterable[Path]) -> str:
    """Digest of files below `root` that is another when one of them is written to, moved or replaced.

    From their names, sizes and times of change; the status time (ctime) cannot be set back by copying
    or `touch`, so nothing need be read.
    """
    digest = hashlib.sha256()
    for path in sorted(paths):
        status = path.stat() if path.exists() else path.lstat()  # a link that leads nowhere
        entry = [str(path.relative_to(root)), status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        digest.update(json.dumps(entry).encode())
    return digest.hexdigest()


def content_digest(*arrays: np.ndarray) -> str:
    """SHA-256 of the arrays' types, shapes and values."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _default_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "advtransfer"


def _write_by_rename(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Another process sees the whole file or none, also when several write it at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **arrays)
        os.replace(partial, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
