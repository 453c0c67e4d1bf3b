"""Batches in parts, the moving average, validation on the way, and the recipes that use them."""

import importlib
import importlib.util
import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advtransfer import config as base
from advtransfer import parallel, source
from advtransfer.config import ConfigError, read
from advtransfer.data import AUGMENTATIONS, Batch, Dataset, Split, choose_augmentation, load_dataset
from advtransfer.evaluate import Evaluation, evaluate, measure
from advtransfer.models import Model, ModelSpec, init_variables, load_model, logits_fn
from advtransfer.optim import make_schedule, sgd
from advtransfer.source import SourceRecipe, train_source
from advtransfer.tasks import inputs
from advtransfer.tasks.source import load_source_data
from advtransfer.train import Preempted, init_state, make_train_step

pytestmark = pytest.mark.usefixtures("two_blocks")

EXPERIMENTS = Path(__file__).parent.parent / "experiments"


def _linear(params, batch_stats, images, train):
    return images.mean((1, 2)) @ params["w"], batch_stats + train


def _batch(seed, size=12):
    images = jax.random.uniform(jax.random.key(seed), (size, 4, 4, 3))
    labels = jnp.arange(size) % 5
    return Batch(images, labels, jax.random.split(jax.random.key(seed + 1), size))


def _start(tx, **options):
    w = jax.random.normal(jax.random.key(9), (3, 5))
    return init_state({"params": {"w": w}, "batch_stats": jnp.float32(0)}, tx, **options)


def _noise(logits_fn, images, labels, *, key):
    """An attack that is random by example."""
    return images + 0.1 * jax.vmap(lambda k: jax.random.normal(k, images.shape[1:]))(key)


def test_a_batch_in_parts_takes_the_step_of_the_whole():
    """Without BatchNorm to the last digits; the parts are seen one after the other."""
    tx = sgd(0.3)
    states, metrics = [], []
    for num_parts in (1, 4):
        step = jax.jit(make_train_step(_linear, tx, attack=_noise, num_parts=num_parts))
        state, found = step(_start(tx), _batch(0))
        states.append(state)
        metrics.append(found)
    chex.assert_trees_all_close(states[0].params, states[1].params, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(metrics[0], metrics[1], rtol=1e-5)
    assert [float(state.batch_stats) for state in states] == [1.0, 4.0]


def test_the_moving_average_is_its_sum_written_out():
    tx, decay = sgd(0.3), 0.6
    step = jax.jit(make_train_step(_linear, tx, average_decay=decay))
    state = _start(tx, average=True)
    expected = np.asarray(state.params["w"], np.float64)
    decays = []
    for i in range(8):
        state, _ = step(state, _batch(i))
        decays.append(min(decay, (1 + i) / (10 + i)))
        expected = decays[-1] * expected + (1 - decays[-1]) * np.asarray(state.params["w"], np.float64)
    assert decays[0] == 0.1 and decays[-1] < decay
    np.testing.assert_allclose(state.variables["params"]["w"], expected, rtol=1e-5)
    assert np.abs(expected - state.params["w"]).max() > 1e-3
    plain, _ = jax.jit(make_train_step(_linear, tx))(_start(tx), _batch(0))
    chex.assert_trees_all_equal(plain.variables["params"], plain.params)


def _config(**recipe):
    config = base.default()
    config.stage = "source"
    config.train.update(dataset="builtin:digits", image_size=8, batch_size=80, num_epochs=2)
    config.train.update(log_every=7, norm="l2", eps=0.25, **recipe)
    config.evaluate.update(num_images=60, num_steps=2, batch_size=20)
    return config


def train(config, folder):
    """`train_source` of config.train."""
    options = read(config)
    return train_source(
        options.training, load_source_data(options), folder=folder, evaluation=options.evaluation
    )


def test_training_with_all_of_it(tmp_path):
    """The model is the moving average, and the last validation in the log is that of the model."""
    config = _config(num_parts=4, average_decay=0.9, validate_every=1)
    model = train(config, tmp_path / "all")
    lines = [json.loads(line) for line in (tmp_path / "all" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [7, 10, 14, 20]
    validated = {line["step"]: line for line in lines if "validation_natural_accuracy" in line}
    assert sorted(validated) == [10, 20]
    digits = load_dataset("builtin:digits", image_size=8).validation
    split = type(digits)(*(array[:60] for array in digits))
    found = evaluate(logits_fn(load_model(tmp_path / "all")), split, batch_size=20)
    assert validated[20]["validation_natural_accuracy"] == found["accuracy"]
    attacked = measure(model, digits, read(config).evaluation)["adversarial_accuracy"]
    assert validated[20]["validation_adversarial_accuracy"] == attacked

    plain = train(_config(num_parts=4), tmp_path / "plain")
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(plain.variables, model.variables, atol=1e-4)


def test_parts_that_do_not_divide_a_devices_share_are_refused():
    config = _config(num_parts=3, num_devices=2)
    with pytest.raises(ConfigError, match="config.train: num_parts=3 must divide the 40 images of a device"):
        load_source_data(read(config))


def test_an_evaluation_batch_that_accelerators_do_not_divide_is_refused(two_devices):
    config = _config()
    config.evaluate.batch_size = 255
    with pytest.raises(ConfigError, match="config.evaluate.batch_size: .*2 devices"):
        load_source_data(read(config))


def _small(num_train):
    rng = np.random.default_rng(0)
    splits = (
        Split(rng.integers(0, 256, (n, 8, 8, 3), np.uint8), np.arange(n, dtype=np.int32) % 3)
        for n in (num_train, 8, 14)
    )
    return Dataset("small", ("a", "b", "c"), *splits)


def test_steps_are_of_whole_batches_and_one_batch_may_be_all_images():
    recipe = SourceRecipe(batch_size=8, num_epochs=2)
    for num_images, steps in ((8, 2), (15, 2), (16, 4), (25, 6)):
        source.check_source(recipe, _small(num_images))
        assert source.num_steps(recipe, _small(num_images)) == steps
    with pytest.raises(ValueError, match="batch_size=8 is larger than the 7 training images"):
        source.check_source(recipe, _small(7))


def test_a_state_is_weights_momentum_statistics_and_their_average():
    recipe = SourceRecipe()
    module = source.create_source_module(recipe, _small(8))
    shapes = jax.eval_shape(lambda: init_variables(module, jax.random.key(0), 8))
    params, stats = (sum(x.size for x in jax.tree.leaves(shapes[name])) for name in ("params", "batch_stats"))
    found = source.state_bytes(recipe, _small(8))
    assert 0 <= found - 4 * (2 * params + stats) <= 16  # a counter or two
    averaged = SourceRecipe(average_decay=0.5)
    assert source.state_bytes(averaged, _small(8)) - found == 4 * (params + stats)


@pytest.mark.parametrize(
    ("changes", "attack", "num_images"),
    [
        ({"norm": "none"}, "none", 14),
        ({"norm": "l2", "eps": 0.5, "num_steps": 7}, "ℓ2 PGD-7, ε = 0.5", 14),
        ({"norm": "linf", "eps": 4 / 255, "num_restarts": 2}, "ℓ∞ PGD-20, ε = 0.0157, 2 restarts", 14),
        ({"norm": "none", "num_images": 5}, "none", 5),
        ({"norm": "none", "num_images": 99}, "none", 14),
    ],
)
def test_what_is_measured_of_a_network_and_reported(changes, attack, num_images, monkeypatch):
    evaluation = Evaluation(**{"num_steps": 20, "batch_size": 4} | changes)
    module = source.create_source_module(SourceRecipe(), _small(8))
    model = Model(module, {}, ModelSpec("resnet_tiny", 3, 11, module.mean, module.std))
    asked = []

    def evaluates(network, split, **options):
        asked.append((split, options))
        return {"accuracy": 1 / len(asked), "loss": 2.0}

    monkeypatch.setattr(importlib.import_module("advtransfer.evaluate"), "evaluate", evaluates)
    found = measure(model, _small(8).test, evaluation)
    kinds = ["natural"] if attack == "none" else ["natural", "adversarial"]
    expected = {"num_images": num_images, "attack": attack}
    for i, kind in enumerate(kinds, start=1):
        expected |= {f"{kind}_accuracy": 1 / i, f"{kind}_loss": 2.0}
    assert found == expected
    for (split, options), kind in zip(asked, kinds, strict=True):
        np.testing.assert_array_equal(split.images, _small(8).test.images[:num_images])
        assert (options["batch_size"], options["image_size"]) == (4, 11)
        assert (options["attack"] is None) == (kind == "natural")
    own = jax.random.fold_in(jax.random.key(0), 0)
    assert jax.random.key_data(asked[0][1]["key"]).tolist() != jax.random.key_data(own).tolist()


@pytest.mark.parametrize(("num_restarts", "random_start"), [(1, False), (2, True)])
def test_restarts_begin_at_random_places(num_restarts, random_start):
    options = Evaluation(norm="l2", eps=0.5, num_restarts=num_restarts).attack.keywords
    assert (options["num_restarts"], options["random_start"]) == (num_restarts, random_start)


def test_an_empty_split_is_refused(monkeypatch):
    monkeypatch.setattr(inputs, "load_dataset", lambda *_, **__: _small(0))
    with pytest.raises(ConfigError, match="config.transfer.target: builtin:digits has no train images"):
        splits = ("test", "train")
        inputs.load_data(base.Run(), "transfer.target", "builtin:digits", splits=splits, image_size=8)


def _experiment(name, *arguments):
    spec = importlib.util.spec_from_file_location(name, EXPERIMENTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*arguments)


@pytest.mark.parametrize("experiment", ["source_imagenet", "source_cifar10"])
def test_natural_and_robust_twins_share_everything_but_the_attack(experiment):
    natural, robust = (_experiment(experiment, source) for source in ("natural", "l2_0.5"))
    assert (robust.train.norm, robust.train.eps) == ("l2", 0.5)
    for config in (natural, robust):
        read(config)
        config.train.norm, config.train.eps, config.evaluate.norm, config.evaluate.eps = (
            "none",
            0.0,
            "l2",
            1.0,
        )
    assert natural.to_json() == robust.to_json()


def test_the_imagenet_recipe_is_the_published_one():
    config = _experiment("source_imagenet", "linf_4")
    assert config.train.eps == pytest.approx(4 / 255) and config.train.norm == "linf"
    assert config.evaluate.eps == config.train.eps
    config.train.batch_size = 1024  # the rate follows the batch
    resolved = config.copy_and_resolve_references().train
    assert resolved.learning_rate == pytest.approx(0.4)
    schedule = make_schedule(resolved.schedule, resolved.learning_rate, 90)
    assert [round(float(schedule(epoch)), 6) for epoch in (0, 29, 31, 59, 61, 89)] == [
        *(0.4, 0.4, 0.04, 0.04, 0.004, 0.004)
    ]
    chosen = choose_augmentation(read(config).training.augmentation)
    assert chosen == AUGMENTATIONS["robustness"]
    cifar = read(_experiment("source_cifar10")).training
    assert choose_augmentation(cifar.augmentation) == AUGMENTATIONS["utrera_color"]
    with pytest.raises(ValueError, match="l2_3, linf_4"):
        _experiment("source_imagenet", "l2")


def test_a_resumed_training_goes_on_with_as_many_devices_as_it_began(tmp_path, monkeypatch):
    """Unless the recipe names a number, or there are fewer now."""
    began = []

    def stop(state, run_step, **_):
        began.append(len(state.step.sharding.device_set))
        raise Preempted("here")

    def train(chosen, **options):
        monkeypatch.setattr(parallel, "choose_devices", lambda *_, **__: chosen)
        with pytest.raises(Preempted):
            source.train_source(SourceRecipe(batch_size=8, **options), _small(16), folder=tmp_path)
        return began.pop()

    monkeypatch.setattr(source, "fit", stop)
    assert [train(2), train(1), train(1, num_devices=1), train(2), train(2, num_devices=2)] == [2, 2, 1, 1, 2]
    monkeypatch.setattr(parallel.jax, "local_device_count", lambda: 1)
    assert train(1) == 1
