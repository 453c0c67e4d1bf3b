"""An on-disk cache of expensive arrays, keyed by a digest of everything they depend on."""

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
from jaxtyping import Shaped, UInt8, UInt64

_UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)


def cached_arrays(
    kind: str,
    identity: dict,
    make: Callable[[], dict[str, np.ndarray]],
    *,
    cache_dir: str | os.PathLike | None = None,
) -> dict[str, np.ndarray]:
    """Reads the arrays of `identity` from the cache, or makes and caches them.

    A damaged file (the zip's checksums are verified) is replaced. If the folder cannot be written, the arrays
    are made on every call; it is not an error.

    Args:
      kind: prefix of the file name.
      identity: everything that the arrays depend on; JSON-serialisable.
      make: computes the arrays when there is no usable file.
      cache_dir: None is `$XDG_CACHE_HOME/advtransfer` or `~/.cache/advtransfer`.
    """
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    path = cache_folder(cache_dir) / f"{kind}-{digest[:16]}.npz"
    with contextlib.suppress(*_UNREADABLE), path.open("rb") as file, np.load(file) as archive:
        return dict(archive)
    arrays = make()
    with contextlib.suppress(OSError):
        _write_by_rename(path, arrays)
    return arrays


def fingerprint(root: Path, paths: Iterable[Path]) -> str:
    """Digest of files that changes when one of them is modified, moved in or to `root`, or replaced.

    Computed from names, sizes and times without reading the files: the change time (ctime) cannot be set back
    by copying or `touch`.
    """
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(json.dumps([shortened(path, root), *_status(path)]).encode())
    return digest.hexdigest()


def shortened(path: Path, root: Path) -> str:
    """The path relative to `root`, or as it is if it does not begin there; fast for millions of paths."""
    return str(path).removeprefix(os.path.join(root, ""))


def _status(path: Path) -> list[int]:
    """Size and times of a file, or of a link whose target is missing; empty if there is neither."""
    for follow in (True, False):
        with contextlib.suppress(OSError, ValueError):
            status = path.stat(follow_symlinks=follow)
            return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    return []


def image_hashes(images: UInt8[np.ndarray, "n h w 3"]) -> UInt64[np.ndarray, " n"]:
    """64 bits of each image's pixels, by which the same image is found again."""
    hashes = (hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=8) for image in images)
    return np.frombuffer(b"".join(one.digest() for one in hashes), "<u8").astype(np.uint64)


def content_digest(*arrays: Shaped[np.ndarray, " ..."]) -> str:
    """SHA-256 of the arrays' dtypes, shapes and values."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def cache_folder(cache_dir: str | os.PathLike | None = None) -> Path:
    """The folder of everything that is kept for later runs (see `cached_arrays`)."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache_dir or Path(base).expanduser() / "advtransfer")


def _write_by_rename(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes atomically: other processes see the whole file or none, even if several write it at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **arrays)  # ty: ignore[invalid-argument-type]  # no array is called allow_pickle
        os.replace(partial, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
