"""Processes that are stopped at random moments, and what they leave, against undisturbed ones.

    python -m tests.faults --runs=100 [--seed=0] [--folder=DIR]

Every run takes a case in turn (a source in memory, one whose photographs stream, the same by two processes, a
transfer, a study), starts it one to three times and stops it, or one of its two processes, by SIGKILL or
SIGTERM at a random moment, then lets it finish, and compares the weights, the rows without their seconds and
the summary with those of an undisturbed run, bit for bit. The last line sums up; the exit code is 1 when
anything differed or a command failed.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import csv
import functools
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent

CONFIG = """
from advtransfer import config as base

def get_config(stage):
    config = base.default()
    config.stage, _, config.source = stage.partition(":")
    config.train.dataset = "builtin:digits"
    config.train.image_size = 8
    config.train.attack_random_start = True
    config.train.augmentation.crop_padding = 1
    config.train.learning_rate = 0.05
    config.train.batch_size = 80
    config.train.attack_steps = 1
    config.train.num_epochs = 2
    config.train.save_every = 3
    config.train.log_every = 2
    config.transfer.update(num_train_images=20, num_unfrozen_blocks=1, batch_size=10, num_epochs=3)
    config.transfer.evaluate_epochs = (1, 3)
    config.study.update(num_train_images=(10, 25), num_unfrozen_blocks=(0, 1), num_seeds=2)
    config.evaluate.dataset = "builtin:digits"
    config.evaluate.update(num_steps=1, num_images=16, batch_size=16)
    config.report.num_pictures = 2
    if config.stage == "stream":  # source training from the folder that stands behind the colon
        config.train.update(dataset=f"folder:{config.source}", loading="stream", num_workers=1)
        config.train.update(image_size=16, batch_size=16, num_epochs=4)
        config.train.augmentation.update(crop_padding=0, resized_crop=0.3)
        config.stage, config.source = "source", ""
    return config
"""

Start = Callable[..., subprocess.Popen]


def launcher(folder: Path) -> Start:
    """start(stage, workdir, *arguments, devices=2, environment=None, under=()): launch.py in a process of its
    own, by the command `under`, as mpirun.

    All processes share the compiled programs in `folder`, or where JAX_COMPILATION_CACHE_DIR says.
    """
    config = folder / "config.py"
    config.write_text(CONFIG)

    def start(stage, workdir, *arguments, devices=2, environment=None, under=(), **kwargs):
        settings = {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_COMPILATION_CACHE_DIR": os.environ.get(
                "JAX_COMPILATION_CACHE_DIR", str(folder / "compiled")
            ),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            # Most of the time would go into optimising programs that run for a second.
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        }
        launch = [
            *under,
            sys.executable,
            str(ROOT / "launch.py"),
            f"--config={config}:{stage}",
            f"--workdir={workdir}",
        ]
        return subprocess.Popen(
            [*launch, *arguments],
            env=os.environ | settings | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **kwargs,
        )

    return start


def together(start: Start, *arguments: object, number: int = 2, **kwargs: object) -> list[subprocess.Popen]:
    """So many processes of one run over loopback; `start` takes these arguments and an environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(number)}
    return [
        start(*arguments, "--multihost", environment=environment | {"JAX_PROCESS_ID": str(i)}, **kwargs)
        for i in range(number)
    ]


def draw_photographs(folder: Path) -> Path:
    """A folder of small JPEGs in two classes: 90 to train on, and 10 each to validate and to test."""
    rng = np.random.default_rng(0)
    for i in range(110):
        split = "train" if i < 90 else "val" if i < 100 else "test"
        path = folder / split / "ab"[i % 2] / f"{i:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 256, (4, 5, 3), np.uint8)
        Image.fromarray(coarse).resize((40, 32), Image.Resampling.BICUBIC).save(path)
    return folder


def finish(process: subprocess.Popen, *, code: int = 0) -> str:
    """What a process says on stderr, when it ends with this code."""
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == code, stderr[-2000:]
    return stderr


def finish_all(processes: list[subprocess.Popen]) -> list[str]:
    """`finish` of all; they must be read from together, as one of them waits for the other."""
    with concurrent.futures.ThreadPoolExecutor(len(processes)) as readers:
        return list(readers.map(finish, processes))


def wait_until(condition: Callable[[], bool], process: subprocess.Popen, *, seconds: float = 240) -> bool:
    """Polls fast; False when the process ends first."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    return True


def saved_steps(workdir: Path) -> list[int]:
    """Steps of the checkpoints in a workdir."""
    folder = workdir / "checkpoints"
    return [int(p.name) for p in folder.iterdir() if p.name.isdigit()] if folder.exists() else []


def is_saving(workdir: Path) -> bool:
    """Whether a checkpoint is being written in a workdir."""
    folder = workdir / "checkpoints"
    return folder.exists() and any("tmp" in p.name for p in folder.iterdir())


def results(workdir: Path) -> dict[str, object]:
    """Everything in a finished workdir that must not depend on how often it was stopped."""
    from advtransfer.models import load_model
    from advtransfer.models.bundle import digest

    found = {}
    for path in sorted(workdir.rglob("*")):
        name = str(path.relative_to(workdir))
        if path.name == "model.json":
            found[name] = digest(load_model(path.parent).variables)
        elif path.name == "rows.csv":
            with path.open() as file:
                found[name] = [
                    {k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)
                ]
        elif path.name == "evaluation.json":
            found[name] = json.loads(path.read_text())
        elif path.name == "summary.csv":
            found[name] = path.read_text()
    return found


def phase(workdir: Path, since: float) -> str:
    """What a process that was started at this time is doing, told from what it has written."""

    def written(path: Path) -> bool:
        return path.exists() and path.stat().st_mtime >= since

    if not written(workdir / "config.json"):
        return "starting"
    folders = [workdir, *(workdir / "sources").glob("*")]
    if any(is_saving(folder) for folder in folders):
        return "saving"
    if any((folder / "checkpoints").exists() for folder in folders):
        return "training"
    if written(workdir / "rows.csv"):
        return "reporting"
    return "fine-tuning" if (workdir / "rows").exists() else "compiling or measuring"


def disturb(
    start: Callable[[Path], list[subprocess.Popen]], workdir: Path, seconds: float, rng: random.Random
) -> list[str]:
    """Starts one to three times what takes `seconds` and stops one of its processes; by which signals, when.

    Raises:
      AssertionError: a process ended otherwise than by SIGKILL, by SIGTERM at once, with its line and exit
        code 0, or with 3 because another one was lost.
    """
    stops = []
    for _ in range(rng.randint(1, 3)):
        started, processes = time.time(), start(workdir)
        time.sleep(rng.uniform(0, seconds))
        number, victim = rng.choice((signal.SIGKILL, signal.SIGTERM)), rng.choice(processes)
        when = phase(workdir, started)
        if victim.poll() is None:
            stops.append(f"{number.name} {when}")
        victim.send_signal(number)
        output = {victim: victim.communicate(timeout=300)[1]}
        for process in processes:
            if process is not victim:
                if when == "starting" and victim.returncode:
                    process.kill()  # as launchers do; it would wait five minutes for the one that never came
                output[process] = process.communicate(timeout=300)[1]
        for process, stderr in output.items():
            expected = (-number, 0) if process is victim else (-signal.SIGKILL, 3, 0)
            if process.returncode not in expected:
                raise AssertionError(f"exit code {process.returncode} after {number.name}: {stderr[-1000:]}")
    return stops


def cases(folder: Path) -> dict[str, Callable[[Path], list[subprocess.Popen]]]:
    """What is disturbed, by name: a function that starts it in a workdir."""
    launch, photographs = launcher(folder), draw_photographs(folder / "photographs")

    def one(stage: str) -> Callable[[Path], list[subprocess.Popen]]:
        return lambda workdir: [launch(stage, workdir)]

    streamed = functools.partial(launch, f"stream:{photographs}", devices=1)
    return {
        "source": one("source"),
        "stream": one(f"stream:{photographs}"),
        "two processes": lambda workdir: together(streamed, workdir),
        "transfer": one(f"transfer:{folder}/undisturbed_source/model"),
        "study": one("study"),
    }


def campaign(runs: int, seed: int, folder: Path) -> int:
    """Runs the campaign in `folder`, says what happens, and returns the number of runs that failed."""
    began, rng, starts, expected = time.monotonic(), random.Random(seed), cases(folder), {}
    for case, start in starts.items():
        for name in ("undisturbed", "timed"):  # the first one compiles
            workdir, started = folder / f"{name}_{case.replace(' ', '_')}", time.monotonic()
            finish_all(start(workdir))
            expected[case] = time.monotonic() - started, results(workdir)
    stops, failed = collections.Counter(), 0
    for run, case in zip(range(runs), itertools.cycle(starts), strict=False):
        start, (seconds, undisturbed) = starts[case], expected[case]
        workdir = folder / f"run{run}"
        try:
            phases = disturb(start, workdir, seconds, rng)
            stops.update(f"{case}: {stop}" for stop in phases)
            finish_all(start(workdir))
            found = results(workdir)
            different = [name for name in undisturbed if found.get(name) != undisturbed[name]]
            assert found.keys() == undisturbed.keys() and not different, f"{different} differ"
            print(f"run {run}, {case}: {', '.join(phases) or 'not stopped'}: same", flush=True)
        except AssertionError as error:
            failed += 1
            print(f"run {run}, {case}, FAILED in {workdir}: {error}", flush=True)
    for name, number in sorted(stops.items()):
        print(f"{number:5} × {name}")
    minutes = (time.monotonic() - began) / 60
    print(
        f"{runs} runs, {sum(stops.values())} stops, {runs - failed} ended as undisturbed, {failed} failed, "
        f"{minutes:.1f} min"
    )
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Stops runs at random moments and compares what they leave.")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work; default: a new temporary folder")
    options = parser.parse_args()
    place = options.folder or Path(tempfile.mkdtemp(prefix="faults"))
    place.mkdir(parents=True, exist_ok=True)
    sys.exit(1 if campaign(options.runs, options.seed, place) else 0)
