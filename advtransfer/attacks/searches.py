"""Searches for adversarial images, each image in a place of its own in batches of one shape.

An image leaves its place when it is fooled or its search is over, and the next one takes it. So nothing is
computed for what is fooled already, and no program is compiled again as images become fewer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int, Int32, Key, PyTree

from advtransfer import parallel
from advtransfer.attacks.network import LogitsFn, as_network, jit_for
from advtransfer.attacks.threat_models import L2, Linf

_SHAPES = 8  # of batches, for any number of images
_IDLE = 0.25  # of the places of a batch, from which on they are filled again: that takes a step of all


class Job(NamedTuple):
    """What to search for, for each place of a batch."""

    images: Float32[Array, "n h w c"]  # in [0, 1]
    labels: Int32[Array, " n"]
    targets: Int32[Array, " n"]  # classes to reach, of targeted searches
    starts: Int32[Array, " n"]  # which start it is, from 0
    keys: Key[Array, " n"]


class Found(NamedTuple):
    """Where a search is."""

    state: PyTree  # of the attack
    images: Float32[Array, "n h w c"]  # allowed ones
    fooled: Bool[Array, " n"]  # whether the network errs on them


class Search(NamedTuple):
    """An attack, as functions of all places of a batch.

    `start(network, threat_model, job)` and `step(network, threat_model, job, index, state)` return a `Found`;
    `index` int32 [n] counts the steps of each place.
    """

    start: Callable[..., Found]
    step: Callable[..., Found]
    num_steps: int
    num_targets: int = 0  # the most probable classes but the label that each image is led to; 0: untargeted
    num_starts: int = 1
    steps_at_once: int = 10  # before places are looked at


class _Places(NamedTuple):
    """State of a batch."""

    job: Job
    index: Int32[Array, " n"]  # steps taken
    state: PyTree
    images: Float32[Array, "n h w c"]  # adversarial where fooled
    fooled: Bool[Array, " n"]


def run_search(
    logits_fn: LogitsFn,
    search: Search,
    threat_model: L2 | Linf,
    images: Float32[np.ndarray, "n h w c"],
    labels: Int32[np.ndarray, " n"],
    targets: Int32[np.ndarray, "n targets"],
    *,
    key: Key[Array, ""],
    numbers: Int[np.ndarray, " n"],
    batch_size: int,
) -> tuple[Bool[np.ndarray, " n"], Float32[np.ndarray, "n h w c"]]:
    """Which images a search fools, and adversarial images where it does (elsewhere the images).

    Args:
      logits_fn: images [N, H, W, C] in [0, 1] to logits (see `as_network`).
      search: the attack.
      threat_model: `L2` or `Linf`.
      images, labels: what to attack.
      targets: the classes that each image is led to in turn until one of them is reached; of untargeted
        searches [N, 1].
      key, numbers: the randomness of an image comes from its number.
      batch_size: images at a time, over all devices.
    """
    number, num_targets = targets.shape
    fooled, adversarial = np.zeros(number, bool), images.copy()
    # Images by their first target come first: most that can be fooled are, and leave the rest of the queue.
    queue = [
        (i, target, start)
        for start in range(search.num_starts)
        for target in range(num_targets)
        for i in range(number)
    ]
    places = _num_places(len(queue), batch_size)
    devices = parallel.choose_devices(places)
    shape = places // devices, *images.shape[1:]
    network = as_network(logits_fn, jax.ShapeDtypeStruct(shape, jnp.float32))
    begin, merge, advance = (jit_for(network, f) for f in _programs(search, devices))
    network, threat_model, key = parallel.replicate((network, threat_model, key), devices)
    held: list[int | None] = [None] * places
    batch, next_jobs = None, iter(queue)

    def fill(free: Sequence[int], batch: _Places | None) -> _Places:
        """The batch with the next jobs in the places that are free."""
        chosen = [(0, 0, 0)] * places
        for place in free:
            job = next((job for job in next_jobs if not fooled[job[0]]), None)
            held[place] = None if job is None else job[0]
            chosen[place] = job or chosen[place]
        if batch is not None and all(held[place] is None for place in free):
            return batch
        image, target, start = np.array(chosen).T
        job = images[image], labels[image], targets[image, target], start.astype(np.int32)
        is_free = np.isin(np.arange(places), free)
        is_used = np.array([image is not None for image in held])
        split = functools.partial(parallel.split_locally, devices=devices)
        fresh = begin(network, threat_model, key, *split((job, numbers[image].astype(np.int32), is_used)))
        return fresh if batch is None else merge(split(is_free), fresh, batch)

    free = list(range(places))
    while True:
        if free:
            batch = fill(free, batch)
        if all(image is None for image in held):
            return fooled, adversarial
        batch = advance(network, threat_model, batch)
        found, index = (np.ravel(x) for x in jax.device_get((batch.fooled, batch.index)))
        at = [place for place in range(places) if held[place] is not None and found[place]]
        new_ones = [place for place in at if not fooled[held[place]]]
        if new_ones:
            shown = np.asarray(batch.images).reshape(places, *images.shape[1:])
            for place in new_ones:
                adversarial[held[place]], fooled[held[place]] = shown[place], True
        # With an image go its searches for other targets.
        over = [
            place
            for place in range(places)
            if held[place] is None or fooled[held[place]] or index[place] >= search.num_steps
        ]
        free = over if len(over) >= _IDLE * places or len(over) == places else []


def _num_places(jobs: int, batch_size: int) -> int:
    """So many that the last round is nearly full too, in eighths of a batch: few shapes are compiled."""
    devices = parallel.choose_devices(batch_size)
    unit = max(batch_size // _SHAPES // devices, 1) * devices
    rounds = -(-jobs // batch_size)
    return -(-jobs // (rounds * unit)) * unit


@functools.lru_cache(maxsize=64)
def _programs(search: Search, devices: int) -> tuple[Callable, Callable, Callable]:
    def begin(network, threat_model, key, job, numbers, is_used):
        job = Job(*job, jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers))
        found = search.start(network, threat_model, job)
        index = jnp.zeros(job.labels.shape, jnp.int32)
        return _Places(job, index, found.state, found.images, found.fooled | ~is_used)

    def merge(is_free, fresh, places):
        return jax.tree.map(lambda new, old: jnp.where(_like(is_free, new), new, old), fresh, places)

    def is_live(places):
        return ~places.fooled & (places.index < search.num_steps)

    def one_step(places, network, threat_model):
        found = search.step(network, threat_model, places.job, places.index, places.state)
        newly = found.fooled & is_live(places)
        return places._replace(
            index=places.index + 1,
            state=found.state,
            images=jnp.where(_like(newly, found.images), found.images, places.images),
            fooled=places.fooled | newly,
        )

    def advance(network, threat_model, places):
        def go_on(carry):
            return (carry[0] < search.steps_at_once) & jnp.any(is_live(carry[1]))

        def body(carry):
            return carry[0] + 1, one_step(carry[1], network, threat_model)

        return jax.lax.while_loop(go_on, body, (0, places))[1]

    on_devices = functools.partial(parallel.map_parallel, devices=devices)
    return (
        on_devices(begin, num_shared=3, num_split=3),
        on_devices(merge, num_shared=0, num_split=3),
        on_devices(advance, num_shared=2, num_split=1),
    )


def _like(flags: Array, values: Array) -> Array:
    """bool [N] shaped to broadcast against values [N, ...]."""
    return flags.reshape(-1, *(1,) * (values.ndim - 1))
