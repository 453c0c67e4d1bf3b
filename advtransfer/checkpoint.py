"""Training state on disk, through Orbax: saved whole or not at all, restored bit for bit or not at all."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from advtransfer import parallel

_OVERHEAD = 2**20  # bytes that a checkpoint takes beside its arrays, at most


class UnreadableCheckpoints(ValueError):
    """There are checkpoints, and not one of them can be read."""


class SaveError(OSError):
    """A file of a run could not be written, because the disk is full, say."""


class Checkpoints:
    """The checkpoints of one training run: numbered states in one folder, the last `keep` of them.

    A state is a pytree of arrays without a device axis, the same on all processes: process 0 writes and reads
    it, and hands what it has read to the others. Orbax writes a temporary folder and renames it, so a process
    that dies while saving leaves the earlier checkpoints as they were. The SHA-256 of the state is stored
    with it, so that a damaged one is told.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2):
        self.folder = Path(folder).absolute()
        self._manager = None
        if not parallel.is_main_process():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                create=False,
                enable_async_checkpointing=False,
                cleanup_tmp_directories=True,
                multiprocessing_options=ocp.options.MultiprocessingOptions(
                    primary_host=0, active_processes={0}, barrier_sync_key_prefix="main"
                ),
            ),
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        if self._manager:
            self._manager.close()

    def latest(self) -> int | None:
        """The step of the newest checkpoint, None when there is none; only process 0 knows."""
        return self._manager.latest_step() if self._manager else None

    def save(self, step: int, state: Any) -> None:
        """Writes `state` as the checkpoint of `step`; process 0 returns when it is on disk.

        Raises:
          SaveError: it could not be written, because the disk is full, say; earlier ones are as they were.
        """
        if not self._manager:
            return
        state, last = jax.device_get(state), self.latest()
        try:
            _check_room(self.folder, state)
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), sha256=ocp.args.JsonSave(_digest(state))
                ),
                force=True,
            )
        except Exception as error:  # Orbax, TensorStore and the file system each raise their own
            kept = "no earlier one exists" if last is None else f"that of step {last} is as it was"
            raise SaveError(
                f"the checkpoint of step {step} in {self.folder} cannot be written ({_reason(error)}); {kept}"
            ) from error

    def restore(self, template: Any) -> Any | None:
        """The newest sound state, with the structure, shapes and types of `template`, on every process.

        A checkpoint that cannot be read, or is not what was written, is reported, the one before it used, and
        the damaged one deleted, so that training can save that step again.

        Returns:
          The state as host arrays, or None when no checkpoint exists.

        Raises:
          UnreadableCheckpoints: checkpoints exist and none is sound; they are left as they are.
        """
        template = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), template)
        state = self._newest(template) if self._manager else None
        if not parallel.from_main(np.bool_(state is not None)):
            return None
        return parallel.from_main(template if state is None else state)

    def _newest(self, template: Any) -> Any | None:
        problem = None
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                found = self._manager.restore(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardRestore(template), sha256=ocp.args.JsonRestore()
                    ),
                )
                if _digest(found.state) != found.sha256:
                    raise ValueError("its SHA-256 is not the one written with it")
            except Exception as error:  # Orbax, TensorStore and the file system each raise their own
                problem = _reason(error)
                logging.warning("checkpoint %d in %s is damaged (%s)", step, self.folder, problem)
            else:
                for damaged in steps[: steps.index(step)]:
                    self._manager.delete(damaged)
                if problem:
                    logging.warning("going on from checkpoint %d", step)
                return found.state
        if steps:
            raise UnreadableCheckpoints(
                f"none of the checkpoints in {self.folder} can be read ({problem}): delete the folder"
            )
        return None


def _check_room(folder: Path, state: Any) -> None:
    """Raises an OSError if disk, quota or limits leave no room; Orbax would say it in pages of traceback."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + _OVERHEAD
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, size)


def _digest(state: Any) -> str:
    """SHA-256 of every leaf's path, type, shape and bytes."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        array = np.ascontiguousarray(leaf)
        sha.update(f"{jax.tree_util.keystr(path)}{array.dtype}{np.shape(leaf)}".encode())
        sha.update(array)
    return sha.hexdigest()


def _reason(error: Exception) -> str:
    return (
        error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}".splitlines()[0]
    )
