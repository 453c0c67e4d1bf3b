"""Dividing work among processes that share one folder of results, without communication.

A claim is a lock (flock) on a file beside the result, which ends with the process that holds it. Network file
systems of Linux support it too (NFS since 4, Lustre and CephFS by default or with `flock`).
Object stores do not: there work is divided in advance, by the process's number in the run.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import time
from collections.abc import Callable, Generator, Sequence
from typing import IO

from advtransfer import parallel, storage
from advtransfer.foreign import AnyPath


class NoLocks(OSError):
    """A file system on which no file can be locked."""


_LOOK_EVERY = 0.5  # seconds, for what others have finished


def divide(names: Sequence[str], folder: AnyPath, is_done: Callable[[str], bool]) -> Generator[str]:
    """The names that this process works on, in their order, each locked during its iteration of the loop.

    Any number of processes, started at any time, iterate over the same names. No name is worked on by two
    at once (the locks are NAME.lock in `folder`), or again once it is done; another process takes over
    that of one that died. Ends when all are done, by any process.
    """
    if storage.is_address(folder):
        yield from (
            name for name in names[parallel.process() :: parallel.num_processes()] if not is_done(name)
        )
        left = list(names)
        while left := [name for name in left if not is_done(name)]:
            time.sleep(_LOOK_EVERY)
        return
    pending = list(names)
    while pending:
        others = []
        for name in pending:
            with claim(folder / f"{name}.lock") as mine:
                if not mine:
                    others.append(name)
                elif not is_done(name):
                    yield name
        pending = others
        if pending:
            time.sleep(_LOOK_EVERY)


@contextlib.contextmanager
def claim(lock: AnyPath, *, wait: bool = False) -> Generator[bool]:
    """Yields whether this process holds `lock`; with `wait`, blocks until it does and logs that.

    In object stores, which have no locks, always True.

    Raises:
      NoLocks: the file system has none.
    """
    if storage.is_address(lock):
        yield True
        return
    with lock.open("a") as file:
        mine = _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if wait and not mine:
            logging.warning("waiting for another process, which holds %s", lock)
            mine = _lock(file, fcntl.LOCK_EX)
        yield mine
        if not mine:
            return
        # Whoever has opened it by now will hold a lock that no one else can see, and find the work done.
        lock.unlink(missing_ok=True)


def _lock(file: IO[str], operation: int) -> bool:
    try:
        fcntl.flock(file, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        raise NoLocks(
            f"{file.name} cannot be locked ({error.strerror}): several processes share a workdir by locks of "
            "files; name one on another file system, or a bucket"
        ) from error
    return True
