"""Every stage for real, on the smallest config that goes the whole way, and again in the same workdir."""

import csv
import json
import os
import re
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from test_data_folder import write_images

from advtransfer import config as base
from advtransfer import source, tasks
from advtransfer.config import ConfigError, read
from advtransfer.data import Dataset, load_dataset
from advtransfer.data.recorded import Part, inspect
from advtransfer.evaluate import predict
from advtransfer.models import (
    Model,
    ModelSpec,
    create_module,
    identity,
    init_variables,
    load_model,
    logits_fn,
    save_model,
)
from advtransfer.study import Source
from advtransfer.tasks import transfer
from advtransfer.tasks.study import _remarks
from advtransfer.tasks.study_inputs import Place, StudyInputs
from advtransfer.train import DivergedError
from advtransfer.transfer import normalised_by

pytestmark = pytest.mark.usefixtures("two_blocks", "unoptimised")


def tiny():
    """Digits at 8² are source and target; an attack with restarts, so that every random path is walked."""
    config = base.default()
    config.train.update(dataset="builtin:digits", image_size=8, batch_size=80, num_epochs=1)
    config.train.update(save_every=4, log_every=3, attack_random_start=True, attack_batch_norm="batch")
    config.train.augmentation.crop_padding = 1
    config.transfer.update(batch_size=10, num_epochs=3, evaluate_epochs=(1, 3))
    config.study.update(num_train_images=(10, 25), num_unfrozen_blocks=(0,), num_seeds=2, calibration=0.0)
    config.evaluate.update(num_steps=2, num_restarts=2, num_images=50, batch_size=16)
    config.evaluate.dataset = "builtin:digits"
    config.report.num_pictures = 3
    return config


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("study")
    tasks.run(tiny(), workdir)
    return workdir


def _blank(norm="none"):
    module = create_module("resnet_tiny", num_classes=10)
    spec = ModelSpec("resnet_tiny", 10, 8, module.mean, module.std, norm, 0.5 * (norm != "none"))
    return Model(module, init_variables(module, jax.random.key(0), 8), spec)


def _rows(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def _files(folder):
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()
    }


def test_a_study_leaves_sources_rows_summary_and_report(study):
    rows = _rows(study / "rows.csv")
    assert len(rows) == 2 * 2 * 2 * 2  # sources × n × seeds × epochs
    assert {(r["source"], r["source_norm"]) for r in rows} == {("natural", "none"), ("l2:0.25", "l2")}
    assert all(0 <= float(r["test_accuracy"]) <= 1 for r in rows)
    assert len((study / "summary.csv").read_text().splitlines()) == 1 + 4
    page = (study / "report.html").read_text()
    assert page.count("data:image/png") == 3 * (1 + 2 * 2) + 3
    read = re.findall(r"[✓✗] (\w) → <b>\w</b>", page)  # in the clean image, in the adversarial one
    images = load_dataset("builtin:digits", image_size=8).test.images[:3] / np.float32(255)
    networks = [load_model(study / "sources" / name / "model") for name in ("natural", "l2_0.25")]
    assert read == [str(c) for model in networks for c in predict(logits_fn(model), images).argmax(-1)]
    for name, norm in (("natural", "none"), ("l2_0.25", "l2")):
        folder = study / "sources" / name
        assert load_model(folder / "model").spec.norm == norm
        evaluation = json.loads((folder / "evaluation.json").read_text())
        assert evaluation["num_images"] == 50
        assert 0 <= evaluation["adversarial_accuracy"] <= evaluation["natural_accuracy"] <= 1
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [3, 4, 6, 8, 9, 10]
        assert any(path.name.startswith("events.out.tfevents") for path in folder.iterdir())
        assert not (folder / "checkpoints").exists()


def test_a_study_measures_and_shows_its_sources_on_the_split_that_is_named(tmp_path):
    """Of a folder only the splits that are asked for are loaded."""
    counts = {f"{split}/{name}": n for split, n in (("train", 8), ("val", 4), ("test", 3)) for name in "ab"}
    write_images(tmp_path / "pets", counts, size=(8, 8))
    config = tiny()
    config.train.update(dataset=f"folder:{tmp_path / 'pets'}", batch_size=8)
    config.study.update(sources="natural", num_train_images=(10,), num_seeds=1)
    config.evaluate.update(split="validation", num_images=0)
    tasks.run(config, tmp_path / "out")
    found = json.loads((tmp_path / "out/sources/natural/evaluation.json").read_text())
    assert found["num_images"] == 8
    page = (tmp_path / "out/report.html").read_text()
    images = load_dataset(f"folder:{tmp_path / 'pets'}", image_size=8).validation.images[:3]
    assert page.count("data:image/png") == 3 * (1 + 2) + 3
    read = re.findall(r"[✓✗] (\w) → <b>\w</b>", page)
    network = logits_fn(load_model(tmp_path / "out/sources/natural/model"))
    assert read == ["ab"[i] for i in predict(network, images / np.float32(255)).argmax(-1)]


def test_the_same_command_again_only_rewrites_the_report(study, monkeypatch):
    before, page = _files(study), (study / "report.html").read_bytes()
    monkeypatch.setattr("advtransfer.study.run_group", lambda *_: pytest.fail("ran again"))
    tasks.run(tiny(), study)
    changed = {name for name, time in _files(study).items() if time != before.get(name)}
    assert not {name for name in changed if name.startswith(("rows/", "sources/"))}
    assert (study / "report.html").read_bytes() == page
    assert "fine-tune 0 of 8 models" in tasks.plan(tiny(), study)


def test_more_source_seeds_train_what_is_missing(study, tmp_path, monkeypatch):
    """In a workdir of one seed: the first networks and their rows stay; folders are taken as well."""
    workdir, config = tmp_path / "study", tiny()
    shutil.copytree(study, workdir)
    config.study.source_seeds = 3
    plan = tasks.plan(config, workdir).splitlines()
    names = [f"{name}{seed}" for name in ("natural", "l2:0.25") for seed in ("", "_seed_1", "_seed_2")]
    assert [line.split(": ")[0] for line in plan[:6]] == [f"source {name}" for name in names]
    assert [line.endswith(": done") for line in plan[:6]] == [True, False, False] * 2
    assert plan[6].startswith("fine-tune 16 of 24 models in 8 groups")
    before = _files(workdir)
    tasks.run(config, workdir)
    kept = ("rows/", "sources/natural/", "sources/l2_0.25/")
    after = _files(workdir)
    assert {name for name in before if name.startswith(kept)} <= {
        name for name, time in before.items() if after[name] == time
    }
    places = [workdir / "sources" / name.replace(":", "_") / "model" for name in names]
    models = [load_model(place) for place in places]
    assert [model.spec.provenance["seed"] for model in models] == [0, 1, 2] * 2
    assert len({identity(model) for model in models}) == 6

    rows = _rows(workdir / "rows.csv")
    assert len(rows) == 3 * len(_rows(study / "rows.csv"))
    for row, old in zip([r for r in rows if r["source_seed"] == "0"], _rows(study / "rows.csv"), strict=True):
        assert row == old
    places_of = {(r["source"], r["source_seed"]): json.loads(r["config"])["source"]["identity"] for r in rows}
    seeds = [(name, seed) for name in ("natural", "l2:0.25") for seed in "012"]
    assert places_of == dict(zip(seeds, map(identity, models), strict=True))
    (cell, *_), page = _rows(workdir / "summary.csv"), (workdir / "report.html").read_text()
    place = {"source": "natural", "num_train_images": cell["num_train_images"], "epoch": "3"}
    own = [float(row["test_accuracy"]) for row in rows if place.items() <= row.items()]
    assert len(own) == 6 and float(cell["mean"]) == pytest.approx(np.mean(own))
    assert (cell["num_seeds"], cell["num_source_seeds"]) == ("2", "3")
    assert "3 sources of each kind × 2 subsets" in page and "training the sources again" not in page
    assert "natural, seed 2" in page and page.count("data:image/png") == 3 * (1 + 2 * 2) + 3

    monkeypatch.setattr("advtransfer.tasks.study.train_and_measure", lambda *_: pytest.fail("trains"))
    config.study.sources = f"nat={workdir}/sources/natural*/model,l2={workdir}/sources/l2_0.25*/model"
    assert "fine-tune 0 of 24 models" in tasks.plan(config, workdir)
    tasks.run(config, workdir)
    assert _rows(workdir / "summary.csv")[0] == cell | {"source": "nat"}
    for sources, words in (
        (f"{workdir}/sources/natural*/model", "write NAME=PATTERN"),
        ("nat=nowhere/*/model", "nothing on this machine matches 'nowhere/"),
        (f"all={workdir}/sources/*/model", "all: the networks of a source, one or more, have the same norm"),
        (f"natural={workdir}/sources/natural*/model,natural", "two sources are called 'natural'"),
    ):
        config.study.sources = sources
        with pytest.raises(ConfigError, match=f"^config.study.sources: .*{re.escape(words)}"):
            tasks.run(config, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_the_report_of_its_rows_has_the_same_summary(study, tmp_path):
    config = tiny()
    config.stage, config.rows = "report", str(study / "rows.csv")
    assert "report on 16 rows" in tasks.plan(config, tmp_path)
    tasks.run(config, tmp_path)
    assert (tmp_path / "summary.csv").read_bytes() == (study / "summary.csv").read_bytes()


def test_validation_rows_are_no_test_rows(study):
    config = tiny()
    config.study.split, config.study.num_train_images = "validation", (10,)
    tasks.run(config, study)
    assert {line.split(",")[1] for line in (study / "summary.csv").read_text().splitlines()[1:]} == {
        "builtin:digits:validation"
    }


def test_transfer_and_evaluate_take_its_model_folders(study, tmp_path):
    config = tiny()
    config.stage, config.source = "transfer", str(study / "sources" / "l2_0.25" / "model")
    config.transfer.update(num_train_images=25, num_unfrozen_blocks=1)
    assert "fine-tune 1 block of resnet_tiny on 25 images" in tasks.plan(config, tmp_path / "digits")
    tasks.run(config, tmp_path / "digits")
    model = load_model(tmp_path / "digits" / "model")
    assert (model.spec.norm, model.spec.provenance["source"]["norm"]) == ("none", "l2")
    rows = _rows(tmp_path / "digits" / "rows.csv")
    assert [(row["source"], row["epoch"]) for row in rows] == [("l2_0.25", "1"), ("l2_0.25", "3")]

    config = tiny()
    config.stage, config.evaluate.model = "evaluate", str(tmp_path / "digits" / "model")
    config.evaluate.norm, config.evaluate.num_images = "none", 0
    tasks.run(config, tmp_path / "measured")
    found = json.loads((tmp_path / "measured" / "evaluation.json").read_text())
    assert found["natural_accuracy"] == pytest.approx(float(rows[-1]["test_accuracy"]), abs=1e-6)
    assert "adversarial_accuracy" not in found


def test_plans_say_of_how_many_blocks_images_steps_and_bytes(tmp_path):
    save_model(_blank(), tmp_path / "blank")
    digits, config = load_dataset("builtin:digits", image_size=8), tiny()
    config.stage, config.evaluate.model = "evaluate", str(tmp_path / "blank")
    whole = digits.test.num_images
    for asked, number in ((0, whole), (50, 50), (whole + 1, whole)):
        config.evaluate.num_images = asked
        message = tasks.plan(config, tmp_path / "out")
        assert message == f"evaluate resnet_tiny on {number} images of builtin:digits, 2 × PGD-2"
    config.evaluate.norm = "none"
    assert tasks.plan(config, tmp_path / "out").endswith("of builtin:digits")

    config.stage, config.source = "transfer", config.evaluate.model
    config.transfer.num_train_images = 25
    for k, blocks in ((-1, "all blocks"), (0, "0 blocks"), (1, "1 block")):
        config.transfer.num_unfrozen_blocks = k
        message = f"fine-tune {blocks} of resnet_tiny on 25 images of builtin:digits, 9 steps"
        assert tasks.plan(config, tmp_path / "out") == message
    config.transfer.num_train_images = -1
    assert f"on {digits.train.num_images} images of" in tasks.plan(config, tmp_path / "out")

    config = tiny()
    config.stage = "source"
    for norm, eps, attack in (("none", 0.0, ""), ("linf", 0.25, " against PGD-3")):
        config.train.update(norm=norm, eps=eps, attack_steps=3)
        size = source.state_bytes(read(config).training, digits)
        size += digits.train.images.nbytes + digits.train.labels.nbytes
        name = "natural" if norm == "none" else "linf:0.25"
        assert tasks.plan(config, tmp_path / "out") == (
            f"source {name}: train resnet_tiny, {digits.train.num_images // 80} steps of 80 images{attack} "
            f"on 2 devices; state and images {size / 1e6:,.1f} MB a device"
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("norm", "input_norm", "changed"),
    [("none", "target", True), ("none", "source", False), ("l2", "target", False)],
)
def test_a_transfer_normalises_natural_sources_and_sets_images_aside_but_of_all(
    norm, input_norm, changed, tmp_path, monkeypatch
):
    model = _blank(norm)
    save_model(model, tmp_path / "blank")
    config, asked, sources = tiny(), [], []
    config.stage, config.source = "transfer", str(tmp_path / "blank")
    config.transfer.input_norm = input_norm
    for name, spy in (
        ("load_data", lambda *_, **options: asked.append(options["set_aside"])),
        ("make_trial", lambda _, source, *args, **options: sources.append(source)),
    ):
        own = getattr(transfer, name)
        monkeypatch.setattr(
            transfer, name, lambda *a, own=own, spy=spy, **kw: (spy(*a, **kw), own(*a, **kw))[1]
        )
    for config.transfer.num_train_images in (25, -1):
        tasks.plan(config, tmp_path / "out")
    assert asked == [True, False]
    images = load_dataset("builtin:digits", image_size=8).train.images
    expected = identity(normalised_by(model, images) if changed else model)
    assert sources == [Source("blank", norm, model.spec.eps, expected)] * 2


@pytest.mark.parametrize(("num_classes", "num_skipped"), [(30, 5), (31, 6), (2, 0)])
def test_remarks_name_thirty_classes_and_five_broken_images(num_classes, num_skipped):
    names = [f"c{i}" for i in range(num_classes)]
    split = load_dataset("builtin:digits", image_size=8).test
    images = [f"p{i}" for i in range(num_skipped)]
    hashes, files = np.arange(797, dtype=np.uint64), np.array(797 * ["x"])
    part = Part(split.images, split.labels, np.array(images, str), np.array(""), hashes, files)
    empty = part._replace(skipped=np.empty(0, str), hashes=np.empty(0, np.uint64), labels=split.labels[:0])
    remarks = inspect({"train": part, "validation": empty, "test": empty}, names)
    target = Dataset("mine", tuple(names), split, split, split, remarks=tuple(remarks))
    place = Place("mine", "natural", 8, is_whole=False)
    classes, *broken = _remarks(StudyInputs([], None, [], {place: target}, "source"))
    more = ", … (31)" if num_classes == 31 else ""
    assert classes == f"The classes of mine: {', '.join(names[:30])}{more}."
    end = "; …." if num_skipped == 6 else "."
    message = f"mine: left out {num_skipped} images that cannot be decoded: {'; '.join(images[:5])}{end}"
    assert broken == [message] * (num_skipped > 0)


def test_a_retrained_model_is_measured_again(study, tmp_path):
    """The figures of the model that stood there before must not pass for the new one's."""
    config = tiny()
    config.stage, config.evaluate.norm = "evaluate", "none"
    link = tmp_path / "current"
    for name in ("natural", "l2_0.25"):
        link.unlink(missing_ok=True)
        os.symlink(study / "sources" / name / "model", link)
        config.evaluate.model = str(link)
        tasks.run(config, tmp_path / "measured")
        found = json.loads((tmp_path / "measured" / "evaluation.json").read_text())
        reference = json.loads((study / "sources" / name / "evaluation.json").read_text())
        assert found["model"] == reference["model"]
        assert found["natural_accuracy"] == reference["natural_accuracy"]


def test_a_diverged_transfer_is_an_error_and_leaves_no_model(study, tmp_path):
    config = tiny()
    config.stage, config.source = "transfer", str(study / "sources" / "natural" / "model")
    config.transfer.num_train_images, config.transfer.learning_rate = 25, 1e38
    with pytest.raises(DivergedError, match=r"learning rate 1e\+38"):
        tasks.run(config, tmp_path)
    assert not (tmp_path / "model").exists()


def test_a_diverged_trial_has_no_accuracy(study, tmp_path):
    config = tiny()
    config.study.sources = f"{study}/sources/natural/model"
    config.study.num_train_images = (10,)
    config.transfer.learning_rate = 1e38
    tasks.run(config, tmp_path)
    last = [row for row in _rows(tmp_path / "rows.csv") if row["epoch"] == "3"]
    assert last and all(row["test_accuracy"] in ("", "nan") for row in last)
    assert "without a test accuracy" in (tmp_path / "report.html").read_text()


def test_a_damaged_model_is_named_before_anything_is_written(study, tmp_path):
    config = tiny()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model.json").write_bytes((study / "sources/natural/model/model.json").read_bytes())
    config.stage, config.evaluate.model = "evaluate", str(broken)
    with pytest.raises(ConfigError, match=r"config.evaluate.model: the weights in .* cannot be read"):
        tasks.run(config, tmp_path / "measured")
    assert not (tmp_path / "measured").exists()


def test_two_model_folders_are_told_apart_by_their_parents(study):
    config = tiny()
    config.study.sources = ",".join(f"{study}/sources/{name}/model" for name in ("natural", "l2_0.25"))
    lines = tasks.plan(config, study.parent / "unused").splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["source natural", "source l2_0.25"]
    assert not any(line.endswith("done") for line in lines)


def _write_folder(root):
    """Squares of 5² pixels: 15 bright and 15 dark ones to train on, 4 of each to test with, one broken."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 15), ("test", 4)):
        for low, name in ((0, "dark"), (128, "bright")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(low, low + 128, (5, 5, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    (root / "test/dark/3.png").write_bytes(b"no image")


def test_a_folder_of_small_squares_goes_the_whole_way(study, tmp_path):
    """Resized on the device, all images where all are asked for, and measured anew when one has changed."""
    _write_folder(tmp_path / "set")
    config = tiny()
    config.study.sources = f"{study}/sources/natural/model"
    config.study.update(num_train_images=(10, -1), num_seeds=1)
    config.transfer.target, config.cache_dir = f"folder:{tmp_path / 'set'}", str(tmp_path / "cache")
    with pytest.raises(ConfigError, match=r"1 of 8 test images .* --config.broken_images=skip"):
        tasks.plan(config, tmp_path / "out")
    config.broken_images = "skip"
    config.transfer.augmentation.flip = True  # no cached prefix
    plan = tasks.plan(config, tmp_path / "out")
    assert "fine-tune 2 of 2 models" in plan
    assert f"or {(30 + 7) * 5 * 5 * 3 / 1e6:,.1f} MB of images" in plan
    tasks.run(config, tmp_path / "out")
    rows = [row for row in _rows(tmp_path / "out/rows.csv") if row["epoch"] == "3"]
    assert [row["num_train_images"] for row in rows] == ["10", "30"]  # 27 train where 3 validate
    assert all(0 <= float(row["test_mean_per_class_accuracy"]) <= 1 for row in rows)
    page = (tmp_path / "out/report.html").read_text()
    assert f"The classes of folder:{tmp_path / 'set'}: bright, dark." in page
    assert "left out 1 image that cannot be decoded: test/dark/3.png" in page

    config.study.split = "validation"
    assert "fine-tune 2 of 2 models" in tasks.plan(config, tmp_path / "out")
    config.study.split = "test"
    assert "fine-tune 0 of 2 models" in tasks.plan(config, tmp_path / "out")
    Image.new("RGB", (5, 5)).save(tmp_path / "set/train/dark/0.png")
    assert "fine-tune 2 of 2 models" in tasks.plan(config, tmp_path / "out")
