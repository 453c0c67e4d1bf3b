"""The study: who a trial is, which trials run together, and what they are fed."""

import copy
import hashlib
import itertools
import json
import math
import time
from dataclasses import is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from advtransfer import study
from advtransfer.data import Augmentation, Dataset, Split, subset_indices
from advtransfer.models import Model, ModelSpec, create_module, identity, init_variables
from advtransfer.study import (
    Grid,
    Source,
    Start,
    Trial,
    flatten,
    group,
    make_cells,
    make_trials,
    run_study,
    run_trials,
    trial_steps,
)
from advtransfer.study import run as study_run
from advtransfer.study.rows import finished_rows, history_rows, holds
from advtransfer.transfer import Recipe, fine_tune_many, prepare, resolve_recipe

pytestmark = pytest.mark.usefixtures("unoptimised")

RECIPE = Recipe(num_epochs=2, evaluate_epochs=(1, 2), batch_size=5, schedule="constant")
SOURCES = (Source("natural", "none", 0.0, "d0"), Source("robust", "l2", 0.5, "d1"))
METRICS = ("train_accuracy", "train_loss", "test_accuracy", "test_loss", "test_mean_per_class_accuracy")


def _trial(**fields):
    trial = Trial(
        source=SOURCES[0],
        target="random",
        split="test",
        num_train_images=6,
        num_unfrozen_blocks=0,
        seed=0,
        stratified=True,
        recipe=RECIPE,
    )
    return trial._replace(**fields)


def _grid(num_seeds=3):
    """Four groups: two sources at two sizes."""
    return [
        _trial(source=source, num_train_images=n, seed=seed)
        for n in (6, 12)
        for source in SOURCES
        for seed in range(num_seeds)
    ]


def _dataset(num_train=40):
    rng = np.random.default_rng(0)

    def split(n):
        images = rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
        return Split(images, rng.integers(0, 3, n).astype(np.int32))

    return Dataset("random", ("a", "b", "c"), split(num_train), split(10), split(20))


def grid_of(grid, recipe, dataset_of=lambda _: DATASET, targets=("random",)):
    """`make_trials` from SOURCES; the target of a cell is `dataset_of(cell)`."""
    sources = {source.name: source for source in SOURCES}
    cells = make_cells(grid, sources, targets)
    return make_trials(grid, recipe, cells, lambda c, _: Start(sources[c.source], None, dataset_of(c)))


def _models():
    module = create_module("resnet_tiny", num_classes=5).clone(width=4, stage_sizes=(1,))
    spec = ModelSpec("resnet_tiny", 5, 8, module.mean, module.std)
    shapes = jax.eval_shape(lambda: init_variables(module, jax.random.key(0), 8))

    def weights(seed):
        rng = np.random.default_rng(seed)
        return jax.tree.map(lambda x: rng.uniform(0.0, 1.0, x.shape).astype(np.float32), shapes)

    return {source.identity: Model(module, weights(seed), spec) for seed, source in enumerate(SOURCES)}


DATASET = _dataset()


def _run(folder, *, trials=None, **options):
    return run_trials(_grid() if trials is None else trials, _models(), {"": DATASET}, folder, **options)


def run_and_stay(folder):
    """What a test kills: the same study, whose last group never starts."""

    def progress(groups, number):
        for i, name in enumerate(groups, start=1):
            if i == number:
                time.sleep(600)
            yield name

    (Path(folder) / "identities.txt").write_text("\n".join(t.identity() for t in _grid()))
    _run(Path(folder) / "rows", progress=progress)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return _run(tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture
def ran(monkeypatch):
    """Replaces the training of groups; the list of groups that would have been trained."""
    groups = []

    def run_group(members, model, dataset, prepared):
        del model, dataset, prepared
        groups.append(members)
        return [
            row
            for trial in members
            for row in study.history_rows(trial, {name: np.array([0.25, 0.5]) for name in METRICS}, 1.0)
        ]

    monkeypatch.setattr(study_run, "run_group", run_group)
    return groups


def _without_seconds(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


# --- who a trial is -------------------------------------------------------------------------------


def test_identity_is_the_hash_of_everything_but_the_sources_name():
    expected = {
        "source": {"norm": "none", "eps": 0.0, "identity": "d0"},
        "target": "random",
        "split": "test",
        "num_train_images": 6,
        "num_unfrozen_blocks": 0,
        "seed": 0,
        "stratified": True,
        "recipe": {
            "num_epochs": 2,
            "max_steps": 0,
            "evaluate_epochs": [1, 2],
            "batch_size": 5,
            "learning_rate": 0.1,
            "schedule": "constant",
            "momentum": 0.9,
            "weight_decay": 5e-4,
            "label_smoothing": 0.0,
            "head_init": "torch",
            "head_scale": 1.0,
            "frozen_batch_norm": "source",
            "augmentation": {
                "preset": "",
                "crop_padding": 0,
                "flip": False,
                "jitter": 0.0,
                "rotation": 0.0,
                "lighting": 0.0,
                "resized_crop": 0.0,
            },
            "num_views": 0,
        },
        "view": "natural",
        "data": "",
    }
    digest = hashlib.sha256(json.dumps(expected, sort_keys=True).encode()).hexdigest()
    assert _trial().identity() == digest
    expected["source"] |= {"name": "natural", "seed": 0}
    assert json.loads(_trial().config()) == expected


@pytest.mark.parametrize(
    ("view", "split", "target"),
    [
        ("natural", "test", "random"),
        ("natural", "validation", "random:validation"),
        ("low_pass", "test", "random:low_pass"),
        ("grey", "validation", "random:grey:validation"),
    ],
)
def test_rows_say_what_was_measured_on(view, split, target):
    trial = _trial()._replace(view=view, split=split)
    epochs = len(trial.recipe.evaluate_epochs)
    history = dict.fromkeys(METRICS, np.zeros(epochs))
    rows = study.history_rows(trial, history, 1.234567)
    assert {(row["target"], row["seconds"]) for row in rows} == {(target, 1.2346)}
    assert (trial.identity() == _trial().identity()) == (target == "random")


def _changed(record):
    """The record with each of its fields changed in turn, those of records inside it too."""
    fields = record._asdict() if hasattr(record, "_fields") else vars(record)
    for name, value in fields.items():
        if hasattr(value, "_fields") or is_dataclass(value):
            others = _changed(value)
        elif isinstance(value, bool):
            others = [("", not value)]
        elif isinstance(value, tuple):
            others = [("", value[1:])]
        else:
            others = [("", value + ("x" if isinstance(value, str) else 1))]
        for path, other in others:
            changed = copy.copy(record)
            if is_dataclass(record):
                object.__setattr__(changed, name, other)  # whether or not it is a value that is allowed
            else:
                changed = record._replace(**{name: other})
            yield f"/{name}{path}", changed


def test_identity_depends_on_every_field():
    trial = _trial()
    changes = dict(_changed(trial))
    num_fields = len(Trial._fields) + len(Source._fields) + len(vars(RECIPE)) + len(vars(Augmentation())) - 3
    assert len(changes) == num_fields
    identities = {path: changed.identity() for path, changed in changes.items()}
    assert identities.pop("/source/name") == identities.pop("/source/seed") == trial.identity()
    assert len({trial.identity(), *identities.values()}) == num_fields - 1


def test_a_grid_is_every_source_n_k_and_seed():
    grid = Grid(num_train_images=(20, 50), num_unfrozen_blocks=(0, 1, -1), num_seeds=2, split="validation")
    recipe = Recipe(num_epochs=9, evaluate_epochs=(9, 3, 9), batch_size=20)
    trials = flatten(grid_of(grid, recipe, lambda _: _dataset(num_train=60)))
    assert len(set(trials)) == len(trials) == 2 * 3 * 2 * 2
    assert [(t.source.name, t.seed) for t in trials[:4]] == [
        ("natural", 0),
        ("natural", 1),
        ("robust", 0),
        ("robust", 1),
    ]
    assert {t.num_train_images for t in trials} == {20, 50}
    assert {t.num_unfrozen_blocks for t in trials} == {0, 1, -1}
    assert {(t.split, t.target, t.recipe.evaluate_epochs) for t in trials} == {
        ("validation", "random", (3, 9))
    }
    assert trial_steps(trials[0]) == 9 and trial_steps(trials[4]) == 9 * 3


def test_no_more_steps_are_made_than_are_allowed_but_one_epoch_is():
    for num_images, max_steps in itertools.product((5, 8, 16, 17, 40), (0, 1, 2, 3, 6, 14, 15, 27, 100)):
        recipe = resolve_recipe(Recipe(num_epochs=9, batch_size=8, max_steps=max_steps), num_images)
        an_epoch = math.ceil(num_images / 8)
        possible = [e for e in range(1, 10) if not max_steps or e == 1 or e * an_epoch <= max_steps]
        assert (recipe.num_epochs, recipe.batch_size) == (max(possible), min(8, num_images))
        assert recipe.evaluate_epochs[-1] == max(possible)


def test_a_program_tries_the_same_rates_on_every_seed():
    rates = [(0.1, 0.0), (0.1, 0.5), (1.0, 0.0)]

    def at(seed, rate):
        return _trial(seed=seed, recipe=replace(RECIPE, learning_rate=rate[0], weight_decay=rate[1]))

    whole = [at(seed, rate) for rate in rates for seed in range(3)]
    (members,) = group(whole)
    assert [(t.seed, (t.recipe.learning_rate, t.recipe.weight_decay)) for t in members] == [
        (seed, rate) for seed in range(3) for rate in rates
    ]
    assert [len(part) for part in group(whole, size=7)] == [6, 3]
    assert [len(part) for part in group(whole, size=1)] == [3, 3, 3]
    # Two of the seeds lack another rate each.
    left = [t for t in whole if t not in (at(0, rates[0]), at(2, rates[1]))]
    parts = group(left)
    assert sorted(len(part) for part in parts) == [2, 2, 3]
    assert {t for part in parts for t in part} == set(left)


def test_groups_hold_trials_that_differ_in_their_seed_only():
    trials = _grid(num_seeds=5)
    groups = group(trials)
    assert [[t.seed for t in members] for members in groups] == [[0, 1, 2, 3, 4]] * 4
    assert [t for members in groups for t in members] == trials
    for members in groups:
        assert len({(t.source, t.num_train_images) for t in members}) == 1
    assert [len(members) for members in group(trials, size=2)] == [2, 2, 1] * 4
    assert [t for members in group(trials, size=2) for t in members] == trials
    shuffled = [trials[i] for i in np.random.default_rng(0).permutation(len(trials))]
    assert sorted(map(len, group(shuffled))) == [5, 5, 5, 5]


def test_the_longest_groups_come_first_and_what_is_prepared_once_stays_together(tmp_path, ran):
    """Later ones would leave other processes waiting; k = -1 is the most work, k = 0 the least."""
    trials = [
        _trial(source=source, num_train_images=n, num_unfrozen_blocks=k)
        for source in SOURCES
        for n in (6, 24, 12)
        for k in (0, -1, 1)
    ]
    _run(tmp_path, trials=trials)
    order = [(t.num_unfrozen_blocks, t.source.name, t.num_train_images) for (t,) in ran]
    assert [k for k, _, _ in order] == [-1] * 6 + [1] * 6 + [0] * 6
    assert [n for _, _, n in order] == [24, 12, 6] * 6
    assert all(order[i][1] == order[i + 1][1] for i in range(18) if i % 3 < 2)


def test_out_of_memory_halves_a_group_between_its_seeds_and_its_seconds_are_shared(monkeypatch):
    """Two rates of each seed; one seed that does not fit, and any other error, end the run at once."""
    members = [
        _trial(seed=seed, recipe=replace(RECIPE, learning_rate=rate))
        for seed in range(5)
        for rate in (0.125, 0.5)
    ]
    sizes, now = [], [0.0]

    def fitting(model, train, test, *, subsets, keys, rates, **options):
        sizes.append(len(subsets))
        if len(subsets) > 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
        now[0] += 6.0
        seeds = np.float64(jax.random.key_data(keys))[:, -1:, None]
        return dict.fromkeys(METRICS, seeds + np.asarray(rates.learning_rate)[:, None] + np.arange(2))

    monkeypatch.setattr(study_run, "fine_tune_many", fitting)
    monkeypatch.setattr(study_run, "time", SimpleNamespace(monotonic=lambda: now[0]))
    rows = study_run.run_group(members, _models()["d0"], DATASET)
    assert sizes == [5, 2, 3, 1, 2]
    assert [row["trial_id"] for row in rows[::2]] == [t.identity() for t in members]
    assert [row["test_loss"] for row in rows] == [
        float(jax.random.key_data(t.key())[-1]) + t.recipe.learning_rate + e for t in members for e in (0, 1)
    ]
    assert [row["seconds"] for row in rows[::4]] == [1.5, 1.5, 3.0, 1.5, 1.5]  # 6 s of four trials, or of two
    for message, some in (("INTERNAL: no", members), ("RESOURCE_EXHAUSTED", members[:2])):
        calls = []

        def failing(*_, message=message, calls=calls, **__):
            calls.append(message)
            raise jax.errors.JaxRuntimeError(message)

        monkeypatch.setattr(study_run, "fine_tune_many", failing)
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            study_run.run_group(some, _models()["d0"], DATASET)
        assert len(calls) == 1


# --- what a trial is fed --------------------------------------------------------------------------


def test_every_source_sees_the_same_images_and_keys(monkeypatch):
    calls = {}

    def spy(model, train, test, *, subsets, keys, **options):
        calls[id(model), subsets.shape[1]] = subsets, jax.random.key_data(keys)
        assert train is DATASET.train and test is DATASET.validation and options["num_classes"] == 3
        return {name: np.zeros((len(subsets), 1, 2)) for name in METRICS}

    monkeypatch.setattr(study_run, "fine_tune_many", spy)
    models = _models()
    for members in group(t._replace(split="validation") for t in _grid()):
        study.run_group(members, models[members[0].source.identity], DATASET)
    natural, robust = id(models["d0"]), id(models["d1"])
    for n in (6, 12):
        for one, other in zip(calls[natural, n], calls[robust, n], strict=True):
            np.testing.assert_array_equal(one, other)
        subsets, keys = calls[natural, n]
        for seed in range(3):
            expected = subset_indices(DATASET.train.labels, n, dataset="random", seed=seed)
            np.testing.assert_array_equal(subsets[seed], expected)
        assert len(np.unique(subsets, axis=0)) == len(np.unique(keys, axis=0)) == 3
    np.testing.assert_array_equal(calls[natural, 6][0], calls[natural, 12][0][:, :6])


def test_rows_say_what_was_run_and_measured(undisturbed):
    trials = _grid()
    assert len(undisturbed) == 2 * len(trials)
    models = _models()
    splits = DATASET.train, DATASET.test
    used = np.unique(np.concatenate([trial.subset(DATASET.train.labels) for trial in trials]))
    for members, rows in zip(group(trials), np.reshape(undisturbed, (4, 3, 2)), strict=True):
        first = members[0]
        history = fine_tune_many(
            models[first.source.identity],
            DATASET.train,
            DATASET.test,
            subsets=np.stack([trial.subset(DATASET.train.labels) for trial in members]),
            keys=jax.numpy.stack([trial.key() for trial in members]),
            num_classes=3,
            num_unfrozen_blocks=0,
            recipe=RECIPE,
            prepared=prepare(models[first.source.identity], *splits, RECIPE, 0, used=used),
        )
        for t, trial in enumerate(members):
            for e, row in enumerate(rows[t]):
                assert row.pop("seconds") > 0
                assert row == {
                    "source": trial.source.name,
                    "source_norm": trial.source.norm,
                    "source_eps": trial.source.eps,
                    "target": "random",
                    "num_train_images": trial.num_train_images,
                    "num_unfrozen_blocks": 0,
                    "seed": t,
                    "epoch": e + 1,
                    **{name: float(history[name][t, e]) for name in METRICS},
                    "source_seed": 0,
                    "trial_id": trial.identity(),
                    "config": trial.config(),
                }
                row["seconds"] = 1.0
    by_source = [[row["test_loss"] for row in undisturbed if row["source"] == s.name] for s in SOURCES]
    assert np.abs(np.subtract(*by_source)).max() > 1e-3


def test_all_images_are_as_many_as_there_are():
    """-1 becomes the true number; which dataset that is, is asked of the caller."""
    recipe = Recipe(batch_size=5)
    grid = Grid(num_train_images=(6, 40, -1), num_unfrozen_blocks=(0,), num_seeds=2)
    whole = _dataset(num_train=50)
    trials = flatten(grid_of(grid, recipe, lambda cell: whole if cell.num_train_images == -1 else DATASET))
    assert [t.num_train_images for t in trials[::4]] == [6, 40, 50]
    digests = [DATASET.digest("train", "test"), whole.digest("train", "test")]
    assert [t.data for t in trials[::4]] == [digests[0], digests[0], digests[1]]
    np.testing.assert_array_equal(np.sort(trials[-1].subset(whole.train.labels)), np.arange(50))
    assert len(flatten(grid_of(grid, recipe))) == 2 * 2 * 2  # 40 and -1 are the same
    few = flatten(grid_of(replace(grid, num_train_images=(4,)), recipe))
    assert {t.recipe.batch_size for t in few} == {4}  # all of them
    with pytest.raises(ValueError, match="cannot draw 41 images from random: choose 1 to 40"):
        grid_of(replace(grid, num_train_images=(41,)), recipe)


def test_a_file_holds_trials_when_it_has_the_rows_of_all(tmp_path):
    trials = _grid()[:3]
    _run(tmp_path, trials=trials)
    (path,) = tmp_path.glob("*.jsonl")
    assert holds(path, trials) and holds(path, trials[:1])
    assert not holds(path, _grid()[:4]) and not holds(tmp_path / "none.jsonl", trials)
    path.write_text(path.read_text()[:-5])
    assert not holds(path, trials)


def test_what_diverged_is_null_in_the_file_and_nan_again_when_it_is_read(tmp_path):
    values = dict(
        zip(METRICS, ([0.5, np.nan], [0.5, np.inf], [np.nan, 0.5], [0.0, 0.5], [1.0, 0.5]), strict=True)
    )
    rows = history_rows(_trial(), {name: np.array(x) for name, x in values.items()}, 1.0)
    expected = [[x if math.isfinite(x) else None for x in values[name]] for name in METRICS]
    assert [[row[name] for row in rows] for name in METRICS] == expected
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (read,) = finished_rows(tmp_path).values()
    found = [[row[name] for row in read] for name in METRICS]
    np.testing.assert_array_equal(found, [[math.nan if x is None else x for x in row] for row in expected])


# --- in a notebook --------------------------------------------------------------------------------


def test_a_study_in_a_notebook_is_the_study_of_its_trials(tmp_path):
    models = dict(zip(("natural", "robust"), _models().values(), strict=True))
    models["robust"] = models["robust"]._replace(spec=replace(models["robust"].spec, norm="l2", eps=0.5))
    grid = Grid(num_train_images=(6, 12), num_unfrozen_blocks=(0,), num_seeds=2)
    args = grid, models, {"random": DATASET}
    found = run_study(*args, recipe=RECIPE, folder=tmp_path / "study")
    assert list(found.columns[:3]) == ["source", "source_norm", "source_eps"] and len(found) == 2 * 2 * 2 * 2
    assert set(found["source_eps"]) == {0.0, 0.5} and set(found["target"]) == {"random"}
    sources = {
        name: Source(name, model.spec.norm, model.spec.eps, identity(model)) for name, model in models.items()
    }
    cells = make_cells(grid, models, ["random"])
    trials = flatten(make_trials(grid, RECIPE, cells, lambda c, _: Start(sources[c.source], None, DATASET)))
    expected = run_trials(
        trials,
        {source.identity: models[name] for name, source in sources.items()},
        {DATASET.digest("train", "test"): DATASET},
        tmp_path / "rows",
    )
    assert _without_seconds(found.to_dict("records")) == _without_seconds(expected)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "study").rglob("*.jsonl")}
    again = run_study(*args, recipe=RECIPE, folder=tmp_path / "study")
    assert again.equals(found) and before == {path: path.stat().st_mtime_ns for path in before}


def test_networks_of_one_name_are_source_seeds(tmp_path, ran):
    """On the same images; of rows that were there before their column, too."""
    first, second = _models().values()
    other = first._replace(variables=jax.tree.map(lambda x: x + 1, first.variables))
    second = second._replace(spec=replace(second.spec, norm="l2", eps=0.5))
    grid = Grid(num_train_images=(6,), num_unfrozen_blocks=(0,), num_seeds=2)

    def run(sources):
        return run_study(grid, sources, {"random": DATASET}, recipe=RECIPE, folder=tmp_path)

    run({"natural": first, "robust": second})
    for path in (tmp_path / "rows").glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(f"{json.dumps(row | {'source_seed': None})}\n" for row in rows))
    ran.clear()
    found = run({"natural": [first, other], "robust": second})
    assert [[(t.source.name, t.source.seed, t.seed) for t in members] for members in ran] == [
        [("natural", 1, 0), ("natural", 1, 1)]
    ]
    assert found.groupby(["source", "source_seed"])["seed"].unique().map(list).to_dict() == {
        ("natural", 0): [0, 1],
        ("natural", 1): [0, 1],
        ("robust", 0): [0, 1],
    }
    for sources, words in (
        ({"a": [first, first]}, "a: two networks have the same weights"),
        ({"a": [first, second]}, "a: the networks of a source, one or more, have the same norm and eps"),
        ({"a": []}, "a: the networks of a source, one or more"),
        ({"a": [first, other], "a_seed_1": second}, "two sources are called 'a_seed_1'"),
    ):
        with pytest.raises(ValueError, match=words):
            run(sources)


def test_a_study_in_a_notebook_refuses_what_cannot_be(tmp_path):
    models, targets = {"a": next(iter(_models().values()))}, {"random": DATASET}
    grid = Grid(num_train_images=(6,), num_unfrozen_blocks=(0,), num_seeds=1)
    with pytest.raises(ValueError, match="cannot unfreeze 2 blocks: this network has 1"):
        run_study(replace(grid, num_unfrozen_blocks=(2,)), models, targets, folder=tmp_path / "study")
    with pytest.raises(ValueError, match="cannot draw 41 images from random: choose 1 to 40"):
        run_study(replace(grid, num_train_images=(41,)), models, targets, folder=tmp_path / "study")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds files that advtransfer did not write"):
        run_study(grid, models, targets, folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
