"""What each stage does with a config and a workdir: the rooms put together, in the order that work flows.

Every stage is a module with `run(config, workdir)` and `plan(config, workdir)`, and can be killed and
started again.
"""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from advtransfer.config import validate
from advtransfer.source import compute_dtype
from advtransfer.stages import evaluate, report, source, study, transfer

STAGES = {
    "source": source,
    "transfer": transfer,
    "study": study,
    "evaluate": evaluate,
    "report": report,
}


def run(config: ConfigDict, workdir: str | Path) -> None:
    """Runs config.stage. What is wrong with the config is said before anything is written.

    Raises:
      ConfigError: a bad value, or a workdir that holds another config's results.
      Preempted: SIGTERM came during training; the state is saved.
      DivergedError: a loss or a weight is no longer a number.
    """
    config = _resolve(config)
    STAGES[config.stage].run(config, Path(workdir))


def plan(config: ConfigDict, workdir: str | Path) -> str:
    """What `run` would do, as text; writes nothing.

    Raises:
      ConfigError: as `run`.
    """
    config = _resolve(config)
    return STAGES[config.stage].plan(config, Path(workdir))


def _resolve(config: ConfigDict) -> ConfigDict:
    """A valid copy with the compute type spelt out: a workdir goes on in the type that it began with."""
    validate(config)
    resolved = config.copy_and_resolve_references()
    resolved.dtype = compute_dtype(config.dtype).name
    return resolved
