"""Square Attack (Andriushchenko et al., 2020): random search by squares, which sees logits only."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, Key

from advtransfer.arrays import per_example
from advtransfer.attacks.iterative import Found, IterativeAttack, Job
from advtransfer.attacks.losses import is_fooled, margin
from advtransfer.attacks.threat_models import L2

_SHARE = 0.8  # of the pixels that the first squares cover; p
# Halved after each of these queries; AutoAttack's code does not scale them to the number of queries.
_HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_TINY = 1e-12


class _State(NamedTuple):
    images: Float32[Array, "n h w c"]  # the best so far
    margins: Float32[Array, " n"]  # their other logits' lead, which the search raises


@functools.lru_cache
def square(*, num_queries: int = 5000) -> IterativeAttack:
    """Square Attack with so many queries, the first of them at stripes (ℓ∞) or a grid of tiles (ℓ2)."""

    def start(network, threat_model, job):
        begin = _tiles if isinstance(threat_model, L2) else _stripes
        images = threat_model.project(begin(job.keys, job.images, threat_model.eps), job.images)
        return keep_better(network, job, images, _State(images, jnp.full(job.labels.shape, -jnp.inf)))

    def step(network, threat_model, job, index, state):
        keys = jax.vmap(jax.random.fold_in)(job.keys, index + 1)
        is_l2 = isinstance(threat_model, L2)
        sizes, which = np.unique(sides_of(job.images.shape[1:3], num_queries, odd=is_l2), return_inverse=True)
        size = jnp.asarray(which)[jnp.minimum(index, num_queries - 1)]
        propose = _move_window if is_l2 else _colour_square
        images = propose(keys, state.images, job.images, size, sizes, threat_model.eps)
        return keep_better(network, job, threat_model.project(images, job.images), state)

    def keep_better(network, job: Job, images, state):
        logits = network(images)
        margins = margin(logits, job.labels)
        better = margins > state.margins
        best = jnp.where(per_example(better, images), images, state.images)
        state = _State(best, jnp.where(better, margins, state.margins))
        return Found(state, images, is_fooled(logits, job.labels))

    return IterativeAttack(start, step, num_queries, steps_at_once=100)


def sides_of(shape: tuple[int, ...], num_queries: int, *, odd: bool) -> Int32[np.ndarray, " queries"]:
    """The side of the square of each query, in pixels; in ℓ2 (`odd`) odd and 3 at least."""
    halvings = np.searchsorted(_HALVED_AFTER, np.arange(num_queries), side="left")
    sides = np.rint(np.sqrt(_SHARE / 2.0**halvings * math.prod(shape)))
    if odd:
        sides = np.maximum(sides, 3)
        sides += sides % 2 == 0
    return np.clip(sides, 1, min(shape)).astype(np.int32)


def _stripes(keys: Key[Array, " n"], images: Array, eps: Array) -> Array:
    """Columns of +ε or -ε, each channel on its own (§3.3)."""
    shape = 1, *images.shape[2:]
    return images + eps * jax.vmap(lambda key: jax.random.rademacher(key, shape, jnp.float32))(keys)


def _colour_square(
    keys: Key[Array, " n"], best: Array, images: Array, size: Array, sizes: np.ndarray, eps: Array
) -> Array:
    """A square at random, whose channels become x + ε or x - ε (algorithm 2): 2 ε beyond what they are, and
    the projection that follows brings them back."""

    def one(key, side):
        key_place, key_sign = jax.random.split(key)
        _, mask = _window(key_place, images.shape[1:3], side)
        return mask[..., None] * jax.random.rademacher(key_sign, (1, 1, images.shape[3]), jnp.float32)

    return best + 2 * eps * jax.vmap(one)(keys, jnp.asarray(sizes)[size])


def _window(key: Key[Array, ""], shape: tuple[int, ...], side: Array) -> tuple[tuple[Array, Array], Array]:
    """The first row and column of a square at random, and its mask [h, w].

    All places that there are, as in algorithm 2; the authors' code leaves out the last row and column.
    """
    first = [
        jax.random.randint(key, (), 0, length - side + 1)
        for key, length in zip(jax.random.split(key), shape, strict=True)
    ]
    inside = [
        (jnp.arange(length) >= start) & (jnp.arange(length) < start + side)
        for length, start in zip(shape, first, strict=True)
    ]
    return (first[0], first[1]), inside[0][:, None] & inside[1][None, :]


def _move_window(
    keys: Key[Array, " n"], best: Array, images: Array, size: Array, sizes: np.ndarray, eps: Array
) -> Array:
    """Takes the change of one window away, and gives its length to another, where a new pattern is added
    (algorithm 3)."""
    shape, channels = images.shape[1:3], images.shape[3]
    largest = int(sizes.max())
    patterns = jnp.stack([np.pad(_pattern(side), (0, largest - side)) for side in sizes.tolist()]).astype(
        jnp.float32
    )

    def one(key, best, image, size):
        side = jnp.asarray(sizes)[size]
        key_to, key_from, key_turn, key_sign = jax.random.split(key, 4)
        change = best - image
        (top, left), to = _window(key_to, shape, side)
        _, source = _window(key_from, shape, side)
        pattern = patterns[size]
        pattern = jnp.where(jax.random.bernoulli(key_turn), pattern.T, pattern)
        rows, columns = jnp.arange(shape[0]) - top, jnp.arange(shape[1]) - left
        pattern = pattern[jnp.clip(rows, 0, largest - 1)[:, None], jnp.clip(columns, 0, largest - 1)] * to
        signs = jax.random.rademacher(key_sign, (1, 1, channels), jnp.float32)
        inside = change * to[..., None]
        new = pattern[..., None] * signs + inside / (_norms(inside) + _TINY)
        both = _norms(change * (to | source)[..., None])
        unused = jnp.maximum(eps**2 - jnp.sum(jnp.square(change)), 0.0) / channels
        new = new / (_norms(new) + _TINY) * jnp.sqrt(unused + jnp.square(both))
        change = jnp.where(to[..., None], new, jnp.where(source[..., None], 0.0, change))
        return image + eps * change / (jnp.sqrt(jnp.sum(jnp.square(change))) + _TINY)

    return jax.vmap(one)(keys, best, images, size)


def _norms(change: Float32[Array, "h w c"]) -> Float32[Array, "1 1 c"]:
    """Of each channel."""
    return jnp.sqrt(jnp.sum(jnp.square(change), axis=(0, 1), keepdims=True))


def _tiles(keys: Key[Array, " n"], images: Array, eps: Array) -> Array:
    """A grid of five by five patterns, each channel of each with a random sign (§3.4)."""
    height, width, channels = images.shape[1:]
    side = max(min(height, width) // 5, 1)
    counts = height // side, width // side
    edges = [(length - side * count) // 2 for length, count in zip((height, width), counts, strict=True)]
    padding = [
        (e, length - side * n - e) for e, length, n in zip(edges, (height, width), counts, strict=True)
    ]
    tile = _pattern(side)

    def one(key, image):
        key_turn, key_sign = jax.random.split(key)
        turned = jax.random.bernoulli(key_turn, shape=counts)[:, None, :, None]
        tiles = jnp.where(turned, tile.T[:, None, :], tile[:, None, :])  # [rows, side, columns, side]
        signs = jax.random.rademacher(key_sign, (*counts, channels), jnp.float32)
        grid = tiles[..., None] * signs[:, None, :, None]
        change = jnp.pad(grid.reshape(counts[0] * side, counts[1] * side, channels), (*padding, (0, 0)))
        return image + eps * change / (jnp.sqrt(jnp.sum(jnp.square(change))) + _TINY)

    return jax.vmap(one)(keys, images)


@functools.lru_cache
def _pattern(side: int) -> np.ndarray:
    """Of norm 1: two halves of opposite sign, each with most of its weight in its middle (figure 2)."""
    upper = side // 2
    pattern = np.concatenate([_hill(upper, side), -_hill(side - upper, side)])
    return pattern / np.linalg.norm(pattern)


def _hill(height: int, width: int) -> np.ndarray:
    """Frames around the middle, the k-th weighing the sum of 1 / i² over i >= k (eq. 4), of norm 1."""
    hill = np.zeros((height, width))
    top, left = height // 2, width // 2
    for k in range(max(top, left) + 1):
        rows = slice(max(top - k, 0), min(top + k + 1, height))
        hill[rows, max(left - k, 0) : min(left + k + 1, width)] += 1 / (k + 1) ** 2
    return hill / max(np.linalg.norm(hill), _TINY)
