"""Command line of advtransfer: `python launch.py --config=experiments/NAME.py[:ARG] --workdir=DIR`.

Without arguments it runs experiments/quickstart.py. Any key can be set: `--config.train.num_epochs=4`.
`--plan` says what would run, and stops; `--multihost` joins the processes of a pod or cluster. Exit codes:
0 done, or stopped by SIGTERM; 1 diverged; 2 the command, the config or the workdir is wrong, and nothing was
written; 3 the disk is full, or another process is lost. After 0 and 3 the same command goes on.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from advtransfer import parallel, stages
from advtransfer.checkpoint import SaveError, UnreadableCheckpoints
from advtransfer.config import ConfigError
from advtransfer.data import LostWorker
from advtransfer.train import DivergedError, Preempted

_QUICKSTART = Path(__file__).parent / "experiments" / "quickstart.py"
_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment: a file with get_config().")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the results; default: runs/EXPERIMENT.")
_PLAN = flags.DEFINE_bool("plan", False, "Say what would run, write nothing, stop.")
_MULTIHOST = flags.DEFINE_bool("multihost", False, "Join the other processes of a pod or cluster first.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        _stop(2, f"unknown argument {argv[1]!r}: every option is --NAME=VALUE")
    logging.set_verbosity(logging.WARNING)
    config = _CONFIG.value
    experiment = Path(config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0])
    workdir = _WORKDIR.value or str(Path("runs") / experiment.stem)
    config.report.command = config.report.command or shlex.join(["python", "launch.py", *sys.argv[1:]])
    try:
        if _MULTIHOST.value:
            parallel.initialize()
        print(stages.plan(config, workdir)) if _PLAN.value else stages.run(config, workdir)
    except (ConfigError, UnreadableCheckpoints, parallel.NoCluster) as error:
        _stop(2, str(error))
    except Preempted as stopped:
        _stop(0, f"{stopped}; resume with the same command")
    except DivergedError as error:
        _stop(1, str(error))
    except (SaveError, LostWorker) as error:
        _stop(3, f"{error}; resume with the same command")


def _parse_flags(argv: list[str]) -> list[str]:
    """As absl parses them, but every mistake is one line and exit code 2."""
    # A default of the flag would be loaded, and its overrides checked, at import already.
    if not any(argument.split("=")[0].lstrip("-") == "config" for argument in argv[1:]):
        argv = [argv[0], f"--config={_QUICKSTART}", *argv[1:]]
    try:
        argv = flags.FLAGS(argv)
        _CONFIG.value.lock()  # a file that could not be loaded says so when it is first used
        return argv
    except Exception as error:  # absl's, ml_collections', or the experiment's own
        _stop(2, f"--config: {_cause(error)}" if not isinstance(error, flags.Error) else _cause(error))


def _cause(error: Exception) -> str:
    """What went wrong, out of exceptions in exceptions and tracebacks in messages."""
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    text = f"no such key: {error.args[0]}" if isinstance(error, KeyError) else str(error).strip()
    return text.splitlines()[-1] if "Traceback" in text or "Attempted" in text else text


def _stop(code: int, message: str) -> None:
    print(" ".join(message.split()), file=sys.stderr, flush=True)
    sys.exit(code)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
