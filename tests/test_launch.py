"""The command line: bad input is one clear line, exit code 2, and nothing written."""

import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image

from advtransfer import config as base
from advtransfer import main as command
from advtransfer import tasks
from advtransfer.config import ConfigError, read
from advtransfer.data import choose_augmentation
from advtransfer.report import COLUMNS
from advtransfer.source import parse_source

ROOT = Path(__file__).parent.parent


@pytest.fixture
def launch(monkeypatch, capsys):
    """launch(*arguments): launch.py in this process; its exit code and what it says."""

    def run(*arguments, program="launch.py"):
        argv = [program, *arguments]
        monkeypatch.setattr(sys, "argv", argv)  # ml_collections reads the overrides there
        code = 0
        with flagsaver.flagsaver():
            try:
                command.main(command.parse_flags(argv))
            except SystemExit as stopped:
                code = stopped.code
        flags.FLAGS.unparse_flags()  # as the other tests expect them
        return SimpleNamespace(code=code, **capsys.readouterr()._asdict())

    return run


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--config.train.epss=1", ["epss", 'Did you mean "eps"']),
        ("--config.train.num_epochs=many", ["--config.train.num_epochs", "many"]),
        (
            "--config=experiments/nope.py",
            ["no file 'experiments/nope.py'", "come with advtransfer are cifar"],
        ),
        ("--config=experiments/source.py:l2:1", ["'experiments/source.py' (nearest: --config=source:l2:1)"]),
        ("--config=quikstart", ["no experiment 'quikstart' (nearest: --config=quickstart)", "transfer"]),
        ("--config=", ["no experiment ''", "quickstart, "]),
        (f"--config={ROOT / 'experiments/source.py'}:l2:abc", ["'l2:abc': write natural", "l2:0.5"]),
        ("--config.study.num_train_images=(50,'a')", ["config.study.num_train_images=(50, 'a') must be"]),
        ("--workdr=x", ["workdr"]),
        ("workdir", ["workdir", "--NAME=VALUE"]),
        ("--config.train.eps=-1", ["config.train.eps=-1.0", "must be a number, 0 or more"]),
        (f"--config.seed={10**20}", [f"config.seed={10**20} must be a whole number from 0"]),
        ("--config.train.std=(1e999,1.,1.)", ["config.train.std=(inf, 1.0, 1.0) must be"]),
        ("--config.train.learning_rate=nan", ["config.train.learning_rate=nan must be"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(launch, argument, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = launch(f"--workdir={tmp_path / 'results'}", argument)
    assert (done.code, done.out) == (2, "")
    assert len(done.err.splitlines()) == 1, done.err
    assert all(word in done.err for word in words), done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.process
def test_a_mistake_ends_a_real_process_in_the_same_way(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), "--config.train.eps=-1"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "config.train.eps=-1.0 must be a number, 0 or more\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.process
def test_plan_says_what_would_run_and_writes_nothing(launch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = launch("--plan", "--config.study.num_seeds=3", "--config.study.calibration=0.1")
    assert done.code == 0, done.err
    natural, robust, trials, _, size, there, here, training = done.out.splitlines()
    assert natural.startswith("source natural: train resnet_tiny, ")
    assert robust.startswith("source l2:") and "PGD-3" in robust
    config = _config("quickstart")
    grid = len(config.study.num_train_images) * len(config.study.num_unfrozen_blocks) * 2
    assert f"fine-tune {grid * 3} of {grid * 3} models in {grid} groups" in trials
    # At k = 1: 1,597 images, and what enters the last block of a network of width 16, 4 × 4 × 64 floats.
    assert f"{1597 * 4 * 4 * 64 * 4 / 1e6:.1f} MB" in size
    assert all(name in there for name in ("H200", "A100", "v5e"))
    assert "by running the beginning of k = 1" in here and "training of the sources" in training
    assert list(tmp_path.iterdir()) == []


def _config(name="quickstart", *argument):
    config = runpy.run_path(ROOT / "experiments" / f"{name}.py")["get_config"](*argument)
    config.dtype = "float32"
    config.study.calibration = 0.0
    return config


def _set(config, changes):
    for key, value in changes.items():
        section, _, leaf = key.rpartition(".")
        (config[section] if section else config)[leaf] = value
    return config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train.norm": "l2", "train.eps": -0.5}, "config.train.eps=-0.5 must be a number, 0 or more"),
        ({"train.eps": 0.5}, "config.train.eps=0.5 does not go with norm=none"),
        ({"train.norm": "linf", "train.eps": 8.0}, "config.train.eps=8 of norm=linf allows every image"),
        ({"checkpoint.norm": "linf", "checkpoint.eps": 8.0}, "config.checkpoint.eps=8 of norm=linf allows"),
        ({"train.norm": "l1"}, "config.train.norm='l1' must be one of none, l2, linf"),
        ({"stage": "sauce"}, "config.stage='sauce' must be one of"),
        ({"study.num_unfrozen_blocks": (0, 5)}, "config.study.num_unfrozen_blocks: .* has 4"),
        ({"study.num_unfrozen_blocks": (-2,)}, "config.study.num_unfrozen_blocks=.*-1"),
        ({"study.num_train_images": (50, 801)}, "config.study.num_train_images: .*801.* 1 to 800"),
        ({"study.views": ("red",)}, "config.study.views=.*must be a tuple of names of natural"),
        ({"study.fewer_seeds": ((100, 0),)}, "config.study.fewer_seeds=.*pairs of whole numbers, 1 or more"),
        (
            {"study.learning_rates": (0.1, "x")},
            "config.study.learning_rates=.*'x'.* must be a tuple of numbers above 0",
        ),
        ({"study.targets": "builtin:digits,tfds"}, "config.study.targets: unknown dataset 'tfds'"),
        ({"study.epochs": (1,), "study.split": "validation"}, "chosen on these images: report on test"),
        ({"transfer.evaluate_epochs": (0, 999)}, "config.transfer.evaluate_epochs"),
        ({"transfer.target": "builtin:digit"}, "config.transfer.target: .*did you mean builtin:digits"),
        ({"transfer.head_init": "xavier"}, "config.transfer.head_init='xavier' must be one of"),
        ({"train.dataset": "builtin:glyph"}, "config.train.dataset: .*did you mean builtin:glyphs"),
        ({"train.dataset": "http:glyphs"}, "config.train.dataset: .*prefix 'http'"),
        ({"train.architecture": "resnet51"}, "config.train: .*nearest: resnet50"),
        ({"train.batch_size": 10_000}, "config.train: batch_size=10000 is larger than the 8192"),
        ({"train.batch_size": 127, "train.num_devices": 2}, "config.train: .*2 devices"),
        ({"train.num_devices": 3}, "config.train: num_devices=3 is more than the 2 that there are"),
        ({"train.momentum": 1.0}, "config.train.momentum=1.0 must be a number from 0 to below 1"),
        ({"train.momentum": -0.1}, "config.train.momentum=-0.1 must be a number from 0 to below 1"),
        ({"study.sources": "natural,natural"}, "config.study.sources: two sources are called 'natural'"),
        ({"study.sources": "natural,l2:"}, "config.study.sources: 'l2:'.*l2:0.5"),
        ({"study.sources": "no/such"}, "config.study.sources: 'no/such' is not a model folder"),
        ({"study.sources": "natural,l2:inf"}, "config.study.sources: 'l2:inf'.*positive"),
        ({"train.mean": ("a", "b", "c")}, "config.train.mean=.*'a'.* must be a tuple of three numbers"),
        ({"stage": "evaluate"}, "config.evaluate.model: name a model: a folder"),
        ({"stage": "evaluate", "evaluate.model": "no/such"}, "config.evaluate.model: .*not a model folder"),
        ({"stage": "transfer"}, "config.source: name a model: a folder"),
        ({"stage": "report"}, "config.rows: name a file or folder"),
        ({"stage": "report", "rows": "no/such"}, "config.rows: no/such"),
    ],
)
def test_an_impossible_value_names_its_key_and_writes_nothing(changes, words, tmp_path):
    config = _set(_config(), changes)
    for act in (tasks.plan, tasks.run):
        with pytest.raises(ConfigError, match=words) as caught:
            act(config, tmp_path / "results")
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_key_that_does_not_exist_is_named_with_the_nearest():
    config = base.default()
    with config.unlocked():
        config.train.learning_rat = 0.1
    with pytest.raises(ConfigError, match="config.train.learning_rat does not exist: did you mean"):
        read(config)


def test_a_workdir_of_another_config_is_left_alone(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(_config().to_dict()))
    other = _set(_config(), {"train.momentum": 0.5, "train.learning_rate": 0.07})
    message = r"train.learning_rate: .* 0.07 now.*train.momentum: .* 0.5 now.*another --workdir"
    with pytest.raises(ConfigError, match=message):
        tasks.run(other, tmp_path)
    wider = _set(_config(), {"study.num_seeds": 1, "report.title": "x", "train.log_every": 7})
    assert "fine-tune" in tasks.plan(wider, tmp_path)
    older = _config().to_dict()
    del older["study"]["source_seeds"]  # a key that changes nothing of what the workdir holds
    (tmp_path / "config.json").write_text(json.dumps(older))
    assert "fine-tune" in tasks.plan(wider, tmp_path)
    settings = _config().to_dict() | {"colour": 1}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(
        ConfigError, match="another config .of another version of advtransfer: colour is a key"
    ):
        tasks.plan(_config(), tmp_path)
    (tmp_path / "config.json").write_text("{torn")
    with pytest.raises(ConfigError, match="config.json is not a configuration"):
        tasks.plan(_config(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_workdir_under_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written: .*file: Not a directory"):
        tasks.plan(_config(), tmp_path / "file" / "results")


def test_a_workdir_on_a_read_only_mount_is_refused(tmp_path):
    """Root may write everywhere but there."""
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(tmp_path)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a disk needs root")
    try:
        for act in (tasks.plan, tasks.run):
            with pytest.raises(ConfigError, match="cannot be written: .*Read-only file system"):
                act(_config(), tmp_path / "results")
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.py")), ids=lambda p: p.stem)
def test_every_experiment_is_valid_and_says_how_to_run_it(path):
    read(_config(path.stem))
    docstring = path.read_text().split('"""')[1]
    assert "python launch.py" in docstring


# Keys by the issue of Salman et al. (2020, appendix A) and of MadryLab/robustness (defaults.py,
# data_augmentation.py): rate, decay, batch, epochs, PGD steps, step size / eps, padding, jitter, rotation,
# lighting, smallest crop.
IMAGENET = (0.1, 1e-4, 256, 90, 3, 2 / 3, 0, 0.1, 0.0, 0.05, 0.08)
CIFAR = (0.1, 5e-4, 128, 150, 7, 0.2, 4, 0.25, 2.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("recipe", "source", "norm", "eps", "attacked", "numbers"),
    [
        ("imagenet", "natural", "none", 0.0, ("l2", 3.0), IMAGENET),
        ("imagenet", "l2_3", "l2", 3.0, ("l2", 3.0), IMAGENET),
        ("imagenet", "linf_4", "linf", 4 / 255, ("linf", 4 / 255), IMAGENET),
        ("imagenet", "linf_8", "linf", 8 / 255, ("linf", 8 / 255), IMAGENET),
        ("cifar10", "natural", "none", 0.0, ("l2", 0.5), CIFAR),
        ("cifar10", "l2_0.5", "l2", 0.5, ("l2", 0.5), CIFAR),
        ("cifar10", "linf_8", "linf", 8 / 255, ("linf", 8 / 255), CIFAR),
    ],
)
def test_recipes_of_sources(recipe, source, norm, eps, attacked, numbers):
    config = _config(f"source_{recipe}", source)
    train, augmentation = config.train, choose_augmentation(read(config).training.augmentation)
    assert (train.norm, train.eps) == (norm, eps)
    assert (config.evaluate.norm, config.evaluate.eps) == attacked
    assert numbers == (
        train.learning_rate,
        train.weight_decay,
        train.batch_size,
        train.num_epochs,
        train.attack_steps,
        train.attack_step_ratio,
        augmentation.crop_padding,
        augmentation.jitter,
        augmentation.rotation,
        augmentation.lighting,
        augmentation.resized_crop,
    )
    assert (train.momentum, train.schedule, augmentation.flip) == (0.9, "step", True)
    assert not train.attack_random_start and train.architecture.startswith("resnet")
    natural = _config(f"source_{recipe}", "natural")
    natural.train.norm, natural.train.eps = train.norm, train.eps
    assert natural.train == train
    config.train.batch_size = 512
    assert config.train.learning_rate == (0.2 if recipe == "imagenet" else 0.1)


@pytest.mark.parametrize(
    "text", ["l2", "l2_", "l2:0", "linf_-4", "l1_3", "l2:inf", "linf:nan", "Natural", "3"]
)
def test_what_names_no_source_is_refused(text):
    with pytest.raises(ValueError, match=f"'{text}': write natural, NORM:EPS"):
        parse_source(text)


@pytest.mark.process
def test_the_library_works_without_flags():
    """As in a notebook: nothing parses a command line."""
    code = (
        "import advtransfer as at, jax, numpy as np\n"
        "m = at.create_module('resnet_tiny', num_classes=3)\n"
        "v = at.init_variables(m, jax.random.key(0), 16)\n"
        "x = np.zeros((2, 16, 16, 3), np.float32)\n"
        "assert m.apply(v, x).shape == (2, 3)\n"
        "from absl import flags\n"
        "assert not flags.FLAGS.is_parsed()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


OWN = {
    "nothing": ("pass", "returns a NoneType: let it change and return advtransfer.config.default()"),
    "a dict": ("return c.to_dict()", "returns a dict"),
    "a section is missing": (
        "with c.unlocked():\n        del c['interpret']\n    return c",
        "the config has no interpret.analyses, interpret.",
    ),
    "a key is missing": (
        "with c.unlocked():\n        del c.train['num_epochs']\n    return c",
        "the config has no train.num_epochs: begin it with advtransfer.config.default()",
    ),
    "a key too many": (
        "with c.unlocked():\n        c.train.epochs = 3\n    return c",
        "config.train.epochs does not exist",
    ),
    "an error of its own": ("return 1 / 0", "division by zero"),
}


@pytest.mark.parametrize("name", OWN)
def test_an_experiment_of_one_s_own_that_is_none_is_one_line(launch, tmp_path, name):
    body, message = OWN[name]
    file = tmp_path / "mine.py"
    file.write_text(
        f"from advtransfer import config\n\n\ndef get_config():\n    c = config.default()\n    {body}\n"
    )
    done = launch("--plan", f"--config={file}")
    assert done.code == 2 and message in done.err and len(done.err.splitlines()) == 1, done.err


@pytest.mark.parametrize(
    "config", [["--config=source:l2:1"], ["-config", "source:l2:1"], ["--config", "./source:l2:1"]]
)
def test_an_experiment_by_its_name_or_its_path(launch, tmp_path, monkeypatch, config):
    """A file with the name of an experiment counts only as a path."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "experiments/source.py").read_text()
    (tmp_path / "source").write_text(text.replace('"source"', '"study"'))
    monkeypatch.setattr(tasks, "plan", lambda config, workdir: f"{config.stage} {config.train.eps} {workdir}")
    done = launch(*config, "--plan")
    stage = "study" if config[-1].startswith("./") else "source"
    assert (done.code, done.out) == (0, f"{stage} 1.0 runs/source\n"), done.err


@pytest.mark.parametrize("equals", ["=", "\n"])
@pytest.mark.parametrize("inside", [True, False])
def test_overrides_may_stand_in_a_file_of_flags(launch, tmp_path, monkeypatch, equals, inside):
    config = f"--config={ROOT / 'experiments/source.py'}"
    lines = [config] * inside + [f"--config.train.num_epochs{equals}3", "--plan"]
    (tmp_path / "flags").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(
        tasks, "plan", lambda config, workdir: f"{config.train.num_epochs} epochs in {workdir}"
    )
    done = launch(*([] if inside else [config]), f"--flagfile={tmp_path / 'flags'}")
    assert (done.code, done.out) == (0, "3 epochs in runs/source\n"), done.err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("something\nof two lines"), 4, "ValueError: something; the traceback is in "),
        (KeyboardInterrupt(), 130, "interrupted; resume with the same command"),
        (MemoryError(), 4, "MemoryError: no message; the traceback is in "),
    ],
)
def test_every_end_has_a_code_and_one_line(launch, tmp_path, monkeypatch, error, code, message):
    def run(config, workdir, command):
        Path(workdir).mkdir()
        raise error

    monkeypatch.setattr(tasks, "run", run)
    done = launch(f"--workdir={tmp_path / 'out'}")
    assert done.code == code and message in done.err and len(done.err.splitlines()) == 1
    if code == 4:
        (file,) = (tmp_path / "out").iterdir()
        assert str(file) in done.err and "Traceback" in file.read_text() and "in run" in file.read_text()


def test_a_workdir_in_the_user_s_home(launch, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    rows = tmp_path / "rows.csv"
    rows.write_text(",".join(COLUMNS[:11]) + "\nnatural,none,0,t,20,0,0,1,.5,1,.5\n")
    done = launch(f"--config={ROOT / 'experiments/report.py'}", "--config.rows=~/rows.csv", "--workdir=~/out")
    assert done.code == 0, done.err
    assert (tmp_path / "out/report.html").exists()


@pytest.mark.process
@pytest.mark.parametrize("redirected", ["2>&-", ">&- 2>&-", "2>&1 >/dev/null | head -c 5", "| true"])
def test_a_run_goes_on_when_nobody_listens(tmp_path, redirected):
    """With a terminal's encoding that lacks most characters."""
    rows = tmp_path / "rows.csv"
    rows.write_text(",".join(COLUMNS[:11]) + "\nnatürlich,none,0,t,20,0,0,1,.5,1,.5\n")
    command = [sys.executable, str(ROOT / "launch.py"), f"--config={ROOT / 'experiments/report.py'}"]
    command += [f"--config.rows={rows}", f"--workdir={tmp_path / 'out'}"]
    line = f"set -o pipefail; {shlex.join(command)} {redirected}"
    done = subprocess.run(["bash", "-c", line], env=os.environ | {"PYTHONIOENCODING": "ascii"}, timeout=300)
    assert done.returncode == 0 and (tmp_path / "out/report.html").exists()


@pytest.mark.process
def test_a_warning_comes_once(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for i in range(count):
            path = tmp_path / "pets" / split / ("cat", "dog")[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(path)
    copied = tmp_path / "pets/train/cat/0.png"
    shutil.copyfile(copied, tmp_path / "pets/test/cat/copy.png")
    command = [sys.executable, str(ROOT / "launch.py"), f"--config={ROOT / 'experiments/source_cifar10.py'}"]
    command += [f"--config.train.dataset=folder:{tmp_path / 'pets'}", "--config.train.image_size=8"]
    command += ["--config.train.batch_size=4", f"--workdir={tmp_path / 'out'}", "--plan"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("test images that are also train images, pixel for pixel: 1, such as") == 1


def test_the_experiments_are_listed(launch):
    done = launch("--list")
    names = [path.stem for path in sorted((ROOT / "experiments").glob("*.py"))]
    assert [line.split()[0] for line in done.out.splitlines()] == names
    assert "source            Train one source network and measure its" in done.out


@pytest.mark.parametrize(
    ("program", "typed"),
    [
        ("/checkout/launch.py", "python launch.py --workdir='a b'"),
        ("/bin/advtransfer", "advtransfer --workdir='a b'"),
        ("/site-packages/advtransfer/__main__.py", "python -m advtransfer --workdir='a b'"),
    ],
)
def test_the_command_of_a_report_is_the_one_typed(launch, monkeypatch, program, typed):
    seen = []
    monkeypatch.setattr(tasks, "run", lambda config, workdir, command: seen.append(command))
    launch("--workdir=a b", program=program)
    assert [shlex.split(command) for command in seen] == [shlex.split(typed)]


def test_the_keys_are_listed(launch):
    done, usual = launch("--config=transfer", "--explain", "--config.seed=7"), base.explain()
    assert done.code == 0 and "config.seed: " in usual
    changed = {x: y for x, y in zip(done.out.splitlines(), usual.splitlines(), strict=True) if x != y}
    assert all(x.startswith(f"{y}; here ") for x, y in changed.items())
    assert any(x.startswith("config.seed: ") and x.endswith("default 0; here 7") for x in changed)
    assert any(x.startswith("config.stage: ") and x.endswith("here 'transfer'") for x in changed)
