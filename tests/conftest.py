"""Strict JAX for every test: two virtual CPU devices, no implicit rank promotion."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=2"
    # XLA aborts the process when one device keeps another waiting for 40 s, as a busy machine may.
    + " --xla_cpu_collective_call_terminate_timeout_seconds=600"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """A compiled program maps memory, and Linux bounds the maps of a process: a module's go with it."""
    yield
    jax.clear_caches()
