"""Killed against undisturbed: real processes, real signals, and weights compared bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import pytest

from advtransfer.models import load_model

ROOT = Path(__file__).parent.parent
NUM_STEPS = 40

CONFIG = """
from advtransfer import config as base

def get_config():
    config = base.default()
    config.stage = "source"
    config.train.dataset = "builtin:digits"
    config.train.image_size = 8
    config.train.norm, config.train.eps = "l2", 0.5
    config.train.attack_random_start = True
    config.train.augmentation.crop_padding = 1
    config.train.learning_rate = 0.05
    config.train.batch_size = 80
    config.train.num_epochs = 4
    config.train.save_every = 3
    config.train.log_every = 2
    config.evaluate.norm, config.evaluate.num_images = "none", 16
    return config
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts a source training in a workdir; compiled programs are kept for the next process."""
    folder = tmp_path_factory.mktemp("resume")
    (folder / "config.py").write_text(CONFIG)
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def run(workdir, **kwargs):
        return subprocess.Popen(
            [
                sys.executable,
                str(ROOT / "launch.py"),
                f"--config={folder / 'config.py'}",
                f"--workdir={workdir}",
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **kwargs,
        )

    return run


def _finish(process, *, code=0):
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == code, stderr[-2000:]
    return stderr


def _wait_until(condition, process, *, seconds=240):
    """Polls fast; False when the process ends first."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    return True


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    _finish(start(workdir))
    return workdir


def _saved_steps(workdir):
    folder = workdir / "checkpoints"
    return [int(p.name) for p in folder.iterdir() if p.name.isdigit()] if folder.exists() else []


def _is_saving(workdir):
    folder = workdir / "checkpoints"
    return folder.exists() and any("tmp" in p.name for p in folder.iterdir())


def _log(workdir):
    return [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]


def _assert_same(workdir, undisturbed):
    one, other = load_model(workdir / "model"), load_model(undisturbed / "model")
    chex.assert_trees_all_equal(one.variables, other.variables)
    # Steps that end a log interval differ where a run was stopped; those at saves do not.
    mine = {line["step"]: line for line in _log(workdir)}
    theirs = {line["step"]: line for line in _log(undisturbed)}
    assert [line["step"] for line in _log(workdir)] == sorted(mine)
    assert max(mine) == max(theirs) == NUM_STEPS
    assert mine[NUM_STEPS]["loss"] == theirs[NUM_STEPS]["loss"]


def test_sigkill_at_any_moment_and_the_same_command_again(start, undisturbed, tmp_path):
    """Before the first checkpoint, after one, during the saving of another, and shortly before the end."""
    moments = [
        lambda: (tmp_path / "log.jsonl").exists(),
        lambda: max(_saved_steps(tmp_path), default=0) >= 6,
        lambda: max(_saved_steps(tmp_path), default=0) >= 15 and _is_saving(tmp_path),
        lambda: max(_saved_steps(tmp_path), default=0) >= 33,
    ]
    reached = []
    for moment in moments:
        process = start(tmp_path)
        if _wait_until(moment, process):
            process.send_signal(signal.SIGKILL)
            process.communicate()
            reached.append(max(_saved_steps(tmp_path), default=0))
            assert not (tmp_path / "model").exists()
        else:
            _finish(process)
    assert len(reached) >= 3 and reached == sorted(reached), reached
    _finish(start(tmp_path))
    _assert_same(tmp_path, undisturbed)


def test_sigterm_saves_says_so_and_exits_in_time(start, undisturbed, tmp_path):
    process = start(tmp_path)
    assert _wait_until(lambda: max(_saved_steps(tmp_path), default=0) >= 9, process)
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)
    stderr = _finish(process, code=0)
    assert time.monotonic() - sent < 30
    last = max(_saved_steps(tmp_path))
    assert f"SIGTERM: saved at step {last} of {NUM_STEPS}; resume with the same command" in stderr
    _finish(start(tmp_path))
    _assert_same(tmp_path, undisturbed)


def test_a_finished_run_is_not_run_again(start, undisturbed):
    model = undisturbed / "model" / "model.json"
    before = model.stat().st_mtime_ns
    _finish(start(undisturbed))
    assert model.stat().st_mtime_ns == before
