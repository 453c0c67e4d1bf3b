"""Processes that are stopped at random moments, and what they leave, against undisturbed ones.

    python -m tests.faults --runs=100 [--seed=0] [--folder=DIR]

Every run takes a stage (source, transfer, study in turn), starts it one to three times and stops it by
SIGKILL or SIGTERM at a random moment, then lets it finish, and compares the weights, the rows without their
seconds and the summary with those of an undisturbed run, bit for bit. The last line sums up; the exit code
is 1 when anything differed or a command failed.
"""

from __future__ import annotations

import argparse
import collections
import csv
import functools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

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
    return config
"""

Start = Callable[..., subprocess.Popen]


def launcher(folder: Path) -> Start:
    """start(stage, workdir, *arguments, devices=2, environment=None): launch.py in a process of its own.

    All processes share the compiled programs that lie in `folder`.
    """
    config = folder / "config.py"
    config.write_text(CONFIG)

    def start(stage, workdir, *arguments, devices=2, environment=None, **kwargs):
        settings = {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            # Most of the time would go into optimising programs that run for a second.
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        }
        launch = [
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


def finish(process: subprocess.Popen, *, code: int = 0) -> str:
    """What a process says on stderr, when it ends with this code."""
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == code, stderr[-2000:]
    return stderr


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
    start: Callable[[Path], subprocess.Popen], workdir: Path, seconds: float, rng: random.Random
) -> list[str]:
    """Starts one to three times what takes `seconds` and stops it; by which signals, in which phases.

    Raises:
      AssertionError: SIGTERM ended it otherwise than at once, or with its line and exit code 0.
    """
    stops = []
    for _ in range(rng.randint(1, 3)):
        started, process = time.time(), start(workdir)
        time.sleep(rng.uniform(0, seconds))
        number = rng.choice((signal.SIGKILL, signal.SIGTERM))
        if process.poll() is None:
            stops.append(f"{number.name} {phase(workdir, started)}")
        process.send_signal(number)
        _, stderr = process.communicate(timeout=300)
        if process.returncode not in (-number, 0):
            raise AssertionError(f"exit code {process.returncode} after {number.name}: {stderr[-1000:]}")
    return stops


def campaign(runs: int, seed: int, folder: Path) -> int:
    """Runs the campaign in `folder`, says what happens, and returns the number of runs that failed."""
    began, rng, start = time.monotonic(), random.Random(seed), launcher(folder)
    stages, expected = ["source", f"transfer:{folder}/undisturbed_source/model", "study"], {}
    for stage in stages:
        for name in ("undisturbed", "timed"):  # the first one compiles
            workdir, started = folder / f"{name}_{stage.partition(':')[0]}", time.monotonic()
            finish(start(stage, workdir))
            expected[stage] = time.monotonic() - started, results(workdir)
    stops, failed = collections.Counter(), 0
    for run in range(runs):
        stage = stages[run % len(stages)]
        seconds, undisturbed = expected[stage]
        workdir = folder / f"run{run}"
        try:
            phases = disturb(functools.partial(start, stage), workdir, seconds, rng)
            stops.update(f"{stage.partition(':')[0]}: {stop}" for stop in phases)
            finish(start(stage, workdir))
            found = results(workdir)
            different = [name for name in undisturbed if found.get(name) != undisturbed[name]]
            assert found.keys() == undisturbed.keys() and not different, f"{different} differ"
            print(f"run {run}: {', '.join(phases) or 'not stopped'}: same", flush=True)
        except AssertionError as error:
            failed += 1
            print(f"run {run} FAILED in {workdir}: {error}", flush=True)
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
