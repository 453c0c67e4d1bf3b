"""A network as a pytree: whatever maps images to logits, its weights passed beside it.

What a compiled function closes over is compiled into it: a network in training would be attacked with old
weights, and every new closure would leave a copy of its weights behind. So a callable is traced at every
call, which finds the arrays that it holds now, and these become arguments of a program that is compiled once
for as long as the callable lives and computes the same.
"""

from __future__ import annotations

import functools
import re
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.tree_util import Partial
from jaxtyping import Array, Float, Num

from advtransfer.arrays import AnyArray

LogitsFn = Callable[[Float[Array, "n h w c"]], Float[Array, "n classes"]]
_JIT = type(jax.jit(lambda: None))
_MOST_PROGRAMS = 8  # that are kept of one callable: for batches of several shapes, say


def as_network(logits_fn: LogitsFn, images: Num[AnyArray, "n ..."] | jax.ShapeDtypeStruct) -> Partial:
    """A pytree that computes what `logits_fn` computes now, for images of one shape.

    Args:
      logits_fn: images [N, H, W, C] in [0, 1] to logits [N, classes]: a `jax.tree_util.Partial` such as
        `at.logits_fn(model)`, which is returned as it is; or any other callable that JAX can trace: a
        function, a `functools.partial`, a `jax.jit`, a Flax NNX or Equinox module.
      images: what it will be called with, or their `jax.ShapeDtypeStruct`.

    Raises:
      ValueError: it does not return logits [N, classes].
    """
    if isinstance(logits_fn, Partial):
        return logits_fn
    # JAX remembers how it traced a function, with the arrays of then: a new one has not been traced, and of
    # a `jax.jit` it is what it wraps.
    traced = logits_fn.__wrapped__ if isinstance(logits_fn, _JIT) else logits_fn  # ty: ignore[missing-attribute] its stub has none
    closed, found = jax.make_jaxpr(lambda x: traced(x), return_shape=True)(
        jax.ShapeDtypeStruct(images.shape, jnp.float32)
    )
    shape = getattr(found, "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != images.shape[0]:
        raise ValueError(
            f"the network makes {jax.tree.map(lambda x: x.shape, found)} of images {tuple(images.shape)}; "
            "expected logits [N, classes]"
        )
    return Partial(_program(logits_fn, closed), *closed.consts)


class _Program:
    """What a callable computes, without the arrays that it holds."""

    def __init__(self, closed: core.ClosedJaxpr, identity: tuple, place: tuple[int, int]):
        def evaluate(arrays, images):
            return core.jaxpr_as_fun(core.ClosedJaxpr(closed.jaxpr, arrays))(images)

        # From JAX 0.11 on a jaxpr holds its constants: in this one they are arguments.
        (images,) = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in closed.in_avals)
        self.opened = jax.make_jaxpr(evaluate)(closed.consts, images)
        self.identity, self.place = identity, place

    def __call__(self, *arguments: AnyArray) -> Array:
        (logits,) = core.jaxpr_as_fun(self.opened)(*arguments)
        return logits


class _Known(NamedTuple):
    """What is kept of a callable for as long as it lives."""

    alive: weakref.ref
    programs: list[_Program]
    functions: dict[Callable, Callable]  # of `jit_for`


# Of every callable that is alive, by the address of it (of a method: of its object and function).
_KNOWN: dict[tuple[int, int], _Known] = {}
_SHARED: dict[Callable, Callable] = {}  # `jit_for` of all networks that are pytrees themselves


def jit_for(network: Partial, function: Callable, **options: Any) -> Callable:
    """`jax.jit(function, **options)`, made once for every callable behind a network, its first argument.

    A compiled function keeps every program that it ever ran. Were it one for all networks, those of networks
    that are gone would pile up; so each callable has its own, and they are forgotten with it.
    """
    place = getattr(network.func, "place", None)
    known = _KNOWN.get(place)
    functions = _SHARED if place is None else known.functions if known else {}
    if function not in functions:
        functions[function] = jax.jit(functools.partial(function), **options)
    return functions[function]


def in_batches(
    network: Partial, function: Callable[..., Array], images: Num[AnyArray, "n ..."], batch_size: int
) -> Num[np.ndarray, "n ..."]:
    """`function(network, images)`, compiled for batches of one size, the last of which ends with copies."""
    apply, rows, last = jit_for(network, function), np.arange(batch_size), len(images) - 1
    found = [apply(network, images[np.minimum(i + rows, last)]) for i in range(0, last + 1, batch_size)]
    return np.concatenate([np.asarray(batch) for batch in found])[: last + 1]


def _program(logits_fn: LogitsFn, closed: core.ClosedJaxpr) -> _Program:
    """The program of an earlier call where it is the same, else a new one."""
    owner = getattr(logits_fn, "__self__", None) or logits_fn
    place = id(owner), id(getattr(logits_fn, "__func__", None))
    # Functions within are printed with their addresses, which differ from trace to trace.
    text = re.sub("0x[0-9a-f]+", "", str(closed.jaxpr))
    identity = text, tuple(id(array) for array in _inner_arrays(closed.jaxpr))
    if place not in _KNOWN:
        try:
            alive = weakref.ref(owner, lambda _: _KNOWN.pop(place, None))
        except TypeError:
            return _Program(closed, identity, place)
        _KNOWN[place] = _Known(alive, [], {})
    programs = _KNOWN[place].programs
    for program in programs:
        if program.identity == identity:
            return program
    programs.append(_Program(closed, identity, place))
    del programs[:-_MOST_PROGRAMS]
    return programs[-1]


def _inner_arrays(jaxpr: core.Jaxpr) -> list[Any]:
    """The arrays that programs inside of a program hold: those of a `jax.jit` are compiled into it."""
    found = []
    for equation in jaxpr.eqns:
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: isinstance(x, core.ClosedJaxpr)):
            if isinstance(value, core.ClosedJaxpr):
                found += [*value.consts, *_inner_arrays(value.jaxpr)]
            elif isinstance(value, core.Jaxpr):
                found += _inner_arrays(value)
    return found
