"""Command line of advtransfer: `python launch.py --config=experiments/NAME.py[:ARG] --workdir=DIR`.

Without arguments it runs experiments/quickstart.py. Any key can be set: `--config.train.num_epochs=4`.
`--plan` says what would run, and stops. Exit codes: 0 done, or stopped by SIGTERM and resumable; 1 diverged;
2 the command or the config is wrong, and nothing was written.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from advtransfer import stages
from advtransfer.config import ConfigError
from advtransfer.train import DivergedError, Preempted

_QUICKSTART = Path(__file__).parent / "experiments" / "quickstart.py"
_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment: a file with get_config().")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the results; default: runs/ and the name of the experiment."
)
_PLAN = flags.DEFINE_bool("plan", False, "Say what would run, write nothing, stop.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        _stop(2, f"unknown argument {argv[1]!r}: every option is --NAME=VALUE")
    logging.set_verbosity(logging.WARNING)
    config = _config()
    experiment = Path(config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0])
    workdir = _WORKDIR.value or str(Path("runs") / experiment.stem)
    try:
        if _PLAN.value:
            print(stages.plan(config, workdir))
        else:
            stages.run(config, workdir)
    except ConfigError as error:
        _stop(2, str(error))
    except Preempted as stopped:
        _stop(0, f"{stopped}; resume with the same command")
    except DivergedError as error:
        _stop(1, str(error))


def _parse_flags(argv: list[str]) -> list[str]:
    """As absl parses them, but every mistake is one line and exit code 2."""
    # A default of the flag would be loaded, and its overrides checked, at import already.
    if not any(argument.split("=")[0].lstrip("-") == "config" for argument in argv[1:]):
        argv = [argv[0], f"--config={_QUICKSTART}", *argv[1:]]
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        _stop(2, str(error))
    except (AttributeError, KeyError) as error:
        cause = error.args[0]
        _stop(2, f"unknown key in --config.KEY: {getattr(cause, 'args', [cause])[0]}")


def _config() -> ConfigDict:
    """The config with its overrides; a file that could not be loaded says so when it is first used."""
    try:
        return _CONFIG.value.lock()
    except OSError as error:
        _stop(2, str(error))


def _stop(code: int, message: str) -> None:
    print(" ".join(message.split()), file=sys.stderr, flush=True)
    sys.exit(code)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
