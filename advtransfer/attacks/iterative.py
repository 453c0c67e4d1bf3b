"""Iterative attacks on a queue of images, in batches of one shape.

An image leaves its slot of the batch when it is fooled or has had all its steps, and the next one takes it.
So nothing is computed for what is fooled already, and nothing is compiled again as images become fewer.
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
from advtransfer.arrays import per_example
from advtransfer.attacks.network import LogitsFn, as_network, jit_for
from advtransfer.attacks.threat_models import L2, Linf

_SHAPES = 8  # of batches, for any number of images
_IDLE = 0.25  # of the slots, from which on they are filled again: that costs about a step of the whole batch


class Job(NamedTuple):
    """What is attacked, in each slot."""

    images: Float32[Array, "n h w c"]  # in [0, 1]
    labels: Int32[Array, " n"]
    targets: Int32[Array, " n"]  # classes to reach, of targeted attacks
    starts: Int32[Array, " n"]  # which start it is, from 0
    keys: Key[Array, " n"]


class Found(NamedTuple):
    """What a step has found."""

    state: PyTree  # of the attack
    images: Float32[Array, "n h w c"]  # allowed ones
    fooled: Bool[Array, " n"]  # whether the network errs on them


class IterativeAttack(NamedTuple):
    """An attack, as functions of a whole batch.

    `start(network, threat_model, job)` and `step(network, threat_model, job, index, state)` return a `Found`;
    `index` int32 [n] counts the steps of each slot.
    """

    start: Callable[..., Found]
    step: Callable[..., Found]
    num_steps: int
    num_targets: int = 0  # the most probable classes but the label that each image is led to; 0: untargeted
    num_starts: int = 1
    steps_at_once: int = 10  # before slots are looked at


class _Slots(NamedTuple):
    """State of a batch."""

    job: Job
    index: Int32[Array, " n"]  # steps taken
    state: PyTree
    images: Float32[Array, "n h w c"]  # adversarial where fooled
    fooled: Bool[Array, " n"]


def run_attack(
    logits_fn: LogitsFn,
    attack: IterativeAttack,
    threat_model: L2 | Linf,
    images: Float32[np.ndarray, "n h w c"],
    labels: Int32[np.ndarray, " n"],
    targets: Int32[np.ndarray, "n targets"],
    *,
    key: Key[Array, ""],
    numbers: Int[np.ndarray, " n"],
    batch_size: int,
) -> tuple[Bool[np.ndarray, " n"], Float32[np.ndarray, "n h w c"]]:
    """Which images an attack fools, and adversarial images where it does (elsewhere the images).

    Args:
      logits_fn: images [N, H, W, C] in [0, 1] to logits (see `as_network`).
      attack: what to run.
      threat_model: `L2` or `Linf`.
      images, labels: what to attack.
      targets: the classes that each image is led to in turn until one of them is reached; of untargeted
        attacks [N, 1].
      key, numbers: the randomness of an image comes from its number.
      batch_size: images at a time, over all devices.
    """
    number, num_targets = targets.shape
    fooled, adversarial = np.zeros(number, bool), images.copy()
    # Images by their first target come first: most that can be fooled are, and leave the rest of the queue.
    queue = [
        (i, target, start)
        for start in range(attack.num_starts)
        for target in range(num_targets)
        for i in range(number)
    ]
    slots = _num_slots(len(queue), batch_size)
    devices = parallel.choose_devices(slots)
    shape = slots // devices, *images.shape[1:]
    network = as_network(logits_fn, jax.ShapeDtypeStruct(shape, jnp.float32))
    begin, merge, advance = (jit_for(network, f) for f in _programs(attack, devices))
    network, threat_model, key = parallel.replicate((network, threat_model, key), devices)
    held: list[int | None] = [None] * slots
    batch, next_jobs = None, iter(queue)

    def fill(free: Sequence[int], batch: _Slots | None) -> _Slots:
        """The batch with the next jobs in the slots that are free."""
        chosen = [(0, 0, 0)] * slots
        for slot in free:
            job = next((job for job in next_jobs if not fooled[job[0]]), None)
            held[slot] = None if job is None else job[0]
            chosen[slot] = job or chosen[slot]
        if batch is not None and all(held[slot] is None for slot in free):
            return batch
        image, target, start = np.array(chosen).T
        job = images[image], labels[image], targets[image, target], start.astype(np.int32)
        is_free = np.isin(np.arange(slots), free)
        is_used = np.array([image is not None for image in held])
        split = functools.partial(parallel.split_locally, devices=devices)
        fresh = begin(network, threat_model, key, *split((job, numbers[image].astype(np.int32), is_used)))
        return fresh if batch is None else merge(split(is_free), fresh, batch)

    free = list(range(slots))
    while True:
        if free:
            batch = fill(free, batch)
        if all(image is None for image in held):
            return fooled, adversarial
        batch = advance(network, threat_model, batch)
        found, index = (np.ravel(x) for x in jax.device_get((batch.fooled, batch.index)))
        new = {i: slot for slot, i in enumerate(held) if i is not None and found[slot] and not fooled[i]}
        if new:
            shown = np.asarray(batch.images).reshape(slots, *images.shape[1:])
            for i, slot in new.items():
                adversarial[i], fooled[i] = shown[slot], True
        # An image takes its attacks on other targets with it.
        over = [
            slot for slot, i in enumerate(held) if i is None or fooled[i] or index[slot] >= attack.num_steps
        ]
        free = over if len(over) >= _IDLE * slots or len(over) == slots else []


def _num_slots(jobs: int, batch_size: int) -> int:
    """So many that the last round is nearly full too, in eighths of a batch: few shapes are compiled."""
    devices = parallel.choose_devices(batch_size)
    unit = max(batch_size // _SHAPES // devices, 1) * devices
    rounds = -(-jobs // batch_size)
    return min(-(-jobs // (rounds * unit)) * unit, batch_size)


@functools.lru_cache(maxsize=64)
def _programs(attack: IterativeAttack, devices: int) -> tuple[Callable, Callable, Callable]:
    def begin(network, threat_model, key, job, numbers, is_used):
        job = Job(*job, jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers))
        found = attack.start(network, threat_model, job)
        index = jnp.zeros(job.labels.shape, jnp.int32)
        return _Slots(job, index, found.state, found.images, found.fooled | ~is_used)

    def merge(is_free, fresh, slots):
        return jax.tree.map(lambda new, old: jnp.where(per_example(is_free, new), new, old), fresh, slots)

    def is_live(slots):
        return ~slots.fooled & (slots.index < attack.num_steps)

    def one_step(slots, network, threat_model):
        found = attack.step(network, threat_model, slots.job, slots.index, slots.state)
        newly = found.fooled & is_live(slots)
        return slots._replace(
            index=slots.index + 1,
            state=found.state,
            images=jnp.where(per_example(newly, found.images), found.images, slots.images),
            fooled=slots.fooled | newly,
        )

    def advance(network, threat_model, slots):
        def go_on(carry):
            return (carry[0] < attack.steps_at_once) & jnp.any(is_live(carry[1]))

        def body(carry):
            return carry[0] + 1, one_step(carry[1], network, threat_model)

        return jax.lax.while_loop(go_on, body, (0, slots))[1]

    on_devices = functools.partial(parallel.map_parallel, devices=devices)
    return (
        on_devices(begin, num_shared=3, num_split=3),
        on_devices(merge, num_shared=0, num_split=3),
        on_devices(advance, num_shared=2, num_split=1),
    )
