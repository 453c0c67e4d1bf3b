"""Streamed training in real processes: two against one, and killed in the middle against undisturbed."""

import signal

import chex
import jax
import psutil
import pytest
from faults import draw_photographs, finish, finish_all, launcher, saved_steps, together, wait_until

from advtransfer.models import init_variables, load_model

pytestmark = pytest.mark.process

# A small rate, as in test_multihost: two processes are compared with one to rounding.
RECIPE = (
    "--config.train.num_epochs=8",
    "--config.train.learning_rate=1e-5",
    "--config.train.schedule=constant",
    "--config.evaluate.norm=none",
)
NUM_STEPS = 40


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """start(workdir, *arguments, devices=2): one process that trains by RECIPE on photographs that stream."""
    folder = tmp_path_factory.mktemp("stream")
    launch, photographs = launcher(folder), draw_photographs(folder / "photographs")
    return lambda workdir, *arguments, **kwargs: launch(
        f"stream:{photographs}",
        workdir,
        *RECIPE,
        f"--config.cache_dir={folder / 'cache'}",
        *arguments,
        **kwargs,
    )


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    """The model of one process with two devices."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    finish(start(workdir))
    model = load_model(workdir / "model")
    fresh = init_variables(model.module, jax.random.split(jax.random.key(0))[0], 16)
    moved = jax.tree.map(lambda x, y: abs(x - y).max(), model.variables, fresh)
    assert max(jax.tree.leaves(moved["params"])) > 1e-4
    assert max(jax.tree.leaves(moved["batch_stats"])) > 0.01
    return model


def _until_step(step, workdir, process):
    assert wait_until(lambda: max(saved_steps(workdir), default=0) >= step, process), finish(process)


def test_two_processes_train_to_the_weights_of_one(start, undisturbed, tmp_path):
    finish_all(together(start, tmp_path, devices=1))
    variables = load_model(tmp_path / "model").variables
    chex.assert_trees_all_close(variables, undisturbed.variables, atol=1e-5)


def test_a_killed_worker_ends_the_run_and_a_killed_run_goes_on(start, undisturbed, tmp_path):
    """The weights at the end are bit for bit those of every batch seen once, in its turn."""
    process = start(tmp_path)
    _until_step(3, tmp_path, process)
    children = psutil.Process(process.pid).children(recursive=True)
    (worker,) = [child for child in children if "--multiprocessing-fork" in child.cmdline()]
    worker.kill()
    # Python's resource tracker may add a warning, that it has freed the shared memory of the worker.
    lines = finish(process, code=3).splitlines()
    (message,) = [line for line in lines if line.startswith("a process that decodes images has ended")]
    assert message.endswith("; resume with the same command") and "Traceback" not in lines

    process = start(tmp_path)
    _until_step(max(saved_steps(tmp_path)) + 3, tmp_path, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "model").exists() and max(saved_steps(tmp_path)) < NUM_STEPS

    finish(start(tmp_path))
    chex.assert_trees_all_equal(load_model(tmp_path / "model").variables, undisturbed.variables)
