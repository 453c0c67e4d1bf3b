"""stage=interpret: the numbers it leaves against the functions and loops over what they give."""

import csv
import re
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from advtransfer import config as base
from advtransfer import stages
from advtransfer.analysis import cue_conflict, influence, matches, saliency
from advtransfer.analysis.imagenet16 import IMAGENET16
from advtransfer.config import ConfigError
from advtransfer.data import LETTERS, Split, load_dataset, subset_indices
from advtransfer.models import (
    Model,
    ModelSpec,
    create_module,
    init_variables,
    load_model,
    logits_fn,
    save_model,
)
from advtransfer.models.resnet import ARCHITECTURES
from advtransfer.stages.explain_pixels import owns_classes
from advtransfer.stages.interpret import study_sections
from advtransfer.study import make_recipe
from advtransfer.transfer import fine_tune_one, normalised_by

pytestmark = pytest.mark.usefixtures("unoptimised")

DIGITS = tuple("0123456789")
OWN, LETTER = "natural", "ℓ2 (ε = 0.25)"


@pytest.fixture(scope="module", autouse=True)
def one_block():
    """A network that compiles fast."""
    with pytest.MonkeyPatch.context() as patch:
        network = {"stage_sizes": (1,), "bottleneck": False, "cifar_stem": True, "width": 8}
        patch.setitem(ARCHITECTURES, "one_block", network)
        yield


def _save(folder, names, norm, eps, size=16, num_classes=0):
    mean, number = (0.5,) * 3, num_classes or len(names)
    module = create_module("one_block", num_classes=number, mean=mean, std=mean)
    variables = init_variables(module, jax.random.key(number), size)
    spec = ModelSpec("one_block", number, size, mean, mean, norm, eps, names)
    save_model(Model(module, variables, spec), folder / "model")
    return str(folder)


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    return [
        _save(folder / "digits", DIGITS, "none", 0.0),
        _save(folder / "letters", tuple(LETTERS), "l2", 0.25),
    ]


def _config(networks, **settings):
    config = base.default()
    config.stage, config.models, config.data = "interpret", ",".join(networks), "builtin:digits"
    config.transfer.update(batch_size=10, num_epochs=2, evaluate_epochs=(2,))
    config.interpret.update(num_images=3, num_measured=5, smooth_samples=2, integration_steps=4)
    config.interpret.update(num_steps=3, num_train=30, num_queries=12)
    config.interpret.update(settings)
    return config


@pytest.fixture(scope="module")
def done(networks, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("interpret")
    stages.run(_config(networks), workdir)
    return workdir


def _csv(path, **wanted):
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def _column(rows, name):
    return np.array([float(row[name]) for row in rows])


def _data():
    return load_dataset("builtin:digits", image_size=16)


def _drawn(split, number):
    part = getattr(_data(), split)
    chosen = subset_indices(part.labels, number, dataset="builtin:digits", seed=0)
    return chosen, Split(part.images[chosen], part.labels[chosen])


@pytest.mark.parametrize(("place", "label"), [(0, OWN), (1, LETTER)])
def test_saliency_is_of_the_label_or_of_what_a_foreign_network_reads(done, networks, place, label):
    chosen, part = _drawn("test", 5)
    network = logits_fn(load_model(networks[place]))
    images = np.float32(part.images) / np.float32(255)
    predicted = np.argmax(network(images), axis=1)
    values = saliency.gradients(network, images, part.labels if label == OWN else predicted)
    rows = _csv(done / "saliency.csv", model=label)
    assert [int(row["index"]) for row in rows] == chosen.tolist()
    assert [row["label"] for row in rows] == [DIGITS[i] for i in part.labels]
    assert [row["predicted"] for row in rows] == [(DIGITS, LETTERS)[place][i] for i in predicted]
    shares = saliency.low_frequency_share(values)
    np.testing.assert_allclose(_column(rows, "low_frequency_share"), shares, rtol=1e-4)
    np.testing.assert_allclose(_column(rows, "alignment"), saliency.alignment(values, images), rtol=1e-3)
    assert [bool(row["completeness_error"]) for row in rows] == [True] * 3 + [False] * 2
    assert "difference" in (done / "report.html").read_text()


def _scores(model, queries):
    """Those of the first 30 training images, from features that the network is asked for directly."""
    _, train = _drawn("train", 30)

    def features(images):
        return model.module.apply(model.variables, images / np.float32(255), stop=1)

    head = model.variables["params"]["fc"]
    return train, influence.last_layer_scores(
        features(train.images),
        train.labels,
        features(queries.images),
        queries.labels,
        head["kernel"],
        head["bias"],
        tell=lambda line: None,
    )


def test_influence_of_the_networks_own_head(done, networks):
    indices, queries = _drawn("test", 12)
    train, scores = _scores(load_model(networks[0]), queries)
    chosen = _drawn("train", 30)[0]
    for kind, sign in (("helpful", -1), ("harmful", 1)):
        rows = _csv(done / "influence.csv", model=OWN, kind=kind)
        ranked = np.argsort(sign * scores, axis=1, kind="stable")[:, :5]
        assert [int(row["train_index"]) for row in rows] == chosen[ranked].ravel().tolist()
        assert [int(row["query"]) for row in rows] == np.repeat(indices, 5).tolist()
        assert [row["train_label"] for row in rows] == [DIGITS[i] for i in train.labels[ranked].ravel()]
        found = np.take_along_axis(scores, ranked, axis=1).ravel()
        np.testing.assert_allclose(_column(rows, "score"), found, rtol=1e-3, atol=1e-6 * np.abs(scores).max())
    cells = _csv(done / "influence_classes.csv", model=OWN, query_class="3", train_class="7")
    mean = scores[np.ix_(queries.labels == 3, train.labels == 7)].mean()
    np.testing.assert_allclose(_column(cells, "mean_score"), [mean], rtol=1e-3)


def test_match_rates_of_a_head_trained_for_a_foreign_network(done, networks):
    _, train = _drawn("train", 30)
    config, source = _config(networks), load_model(networks[1])
    recipe = make_recipe(config.transfer, train.images, 30)
    model, _ = fine_tune_one(source, train, None, key=jax.random.key(0), class_names=DIGITS, recipe=recipe)
    for kind, queries in (("test", _drawn("test", 12)[1]), ("train", train)):
        _, scores = _scores(model, queries)
        if kind == "train":
            np.fill_diagonal(scores, -np.inf)
        rows = _csv(done / "matches.csv", model=LETTER, queries=kind)
        assert [int(row["rank"]) for row in rows] == list(range(1, 31 - (kind == "train")))
        order = np.argsort(-scores, axis=1, kind="stable")[:, : len(rows)]
        rates = [np.mean(train.labels[order[:, r]] == queries.labels) for r in range(len(rows))]
        np.testing.assert_allclose(_column(rows, "match_rate"), rates, atol=1e-12)


def test_harmful_images_are_named_by_their_place_in_the_dataset(done, networks):
    chosen, train = _drawn("train", 30)
    _, scores = _scores(load_model(networks[0]), train)
    table = matches.harmful_table(scores, train.labels, exclude_self=True)
    rows = _csv(done / "harmful.csv", model=OWN)
    assert [int(row["index"]) for row in rows] == chosen[table["index"]].tolist()
    np.testing.assert_allclose(_column(rows, "harm"), table["harm"], rtol=1e-3, atol=1e-6)
    labels = _data().train.labels
    assert [row["label"] for row in rows] == [DIGITS[labels[int(row["index"])]] for row in rows]


def test_influence_of_two_training_images_on_one_query(networks, tmp_path):
    config = _config(networks[:1], analyses=("influence",), num_queries=1, num_train=2)
    stages.run(config, tmp_path)
    for kind in ("helpful", "harmful"):
        rows = _csv(tmp_path / "influence.csv", kind=kind)
        assert [int(row["rank"]) for row in rows] == [1, 2] and len({row["train_index"] for row in rows}) == 2
    assert "1 images of" in (tmp_path / "report.html").read_text()


def test_visualisation_starts_at_what_the_start_gives_and_climbs(done, networks):
    model = load_model(networks[0])
    images = np.float32(_drawn("test", 3)[1].images) / np.float32(255)
    logits, features = (model.module.apply(model.variables, images, stop=stop) for stop in (None, 1))
    rows = _csv(done / "visualisation.csv", model=OWN, kind="class", start="image")
    assert [row["what"] for row in rows] == ["0", "1", "2"]
    np.testing.assert_allclose(_column(rows, "before"), np.diagonal(logits), rtol=1e-4, atol=1e-5)
    rows = _csv(done / "visualisation.csv", model=OWN, kind="unit", start="image")
    assert [row["what"] for row in rows] == ["unit 0", "unit 4", "unit 7"]  # of 8, spread evenly
    np.testing.assert_allclose(_column(rows, "before"), features[np.arange(3), [0, 4, 7]], rtol=1e-4)
    rows = _csv(done / "visualisation.csv")
    assert len(rows) == 2 * (2 * 2 + 1) * 3
    for row in rows:
        gain = float(row["after"]) - float(row["before"])
        assert gain < 0 if row["kind"] == "inversion" else gain > 0


def test_shape_bias_counts_answers(done, networks):
    conflict = cue_conflict.glyph_cue_conflict(0.06, 0.3)
    logits = logits_fn(load_model(networks[1]))(np.float32(conflict.images) / np.float32(255))
    answers = np.array(list(LETTERS))[np.argmax(logits, axis=1)]
    shape, texture = (answers == conflict.shapes).sum(), (answers == conflict.textures).sum()
    (row,) = _csv(done / "shape.csv", model=LETTER, amplitude="0.06", opacity="0.3", **{"class": ""})
    assert float(row["shape"]) == shape / len(answers)
    assert float(row["texture"]) == texture / len(answers)
    np.testing.assert_allclose(float(row["shape_bias"]), shape / (shape + texture))
    for letter in (LETTERS[0], LETTERS[-1]):
        (row,) = _csv(done / "shape.csv", model=LETTER, amplitude="0.06", opacity="0.3", **{"class": letter})
        of_letter = (conflict.shapes == letter) & (conflict.textures != letter)
        assert float(row["shape"]) == pytest.approx(np.mean(answers[of_letter] == letter))
        assert float(row["shape_low95"]) <= float(row["shape"]) <= float(row["shape_high95"])
    assert not _csv(done / "shape.csv", model=OWN)  # it reads no letters


def test_shape_bias_of_a_thousand_classes_on_images_of_a_folder(tmp_path):
    """Files named after what the network answers: of three it is twice the shape and once the texture."""
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    folder = _save(tmp_path / "imagenet", (), "none", 0.0, num_classes=1000)
    logits = np.float64(logits_fn(load_model(folder))(images / np.float32(255)))
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    means = np.stack([shares[:, list(outputs)].mean(axis=1) for outputs in IMAGENET16.values()], axis=1)
    answers = np.array(list(IMAGENET16))[means.argmax(axis=1)].tolist()
    one, other = [name for name in IMAGENET16 if name not in answers][:2]
    names = [(answers[0], one), (answers[1], other), (one, answers[2]), (other, other)]
    (tmp_path / "cues").mkdir()
    for i, (image, (shape, texture)) in enumerate(zip(images, names, strict=True)):
        Image.fromarray(image).save(tmp_path / "cues" / f"{shape}{i}-{texture}{i}.png")
    config = _config([folder], analyses=("shape",), cue_conflict=str(tmp_path / "cues"))
    config.cache_dir = str(tmp_path / "cache")
    stages.run(config, tmp_path / "out")
    (row,) = _csv(tmp_path / "out" / "shape.csv", **{"class": ""})
    found = [float(row[name]) for name in ("shape_bias", "shape", "texture")]
    assert found == pytest.approx([2 / 3, 2 / 3, 1 / 3])
    classes = [row["class"] for row in _csv(tmp_path / "out" / "shape.csv")]
    assert classes == ["", *sorted({answers[0], answers[1], one})]
    assert "on 3 cue-conflict images" in (tmp_path / "out" / "report.html").read_text()


def _files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _computed(capsys):
    """The analyses that say how long they took."""
    return set(re.findall(r"^(\w+): [\d.]+ s$", capsys.readouterr().out, re.MULTILINE))


def test_a_plan_leaves_nothing(networks, tmp_path):
    plan = stages.plan(_config(networks), tmp_path / "new")
    assert "a new head" in plan.splitlines()[-2] and "GB" in plan and not (tmp_path / "new").exists()


def test_the_same_command_again_computes_what_is_not_kept_whole(done, networks, tmp_path, capsys):
    again, found = tmp_path / "again", _files(done)
    shutil.copytree(done, again)
    stages.run(_config(networks), again)
    assert _computed(capsys) == set() and _files(again) == found
    (again / "sections" / "saliency.json").unlink()
    (again / "sections" / "shape.json").write_bytes(found["sections/shape.json"][:-20])
    (again / "report.html").unlink()
    stages.run(_config(networks), again)
    assert _computed(capsys) == {"saliency", "shape"} and _files(again) == found


def test_what_is_kept_is_of_the_same_question(networks, tmp_path, capsys):
    model = load_model(networks[0])
    save_model(model, tmp_path / "digits" / "model")
    models, one = [str(tmp_path / "digits"), networks[1]], {"analyses": ("saliency",)}
    stages.run(_config(models, **one), tmp_path / "out")
    first = _files(tmp_path / "out")
    assert _computed(capsys) == {"saliency"}
    stages.run(_config(models, **one, smooth_samples=3), tmp_path / "out")
    second = _files(tmp_path / "out")
    assert _computed(capsys) == {"saliency"} and second["report.html"] != first["report.html"]
    assert second["saliency.csv"] == first["saliency.csv"]  # of the gradient alone
    other = jax.tree.map(lambda x: 1.5 * x, model.variables)
    save_model(model._replace(variables=other), tmp_path / "digits" / "model", overwrite=True)
    stages.run(_config(models, **one, smooth_samples=3), tmp_path / "out")
    assert _computed(capsys) == {"saliency"}
    assert _files(tmp_path / "out")["saliency.csv"] != second["saliency.csv"]


def test_a_study_report_gets_the_most_telling_pictures(networks, tmp_path, capsys):
    config = _config(networks)
    config.report.analyses = ("shape", "influence")
    models = {"natural": load_model(networks[0]), "l2:0.25": load_model(networks[1])}
    sections = study_sections(config, models, _data(), models, _data(), tmp_path)
    assert [section.title for section in sections] == [
        "Shape against texture",
        "Influence of training images",
    ]
    assert set(sections[1].files) == {"influence.csv", "matches.csv"}
    assert _computed(capsys) == {"shape", "influence"}
    assert study_sections(config, models, _data(), models, _data(), tmp_path) == sections
    assert _computed(capsys) == set()
    # Trials that start from other networks: their heads, and the same shape bias.
    begun = models | {"natural": normalised_by(models["natural"], _data().train.images)}
    others = study_sections(config, models, _data(), begun, _data(), tmp_path)
    assert _computed(capsys) == {"influence"} and others[0] == sections[0]
    assert others[1] == study_sections(config, begun, _data(), begun, _data(), tmp_path / "begun")[1]
    assert others[1].files != sections[1].files
    config.report.analyses = ()
    assert study_sections(config, models, _data(), models, _data(), tmp_path) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"models": ""}, "config.models: name models"),
        ({"models": "/nowhere"}, "config.models: '/nowhere' is no model folder"),
        ({"data": ""}, "config.data: name a dataset"),
        ({"data": "builtin:digit"}, "did you mean builtin:digits"),
        ({"num_images": 798}, "config.interpret.num_images: 798 is too many: builtin:digits has 797 test"),
        ({"num_train": 801}, "config.interpret.num_train: 801 is too many"),
        ({"num_queries": 798}, "config.interpret.num_queries"),
        ({"analyses": ("saliencies",)}, "config.interpret.analyses"),
        ({"solver": "exact"}, "config.interpret.solver"),
        ({"cue_conflict": "/nowhere"}, "config.interpret.cue_conflict: /nowhere is no folder"),
    ],
)
def test_what_cannot_be_is_one_line(networks, tmp_path, change, said):
    config = _config(networks)
    for key, value in change.items():
        (config if key in config else config.interpret)[key] = value
    with pytest.raises(ConfigError) as error:
        stages.run(config, tmp_path / "new")
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


def test_networks_that_cannot_stand_side_by_side(networks, tmp_path):
    small = _save(tmp_path / "small", DIGITS, "none", 0.0, size=8)
    for models, said in (
        ([*networks, small], "8 and 16 pixels"),
        ([networks[0]] * 2, "two models are called"),
    ):
        with pytest.raises(ConfigError, match=said):
            stages.run(_config(models), tmp_path / "new")


def test_whose_classes_a_network_reads(networks):
    """By name, or by number where it has no names."""
    model = load_model(networks[0])
    for names, number, expected in (
        (DIGITS, 10, True),
        (tuple("abcdefghij"), 10, False),
        ((), 10, True),
        ((), 11, False),
    ):
        spec = ModelSpec(**{**vars(model.spec), "class_names": names, "num_classes": number})
        assert owns_classes(model._replace(spec=spec), _data()) is expected


def test_shape_is_not_measured_on_networks_of_other_classes(networks, tmp_path):
    config = _config(networks[:1], analyses=("shape",))
    stages.run(config, tmp_path)
    assert "Not measured: these networks read neither" in (tmp_path / "report.html").read_text()
    assert not (tmp_path / "shape.csv").exists()
