"""What each stage does with a config and a workdir: the rooms put together, in the order that work flows.

Every stage is a module with `run(config, workdir)` and `plan(config, workdir)`, and can be killed and
started again.
"""

from __future__ import annotations

import errno
from pathlib import Path

from ml_collections import ConfigDict

from advtransfer import parallel, storage
from advtransfer.checkpoint import SaveError
from advtransfer.config import ConfigError, validate
from advtransfer.source import compute_dtype
from advtransfer.stages import evaluate, importing, interpret, report, source, study, transfer
from advtransfer.stages.missing import check_datasets, missing_lines
from advtransfer.study import NoLocks
from advtransfer.train import on_sigterm, stop_on_sigterm

STAGES = {
    "source": source,
    "import": importing,
    "transfer": transfer,
    "study": study,
    "evaluate": evaluate,
    "interpret": interpret,
    "report": report,
}

_OVER_PROCESSES = ("source", "study", "evaluate")


def run(config: ConfigDict, workdir: str | Path) -> None:
    """Runs config.stage. What is wrong with the config is said before anything is written.

    Raises:
      ConfigError: a bad value, a dataset that is not there, or a workdir that holds another config's results.
      Preempted: SIGTERM came; the state of a source training is saved.
      DivergedError: a loss or a weight is no longer a number.
      SaveError: the disk is full, or the object store refuses; what was written before is whole.
    """
    config, workdir = _resolve(config), _folder(workdir)
    try:
        check_datasets(config)
        with on_sigterm(stop_on_sigterm):
            STAGES[config.stage].run(config, workdir)
    except NoLocks as error:
        raise ConfigError(f"--workdir={workdir}: {error}") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise SaveError(str(error)) from error
        raise
    parallel.barrier("done")


def plan(config: ConfigDict, workdir: str | Path) -> str:
    """What `run` would do, as text, and what it needs that is not here. Nothing is downloaded or written.

    Raises:
      ConfigError: as `run`, but for sets that are not prepared only if their sizes are unknown.
    """
    config, workdir = _resolve(config), _folder(workdir)
    text = STAGES[config.stage].plan(config, workdir)
    return "\n".join([text, *missing_lines(config)])


def _resolve(config: ConfigDict) -> ConfigDict:
    """A valid copy with the compute type spelt out: a workdir goes on in the type that it began with."""
    validate(config)
    if parallel.num_processes() > 1 and config.stage not in _OVER_PROCESSES:
        raise ConfigError(
            f"config.stage={config.stage} runs in one process: leave --multihost away and start one process"
        )
    resolved = config.copy_and_resolve_references()
    resolved.dtype = compute_dtype(config.dtype).name
    return resolved


def _folder(workdir: str | Path) -> Path:
    try:
        return storage.to_path(workdir)
    except ValueError as error:
        raise ConfigError(f"--workdir={error}") from error
