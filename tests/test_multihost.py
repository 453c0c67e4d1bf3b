"""Two processes of two devices each over loopback, against one process with four: real ones, real signals."""

import json
import shutil
import signal

import chex
import jax
import pytest
from faults import finish, launcher, saved_steps, together, wait_until

from advtransfer import parallel, tasks
from advtransfer.config import ConfigError, default
from advtransfer.models import init_variables, load_model, save_model
from advtransfer.report import read_rows

# A small rate: at a larger one a ReLU that rounding tips over grows into another network within these steps.
RECIPE = (
    "--config.train.batch_size=200",
    "--config.train.num_epochs=8",
    "--config.train.learning_rate=1e-5",
    "--config.train.schedule=constant",
    "--config.train.save_every=2",
    "--config.evaluate.norm=none",
)
NUM_STEPS = 32
TWO_DEVICES = "--config.train.num_devices=2"


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    return launcher(tmp_path_factory.mktemp("multihost"))


@pytest.fixture(scope="module")
def start(launch):
    """start(workdir, *arguments, devices=2): one process that trains by RECIPE."""
    return lambda workdir, *arguments, **kwargs: launch("source", workdir, *RECIPE, *arguments, **kwargs)


def _until_step(step, workdir, processes):
    assert wait_until(lambda: max(saved_steps(workdir), default=0) >= step, processes[0]), finish(
        processes[0]
    )


@pytest.fixture(scope="module")
def lost(start, tmp_path_factory):
    """A training whose second process has been killed; the first one has yet to find out."""
    workdir = tmp_path_factory.mktemp("lost")
    processes = together(start, workdir, TWO_DEVICES)
    _until_step(3, workdir, processes)
    processes[1].kill()
    processes[1].communicate()
    return workdir, processes[0]


@pytest.fixture(scope="module")
def one_process(start, lost, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one")
    finish(start(workdir, "--config.train.num_devices=4", devices=4))
    model = load_model(workdir / "model")
    fresh = init_variables(model.module, jax.random.split(jax.random.key(0))[0], 8)
    moved = jax.tree.map(lambda x, y: abs(x - y).max(), model.variables["params"], fresh["params"])
    assert max(jax.tree.leaves(moved)) > 1e-4
    return model


def _assert_same(workdir, one_process):
    variables = load_model(workdir / "model").variables
    chex.assert_trees_all_close(variables, one_process.variables, atol=1e-5)


@pytest.mark.process
def test_sigterm_at_one_saves_on_all_and_one_device_goes_on(start, one_process, tmp_path):
    processes = together(start, tmp_path, TWO_DEVICES)
    _until_step(2, tmp_path, processes)
    processes[1].send_signal(signal.SIGTERM)
    output = [finish(process) for process in processes]
    last = max(saved_steps(tmp_path))
    assert last < NUM_STEPS
    for stderr in output:
        assert f"SIGTERM: saved at step {last} of {NUM_STEPS}; resume with the same command" in stderr
    finish(start(tmp_path, devices=1))
    _assert_same(tmp_path, one_process)


@pytest.mark.process
def test_a_lost_process_ends_the_other_and_both_go_on(start, lost, one_process):
    workdir, process = lost
    stderr = finish(process, code=3)
    assert "another process of this run has ended" in stderr.splitlines()[-1]
    assert not (workdir / "model").exists()
    stdout = [
        process.communicate(timeout=300)[0] for process in together(start, workdir)
    ]  # as many devices as before
    _assert_same(workdir, one_process)
    assert "natural accuracy" in stdout[0] and "natural accuracy" not in stdout[1]
    logged = [json.loads(line)["step"] for line in (workdir / "log.jsonl").read_text().splitlines()]
    assert logged == list(range(2, NUM_STEPS + 1, 2))  # by one process


@pytest.mark.process
def test_without_a_cluster_multihost_is_an_error(start, tmp_path):
    output = finish(start(tmp_path / "alone", "--multihost"), code=2)
    assert len(output.splitlines()) == 1 and "set JAX_COORDINATOR_ADDRESS=HOST:PORT" in output


@pytest.mark.process
def test_the_processes_of_open_mpi_find_each_other(start, tmp_path):
    """Told from the number of their devices, which does not divide the batch."""
    if not shutil.which("mpirun"):
        pytest.skip("Open MPI is absent: apt-get install openmpi-bin")
    under = ("mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2")
    process = start(tmp_path, "--multihost", TWO_DEVICES, "--config.train.batch_size=202", under=under)
    stderr = finish(process, code=2)
    assert stderr.count("a batch of 202 examples cannot be split evenly over 4 devices") == 2, stderr


@pytest.mark.process
def test_a_study_is_divided_among_the_processes(launch, one_process, tmp_path):
    """The rows are those of one process, and one report is written."""
    save_model(one_process, tmp_path / "source")

    def study(workdir, *arguments, **options):
        return launch(
            "study", workdir, f"--config.study.sources={tmp_path / 'source'}", *arguments, **options
        )

    finish(study(tmp_path / "alone"))
    for process in together(study, tmp_path / "two"):
        finish(process)
    rows = [
        [{key: value for key, value in row.items() if key != "seconds"} for row in read_rows(folder / "rows")]
        for folder in (tmp_path / "alone", tmp_path / "two")
    ]
    assert len(rows[0]) > 0 and sorted(map(str, rows[0])) == sorted(map(str, rows[1]))
    assert (tmp_path / "two" / "report.html").exists()


@pytest.mark.parametrize("stage", ["transfer", "import", "report"])
def test_what_runs_in_one_process_says_so(stage, monkeypatch):
    monkeypatch.setattr(parallel, "num_processes", lambda: 2)
    config = default()
    config.stage = stage
    with pytest.raises(ConfigError, match=f"config.stage={stage} runs in one process"):
        tasks.plan(config, "unused")
