"""Compiled programs that are kept for later processes."""

import os
import subprocess
import sys

import jax
import pytest

from advtransfer.compilation import compile_clock, keep_programs

SCRIPT = """
import sys
from pathlib import Path
import jax
from advtransfer.compilation import keep_programs
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
keep_programs(Path(sys.argv[1]))
total = jax.jit(lambda x: (x * 3).sum())(jax.numpy.arange(5.0))
print(total, hits.count("/jax/compilation_cache/cache_hits"))
"""


def _run(folder, **variables):
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMPILATION", "JAX_PERSIST"))
    }
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path)} | variables
    command = [sys.executable, "-c", SCRIPT, folder]
    result, hits = subprocess.run(command, env=environment, check=True, capture_output=True).stdout.split()
    assert float(result) == 30.0
    return int(hits)


@pytest.mark.process
def test_a_second_process_loads_what_the_first_compiled(tmp_path):
    assert _run(tmp_path / "off", JAX_ENABLE_COMPILATION_CACHE="0") == 0
    assert _run(tmp_path / "off", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine")) == 0
    assert not (tmp_path / "off").exists() and (tmp_path / "mine").exists()
    assert _run(tmp_path / "kept") == 0 and _run(tmp_path / "kept") > 0
    (own,) = (tmp_path / "kept").iterdir()
    (tmp_path / "kept/mine").mkdir()
    for place in (own, tmp_path / "kept/mine"):
        with (place / "large-cache").open("wb") as file:
            file.truncate(2**31 + 1)
    os.utime(own / "large-cache", (0, 0))  # the oldest
    assert _run(tmp_path / "kept") > 0 and not (own / "large-cache").exists()
    assert (tmp_path / "kept/mine/large-cache").exists()  # of somebody else
    (tmp_path / "file").touch()
    assert _run(tmp_path / "file" / "below") == 0  # it cannot be made


def test_a_folder_that_is_set_stays(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    keep_programs(tmp_path / "programs")
    assert before and jax.config.jax_compilation_cache_dir == before and not (tmp_path / "programs").exists()


def test_the_clock_counts_compilations():
    with compile_clock() as seconds:
        jax.jit(lambda x: x - 7.25)(jax.numpy.ones(3))
        number = len(seconds)
    assert number >= 1 and all(s > 0 for s in seconds)
    jax.jit(lambda x: x - 8.25)(jax.numpy.ones(3))
    assert len(seconds) == number
