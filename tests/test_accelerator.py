"""The benchmark of an accelerator runs on any backend, counts right and cuts its sets right."""

import json
import math
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
from test_data_tfds import numbered, serials_of, write_set

from advtransfer.data import load_dataset
from benchmarks import accelerator, path, subsets
from benchmarks.steps import Case


def test_activations_counted_by_hand():
    # resnet_tiny on 16²: the stem, and four blocks of two convolutions at 16, 32, 64, 128 channels, the last
    # three with a third one on the way around.
    sides, channels = (16, 8, 4, 2), (16, 32, 64, 128)
    blocks = [(2 if i == 0 else 3) * s * s * c for i, (s, c) in enumerate(zip(sides, channels, strict=True))]
    assert accelerator.activation_size("resnet_tiny", 16) == 16 * 16 * 16 + sum(blocks)


def test_the_slower_of_arithmetic_and_memory_bounds_a_step():
    case = Case("resnet_tiny", 1, 16)
    size = 4 * accelerator.activation_size("resnet_tiny", 16)
    of_memory = accelerator.Peaks(flops=math.inf, bandwidth=1e9)
    for name, moves in (("forward", 2), ("attack", 5), ("clean", 14), ("pgd3", 29)):
        assert accelerator.bound(case, name, of_memory, 4) == pytest.approx(1e9 / (moves * size))
    of_products = accelerator.Peaks(flops=1e9, bandwidth=math.inf)
    rates = {name: accelerator.bound(case, name, of_products, 4) for name in ("forward", "clean", "pgd3")}
    assert rates["forward"] == pytest.approx(3 * rates["clean"]) == pytest.approx(9 * rates["pgd3"])


def test_a_table_has_every_figure_in_its_column():
    rows = [("a", {"x": 1234.5, "y": "1 [0, 2]"}), ("b", {"z": 0.12345})]
    assert accelerator.table(rows).splitlines() == [
        "| | x | y | z |",
        "|---|---|---|---|",
        "| a | 1,234 | 1 [0, 2] |  |",
        "| b |  |  | 0.1235 |",
    ]


def test_a_lead_and_its_interval():
    """By hand: of 1, 2, 3 points the mean is 2 and its standard error 1/√3; t(0.975, 2) = 4.303."""
    natural = np.float32([0.5, 0.6, 0.7])
    assert path.lead(natural + np.float32([0.01, 0.02, 0.03]), natural) == "+2.0 [-0.5, +4.5]"


def test_a_prepared_set_is_cut(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    whole = write_set(
        tmp_path / "pets" / "1.0.0",
        {"train": numbered(0, 60), "validation": numbered(60, 8), "test": numbered(70, 4)},
    )
    counts = {"train": 40, "validation": 3, "test": 9}  # of shards of 30, 4 and 2 records
    subsets.cut(whole, tmp_path / "small" / "1.0.0", counts)
    small = load_dataset(f"tfds:{tmp_path}/small")
    assert small.class_names == ("cat", "dog")
    assert sorted(serials_of(small.train)) == list(range(40))
    assert serials_of(small.validation) == [60, 61, 62]
    assert serials_of(small.test) == [70, 71, 72, 73]


@pytest.mark.process
def test_every_section_runs_on_a_cpu(tmp_path):
    command = [sys.executable, "-m", "benchmarks.accelerator", "--minutes=60", f"--out={tmp_path}"]
    options = ["--sections=right,steps,study,path,attacks", "--turns=1", "--source-seconds=0.2"]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "accelerator.json").read_text())
    assert [*found] == ["device", "right", "steps", "study", "path", "attacks"]
    assert {figures["verdict"] for _, figures in found["right"]} == {"right", ""}
    assert len(found["right"]) == 21
    rates = dict(found["steps"])
    assert rates["resnet_tiny 16², batch 32, clean"]["ours, images/s"] > 0
    assert all(figures["roofline"] > 0 for _, figures in found["steps"] if "roofline" in figures)
    assert len(found["path"]) == len(path.EPS) + len(path.DEPTHS)
    assert len(found["attacks"]) == 8
    assert "| source natural |" in (tmp_path / "accelerator.md").read_text()


# XLA compiles for a GPU that is not there, by a plugin that the tests do not ask for (BUILD.md).
needs_cuda_plugin = pytest.mark.skipif(
    not (find_spec("jax_plugins") and find_spec("jax_plugins.xla_cuda13")), reason="no jax-cuda13-plugin"
)


@needs_cuda_plugin
def test_a_gpu_takes_bias_and_relu_into_the_convolutions():
    """All of them but the three on the way around a block, which have no ReLU."""
    options = ["--case=resnet18_cifar:1024:32", "--steps=attack,clean"]
    command = [sys.executable, "-m", "benchmarks.traffic", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    attack, clean = ([cell.strip() for cell in line.split("|")] for line in done.stdout.splitlines()[-2:])
    assert (attack[1], attack[6]) == ("attack", "17")
    assert (clean[1], clean[6]) == ("clean", "0")


GROUP = """
import os
# Autotuning and CUB ask a device.
os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0 --xla_gpu_enable_cub_radix_sort=false"
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_platforms", "cpu")
from advtransfer.models import create_module, init_variables
from advtransfer.transfer import Recipe
from advtransfer.transfer.program import Rates, Task, make_fine_tune
from benchmarks.traffic import lower

module = create_module("resnet18_cifar", num_classes=10, dtype=jnp.bfloat16).clone(as_products=True)
variables = jax.eval_shape(lambda: init_variables(module, jax.random.key(0)))
run = make_fine_tune(module, Recipe(num_epochs=1, evaluate_epochs=(1,), batch_size=20), 3)
entering, labels = np.zeros((300, 8, 8, 256), jnp.bfloat16), np.zeros(300, np.int32)

def group(params, batch_stats, task, subsets, keys):
    trial = lambda subset, key: run(params, batch_stats, task, subset, key, Rates(0.01, 5e-4))[1]
    return jax.vmap(trial)(subsets, keys)

task = Task(entering[:80], labels[:80], entering, labels)
keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 20))
args = variables["params"], variables["batch_stats"], task, np.zeros((20, 80), np.int32), keys
program = lower(group, *args).compile().as_text()
print("gemm" in program, "__cudnn$conv" in program)
"""


@needs_cuda_plugin
def test_a_group_of_trials_compiles_to_products_for_a_gpu():
    """XLA fails a check of its own on this one if it may take the taps into the products."""
    done = subprocess.run([sys.executable, "-c", GROUP], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False"], done.stderr[-2000:]
