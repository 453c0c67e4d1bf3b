"""Workdirs in buckets, written and read by the real clients, in object stores that run on this machine."""

import csv
import importlib.util
import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from faults import finish, launcher, wait_until

from advtransfer import storage, tasks
from advtransfer.checkpoint import Checkpoints, SaveError
from advtransfer.config import ConfigError, default
from advtransfer.models import Model, ModelSpec, create_module, init_variables, load_model, save_model

pytestmark = pytest.mark.process

SERVERS = {
    "s3": ("s3fs", "moto", ["-m", "moto.server", "-p"]),
    "gs": ("gcsfs", "gcp_storage_emulator", [str(Path(__file__).with_name("gcs_server.py"))]),
}


def _environment(scheme, port):
    url = f"http://127.0.0.1:{port}"
    if scheme == "gs":
        return {"STORAGE_EMULATOR_HOST": url}
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    return keys | {"AWS_ENDPOINT_URL": url}


@pytest.fixture(scope="module", params=SERVERS)
def store(request):
    """An empty bucket's address, in an object store that runs on this machine."""
    client, server, command = SERVERS[request.param]
    missing = [package for package in (client, server) if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"{request.param}:// is not tested here: {', '.join(missing)} not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, *command, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    environment = _environment(request.param, port)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        assert wait_until(lambda: _answers(port), process)
        bucket = storage.to_path(f"{request.param}://bucket")
        system, place = storage.fsspec.url_to_fs(str(bucket))
        system.mkdir(place)
        yield bucket
    process.kill()
    process.wait()


def _answers(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def _states(number):
    return [{"w": np.random.default_rng(i).normal(size=(64, 64)), "b": np.float32(i)} for i in range(number)]


def test_checkpoints_in_a_bucket(store):
    states = _states(4)
    checkpoints = Checkpoints(store / "run")
    assert checkpoints.restore(states[0]) is None
    for step in (1, 2, 3):
        checkpoints.save(step, states[step])
    assert checkpoints.latest() == 3
    assert sorted(p.name for p in (store / "run").iterdir()) == ["2", "3"]
    chex.assert_trees_all_equal(Checkpoints(store / "run").restore(states[0]), states[3])


def test_a_flipped_bit_in_a_bucket_falls_back(store, caplog):
    states = _states(3)
    checkpoints = Checkpoints(store / "flipped")
    for step in (1, 2):
        checkpoints.save(step, states[step])
    client, place = storage.fsspec.url_to_fs(str(store / "flipped" / "2"))
    largest = max(client.find(place), key=client.size)
    content = bytearray(client.cat_file(largest))
    content[len(content) // 2] ^= 1
    client.pipe_file(largest, bytes(content))
    chex.assert_trees_all_equal(checkpoints.restore(states[0]), states[1])
    assert "checkpoint 2" in caplog.text and "going on from checkpoint 1" in caplog.text
    assert checkpoints.latest() == 1


@pytest.mark.parametrize("content", [b"", b"\r", b"\n", b"\r\n", b"a\n\nb\r", bytes(range(256))])
def test_every_byte_of_a_file_arrives(store, content, tmp_path):
    """Otherwise the tests of this file would be of the emulator."""
    (tmp_path / "file").write_bytes(content)
    storage.upload(tmp_path, store / "bytes")
    assert (store / "bytes" / "file").read_bytes() == content
    storage.write(store / "bytes" / "other", content)
    assert (store / "bytes" / "other").read_bytes() == content


@pytest.mark.parametrize("sent", [0, 1, 3])
def test_half_an_upload_is_no_checkpoint(store, sent, monkeypatch):
    """What a process leaves that dies after so many objects."""
    states, folder = _states(3), store / f"half{sent}"
    Checkpoints(folder).save(1, states[1])
    client, _ = storage.fsspec.url_to_fs(str(folder))
    put_file, calls = client.put_file, []

    def dies(*args, **kwargs):
        calls.append(args)
        if len(calls) > sent:
            raise ConnectionError("gone")
        return put_file(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(client, "put_file", dies)
        with pytest.raises(SaveError, match="step 2 .*gone.*that of step 1 is as it was"):
            Checkpoints(folder).save(2, states[2])
    assert (folder / "2").exists() == (sent > 0)
    checkpoints = Checkpoints(folder)
    assert checkpoints.latest() == 1 and not (folder / "2").exists()
    chex.assert_trees_all_equal(checkpoints.restore(states[0]), states[1])
    checkpoints.save(2, states[2])
    chex.assert_trees_all_equal(checkpoints.restore(states[0]), states[2])


def test_models_in_a_bucket(store, monkeypatch):
    module = create_module("resnet_tiny", num_classes=3)
    variables = init_variables(module, jax.random.key(0), 16)
    spec = ModelSpec("resnet_tiny", 3, 16, module.mean, module.std)
    model, folder = Model(module, variables, spec), store / "models" / "one"
    save_model(model, folder)
    for name in (folder, str(folder)):
        chex.assert_trees_all_equal(load_model(name).variables, variables)
    with pytest.raises(ValueError, match="exists already.*overwrite=True"):
        save_model(model, folder)
    save_model(
        model._replace(spec=spec.__class__(**{**vars(spec), "norm": "l2", "eps": 1.0})),
        folder,
        overwrite=True,
    )
    assert load_model(folder).spec.eps == 1.0
    storage.remove(folder / "model.json")  # as a killed process leaves it
    with pytest.raises(ValueError, match="is not a model folder: it has no model.json$"):
        load_model(folder)
    save_model(model, folder)
    chex.assert_trees_all_equal(load_model(folder).variables, variables)
    storage.write(store / "thesis" / "text", "years of work")
    with pytest.raises(ValueError, match="not a model folder, so it is not overwritten"):
        save_model(model, store / "thesis", overwrite=True)
    assert (store / "thesis" / "text").read_text() == "years of work"


def _one_line(message, workdir):
    with pytest.raises(ConfigError, match=message) as error:
        tasks.plan(default(), workdir)
    assert "\n" not in str(error.value)


def test_a_bucket_that_cannot_be_written_is_one_line(store):
    scheme = str(store).partition(":")[0]
    _one_line(f"--workdir={scheme}://elsewhere/run cannot be written: ", f"{scheme}://elsewhere/run")
    config = default()
    config.update(stage="report", rows=str(store / "nothing"))
    with pytest.raises(ConfigError, match="config.rows: .*nothing: no such file or folder"):
        tasks.plan(config, str(store / "run"))
    config.update(stage="report", rows=f"{scheme}://elsewhere/rows")
    with pytest.raises(ConfigError, match="config.rows: "):
        tasks.plan(config, str(store / "run"))


@pytest.mark.parametrize("name", ["http://host/run", "s3://", "gs:///"])
def test_what_is_no_address_is_one_line(name):
    _one_line("an address is gs://BUCKET/PATH or s3://BUCKET/PATH", name)


@pytest.mark.parametrize(("scheme", "package"), [("gs", "gcsfs"), ("s3", "s3fs")])
def test_a_missing_package_names_its_command(scheme, package, monkeypatch):
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda _: None)
    _one_line(f"pip install {package}", f"{scheme}://bucket/run")


# --- launch.py ------------------------------------------------------------------------------------

RECIPE = ("--config.train.num_epochs=2", "--config.evaluate.norm=none")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return launcher(tmp_path_factory.mktemp("storage"))


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    finish(start("source", workdir, *RECIPE))
    return workdir


@pytest.mark.parametrize("store", ["gs"], indirect=True)
def test_a_training_in_a_bucket_is_killed_and_goes_on(store, start, undisturbed):
    workdir = store / "training"
    process = start("source", workdir, *RECIPE)
    assert wait_until(lambda: (workdir / "checkpoints" / "6" / "checkpoint.json").exists(), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (workdir / "model").exists()
    assert "going on" not in finish(start("source", workdir, *RECIPE))
    chex.assert_trees_all_equal(load_model(workdir).variables, load_model(undisturbed / "model").variables)
    assert not (workdir / "checkpoints").exists()
    lines = [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps)) and steps[-1] == 20 and min(steps) <= 3
    (events,) = workdir.glob("events.out.tfevents.*")
    assert len(events.read_bytes()) > 1000
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    assert evaluation == json.loads((undisturbed / "evaluation.json").read_text())


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_a_study_in_a_bucket_is_that_of_a_folder(store, start, undisturbed, tmp_path):
    """From a source named by address, to a report from rows named by address."""
    save_model(load_model(undisturbed), store / "source" / "model")
    small = ("--config.study.num_unfrozen_blocks=(0,)", "--config.study.group_size=1")
    for workdir, source in ((store / "study", store / "source"), (tmp_path, undisturbed / "model")):
        process = start("study", workdir, f"--config.study.sources={source}", *small)
        if workdir is not tmp_path:
            assert wait_until(lambda: (store / "study" / "rows").exists(), process)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            process = start("study", workdir, f"--config.study.sources={source}", *small)
        finish(process)
    mine, other = (_accuracies(workdir / "rows.csv") for workdir in (store / "study", tmp_path))
    assert mine == other and len(mine) == 8
    finish(start("report", store / "report", f"--config.rows={store}/study/rows"))
    for name in ("study", "report"):
        assert "</html>" in (store / name / "report.html").read_text()
    assert (store / "report" / "summary.csv").read_text().count("\n") == 3


def _accuracies(path):
    rows = csv.DictReader(path.read_text().splitlines())
    return [(row["num_train_images"], row["seed"], row["epoch"], row["test_loss"]) for row in rows]


@pytest.mark.parametrize("name", ["../../evil", "a/../../../evil", "/etc/evil", "a\\..\\evil"])
def test_names_in_a_bucket_do_not_lead_out_of_the_folder(tmp_path, monkeypatch, name):
    class System:
        def find(self, place):
            return [f"{place}/fine", f"{place}/{name}"]

        def get_file(self, _, path):
            Path(path).write_bytes(b"from a stranger")

    monkeypatch.setattr(storage.fsspec, "url_to_fs", lambda address: (System(), "bucket/model"))
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    with pytest.raises(ValueError, match="is not the name of a file inside a folder"):
        storage.download("gs://bucket/model", folder)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
