"""A study on a Ray cluster: the local engine's rows whatever node is lost, and a line for each mistake."""

import os
import re
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from faults import launcher

from advtransfer.data import Dataset, LostWorker, Split
from advtransfer.models import Model, ModelSpec, create_module, identity, init_variables
from advtransfer.parallel import NoCluster
from advtransfer.report.rows import read_rows
from advtransfer.study import Grid, Source, Start, cluster, connect, make_cells, run_cells, run_on
from advtransfer.transfer import Recipe

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.process

RECIPE = Recipe(num_epochs=2, evaluate_epochs=(2,), batch_size=5, learning_rate=0.01)
GRID = Grid(num_train_images=(6, 9, 12), num_unfrozen_blocks=(0, 1), num_seeds=3)


def start():
    rng = np.random.default_rng(0)

    def split(n):
        images = rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
        return Split(images, rng.integers(0, 3, n).astype(np.int32))

    dataset = Dataset("random", ("a", "b", "c"), split(40), split(10), split(20))
    module = create_module("resnet_tiny", num_classes=3)
    variables = jax.device_get(init_variables(module, jax.random.key(0), 8))
    model = Model(module, variables, ModelSpec("resnet_tiny", 3, 8, module.mean, module.std))
    return Start(Source("natural", "none", 0.0, identity(model)), model, dataset)


def rows_of(folder, **options):
    first = start()
    cells = make_cells(GRID, ["natural"], ["random"])
    found = run_cells(GRID, RECIPE, cells, lambda *_: first, folder, group_size=1, **options)
    return [{name: x for name, x in row.items() if name != "seconds"} for row in found.rows]


@pytest.fixture
def two_nodes(monkeypatch):
    """Of a core each; workers find the tests and the package."""
    from ray.cluster_utils import Cluster

    root = Path(__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", f"{root}:{root / 'tests'}")
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    made.add_node(num_cpus=1)
    yield made
    made.shutdown()


def test_rows_are_those_of_the_local_engine_though_a_node_is_lost(two_nodes, tmp_path, monkeypatch):
    monkeypatch.setenv("NPROC", "1")  # as workers have it: sums on several threads are rounded differently
    (node,) = two_nodes.worker_nodes
    seen = []

    def progress(_, groups, number):
        assert number == 18
        for done, name in enumerate(groups, start=1):
            if done == 5:
                two_nodes.remove_node(node, allow_graceful=False)
            seen.append((name, groups.status()))
            yield name

    with connect(two_nodes.address) as found:
        assert found.num_workers() == 2
        rows = rows_of(tmp_path / "ray", engine=run_on(found), progress=progress)
    names = [name for name, _ in seen]
    assert len(names) == len(set(names)) == 18
    assert seen[0][1] == "2 running, 0 lost" and seen[-1][1] == "0 running, 1 lost"
    assert rows == rows_of(tmp_path / "local")


def test_after_ctrl_c_the_other_engine_goes_on(two_nodes, tmp_path):
    start, workdir = launcher(tmp_path), tmp_path / "study"
    on_ray = ["--config.study.engine=ray", f"--config.study.ray_address={two_nodes.address}"]
    # So many that the signal comes before the last, even if this process has to wait for a core.
    small = ["--config.study.num_seeds=12", "--config.study.group_size=1", "--config.study.calibration=0."]
    planned, errors = start("study", workdir, *small, *on_ray, "--plan").communicate(timeout=300)
    tasks = "on Ray: 2 trainings of sources and 96 groups, each a task; 2 workers with a core each"
    assert tasks in planned.splitlines(), planned + errors
    assert not workdir.exists()

    begun = start("study", workdir, *small, *on_ray)
    while len(list((workdir / "rows").glob("*.jsonl"))) < 3:
        assert begun.poll() is None, begun.communicate()
        time.sleep(0.05)
    begun.send_signal(signal.SIGINT)
    _, errors = begun.communicate(timeout=300)
    assert begun.returncode == 130
    assert errors.splitlines()[-1] == "interrupted; resume with the same command"
    with connect(two_nodes.address):
        deadline = time.monotonic() + 30
        while ray.available_resources().get("CPU") != 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert ray.available_resources()["CPU"] == 2  # no worker goes on
    kept = {path: path.read_bytes() for path in (workdir / "rows").glob("*.jsonl")}
    assert 3 <= len(kept) < 96

    _, errors = start("study", workdir, *small).communicate(timeout=300)
    assert (workdir / "report.html").exists(), errors
    assert kept.items() <= {path: path.read_bytes() for path in (workdir / "rows").iterdir()}.items()
    trials = [row["trial_id"] for row in read_rows(workdir / "rows")]
    assert len(set(trials)) == 96 and len(trials) == 96 * 2


def look_elsewhere(path):
    """What a node answers that does not see the file."""
    return cluster._versions(), None


def _refused(*args, **options):
    with pytest.raises(NoCluster) as refused, connect(*args, **options):
        pass
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_what_is_wrong_with_a_cluster_is_said_before_anything_runs(two_nodes, tmp_path, monkeypatch):
    address = two_nodes.address
    assert "has a GPU" in _refused(address, device="gpu")
    with monkeypatch.context() as other:
        other.setattr(cluster, "_versions", lambda: {"jax": "9.9"})  # of this process
        assert re.search(r"node .* has jax \d+\.\d+.*, this machine 9\.9$", _refused(address))
    with monkeypatch.context() as other:
        other.setattr(cluster, "_look", look_elsewhere)
        folder = tmp_path / "workdir"
        assert f"does not see {folder}" in _refused(address, folder=folder)
        assert not folder.exists()
    with connect(address, folder=tmp_path) as found:
        assert (found.num_workers(), found.device) == (2, "a core")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense"])
def test_nobody_answers(address, monkeypatch):
    assert address in _refused(address)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert "127.0.0.1:1" in _refused("")


class Worker:
    """As `cluster._Worker`, with neither networks nor images."""

    def __init__(self, *_):
        pass

    def start(self):
        pass


class Deadly(Worker):
    def run(self, trials):
        os._exit(1)


class Failing(Worker):
    def run(self, trials):
        raise ZeroDivisionError(f"{len(trials)} trial")


def test_a_group_that_ends_its_workers_is_given_up(two_nodes, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "_Worker", Deadly)
    ends = pytest.raises(LostWorker, match="3 times while it ran the same group")
    with connect(two_nodes.address) as found, ends:
        rows_of(tmp_path, engine=run_on(found))


def test_what_a_group_raises_is_raised_here(two_nodes, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "_Worker", Failing)
    with connect(two_nodes.address) as found, pytest.raises(ZeroDivisionError, match="^1 trial$"):
        rows_of(tmp_path, engine=run_on(found))
