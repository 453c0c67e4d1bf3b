"""What each stage of the command line does: the configuration becomes values, the packages compute, files are
written.

Every task is a module with `run(job)` and `plan(job)`, and can be killed and started again.
"""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

from ml_collections import ConfigDict

from advtransfer import config as configuration
from advtransfer import parallel, storage
from advtransfer.checkpoint import SaveError
from advtransfer.compilation import keep_programs
from advtransfer.config import ConfigError
from advtransfer.data.cache import cache_folder
from advtransfer.models import compute_dtype
from advtransfer.study import NoLocks
from advtransfer.tasks import evaluate, export, importing, interpret, predict, report, source, study, transfer
from advtransfer.tasks.missing import check_datasets, missing_lines
from advtransfer.tasks.workdir import Job
from advtransfer.train import on_sigterm, stop_on_sigterm

TASKS = {
    "source": source,
    "import": importing,
    "transfer": transfer,
    "study": study,
    "evaluate": evaluate,
    "predict": predict,
    "export": export,
    "interpret": interpret,
    "report": report,
}

_OVER_PROCESSES = ("source", "study", "evaluate")


def run(config: ConfigDict, workdir: str | Path, *, command: str = "") -> None:
    """Runs config.stage. What is wrong with the config is reported before anything is written.

    Args:
      config: of `advtransfer.config.default()`.
      workdir: the folder of its results.
      command: what a reader types to get them again, for the report.

    Raises:
      ConfigError: a bad value, a dataset that is not there, or a workdir that holds another config's results.
      Preempted: SIGTERM came; the state of a source training is saved.
      DivergedError: a loss or a weight is no longer a number.
      SaveError: the disk is full, or the object store refuses; what was written before is whole.
    """
    job = make_job(config, workdir, command)
    try:
        check_datasets(job.options)
        if job.options.run.keep_programs:
            keep_programs(cache_folder(job.options.run.cache_dir) / "programs")
        with on_sigterm(stop_on_sigterm):
            TASKS[job.options.run.stage].run(job)
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
    job = make_job(config, workdir)
    return "\n".join([TASKS[job.options.run.stage].plan(job), *missing_lines(job.options)])


def make_job(config: ConfigDict, workdir: str | Path, command: str = "") -> Job:
    """Values of the configuration, with the compute type spelled out: a workdir goes on in the type that it
    began with."""
    resolved = config.copy_and_resolve_references()
    options = configuration.read(resolved)
    resolved.dtype = compute_dtype(options.run.dtype).name
    options = options._replace(run=replace(options.run, dtype=resolved.dtype))
    if parallel.num_processes() > 1 and options.run.stage not in _OVER_PROCESSES:
        raise ConfigError(
            f"config.stage={options.run.stage} runs in one process: leave --multihost away and start one "
            "process"
        )
    try:
        return Job(options, resolved.to_dict(), storage.to_path(workdir), command)
    except ValueError as error:
        raise ConfigError(f"--workdir={error}") from error
