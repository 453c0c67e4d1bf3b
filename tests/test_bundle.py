"""A model folder gives back what was put in, or says in one line what is wrong with it."""

import json
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advtransfer.models import (
    Model,
    ModelSpec,
    create_module,
    digest,
    init_variables,
    load_model,
    logits_fn,
    save_model,
)

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


@pytest.fixture(scope="module")
def model():
    module = create_module("resnet_tiny", num_classes=3, mean=MEAN, std=STD)
    spec = ModelSpec(
        architecture="resnet_tiny",
        num_classes=3,
        image_size=16,
        mean=MEAN,
        std=STD,
        norm="l2",
        eps=0.5,
        class_names=("a", "b", "c"),
        provenance={"seed": 3, "recipe": {"epochs": 2}},
    )
    return Model(module, init_variables(module, jax.random.key(0), 16), spec)


@pytest.fixture
def folder(model, tmp_path):
    save_model(model, tmp_path / "model")
    return tmp_path / "model"


def test_round_trip(model, folder):
    loaded = load_model(folder)
    chex.assert_trees_all_equal(loaded.variables, model.variables)
    assert loaded.module == model.module
    assert loaded.spec.versions["jax"] == jax.__version__
    assert {**vars(loaded.spec), "versions": {}} == vars(model.spec)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_compute_type_is_the_callers(model, folder):
    loaded = load_model(folder, dtype=jnp.bfloat16)
    assert loaded.module.dtype == jnp.bfloat16
    chex.assert_trees_all_equal(loaded.variables, model.variables)


def test_logits_fn_is_a_pytree_and_equal_models_share_a_program(model, folder):
    images = np.random.default_rng(0).random((2, 16, 16, 3), np.float32)
    traces = []

    @jax.jit
    def run(network, images):
        traces.append(1)
        return network(images)

    got = run(logits_fn(model), images)
    again = run(logits_fn(load_model(folder)), images)
    np.testing.assert_array_equal(got, again)
    np.testing.assert_allclose(got, jax.jit(model.module.apply)(model.variables, images), atol=1e-5)
    assert len(traces) == 1
    leaves = jax.tree.leaves(logits_fn(model))
    assert sum(leaf.size for leaf in leaves) == sum(leaf.size for leaf in jax.tree.leaves(model.variables))


def test_digest_sees_every_weight(model):
    changed = jax.tree.map(jnp.copy, model.variables)
    changed["params"]["fc"]["bias"] = changed["params"]["fc"]["bias"].at[0].add(1e-6)
    assert digest(changed) != digest(model.variables)
    assert digest(jax.device_get(model.variables)) == digest(model.variables)


def test_overwriting_is_asked_for(model, folder):
    with pytest.raises(ValueError, match="exists already.*overwrite=True"):
        save_model(model, folder)
    other = model._replace(spec=ModelSpec(**{**vars(model.spec), "eps": 1.0}))
    save_model(other, folder, overwrite=True)
    assert load_model(folder).spec.eps == 1.0
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_what_is_no_model_is_never_overwritten(model, tmp_path):
    (tmp_path / "thesis").write_text("years of work")
    with pytest.raises(ValueError, match="no model folder and is not overwritten"):
        save_model(model, tmp_path, overwrite=True)
    assert (tmp_path / "thesis").exists()


def test_a_failed_save_leaves_the_old_model(model, folder):
    broken = model._replace(spec=ModelSpec(**{**vars(model.spec), "provenance": {"x": object()}}))
    with pytest.raises(TypeError):
        save_model(broken, folder, overwrite=True)
    assert load_model(folder).spec.eps == 0.5


def _edit(folder, **changes):
    path = folder / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def one_line(message, call, *args):
    with pytest.raises(ValueError, match=message) as error:
        call(*args)
    assert "\n" not in str(error.value)


def test_no_model_folder(tmp_path):
    one_line("no model folder: it has no model.json", load_model, tmp_path)


def test_corrupt_json(folder):
    (folder / "model.json").write_text('{"format": 1,')
    one_line("is no model description", load_model, folder)


@pytest.mark.parametrize("text", ["[]", "{}", '{"format": 1, "sha256": ""}', '{"format": 2}'])
def test_json_of_something_else(folder, text):
    (folder / "model.json").write_text(text)
    one_line("is no model description", load_model, folder)


def test_unknown_architecture(folder):
    _edit(folder, architecture="resnet51")
    one_line("unknown architecture 'resnet51'; nearest: resnet50", load_model, folder)


def test_weights_gone(folder):
    (folder / "variables").rename(folder / "elsewhere")
    one_line("cannot be read", load_model, folder)


def test_another_model_s_weights(model, folder):
    other = load_model(folder)
    with pytest.raises(ValueError, match="damaged"):
        _edit(folder, sha256="0" * 64)
        load_model(folder)
    params = dict(other.variables["params"])
    params["head"] = params.pop("fc")
    save_model(other._replace(variables={**other.variables, "params": params}), folder, overwrite=True)
    with pytest.raises(ValueError) as error:
        load_model(folder)
    missing = re.findall(r"missing (\S+?)(?:;|$)", str(error.value))
    unexpected = re.findall(r"unexpected (\S+?)(?:;|$)", str(error.value))
    assert missing == ["params/fc/bias", "params/fc/kernel"]
    assert unexpected == ["params/head/bias", "params/head/kernel"]


def test_another_size_of_head(folder):
    _edit(folder, num_classes=7)
    one_line(r"params/fc/bias has shape \(3,\), not \(7,\); params/fc/kernel", load_model, folder)
