"""A study that is started again: what is finished stays, what was killed, damaged or changed is run."""

# ruff: noqa: F811, tests take the imported fixtures by name

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_study import (
    DATASET,
    SOURCES,
    _grid,
    _models,
    _run,
    _trial,
    _without_seconds,
    grid_of,
    ran,  # noqa: F401, a fixture
    undisturbed,  # noqa: F401, a fixture
)

from advtransfer import study
from advtransfer.study import Grid, flatten, group, run_trials
from advtransfer.study import run as study_run
from advtransfer.transfer import Recipe

pytestmark = pytest.mark.usefixtures("unoptimised")

# --- what is run again ----------------------------------------------------------------------------


def test_finished_groups_are_never_run_again(tmp_path, ran):
    rows = _run(tmp_path)
    assert len(ran) == 4
    ran.clear()
    assert _run(tmp_path, group_size=2) == rows
    assert not ran


def test_changed_images_are_run_again(tmp_path, ran):
    """One pixel of one test image is another set, under the same name."""
    grid = Grid(num_train_images=(6,), num_unfrozen_blocks=(0,), num_seeds=2)
    images = DATASET.test.images.copy()
    images[-1, -1, -1, -1] ^= 1
    changed = DATASET._replace(test=DATASET.test._replace(images=images))
    for dataset, groups in ((DATASET, 2), (DATASET, 0), (changed, 2), (changed, 0), (DATASET, 0)):
        ran.clear()
        trials = flatten(grid_of(grid, Recipe(batch_size=5), lambda _: dataset))  # noqa: B023
        run_trials(trials, _models(), {dataset.digest("train", "test"): dataset}, tmp_path)
        assert len(ran) == groups


def test_more_seeds_run_only_the_new_ones(tmp_path, ran):
    _run(tmp_path)
    ran.clear()
    rows = _run(tmp_path, trials=_grid(num_seeds=5))
    assert [[t.seed for t in members] for members in ran] == [[3, 4]] * 4
    assert [(r["source"], r["seed"], r["epoch"]) for r in rows[:10]] == [
        ("natural", seed, epoch) for seed in range(5) for epoch in (1, 2)
    ]
    assert len(rows) == 2 * 4 * 5


def test_the_same_weights_under_two_names_are_one_trial(tmp_path, ran):
    """Rows come back under the name that is asked for, once each."""
    copy = SOURCES[0]._replace(name="copy")
    trials = [_trial(source=source, seed=seed) for source in (SOURCES[0], copy) for seed in range(2)]
    for _ in range(2):
        rows = run_trials(trials, _models(), {"": DATASET}, tmp_path)
        assert [r["source"] for r in rows] == ["natural"] * 4 + ["copy"] * 4
        assert [json.loads(r["config"])["source"]["name"] for r in rows] == [r["source"] for r in rows]
    assert len(ran) == 1


def test_a_trial_that_stands_in_two_files_counts_once(tmp_path, ran):
    """As two processes leave it that split the same trials differently."""
    rows = _run(tmp_path)
    other = tmp_path / "other"
    _run(other, trials=_grid(num_seeds=2))
    for path in other.glob("*.jsonl"):
        path.rename(tmp_path / path.name)
    assert len(list(tmp_path.glob("*.jsonl"))) == 8
    assert _run(tmp_path) == rows


def test_an_exception_in_a_group_loses_nothing_that_was_finished(tmp_path, ran, monkeypatch):
    finishing = study_run.run_group

    def failing(members, *args):
        if len(ran) == 1:
            raise RuntimeError("out of memory")
        return finishing(members, *args)

    monkeypatch.setattr(study_run, "run_group", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        _run(tmp_path)
    assert len(list(tmp_path.glob("*.jsonl"))) == 1
    monkeypatch.setattr(study_run, "run_group", finishing)
    rows = _run(tmp_path)
    assert len(ran) == 4 and sorted(ran) == sorted(group(_grid()))
    assert [r["trial_id"] for r in rows[::2]] == [t.identity() for t in _grid()]


def test_a_group_appears_under_its_name_only_when_it_is_whole(tmp_path, ran, monkeypatch):
    """A process that ends before the rename has finished nothing."""

    def fail(*_):
        raise OSError("no rename")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no rename"):
        patch.setattr(study_run.storage.os, "replace", fail)
        _run(tmp_path)
    assert not study.finished_rows(tmp_path)
    ran.clear()
    assert len(_run(tmp_path)) == 24
    assert len(ran) == 4


@pytest.mark.process
def test_a_killed_study_goes_on_where_it_was(tmp_path, undisturbed, monkeypatch):
    """SIGKILL to a real process in the middle of the study; its trials have the same identities as here."""
    root = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{root}:{root.parent}", "PYTHONHASHSEED": "1"}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # as here
    command = "import conftest, sys, test_study; test_study.run_and_stay(sys.argv[1])"
    process = subprocess.Popen([sys.executable, "-c", command, str(tmp_path)], env=environment)
    rows_folder = tmp_path / "rows"
    try:
        deadline = time.monotonic() + 120
        while not list(rows_folder.glob("*.jsonl")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (tmp_path / "identities.txt").read_text().split() == [t.identity() for t in _grid()]
    finished = {path: path.read_bytes() for path in rows_folder.glob("*.jsonl")}
    assert 1 <= len(finished) <= 3
    partial = rows_folder / "0123.partial7"
    partial.write_text('{"source": "natu')  # as a kill during a write leaves it

    groups, run_group = [], study_run.run_group
    monkeypatch.setattr(study_run, "run_group", lambda *args: groups.append(args[0]) or run_group(*args))
    rows = _run(rows_folder)
    assert len(groups) + len(finished) == 4
    left = {trial for members in groups for trial in members}
    assert {t.identity() for t in _grid() if t not in left} == {
        json.loads(line)["trial_id"] for content in finished.values() for line in content.splitlines()
    }
    assert all(path.read_bytes() == content for path, content in finished.items())
    assert _without_seconds(rows) == _without_seconds(undisturbed)
    assert partial.read_text() == '{"source": "natu'


# --- damaged files --------------------------------------------------------------------------------


def _torn(text):
    return text[: len(text) // 2]


def _without_last_line(text):
    return "".join(text.splitlines(keepends=True)[:-1])


@pytest.mark.parametrize(
    "damage",
    [
        _torn,
        _without_last_line,
        lambda text: text.replace('"trial_id"', '"trial"'),
        lambda text: "[1, 2]\n",
        lambda text: "\x00" * len(text),
    ],
)
def test_a_damaged_file_is_set_aside_and_its_group_run_again(tmp_path, ran, caplog, damage):
    rows = _run(tmp_path)
    victim = sorted(tmp_path.iterdir())[1]
    text = damage(victim.read_text())
    victim.write_text(text)
    ran.clear()

    finished = study.finished_rows(tmp_path)  # as --plan reads it: nothing is written
    assert len(finished) == 9 and victim.read_text() == text

    assert _run(tmp_path) == rows
    assert len(ran) == 1
    assert victim.with_suffix(".corrupt").read_text() == text
    assert len(list(tmp_path.glob("*.jsonl"))) == 4
    assert f"{victim} is damaged" in caplog.text

    ran.clear()
    caplog.clear()
    assert _run(tmp_path) == rows
    assert not ran and not caplog.text


def test_an_empty_file_is_no_finished_group(tmp_path, ran):
    rows = _run(tmp_path)
    sorted(tmp_path.iterdir())[0].write_text("")
    ran.clear()
    assert _run(tmp_path) == rows
    assert len(ran) == 1
