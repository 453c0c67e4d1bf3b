"""What a run must not do again: compile, wait for the host, or keep activations that no gradient needs."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax._src.array import ArrayImpl

from advtransfer import checkpoint, study
from advtransfer.compilation import compile_clock
from advtransfer.data import Dataset, Split
from advtransfer.models import Model, ModelSpec, create_module, init_variables
from advtransfer.models.cost import layers
from advtransfer.source import SourceRecipe, start_training
from advtransfer.train import fit
from advtransfer.transfer import Recipe
from advtransfer.transfer.program import Rates, Task, make_fine_tune


def _dataset(num_train=32, size=8):
    rng = np.random.default_rng(0)

    def split(n):
        return Split(rng.integers(0, 256, (n, size, size, 3), np.uint8), np.arange(n, dtype=np.int32) % 3)

    return Dataset("small", ("a", "b", "c"), split(num_train), split(8), split(8))


@pytest.fixture
def fetched(monkeypatch):
    """Grows with each array whose values come to the host; `np.asarray` reads a CPU array in place."""
    found, value = [], ArrayImpl._value

    def fetch(array):
        found.append(array.shape)
        return value.fget(array)

    monkeypatch.setattr(ArrayImpl, "_value", property(fetch))
    return found


@pytest.mark.usefixtures("unoptimised")
@pytest.mark.parametrize("recipe", [{}, {"norm": "l2", "eps": 0.5}], ids=["natural", "l2"])
def test_a_training_compiles_once_and_fetches_only_what_it_logs(recipe, fetched, tmp_path):
    recipe = SourceRecipe(batch_size=8, num_epochs=4, attack_steps=1, image_size=8, **recipe)
    run, at_step, started = start_training(recipe, _dataset()), [], []
    with compile_clock() as compiled:

        def run_step(state, step):
            started.append((len(compiled), len(fetched)))
            return run.run_step(state, step)

        fit(
            run.state,
            run_step,
            num_steps=16,
            schedule=optax.constant_schedule(0.1),
            checkpoints=checkpoint.Checkpoints(tmp_path, keep=1, run="0"),
            save_every=16,
            log_every=10,
            log=lambda step, values: at_step.append(step),
        )
    compiled_before, fetched_before = zip(*started, strict=True)
    assert at_step == [10, 16] and compiled_before[1] > compiled_before[0]
    assert len({*compiled_before[2:10]}) == len({*compiled_before[11:]}) == 1
    assert len({*fetched_before[1:10]}) == len({*fetched_before[10:]}) == 1
    assert fetched_before[10] > fetched_before[9]


@pytest.mark.usefixtures("unoptimised")
@pytest.mark.parametrize("k", [0, 1])
def test_a_second_group_of_trials_compiles_nothing(k, tmp_path):
    """Other seeds, another source of the same kind: the same programs."""
    module, dataset = create_module("resnet_tiny", num_classes=3), _dataset()
    spec = ModelSpec("resnet_tiny", 3, 8, module.mean, module.std)
    sources = {
        name: Model(module, init_variables(module, jax.random.key(i), 8), spec)
        for i, name in enumerate(("one", "two"))
    }
    recipe = Recipe(num_epochs=2, batch_size=5)

    def run(source, folder):
        grid = study.Grid(num_train_images=(12,), num_unfrozen_blocks=(k,), num_seeds=2)
        with compile_clock() as compiled:
            rows = study.run_study(
                grid, {source: sources[source]}, {"t": dataset}, recipe=recipe, folder=folder
            )
        assert len(rows) == 2
        return len(compiled)

    assert run("one", tmp_path / "one") > 0
    assert run("two", tmp_path / "two") == 0


def test_activations_of_frozen_blocks_are_not_kept():
    """The compiled training of the last block takes the memory of the weights, of the gradient and momentum
    of those that are trained, and of the trained activations; a training of everything takes far more."""
    module, size, batch = create_module("resnet18", num_classes=3), 64, 64
    variables = jax.eval_shape(functools.partial(init_variables, module, jax.random.key(0), size))
    images, labels = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.uint8), jnp.zeros(batch, jnp.int32)
    one_image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8)
    task = Task(images, labels, one_image, labels[:1])
    last, params = module.block_names[-1], variables["params"]

    def num_bytes(tree):
        return sum(x.dtype.itemsize * x.size for x in jax.tree.leaves(tree))

    def temporary(k):
        program = jax.jit(make_fine_tune(module, Recipe(num_epochs=1, batch_size=batch), k, size))
        args = params, variables["batch_stats"], task, np.arange(batch), jax.random.key(0), Rates(0.1, 0.0)
        return program.lower(*args).compile().memory_analysis().temp_size_in_bytes

    trained = sum(4 * batch * math.prod(x.output) for x in layers(module, size) if x.place == last)
    bound = 1.2 * (num_bytes(variables) + 2 * num_bytes([params[last], params["fc"]]) + trained)
    assert temporary(1) <= bound < temporary(-1)
    frozen = sum(4 * batch * math.prod(x.output) for x in layers(module, size) if x.place != last)
    assert bound < temporary(1) + frozen  # so it would be seen
