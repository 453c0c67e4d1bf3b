"""Damages small genuine checkpoints in every way that a seed finds, and reads them.

python -m tests.fuzz_checkpoints --mutations=100000 --seed=0

A mutant may be refused with a `CheckpointError` of one line, or be read. Anything else is a failure: another
exception, more than 5 s, more than 512 MB, something in the tree that is not data, an array that is not what
its tensor said, a trace of code that ran (a file, an event of Python's audit hooks). `--only=I` repeats one.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from advtransfer.torch_checkpoint.convert import read_network
from advtransfer.torch_reader import CheckpointError, Stub, Tensor, numpy_type, open_checkpoint, open_file
from tests.damage_checkpoints import STRUCTURED, damage

FIXTURES = Path(__file__).parent / "fixtures"
SECONDS, MEGABYTES = 5, 512
DATA = (dict, list, tuple, str, int, float, complex, bool, type(None), bytes, Tensor)
EVENTS = (  # of Python's audit hooks: what no reader of data has reason to do
    *("compile", "exec", "import", "marshal.loads", "pickle.find_class", "code.__new__", "function.__new__"),
    *("os.", "shutil.", "subprocess.", "socket.", "ctypes.", "urllib.", "ftplib.", "smtplib.", "webbrowser."),
    *("pty.", "sqlite3.", "tempfile.", "sys.addaudithook", "sys.settrace"),
)


class Watch:
    """Records, while it is on, the events of Python that mean that code runs or that something is written."""

    def __init__(self):
        self.on, self.path, self.seen = False, "", []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        if event == "open":
            path, mode, _ = arguments
            if str(path) != self.path or mode not in ("r", "rb", None):
                self.seen.append(f"open {path} {mode}")
        elif event.startswith(EVENTS):
            self.seen.append(f"{event} {str(arguments)[:80]}")

    @contextlib.contextmanager
    def watching(self, path: Path):
        self.seen, self.path, self.on = [], str(path), True
        try:
            yield
        finally:
            self.on = False


class Hang(BaseException):
    """A mutant took too long."""


def _alarm(*_):
    raise Hang


class Seed(NamedTuple):
    """A genuine file."""

    name: str
    data: bytes
    kind: str  # zip, legacy, safetensors
    network: bool  # whether a network of the family is in it


def seeds(limit: int = 200_000) -> list[Seed]:
    found = []
    for path in sorted(FIXTURES.rglob("*")):
        data = path.read_bytes() if path.is_file() else b""
        if path.suffix not in (".pt", ".pth", ".ckpt", ".safetensors") or not 0 < len(data) <= limit:
            continue
        kind = "safetensors" if data[8:9] == b"{" else "zip" if data[:2] == b"PK" else "legacy"
        found.append(Seed(path.name, data, kind, path.parent.name != "checkpoints"))
    return found


def mutant(files: list[Seed], seed: int, index: int, canary: str) -> tuple[Seed, bytes]:
    """The file that mutant `index` of campaign `seed` began as, and what became of it."""
    rng = random.Random(f"{seed}/{index}")
    file, other = rng.choice(files), rng.choice(files).data
    if rng.random() < 0.4:
        return file, damage(file.data, rng, other)
    return file, STRUCTURED[file.kind](file.data, rng, other, canary)


def leaves(tree: object):
    """Everything in a tree that may contain itself, once each."""
    waiting, seen = [tree], set()
    while waiting:
        value = waiting.pop()
        if type(value) in (dict, list, tuple):
            if id(value) in seen:
                continue
            seen.add(id(value))
            waiting += [*value.keys(), *value.values()] if type(value) is dict else value
        yield value


def read_all(path: Path, network: bool) -> None:
    """Opens a checkpoint and reads every tensor in it; AssertionError if something is not as it should be."""
    with open_checkpoint(path) as contents:
        for value in leaves(contents.tree):
            assert type(value) in DATA or isinstance(value, Stub), f"{type(value)} in the tree"
            if isinstance(value, Tensor):
                with contextlib.suppress(CheckpointError):
                    array = value.read()
                    assert array.shape == value.shape and array.dtype == numpy_type(value.dtype)
                    assert array.flags.c_contiguous and array.dtype.isnative
    if network:
        with open_file(path) as file:
            read_network(file)


def attempt(path: Path, network: bool, watch: Watch, canary: Path) -> tuple[bool, str, float]:
    """Reads a mutant: whether it was refused, what is wrong with that ("": nothing), and the seconds."""
    refused, problem, start = False, "", time.perf_counter()
    try:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        with watch.watching(path):
            read_all(path, network)
    except CheckpointError as error:
        refused = True
        if not str(error).isprintable() or len(str(error)) > 1000:
            problem = "a message that is not one line"
    except (Exception, Hang) as error:
        problem = f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    seconds = time.perf_counter() - start
    if watch.seen or canary.exists():
        problem = f"code ran: {watch.seen[:3]}"
        canary.unlink(missing_ok=True)
    return refused, problem or (f"{seconds:.1f} s" if seconds > SECONDS else ""), seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutations", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    options = parser.parse_args()
    with contextlib.suppress(FileNotFoundError):  # Linux alone says how much there is
        size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (size + (MEGABYTES << 20),) * 2)
    base, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    files, watch, kinds, failures, refusals, slowest = seeds(), Watch(), Counter(), 0, 0, 0.0
    signal.signal(signal.SIGALRM, _alarm)
    with tempfile.TemporaryDirectory() as folder:
        path, canary = Path(folder) / "mutant.pt", Path(folder) / "canary"
        for file in files:  # what is imported at its first use is imported now
            path.write_bytes(file.data)
            with contextlib.suppress(CheckpointError):
                read_all(path, file.network)
        for index in range(options.mutations) if options.only is None else [options.only]:
            file, data = mutant(files, options.seed, index, str(canary))
            path.write_bytes(data)
            refused, problem, seconds = attempt(path, file.network, watch, canary)
            kinds[file.kind] += 1
            refusals += refused and not problem
            slowest = max(slowest, seconds)
            if problem:
                failures += 1
                print(f"--seed={options.seed} --only={index} ({file.name}): {problem}", flush=True)
    count, peak = kinds.total(), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1024
    print(
        f"{count:,} mutants ({', '.join(f'{n:,} {kind}' for kind, n in sorted(kinds.items()))}): "
        f"{refusals:,} refused, {count - refusals - failures:,} read, {failures} failures; "
        f"{time.perf_counter() - start:.0f} s, slowest {slowest:.2f} s, memory +{peak:.0f} MB"
    )
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
