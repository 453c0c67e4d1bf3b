"""Hyper-parameters chosen on validation images; several targets and views; normalisation by the target."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from test_stages import _rows, tiny
from test_study import DATASET, METRICS, SOURCES, _models, grid_of

from advtransfer import tasks
from advtransfer.data import load_dataset
from advtransfer.models import identity, logits_fn
from advtransfer.study import Grid, Search, candidates, choose, flatten, history_rows, run_trials
from advtransfer.tasks.inputs import find_model
from advtransfer.transfer import Recipe, normalised_by

pytestmark = pytest.mark.usefixtures("two_blocks", "unoptimised")


SEARCH = Search(learning_rates=(0.1, 0.3, 1.0), epochs=(2, 5), search_seeds=2)


def _grid():
    recipe = Recipe(batch_size=5, num_epochs=2, evaluate_epochs=(1, 2), schedule="constant")
    grid = Grid(num_train_images=(6, 12), num_unfrozen_blocks=(0,), num_seeds=4)
    return grid_of(grid.on("validation"), recipe)


def test_every_combination_is_tried_on_the_first_seeds_and_on_validation_images():
    tried = candidates(SEARCH, _grid())
    assert len(tried) == 4  # two sources at two sizes
    for trials in tried.values():
        assert {(t.recipe.learning_rate, t.recipe.num_epochs, t.seed) for t in trials} == {
            (rate, epochs, seed) for rate in (0.1, 0.3, 1.0) for epochs in (2, 5) for seed in (0, 1)
        }
        assert len(trials) == 12 and {t.split for t in trials} == {"validation"}
        assert {t.recipe.evaluate_epochs for t in trials} == {(1, 2), (1, 2, 5)}
        assert {t.data for t in trials} == {DATASET.digest("train", "validation")}


def test_the_best_mean_is_chosen_and_what_diverged_is_not():
    tried = candidates(SEARCH, _grid())
    rng = np.random.default_rng(0)
    accuracy = {trial: rng.uniform() for trial in flatten(tried)}
    diverged = {trial for trial in accuracy if trial.recipe.learning_rate == 0.3}
    rows = []
    for trial in accuracy:
        # Whatever came before the last epoch does not count.
        values = np.append(np.ones(len(trial.recipe.evaluate_epochs) - 1), accuracy[trial])
        rows += history_rows(trial, dict.fromkeys(METRICS, values), 1.0)
        if trial in diverged:
            rows[-1]["test_accuracy"] = math.nan
    best, table = choose(tried, rows)
    for cell, trials in tried.items():
        means = {}
        for trial in set(trials) - diverged:
            key = trial.recipe.learning_rate, trial.recipe.weight_decay, trial.recipe.num_epochs
            means.setdefault(key, []).append(accuracy[trial])
        assert tuple(best[cell]) == max(means, key=lambda key: sum(means[key]))
    assert sum(row["chosen"] for row in table) == 4 and len(table) == 4 * 6


def test_rates_of_a_search_run_together_and_give_what_they_give_alone(tmp_path):
    grid = {cell: trials for cell, trials in _grid().items() if cell.num_train_images == 12}
    trials = flatten(candidates(replace(SEARCH, epochs=()), grid))
    datasets = {DATASET.digest("train", "validation"): DATASET}
    rows = run_trials(trials, _models(), datasets, tmp_path / "together")
    assert len(list((tmp_path / "together").glob("*.jsonl"))) == len(SOURCES)
    alone = [run_trials([t], _models(), datasets, tmp_path / str(i))[-1] for i, t in enumerate(trials)]
    for row, other in zip(rows[1::2], alone, strict=True):
        assert row["trial_id"] == other["trial_id"]
        np.testing.assert_allclose(row["test_loss"], other["test_loss"], rtol=1e-4)
        assert row["test_accuracy"] == other["test_accuracy"]


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A study of two targets in two views, its learning rate searched, natural sources normalised anew."""
    workdir = tmp_path_factory.mktemp("searched")
    config = tiny()
    config.train.image_size, config.train.dataset = 13, "builtin:lowercase"
    config.evaluate.dataset = "builtin:lowercase"
    config.study.update(targets="builtin:digits,builtin:lowercase", views=("natural", "grey"))
    config.study.update(num_train_images=(10,), learning_rates=(0.001, 0.1), search_seeds=1)
    config.transfer.input_norm = "target"
    config.report.num_pictures = 0
    assert "before them 16 on validation images" in tasks.plan(config, workdir)
    tasks.run(config, workdir)
    return config, workdir


def test_a_searched_study_reports_on_test_images_alone(searched):
    config, workdir = searched
    rows = _rows(workdir / "rows.csv")
    targets = {"builtin:digits", "builtin:digits:grey", "builtin:lowercase", "builtin:lowercase:grey"}
    assert {row["target"] for row in rows} == targets
    assert len(rows) == 2 * len(targets) * 2 * 2  # sources, targets, seeds, epochs
    table = _rows(workdir / "search.csv")
    assert len(table) == 2 * len(targets) * 2
    chosen = {
        (r["source"], r["target"], r["view"]): float(r["learning_rate"]) for r in table if int(r["chosen"])
    }
    for row in rows:
        trial = json.loads(row["config"])
        assert trial["split"] == "test"
        key = row["source"], trial["target"], trial["view"]
        assert trial["recipe"]["learning_rate"] == chosen[key]
    assert "chosen for every source" in (workdir / "report.html").read_text()
    assert "fine-tune 0 of 16 models" in tasks.plan(config, workdir)


def test_only_natural_sources_are_normalised_by_the_target(searched):
    _, workdir = searched
    identities = {}
    for path in (workdir / "rows").glob("*.jsonl"):
        for line in path.read_text().splitlines():
            trial = json.loads(json.loads(line)["config"])
            source = trial["source"]
            identities.setdefault(source["norm"], {})[trial["target"], trial["view"]] = source["identity"]
    assert len({*identities["l2"].values()}) == 1 and len({*identities["none"].values()}) == 3
    model = find_model(str(workdir / "sources/natural"), "float32")
    digits = load_dataset("builtin:digits", image_size=13)
    expected = identity(normalised_by(model, digits.train.images))
    assert identities["none"]["builtin:digits", "natural"] == expected


def test_normalising_by_the_target_is_what_it_says():
    model, images = next(iter(_models().values())), DATASET.train.images
    own = normalised_by(model, images)
    pixels = images / np.float64(255)
    np.testing.assert_allclose(own.module.mean, pixels.mean(axis=(0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(own.module.std, pixels.std(axis=(0, 1, 2)), rtol=1e-6)
    assert own.spec.mean == own.module.mean
    # Its inputs are those that the old network takes for standardised images.
    shifted = (pixels[:4] - own.module.mean) / own.module.std
    back = shifted * model.module.std + model.module.mean
    expected = logits_fn(model)(np.float32(back))
    np.testing.assert_allclose(logits_fn(own)(np.float32(pixels[:4])), expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="channel 1 of the target is the same everywhere"):
        normalised_by(model, images * np.uint8([1, 0, 1]))
