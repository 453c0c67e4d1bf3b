"""Strict JAX for every test: two virtual CPU devices, no implicit rank promotion; programs compiled once."""

import os
from pathlib import Path

import annotations
from compiled import cache_folder

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=2"
    # XLA aborts the process when one device keeps another waiting for 40 s, as a busy machine may.
    + " --xla_cpu_collective_call_terminate_timeout_seconds=600"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder()))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import pytest
from jaxtyping import install_import_hook

install_import_hook(annotations.CHECKED, "annotations.check_after")

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_xdist_auto_num_workers(config):
    """Whole tiers on up to four cores; named files in this process, where a debugger reaches them."""
    return 0 if config.option.file_or_dir else min(4, os.cpu_count() or 1)


def pytest_collection_modifyitems(items):
    """Files that start processes come first, or a worker would be left alone with the last of them."""
    slow = {item.path for item in items if item.get_closest_marker("process")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture
def two_devices(monkeypatch):
    """As on two accelerators: all work goes to both, whatever the rule for a CPU's cores says."""
    monkeypatch.setattr("advtransfer.parallel.num_devices", lambda: 2)
    monkeypatch.setattr("advtransfer.parallel.choose_devices", lambda *_, **__: 2)


@pytest.fixture(scope="module", autouse=True)
def _few_memory_maps():
    """A compiled program maps memory, and Linux bounds the maps of a process (vm.max_map_count, 65,530)."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()


@pytest.fixture(scope="module")
def unoptimised():
    """XLA without its costly passes, for tests of what is run and written: it compiles in half the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()


@pytest.fixture(scope="module")
def two_blocks():
    """resnet_tiny with two blocks of its four, and of half their width: it compiles in half the time."""
    from advtransfer.models import ARCHITECTURES

    with pytest.MonkeyPatch.context() as patch:
        tiny = {**ARCHITECTURES["resnet_tiny"], "stage_sizes": (1, 1), "width": 8}
        patch.setitem(ARCHITECTURES, "resnet_tiny", tiny)
        yield
