"""The package as pip installs it: what a wheel has, and the command in a new environment."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import advtransfer as at

ROOT = Path(__file__).parent.parent
EXPERIMENTS = sorted(path.stem for path in (ROOT / "experiments").glob("*.py"))

pytestmark = pytest.mark.process


def _build(source, *kinds):
    """The files of `kinds` (sdist, wheel), built in a folder of sources."""
    code = "from setuptools import build_meta\n" + "".join(
        f"build_meta.build_{kind}('dist')\n" for kind in kinds
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [next((source / "dist").glob("*.whl" if kind == "wheel" else "*.tar.gz")) for kind in kinds]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A source distribution and a wheel of a copy of the checkout."""
    copy = tmp_path_factory.mktemp("checkout")
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, copy)
    for name in ("advtransfer", "experiments", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return _build(copy, "sdist", "wheel")


def test_the_wheel_has_the_package_and_the_experiments(built):
    package = [path for path in (ROOT / "advtransfer").rglob("*") if "__pycache__" not in path.parts]
    expected = {str(path.relative_to(ROOT)) for path in package if path.is_file()}
    expected |= {f"advtransfer/experiments/{name}.py" for name in EXPERIMENTS}
    names = zipfile.ZipFile(built[1]).namelist()
    assert {name for name in names if ".dist-info/" not in name} == expected


def test_a_source_distribution_gives_the_same_wheel(built, tmp_path):
    sdist, wheel = built
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    assert {"BUILD.md", "constraints.txt", "launch.py"} <= {path.name for path in folder.iterdir()}
    (again,) = _build(folder, "wheel")
    contents = [{x.filename: x.CRC for x in zipfile.ZipFile(path).infolist()} for path in (wheel, again)]
    assert contents[0] == contents[1]


def test_the_command_in_a_new_environment_and_another_folder(built, tmp_path):
    new, folder = tmp_path / "new", tmp_path / "folder"
    folder.mkdir()
    venv.create(new, with_pip=True, symlinks=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(program, *arguments):
        command = [str(new / "bin" / program), *arguments]
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
        )

    installed = run("python", "-m", "pip", "install", "--no-deps", "--no-index", str(built[1]))
    assert installed.returncode == 0, installed.stderr
    # The dependencies are those of this environment, without its .pth files (an editable install's).
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(new)}))
    (site / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    where = run("python", "-c", "import advtransfer; print(advtransfer.__file__)")
    assert where.stdout == f"{site / 'advtransfer' / '__init__.py'}\n", where.stderr

    assert run("advtransfer", "--version").stdout == f"{at.__version__}\n"
    assert [line.split()[0] for line in run("advtransfer", "--list").stdout.splitlines()] == EXPERIMENTS
    usage = run("advtransfer", "--help")
    assert usage.returncode == 0 and "Exit codes:" in usage.stdout and "--workdir: Folder" in usage.stdout
    planned = run("advtransfer", "--config=quickstart", "--plan", "--config.study.calibration=0")
    assert "fine-tune 480 of 480 models" in planned.stdout, planned.stderr
    refused = run("advtransfer", "--config=experiments/quickstart.py")
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
    assert "no file 'experiments/quickstart.py' (nearest: --config=quickstart)" in refused.stderr
    assert list(folder.iterdir()) == []

    small = ["--config.train.dataset=builtin:digits", "--config.train.image_size=8"]
    small += ["--config.train.num_epochs=1", "--config.evaluate.norm=none", "--config.evaluate.num_images=64"]
    trained = run("advtransfer", "--config=source", *small)
    assert trained.returncode == 0, trained.stderr
    small = ["--config.transfer.num_train_images=20", "--config.transfer.num_epochs=1"]
    small += ["--config.transfer.evaluate_epochs=(1,)", "--config.source=runs/source"]
    tuned = run("python", "-m", "advtransfer", "--config=transfer", *small)
    assert tuned.returncode == 0, tuned.stderr
    page = (folder / "runs" / "transfer" / "report.html").read_text()
    assert "python -m advtransfer --config=transfer --config" in re.sub("</?span>", "", page)
    assert [path.name for path in folder.iterdir()] == ["runs"]
