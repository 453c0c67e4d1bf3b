"""A pickle machine that only makes data: no function of the pickle is ever looked up, imported or called.

`pickletools.genops` splits the bytes into operations; what they name is looked up in a table of constructors
of plain data, and anything that is not in it becomes a `Stub`, on which no operation has any effect.
"""

from __future__ import annotations

import io
import pickletools
import sys
from collections.abc import Callable, Mapping
from typing import Any

from .files import CheckpointError, printable

MAX_BYTES = 1 << 25  # of one pickle; the pickle of a ResNet-50 and its optimiser has 0.1 MB
# Bytes that the values of one pickle may take; the order of an epoch of ImageNet, 1,281,167 integers, takes
# 97 MB of them. As every operation takes some, this bounds the time too.
MAX_MEMORY = 1 << 27
_OPERATION = 48  # bytes of an operation beside its argument: a place on the stack, an entry of the memo
_CONSTRUCTION = 10 * _OPERATION  # bytes of a call of a constructor
SAVE_ALONE = "save the weights alone in PyTorch, with torch.save(model.state_dict(), FILE)"
_MAX_ARGUMENTS = 16
_MAX_NAMES = 1_000
_MAX_NAME = 500  # characters
_MAX_INTEGER = 4096  # bits


class _TooLarge(CheckpointError):
    """A pickle that may be whole, beyond the limits."""


class Stub:
    """Stands for a class, a function or an instance of a pickle that is not plain data. It does nothing."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name  # "module.name"

    def set_state(self, state: Any) -> None:
        """What a pickle says of an instance after it was made; dropped."""

    def __repr__(self) -> str:
        return f"<stub of {self.name}>"


Constructors = Mapping[str, Callable[[tuple], Any]]  # by "module.name"; NotImplemented becomes a stub


def unpickle(
    data: io.BufferedReader | io.BytesIO,
    constructors: Constructors,
    persistent_load: Callable[[Any], Any] | None = None,
) -> tuple[Any, set[str]]:
    """Reads one pickle from the position of `data`, and leaves it behind the pickle's end.

    Args:
      data: at most MAX_BYTES.
      constructors: what may be built, beside the containers that pickles have operations for.
      persistent_load: makes the value of a persistent id; None: the pickle may have none.

    Returns:
      The value: None, bool, int, float, str, bytes, list (of sets too), tuple, dict without the entries whose
      key is not a text, what `constructors` and `persistent_load` make, and `Stub`; it may contain
      itself. And the names of what was stubbed.

    Raises:
      CheckpointError: a damaged pickle, with the position in bytes, or one beyond the limits.
    """
    machine = _Machine(constructors, persistent_load)
    position = data.tell()
    try:
        for operation, argument, position in pickletools.genops(data):  # noqa: B007 (for the message)
            machine.step(operation.name, argument)
        return machine.pop(), machine.stubbed
    except _TooLarge:
        raise
    except CheckpointError as error:
        raise CheckpointError(f"the pickle is damaged at byte {position}: {error}") from error
    except (ValueError, Warning) as error:  # of genops; a warning that was made an error is one of them
        if not data.read(1):
            if data.tell() >= MAX_BYTES:
                raise CheckpointError(
                    f"its pickle has more than {MAX_BYTES:,} bytes: {SAVE_ALONE}"
                ) from error
            raise CheckpointError("the file is truncated in its pickle: download it again") from error
        raise CheckpointError(f"the pickle is damaged near byte {data.tell()}") from error


class _Machine:
    """The stack, the marks and the memo of one pickle."""

    def __init__(self, constructors: Constructors, persistent_load: Callable[[Any], Any] | None):
        self.constructors = constructors
        self.persistent_load = persistent_load
        self.stack: list[Any] = []
        self.marks: list[int] = []  # heights of the stack
        self.memo: dict[int, Any] = {}
        self.stubbed: set[str] = set()
        self.budget = MAX_MEMORY

    def step(self, name: str, argument: Any) -> None:
        self.spend(_OPERATION + sys.getsizeof(argument))
        if name not in _OPERATIONS:
            raise CheckpointError(f"{name} is not supported")
        _OPERATIONS[name](self, argument)

    def spend(self, amount: int) -> None:
        """Counts bytes of memory."""
        self.budget -= amount
        if self.budget < 0:
            raise _TooLarge(
                f"what its pickle holds beside the weights takes more than {MAX_MEMORY:,} bytes of memory: "
                f"{SAVE_ALONE}"
            )

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise CheckpointError("it takes more from the stack than there is")
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        if not self.marks:
            raise CheckpointError("it asks for a mark that is not there")
        height = self.marks.pop()
        items = self.stack[height:]
        del self.stack[height:]
        return items

    def top(self) -> Any:
        value = self.pop()
        self.stack.append(value)
        return value

    def named(self, name: str) -> Stub:
        """The inert stand-in for what a pickle names."""
        if name in self.constructors:
            return Stub(name)
        name = printable(name)
        self.stubbed.add(name)
        if len(self.stubbed) > _MAX_NAMES:
            raise CheckpointError(f"it names more than {_MAX_NAMES:,} functions and classes")
        return Stub(name)

    def construct(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Stub):
            raise CheckpointError(f"it calls a {type(function).__name__}")
        if type(arguments) is not tuple:
            raise CheckpointError(f"it calls {function.name} with a {type(arguments).__name__}")
        make = self.constructors.get(function.name)
        if make is None:
            return Stub(function.name)
        if len(arguments) > _MAX_ARGUMENTS:
            raise CheckpointError(f"it calls {function.name} with {len(arguments):,} arguments")
        self.spend(_CONSTRUCTION)
        for argument in arguments[:2]:  # they may be copied, and the same ones again and again
            if type(argument) in (list, tuple, dict):
                self.spend(len(argument) * _OPERATION)
            elif type(argument) is str:
                self.spend(len(argument))
        value = make(arguments)
        if value is NotImplemented:
            self.stubbed.add(function.name)
            return Stub(function.name)
        return value

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise CheckpointError("it asks for an object that it never stored")
        self.stack.append(self.memo[index])

    def put(self, index: int) -> None:
        if not 0 <= index < 2**32:
            raise CheckpointError("it stores an object under a number out of range")
        self.memo[index] = self.top()

    def stack_global(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        if type(name) is not str or type(module) is not str or max(len(name), len(module)) > _MAX_NAME:
            raise CheckpointError("it names a function with something else than a short text")
        self.stack.append(self.named(f"{module}.{name}"))

    def extension(self, code: int) -> None:
        self.stack.append(self.named(f"copyreg.extension {code}"))

    def reduce(self, _: Any) -> None:
        arguments = self.pop()
        self.stack.append(self.construct(self.pop(), arguments))

    def new_with_keywords(self, _: Any) -> None:
        self.pop()  # no data constructor takes any
        self.reduce(None)

    def instance(self, name: str) -> None:
        arguments = tuple(self.pop_mark())
        self.stack.append(self.construct(self.named(name.replace(" ", ".", 1)), arguments))

    def object(self, _: Any) -> None:
        function, *arguments = self.pop_mark() or [None]
        self.stack.append(self.construct(function, tuple(arguments)))

    def build(self, _: Any) -> None:
        state = self.pop()
        target = self.top()
        if isinstance(target, Stub):  # the attributes of data are dropped
            target.set_state(state)

    def persistent(self, _: Any) -> None:
        if self.persistent_load is None:
            raise CheckpointError("it refers to data outside, where none can be")
        self.stack.append(self.persistent_load(self.pop()))

    def pop_any(self, _: Any) -> None:
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.pop()

    def tuple_of(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(items)))

    def append(self, items: list[Any]) -> None:
        target = self.top()
        if type(target) is list:
            target.extend(items)
        elif not isinstance(target, Stub):
            raise CheckpointError(f"it appends to a {type(target).__name__}")

    def set_items(self, items: list[Any]) -> None:
        target = self.top()
        if type(target) is dict:
            target.update(_entries(items))
        elif not isinstance(target, Stub):
            raise CheckpointError(f"it sets an item of a {type(target).__name__}")


def _literal(value: Any) -> Any:
    kind = type(value)
    if kind is str and not value.isascii():
        return value.encode("utf-8", "replace").decode()  # no lone surrogates: they cannot be printed
    if kind is int and value.bit_length() > _MAX_INTEGER:
        raise CheckpointError(f"it holds an integer of {value.bit_length():,} bits")
    return bytes(value) if kind is bytearray else value


def _entries(items: list[Any]) -> dict[Any, Any]:
    if len(items) % 2:
        raise CheckpointError("it sets a key without a value")
    pairs = zip(items[::2], items[1::2], strict=True)
    return {key: value for key, value in pairs if is_key(key)}


def is_key(key: Any) -> bool:
    """Only text: its hash is salted, where other keys can be chosen to collide, or to take long to hash."""
    return type(key) is str


_LITERALS = (
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
)
# By pickletools' names; the second argument is the operation's own.
_OPERATIONS: dict[str, Callable[[_Machine, Any], object]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda m, _: None),
    **dict.fromkeys(_LITERALS, lambda m, value: m.stack.append(_literal(value))),
    "NONE": lambda m, _: m.stack.append(None),
    "NEWTRUE": lambda m, _: m.stack.append(True),
    "NEWFALSE": lambda m, _: m.stack.append(False),
    "EMPTY_TUPLE": lambda m, _: m.stack.append(()),
    **dict.fromkeys(("EMPTY_LIST", "EMPTY_SET"), lambda m, _: m.stack.append([])),
    "EMPTY_DICT": lambda m, _: m.stack.append({}),
    "MARK": lambda m, _: m.marks.append(len(m.stack)),
    "POP": _Machine.pop_any,
    "POP_MARK": lambda m, _: m.pop_mark(),
    "DUP": lambda m, _: m.stack.append(m.top()),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.put),
    "MEMOIZE": lambda m, _: m.put(len(m.memo)),
    "GLOBAL": lambda m, name: m.stack.append(m.named(name.replace(" ", ".", 1))),
    "STACK_GLOBAL": _Machine.stack_global,
    **dict.fromkeys(
        ("EXT1", "EXT2", "EXT4"), lambda m, code: m.stack.append(m.named(f"copyreg.extension {code}"))
    ),
    "INST": _Machine.instance,
    "OBJ": _Machine.object,
    **dict.fromkeys(("REDUCE", "NEWOBJ"), _Machine.reduce),
    "NEWOBJ_EX": _Machine.new_with_keywords,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
    "TUPLE": lambda m, _: m.stack.append(tuple(m.pop_mark())),
    "TUPLE1": lambda m, _: m.tuple_of(1),
    "TUPLE2": lambda m, _: m.tuple_of(2),
    "TUPLE3": lambda m, _: m.tuple_of(3),
    **dict.fromkeys(("LIST", "FROZENSET"), lambda m, _: m.stack.append(m.pop_mark())),
    "DICT": lambda m, _: m.stack.append(_entries(m.pop_mark())),
    "APPEND": lambda m, _: m.append([m.pop()]),
    **dict.fromkeys(("APPENDS", "ADDITEMS"), lambda m, _: m.append(m.pop_mark())),
    "SETITEM": lambda m, _: m.set_items([m.pop(), m.pop()][::-1]),
    "SETITEMS": lambda m, _: m.set_items(m.pop_mark()),
}
