"""The package's annotations, shapes and dtypes of arrays among them, checked at every call in the tests."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path

from beartype import BeartypeConf, beartype

_NAMES = [path.stem for path in (Path(__file__).parents[1] / "advtransfer").iterdir()]
# Not torch_reader, whose tests bound the time and the memory that a pickle of a million operations takes.
CHECKED = [f"advtransfer.{name}" for name in _NAMES if name != "torch_reader"]
_CONF = BeartypeConf(is_pep484_tower=True)  # an int is a float, as PEP 484 has it


def check_after(function: Callable) -> Callable:
    """A type checker for `jaxtyping.install_import_hook` that looks once a function has returned.

    jaxtyping calls it twice: with a stand-in that takes the arguments, and with one that takes the result as
    well, as a keyword "ret0". Only the second is checked: so a function's own refusal of an argument comes
    first, and what it accepts must be what its annotations name.
    """
    names = inspect.signature(function).parameters
    return (
        beartype(function, conf=_CONF) if any(re.fullmatch(r"ret\d+", name) for name in names) else function
    )
