"""A job, and its workdir: the folder of one config's results."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import jax
import numpy as np

from advtransfer import foreign, parallel, storage
from advtransfer.config import ConfigError, Options, conflicts
from advtransfer.foreign import AnyPath
from advtransfer.models import package_versions
from advtransfer.study import claim


class Job(NamedTuple):
    """What a task is given."""

    options: Options
    settings: dict[str, Any]  # the same as a tree of keys, for config.json and reports
    workdir: AnyPath
    command: str = ""  # that a reader types to get the results again


def check_workdir(job: Job) -> None:
    """Raises a ConfigError if the workdir cannot be written, or holds another config's results or foreign
    files: a folder of ours has a `config.json`, and only what is in such a folder is replaced."""
    workdir = job.workdir
    try:
        storage.check_writable(workdir)
    except ValueError as error:
        raise ConfigError(f"--workdir={workdir} cannot be written: {error}") from error
    saved = workdir / "config.json"
    try:
        storage.check_ours(workdir, saved.name)
    except ValueError as error:
        raise ConfigError(f"--workdir={error}") from error
    if saved.exists():
        try:
            different = conflicts(job.settings, foreign.read_bytes(saved).decode())
        except ValueError as error:
            raise ConfigError(
                f"{saved} is not a configuration that can be compared ({error}): choose another --workdir, "
                "or delete it"
            ) from error
        if different:
            raise ConfigError(
                f"--workdir={workdir} holds the results of another config ({'; '.join(different)}): "
                "choose another --workdir, or go back to that config"
            )


@contextlib.contextmanager
def claimed(workdir: AnyPath) -> Generator[None]:
    """Inside, `workdir` is this run's alone; the lock ends with its process, however that ends.

    Raises:
      ConfigError: it is another run's.
    """
    with contextlib.ExitStack() as stack:
        mine = not parallel.is_main_process() or stack.enter_context(claim(workdir / ".lock"))
        if not parallel.everywhere(mine):
            raise ConfigError(
                f"--workdir={workdir} is in use by another process: wait until that ends, or choose another"
            )
        yield


def open_workdir(job: Job) -> None:
    """Checks the workdir, makes it, and leaves `config.json` in it.

    Raises:
      ConfigError: as `check_workdir`, or the processes of this run do not share the workdir.
    """
    check_workdir(job)
    storage.make_folder(job.workdir)
    _check_shared(job.workdir)
    write_json(job.workdir / "config.json", job.settings)


def _check_shared(workdir: AnyPath, *, seconds: float = 5.0) -> None:
    """Every process looks for a token of process 0; network file systems may take a moment to show it."""
    if parallel.num_processes() == 1:
        return
    token = workdir / f".shared{int(parallel.from_main(np.int32(os.getpid())))}"
    if parallel.is_main_process():
        storage.write(token, b"")
    parallel.barrier("token")
    deadline = time.monotonic() + seconds
    while not (seen := token.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    shared = parallel.everywhere(seen)
    if parallel.is_main_process():
        token.unlink()
    if not shared:
        raise ConfigError(
            f"--workdir={workdir} is not one folder: another process does not see what process 0 writes "
            "there. Name a folder on a file system that all processes share, or a bucket (gs://, s3://)"
        )


def write_json(path: AnyPath, value: Any) -> None:
    """Writes JSON whole or not at all; process 0 does."""
    if parallel.is_main_process():
        storage.write(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def keep(
    path: AnyPath,
    subject: dict[str, Any],
    make: Callable[[], dict[str, Any]],
    read: Callable[[dict[str, Any]], Any] = dict,
) -> Any:
    """What `path` holds of the same subject, or else what `make` gives, which is then kept there.

    Subject and content are one JSON object. What is returned is what `read` makes of it. A file that is none,
    or of which `read` makes a ValueError, is made again.
    """
    try:
        kept = foreign.read_json(path)
        if subject.items() <= kept.items():
            return read(kept)
    except (FileNotFoundError, ValueError, AttributeError):
        pass
    made = subject | make()
    write_json(path, made)
    return read(made)


def versions() -> dict[str, str]:
    """Of the packages that results depend on, and the kind of device."""
    return package_versions() | {"device": jax.devices()[0].device_kind}
