"""The faults that `tests.mutate` puts into the package, drawn from its syntax trees.

Strings, annotations, what is raised and `__repr__` stay as they are, and in `report/figures.py` every number
(how a figure looks). What has no effect or can only be a TypeError is left out where the expression shows it.
"""

from __future__ import annotations

import ast
import functools
import itertools
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SYMBOLS = {
    **{ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*")},
    **{ast.FloorDiv: ("//", "%"), ast.Mod: ("%", "//"), ast.Pow: ("**", "*")},
    **{ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"), ast.LShift: ("<<", ">>"), ast.RShift: (">>", "<<")},
    **{ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">")},
    **{ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.And: ("and", "or"), ast.Or: ("or", "and")},
    **{ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"), ast.In: ("in", "not in")},
    ast.NotIn: ("not in", "in"),
}
AXES = {"axis", "axes", "in_axes", "out_axes"}  # keywords
REDUCTIONS = {
    *("sum", "mean", "max", "min", "std", "var", "all", "any"),
    *("argmax", "argmin", "argsort", "sort", "cumsum"),
}
AXIS_AT = {  # position of the axis among the arguments of NumPy's functions
    **dict.fromkeys((*REDUCTIONS, "concatenate", "stack", "expand_dims", "flip"), 1),
    **dict.fromkeys(("roll", "repeat", "take", "split", "moveaxis", "take_along_axis"), 2),
}
# Calls that mean the same with their arguments swapped, or can only fail.
UNSWAPPED = {
    *("min", "max", "minimum", "maximum", "add", "multiply", "gcd", "isclose", "allclose"),
    *("array_equal", "vdot", "logical_and", "logical_or", "_one_of", "print", "isinstance"),
    *("issubclass", "hasattr", "getattr", "setattr", "map", "filter", "partial", "scan", "fori_loop"),
    *("while_loop", "replace", "full", "zeros", "ones", "array", "asarray", "zip", "enumerate"),
    *("astype", "frombuffer", "fromiter", "clip"),
}
INERT = {"indent", "maxsize", "stacklevel"}  # keywords whose numbers change no result
ATOMS = (ast.Name, ast.Attribute, ast.Call, ast.Subscript, ast.Constant, ast.List, ast.Tuple, ast.Dict)
DISPLAYS = (ast.JoinedStr, ast.List, ast.Tuple, ast.ListComp, ast.Dict, ast.DictComp, ast.Set, ast.SetComp)
# Calls that give text, collections or paths.
TEXTS = {
    *("str", "repr", "list", "tuple", "dict", "set", "sorted", "join", "read_text", "format", "encode"),
    *("Path", "to_path", "zip"),
}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Mutation(NamedTuple):
    """`original` at bytes `start` to `end` of a file becomes `replacement`."""

    file: str
    line: int
    kind: str
    start: int
    end: int
    original: str
    replacement: str
    body: tuple[int, int] | None  # lines of the innermost function's body; None: outside functions


@functools.cache
def mutations(source: str, file: str) -> tuple[Mutation, ...]:
    """All mutants of one file that are worth a try."""
    data = source.encode()
    starts = list(itertools.accumulate((len(line) for line in data.splitlines(keepends=True)), initial=0))

    def begin(node: ast.AST) -> int:
        return starts[node.lineno - 1] + node.col_offset

    def end(node: ast.AST) -> int:
        return starts[node.end_lineno - 1] + node.end_col_offset

    def text(node: ast.AST) -> str:
        return data[begin(node) : end(node)].decode()

    def whole(node: ast.AST) -> str:
        return text(node) if isinstance(node, ATOMS) else f"({text(node)})"

    def between(left: ast.AST, op: ast.AST, right: ast.AST, kind: str) -> Iterator[tuple]:
        """The operator's symbol, which no node of the tree places."""
        old, new = SYMBOLS.get(type(op), ("", ""))
        found = re.match(rb"[)\s]*" + re.escape(old).replace(r"\ ", r"\s+").encode(), data[end(left) :])
        if old and found and end(left) + found.end() <= begin(right):
            stop = end(left) + found.end()
            yield kind, stop - len(found[0].lstrip(b") \n\t")), stop, new

    def edit(node: ast.AST, kind: str, replacement: str) -> tuple:
        return kind, begin(node), end(node), replacement

    figure, settled = file.endswith("report/figures.py"), set()

    def edits(node: ast.AST) -> Iterator[tuple]:
        """(kind, start, end, replacement) for everything that may become of this node itself."""
        for value in _defaults(node, file):
            for literal, number in _literals(value):
                settled.add(id(literal))
                if isinstance(number, bool):
                    yield edit(literal, "default", str(not number))
                elif not figure:
                    other = number + 1 if type(number) is int else number * 2 or 0.5
                    yield edit(literal, "default", repr(other))
        match node:
            case ast.BinOp(left, op, right) if not _is_text(left, op) and not _is_text(right, op):
                if not (figure and any(type(n) is float for v in (left, right) for _, n in _literals(v))):
                    yield from between(left, op, right, "arithmetic")
            case ast.AugAssign(target, op, value) if type(op) in (ast.Add, ast.Sub, ast.Mult, ast.Div):
                if not _is_text(value, op):
                    yield from between(target, op, value, "arithmetic")
            case ast.UnaryOp(ast.USub()) if id(node) not in settled and not figure:
                yield edit(node, "arithmetic", text(node).removeprefix("-"))
            case ast.UnaryOp(ast.Not() | ast.Invert()):
                yield edit(node, "comparison", re.sub(r"^(not\s+|not\b|~)", "", text(node)))
            case ast.Compare(left, ops, comparators):
                for a, op, b in zip([left, *comparators], ops, comparators, strict=False):
                    yield from between(a, op, b, "comparison")
            case ast.BoolOp(op, values):
                for a, b in itertools.pairwise(values):
                    yield from between(a, op, b, "comparison")
            case ast.If(test=test, body=[*_, ast.Raise()]):
                yield edit(test, "check", "False")
            case ast.If(test=test) | ast.IfExp(test=test) if isinstance(test, ATOMS):
                yield edit(test, "comparison", f"not {text(test)}")
            case ast.Assert(test=test):
                yield edit(test, "check", "True")
            case ast.Expr(ast.Call() as call) if re.match("_?(check|assert)_", _name(call)):
                yield edit(call, "check", "None")
            case ast.Call():
                yield from calls(node)
            case ast.Slice(lower=lower, upper=upper):
                yield from moved(bound for bound in (lower, upper) if bound)
        if not figure and id(node) not in settled and type(number := _number(node)) is int:
            yield edit(node, "off by one", str(number + 1))
            yield edit(node, "off by one", str(number - 1))
        if isinstance(node, ast.UnaryOp) and _number(node) is not None:
            settled.add(id(node.operand))

    def moved(bounds: Iterator[ast.AST]) -> Iterator[tuple]:
        for bound in bounds:
            if _number(bound) is None:
                yield edit(bound, "off by one", f"{whole(bound)} + 1")
                yield edit(bound, "off by one", f"{whole(bound)} - 1")

    def calls(node: ast.Call) -> Iterator[tuple]:
        name, args, owner = _name(node), node.args, getattr(node.func, "value", None)
        of_numpy = getattr(owner, "id", "") in ("np", "jnp")
        method = owner is not None and getattr(owner, "id", "") not in ("np", "jnp", "jax", "math")
        if any(isinstance(argument, ast.Starred) for argument in args):
            return
        axes = [keyword.value for keyword in node.keywords if keyword.arg in AXES]
        if (of_numpy and name in AXIS_AT) or (method and name in REDUCTIONS):
            axes += args[AXIS_AT[name] - method :]
        for literal, number in (found for value in axes for found in _literals(value)):
            settled.add(id(literal))
            if type(number) is int:  # of a vector: never the same axis again
                yield edit(literal, "axis", str(number + (1 if number < -1 or number == 0 else -1)))
        settled.update(id(n) for k in node.keywords if k.arg in INERT for n, _ in _literals(k.value))
        if name == "stop_gradient":
            yield edit(node, "stop_gradient", whole(args[0]))
        if name == "range" and isinstance(node.func, ast.Name):
            yield from moved(args[:2])
        if name == "clip":
            yield edit(node, "bound", whole(node.func.value if method else args[0]))
        elif name == "abs" and args:
            yield edit(node, "bound", whole(args[0]))
        elif name in ("min", "max", "minimum", "maximum") and len(args) == 2 and not method and not axes:
            yield edit(node, "bound", whole(args[0]))
            yield edit(node, "bound", whole(args[1]))
        for a, b in itertools.pairwise(args[1:] if name == "where" else args):
            gap, shown = data[end(a) : begin(b)].decode(), (text(a), text(b))
            odd = any(isinstance(x, (ast.Lambda, *DISPLAYS)) for x in (a, b)) or _is_string(a) != _is_string(
                b
            )
            dtype = any(re.search(r"\b(u?int|float|bool)\d*$", x) for x in shown)
            if name in UNSWAPPED or "assert" in name or odd or dtype or shown[0] == shown[1]:
                continue
            if re.fullmatch(r"\s*,\s*", gap):
                yield "swapped arguments", begin(a), end(b), shown[1] + gap + shown[0]

    found = []
    for node, body in _walk(ast.parse(source), None):
        for kind, start, stop, replacement in edits(node):
            lines = None if kind == "default" else body  # a signature is read without being called
            line, original = data[:start].count(b"\n") + 1, data[start:stop].decode()
            found.append(Mutation(file, line, kind, start, stop, original, replacement, lines))
    return tuple(found)


def _walk(node: ast.AST, body: tuple[int, int] | None) -> Iterator[tuple[ast.AST, tuple[int, int] | None]]:
    """The nodes that may be changed, each with the lines of the innermost function's body."""
    match node:
        case ast.Raise() | ast.JoinedStr() | ast.FunctionDef(name="__repr__"):
            return
        case ast.If(test=ast.Name("TYPE_CHECKING")) | ast.Assign(targets=[ast.Name("__all__")]):
            return
        case ast.Call() if _name(node).endswith(("Error", "Warning", "warn", "namedtuple")):
            return
    yield node, body
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns"):
            continue
        inner = body
        if isinstance(node, FUNCTIONS) and field == "body":
            inner = node.body[0].lineno, node.end_lineno
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _walk(child, inner)


def _defaults(node: ast.AST, file: str) -> list[ast.AST]:
    """The defaults of parameters, fields or configuration keys that this statement gives."""
    match node:
        case ast.FunctionDef(args=args):
            return [value for value in (*args.defaults, *args.kw_defaults) if value]
        case ast.ClassDef(body=body):
            return [item.value for item in body if isinstance(item, ast.AnnAssign) and item.value]
        case ast.Assign([ast.Attribute()], value) if file.endswith("config/keys.py"):
            return [value]
    return []


def _number(node: ast.AST) -> float | None:
    match node:
        case ast.Constant(int() | float() as value):
            return value
        case ast.UnaryOp(ast.USub(), ast.Constant(int() | float() as value)):
            return -value
    return None


def _literals(node: ast.AST) -> Iterator[tuple[ast.AST, float]]:
    """The numbers and booleans that are written in an expression."""
    number = _number(node)
    if number is not None:
        yield node, number
    elif not isinstance(node, ast.Call):
        for child in ast.iter_child_nodes(node):
            yield from _literals(child)


def _name(call: ast.Call) -> str:
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def _is_string(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)


def _is_text(node: ast.AST, op: ast.AST) -> bool:
    """Whether an operand is seen to be text, a collection, a path or a type: no other operator would do."""
    if isinstance(node, ast.BinOp):
        return _is_text(node.left, op) or _is_text(node.right, op)
    if isinstance(node, ast.Call):
        return _name(node) in TEXTS
    name = getattr(node, "attr", getattr(node, "id", ""))
    path = isinstance(op, ast.Div) and re.search("(folder|workdir|path|place|root|parent|checkpoints)$", name)
    type_ = isinstance(op, ast.BitOr) and name[:1].isupper()
    return bool(path or type_) or isinstance(node, DISPLAYS) or _is_string(node)


def mutated(source: str, mutation: Mutation) -> str:
    data = source.encode()
    return (data[: mutation.start] + mutation.replacement.encode() + data[mutation.end :]).decode()


def package_of(mutation: Mutation) -> str:
    """The sub-package; of modules beside these, "advtransfer"."""
    return Path(mutation.file).parent.name


def draw(root: Path, seed: int, count: int, package: str = "") -> list[Mutation]:
    """So many mutants: of the packages in turn, of every package's kinds in turn, a place at random."""
    rng, left = random.Random(seed), {}
    sources = {str(p.relative_to(root)): p.read_text() for p in sorted((root / "advtransfer").rglob("*.py"))}
    for mutation in (m for file, source in sources.items() for m in mutations(source, file)):
        if package in ("", package_of(mutation), Path(mutation.file).stem):
            left.setdefault(package_of(mutation), {}).setdefault(mutation.kind, []).append(mutation)
    turns = {name: rng.sample(list(kinds), len(kinds)) for name, kinds in left.items()}
    drawn = []
    for name in itertools.cycle(rng.sample(list(turns), len(turns))):
        if len(drawn) >= count or not any(turns.values()):
            return drawn
        if turns[name]:
            kind = turns[name].pop(0)
            places = left[name][kind]
            found = places.pop(rng.randrange(len(places)))
            turns[name] += [kind] * bool(places)
            before, after = sources[found.file], mutated(sources[found.file], found)
            try:
                compile(after, found.file, "exec")
            except SyntaxError:
                continue
            if ast.dump(ast.parse(before)) != ast.dump(ast.parse(after)):
                drawn.append(found)
    return drawn
