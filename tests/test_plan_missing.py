"""Plans and runs without datasets, models and network: what is known of them, and all that is missing."""

import logging
import re

import numpy as np
import pytest
from test_data_tfds import encode, write_set
from test_launch import ROOT, _config, launch  # noqa: F401 (a fixture)
from test_paper_grid import SIZES

from advtransfer import hub, tasks
from advtransfer.config import ConfigError, read
from advtransfer.data import Target, choose_augmentation, load_dataset, plan_dataset, planned
from advtransfer.data.planned import known_sizes
from advtransfer.data.stream import StreamedSplit
from advtransfer.models import ARCHITECTURES, create_module
from advtransfer.tasks import inputs, missing, study_inputs, study_plan
from advtransfer.tasks.inputs import find_model
from advtransfer.torch_checkpoint import KNOWN_MODELS, KnownModel, file_bytes

SOURCES = _config("paper_study").study.sources.split(",")
BUILD = "pip install tensorflow && tfds build {} --file_format=array_record"


@pytest.fixture(autouse=True)
def empty(tmp_path, monkeypatch):
    """Folders without datasets and models, and no way to download one."""
    pytest.importorskip("tensorflow_datasets")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "_download", lambda *_: pytest.fail("downloads"))
    monkeypatch.setattr(hub, "_cached", lambda *_: None)
    return tmp_path


@pytest.mark.parametrize("name", ["paper_study", "fast_study"])
def test_the_papers_grid_is_planned_from_what_is_known(name, launch, empty):  # noqa: F811
    done = launch(
        "--plan",
        f"--config={ROOT / 'experiments' / name}.py",
        f"--workdir={empty / 'run'}",
    )
    assert done.code == 0, done.err
    assert "fine-tune 14,400 of 14,400 models in 960 groups" in done.out
    # 4 sources, 6 targets, 10 n and 4 k; the faithful protocol trains nothing on cached activations.
    number, hours = {"paper_study": (0, 326), "fast_study": (4 * 6 * 4 * 2, 20)}[name]
    assert f"of {number} caches" in done.out
    assert float(re.search(r"H200 ([\d.,]+) h", done.out)[1]) == pytest.approx(hours, rel=0.03)
    # SVHN's 68,257 training and 26,032 test images of 32², enlarged on the device.
    assert f"or {(68_257 + 5_000 + 26_032) * 32 * 32 * 3 / 1e6:,.1f} MB of images" in done.out
    listed = done.out.split("datasets to prepare")[1]
    for target, (num_train, num_test, _) in SIZES.items():
        set_name = target.removeprefix("tfds:")
        assert re.search(
            rf"{target} \({num_train:,} \+ {num_test:,} images, [\d,]+ MB to download\): "
            + re.escape(BUILD.format(set_name)),
            listed,
        )
    for source in SOURCES:
        assert f"  {source} (about {102 if 'timm' in source else 205} MB)" in listed
    assert list(empty.iterdir()) == []


@pytest.mark.parametrize(
    ("experiment", "words"),
    [
        (
            "source_imagenet.py:l2_3",
            [
                f"{90 * (1_276_167 // 256):,} steps of 256 images",  # 5,000 are set aside
                "imagenet2012 (1,281,167 + 50,000 images, 154,642 MB to download, by hand",
            ],
        ),
        ("source_cifar10.py", [f"{150 * (45_000 // 128):,} steps", "tfds:cifar10 (50,000 + 10,000"]),
        ("cifar10_to_mnist.py", ["tfds:cifar10:train[:20%] (10,000 + 10,000", "240 models", "tfds:mnist ("]),
        (
            "salman_study.py:full",
            ["60 of 60 models", "before them 40", BUILD.format("dtd"), "tfds:food101 ("],
        ),
        ("import_source.py", ["fetch ", "resnet50_l2_eps3.ckpt (about 205 MB)"]),
        (
            "transfer.py",
            ["of resnet50 on 200 images of tfds:food101", "about 102 MB", "tfds:food101 (75,750"],
        ),
        ("evaluate.py", ["evaluate resnet50 on 50,000 images", "about 205 MB", "tfds:imagenet2012 ("]),
        ("interpret.py", ["explain 1 networks", "about 205 MB", "tfds:cifar10 (50,000"]),
        ("layer_by_layer.py:16", ["180 of 180 models", "of 17 caches", "tfds:cifar10 (", "about 102 MB"]),
    ],
)
def test_every_experiment_is_planned(experiment, words, launch, empty, monkeypatch):  # noqa: F811
    for stage in (tasks.transfer, study_inputs):  # the statistics of noise are nobody's
        monkeypatch.setattr(stage, "normalised_by", lambda *_: pytest.fail("normalises by noise"))
    more = {
        "import_source.py": [f"source={SOURCES[1]}", "verify=tfds:imagenet2012"],
        "transfer.py": [f"source={SOURCES[0]}", "transfer.target=tfds:food101", "transfer.input_norm=target"],
        "evaluate.py": [f"evaluate.model={SOURCES[1]}", "evaluate.dataset=tfds:imagenet2012"],
        "interpret.py": [f"models={SOURCES[1]}", "data=tfds:cifar10"],
        "layer_by_layer.py:16": [f"study.sources={SOURCES[0]}", "study.targets=tfds:cifar10"],
    }.get(experiment, [])
    done = launch(
        "--plan",
        f"--config={ROOT / 'experiments' / experiment}",
        f"--workdir={empty / 'run'}",
        *(f"--config.{change}" for change in more),
    )
    assert done.code == 0, done.err
    assert all(word in done.out for word in words), done.out
    assert list(empty.iterdir()) == []


@pytest.mark.parametrize("change", ["", "natural,"])
def test_a_run_names_all_missing_sets_before_it_begins(change, launch, empty):  # noqa: F811
    done = launch(
        f"--config={ROOT / 'experiments' / 'fast_study.py'}",
        f"--workdir={empty / 'run'}",
        f"--config.study.sources={change}{','.join(SOURCES)}",
        "--config.train.dataset=tfds:imagenet2012",
    )
    assert (done.code, done.out, len(done.err.splitlines())) == (2, "", 1)
    keys = "config.train.dataset, config.study.targets" if change else "config.study.targets"
    assert done.err.startswith(f"{keys}: not prepared (looked in {empty / 'tfds'}, TFDS_DATA_DIR")
    names = [*(["imagenet2012"] if change else []), *(name.removeprefix("tfds:") for name in SIZES)]
    assert re.findall(r"tfds build (\w+) ", done.err) == names
    assert list(empty.iterdir()) == []


def test_a_set_of_unknown_size_is_the_error_that_it_was(empty):
    config = _config("source")
    config.train.dataset = "tfds:emnist"
    for act in (tasks.plan, tasks.run):
        with pytest.raises(ConfigError) as error:
            act(config, empty / "run")
        with pytest.raises(ValueError, match="tfds:emnist is not prepared") as plain:
            load_dataset("tfds:emnist")
        assert str(error.value) == f"config.train.dataset: {plain.value}"
    config.train.dataset = "tfds:svhn_cropped:train+extra"
    with pytest.raises(ConfigError, match="config.train.dataset: tfds:svhn_cropped:train.extra is not prep"):
        tasks.plan(config, empty / "run")
    config = _config("study_small")
    config.study.targets = "tfds:emnist,tfds:mnist,tfds:minst"
    with pytest.raises(ConfigError, match="study.targets: unknown dataset 'tfds:minst'"):
        tasks.run(config, empty / "run")
    config.study.targets = "tfds:emnist,tfds:mnist"
    with pytest.raises(ConfigError, match="study.targets: .*tfds:emnist: pip.*tfds:mnist .60,000 .* images"):
        tasks.run(config, empty / "run")
    assert not (empty / "run").exists()


def test_a_model_of_unknown_shape_is_not_downloaded_by_a_plan(empty):
    config = _config("transfer")
    config.source = "hf:somebody/else/resnet50_l2_eps3.ckpt"
    with pytest.raises(ConfigError, match=r"config.source: hf:somebody/else/.* is not on this machine"):
        tasks.plan(config, empty / "run")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tfds:cifar10", (50_000, 10_000)),
        ("tfds:cifar10:train[:20%]", (10_000, 10_000)),
        ("tfds:cifar10:train[:10]+train[-5:]", (15, 10_000)),
        ("tfds:dtd:train+validation", (3_760, 1_880)),
        ("tfds:food101:train", (75_750, 25_250)),
        ("tfds:dtd", None),  # its recorded splits are not in the table
        ("tfds:cifar10:3.0.2", None),
        ("tfds:svhn_cropped:train+extra", None),
        ("tfds:mnist:test", None),
        ("tfds:mnist:train[:60001]", None),
        ("tfds:mnist:train[a]", None),
        ("tfds:mnist:train[5:5]", None),
        ("folder:/cifar10", None),
    ],
)
def test_known_sizes(name, expected):
    known = known_sizes(name)
    assert (known and (known.num_train, known.num_test)) == expected


def test_a_placeholder_looks_like_its_set(caplog):
    for name, preset_crops in (("tfds:mnist", 0), ("tfds:svhn_cropped", 4)):
        placeholder = plan_dataset(name, image_size=224, enlarge=False, splits=("train", "test"))
        num_train, num_test, num_classes = SIZES[name]
        side = 28 if "mnist" in name else 32
        assert placeholder.train.images.shape == (num_train - 5000, side, side, 3)
        assert placeholder.train.nbytes == (num_train - 5000) * side * side * 3
        assert placeholder.test.num_images == num_test and placeholder.validation.num_images == 0
        assert len(placeholder.class_names) == len(np.unique(placeholder.train.labels)) == num_classes
        recipe = read(_config("paper_study")).recipe
        assert choose_augmentation(recipe.augmentation, placeholder.train.images).crop_padding == preset_crops
    assert plan_dataset("tfds:mnist", image_size=16, enlarge=False, set_aside=False).train.images.shape == (
        (60_000, 16, 16, 3)
    )
    assert not caplog.records
    with caplog.at_level(logging.WARNING):  # some TB at this size
        plan_dataset("tfds:food101", image_size=4000)
    assert "101,000 images of tfds:food101 at 4000² pixels take 4,848.0 GB" in caplog.text
    streamed = plan_dataset("tfds:imagenet2012", image_size=224, splits=("train", "test"), loading="auto")
    assert isinstance(streamed.train, StreamedSplit) and streamed.train.num_images == 1_276_167
    with pytest.raises(ValueError, match="not prepared"):
        streamed.train.read([0])


@pytest.fixture
def small_mnist(empty, monkeypatch):
    """A table that has a grey set of 60 + 30 images; what writes it where prepared sets are."""
    known = Target("tfds:mnist", 2, 60, 30, 5, "none", num_channels=1)
    monkeypatch.setattr(planned, "find_target", {"tfds:mnist": known}.get)

    def images(count):
        return [(encode(np.full((5, 5), serial, np.uint8)), serial % 2) for serial in range(count)]

    sets = {"train": images(60), "test": images(30)}
    return lambda: write_set(empty / "tfds/mnist/1.0.0", sets, shape=(5, 5, 1))


@pytest.mark.parametrize("loading", ["memory", "stream"])
@pytest.mark.parametrize("rates", [(), (0.1, 0.01)])
def test_a_plan_is_the_same_before_and_after_the_set_is_prepared(loading, rates, small_mnist, empty):
    config = _config("study_small")
    config.train.update(dataset="tfds:mnist:train[:50%]", image_size=8, batch_size=8, loading=loading)
    config.transfer.augmentation.preset = "utrera"
    config.study.update(sources="natural,l2:0.25", targets="tfds:mnist", num_train_images=(10, -1))
    config.study.learning_rates = rates
    config.study.views = ("natural", "silhouette")

    def plan():
        return re.sub(r"[\d,]+ MB are free", "", tasks.plan(config, empty / "run")).splitlines()

    before = plan()
    small_mnist()
    assert before[:-3] == plan()
    assert [line.split(" ")[2] for line in before[-2:]] == ["tfds:mnist:train[:50%]", "tfds:mnist"]


@pytest.mark.parametrize("gone", ["model", "images"])
def test_nothing_is_measured_before_all_is_there(gone, small_mnist, empty, monkeypatch):
    known = KnownModel("a.pt", "me/a", "resnet_tiny", "l2", 0.5, "CIFAR-10", None, "", "", "", image_size=8)
    for module in (inputs, missing):
        monkeypatch.setattr(module, "known_on_hub", lambda name: known)
    monkeypatch.setattr(study_plan, "measure_speed", lambda *_, **__: pytest.fail("measures"))
    config = _config("study_small")
    config.train.update(dataset="tfds:mnist", image_size=8, batch_size=8)
    sources = {"model": "hf:me/a/a.pt,natural", "images": "natural,l2:0.5"}[gone]
    config.study.update(sources=sources, targets="tfds:mnist", num_train_images=(10,))
    config.study.update(num_unfrozen_blocks=(0,), calibration=30.0)
    if gone == "model":
        small_mnist()
    lines = tasks.plan(config, empty / "run").splitlines()
    # Two sources have a cache each, although neither has weights yet.
    assert lines[3].endswith(" of 2 caches")
    assert lines[6].startswith("nothing is measured here")
    last = f"hf:me/a/a.pt (about {file_bytes(known) / 1e6:.0f} MB)" if gone == "model" else "tfds:mnist (60 +"
    assert len(lines) == 9 and lines[-1].startswith(f"  {last}")


def test_a_set_that_is_there_is_no_placeholder():
    planned = plan_dataset("builtin:digits", image_size=8)
    np.testing.assert_array_equal(planned.train.images, load_dataset("builtin:digits").train.images)
    assert not planned.is_placeholder


def test_a_file_holds_its_networks_numbers():
    """Of 25,557,032 parameters (torchvision's documentation) and two statistics of 26,560 channels."""
    for known in KNOWN_MODELS:
        assert known.architecture in ARCHITECTURES
        if known.architecture == "resnet50" and known.image_size == 224:
            copies = 2 if known.file.endswith(".ckpt") else 1
            assert file_bytes(known) == 4 * (copies * 25_557_032 + 2 * 26_560)


def test_a_known_model_is_planned_as_what_it_is(monkeypatch):
    model = find_model(SOURCES[2], "float32", planned=True)
    spec = model.spec
    assert (spec.architecture, spec.num_classes, spec.image_size) == ("resnet50", 1000, 224)
    assert (spec.norm, spec.eps, model.variables) == ("linf", 4 / 255, {})
    assert model.module == create_module("resnet50", num_classes=1000, dtype=np.float32)
    monkeypatch.setattr(hub, "_cached", lambda *_: ROOT / "setup.py")  # there, so it is read
    for is_planned in (True, False):
        with pytest.raises(ValueError, match="setup.py"):
            find_model(SOURCES[2], "float32", planned=is_planned)
