"""Compiled programs: kept on disk between runs, and the seconds that compiling takes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
from collections.abc import Generator
from importlib.metadata import version
from pathlib import Path

import jax

_MAX_BYTES = 2 << 30  # of all programs in the folder
# In the key beside what JAX puts there: XLA compiles for the exact processor, and a program made on another
# may end the process.
_CPU_LINES = ("model name", "flags", "Features", "CPU ")
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


def keep_programs(folder: Path) -> None:
    """Keeps compiled programs below a folder, for later runs and other processes on this kind of machine.

    JAX_COMPILATION_CACHE_DIR, if set, names the folder instead; JAX_ENABLE_COMPILATION_CACHE=0 turns the
    cache off. Without a folder that can be written nothing is kept. The oldest programs are deleted when all
    take more than 2 GiB.
    """
    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:  # ty: ignore[missing-attribute] JAX adds them at run time
        return
    here = folder / _machine()
    with contextlib.suppress(OSError):  # another process may be deleting the same files
        _delete_oldest(folder)
        here.mkdir(parents=True, exist_ok=True)
    if os.access(here, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(here))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _delete_oldest(folder: Path) -> None:
    sizes = {file: file.stat() for file in folder.glob(f"{'[0-9a-f]' * 16}/*-cache")}
    excess = sum(status.st_size for status in sizes.values()) - _MAX_BYTES
    for file in sorted(sizes, key=lambda file: sizes[file].st_mtime):
        if excess <= 0:
            break
        excess -= sizes[file].st_size
        file.unlink()


def _machine() -> str:
    """A digest of the processor and of the compiler's version."""
    lines = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    kinds = sorted({line for line in lines if line.startswith(_CPU_LINES)})
    versions = [version(name) for name in ("jax", "jaxlib")]
    return hashlib.sha256(repr((kinds, platform.machine(), versions)).encode()).hexdigest()[:16]


@contextlib.contextmanager
def compile_clock() -> Generator[list[float]]:
    """Collects the seconds of each compilation by XLA, or of loading what an earlier one has kept."""
    seconds: list[float] = []

    def add(event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILE_EVENT:
            seconds.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(add)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(add)
