"""A model folder gives back what was put in, or says in one line what is wrong with it."""

import dataclasses
import json
import re
import shutil

import chex
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from advtransfer import storage
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


def test_a_model_prints_as_a_line(model):
    names = tuple(f"class {i}" for i in range(1000))
    spec = dataclasses.replace(model.spec, num_classes=1000, class_names=names)
    text = repr(spec)
    assert "architecture='resnet_tiny', num_classes=1000, image_size=16" in text
    assert "norm='l2', eps=0.5, class_names=('class 0', 'class 1', 'class 2', … 997 more)" in text
    assert "provenance={seed, recipe}" in text
    assert repr(model._replace(spec=spec)).endswith(f" parameters, {text})")
    assert len(text) < 400 and "\n" not in text


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
    with pytest.raises(ValueError, match="not a model folder, so it is not overwritten"):
        save_model(model, tmp_path, overwrite=True)
    assert (tmp_path / "thesis").exists()


def test_a_failed_save_leaves_the_old_model(model, folder):
    broken = model._replace(spec=ModelSpec(**{**vars(model.spec), "provenance": {"x": object()}}))
    with pytest.raises(TypeError):
        save_model(broken, folder, overwrite=True)
    assert load_model(folder).spec.eps == 0.5


def _edit(folder, **changes):
    """As in a folder of format 1, whose description has no hash of its own."""
    path = folder / "model.json"
    fields = json.loads(path.read_text()) | {"format": 1} | changes
    fields.pop("description_sha256", None)
    path.write_text(json.dumps(fields))


def one_line(message, call, *args):
    with pytest.raises(ValueError, match=message) as error:
        call(*args)
    assert "\n" not in str(error.value)


def test_no_model_folder(tmp_path):
    one_line("not a model folder: it has no model.json", load_model, tmp_path)


def test_a_folder_that_holds_models_names_them(model, tmp_path):
    for place in ("study/sources/natural/model", "family/l2/model"):
        save_model(model, tmp_path / place)
    one_line(
        r"no model.json; there are models in it: .*/sources/natural/model$", load_model, tmp_path / "study"
    )
    one_line(r"there are models in it: .*family/l2/model$", load_model, tmp_path / "family")
    one_line("is not a model folder: it does not exist$", load_model, tmp_path / "nowhere")


def test_corrupt_json(folder):
    (folder / "model.json").write_text('{"format": 1,')
    one_line("is not a model description", load_model, folder)


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"format": 1, "sha256": ""}', '{"format": 2}', '{"format": 3}', "[" * 10**5]
)
def test_json_of_something_else(folder, text):
    (folder / "model.json").write_text(text)
    one_line("is not a model description", load_model, folder)


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
    _edit(folder, num_classes=7, class_names=[])
    one_line(r"params/fc/bias has shape \(3,\), not \(7,\); params/fc/kernel", load_model, folder)


def test_folders_without_a_hash_of_the_description_are_read(model, folder):
    """The format before this one."""
    _edit(folder, mean=[0.5, 0.4, 0.25])
    assert load_model(folder).spec.mean == (0.5, 0.4, 0.25)


@pytest.mark.parametrize("change", [{"mean": [0.5, 0.4, 0.31]}, {"eps": 0.25}, {"provenance": {}}])
def test_a_description_that_was_changed_by_hand_is_refused(folder, change):
    path = folder / "model.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields))  # in another layout
    load_model(folder)
    path.write_text(json.dumps(fields | change))
    one_line(
        "it was changed since it was written; to change what it says, save the model anew", load_model, folder
    )


NAN = float("nan")
WRONG = {
    "architecture": ([1], None, 3),
    "num_classes": (-1, 0, "3", 3.0, True, 10**9),
    "image_size": ("16", 1.5, 0, 8193, None),
    "mean": ([0.5, 0.5], 0.5, [0.5, 0.5, "0.5"], [125.3, 123.0, 113.9], [NAN] * 3, [-0.1, 0.5, 0.5]),
    "std": ([0, 0, 0], [-1, 1, 1], [NAN] * 3, [63.0, 62.1, 66.7], "abc"),
    "norm": ("L2", "<script>", None, [], "none"),
    "eps": (None, "0.25", NAN, 0, -1, float("inf"), True),
    "class_names": (["a"], [1, 2, 3], "abc", ["a", "b", "b"], None),
    "provenance": ([], None),
    "versions": ("1",),
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in WRONG.items() for value in values]
)
def test_a_field_that_cannot_be_is_named(model, folder, field, value, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the description's own check is tested
    _edit(folder, **{field: value})
    name = "eps" if (field, value) == ("norm", "none") else field
    one_line(f"model.json is not a model description: {name} is .*; expected ", load_model, folder)
    value = tuple(value) if type(value) is list else value
    with pytest.raises(ValueError, match=f"{name} is .*; expected "):
        save_model(
            model._replace(spec=dataclasses.replace(model.spec, **{field: value})), folder, overwrite=True
        )


def test_fields_at_their_limits(model, folder):
    _edit(folder, image_size=8192, mean=[0, 0, 1], std=[1, 1, 1e-3], norm="none", eps=0, class_names=[])
    assert load_model(folder).spec.image_size == 8192


def test_natural_networks_have_no_radius(folder):
    _edit(folder, norm="none")
    one_line("eps is 0.5; expected 0, as norm is none", load_model, folder)


def _with(model, name, change):
    """The model with one leaf changed."""
    return model._replace(
        variables=jax.tree_util.tree_map_with_path(
            lambda path, x: (
                change(x) if jax.tree_util.keystr(path, simple=True, separator="/") == name else x
            ),
            model.variables,
        )
    )


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "params/fc/kernel",
            lambda x: x.at[0, 0].set(jnp.nan),
            "params/fc/kernel holds values that are not finite",
        ),
        ("params/fc/bias", lambda x: x.at[1].set(jnp.inf), "params/fc/bias holds values that are not finite"),
        ("batch_stats/bn1/var", lambda x: x.at[0].set(-1e-9), "batch_stats/bn1/var holds negative variances"),
    ],
)
def test_weights_that_no_network_has_are_neither_saved_nor_loaded(model, folder, name, change, message):
    odd = _with(model, name, change)
    one_line(message, save_model, odd, folder.parent / "other")
    assert not (folder.parent / "other").exists()
    shutil.rmtree(folder / "variables")
    arrays = jax.tree.map(np.asarray, odd.variables)
    storage.save_tree(folder / "variables", arrays)
    _edit(folder, sha256=digest(arrays))
    one_line(message, load_model, folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: np.zeros(400_000_000, np.float32), r"params/fc/bias has shape \(400000000,\), not \(3,\)"),
        (lambda x: x.astype(np.int32), "params/fc/bias is int32, not float32"),
        (lambda x: x.astype(np.complex64), "params/fc/bias is complex64, not float32"),
    ],
)
def test_arrays_of_another_kind_are_refused_before_they_are_read(model, folder, monkeypatch, change, message):
    odd = jax.tree.map(np.asarray, _with(model, "params/fc/bias", lambda x: change(np.asarray(x))).variables)
    shutil.rmtree(folder / "variables")
    storage.save_tree(folder / "variables", odd)
    monkeypatch.setattr(storage, "load_tree", None)
    one_line(message, load_model, folder)


@pytest.mark.parametrize(
    "name", ["run[seed=0]", "hidden=[256, 256]/model", "a[!b]", "{x}", "q?", "star*", "a:b"]
)
def test_folders_of_any_name(model, tmp_path, name):
    for _ in range(2):  # the second in the place of the first
        save_model(model, tmp_path / name, overwrite=True)
    chex.assert_trees_all_equal(load_model(tmp_path / name).variables, model.variables)


@pytest.mark.parametrize("shape", [(24, 24), (12, 12), (20, 30)])
def test_images_of_another_size_are_seen_at_the_model_s(model, shape):
    images = np.random.default_rng(0).random((2, *shape, 3)).astype(np.float32)
    small = np.asarray(jax.image.resize(images, (2, 16, 16, 3), "linear", antialias=True))
    found = logits_fn(model)(images)
    np.testing.assert_allclose(found, model.module.apply(model.variables, small), atol=1e-5)
    assert float(jnp.abs(found - model.module.apply(model.variables, images)).max()) > 1e-3
