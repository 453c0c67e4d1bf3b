"""The rules of the house: which room may know which, and what is spelt in one place only."""

import ast
import subprocess
import sys
from pathlib import Path

from advtransfer import config as base
from advtransfer.config import STAGES, flatten
from advtransfer.stages import STAGES as STAGE_MODULES

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "advtransfer"
FILES = sorted(PACKAGE.rglob("*.py"))

# Room -> the rooms whose names may stand in its import statements. A room may always import itself.
MAY_IMPORT = {
    "foreign": set(),
    "config": {"foreign"},
    "parallel": set(),
    "optim": set(),
    "labels": set(),
    "attacks": {"labels"},
    "report": {"foreign"},
    "storage": {"foreign", "parallel"},
    "checkpoint": {"foreign", "parallel", "storage"},
    "progress": {"foreign", "parallel", "storage"},
    "data": {"config", "foreign", "labels", "parallel"},
    "models": {"foreign", "parallel", "storage", "data"},
    "torch_checkpoint": {"models"},
    "train": {"foreign", "labels", "parallel", "storage", "attacks", "optim", "checkpoint", "data", "models"},
}
MAY_IMPORT["evaluate"] = MAY_IMPORT["train"] | {"train"}
MAY_IMPORT["source"] = MAY_IMPORT["evaluate"] | {"evaluate", "config", "progress"}
MAY_IMPORT["transfer"] = MAY_IMPORT["evaluate"] | {"evaluate"}
MAY_IMPORT["study"] = MAY_IMPORT["transfer"] | {"transfer"}
MAY_IMPORT["analysis"] = {"labels", "parallel", "attacks", "models", "data", "evaluate"}
MAY_IMPORT["main"] = {"foreign", "parallel", "storage", "stages", "checkpoint", "config", "data", "train"}
MAY_IMPORT["stages"] = (
    MAY_IMPORT["study"] | MAY_IMPORT["source"] | {"study", "source", "analysis", "report", "torch_checkpoint"}
)

COLLECTIVES = {
    "pmap",
    "psum",
    "pmean",
    "all_gather",
    "axis_index",
    "broadcast_one_to_all",
    "process_index",
    "process_count",
    "process_allgather",
    "sync_global_devices",
}


def _room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path):
    """Dotted names of every module that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_arrows_run_downward():
    known = {p.stem if p.is_file() else p.name for p in PACKAGE.iterdir()}
    for path in FILES:
        room = _room(path)
        for name in _imports(path) if room != "__init__" else ():
            parts = name.split(".")
            if parts[0] == "advtransfer":
                other = parts[1]
                assert other in known, f"{path} imports {name}: import one of its packages or modules"
                assert other == room or other in MAY_IMPORT[room], f"{path}: {room} must not know {other}"


def test_what_is_spelt_in_one_place_only():
    for path in FILES:
        names = {
            node.attr if isinstance(node, ast.Attribute) else node.id
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute | ast.Name)
        }
        imported = {part for name in _imports(path) for part in name.split(".")}
        if path.name != "parallel.py":
            assert not (names | imported) & COLLECTIVES, path
        if path.name not in ("main.py", "stream.py"):  # Grain wants its own flags parsed
            assert "FLAGS" not in names and "absl" not in imported, path
        if _room(path) == "report":
            assert not imported & {"jax", "flax", "optax", "orbax"}, path


def test_report_imports_no_jax_on_the_way():
    for path in (PACKAGE / "report").glob("*.py"):
        assert all(
            name.startswith(("advtransfer.foreign", "advtransfer.report"))
            or not name.startswith("advtransfer")
            for name in _imports(path)
        )


def test_every_config_key_is_read_somewhere():
    """As an attribute, a string, or a field of a tuple that is filled from the config by name."""
    read = set()
    for path in FILES:
        if _room(path) == "config":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                read.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                read.add(node.value)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                read.add(node.target.id)
    unread = [key for key in flatten(base.default()) if key.rpartition(".")[2] not in read]
    assert not unread


def test_the_stages_of_the_config_are_those_that_run():
    assert set(STAGES) == set(STAGE_MODULES)


def test_the_library_imports_nothing_heavy(tmp_path):
    """Whatever is installed: here every one of them is there, and ends the process if it is imported."""
    names = (
        "torch",
        "tensorboardX",
        "tensorflow",
        "tensorflow_datasets",
        "matplotlib",
        "scipy.ndimage",
        "pandas",
        "jinja2",
    )
    code = f"""
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name in {names}:
            raise SystemExit(name + " is imported")
sys.meta_path.insert(0, Finder())
import advtransfer, advtransfer.main
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
