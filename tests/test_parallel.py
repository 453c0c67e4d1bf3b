"""Splitting work over two virtual devices, against NumPy."""

import math
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest

from advtransfer import parallel


def _tree(num_examples):
    rng = np.random.default_rng(num_examples)
    return {
        "x": rng.normal(size=(num_examples, 3)).astype(np.float32),
        "y": rng.integers(0, 9, num_examples).astype(np.int32),
    }


def test_split_gives_every_device_its_share_in_order():
    tree = _tree(6)
    shares = parallel.split(tree)
    chex.assert_trees_all_equal(parallel.split_locally(tree), shares)
    chex.assert_trees_all_equal(shares, jax.tree.map(lambda x: np.stack([x[:3], x[3:]]), tree))
    chex.assert_trees_all_equal(parallel.join(shares), tree)
    with pytest.raises(ValueError, match="a batch of 5 examples .* over 2 devices: use a multiple of 2"):
        parallel.split(_tree(5))


@pytest.mark.parametrize("process", [0, 1, 2])
def test_every_process_takes_its_own_rows_of_a_batch(process, monkeypatch):
    """Three processes of two devices: together they have every row once, in order."""
    monkeypatch.setattr(parallel.jax, "process_count", lambda: 3)
    monkeypatch.setattr(parallel.jax, "process_index", lambda: process)
    tree = _tree(12)
    own = jax.tree.map(lambda x: x[4 * process : 4 * process + 4], tree)
    chex.assert_trees_all_equal(parallel.join(parallel.split(tree)), own)
    chex.assert_trees_all_equal(parallel.join(parallel.split_locally(tree)), tree)
    with pytest.raises(ValueError, match="a batch of 9 examples .* over 6 devices: use a multiple of 6"):
        parallel.split(_tree(9))


def test_calls_side_by_side_run_at_the_same_time_with_the_callers_precision():
    together = threading.Barrier(3, timeout=60)

    def call(a, b):
        together.wait()
        seen.append(jax.config.jax_default_matmul_precision)
        return jnp.dot(a, b)

    seen, calls = [], [(np.full(2, i, np.float32), np.ones(2, np.float32)) for i in range(3)]
    with jax.default_matmul_precision("highest"):
        assert [float(x) for x in parallel.side_by_side(call, calls)] == [0, 2, 4]
    assert seen == ["highest"] * 3
    with pytest.raises(TypeError):
        parallel.side_by_side(lambda x: x + "", [(1,), (2,)])


def test_one_process_joins_nothing_and_waits_for_nobody(monkeypatch, caplog):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "1")
    parallel.initialize()
    assert "one process only" in caplog.text
    assert (parallel.num_processes(), parallel.process(), parallel.is_main_process()) == (1, 0, True)
    parallel.barrier("nobody")
    tree = _tree(3)
    assert parallel.from_main(tree) is tree


@pytest.mark.parametrize(
    ("environment", "asked"),
    [
        (  # mpirun in a job of Slurm that counts one task
            {"SLURM_NTASKS": "1", "OMPI_COMM_WORLD_SIZE": "2"},
            {"cluster_detection_method": None},
        ),
        (  # by hand, wherever that is
            {
                "SLURM_NTASKS": "1",
                "JAX_COORDINATOR_ADDRESS": "localhost:1",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": "1",
            },
            {"cluster_detection_method": "deactivate", "num_processes": 2, "process_id": 1},
        ),
    ],
)
def test_what_jax_is_asked_to_join(environment, asked, monkeypatch):
    calls = []
    monkeypatch.setattr(parallel.jax.distributed, "initialize", lambda **kwargs: calls.append(kwargs))
    monkeypatch.setattr(parallel.ctypes, "CDLL", lambda _: SimpleNamespace(signal=lambda *_: None))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    parallel.initialize(heartbeat_seconds=7)
    assert calls == [asked | {"heartbeat_timeout_seconds": 7, "shutdown_timeout_seconds": 7}]


@pytest.mark.process
def test_processes_that_do_not_come_end_in_one_line():
    """With JAX's five minutes cut to one second."""
    code = (
        "import functools, jax\n"
        "from advtransfer import parallel\n"
        "join = functools.partial(jax.distributed.initialize, initialization_timeout=1)\n"
        "jax.distributed.initialize = join\n"
        "parallel.initialize()\n"
    )
    by_hand = {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    alone = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | by_hand,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert alone.returncode == parallel.LOST_PROCESS, alone.stderr
    assert "did not find each other" in alone.stderr.splitlines()[-1]


@pytest.mark.parametrize("size", [5, 8])
def test_pad_repeats_the_last_example_and_masks_it(size):
    tree = _tree(5) | {"key": jax.random.split(jax.random.key(0), 5)}
    padded, mask = parallel.pad(tree, size)
    np.testing.assert_array_equal(mask, [1.0] * 5 + [0.0] * (size - 5))
    assert mask.dtype == np.float32
    for name in ("x", "y"):
        expected = np.concatenate([tree[name]] + [tree[name][-1:]] * (size - 5))
        np.testing.assert_array_equal(padded[name], expected)
        assert padded[name].dtype == tree[name].dtype
    keys, last = jax.random.key_data(padded["key"]), jax.random.key_data(tree["key"])[-1]
    assert len(keys) == size and (np.asarray(keys[4:]) == np.asarray(last)).all()


def test_collectives_combine_devices_and_do_nothing_without_them():
    tree = {"x": jnp.arange(6.0)}
    assert parallel.mean(tree, None) is tree and parallel.total(tree, None) is tree

    def combine(offset, x):
        x = x + offset
        sums = jnp.sum(x["x"]) if isinstance(x, dict) else jnp.sum(x)
        return parallel.mean(sums, parallel.AXIS), parallel.total(sums, parallel.AXIS)

    on_devices = parallel.data_parallel(combine, num_shared=1, num_split=1)
    mean, total = on_devices(jnp.float32(1), parallel.split(np.arange(6, dtype=np.float32)))
    assert (float(mean), float(total)) == ((6 + 15) / 2, 6 + 15)


def test_data_parallel_gradients_are_those_of_the_whole_batch():
    """Least squares: the mean of the devices' gradients is 2 Xᵀ(Xw - y) / N."""
    tree, w = _tree(8), np.array([0.3, -1.0, 2.0], np.float32)

    def gradient(w, batch):
        loss = lambda w: jnp.mean(jnp.square(batch["x"] @ w - batch["y"]))  # noqa: E731
        return parallel.mean(jax.grad(loss)(w), parallel.AXIS)

    on_devices = parallel.data_parallel(gradient, num_shared=1, num_split=1)
    found = on_devices(parallel.replicate(w), parallel.split(tree))
    x, y = np.float64(tree["x"]), tree["y"]
    assert found.shape == (3,)
    np.testing.assert_allclose(found, 2 * x.T @ (x @ w - y) / 8, rtol=1e-5)


def test_map_parallel_keeps_the_results_of_independent_work_apart():
    x = _tree(4)["x"]
    double = parallel.map_parallel(lambda factor, x: factor * x, num_shared=1, num_split=1)
    found = double(parallel.replicate(np.float32(2)), parallel.split_locally(x))
    assert found.shape == (2, 2, 3)
    np.testing.assert_array_equal(parallel.join(found), 2 * x)
    assert len(found.sharding.device_set) == 2


def test_replicated_arrays_lie_on_every_device_whole():
    tree = parallel.replicate(_tree(4))
    chex.assert_trees_all_equal(jax.device_get(tree), _tree(4))
    for leaf in jax.tree.leaves(tree):
        assert leaf.sharding.is_fully_replicated and len(leaf.sharding.device_set) == 2


def test_free_memory_is_the_control_groups_where_that_is_less(monkeypatch, tmp_path):
    for name, text in (
        ("max", "5000000\n"),
        ("current", "3000000\n"),
        ("stat", "file 9\ninactive_file 400\n"),
    ):
        (tmp_path / f"memory.{name}").write_text(text)
    monkeypatch.setattr(parallel, "Path", lambda _: tmp_path)
    assert parallel.free_bytes() == (5_000_000 - 3_000_000 + 400) // parallel.num_devices()
    (tmp_path / "memory.max").write_text("max\n")
    available = psutil.virtual_memory().available // parallel.num_devices()
    assert abs(parallel.free_bytes() - available) < 0.2 * available


def test_free_memory_of_accelerators_is_the_least_that_one_has_left(monkeypatch):
    stats = [{"bytes_limit": 10, "bytes_in_use": used} for used in (3, 6)]
    devices = [SimpleNamespace(memory_stats=lambda s=s: s) for s in stats]
    monkeypatch.setattr(parallel.jax, "local_devices", lambda: devices)
    assert parallel.free_bytes() == 4


@pytest.mark.parametrize(
    ("kind", "cores", "devices", "expected"), [("cpu", 7, 2, 3), ("cpu", 2, 8, 1), ("gpu", 16, 1, 1)]
)
def test_cores_are_shared_by_the_devices_of_a_cpu(monkeypatch, kind, cores, devices, expected):
    monkeypatch.setattr(parallel, "platform", lambda: kind)
    monkeypatch.setattr(parallel, "num_devices", lambda: devices)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*range(cores)}, raising=False)
    assert parallel.cores_per_device() == expected


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1), ("9900000 100000", 8)],
)
def test_cores_are_those_of_the_affinity_and_the_control_group(monkeypatch, tmp_path, quota, expected):
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    monkeypatch.setattr(parallel, "Path", lambda _: tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*range(8)}, raising=False)
    assert parallel.num_cores() == expected


@pytest.mark.parametrize(
    ("kind", "processes", "batch_size", "flops_per_weight", "expected"),
    [
        ("gpu", 1, 7, 0.0, 6),  # all of them, which may then refuse the batch
        ("cpu", 1, 128, math.inf, 4),  # 6 and 5 do not divide it
        ("cpu", 1, 120, math.inf, 6),
        ("cpu", 1, 127, math.inf, 1),
        ("cpu", 2, 6, math.inf, 3),
        ("cpu", 1, 64, 6.7, 1),  # ResNet-50 at 32²
        ("cpu", 1, 256, 6.7, 2),
        ("cpu", 1, 64, 95.2, 4),  # ResNet-18 with the CIFAR stem at 32²
        ("cpu", 1, 128, 0.0, 1),
    ],
)
def test_a_batch_is_divided_among_as_many_cores_as_have_enough_to_do(
    monkeypatch, kind, processes, batch_size, flops_per_weight, expected
):
    monkeypatch.setattr(parallel, "platform", lambda: kind)
    monkeypatch.setattr(parallel, "num_processes", lambda: processes)
    monkeypatch.setattr(parallel.jax, "local_device_count", lambda: 6)
    assert parallel.choose_devices(batch_size, flops_per_weight=flops_per_weight) == expected


def test_a_program_on_some_of_the_devices():
    tree = _tree(6)
    one = parallel.replicate(np.float32(2), 1)
    assert one.sharding.device_set == {*jax.local_devices()[:1]}

    def double(factor, tree):
        return parallel.total(factor * jnp.sum(tree["x"]), parallel.AXIS)

    doubled = parallel.data_parallel(double, num_shared=1, num_split=1, devices=1)(
        one, parallel.split(tree, 1)
    )
    np.testing.assert_allclose(doubled, 2 * tree["x"].sum(), rtol=1e-5)
    apart = parallel.map_parallel(lambda x: -x, num_shared=0, num_split=1, devices=1)
    found = apart(parallel.split_locally(tree["x"], 1))
    np.testing.assert_array_equal(found, -tree["x"][None])
    assert {*found.sharding.device_set} == {*doubled.sharding.device_set} == {*one.sharding.device_set}


@pytest.mark.process
@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, parallel.num_cores()),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}, 3),
        ({"JAX_NUM_CPU_DEVICES": "3"}, 3),
    ],
)
def test_every_core_of_a_cpu_is_a_device_unless_the_user_says_otherwise(environment, expected):
    code = (
        "from advtransfer import parallel\n"
        "parallel.one_device_per_core()\n"
        "import jax, os\n"
        "print(jax.local_device_count(), 'terminate_timeout_seconds=1000000' in os.environ['XLA_FLAGS'])\n"
    )
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=kept | environment,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [str(expected), "True"], done.stderr


@pytest.mark.parametrize(
    ("platforms", "plugins", "changed"),
    [("", [], True), ("", ["xla_cuda12"], False), ("cuda", [], False), ("cpu", ["xla_cuda12"], True)],
)
def test_flags_are_for_a_cpu_alone(monkeypatch, platforms, plugins, changed):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    monkeypatch.setattr(parallel, "entry_points", lambda group: plugins)
    parallel.one_device_per_core()
    assert (os.environ["XLA_FLAGS"] != "--xla_cpu_enable_fast_math=false") == changed
    assert os.environ["XLA_FLAGS"].startswith("--xla_cpu_enable_fast_math=false")
