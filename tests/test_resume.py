"""Killed against undisturbed: real processes, real signals, and weights compared bit for bit."""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import time

import chex
import numpy as np
import pytest
from faults import finish, is_saving, launcher, results, saved_steps, wait_until

from advtransfer.checkpoint import Checkpoints, SaveError
from advtransfer.models import load_model

RECIPE = (
    "--config.train.num_epochs=4",
    "--config.train.norm=l2",
    "--config.train.eps=0.5",
    "--config.train.attack_steps=3",
    "--config.evaluate.norm=none",
)
NUM_STEPS = 40


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    return launcher(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def start(launch):
    """start(workdir, *arguments): a source training by RECIPE."""
    return lambda workdir, *arguments: launch("source", workdir, *RECIPE, *arguments)


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    finish(start(workdir))
    return workdir


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


@pytest.mark.process
def test_sigkill_and_the_same_command_again(start, undisturbed, tmp_path):
    """Before the first checkpoint, and during the saving of a later one; `tests.faults` takes any moment."""
    moments = [
        lambda: (tmp_path / "log.jsonl").exists(),
        lambda: max(saved_steps(tmp_path), default=0) >= 9 and is_saving(tmp_path),
    ]
    reached = []
    for moment in moments:
        process = start(tmp_path)
        assert wait_until(moment, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        reached.append(max(saved_steps(tmp_path), default=0))
        assert not (tmp_path / "model").exists()
    assert reached[0] < reached[1] < NUM_STEPS
    finish(start(tmp_path))
    _assert_same(tmp_path, undisturbed)


@pytest.mark.process
def test_sigterm_saves_says_so_and_exits_in_time(start, undisturbed, tmp_path):
    process = start(tmp_path)
    assert wait_until(lambda: max(saved_steps(tmp_path), default=0) >= 9, process)
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)
    stderr = finish(process, code=0)
    assert time.monotonic() - sent < 30
    last = max(saved_steps(tmp_path))
    assert f"SIGTERM: saved at step {last} of {NUM_STEPS}; resume with the same command" in stderr
    finish(start(tmp_path))
    _assert_same(tmp_path, undisturbed)


@pytest.mark.process
def test_a_finished_run_is_not_run_again(start, undisturbed):
    model = undisturbed / "model" / "model.json"
    before = model.stat().st_mtime_ns
    finish(start(undisturbed))
    assert model.stat().st_mtime_ns == before


@pytest.mark.process
def test_a_diverged_training_ends_with_its_own_code(start, tmp_path):
    last = finish(start(tmp_path, "--config.train.learning_rate=1e38"), code=1).splitlines()[-1]
    assert "the loss became NaN or infinite at step " in last and "no checkpoint was saved" in last
    assert not (tmp_path / "model").exists()


# --- stages that do not save on the way -------------------------------------------------------------


@pytest.mark.process
@pytest.mark.parametrize("stage", ["transfer", "study"])
def test_sigterm_says_so_and_the_same_command_again(launch, undisturbed, stage, tmp_path):
    model = f"{undisturbed}/model"
    arguments = {
        "transfer": (f"transfer:{model}",),
        "study": ("study", f"--config.study.sources={model}", "--config.study.num_unfrozen_blocks=(0,)"),
    }[stage]
    name, *overrides = arguments
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    process = launch(name, stopped, *overrides)
    assert wait_until((stopped / "config.json").exists, process)
    process.send_signal(signal.SIGTERM)
    assert "SIGTERM: what was finished is saved; resume with the same command" in finish(process)
    assert not (stopped / "rows.csv").exists()
    for workdir in (whole, stopped):
        finish(launch(name, workdir, *overrides))
    assert results(stopped) == results(whole)


# --- disks ----------------------------------------------------------------------------------------


@pytest.mark.process
def test_a_full_disk_stops_the_run_and_leaves_the_old_checkpoint(start, undisturbed, tmp_path):
    """A limit on the size of files, set while the process runs, is to it as a disk that has become full."""
    process = start(tmp_path)
    assert wait_until(lambda: max(saved_steps(tmp_path), default=0) >= 9, process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    stderr = finish(process, code=3)
    last = stderr.splitlines()[-1]
    assert "cannot be written" in last and "Traceback" not in stderr
    assert f"that of step {max(saved_steps(tmp_path))} is as it was; resume with the same command" in last
    finish(start(tmp_path))
    _assert_same(tmp_path, undisturbed)


def test_a_mount_without_space_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    mount = ["mount", "-t", "tmpfs", "-o", "size=3M", "tmpfs", str(tmp_path)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        states = [{"w": np.random.default_rng(step).normal(size=10_000)} for step in (1, 2)]
        checkpoints = Checkpoints(tmp_path / "checkpoints")
        checkpoints.save(1, states[0])
        with (tmp_path / "filler").open("wb") as file, contextlib.suppress(OSError):
            file.write(bytes(2**22))
        with (
            monkeypatch.context() as patch,
            pytest.raises(SaveError, match="step 2 .*No space left on device.*step 1 is as it was"),
        ):
            patch.setattr(checkpoints, "_write_share", lambda *_: pytest.fail("it began to write"))
            checkpoints.save(2, states[1])
        (tmp_path / "filler").unlink()
        checkpoints = Checkpoints(tmp_path / "checkpoints")
        chex.assert_trees_all_equal(checkpoints.restore(states[1]), states[0])
        checkpoints.save(2, states[1])
        assert checkpoints.latest() == 2
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_flipped_bit_anywhere_is_found_and_the_checkpoint_before_used(tmp_path, caplog):
    """Whatever comes back is the state of one of the two steps, bit for bit."""
    states = [{"w": np.random.default_rng(step).normal(size=(64, 64))} for step in (1, 2)]
    checkpoints = Checkpoints(tmp_path / "whole")
    for step, state in enumerate(states, start=1):
        checkpoints.save(step, state)
    fallen_back = 0
    for path in [p for p in sorted((tmp_path / "whole" / "2").rglob("*")) if p.is_file()]:
        for part in (1 / 3, 1 / 2, 2 / 3):
            shutil.copytree(tmp_path / "whole", tmp_path / "copy")
            damaged = tmp_path / "copy" / path.relative_to(tmp_path / "whole")
            content = bytearray(path.read_bytes())
            content[int(len(content) * part)] ^= 1
            damaged.write_bytes(content)
            caplog.clear()
            checkpoints = Checkpoints(tmp_path / "copy")
            restored = checkpoints.restore(states[0])
            fell_back = "checkpoint 2" in caplog.text and "going on from checkpoint 1" in caplog.text
            chex.assert_trees_all_equal(restored, states[0 if fell_back else 1])
            fallen_back += fell_back
            shutil.rmtree(tmp_path / "copy")
    assert fallen_back >= 3
