"""Several processes on one study: no group twice, none missed, whoever is killed."""

import collections
import contextlib
import inspect
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from test_study import METRICS, _trial

from advtransfer.study import finished_rows, history_rows, run_trials
from advtransfer.study import run as study_run
from advtransfer.study.claims import claim, divide


def grid():
    """24 groups of two seeds."""
    return [_trial(num_train_images=n, seed=seed) for n in range(6, 30) for seed in range(2)]


def work(folder):
    """What each process does: the study of `grid`, whose groups take a moment and are noted in a journal."""
    folder = Path(folder)

    def run_group(members, *_):
        name = f"{members[0].num_train_images}"
        _note(folder, f"begin {name} {os.getpid()}")
        time.sleep(0.1)
        _note(folder, f"end {name} {os.getpid()}")
        return [row for t in members for row in history_rows(t, dict.fromkeys(METRICS, np.ones(2)), 1.0)]

    study_run.run_group = run_group
    study_run._prepare = lambda *_: None
    trials = grid()
    unchecked = inspect.unwrap(run_trials)  # neither models nor images are needed
    rows = unchecked(trials, {"d0": None}, {"": None}, folder / "rows")
    assert [row["trial_id"] for row in rows[::2]] == [t.identity() for t in trials]


def _note(folder, line):
    with (folder / "journal").open("a") as file:  # one small write: lines of two processes do not mix
        file.write(line + "\n")


def _start(folder):
    root = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{root}:{root.parent}"}
    command = "import conftest, sys, test_study_processes as t; t.work(sys.argv[1])"
    return subprocess.Popen([sys.executable, "-c", command, str(folder)], env=environment)


@pytest.mark.process
def test_four_processes_share_a_study_and_survive_kills(tmp_path):
    workers = [_start(tmp_path) for _ in range(4)]
    journal, rng = tmp_path / "journal", random.Random(0)
    killed = []
    for _ in range(2):
        seen = len(journal.read_text().splitlines()) if journal.exists() else 0
        while not journal.exists() or len(journal.read_text().splitlines()) < seen + 6:
            assert all(worker.poll() in (None, 0) for worker in workers)
            time.sleep(0.01)
        victim = workers.pop(rng.randrange(len(workers)))
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        killed.append(str(victim.pid))
        workers.append(_start(tmp_path))
    assert [worker.wait(timeout=120) for worker in workers] == [0] * 4

    begun, ended = collections.Counter(), collections.Counter()
    running = {}
    for line in journal.read_text().splitlines():
        what, name, pid = line.split()
        if what == "begin":
            begun[name] += 1
            # Whoever had it before has died.
            assert running.get(name) in (None, *killed), line
            running[name] = pid
        else:
            ended[name] += 1
            running.pop(name)
    assert set(ended) == {str(t.num_train_images) for t in grid()}
    # A process may be killed between the end of its work and the rename: that group is done once more.
    again = [name for name in begun if begun[name] > 1]
    assert len(again) <= len(killed) and max(ended.values()) <= 2
    rows = finished_rows(tmp_path / "rows")
    assert sorted(rows) == sorted(t.identity() for t in grid())


def test_a_claim_is_one_holders_and_ends_with_it(tmp_path):
    lock = tmp_path / "a.lock"
    with claim(lock) as mine, claim(lock) as other:
        assert mine and not other
    assert not lock.exists()
    try:
        with claim(lock):
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    with claim(lock) as mine:
        assert mine


def test_what_is_done_is_not_handed_out(tmp_path):
    done = {"b"}
    own = []
    for name in divide(["a", "b", "c"], tmp_path, done.__contains__):
        own.append(name)
        done.add(name)
    assert own == ["a", "c"]


def test_what_another_holds_comes_last_and_is_waited_for(tmp_path, monkeypatch):
    with contextlib.ExitStack() as other:
        assert other.enter_context(claim(tmp_path / "b.lock"))
        slept = []
        monkeypatch.setattr("time.sleep", lambda _: (slept.append(1), other.close()))
        assert list(divide("abc", tmp_path, lambda _: False)) == ["a", "c", "b"]
        assert len(slept) == 1


def test_at_an_address_the_processes_number_decides(monkeypatch):
    """There are no locks in an object store."""
    monkeypatch.setattr("advtransfer.parallel.process", lambda: 1)
    monkeypatch.setattr("advtransfer.parallel.num_processes", lambda: 2)
    done = {"c"}

    def others(_):
        done.update("ae")  # finish while this one waits

    monkeypatch.setattr("time.sleep", others)
    own = []
    for name in divide(["a", "b", "c", "d", "e", "f"], epath.Path("gs://bucket/rows"), done.__contains__):
        own.append(name)
        done.add(name)
    assert own == ["b", "d", "f"] and done == set("abcdef")
