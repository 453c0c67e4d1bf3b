"""Faults put into the package one at a time, and whether the tests notice.

    python -m tests.mutate --seed=0 --count=60 [--package=attacks] [--folder=DIR] [--jobs=1]

Draws `count` mutants of `advtransfer/` (mutations.py) and runs, in a copy of the tree and until one fails,
the unmarked tests that can notice, of the nearest and quickest files first; on what they leave, the marked
ones (process, sweep). The exit code is 1 when a mutant survived.

Which test file enters which function is measured once for each version of the package and of that file,
under coverage. A mutant in a function is tried on the files that enter it and on those that start processes,
into which coverage cannot see; no other file can notice. One outside functions, or in a function that runs
while the package is imported, is tried on all files.

DIR (runs/mutants) keeps the measurements, compiled programs and `results-SEED.jsonl`. The same command goes
on where it stopped. What is drawn depends on the package alone: after any change of the tree the survivors
are tried again, and what was caught stays caught as long as the same mutant (file, place, texts) is drawn.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import hashlib
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import coverage
import psutil

from tests.mutations import Mutation, draw, mutated, package_of

ROOT = Path(__file__).parent.parent
TIERS = {"unmarked": "not process and not sweep", "marked": "process or sweep"}
MEMORY = 12 << 30  # bytes; a mutant that takes more is caught
OWN = ("tests/mutate.py", "tests/mutations.py", "tests/test_mutate.py")  # they notice nothing
IMPORT_ALL = """
import importlib, pkgutil, advtransfer
for module in pkgutil.walk_packages(advtransfer.__path__, "advtransfer."):
    importlib.import_module(module.name)
"""


class Place(NamedTuple):
    """A copy of the tree, with folders of its own for what its tests leave."""

    tree: Path
    left: Path
    compiled: Path


def tree_files(root: Path) -> list[str]:
    """The files of the working tree that git would keep."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    found = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    return sorted(name for name in found.split("\0") if name and (root / name).is_file())


def digest(root: Path, files: Iterable[str]) -> str:
    return hashlib.sha256(repr([(name, (root / name).read_bytes()) for name in files]).encode()).hexdigest()


def copy_tree(root: Path, to: Path, compiled: Path) -> Place:
    for name in tree_files(root):
        (to / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, to / "tree" / name)
    return Place(to / "tree", to / "left", compiled)


class Run(NamedTuple):
    """How a process failed ("": not), in which test, after how long, and what it printed."""

    failure: str
    test: str
    seconds: float
    output: str


def run(place: Place, command: list[str], limit: float) -> Run:
    """Runs Python on the copy of the tree, for at most `limit` seconds, with nothing left of earlier ones."""
    shutil.rmtree(place.left, ignore_errors=True)
    (place.left / "tmp").mkdir(parents=True)
    for folder in list(place.tree.rglob("__pycache__")):  # good for any file of the same size and second
        shutil.rmtree(folder)
    environment = os.environ | {
        "PYTHONPATH": str(place.tree),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TMPDIR": str(place.left / "tmp"),
        "XDG_CACHE_HOME": str(place.left / "cache"),  # datasets that a mutant draws are for no other
        "JAX_COMPILATION_CACHE_DIR": str(place.compiled),
        "MPLCONFIGDIR": str(place.compiled / "matplotlib"),
    }
    started, failure = time.monotonic(), ""
    with (place.left / "output").open("w+") as output:
        streams = {"stdout": output, "stderr": output, "start_new_session": True}
        process = subprocess.Popen([sys.executable, *command], cwd=place.tree, env=environment, **streams)
        try:
            while process.poll() is None and not failure:
                time.sleep(0.2)
                late = time.monotonic() - started > limit
                failure = "timeout" if late else "memory" if _memory(process.pid) > MEMORY else ""
        finally:
            with contextlib.suppress(ProcessLookupError):  # whatever the tests have started goes too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        printed = output.read()
    code = process.returncode
    failure = failure or ("" if code in (0, 5) else f"crash ({-code})" if code < 0 else "test")  # 5: no tests
    named = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", printed, re.MULTILINE)
    return Run(failure, named[1] if named else "", time.monotonic() - started, printed)


def _memory(pid: int) -> int:
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        return sum(p.memory_info().rss for p in (process, *process.children(recursive=True)))
    return 0


def pytest(tier: str, files: list[str]) -> list[str]:
    """The command that runs a tier's tests in these files until the first failure."""
    return ["-m", "pytest", "-x", "-n", "0", "-p", "no:cacheprovider", "-m", TIERS[tier], *files]


def measure(root: Path, places: list[Place], folder: Path, tier: str, files: list[str]) -> dict[str, dict]:
    """Of every file and of "import": its seconds, whether other tests of it are marked, lines that it runs.

    A process of its own for each: what one file leaves in memory would hide functions from the next. As many
    run at once as there are places.

    Raises:
      SystemExit: the tests fail as they are.
    """
    common = [f for f in tree_files(root) if not re.match(r"tests/test_\w+\.py$|.*\.md$", f) and f not in OWN]
    path = folder / f"reached-{tier}-{digest(root, common)[:16]}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    names = {file: f"{file} {digest(root, [file])[:16]}" for file in files} | {"import": "import"}
    missing = [file for file, name in names.items() if name not in known]
    if {*missing} - {"import"}:
        print(f"measuring {len({*missing} - {'import'})} files of {tier} tests", flush=True)
    free = queue.SimpleQueue()
    for place in places:
        free.put(place)

    def reach(file: str) -> dict:
        place = free.get()
        try:
            return _reach(place, tier, file)
        finally:
            free.put(place)

    with concurrent.futures.ThreadPoolExecutor(len(places)) as pool:
        for file, reached in zip(missing, pool.map(reach, missing), strict=True):
            known[names[file]] = reached
            path.write_text(json.dumps(known))
    return {file: known[name] for file, name in names.items()}


def _reach(place: Place, tier: str, file: str) -> dict:
    script, data = place.tree.parent / "import_all.py", place.tree.parent / "coverage"
    script.write_text(IMPORT_ALL)
    command = [str(script)] if file == "import" else pytest(tier, [file])
    recorded = ["-m", "coverage", "run", f"--data-file={data}", "--source=advtransfer", *command]
    measured = run(place, recorded, float("inf"))
    if measured.failure:
        raise SystemExit(f"{measured.output[-3000:]}\n{file} fails without a mutant")
    lines = coverage.CoverageData(str(data))
    lines.read()
    found = {str(Path(f).relative_to(place.tree)): sorted(lines.lines(f)) for f in lines.measured_files()}
    if file == "import" and not found:
        raise SystemExit(f"the package is not imported from {place.tree}")
    marked = re.search(r"\d deselected", measured.output) is not None
    return {"seconds": measured.seconds, "marked": marked, "lines": found}


def order(mutation: Mutation, root: Path, measured: dict[str, dict]) -> list[str]:
    """The test files that can notice a mutant: those that enter its function (or module) first."""
    stem, low, high = Path(mutation.file).stem, *(mutation.body or (1, 10**9))
    texts = {file: (root / file).read_text() for file in measured.keys() - {"import"}}
    imported = {file: {*lines} for file, lines in measured["import"]["lines"].items()}

    def entered(file: str) -> dict[str, set[int]]:
        """Lines that importing the package does not run, by file."""
        left = {f: {*lines} - imported.get(f, set()) for f, lines in measured[file]["lines"].items()}
        return {f: lines for f, lines in left.items() if lines}

    def enters(lines: Iterable[int]) -> bool:
        return any(low <= line <= high for line in lines)

    def is_near(file: str) -> bool:
        """Whether a file is about the module, by its name or what it imports."""
        if {stem, package_of(mutation)} & {*Path(file).stem.split("_")}:
            return True
        return re.search(rf"^(from|import) advtransfer.*\b{stem}\b", texts[file], re.MULTILINE) is not None

    def cost(file: str) -> float:
        """Seconds; a file that is about the module is worth ten times its time."""
        return measured[file]["seconds"] * (0.1 if is_near(file) else 1)

    def starts_processes(file: str) -> bool:
        if re.search(r"\b(subprocess|faults|multiprocessing)\b", texts[file]):
            return True
        module = "".join((root / name).read_text() for name in entered(file))
        return re.search(r"^import (subprocess|multiprocessing)$", module, re.MULTILINE) is not None

    everywhere = mutation.body is None or enters(imported.get(mutation.file, ()))
    files = sorted(sorted(texts), key=cost)
    first = [
        file
        for file in files
        if file == f"tests/test_{mutation.kind}s.py"
        or enters(entered(file).get(mutation.file, ()))
        or (everywhere and is_near(file))
    ]
    return first + [file for file in files if file not in first and (everywhere or starts_processes(file))]


class Result(NamedTuple):
    """What became of a mutant: caught by the tests of a tier, or by none ("")."""

    tier: str
    failure: str
    test: str
    seconds: float


def judge(mutation: Mutation, root: Path, place: Place, tier: str, measured: dict[str, dict]) -> Result:
    """Tries one mutant on one tier: three files, as a process takes seconds to start, then the rest."""
    source, seconds = (root / mutation.file).read_text(), 0.0
    noticing = order(mutation, root, measured)
    for group in (noticing[:3], noticing[3:]):
        if group:
            (place.tree / mutation.file).write_text(mutated(source, mutation))
            limit = 60 + 5 * sum(measured[file]["seconds"] for file in group)
            tried = run(place, pytest(tier, group), limit)
            (place.tree / mutation.file).write_text(source)
            seconds += tried.seconds
            if tried.failure:
                return Result(tier, tried.failure, tried.test, round(seconds, 1))
    return Result("", "", "", round(seconds, 1))


def describe(mutation: Mutation, tier: str, result: Result) -> str:
    caught = f"caught {tier} {result.test or result.failure}" if result.tier else f"NOT CAUGHT {tier}"
    short = [" ".join(text.split())[:60] for text in (mutation.original, mutation.replacement)]
    what = f"{mutation.kind}: {short[0]!r} -> {short[1]!r}"
    return f"{caught}  {result.seconds:.0f} s  {mutation.file}:{mutation.line} {what}"


def difference(root: Path, mutation: Mutation) -> str:
    """Where, the first line as it is, and as it becomes."""
    source = (root / mutation.file).read_text()
    old, new = (text.splitlines()[mutation.line - 1] for text in (source, mutated(source, mutation)))
    return f"{mutation.file}:{mutation.line} {mutation.kind}\n- {old.strip()}\n+ {new.strip()}"


def table(results: dict[Mutation, Result]) -> str:
    lines = [f"{'':20} {'drawn':>8} {'unmarked':>8} {'marked':>8} {'survived':>8}"]
    for name in (package_of, lambda mutation: mutation.kind, lambda _: "all"):
        counts = Counter()
        for mutation, result in results.items():
            counts.update([(name(mutation), "drawn"), (name(mutation), result.tier)])
        for row in sorted({row for row, _ in counts}):
            lines.append(f"{row:20}" + "".join(f" {counts[row, tier]:8}" for tier in ("drawn", *TIERS, "")))
        lines.append("")
    return "\n".join(lines)


def _judge_all(
    mutations: list[Mutation], root: Path, places: list[Place], tier: str, measured: dict[str, dict]
) -> Iterator[tuple[Mutation, Result]]:
    """Each mutant with its result, as they are done: as many at a time as there are places."""
    free = queue.SimpleQueue()
    for place in places:
        free.put(place)

    def task(mutation: Mutation) -> tuple[Mutation, Result]:
        place = free.get()
        try:
            return mutation, judge(mutation, root, place, tier, measured)
        finally:
            free.put(place)

    with concurrent.futures.ThreadPoolExecutor(len(places)) as pool:
        futures = [pool.submit(task, mutation) for mutation in mutations]
        try:
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def campaign(
    root: Path,
    folder: Path,
    seed: int,
    count: int,
    package: str = "",
    tests: str = "test_*.py",
    jobs: int = 1,
) -> int:
    """Tries the mutants that are not done yet, says what became of all, and returns how many survived."""
    folder.mkdir(parents=True, exist_ok=True)
    path, version = (
        folder / f"results-{seed}.jsonl",
        digest(root, [f for f in tree_files(root) if f not in OWN]),
    )
    files = sorted(str(p.relative_to(root)) for p in (root / "tests").glob(tests))
    files, drawn = [file for file in files if file not in OWN], draw(root, seed, count, package)
    done = {}  # by mutant and tier
    for line in path.read_text().splitlines() if path.exists() else ():
        *mutant, asked, tier, result = json.loads(line)
        if result[0] or asked == [version, tests]:
            done[(*mutant, tier)] = Result(*result)
    results = {}
    with tempfile.TemporaryDirectory(prefix="mutants") as work, path.open("a") as kept:
        copies = [
            copy_tree(root, Path(work, str(i)).resolve(), folder.resolve() / "compiled") for i in range(jobs)
        ]
        for tier in TIERS:
            left = [mutation for mutation in drawn if mutation not in results or not results[mutation].tier]
            results |= {m: done[(*m[:-1], tier)] for m in left if (*m[:-1], tier) in done}
            asked = [mutation for mutation in left if (*mutation[:-1], tier) not in done]
            if not asked and tier != "unmarked":
                continue
            measured = measure(root, copies, folder, tier, files)
            files = [file for file in files if measured[file]["marked"]]  # of the next tier
            for mutation, result in _judge_all(asked, root, copies, tier, measured):
                results[mutation] = result
                kept.write(json.dumps([*mutation[:-1], [version, tests], tier, result]) + "\n")
                kept.flush()
                print(describe(mutation, tier, result), flush=True)
    print(table(results))
    survivors = [mutation for mutation, result in results.items() if not result.tier]
    print(*(difference(root, mutation) for mutation in survivors), sep="\n\n")
    return len(survivors)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Puts faults into the package and runs the tests on them.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument(
        "--package", default="", help="a sub-package or a module beside them; default: all in turn"
    )
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "runs/mutants", help="of measurements and results"
    )
    parser.add_argument("--tests", default="test_*.py", help="the test files to use, in tests/")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time, each in a copy of its own")
    options = vars(parser.parse_args())
    sys.exit(1 if campaign(ROOT, **options) else 0)
