"""stage=import and models by name, the whole way from the command line to a model folder and its accuracy."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
import safetensors.numpy

import advtransfer as at
from advtransfer import config as base
from advtransfer import tasks
from advtransfer.config import ConfigError, read
from advtransfer.tasks import inputs
from advtransfer.tasks.inputs import model_name

pytestmark = pytest.mark.usefixtures("two_blocks", "unoptimised")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A workdir with a small trained source, and in it the same network as a PyTorch user has it."""
    folder = tmp_path_factory.mktemp("source")
    config = base.default()
    config.stage = "source"
    config.train.update(
        dataset="builtin:digits", image_size=8, batch_size=80, num_epochs=2, norm="l2", eps=0.5
    )
    config.evaluate.update(norm="none", batch_size=16)
    tasks.run(config, folder)
    at.export_torch_state_dict(at.load_model(folder), folder / "digits_l2.safetensors")
    return folder


def importing(source, **changes):
    config = base.default()
    config.stage, config.source = "import", str(source)
    config.evaluate.update(norm="none", batch_size=16)
    for key, value in changes.items():
        config[key] = value
    return config


def _launch(*arguments, cwd):
    return subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), *arguments],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "HF_HUB_OFFLINE": "1",
            "XDG_CACHE_HOME": str(cwd / "cache"),
        },
        timeout=300,
        cwd=cwd,
    )


def test_export_import_and_verify_give_the_model_back(study, tmp_path, capsys):
    config = importing(study / "digits_l2.safetensors", verify="builtin:digits")
    assert "resnet_tiny, 10 classes, 8 pixels, l2 eps 0.5" in tasks.plan(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    tasks.run(config, tmp_path / "out")
    original, imported = at.load_model(study), at.load_model(tmp_path / "out")
    chex.assert_trees_all_equal(original.variables, imported.variables)
    fields = ("architecture", "num_classes", "image_size", "mean", "std", "norm", "eps", "class_names")
    assert all(getattr(original.spec, field) == getattr(imported.spec, field) for field in fields)
    measured = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    reference = json.loads((study / "evaluation.json").read_text())
    assert measured["natural_accuracy"] == reference["natural_accuracy"]
    assert f"natural accuracy {reference['natural_accuracy']:.1%}" in capsys.readouterr().out


def test_the_same_command_again_and_a_new_verification_are_no_conflict(study, tmp_path):
    config = importing(study / "digits_l2.safetensors")
    tasks.run(config, tmp_path)
    before = (tmp_path / "model" / "model.json").read_text()
    tasks.run(importing(study / "digits_l2.safetensors", verify="builtin:digits"), tmp_path)
    assert (tmp_path / "model" / "model.json").read_text() == before
    assert (tmp_path / "evaluation.json").exists()
    with pytest.raises(ConfigError, match="another --workdir"):
        other = importing(study / "digits_l2.safetensors")
        other.checkpoint.image_size = 16
        tasks.run(other, tmp_path)


def test_what_the_user_knows_comes_before_the_file(study, tmp_path):
    config = importing(study / "digits_l2.safetensors")
    config.checkpoint.update(
        norm="linf", eps=4 / 255, image_size=16, mean=(0.5, 0.5, 0.5), std=(1.0, 1.0, 1.0)
    )
    config.checkpoint.architecture = "resnet_tiny"
    tasks.run(config, tmp_path)
    spec = at.load_model(tmp_path).spec
    assert (spec.norm, spec.eps, spec.image_size, spec.std) == ("linf", 4 / 255, 16, (1.0, 1.0, 1.0))
    assert spec.provenance["threat_model"] == spec.provenance["normalisation"] == "argument"


def test_verification_compares_with_the_published_accuracy(study, tmp_path, capsys, monkeypatch):
    known = at.torch_checkpoint.KnownModel(
        file="digits_l2.safetensors",
        repo="",
        architecture="resnet_tiny",
        norm="l2",
        eps=0.5,
        dataset="digits",
        accuracy=0.25,
        sha256="",
        licence="",
        source="here",
    )
    monkeypatch.setattr("advtransfer.torch_checkpoint.convert.find_known", lambda *_, **__: known)
    tasks.run(importing(study / "digits_l2.safetensors", verify="builtin:digits"), tmp_path)
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["published"]["accuracy"] == 0.25
    points = 100 * (found["natural_accuracy"] - 0.25)
    # The standard error of a share of 1/4 among 797 images, in points.
    error = 100 * np.sqrt(0.25 * 0.75 / 797)
    assert f"published: 25.00% on digits ({points:+.2f} points here" in (message := capsys.readouterr().out)
    assert f"{error:.2f})" in message


def test_a_checkpoint_is_a_source_by_its_own_name(study, tmp_path):
    """transfer, study and evaluate take a PyTorch file where they take a folder, with the same results."""
    rows = {}
    for kind, name in (("folder", study), ("file", study / "digits_l2.safetensors")):
        config = base.default()
        config.stage, config.source = "transfer", str(name)
        config.transfer.update(num_train_images=20, batch_size=10, num_epochs=2, evaluate_epochs=(2,))
        tasks.run(config, tmp_path / kind)
        rows[kind] = (tmp_path / kind / "rows.csv").read_text().splitlines()[1].split(",")
    assert rows["file"][0] == "digits_l2" and rows["folder"][0] == study.name
    assert rows["file"][1:13][:-1] == rows["folder"][1:13][:-1]  # all but the seconds
    config = base.default()
    config.stage, config.evaluate.model = "evaluate", str(study / "digits_l2.safetensors")
    config.evaluate.update(dataset="builtin:digits", norm="none", batch_size=16)
    tasks.run(config, tmp_path / "measured")
    measured = json.loads((tmp_path / "measured" / "evaluation.json").read_text())
    assert measured["model"] == json.loads((study / "evaluation.json").read_text())["model"]
    config = base.default()
    config.study.update(sources=f"natural,{study / 'digits_l2.safetensors'}", calibration=0.0)
    assert f"source digits_l2: {study}/digits_l2.safetensors" in tasks.plan(config, tmp_path / "study")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"source": ""}, "config.source: name a PyTorch file"),
        ({"source": "no/such.pt"}, "config.source: no/such.pt: there is no such file"),
        ({"source": "{study}/log.jsonl"}, "config.source: .*log.jsonl.*"),
        ({"source": "{study}"}, "config.source: .* is a folder"),
        ({"verify": "builtin:digit"}, "config.verify: .*did you mean builtin:digits"),
        (
            {"verify": "builtin:glyphs", "image_size": 16},
            "config.verify: builtin:glyphs has 23 classes, the model 10",
        ),
        ({"architecture": "resnet50"}, "config.source: .*do not fit resnet50.*they match resnet_tiny"),
        ({"num_classes": 7}, "config.source: .*fc.weight"),
        ({"sha256": "0" * 64}, "config.source: .*SHA-256"),
        ({"norm": "l3"}, "config.checkpoint.norm='l3' must be one of"),
        ({"norm": "l2"}, "config.source: .*eps"),
        ({"eps": -1.0}, "config.checkpoint.eps=-1.0 must be a number, 0 or more"),
        ({"mean": (0.5,)}, "config.checkpoint.mean=.* three numbers, or none"),
        ({"mean": (0.5, 0.5, 0.5)}, "config.source: .*both mean= and std="),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(study, tmp_path, changes, words):
    config = importing(study / "digits_l2.safetensors")
    for key, value in changes.items():
        value = value.format(study=study) if isinstance(value, str) else value
        (config.checkpoint if key in config.checkpoint else config)[key] = value
    with pytest.raises(ConfigError, match=words) as caught:
        tasks.run(config, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refuse_to_touch(config, workdir, words):
    """Neither stage nor plan begins, and every file stays."""
    before = files(workdir)
    for act in (tasks.plan, tasks.run):
        with pytest.raises(ConfigError, match=words) as caught:
            act(config, workdir)
        assert "\n" not in str(caught.value) and files(workdir) == before


def test_a_workdir_of_something_else_is_left_alone(study, tmp_path, monkeypatch):
    config = importing(study / "digits_l2.safetensors")
    mine, copied, single = tmp_path / "mine", tmp_path / "copied", tmp_path / "single"
    tasks.run(config, mine)
    monkeypatch.setattr(
        "advtransfer.tasks.importing.import_torch_checkpoint", lambda *_, **__: pytest.fail("it was read")
    )
    for key, value in (("image_size", 16), ("norm", "none")):
        other = importing(study / "digits_l2.safetensors")
        other.checkpoint[key] = value
        refuse_to_touch(other, mine, f"checkpoint.{key}: .* another --workdir")
    refuse_to_touch(config, study, "stage: 'source' there, 'import' now")
    shutil.copytree(study / "model", copied / "model")  # a user's, without a config.json
    refuse_to_touch(config, copied, r"holds files that advtransfer did not write \(model\)")
    single.mkdir()
    (single / "model").write_text("years of work")
    refuse_to_touch(config, single, r"holds files that advtransfer did not write \(model\)")


def test_what_is_no_model_is_not_overwritten(study, tmp_path):
    """In the workdir of the same import."""
    config = importing(study / "digits_l2.safetensors")
    tasks.run(config, tmp_path)
    (tmp_path / "model" / "model.json").rename(tmp_path / "model" / "notes.json")
    refuse_to_touch(config, tmp_path, f"{tmp_path}.* choose another")


def test_what_is_known_of_a_file_is_for_its_import(study):
    known = {"architecture": "resnet18", "num_classes": 7, "image_size": 16, "mean": (0.5,) * 3}
    known |= {"weights": "ema", "std": (0.5,) * 3, "norm": "l2", "eps": 1.0, "sha256": "0" * 64}
    assert set(known) == set(base.default().checkpoint)
    for key, value in known.items():
        for stage in set(tasks.TASKS) - {"import"}:
            config = importing(study / "digits_l2.safetensors", stage=stage)
            config.checkpoint[key] = value
            with pytest.raises(ConfigError, match=f"config.checkpoint.{key} is for config.stage=import"):
                read(config)
        read(importing("a.pt", checkpoint=config.checkpoint))


def test_a_source_without_a_head_can_be_fine_tuned_and_not_measured(study, tmp_path, caplog):
    tensors = at.export_torch_state_dict(at.load_model(study))
    path, folder = tmp_path / "a.safetensors", tmp_path / "imported"
    body = {f"backbone.{n}": x for n, x in tensors.items() if not n.startswith("fc.")}
    safetensors.numpy.save_file(body | {"head.fc.weight": tensors["fc.weight"]}, path)
    config = importing(path)
    config.checkpoint.update(mean=(0.5,) * 3, std=(0.5,) * 3, image_size=8)
    assert "resnet_tiny, a new head, 8 pixels" in tasks.plan(config, folder)
    assert "left out: head (1 tensor)" in caplog.text
    tasks.run(config, folder)
    assert not (folder / "evaluation.json").exists()
    config.verify = "builtin:digits"
    refuse_to_touch(config, folder, "config.verify: this model was imported without a head, .*transfer")
    config = base.default()
    config.stage, config.evaluate.model, config.evaluate.dataset = "evaluate", str(folder), "builtin:digits"
    config.evaluate.norm = "none"
    refuse_to_touch(config, tmp_path / "out", "config.evaluate.model: this model was imported without a head")
    config = base.default()
    config.stage, config.models, config.data = "interpret", str(folder), "builtin:digits"
    refuse_to_touch(config, tmp_path / "out", "config.models: imported was imported without a head, and only")
    config = base.default()
    config.stage, config.source = "transfer", str(folder)
    config.transfer.update(num_train_images=20, batch_size=10, num_epochs=2, evaluate_epochs=(2,))
    tasks.run(config, tmp_path / "transfer")
    assert at.load_model(tmp_path / "transfer").spec.has_head


def test_the_wrapping_is_reported(study, tmp_path):
    tensors = at.export_torch_state_dict(at.load_model(study))
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({f"module.{name}": value for name, value in tensors.items()}, path)
    config = importing(path)
    config.checkpoint.update(mean=(0.5,) * 3, std=(0.5,) * 3)
    assert "from a.safetensors (safetensors, module.)" in tasks.plan(config, tmp_path / "out")


@pytest.mark.process
def test_the_command_line(tmp_path):
    experiment = f"--config={ROOT / 'experiments/import_source.py'}"
    done = _launch(experiment, "--config.source=list", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "hf:madrylab/robust-imagenet-models/resnet50_l2_eps3.ckpt" in done.stdout
    assert list(tmp_path.iterdir()) == []

    # The other process knows resnet_tiny as it is.
    module = at.create_module("resnet_tiny", num_classes=3).clone(stage_sizes=(1, 1, 1, 1), width=16)
    spec = at.ModelSpec("resnet_tiny", 3, 8, module.mean, module.std)
    model = at.Model(module, at.init_variables(module, jax.random.key(0), 8), spec)
    at.export_torch_state_dict(model, tmp_path / "mine.safetensors")
    done = _launch(experiment, "--config.source=mine.safetensors", "--workdir=imported", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    description = json.loads((tmp_path / "imported" / "model" / "model.json").read_text())
    assert description["provenance"]["file"] == "mine.safetensors"

    name = "hf:madrylab/robust-imagenet-models/resnet50_l2_eps3.ckpt"
    done = _launch(experiment, f"--config.source={name}", "--workdir=offline", cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    url = "https://huggingface.co/madrylab/robust-imagenet-models/resolve/main/resnet50_l2_eps3.ckpt"
    assert url in done.stderr and str(tmp_path / "cache") in done.stderr
    assert not (tmp_path / "offline").exists()


@pytest.mark.parametrize("stage", ["transfer", "evaluate", "study"])
def test_a_checkpoint_is_read_once(study, tmp_path, monkeypatch, stage):
    """For its plan too; hashing one of 205 MB takes a second."""
    config, checkpoint = base.default(), str(study / "digits_l2.safetensors")
    config.stage, config.source = stage, checkpoint
    config.evaluate.update(model=checkpoint, dataset="builtin:digits", norm="none", batch_size=16)
    config.study.update(sources=checkpoint, num_unfrozen_blocks=(0,), num_train_images=(20,))
    config.study.calibration = 0.0
    config.transfer.update(num_train_images=20, batch_size=10)
    opened, original = [], inputs.import_torch_checkpoint
    monkeypatch.setattr(
        inputs, "import_torch_checkpoint", lambda name, **kw: opened.append(name) or original(name, **kw)
    )
    tasks.plan(config, tmp_path / "out")
    assert opened == [checkpoint]


def test_names_of_models():
    assert model_name("runs/l2/model") == model_name("runs/l2") == "l2"
    assert model_name("hf:a/b/resnet50_linf_eps4.0.ckpt@v1") == "resnet50_linf_eps4.0"
    assert model_name("hf:timm/resnet50.tv_in1k/model.safetensors") == "resnet50.tv_in1k"


def test_the_list_and_a_plan_read_no_file(tmp_path, capsys):
    assert tasks.plan(importing("list"), tmp_path / "out") == "print the known models"
    tasks.run(importing("list"), tmp_path / "out")
    assert "resnet50_l2_eps3.ckpt" in capsys.readouterr().out
    name = "hf:madrylab/robust-imagenet-models/resnet50_l2_eps3.ckpt"
    assert f"fetch {name} and import it" in tasks.plan(importing(name), tmp_path / "out").splitlines()
    with pytest.raises(ConfigError, match="config.source: .*hf:OWNER/NAME/FILE"):
        tasks.plan(importing("hf:madrylab"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
