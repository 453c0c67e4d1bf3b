"""The faults of `tests.mutate` are the ones that are meant, and are noticed."""

import subprocess
import sys
from pathlib import Path

import pytest
from mutations import draw, mutated, mutations, package_of

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("kind", "source", "expected"),
    [
        ("arithmetic", "ß = (a) + b  # α + β", {"ß = (a) - b  # α + β"}),
        ("arithmetic", "x = -y\nx *= 2", {"x = y\nx *= 2", "x = -y\nx /= 2"}),
        ("arithmetic", "x = folder / name + [1] + f'{a + b}'", set()),
        ("comparison", "x = not (a <\n  b)", {"x = (a <\n  b)", "x = not (a <=\n  b)"}),
        ("comparison", "x = a is not b or c", {"x = a is b or c", "x = a is not b and c"}),
        ("off by one", "x = y[-1]", {"x = y[-2]", "x = y[0]"}),
        ("off by one", "x = y[: a - b]", {"x = y[: (a - b) + 1]", "x = y[: (a - b) - 1]"}),
        ("axis", "f(y, axis=(0, -1))", {"f(y, axis=(1, -1))", "f(y, axis=(0, -2))"}),
        ("axis", "y.max(1) + max(1, y) + key.split(y, 1)", {"y.max(0) + max(1, y) + key.split(y, 1)"}),
        ("stop_gradient", "x = jax.lax.stop_gradient(a - b) * c", {"x = (a - b) * c"}),
        ("swapped arguments", "f(a, b, c)", {"f(b, a, c)", "f(a, c, b)"}),
        ("swapped arguments", "where(a, b, c), max(a, b), f(a, a)", {"where(a, c, b), max(a, b), f(a, a)"}),
        ("check", "if a > b:\n  raise ValueError(a + b, -1)", {"if False:\n  raise ValueError(a + b, -1)"}),
        ("check", "assert a\nassert_rank(b, 1)", {"assert True\nassert_rank(b, 1)", "assert a\nNone"}),
        ("default", "def f(a=2, *, b=0.0): ...", {"def f(a=3, *, b=0.0): ...", "def f(a=2, *, b=0.5): ..."}),
        ("default", "class A(NamedTuple):\n  a: bool = True", {"class A(NamedTuple):\n  a: bool = False"}),
        ("bound", "x = np.clip(a - b, 0, 1)", {"x = (a - b)"}),
    ],
)  # fmt: skip
def test_kinds(kind, source, expected):
    found = [mutation for mutation in mutations(source, "advtransfer/module.py") if mutation.kind == kind]
    assert {mutated(source, mutation) for mutation in found} == expected


def test_what_stays_as_it_is():
    source = '"""1 + 2"""\n__all__ = ["a"]\ndef f(a: x[1] < 2) -> 3:\n  "-1"\n  raise a(1 - 2, not 3)'
    assert not mutations(source, "advtransfer/module.py")
    assert not mutations("x = 1 + 0.5", "advtransfer/report/figures.py")


def test_draws_repeat_and_reach_every_package():
    drawn = draw(ROOT, 0, 60)
    assert drawn == draw(ROOT, 0, 60) != draw(ROOT, 1, 60) and len({*drawn}) == 60
    packages = {path.parent.name for path in (ROOT / "advtransfer").rglob("*.py")}
    assert {package_of(mutation) for mutation in drawn} == packages
    assert {package_of(mutation) for mutation in draw(ROOT, 0, 5, "attacks")} == {"attacks"}


@pytest.mark.process
def test_a_fault_is_caught_or_survives_and_is_not_tried_again(tmp_path):
    tree = tmp_path / "tree"
    for name, text in (
        ("advtransfer/__init__.py", "def f(x):\n    return -x\n\n\ndef g(x):\n    return not x\n"),
        ("tests/test_toy.py", "from advtransfer import f\n\ndef test_f():\n    assert f(9) == -9\n"),
    ):
        (tree / name).parent.mkdir(parents=True)
        (tree / name).write_text(text)
    subprocess.run(["git", "init", "-q"], cwd=tree, check=True)
    code = "import sys, pathlib, tests.mutate as m; print(m.campaign(*map(pathlib.Path, sys.argv[1:]), 0, 9))"
    command = [sys.executable, "-c", code, str(tree), str(tmp_path / "kept")]
    for times in (1, 0):
        output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        assert output.splitlines()[-4:] == [
            "advtransfer/__init__.py:6 comparison",
            "- return not x",
            "+ return x",
            "1",
        ]
        assert output.count("caught unmarked tests/test_toy.py::test_f ") == times
        assert output.count("NOT CAUGHT") == 2 * times
    assert len((tmp_path / "kept/results-0.jsonl").read_text().splitlines()) == 3
