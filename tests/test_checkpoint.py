"""Checkpoints of two real processes: both write and read them, and what goes wrong at one ends neither in
waiting."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

import chex
import numpy as np
import pytest

from advtransfer.checkpoint import Checkpoints, SaveError, _named, _share

ROOT = Path(__file__).parent.parent

SCRIPT = """
import sys
from pathlib import Path
from unittest import mock

from advtransfer import parallel

parallel.initialize(heartbeat_seconds=20)

from advtransfer import storage
from advtransfer.checkpoint import Checkpoints, SaveError
from advtransfer.config import ConfigError
from advtransfer.tasks import workdir
from test_checkpoint import state

def at_process_1(name, *errors):
    # The other process goes on, and must be notified.
    working = getattr(storage, name)
    broken = mock.Mock(side_effect=[*errors, *[mock.DEFAULT] * 9], wraps=working)
    return mock.patch.object(storage, name, broken if parallel.process() == 1 else working)

folder = Path(sys.argv[1])
checkpoints = Checkpoints(folder)
assert checkpoints.restore(state(0)) is None
for step in (1, 2):
    checkpoints.save(step, parallel.replicate(state(step)))
with at_process_1("save_tree", OSError(28, "No space left on device")):
    try:
        checkpoints.save(3, parallel.replicate(state(3)))
    except SaveError as error:
        print(error)
damage = OSError(5, "Input/output error")
with at_process_1("load_tree", damage, damage):
    try:
        checkpoints.restore(state(0))
    except ValueError as error:
        print(error)
assert checkpoints.latest() == 2
checkpoints.save(4, parallel.replicate(state(4)))
with at_process_1("load_tree", damage):
    print("fell back to", int(checkpoints.restore(state(0))["step"]))
workdir._check_shared(folder)
alone = folder / f"{parallel.process()}_alone"
alone.mkdir()
try:
    workdir._check_shared(alone, seconds=0.2)
except ConfigError as error:
    print(str(error).replace(str(alone), "DIR"))
"""

SIZES = {"w": (64, 32), "v": (32, 64), "b": (5,)}


def state(step):
    """A training state of its step: the same in every process."""
    rng = np.random.default_rng(step)
    arrays = {name: rng.normal(size=size).astype(np.float32) for name, size in SIZES.items()}
    return {"params": arrays, "step": np.int32(step)}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(the folder that two processes of two devices each have written, what they said)."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    settings = {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(folder)],
            env=os.environ | settings | {"JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    output = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], output
    return folder, [stdout.splitlines() for stdout, _ in output]


@pytest.mark.process
def test_one_process_reads_what_two_have_written(written):
    folder, _ = written
    checkpoints = Checkpoints(folder)
    assert checkpoints.latest() == 2
    chex.assert_trees_all_equal(checkpoints.restore(state(0)), state(2))
    shares = [sum(p.stat().st_size for p in (folder / "2" / str(i)).rglob("*")) for i in range(2)]
    assert min(shares) > 64 * 32 * 3  # neither leaves the arrays to the other


@pytest.mark.process
def test_a_failure_of_one_is_reported_by_both(written):
    _, output = written
    for lines, save, restore in zip(
        output,
        ("another process says why", "No space left on device"),
        ("another process cannot read it", "Input/output error"),
        strict=True,
    ):
        assert any(
            f"step 3 in {written[0]} cannot be written ({save}); that of step 2 is" in x for x in lines
        )
        assert any("none of the checkpoints" in line and restore in line for line in lines)
        assert "fell back to 2" in lines


@pytest.mark.process
def test_a_folder_of_each_process_s_own_is_refused_by_both(written):
    folder, output = written
    for lines in output:
        assert any("--workdir=DIR is not one folder: another process does not see" in line for line in lines)
    assert not [path for path in folder.rglob(".shared*")]


def test_every_array_is_in_one_process_s_share():
    arrays = _named(state(1))
    for number in (1, 2, 3, 7):
        names = [name for i in range(number) for name in _share(arrays, i, number)]
        assert sorted(names) == sorted(arrays)


def test_room_is_made_sure_of_before_anything_is_written(tmp_path, monkeypatch):
    """As many bytes as the arrays have, and one MiB, which Orbax never takes beside them."""
    asked, reserve, arrays = [], os.posix_fallocate, state(1)

    def fallocate(file, offset, size):
        asked.append((offset, size))
        reserve(file, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, arrays)
    assert asked == [(0, 4 * (2 * 64 * 32 + 5 + 1) + 2**20)]
    (folder,) = tmp_path.iterdir()
    assert sum(path.stat().st_size for path in folder.rglob("*")) <= asked[0][1]
    monkeypatch.setattr(os, "posix_fallocate", mock.Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(SaveError, match="No space left"):
        checkpoints.save(2, arrays)
    assert list(tmp_path.iterdir()) == [folder]
