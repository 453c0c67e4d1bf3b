"""The package's annotations, shapes and dtypes of arrays among them, checked at every call in the tests."""

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

_CONF = BeartypeConf(is_pep484_tower=True)  # an int is a float, as PEP 484 has it


def check_after(function: Callable) -> Callable:
    """A type checker for `jaxtyping.install_import_hook` that looks once a function has returned.

    jaxtyping calls it twice: for the arguments before the call (the return is Any there), and for both after
    it. Only the second is checked: so a function's own refusal of an argument comes first, and what it takes
    without one must be what it names.
    """
    return function if function.__annotations__.get("return", Any) is Any else beartype(function, conf=_CONF)
