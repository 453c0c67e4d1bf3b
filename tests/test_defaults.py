"""Defaults of every config key and public function, against fixtures/defaults.json.

A changed default changes experiments that people have written down, and the identity of every trial. To
change one, run `python -m tests.test_defaults`, which writes the file anew, and say so to the users.
"""

import importlib
import inspect
import json
import pkgutil
from pathlib import Path

import advtransfer
from advtransfer import config

PATH = Path(__file__).parent / "fixtures" / "defaults.json"
PLAIN = (bool, int, float, str, tuple, type(None))


def defaults():
    """Of every key, and of the arguments and fields of every public function and class, by its full name."""
    found = {f"config.{key}": value for key, value in config.flatten(config.default()).items()}
    for module in pkgutil.walk_packages(advtransfer.__path__, "advtransfer."):
        for name, x in vars(importlib.import_module(module.name)).items():
            own = getattr(x, "__module__", "") == module.name and not name.startswith("_")
            if own and (inspect.isfunction(inspect.unwrap(x)) or inspect.isclass(x)):
                try:
                    parameters = inspect.signature(x).parameters.values()
                except ValueError:  # of a class that takes no arguments
                    continue
                found |= {f"{module.name}.{name}.{p.name}": p.default for p in parameters}
    return {
        name: str(value)
        for name, value in sorted(found.items())
        if isinstance(value, PLAIN) and not hasattr(value, "_fields")
    }


def test_defaults_are_what_they_were():
    known, found = json.loads(PATH.read_text()), defaults()
    changed = [
        f"{name}: {known.get(name)} is {found.get(name)} now"
        for name in sorted(known.keys() | found.keys())
        if known.get(name) != found.get(name)
    ]
    assert not changed
    assert known["config.train.eps"] == "0.0" and known["advtransfer.attacks.pgd.pgd.num_steps"] == "20"


if __name__ == "__main__":
    PATH.write_text(json.dumps(defaults(), indent=1) + "\n")
