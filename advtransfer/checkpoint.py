"""Training state on disk, through Orbax: saved whole or not at all, restored bit for bit or not at all."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jaxtyping import PyTree

from advtransfer import foreign, parallel, storage
from advtransfer.foreign import AnyPath
from advtransfer.storage import SaveError

_OVERHEAD = 2**20  # bytes that a checkpoint takes beside its arrays, at most
_WHOLE = "checkpoint.json"  # written last: an address without it is half an upload

Arrays = dict[str, np.ndarray]


class UnreadableCheckpoints(ValueError):
    """There are checkpoints, and not one of them can be read, or they are of another run."""


class _OtherRun(Exception):
    """A checkpoint that is another run's."""


class Checkpoints:
    """The checkpoints of one training run: numbered states in one folder, the last `keep` of them.

    A state is a pytree of arrays without a device axis, the same on all processes. Every process writes its
    share of the arrays as an Orbax tree `folder`/STEP/PROCESS, and reads all of them, so any number of
    processes and devices resumes what any other has left. They agree after every stage: what goes wrong
    at one ends the stage on all, and none is left waiting. A checkpoint exists once process 0 has written its
    `checkpoint.json`, the number of shares and the SHA-256 of the state, and has renamed its folder from
    STEP.tmp; in an object store the file itself says that the upload is complete. All methods are called
    by all processes, which share `folder`.
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int = 2, run: str = ""):
        """`run` says whose they are; those of another run are neither restored nor deleted."""
        self.folder, self._keep, self._run = storage.to_path(folder), keep, run
        if parallel.is_main_process():
            storage.make_folder(self.folder)
            for unfinished in list(self._unfinished()):
                storage.remove(unfinished)

    def latest(self) -> int | None:
        """The step of the newest checkpoint, None when there is none."""
        return max(self._steps(), default=None)

    def save(self, step: int, state: PyTree) -> None:
        """Writes `state` as the checkpoint of `step`; returns when it is there.

        Raises:
          SaveError: it could not be written, because the disk is full, say; earlier ones are as they were.
        """
        arrays, last = _named(jax.device_get(state)), self.latest()
        for stage in (self._prepare, self._write_share, self._finish):
            problem = None
            try:
                stage(step, arrays)
            except Exception as error:  # Orbax, TensorStore and the file system each raise their own
                problem = error
            if not parallel.everywhere(problem is None):
                said = storage.reason(problem) if problem else "another process says why"
                kept = "no earlier one exists" if last is None else f"that of step {last} is as it was"
                raise SaveError(
                    f"the checkpoint of step {step} in {self.folder} cannot be written ({said}); {kept}"
                ) from problem

    def restore(self, template: PyTree) -> PyTree | None:
        """The newest sound state, with the structure, shapes and types of `template`, on every process.

        A checkpoint that cannot be read, or is not what was written, is reported, the one before it used, and
        the damaged one deleted, so that training can save that step again. One process that cannot read it
        is enough for that.

        Returns:
          The state as host arrays, or None when no checkpoint exists.

        Raises:
          UnreadableCheckpoints: checkpoints exist and none is sound, or one is of another run; they are left
            as they are.
        """
        template = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), template)
        damaged = []
        for step in self._agreed_steps():
            arrays: Arrays = {}
            problem = None
            try:
                arrays = self._read(step, _named(template))
            except Exception as error:  # Orbax, TensorStore and the file system each raise their own
                problem = error
            if not parallel.everywhere(not isinstance(problem, _OtherRun)):
                raise UnreadableCheckpoints(
                    f"checkpoint {step} in {self.folder} is of another run, of another configuration: take "
                    "another folder, or delete these checkpoints"
                )
            if parallel.everywhere(problem is None):
                if parallel.is_main_process():
                    for other in damaged:
                        self._delete(other)
                if damaged:
                    logging.warning("going on from checkpoint %d", step)
                return jax.tree.unflatten(jax.tree.structure(template), arrays.values())
            said = storage.reason(problem) if problem else "another process cannot read it"
            logging.warning("checkpoint %d in %s is damaged (%s)", step, self.folder, said)
            damaged.append(step)
        if damaged:
            raise UnreadableCheckpoints(
                f"none of the checkpoints in {self.folder} can be read ({said}): delete the folder"
            )
        return None

    def _agreed_steps(self) -> Iterator[int]:
        """The steps that process 0 finds, the newest first, on all processes."""
        steps = sorted(self._steps(), reverse=True)
        while (step := int(parallel.from_main(np.int32(steps.pop(0) if steps else -1)))) >= 0:
            yield step

    def _steps(self) -> list[int]:
        unfinished = {path.name for path in self._unfinished()}
        return [int(p.name) for p in self._entries() if p.name.isdigit() and p.name not in unfinished]

    def _unfinished(self) -> Iterator[AnyPath]:
        """What a process that was killed while it saved or deleted has left."""
        remote = storage.is_address(self.folder)
        for path in self._entries():
            if not (path / _WHOLE).exists() if remote else path.name.endswith(".tmp"):
                yield path

    def _entries(self) -> list[AnyPath]:
        return list(self.folder.iterdir()) if self.folder.exists() else []

    def _place(self, step: int) -> AnyPath:
        """Where a checkpoint is being written."""
        return self.folder / (str(step) if storage.is_address(self.folder) else f"{step}.tmp")

    def _prepare(self, step: int, arrays: Arrays) -> None:
        if storage.is_address(self.folder):
            _check_room(Path(tempfile.gettempdir()), arrays)
        if parallel.is_main_process():
            if not storage.is_address(self.folder):
                _check_room(self.folder, arrays)
            self._delete(step)
            storage.make_folder(self._place(step))

    def _write_share(self, step: int, arrays: Arrays) -> None:
        share = _share(arrays, parallel.process(), parallel.num_processes())
        if share:
            storage.save_tree(self._place(step) / str(parallel.process()), share)

    def _finish(self, step: int, arrays: Arrays) -> None:
        if not parallel.is_main_process():
            return
        about = {"step": step, "shares": parallel.num_processes(), "sha256": _digest(arrays)}
        about["run"] = self._run
        storage.write(self._place(step) / _WHOLE, json.dumps(about) + "\n")
        if not storage.is_address(self.folder):
            os.replace(self._place(step), self.folder / str(step))
        for old in sorted(self._steps())[: -self._keep]:
            self._delete(old)

    def _delete(self, step: int) -> None:
        """Deletes a checkpoint, so that at no moment half of one could be taken for a whole one."""
        path, unfinished = self.folder / str(step), self._place(step)
        if storage.is_address(path):
            storage.remove(path / _WHOLE)
        storage.remove(unfinished)
        if not storage.is_address(path) and path.exists():
            storage.remove(path.replace(unfinished))

    def _read(self, step: int, template: Arrays) -> Arrays:
        """All shares of a checkpoint, whose SHA-256 must be the one that was written."""
        folder = self.folder / str(step)
        about = foreign.read_json(folder / _WHOLE)
        if about.get("run", self._run) != self._run:
            raise _OtherRun
        found: Arrays = {}
        for process in range(about["shares"]):
            share = _share(template, process, about["shares"])
            if share:
                found |= storage.load_tree(folder / str(process), share)
        arrays = {name: found[name] for name in template}
        if _digest(arrays) != about["sha256"]:
            raise ValueError("its SHA-256 is not the one written with it")
        return arrays


def _named(state: PyTree) -> Arrays:
    """The leaves of a state by their paths, in the order of the tree."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves}


def _share(arrays: Arrays, process: int, num_processes: int) -> Arrays:
    """What one of several processes writes: every array is one process's, each has about as many bytes."""
    by_size = sorted(arrays, key=lambda name: (-arrays[name].nbytes, name))
    return {name: arrays[name] for name in by_size[process::num_processes]}


def _check_room(folder: AnyPath, arrays: Arrays) -> None:
    """Raises an OSError if disk, quota or limits leave too little space: Orbax's own has many lines."""
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, sum(x.nbytes for x in arrays.values()) + _OVERHEAD)


def _digest(arrays: Arrays) -> str:
    """SHA-256 of every array's name, type, shape and bytes."""
    sha = hashlib.sha256()
    for name, array in arrays.items():
        sha.update(f"{name}{array.dtype}{array.shape}".encode())
        sha.update(np.ascontiguousarray(array).data)
    return sha.hexdigest()
