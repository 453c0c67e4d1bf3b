"""Whose a workdir is: what is not ours is left alone, and what is one run's is no other's."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from advtransfer import config as base
from advtransfer import storage, tasks
from advtransfer.checkpoint import Checkpoints, UnreadableCheckpoints
from advtransfer.config import STAGES, ConfigError, read
from advtransfer.models import Model, ModelSpec, create_module, init_variables, load_model, save_model
from advtransfer.source import train_source
from advtransfer.tasks import make_job
from advtransfer.tasks.source import load_source_data
from advtransfer.tasks.workdir import check_workdir, claimed

ROOT = Path(__file__).parent.parent
MEAN, STD = (0.5,) * 3, (0.25,) * 3


def make_model(norm="none", eps=0.0, seed=0):
    import jax

    module = create_module("resnet_tiny", num_classes=10, mean=MEAN, std=STD)
    spec = ModelSpec("resnet_tiny", 10, 8, MEAN, STD, norm, eps, tuple("0123456789"))
    return Model(module, init_variables(module, jax.random.key(seed), 8), spec)


def make_config(stage):
    config = base.default()
    config.stage = stage
    config.train.update(dataset="builtin:digits", image_size=8, batch_size=80, num_epochs=1)
    return config


def train(config, folder):
    """`train_source` of config.train."""
    options = read(config)
    return train_source(options.training, load_source_data(options), folder=folder)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["checkpoints/epoch90.pt", "report.html", "log.jsonl", "model/notes.txt"])
def test_a_folder_that_is_not_ours_is_refused(tmp_path, stage, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("years of work")
    with pytest.raises(
        ConfigError, match=rf"holds files that advtransfer did not write \({name.partition('/')[0]}\)"
    ):
        check_workdir(make_job(make_config(stage), tmp_path))
    assert files(tmp_path) == {name: b"years of work"}


def test_what_may_be_in_a_new_workdir(tmp_path):
    config = make_config("source")
    check_workdir(make_job(config, tmp_path / "new"))
    (tmp_path / ".DS_Store").write_bytes(b"")
    check_workdir(make_job(config, tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(make_job(config, tmp_path).settings))
    (tmp_path / "report.html").write_text("ours")
    check_workdir(make_job(config, tmp_path))


def test_every_stage_asks_before_it_computes(tmp_path, monkeypatch):
    """Of the stages that need a model, with a source of the kind that is refused."""
    save_model(make_model(), tmp_path / "model")
    before = files(tmp_path)
    config = make_config("transfer")
    config.source, config.transfer.target = str(tmp_path), "builtin:digits"
    config.transfer.update(num_train_images=20, batch_size=10, num_epochs=1, evaluate_epochs=(1,))
    for act in (tasks.plan, tasks.run):
        with pytest.raises(ConfigError, match="did not write"):
            act(config, tmp_path)
    assert files(tmp_path) == before


def test_a_workdir_is_one_run_s(tmp_path):
    refused = pytest.raises(ConfigError, match="is in use by another process")
    with claimed(tmp_path), refused, claimed(tmp_path):
        pass
    with claimed(tmp_path):
        pass
    assert not list(tmp_path.iterdir())
    with (tmp_path / ".lock").open("a") as file:  # left by a process that was killed
        fcntl.flock(file, fcntl.LOCK_EX)
        file.close()
        with claimed(tmp_path):
            pass


def test_checkpoints_are_one_run_s(tmp_path):
    state = {"x": np.arange(3.0)}
    Checkpoints(tmp_path, run="one").save(4, state)
    before = files(tmp_path)
    with pytest.raises(UnreadableCheckpoints, match=r"checkpoint 4 in .* is of another run"):
        Checkpoints(tmp_path, run="two").restore(state)
    assert files(tmp_path) == before
    np.testing.assert_array_equal(Checkpoints(tmp_path, run="one").restore(state)["x"], state["x"])
    about = json.loads((tmp_path / "4/checkpoint.json").read_text())
    del about["run"]  # as checkpoints were written before
    (tmp_path / "4/checkpoint.json").write_text(json.dumps(about))
    np.testing.assert_array_equal(Checkpoints(tmp_path, run="two").restore(state)["x"], state["x"])


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [("norm", "l2", "none"), ("architecture", "resnet18", "resnet_tiny"), ("image_size", 16, "8")],
)
def test_a_finished_source_of_another_kind_is_not_taken_for_this_one(tmp_path, key, value, found):
    save_model(make_model(), tmp_path / "model")
    config = make_config("source")
    config.train.architecture = "resnet_tiny"
    assert train(config, tmp_path).spec.norm == "none"
    config.train[key] = value
    config.train.eps = 0.5 * (key == "norm")
    with pytest.raises(
        ValueError, match=rf"model is a model of {key} {found}, and {key}={value} is asked for"
    ):
        train(config, tmp_path)


def test_a_file_is_written_whole_and_a_failure_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    storage.write(path, "old")
    used = []

    def fail(source, target):
        used.append(Path(source))
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        for _ in range(2):
            with pytest.raises(OSError, match="No space"):
                storage.write(path, "new")
    assert used[0] != used[1] and used[0].parent == tmp_path  # of one process, and of those of equal numbers
    assert files(tmp_path) == {"rows.jsonl": b"old"}


@pytest.mark.process
def test_a_kill_between_two_renames_loses_nothing(tmp_path):
    save_model(make_model(), tmp_path / "good")
    program = f"""
import os
from advtransfer.models import load_model, save_model
model, replace = load_model({str(tmp_path / "good")!r}), os.replace
def dies(*args):
    replace(*args)
    if str(args[0]).endswith("good"):
        os.kill(os.getpid(), 9)
os.replace = dies
save_model(model, {str(tmp_path / "good")!r}, overwrite=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=300
    )
    assert done.returncode == -9 and not (tmp_path / "good").exists()
    load_model(tmp_path / "good")
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


def test_what_was_put_aside_is_deleted_once_the_new_one_is_there(tmp_path):
    save_model(make_model(seed=1), tmp_path / "good")
    (tmp_path / "good").rename(tmp_path / ".good.0123.old")
    (tmp_path / ".good.0123.new").mkdir()
    save_model(make_model(seed=2), tmp_path / "good", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


def test_a_source_is_not_trained_among_files_of_others(tmp_path):
    (tmp_path / "log.jsonl").write_text("mine")
    with pytest.raises(ValueError, match=r"holds files that advtransfer did not write \(log.jsonl\)"):
        train(make_config("source"), tmp_path)
    assert files(tmp_path) == {"log.jsonl": b"mine"}
