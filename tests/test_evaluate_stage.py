"""stage=evaluate with several models, curves and AutoAttack, on tiny networks; and what it refuses."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pages import read_csv, read_page

from advtransfer import attacks, robustness, tasks
from advtransfer import config as base
from advtransfer.analysis.head_bound import head_bound
from advtransfer.attacks import RobustnessWarning, pgd
from advtransfer.config import ConfigError, read
from advtransfer.data import load_dataset, to_float
from advtransfer.evaluate import Evaluation
from advtransfer.models import Model, ModelSpec, create_module, init_variables, load_model, save_model
from advtransfer.robustness import Curves, measure_robustness, probed
from advtransfer.tasks import evaluate as stage

pytestmark = pytest.mark.usefixtures("two_blocks", "unoptimised")


def blank(folder, size=8, seed=0, norm="none", **spec):
    module = create_module("resnet_tiny", num_classes=10)
    spec = ModelSpec("resnet_tiny", 10, size, module.mean, module.std, norm, 0.5 * (norm != "none"), **spec)
    save_model(Model(module, init_variables(module, jax.random.key(seed), size), spec), folder)
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two sources of two sizes, and a network that one of them was fine-tuned to."""
    root = tmp_path_factory.mktemp("models")
    sources = [blank(root / "small"), blank(root / "large", size=12, seed=1, norm="l2")]
    config = base.default()
    config.stage, config.source = "transfer", sources[1]
    config.transfer.update(num_train_images=30, batch_size=10, num_epochs=3, evaluate_epochs=(3,))
    tasks.run(config, root / "tuned")
    return [*sources, str(root / "tuned" / "model")]


def configured(models, **evaluate):
    config = base.default()
    config.stage = "evaluate"
    config.evaluate.update(model=",".join(models), dataset="builtin:digits", num_images=40, batch_size=16)
    config.evaluate.update(num_steps=2, eps=0.1, step_ratio=1.0, **evaluate)
    return config


def test_several_models_stand_side_by_side(models, tmp_path, capsys):
    """Each at its own size, with the numbers of `measure_robustness`; again, nothing is measured."""
    config = configured(models, l2_epsilons=(0.05,), linf_epsilons=(0.02, 0.01))
    plan = tasks.plan(config, tmp_path / "out")
    steps = 40 * (4 * 2 + 2 * (2 + 1 + 2) + 2)  # four radii; in two norms all steps, one, large ε; features
    assert plan == (
        "evaluate 3 models (resnet_tiny) on 40 images of builtin:digits, 1 × PGD-2 at 2 ε of l2 and 2 ε of "
        f"linf: at most {steps} images × steps a model"
    )
    assert not (tmp_path / "out").exists()
    tasks.run(config, tmp_path / "out")
    said = capsys.readouterr().out
    rows = read_csv(tmp_path / "out/evaluation.csv")
    assert list(dict.fromkeys(r["model"] for r in rows)) == ["small", "large", "tuned"]
    options = read(config)
    for name, folder in zip(("small", "large", "tuned"), models, strict=True):
        model = load_model(folder)
        split = load_dataset("builtin:digits", image_size=model.spec.image_size, enlarge=False).test
        expected = measure_robustness(model, split, options.evaluation, options.curves).rows
        own = [r for r in rows if r["model"] == name]
        assert [float(r["accuracy"]) for r in own] == [r["accuracy"] for r in expected]
        assert [(r["norm"], float(r["eps"]), r["attack"]) for r in own] == [
            (r["norm"], r["eps"], r["attack"]) for r in expected
        ]
    page = read_page(tmp_path / "out/report.html")
    assert "from ℓ2 (ε = 0.5)" in page.text and "Accuracy and robustness" in page.text
    assert len(page.images) == 3 and str(tmp_path / "out/report.html") in said
    assert not (tmp_path / "out/evaluation.json").exists()
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "measure_robustness", lambda *_, **__: pytest.fail("measured again"))
        tasks.run(config, tmp_path / "out")
    assert {path: path.read_bytes() for path in before} == before


def test_the_heads_bounds_are_of_the_images_whose_losses_were_measured(models, tmp_path):
    config = configured(models[2:], l2_epsilons=(0.05,))
    tasks.run(config, tmp_path / "out")
    (found,) = read_csv(tmp_path / "out/head_bound.csv")
    model = load_model(models[2])
    split = load_dataset("builtin:digits", image_size=12, enlarge=False).test
    chosen = probed(type(split)(*(x[:40] for x in split)), 0)
    images = to_float(jnp.asarray(chosen.images), 12)
    features = np.asarray(model.module.apply(model.variables, images, stop=model.module.num_blocks))
    head = {name: np.asarray(x) for name, x in model.variables["params"]["fc"].items()}
    at = lambda s: head_bound(features, chosen.labels, **head, sensitivity=np.full(40, s))  # noqa: E731
    assert float(found["loss"]) == pytest.approx(at(0.0).loss.mean(), rel=1e-4)
    assert found["num_images"] == "40" and (found["norm"], float(found["eps"])) == ("l2", 0.1)
    logits_fn = lambda x: model.module.apply(model.variables, x)  # noqa: E731
    attacked = pgd(logits_fn, images, chosen.labels, attacks.L2(0.1), num_steps=2, step_size=0.1)
    losses = np.asarray(attacks.cross_entropy(logits_fn(attacked), jnp.asarray(chosen.labels)))
    assert float(found["attacked_loss"]) == pytest.approx(losses.mean(), rel=1e-3)
    moved = np.asarray(model.module.apply(model.variables, attacked, stop=model.module.num_blocks)) - features
    assert float(found["sensitivity"]) > 0.8 * np.linalg.norm(moved, axis=1).mean() > 0
    assert float(found["loss"]) < float(found["sharp_bound"]) <= float(found["bound"])


def test_autoattack_is_shown_and_its_flags_are_told(models, tmp_path, monkeypatch):
    def auto_attack(logits_fn, images, labels, threat_model, *, version, key, batch_size):
        assert (images.shape, threat_model, version, batch_size) == (
            (40, 8, 8, 3),
            attacks.L2(0.1),
            "plus",
            16,
        )
        names = ("clean", "apgd-ce", "square")
        flag = RobustnessWarning("dlr", "It flags.", "AutoAttack’s flags")
        return types.SimpleNamespace(
            accuracy=dict(zip(names, (0.2, 0.1, 0.05), strict=True)), warnings=(flag,)
        )

    monkeypatch.setattr(robustness, "auto_attack", auto_attack)
    config = configured(models[:1], auto_attack="plus")
    plan = tasks.plan(config, tmp_path / "out")
    assert plan.startswith("evaluate 1 model (") and plan.endswith("a model, then AutoAttack (plus)")
    tasks.run(config, tmp_path / "out")
    page = read_page(tmp_path / "out/report.html")
    assert "AutoAttack (plus) leaves small 5.0 %." in page.text
    assert "small: It flags. (AutoAttack’s flags)" in page.text


def test_one_model_without_curves_is_measured_as_ever(models, tmp_path):
    tasks.run(configured(models[:1]), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "evaluation.json"]
    found = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert {*found} == {
        *("model", "dataset", "data", "num_images", "attack"),
        *(f"natural_{x}" for x in ("accuracy", "loss", "mean_per_class_accuracy")),
        *(f"adversarial_{x}" for x in ("accuracy", "loss", "mean_per_class_accuracy", "unmoved")),
    }


def test_several_models_without_an_attack_are_compared_by_natural_accuracy(models, tmp_path):
    config = configured(models[:2], norm="none")
    assert "images of builtin:digits: at most 0 images × steps" in tasks.plan(config, tmp_path / "out")
    tasks.run(config, tmp_path / "out")
    assert [r["attack"] for r in read_csv(tmp_path / "out/evaluation.csv")] == ["none", "none"]
    assert not (tmp_path / "out/head_bound.csv").exists()


def test_a_workdir_of_other_radii_is_refused(models, tmp_path):
    config = configured(models[:1], l2_epsilons=(0.05,))
    tasks.run(config, tmp_path / "out")
    config.evaluate.l2_epsilons = (0.07,)
    with pytest.raises(ConfigError, match="holds the results of another config .*evaluate.l2_epsilons"):
        tasks.run(config, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": " , "}, "config.evaluate.model: name a model: a folder"),
        ({"model": "SMALL,/nowhere"}, "config.evaluate.model: '/nowhere' is not a model folder"),
        ({"model": "SMALL,SMALL"}, "config.evaluate.model: two models are called 'small'"),
        ({"model": "SMALL,HEADLESS"}, "config.evaluate.model: this model was imported without a head"),
        ({"l2_epsilons": (0.1, -0.1)}, "config.evaluate.l2_epsilons=(0.1, -0.1) must be"),
        (
            {"linf_epsilons": (8.0,)},
            "config.evaluate.linf_epsilons=(8.0,) must be a tuple of numbers from 0 to",
        ),
        ({"norm": "linf", "eps": 8.0}, "config.evaluate.eps=8 of norm=linf allows every image, as pixels"),
        (
            {"norm": "none", "l2_epsilons": (0.1,)},
            "config.evaluate: norm=none measures natural accuracy alone",
        ),
        (
            {"eps": 0.0, "auto_attack": "standard"},
            "config.evaluate: eps=0 leaves auto_attack=standard nothing",
        ),
        ({"auto_attack": "rand"}, "config.evaluate.auto_attack='rand' must be one of none, standard, plus"),
        ({"dataset": "builtin:glyphs"}, "config.evaluate.dataset: "),
    ],
)
def test_what_cannot_be_is_one_line(models, tmp_path, change, message):
    headless = blank(tmp_path / "headless", provenance={"head": "new"})
    config = configured(models[:2], l2_epsilons=(0.05,))
    config.evaluate.update(change)
    config.evaluate.model = config.evaluate.model.replace("SMALL", models[0]).replace("HEADLESS", headless)
    with pytest.raises(ConfigError) as error:
        tasks.run(config, tmp_path / "out")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_curves_are_for_this_stage(models, tmp_path):
    config = configured(models[:1], auto_attack="standard")
    config.stage = "study"
    with pytest.raises(ConfigError, match="config.evaluate.auto_attack is for config.stage=evaluate"):
        tasks.run(config, tmp_path / "out")


def test_several_processes_are_refused(models, tmp_path, monkeypatch):
    monkeypatch.setattr("advtransfer.parallel.num_processes", lambda: 2)
    with pytest.raises(ConfigError, match="several models, curves and AutoAttack run in one process"):
        tasks.plan(configured(models[:2]), tmp_path / "out")


def test_the_radius_of_the_attack_is_on_its_curve():
    evaluation = Evaluation(norm="l2", eps=0.3)
    curves = Curves(l2_epsilons=(1, 0.2, 0), linf_epsilons=(0.1,))
    assert curves.radii(evaluation) == {"l2": [0.2, 0.3, 1.0], "linf": [0.1]}
    assert Curves().radii(dataclasses.replace(evaluation, norm="none")) == {}
