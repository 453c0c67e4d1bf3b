"""Rules of the code: which package may import which, and what is written in one place only."""

import ast
import re
import subprocess
import sys
from pathlib import Path

from advtransfer import config
from advtransfer.config import STAGES
from advtransfer.tasks import TASKS
from advtransfer.torch_checkpoint.options import CheckpointOptions

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "advtransfer"
FILES = sorted(PACKAGE.rglob("*.py"))

# Package or module -> those whose names may be in its import statements. Each may always import itself.
MAY_IMPORT = {
    "arrays": set(),
    "norms": set(),
    "foreign": set(),
    "intervals": set(),
    "calibration": {"intervals"},
    "options": set(),
    "parallel": set(),
    "optim": set(),
    "compilation": set(),
    "labels": {"arrays"},
    "attacks": {"arrays", "labels", "parallel"},
    "report": {"calibration", "foreign", "intervals", "norms"},
    "hub": {"torch_reader"},
    "storage": {"foreign", "parallel"},
    "checkpoint": {"foreign", "parallel", "storage"},
    "progress": {"foreign", "parallel", "storage"},
    "data": {"arrays", "foreign", "labels", "options", "parallel"},
    "models": {"arrays", "foreign", "hub", "norms", "parallel", "storage", "data"},
    "torch_checkpoint": {"arrays", "foreign", "hub", "models", "norms", "options", "storage", "torch_reader"},
    "torch_reader": set(),
}
MAY_IMPORT["publish"] = {"hub", "intervals", "models", "norms", "torch_checkpoint"}
MAY_IMPORT["train"] = MAY_IMPORT["models"] | {"labels", "attacks", "optim", "checkpoint", "models"}
MAY_IMPORT["evaluate"] = MAY_IMPORT["train"] | {"train", "options", "progress"}
MAY_IMPORT["robustness"] = MAY_IMPORT["evaluate"] | {"evaluate", "intervals"}
MAY_IMPORT["source"] = MAY_IMPORT["evaluate"] | {"evaluate"}
MAY_IMPORT["transfer"] = MAY_IMPORT["evaluate"] | {"evaluate", "report"}
MAY_IMPORT["study"] = MAY_IMPORT["transfer"] | {"compilation", "transfer"}
MAY_IMPORT["analysis"] = {
    *("arrays", "intervals", "labels", "parallel", "attacks", "models", "data", "evaluate")
}
MAY_IMPORT["explain"] = MAY_IMPORT["transfer"] | {"analysis", "intervals", "options", "report", "transfer"}
MAY_IMPORT["config"] = {
    *("foreign", "options", "data", "evaluate", "explain", "models", "robustness", "source", "study"),
    *("torch_checkpoint", "transfer"),
}
MAY_IMPORT["tasks"] = (
    MAY_IMPORT["study"]
    | MAY_IMPORT["config"]
    | {"calibration", "compilation", "config", "study", "source", "analysis", "explain", "report"}
    | {"torch_checkpoint"}
)
MAY_IMPORT["main"] = {
    *("compilation", "foreign", "parallel", "storage", "tasks", "checkpoint", "config", "data", "train")
}
MAY_IMPORT["__main__"] = {"main"}

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


def _package(path):
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
        package = _package(path)
        for name in _imports(path) if package != "__init__" else ():
            parts = name.split(".")
            if parts[0] == "advtransfer" and parts[1] != "__version__":
                other = parts[1]
                assert other in known, f"{path} imports {name}: import one of its packages or modules"
                assert other == package or other in MAY_IMPORT[package], (
                    f"{path}: {package} must not import {other}"
                )


def test_the_architecture_table_of_build_md():
    """It names every package, each may import only from rows above it, and it says what MAY_IMPORT says."""
    section = (ROOT / "BUILD.md").read_text().partition("\n## Architecture\n")[2].partition("\n## ")[0]
    rows = {}
    for line in section.splitlines():
        if line.startswith("| `"):
            packages, _, cell = line.strip("| ").split(" | ")
            allowed = set()
            for same_as, name in re.findall(r"(as )?`(\w+)`", cell):
                assert name in rows, f"{line}: {name} is not in a row above"
                allowed |= rows[name] if same_as else {name}
            rows |= {name: allowed for name in re.findall(r"`(\w+)(?:/|\.py)`", packages)}
    assert rows == MAY_IMPORT
    assert set(rows) == {_package(path) for path in FILES} - {"__init__"}


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
        if _package(path) == "report":
            assert not imported & {"jax", "flax", "optax", "orbax"}, path


def test_report_imports_no_jax_on_the_way():
    for path in (PACKAGE / "report").glob("*.py"):
        assert all(
            name.startswith(tuple(f"advtransfer.{other}" for other in ("report", *MAY_IMPORT["report"])))
            or not name.startswith("advtransfer")
            for name in _imports(path)
        )


def test_torch_reader_could_be_released_alone(tmp_path):
    """It and its tests import nothing else of ours; and it reads where nothing else can be imported."""
    ours, tests = PACKAGE / "torch_reader", ("test_torch_reader", "test_torch_hostile", "damage_checkpoints")
    alone = {"numpy", "ml_dtypes", *sys.stdlib_module_names}
    for path in (*ours.glob("*.py"), *(ROOT / f"tests/{name}.py" for name in tests)):
        also = set() if path.parent == ours else {"pytest", *tests}
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level in (0, 1), path
                names = [node.module] if node.level == 0 else []
            if also:
                names = [name for name in names if not name.startswith("advtransfer.torch_reader")]
            assert {name.split(".")[0] for name in names} <= alone | also, path
    (tmp_path / "torch_reader").symlink_to(ours)
    code = f"""
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("advtransfer", "jax", "jaxlib", "flax", "chex", "safetensors", "torch"):
            raise SystemExit(name + " is imported")
sys.meta_path.insert(0, Finder())
sys.path[:] = [{str(tmp_path)!r}] + [path for path in sys.path if path not in ("", {str(ROOT)!r})]
from torch_reader import open_checkpoint
for name in ("little_endian.pt", "training_legacy.pt", "zoo.safetensors"):
    with open_checkpoint({str(ROOT)!r} + "/tests/fixtures/checkpoints/" + name) as contents:
        tree = contents.tree.get("model", contents.tree)
        print(sum(tensor.read().size for key, tensor in tree.items() if "float8" not in key))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    sizes = [24 + 20 + 1 + 6 * 6, 108 + 4 * 4 + 1, 6 * 14]  # by fixtures/make_checkpoints.py
    assert done.stdout.split() == [str(size) for size in sizes], done.stderr


def test_every_option_is_read_somewhere():
    """As an attribute, a string, or a field that is filled by name."""
    read = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                read.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                read.add(node.value)
    by_name = CheckpointOptions.__dataclass_fields__  # passed on as a whole
    assert not {name for _, name in config.keys().values()} - read - set(by_name)


def test_only_the_door_sees_a_config_dict():
    """config.py makes it, main.py and the first lines of a task take it; what a task calls gets values."""
    for path in FILES:
        names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        imported = {part for name in _imports(path) for part in name.split(".")}
        allowed = (PACKAGE / "config.py", PACKAGE / "main.py", PACKAGE / "tasks" / "__init__.py")
        assert path in allowed or not {"ConfigDict", "ml_collections"} & (names | imported), path


def test_the_stages_of_the_config_are_those_that_run():
    assert set(STAGES) == set(TASKS)


def test_the_library_imports_nothing_heavy(tmp_path):
    """Whatever is installed: here every one of them is there, and ends the process if it is imported."""
    names = (
        "torch",
        "tensorboardX",
        "tensorflow",
        "tensorflow_datasets",
        "matplotlib",
        "scipy.linalg",
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
