"""Command line of advtransfer: `advtransfer --config=EXPERIMENT[:ARG] --config.KEY=VALUE --workdir=DIR`.

In a checkout `python launch.py` is the same. EXPERIMENT is a name that `--list` prints, quickstart if none is
given; what has a slash or ends in .py is the path of a file with a get_config(). `--explain` lists all keys,
such as `--config.train.num_epochs=4`. `--plan` prints what would run, and stops; `--multihost` joins the
processes of a pod or cluster. Exit codes:
0 done, or stopped by SIGTERM; 1 diverged; 2 the command, the config or the workdir is wrong, and nothing was
written; 3 the disk is full, or another process is lost; 4 an unexpected error, whose traceback is in a
file; 130 interrupted by Ctrl-C. After 0, 3 and 130 the same command resumes.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import logging as standard_logging
import os
import re
import shlex
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn, TextIO

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from advtransfer import __version__, foreign, parallel, storage, tasks
from advtransfer.checkpoint import SaveError, UnreadableCheckpoints
from advtransfer.compilation import compile_clock
from advtransfer.config import ConfigError, check_keys, default, explain
from advtransfer.data import LostWorker
from advtransfer.train import DivergedError, Preempted

# Beside this file in an installed package, beside the package in a checkout.
_FOLDER = next(x / "experiments" for x in Path(__file__).parents[:2] if (x / "experiments").is_dir())
_EXPERIMENTS = {file.stem: file for file in sorted(_FOLDER.glob("*.py"))}
_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment: a name, or a file's path.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the results; default: runs/EXPERIMENT.")
_PLAN = flags.DEFINE_bool("plan", False, "Print what would run and what it would cost, then exit.")
_LIST = flags.DEFINE_bool("list", False, "List the experiments that come with advtransfer, then exit.")
_EXPLAIN = flags.DEFINE_bool(
    "explain", False, "List all config keys, with the values of this experiment, then exit."
)
_VERSION = flags.DEFINE_bool("version", False, "Print the version, then exit.")
_MULTIHOST = flags.DEFINE_bool("multihost", False, "Join the other processes of a pod or cluster first.")

DONE, DIVERGED, WRONG_INPUT, UNFINISHED, FAULT, INTERRUPTED = 0, 1, 2, 3, 4, 130


def run() -> None:
    """Runs the command in `sys.argv` and ends the process with one of the codes above."""
    _keep_streams()
    if {"--help", "-help", "-h"} & {*sys.argv[1:]}:
        print(f"{__doc__}\n{flags.FLAGS.module_help(__name__)}")  # absl's ends with code 1
        sys.exit(DONE)
    logging.set_verbosity(logging.ERROR)  # what is wrong with a config is reported below, in one line
    app.run(main, flags_parser=parse_flags)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        _stop(WRONG_INPUT, f"unknown argument {argv[1]!r}: every option is --NAME=VALUE")
    logging.set_verbosity(logging.WARNING)
    for asked, text in ((_LIST, _list), (_VERSION, lambda: __version__)):
        if asked.value:
            print(text())
            return
    experiment = Path(config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0])
    workdir = _WORKDIR.value or str(Path("runs") / experiment.stem)
    try:
        config = _config(_CONFIG.value, experiment)
        if _EXPLAIN.value:
            print(explain(config))
            return
        if _MULTIHOST.value:
            parallel.initialize()
        else:
            parallel.one_device_per_core()
        if _PLAN.value:
            print(tasks.plan(config, workdir))
        else:
            start = time.monotonic()
            with compile_clock() as compiled:
                tasks.run(config, workdir, command=_command())
            if parallel.is_main_process():
                print(f"{time.monotonic() - start:.0f} s, of which XLA compiled for {sum(compiled):.0f} s")
        sys.stdout.flush()
    except (ConfigError, UnreadableCheckpoints, parallel.NoCluster) as error:
        _stop(WRONG_INPUT, str(error))
    except Preempted as stopped:
        _stop(DONE, f"{stopped}; resume with the same command")
    except DivergedError as error:
        _stop(DIVERGED, str(error))
    except (SaveError, LostWorker) as error:
        _stop(UNFINISHED, f"{error}; resume with the same command")
    except KeyboardInterrupt:
        _stop(INTERRUPTED, "interrupted; resume with the same command")
    except Exception as error:
        _stop(FAULT, _fault(error, workdir))


def parse_flags(argv: list[str]) -> list[str]:
    """As absl parses them, but every mistake is one line and exit code 2."""
    try:
        # What stands in a --flagfile has to be among the arguments, where ml_collections looks for overrides.
        argv = [argv[0], *flags.FLAGS.read_flags_from_files(argv[1:], force_gnu=True)]
        # A default of the flag would be loaded, and its overrides checked, at import already.
        if not any(argument.split("=")[0].lstrip("-") == "config" for argument in argv[1:]):
            argv = [argv[0], "--config=quickstart", *argv[1:]]
        typed, sys.argv = sys.argv, argv
        try:
            argv = flags.FLAGS(argv)
            getattr(_CONFIG.value, "stage", None)  # a file that could not be loaded says so when it is used
        finally:
            sys.argv = typed
        return argv
    except flags.UnrecognizedFlagError as error:
        is_key = error.flagname.partition(".")[0] in default()
        _stop(WRONG_INPUT, _cause(error) + f": write --config.{error.flagname}=VALUE" * is_key)
    except Exception as error:  # absl's, ml_collections', or the experiment's own
        _stop(
            WRONG_INPUT, f"--config: {_cause(error)}" if not isinstance(error, flags.Error) else _cause(error)
        )


class _ExperimentParser(flags.ArgumentParser):
    """Reads `--config`: a path if it has a slash or ends in .py, otherwise an experiment's name."""

    def __init__(self, files: flags.ArgumentParser):
        self._files = files  # reads paths alone

    def parse(self, argument: str) -> Any:
        name, colon, settings = argument.partition(":")
        path = Path(name) if "/" in name or name.endswith(".py") else _EXPERIMENTS.get(name)
        if path and path.exists():
            return self._files.parse(f"{path}{colon}{settings}")
        near = difflib.get_close_matches(Path(name).stem, _EXPERIMENTS, 1)
        raise ValueError(
            f"there is no {'file' if path else 'experiment'} {name!r}"
            + "".join(f" (nearest: --config={x}{colon}{settings})" for x in near)
            + f"; the experiments that come with advtransfer are {', '.join(_EXPERIMENTS)}"
        )


flags.FLAGS["config"].parser = _ExperimentParser(flags.FLAGS["config"].parser)


def _list() -> str:
    """A line for each experiment: its name and the first line of its docstring."""
    docs = {name: str(ast.get_docstring(ast.parse(x.read_bytes()))) for name, x in _EXPERIMENTS.items()}
    width = max(map(len, docs))
    return "\n".join(f"{name:{width}}  {doc.splitlines()[0]}" for name, doc in docs.items())


def _command() -> str:
    """What a reader types to get the same results."""
    programs = {"launch.py": "python launch.py", "__main__.py": "python -m advtransfer"}
    return f"{programs.get(Path(sys.argv[0]).name, 'advtransfer')} {shlex.join(sys.argv[1:])}".strip()


def _config(config: Any, experiment: Path) -> ConfigDict:
    """What get_config() gave, with every key that there is.

    Raises:
      ConfigError: something else than a whole configuration.
    """
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"get_config() of {experiment} returns a {type(config).__name__}: let it change and return "
            "advtransfer.config.default()"
        )
    check_keys(config)
    return config.lock()


def _cause(error: Exception) -> str:
    """What went wrong, out of exceptions in exceptions and tracebacks in messages."""
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    text = f"no such key: {error.args[0]}" if isinstance(error, KeyError) else str(error).strip()
    return text.splitlines()[-1] if "Traceback" in text or "Attempted" in text else text


def _fault(error: Exception, workdir: str) -> str:
    """One line for an unexpected error, whose traceback is written to a file."""
    text = "".join(traceback.format_exception(error))
    name = f"fault-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    for folder in (workdir, tempfile.gettempdir()):
        try:
            path = storage.to_path(folder) / name
            if path.parent.exists():
                storage.write(path, text)
                break
        except Exception:  # such as a workdir that cannot be written to
            continue
    message = (str(error).strip() or "no message").splitlines()[0][:300]
    return f"unexpected error: {type(error).__name__}: {message}; the traceback is in {path}"


def _stop(code: int, message: str) -> NoReturn:
    print(" ".join(message.split()), file=sys.stderr, flush=True)
    sys.exit(code)


class _Stream:
    """A stream whose reader may go away: what is written to it then is dropped. A terminal obeys nothing that
    is written but a line anew and a line up, which progress bars write alone or first."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        anew = text[: text.startswith("\r")]
        shown = text if re.fullmatch("(\n|\x1b\\[A)*", text) else anew + foreign.printable(text[len(anew) :])
        try:
            return self._stream.write(shown)
        except (OSError, ValueError):
            return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _keep_streams() -> None:
    """No run ends because nobody reads what it prints, or because a terminal lacks a character."""
    for number in range(3):
        with contextlib.suppress(OSError):
            os.fstat(number)
            continue
        os.open(os.devnull, os.O_RDWR)  # it is closed: the next file to be opened would take its place
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115 (for the process's life)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, _Stream(stream))
    absl_handler = logging.get_absl_handler()
    absl_handler.python_handler.setStream(sys.stderr)  # it had the one before
    absl_handler.setFormatter(standard_logging.Formatter("%(levelname)s: %(message)s"))
    root = standard_logging.getLogger()
    for handler in [*root.handlers]:
        if type(handler) is standard_logging.StreamHandler:  # left by an import: messages would come twice
            root.removeHandler(handler)
