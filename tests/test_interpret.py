"""stage=interpret: the numbers it leaves against the functions and loops over what they give."""

import re
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from pages import read_csv
from PIL import Image
from scipy import stats

from advtransfer import config as base
from advtransfer import explain, tasks
from advtransfer.analysis import cue_conflict, influence, matches, saliency
from advtransfer.analysis import shape as cues
from advtransfer.analysis.imagenet16 import IMAGENET16
from advtransfer.config import ConfigError, read
from advtransfer.data import LETTERS, Split, load_dataset, subset_indices
from advtransfer.explain import Case, Subject, influence_cost, owns_classes
from advtransfer.explain.saliency import plus_minus, saliency_section
from advtransfer.explain.visualisation import Climbed, visualisation_section
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
from advtransfer.report.figures import styles
from advtransfer.report.kept import to_data
from advtransfer.report.render import draw, write_page
from advtransfer.report.sections import Page, Section, SourceInfo
from advtransfer.tasks import interpret
from advtransfer.tasks.interpret import study_sections
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
    config.interpret.update(num_steps=3, num_train=29, num_queries=12)
    config.interpret.update(settings)
    return config


@pytest.fixture(scope="module")
def shown(networks, tmp_path_factory):
    """A workdir, and the sections of its page before they became HTML."""
    workdir, sections = tmp_path_factory.mktemp("interpret"), {}

    def kept(section):
        sections[section.title] = section
        return to_data(section)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpret, "to_data", kept)
        tasks.run(_config(networks), workdir)
    return workdir, sections


@pytest.fixture(scope="module")
def done(shown):
    return shown[0]


@pytest.fixture(scope="module")
def parts(shown):
    """The parts of every section by its title."""
    return {title: section.parts for title, section in shown[1].items()}


def _csv(path, **wanted):
    return [row for row in read_csv(path) if wanted.items() <= row.items()]


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


def test_the_pictures_of_saliency_and_their_captions(done, parts, networks):
    (image, *groups), table = parts["Saliency"][0].groups, parts["Saliency"][1]
    part = _drawn("test", 3)[1]
    pixels, names = np.float32(part.images) / np.float32(255), [DIGITS[i] for i in part.labels]
    assert [row.head for row in image] == ["Image"] and image[0].labels == names
    np.testing.assert_allclose(image[0].images, pixels, atol=1e-6)
    for place, (label, group) in enumerate(zip((OWN, LETTER), groups, strict=True)):
        kinds = [f"{label}: {kind}" for kind in ("gradient", "SmoothGrad", "integrated")]
        assert [row.head for row in group] == kinds
        network = logits_fn(load_model(networks[place]))
        read = np.argmax(network(pixels), axis=1)
        shown = [(DIGITS, LETTERS)[place][i] for i in read]
        marked = [f"{'✓' if a == b else '✗'} {a}" for a, b in zip(shown, names, strict=True)]
        assert group[0].labels == (shown if place else marked)
        explained = read if place else part.labels
        options = {"key": jax.random.key(0), "num_samples": 2}
        smooth = saliency.smooth_grad(network, pixels, explained, **options)
        steps = {"num_steps": 4, "max_steps": 4}
        whole = saliency.integrated_gradients(network, pixels, explained, **steps)
        gradients = saliency.gradients(network, pixels, explained)
        for row, values in zip(group, (gradients, smooth, whole.attributions), strict=True):
            np.testing.assert_allclose(row.images, saliency.to_picture(values), atol=1e-3)
    caption, rows = parts["Saliency"][0].caption, _csv(done / "saliency.csv")
    worst = max(float(row["completeness_error"] or 0) for row in rows)
    for text in ("label (prediction for ℓ2 (ε = 0.25), which", "from black", f"error at most {worst:.1g}."):
        assert text in caption
    shares, cosines = (
        [_column(_csv(done / "saliency.csv", model=label), name) for label in (OWN, LETTER)]
        for name in ("low_frequency_share", "alignment")
    )
    expected = [[OWN, _interval(100 * shares[0], 1), "–", _interval(cosines[0], 3), "–"]]
    lead = (_interval(100 * (shares[1] - shares[0]), 1, "+"), _interval(cosines[1] - cosines[0], 3, "+"))
    expected += [[LETTER, _interval(100 * shares[1], 1), lead[0], _interval(cosines[1], 3), lead[1]]]
    assert table.rows == expected
    grid = [min(i, 16 - i) ** 2 + min(j, 16 - j) ** 2 for i in range(16) for j in range(16)]
    white = 100 * np.mean(np.array(grid) <= 2**2)  # a quarter of the Nyquist frequency, 8
    assert "of 5 images" in table.caption and f"white noise: {white:.1f} %" in table.caption


def _interval(values, digits, sign=""):
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    text = f"{np.mean(values):{sign}.{digits}f}".replace("-", "−")
    return f"{text} ± {(high - low) / 2:.{digits}f}"


def test_one_image_has_no_interval():
    assert plus_minus(np.array([-1.25]), 1) == "−1.2" and plus_minus(np.array([1.0]), 2, sign="+") == "+1.00"
    assert plus_minus(np.array([1.0, 3.0]), 1) == "2.0 ± 12.7"


def _case(networks, order, norms, **changes):
    """Networks at these places, with these norms in their descriptions."""
    looks = styles(SourceInfo(norm, norm, 0.0 if norm == "none" else 0.5) for norm in norms)
    models = [load_model(networks[place]) for place in order]
    subjects = []
    for norm, model in zip(norms, models, strict=True):
        spec = ModelSpec(**{**vars(model.spec), "norm": norm})
        subjects.append(Subject(looks[norm], model._replace(spec=spec)))
    settings = replace(read(_config(networks)).interpretation, **changes)
    return Case(subjects, _data(), "test", settings, 0, brief=True)


@pytest.mark.parametrize(
    ("order", "norms", "whose"),
    [
        ((1, 0), ("l2", "none"), "of the label (prediction for ℓ2 (ε = 0.5), which have"),
        ((0, 0), ("l2", "linf"), "of the loss of the label with"),
        ((1, 1), ("l2", "linf"), "of the loss of the predicted class with"),
    ],
)
def test_saliency_in_brief_is_of_gradients_alone(networks, order, norms, whose):
    """Five images are shown, more than num_measured."""
    case = _case(networks, order, norms, num_images=5, num_measured=2)
    pictures, table = saliency_section(case).parts
    assert len(pictures.groups[0][0].images) == 5
    assert [[row.head for row in group] for group in pictures.groups[1:]] == [
        [f"{subject.label}: gradient"] for subject in case.subjects
    ]
    assert whose in pictures.caption and "SmoothGrad" not in pictures.caption
    base = "natural" if "none" in norms else "ℓ2 (ε = 0.5)"  # the natural one, or the first
    assert f"Differences: to {base}, paired" in table.caption
    assert [row[2] == "–" for row in table.rows] == [row[0] == base for row in table.rows]


def _scores(model, queries):
    """Those of the first 29 training images, from features that the network is asked for directly."""
    _, train = _drawn("train", 29)

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
    chosen = _drawn("train", 29)[0]
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
    _, train = _drawn("train", 29)
    config, source = _config(networks), load_model(networks[1])
    recipe = read(config).recipe
    model, _ = fine_tune_one(source, train, None, key=jax.random.key(0), class_names=DIGITS, recipe=recipe)
    for kind, queries in (("test", _drawn("test", 12)[1]), ("train", train)):
        _, scores = _scores(model, queries)
        if kind == "train":
            np.fill_diagonal(scores, -np.inf)
        rows = _csv(done / "matches.csv", model=LETTER, queries=kind.replace("train", "training images"))
        assert [int(row["rank"]) for row in rows] == list(range(1, 30 - (kind == "train")))
        order = np.argsort(-scores, axis=1, kind="stable")[:, : len(rows)]
        rates = [np.mean(train.labels[order[:, r]] == queries.labels) for r in range(len(rows))]
        np.testing.assert_allclose(_column(rows, "match_rate"), rates, atol=1e-12)


def test_the_pictures_and_tables_of_influence_and_their_captions(done, parts):
    pictures, curves, table, maps = parts["Influence of training images"]
    indices, queries = _drawn("test", 12)
    chosen, train = _drawn("train", 29)
    assert pictures.heads == ["Query", *(f"{k} {i}" for k in ("Helpful", "Harmful") for i in (1, 2, 3, 4))]
    assert len(pictures.groups) == 4 and [label for label, _ in maps.maps] == [OWN, LETTER]
    for place, group in enumerate(pictures.groups):
        for label, row in zip((OWN, LETTER), group, strict=True):
            listed = [
                int(found["train_index"])
                for kind in ("helpful", "harmful")
                for found in _csv(done / "influence.csv", model=label, kind=kind, query=str(indices[place]))
                if int(found["rank"]) <= 4
            ]
            ranked = [chosen.tolist().index(i) for i in listed]
            images = np.concatenate([queries.images[place : place + 1], train.images[ranked]])
            np.testing.assert_allclose(255 * row.images, images, atol=1e-3)
            mine = queries.labels[place]
            marks = [f"{'✓' if y == mine else '✗'} {DIGITS[y]}" for y in train.labels[ranked]]
            assert row.head == label and row.labels == [DIGITS[mine], *marks]
    assert f"H with {29 * 0.0005:g} on its diagonal" in pictures.caption
    assert "a new head, trained on these images, for ℓ2 (ε = 0.25)" in pictures.caption
    chance = np.mean([[a == b for b in train.labels] for a in queries.labels])
    assert f"Chance: {100 * chance:.1f} %." in curves.caption
    for kind, panel in zip(("test", "training images"), curves.panels, strict=True):
        for label, line in zip((OWN, LETTER), panel.series, strict=True):
            rates = _column(_csv(done / "matches.csv", model=label, queries=kind), "match_rate")
            assert line.style.label == label and line.x == [1, 2, 3, 4, 5, 7, 10, 14, 20, 28]
            np.testing.assert_allclose(line.mean, rates[np.array(line.x) - 1])
    for label, (name, *cells) in zip((OWN, LETTER), table.rows, strict=True):
        first = _csv(done / "matches.csv", model=label, queries="test", rank="1")
        share = float(first[0]["match_rate"])
        low, high = stats.binomtest(round(12 * share), 12).proportion_ci(method="wilson")
        assert name == label and len(cells) == 4
        assert cells[0] == f"{100 * share:.1f} ({100 * low:.1f} … {100 * high:.1f})"
        first = _csv(done / "matches.csv", model=label, queries="training images", rank="1")
        assert cells[2].startswith(f"{100 * float(first[0]['match_rate']):.1f} (")


def test_what_influence_costs_is_of_its_queries_and_the_networks_width(networks):
    case = _case(networks, (0,), ("none",), num_queries=500, num_train=700)
    expected = influence.cost(700, 1200, 8, 10, solver="damped")
    assert influence_cost(case, case.subjects[0]) == expected


def test_harmful_images_are_named_by_their_place_in_the_dataset(done, networks):
    chosen, train = _drawn("train", 29)
    _, scores = _scores(load_model(networks[0]), train)
    table = matches.harmful_table(scores, train.labels, exclude_self=True)
    rows = _csv(done / "harmful.csv", model=OWN)
    assert [int(row["index"]) for row in rows] == chosen[table["index"]].tolist()
    np.testing.assert_allclose(_column(rows, "harm"), table["harm"], rtol=1e-3, atol=1e-6)
    labels = _data().train.labels
    assert [row["label"] for row in rows] == [DIGITS[labels[int(row["index"])]] for row in rows]


def test_influence_of_two_training_images_on_one_query(networks, tmp_path):
    config = _config(networks[:1], analyses=("influence",), num_queries=1, num_train=2)
    tasks.run(config, tmp_path)
    for kind in ("helpful", "harmful"):
        rows = _csv(tmp_path / "influence.csv", kind=kind)
        assert [int(row["rank"]) for row in rows] == [1, 2] and len({row["train_index"] for row in rows}) == 2
    text = (tmp_path / "report.html").read_text()
    assert "which of 2 training images" in text and "(each network’s own head)" in text
    assert re.findall(r">((?:Helpful|Harmful) \d)<", text) == [
        "Helpful 1",
        "Helpful 2",
        "Harmful 1",
        "Harmful 2",
    ]


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


def test_the_pictures_of_visualisation_have_the_values_below_them(done, parts, networks):
    *climbed, inverted = parts["Feature visualisation"]
    image = _drawn("test", 3)[1].images / np.float32(255)
    for kind, part, what in zip(("class", "unit"), climbed, ("logit of a class", "one unit"), strict=True):
        assert what in part.caption and "in Fourier coordinates" in part.caption
        assert "from noise, N(0.5, 1/20), and from images: projected" in part.caption
        assert [group[0].head for group in part.groups] == ["Start: noise", "Start: image"]
        np.testing.assert_allclose(part.groups[1][0].images, image, atol=1e-6)
        for start, (begun, *rows) in zip(("noise", "image"), part.groups, strict=True):
            for place, (label, row) in enumerate(zip((OWN, LETTER), rows, strict=True)):
                model = load_model(networks[place])
                stop, of = (None, np.arange(3)) if kind == "class" else (1, np.array([0, 4, 7]))
                found = _csv(done / "visualisation.csv", model=label, kind=kind, start=start)
                for when, images in (("before", begun.images), ("after", row.images)):
                    values = model.module.apply(model.variables, images, stop=stop)[np.arange(3), of]
                    np.testing.assert_allclose(_column(found, when), values, rtol=1e-3, atol=1e-4)
                texts = [f"{r['what']}: {float(r['before']):.1f}→{float(r['after']):.1f}" for r in found]
                assert row.head == label and row.labels == [text.replace("-", "−") for text in texts]
    (_, *rows), noise = inverted.groups[0], climbed[0].groups[0][0].images
    for place, (label, row) in enumerate(zip((OWN, LETTER), rows, strict=True)):
        model = load_model(networks[place])
        features = [model.module.apply(model.variables, x, stop=1) for x in (image, noise, row.images)]
        lengths = [np.linalg.norm(x - features[0], axis=1) for x in features[1:]]
        found = _csv(done / "visualisation.csv", model=label, kind="inversion", start="noise")
        for name, length in zip(("before", "after"), lengths, strict=True):
            expected = length / np.linalg.norm(features[0], axis=1)
            np.testing.assert_allclose(_column(found, name), expected, rtol=1e-3)
        assert row.labels == [f"{100 * x:.1f} %" for x in _column(found, "after")]
        mean = _column(found, "after").mean()
        assert f"{label} {100 * mean:.0f} %" in (done / "report.html").read_text().replace("\xa0", " ")


def test_visualisation_in_brief_is_of_classes_from_noise(networks, monkeypatch):
    monkeypatch.setattr(
        explain.visualisation,
        "_climb",
        lambda _, start, __: Climbed(start, 0 * start[:, 0, 0, 0], np.ones(3, np.float32)),
    )
    section = visualisation_section(_case(networks, (0,), ("none",), parameterisation="pixels"))
    (part,) = section.parts
    assert [[row.head for row in group] for group in part.groups] == [["Start: noise", "natural"]]
    assert "from noise, N(0.5, 1/20): projected" in part.caption and "in pixels, within" in part.caption
    records = section.files["visualisation"]
    assert [(r["kind"], r["start"], r["what"]) for r in records] == [("class", "noise", d) for d in "012"]
    assert "the logit of a class" in section.finding


def test_the_curves_of_shape_bias_and_their_captions(done, parts):
    lines, table, bars = parts["Shape against texture"]
    rows = [row for row in _csv(done / "shape.csv", model=LETTER) if not row["class"]]
    opacities, amplitudes = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0), (0.02, 0.06, 0.1, 0.15, 0.2, 0.3)
    assert {(float(r["amplitude"]), float(r["opacity"])) for r in rows} == {
        *((0.06, o) for o in opacities),
        *((a, 1.0) for a in amplitudes),
    }
    strengths = {
        "Fading letters": ("amplitude", 0.06, "opacity"),
        "Stronger gratings": ("opacity", 1, "amplitude"),
    }
    for panel, (title, (fixed, value, free)) in zip(lines.panels, strengths.items(), strict=True):
        (line,) = panel.series
        drawn = sorted((r for r in rows if float(r[fixed]) == value), key=lambda r: float(r[free]))
        assert panel.title == title and list(line.x) == list(_column(drawn, free))
        np.testing.assert_allclose(line.mean, _column(drawn, "shape_bias"))
        width = _column(drawn, "shape_bias_high95") - _column(drawn, "shape_bias_low95")
        np.testing.assert_allclose(line.ci95, width / 2)
    faded = [r for r in rows if r["amplitude"] == "0.06"]
    faded.sort(key=lambda r: float(r["opacity"]))
    half = cues.half_point(opacities, _column(faded, "shape_bias"))
    assert f"equally often: ℓ2 (ε = 0.25) {half:.2f}." in (done / "report.html").read_text().replace(
        "\xa0", " "
    )
    balanced = min(opacities, key=lambda opacity: (opacity - half) ** 2)
    assert f"amplitude 0.06 below letters of opacity {balanced:g}" in table.caption
    assert f"amplitude 0.06 below letters of opacity {balanced:g}" in bars.caption
    assert [row[0] for row in bars.rows] == list(LETTERS) and bars.heads == ["Shape", LETTER]


def test_letters_that_always_outweigh_gratings(networks, monkeypatch):
    """The curve crosses one half nowhere, so the table is of the faintest letters."""
    names = np.array(list(LETTERS))
    answers = cues.shape_bias(names, names, np.roll(names, 1))
    monkeypatch.setattr(explain.shape.shape, "measure", lambda *_: answers)
    monkeypatch.setattr(explain.shape.cue_conflict, "glyph_cue_conflict", lambda *_, **__: None)
    case = _case(networks, (1,), ("l2",))
    section = explain.shape.shape_section(case)
    assert section.finding.startswith("Letters outweigh gratings")
    assert [panel.title for panel in section.parts[0].panels] == ["Fading letters"]
    assert {(row["amplitude"], row["opacity"]) for row in section.files["shape"]} == {
        (0.06, opacity) for opacity in explain.shape.OPACITIES
    }
    assert len(section.parts) == 1
    table = explain.shape.shape_section(case._replace(brief=False)).parts[1]
    assert "letters of opacity 0.05" in table.caption and table.rows[0][2].startswith("100.0 (")


def test_a_network_that_answers_neither_letter_nor_grating_has_no_curve(networks, monkeypatch, tmp_path):
    names = np.array(list(LETTERS))
    answers = cues.shape_bias(np.roll(names, 2), names, np.roll(names, 1))
    monkeypatch.setattr(explain.shape.shape, "measure", lambda *_: answers)
    monkeypatch.setattr(explain.shape.cue_conflict, "glyph_cue_conflict", lambda *_, **__: None)
    section = explain.shape.shape_section(_case(networks, (1,), ("l2",))._replace(brief=False))
    table, _ = section.parts
    assert table.rows[0][1] == "–" and section.finding.startswith("At no opacity")
    write_page(Page("shape", [section]), tmp_path)


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
    tasks.run(config, tmp_path / "out")
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
    plan = tasks.plan(_config(networks), tmp_path / "new")
    own, foreign = (line for line in plan.splitlines() if "influence, " in line)
    assert "a new head" in foreign and "a new head" not in own and not (tmp_path / "new").exists()
    assert own.startswith(
        "  influence, natural: 12 + 29 queries of 29 training images, 90 parameters, damped: about"
    )
    # As many images as there are; what is not asked for is not planned, and may be more than there is.
    config = _config(
        networks, analyses=("shape", "saliency"), num_images=797, num_measured=797, num_train=801
    )
    lines = tasks.plan(config, tmp_path / "new").splitlines()[1:]
    assert (
        lines[0] == "  shape bias" and lines[1].startswith("  saliency: 797 images shown") and len(lines) == 2
    )


def test_another_workdir_is_refused_before_anything_is_computed(done, networks):
    found = _files(done)
    with pytest.raises(ConfigError, match="holds the results of another config"):
        tasks.plan(_config(networks[:1]), done)
    assert _files(done) == found
    facts = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", (done / "report.html").read_text())
    assert facts[:2] == [("Natural", "digits, one_block"), (LETTER, "letters, one_block")]


def test_the_same_command_again_computes_what_is_not_kept_whole(done, networks, tmp_path, capsys):
    again, found = tmp_path / "again", _files(done)
    shutil.copytree(done, again)
    tasks.run(_config(networks), again)
    assert _computed(capsys) == set() and _files(again) == found
    (again / "sections" / "saliency.json").unlink()
    (again / "sections" / "shape.json").write_bytes(found["sections/shape.json"][:-20])
    (again / "report.html").unlink()
    tasks.run(_config(networks), again)
    assert _computed(capsys) == {"saliency", "shape"} and _files(again) == found


def test_what_is_kept_is_of_the_same_question(networks, tmp_path, capsys):
    model = load_model(networks[0])
    save_model(model, tmp_path / "digits" / "model")
    models, one = [str(tmp_path / "digits"), networks[1]], {"analyses": ("saliency",)}
    tasks.run(_config(models, **one), tmp_path / "out")
    first = _files(tmp_path / "out")
    assert _computed(capsys) == {"saliency"}
    tasks.run(_config(models, **one, smooth_samples=3), tmp_path / "out")
    second = _files(tmp_path / "out")
    assert _computed(capsys) == {"saliency"} and second["report.html"] != first["report.html"]
    assert second["saliency.csv"] == first["saliency.csv"]  # of the gradient alone
    other = jax.tree.map(lambda x: 1.5 * x, model.variables)
    save_model(model._replace(variables=other), tmp_path / "digits" / "model", overwrite=True)
    tasks.run(_config(models, **one, smooth_samples=3), tmp_path / "out")
    assert _computed(capsys) == {"saliency"}
    assert _files(tmp_path / "out")["saliency.csv"] != second["saliency.csv"]


def _shown(section):
    return draw(section), repr(section.files)


def test_a_study_report_gets_the_most_telling_pictures(networks, tmp_path, capsys):
    config = _config(networks)
    config.report.analyses = ("shape", "influence")
    models = {"natural": load_model(networks[0]), "l2:0.25": load_model(networks[1])}
    sections = study_sections(read(config), models, _data(), models, _data(), tmp_path)
    assert [section.title for section in sections] == [
        "Shape against texture",
        "Influence of training images",
    ]
    assert set(sections[1].files) == {"influence", "matches"}
    assert _computed(capsys) == {"shape", "influence"}
    again = study_sections(read(config), models, _data(), models, _data(), tmp_path)
    assert list(map(_shown, again)) == list(map(_shown, sections))
    assert _computed(capsys) == set()
    # Trials that start from other networks: their heads, and the same shape bias.
    begun = models | {"natural": normalised_by(models["natural"], _data().train.images)}
    others = study_sections(read(config), models, _data(), begun, _data(), tmp_path)
    assert _computed(capsys) == {"influence"} and _shown(others[0]) == _shown(sections[0])
    alone = study_sections(read(config), begun, _data(), begun, _data(), tmp_path / "begun")
    assert _shown(others[1]) == _shown(alone[1]) != _shown(sections[1])
    config.report.analyses = ()
    assert study_sections(read(config), models, _data(), models, _data(), tmp_path) == []


def test_a_study_report_is_of_few_images_and_of_what_each_dataset_has(networks, tmp_path, monkeypatch):
    """Influence comes first, as it can fail; the page keeps the order that was asked for."""
    cases = []

    def section(name, case, recipe):
        cases.append((name, case))
        return Section(name, "Found.")

    monkeypatch.setattr(interpret, "explain", section)
    config, data = (
        _config(networks, num_images=150, num_measured=700, num_queries=700, num_train=700),
        _data(),
    )
    config.report.analyses = ("shape", "visualisation", "influence", "saliency")
    models = {"a": load_model(networks[0]), "b": load_model(networks[1])}
    few = data._replace(
        train=Split(*(x[:180] for x in data.train)), test=Split(*(x[:110] for x in data.test))
    )
    drawn = study_sections(read(config), models, data, models, few, tmp_path)
    assert [section.title for section in drawn] == list(config.report.analyses)
    assert cases[0][0] == "influence" and len(cases) == 4
    own, ranked = cases[1][1], cases[0][1]
    assert all(case is own for _, case in cases[1:]) and own.brief and ranked.brief
    for case, dataset, numbers in ((own, data, (150, 128, 200, 200)), (ranked, few, (110, 110, 110, 180))):
        names = ("num_images", "num_measured", "num_queries", "num_train")
        assert tuple(getattr(case.settings, name) for name in names) == numbers
        assert case.settings.num_steps == 200 and case.dataset is dataset
        assert [subject.label for subject in case.subjects] == [OWN, LETTER]
    assert config.interpret.num_measured == 700  # the user's own stays
    assert study_sections(read(config), {}, None, {}, data, tmp_path) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": ""}, "config.models: name models"),
        ({"models": "/nowhere"}, "config.models: '/nowhere' is not a model folder"),
        ({"data": ""}, "config.data: name a dataset"),
        ({"data": "builtin:digit"}, "did you mean builtin:digits"),
        ({"num_images": 798}, "config.interpret.num_images: 798 is too many: builtin:digits has 797 test"),
        ({"num_train": 801}, "config.interpret.num_train: 801 is too many"),
        ({"num_queries": 798}, "config.interpret.num_queries"),
        ({"analyses": ("saliencies",)}, "config.interpret.analyses"),
        ({"solver": "exact"}, "config.interpret.solver"),
        ({"cue_conflict": "/nowhere"}, "config.interpret.cue_conflict: /nowhere is not a folder"),
    ],
)
def test_what_cannot_be_is_one_line(networks, tmp_path, change, message):
    config = _config(networks)
    for key, value in change.items():
        (config if key in config else config.interpret)[key] = value
    with pytest.raises(ConfigError) as error:
        tasks.run(config, tmp_path / "new")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


def test_networks_that_cannot_stand_side_by_side(networks, tmp_path):
    small = _save(tmp_path / "small", DIGITS, "none", 0.0, size=8)
    for models, message in (
        ([*networks, small], "8 and 16 pixels"),
        ([networks[0]] * 2, "two models are called"),
    ):
        with pytest.raises(ConfigError, match=message):
            tasks.run(_config(models), tmp_path / "new")


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
    """With a folder of images too, and no thousand classes."""
    Image.new("RGB", (16, 16)).save(tmp_path / "cat1-dog1.png")
    config = _config(networks[:1], analyses=("shape",), cue_conflict=str(tmp_path))
    tasks.run(config, tmp_path / "out")
    assert "Not measured: it takes networks with" in (tmp_path / "out/report.html").read_text()
    assert not (tmp_path / "out/shape.csv").exists()
