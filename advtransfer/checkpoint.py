"""Training state on disk, through Orbax: saved whole or not at all, restored bit for bit."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


class UnreadableCheckpoints(ValueError):
    """There are checkpoints, and not one of them can be read."""


class Checkpoints:
    """The checkpoints of one training run: numbered states in one folder, the last `keep` of them.

    A state is a pytree of arrays without a device axis. Orbax writes a temporary folder and renames it,
    so a process that dies while saving leaves the earlier checkpoints as they were.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2):
        self.folder = Path(folder).absolute()
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=True
            ),
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def latest(self) -> int | None:
        """The step of the newest checkpoint, None when there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Writes `state` as the checkpoint of `step`; returns when it is on disk."""
        self._manager.save(step, args=ocp.args.StandardSave(jax.device_get(state)), force=True)

    def restore(self, template: Any) -> Any | None:
        """The newest state that can be read, with the structure, shapes and types of `template`.

        A checkpoint that cannot be read is reported, the one before it used, and the unreadable one deleted,
        so that training can save that step again.

        Returns:
          The state as host arrays, or None when no checkpoint exists.

        Raises:
          UnreadableCheckpoints: checkpoints exist and none can be read; they are left as they are.
        """
        shapes = jax.eval_shape(lambda: template)
        problem = None
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                state = self._manager.restore(step, args=ocp.args.StandardRestore(shapes))
            except Exception as error:  # Orbax, TensorStore and the file system each raise their own
                problem = f"{type(error).__name__}: {error}".splitlines()[0]
                logging.warning("checkpoint %d in %s is unreadable (%s)", step, self.folder, problem)
            else:
                for unreadable in steps[: steps.index(step)]:
                    self._manager.delete(unreadable)
                return state
        if steps:
            raise UnreadableCheckpoints(
                f"none of the checkpoints in {self.folder} can be read ({problem}): delete the folder"
            )
        return None
