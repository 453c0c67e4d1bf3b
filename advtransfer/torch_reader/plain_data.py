"""What a pickle may build of Python's and NumPy's plain data. Each function takes the pickle's arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .unpickle import Constructors, Stub, is_key

_NUMBERS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")


def argument(kind: type) -> Callable[[tuple], Any]:
    """The constructor of what is its own first argument, of this type."""
    return lambda arguments: arguments[0] if arguments and type(arguments[0]) is kind else NotImplemented


def nothing(arguments: tuple) -> Any:
    """Of types that pickles of data name and do not call: they are not worth a report."""
    return NotImplemented


def _mapping(arguments: tuple) -> Any:
    """OrderedDict(), dict(a_dict), OrderedDict([[key, value], ...])."""
    if not arguments:
        return {}
    if type(arguments[0]) is dict:
        return dict(arguments[0])
    if type(arguments[0]) is list and all(type(x) in (list, tuple) and len(x) == 2 for x in arguments[0]):
        return {key: value for key, value in arguments[0] if is_key(key)}
    return NotImplemented


def _default_mapping(arguments: tuple) -> Any:
    return _mapping(arguments[1:2])  # behind the factory


def _sequence(arguments: tuple) -> Any:
    if not arguments:
        return []
    return list(arguments[0]) if type(arguments[0]) in (list, tuple) else NotImplemented


def _tuple(arguments: tuple) -> Any:
    items = _sequence(arguments)
    return tuple(items) if type(items) is list else NotImplemented


def _complex(arguments: tuple) -> Any:
    are_floats = len(arguments) == 2 and all(type(x) is float for x in arguments)
    return complex(*arguments) if are_floats else NotImplemented


def _bytes(arguments: tuple) -> Any:
    """bytes(), bytearray(b"..."), _codecs.encode("...", "latin1"): how Python 2's protocols spell bytes."""
    text = arguments[0] if arguments else b""
    if type(text) is str and len(arguments) == 2 and arguments[1] in ("latin1", "latin-1"):
        try:
            return text.encode("latin-1")
        except UnicodeEncodeError:
            return NotImplemented
    return text if type(text) is bytes else NotImplemented


class _NumpyType(Stub):
    """A NumPy dtype of one number."""

    __slots__ = ("code",)

    def __init__(self, code: str):
        super().__init__("numpy.dtype")
        self.code = code  # of NumPy, such as "<f8"

    def set_state(self, state: Any) -> None:
        if type(state) is tuple and len(state) > 1 and state[1] == ">":
            self.code = ">" + self.code[1:]


def _numpy_type(arguments: tuple) -> Any:
    code = arguments[0] if arguments else None
    return _NumpyType("<" + code) if type(code) is str and code in _NUMBERS else NotImplemented


def _numpy_scalar(arguments: tuple) -> Any:
    if len(arguments) != 2 or not isinstance(arguments[0], _NumpyType):
        return NotImplemented
    kind, raw = np.dtype(arguments[0].code), arguments[1]
    raw = _bytes((raw, "latin1")) if type(raw) is str else raw
    if type(raw) is not bytes or len(raw) != kind.itemsize:
        return NotImplemented
    return np.frombuffer(raw, kind)[0].item()


def _instance(arguments: tuple) -> Any:
    """An object of Python 2's protocols: what matters is the name of its class."""
    is_class = arguments and isinstance(arguments[0], Stub)
    return Stub(arguments[0].name) if is_class else NotImplemented


_PYTHON = {
    **{"dict": _mapping, "list": _sequence, "set": _sequence, "frozenset": _sequence, "tuple": _tuple},
    **{"complex": _complex, "bytes": _bytes, "bytearray": _bytes, "object": nothing},
}
PLAIN_DATA: Constructors = {
    **{f"{module}.{name}": make for name, make in _PYTHON.items() for module in ("builtins", "__builtin__")},
    "collections.OrderedDict": _mapping,
    "collections.Counter": _mapping,
    "collections.defaultdict": _default_mapping,
    "_codecs.encode": _bytes,
    "numpy.dtype": _numpy_type,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
    "copyreg._reconstructor": _instance,
    "copy_reg._reconstructor": _instance,
}
