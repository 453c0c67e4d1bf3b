"""The documents: their code runs, their commands are valid, and the API pages name what the library has."""

import inspect
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image

import advtransfer as at
from advtransfer import main as command
from advtransfer.config import read

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "BUILD.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))
_COMMAND = r"(?:advtransfer|python launch\.py)( --(?:config|explain|list|multihost)[^#&|]*|$)"


def _text(page):
    """Markdown: of a notebook, its cells that are no code."""
    if page.suffix == ".md":
        return page.read_text()
    cells = json.loads(page.read_text())["cells"]
    return "\n".join("".join(cell["source"]) + "\n" for cell in cells if cell["cell_type"] == "markdown")


def _blocks(page, *languages):
    """The fenced blocks of a page in these languages, in their order."""
    return [
        text
        for name, text in re.findall(r"^```(\S*)\n(.*?)^```", _text(page), re.M | re.S)
        if name in languages
    ]


def _commands(page):
    """The arguments of advtransfer in the blocks of a page, one list for each command."""
    for block in _blocks(page, "bash", "yaml", ""):
        for line in block.replace("\\\n", " ").splitlines():
            if found := re.search(_COMMAND, line):
                text = found[1]  # in `on_all "..."` a quote closes that stood before it
                yield shlex.split(text if text.count('"') % 2 == 0 else text.rstrip().removesuffix('"'))


COMMANDS = [(page.name, arguments) for page in [*PAGES, *NOTEBOOKS] for arguments in _commands(page)]


def _launch(arguments, monkeypatch, act):
    """act() with the flags that these arguments set."""
    argv = ["advtransfer", *arguments]
    monkeypatch.setattr(sys, "argv", argv)  # ml_collections reads the overrides there
    with flagsaver.flagsaver():
        rest = command.parse_flags(argv)
        act(rest)
    flags.FLAGS.unparse_flags()  # as the other tests expect them


@pytest.mark.parametrize(
    ("page", "arguments"), COMMANDS, ids=[f"{page}-{i}" for i, (page, _) in enumerate(COMMANDS)]
)
def test_every_command_is_valid(page, arguments, monkeypatch):
    monkeypatch.chdir(ROOT)

    def check(rest):
        assert len(rest) == 1, f"{rest[1:]} are no options"
        read(command._CONFIG.value)

    _launch(arguments, monkeypatch, check)


def test_there_are_commands():
    assert {page for page, _ in COMMANDS} >= {
        "README.md",
        "why.ipynb",
        "start.md",
        "photos.md",
        "source.md",
        "paper.md",
        "run.md",
    }


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=lambda page: page.name)
def test_the_keys_that_are_named_exist(page):
    keys = at.config.keys()
    known = {*keys, *(key.partition(".")[0] for key in keys), "py"}  # config.py is a file
    named = re.findall(r"(?:--|`|\s)config\.([a-z_][a-z_.0-9]*[a-z0-9])", page.read_text())
    assert set(named) <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_shell_scripts_are_shell(page):
    for block in _blocks(page, "bash"):
        done = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True)
        assert not done.stderr, done.stderr


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_files_that_are_linked_to_exist(page):
    """The site's build looks at links in docs/, headings included; these are as GitHub shows them."""
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", _text(page)):
        assert (page.parent / target).exists(), target


@pytest.fixture(scope="module")
def world(tmp_path_factory, two_blocks):
    """A folder with what the pages speak of, small: two sources, labelled photos, new ones."""
    folder = tmp_path_factory.mktemp("world")
    names = at.load_dataset("builtin:glyphs").class_names
    for seed, (name, norm, eps) in enumerate((("natural", "none", 0.0), ("l2_0.25", "l2", 0.25))):
        module = at.create_module("resnet_tiny", num_classes=len(names))
        spec = at.ModelSpec("resnet_tiny", len(names), 16, (0.5,) * 3, (0.25,) * 3, norm, eps, names)
        model = at.Model(module, at.init_variables(module, jax.random.key(seed), 16), spec)
        at.save_model(model, folder / "runs/quickstart/sources" / name)
    at.save_model(model, folder / "sources/l2-3")
    at.export_torch_state_dict(model, folder / "weights.safetensors")
    (folder / "empty").mkdir()
    (folder / "weights.safetensors").rename(folder / "empty/mine.pt")
    draw = np.random.default_rng(0)
    for i in range(40):
        place = folder / ("new" if i < 8 else f"birds/{('robin', 'wren')[i % 2]}")
        place.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 128, (20, 24, 3)) + 127 * (i % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i:03}.jpg")
    return folder


QUICK = {"--list", "--explain", "--plan", "--config.source=list"}
# Fewer epochs or images, nothing else.
SMALLER = {
    "transfer": ["--config.transfer.num_epochs=2"],
    "evaluate:curves": ["--config.evaluate.num_images=20", "--config.evaluate.num_steps=2"],
}


@pytest.mark.process
@pytest.mark.parametrize("name", ["README", "extend", "paper", "photos", "robustness", "source", "start"])
def test_the_code_of_a_page_runs(name, world, unoptimised, monkeypatch):
    """The Python blocks of a page, and its commands in order: all of two pages, elsewhere the quick ones."""
    page = next(page for page in PAGES if page.stem == name)
    monkeypatch.chdir(world / "empty" if name == "source" else world)
    for arguments in _commands(page):
        if name in ("photos", "robustness") or {*arguments} & QUICK:
            experiment = arguments[0].removeprefix("--config=")
            _launch([*arguments, *SMALLER.get(experiment, [])], monkeypatch, command.main)
    for code in _blocks(page, "python"):
        exec(re.sub("num_epochs=\\d+", "num_epochs=1", code).replace("[:200]", "[:20]"), {})
    if name == "photos":
        program = [sys.executable, "runs/file/model.stablehlo.py", "new/001.jpg"]
        assert "wren" in subprocess.run(program, check=True, capture_output=True, text=True).stdout


def test_the_api_pages_name_every_public_name():
    text = "\n".join(page.read_text() for page in (ROOT / "docs/api").glob("*.md"))
    named = {name.rpartition(".")[2] for name in re.findall(r"^\.\. auto\w+:: (\S+)", text, re.M)}
    packages = {name for name in at.__all__ if inspect.ismodule(getattr(at, name))} - set(
        at.analysis.__dict__
    )
    assert {*at.__all__} - packages <= named
    assert {*at.report.__all__} - {name for name in at.report.__all__ if name.isupper()} <= named


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_without_outputs(path):
    cells = json.loads(path.read_text())["cells"]
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in cells)
