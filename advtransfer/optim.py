"""Optimisers in PyTorch's sense, learning-rate schedules, and which parameters an optimiser may touch."""

from __future__ import annotations

import re
from collections.abc import Sequence

import chex
import jax
import optax
from jaxtyping import Array, Float, PyTree

SCHEDULES = ("constant", "step", "cosine", "cyclic")


def make_schedule(name: str, learning_rate: float | Float[Array, ""], num_steps: int) -> optax.Schedule:
    """Learning rate as a function of the step, over `num_steps` steps.

    constant: `learning_rate`. step: divided by 10 after every third of the training (the paper's protocol).
    cosine: half a cosine from `learning_rate` to 0 (Loshchilov and Hutter, 2017, eq. 5, without restarts).
    cyclic: linearly up from 0 over the first 4/15 and down to 0 (the piecewise-linear schedule of
    MadryLab/robustness: 0 at epoch 0, the peak at 4, 0 at 15).

    Raises:
      ValueError: for an unknown name.
    """
    chex.assert_rank(learning_rate, 0)
    if name == "constant":
        return optax.constant_schedule(learning_rate)
    if name == "step":
        drops = {max(1, round(num_steps * i / 3)): 0.1 for i in (1, 2)}
        return optax.piecewise_constant_schedule(learning_rate, drops)
    if name == "cosine":
        return optax.cosine_decay_schedule(learning_rate, num_steps)
    if name == "cyclic":
        peak = max(1, round(num_steps * 4 / 15))
        return optax.join_schedules(
            [
                optax.linear_schedule(0.0, learning_rate, peak),
                optax.linear_schedule(learning_rate, 0.0, max(1, num_steps - peak)),
            ],
            [peak],
        )
    raise ValueError(f"unknown schedule {name!r}: use one of {', '.join(SCHEDULES)}")


def sgd(
    schedule: optax.ScalarOrSchedule,
    *,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float | Float[Array, ""] = 0.0,
) -> optax.GradientTransformation:
    """`torch.optim.SGD`: decay is added to the gradient before the momentum, and acts on every parameter."""
    chex.assert_rank(weight_decay, 0)
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.sgd(schedule, momentum=momentum or None, nesterov=nesterov),
    )


def freeze_mask(params: PyTree, *, trainable: Sequence[str], frozen: Sequence[str]) -> PyTree[bool]:
    """Booleans in the structure of `params`: True where frozen, for `optax.selective_transform`.

    Patterns are regular expressions matched at the start of a parameter's path ("layer4_2/conv3/kernel").

    Raises:
      ValueError: a parameter that no pattern or patterns of both kinds match, or a pattern that matches
        nothing.
    """
    unused = {*trainable, *frozen}
    problems = []

    def is_frozen(path, _):
        name = "/".join(str(entry.key) for entry in path)
        hits = [
            {pattern for pattern in patterns if re.match(pattern, name)} for patterns in (trainable, frozen)
        ]
        unused.difference_update(*hits)
        if bool(hits[0]) == bool(hits[1]):
            problems.append(f"{name} is matched by {'both' if hits[0] else 'neither'}")
        return bool(hits[1])

    mask = jax.tree_util.tree_map_with_path(is_frozen, params)
    problems += [f"pattern {pattern!r} matches no parameter" for pattern in sorted(unused)]
    if problems:
        raise ValueError("trainable and frozen patterns must split the parameters: " + "; ".join(problems))
    return mask


def apply_updates(params: PyTree, updates: PyTree, mask: PyTree[bool] | None) -> PyTree:
    """`params + updates`; frozen leaves are passed through, so that not even the sign of a zero changes."""
    chex.assert_trees_all_equal_shapes(params, updates)
    if mask is None:
        return optax.apply_updates(params, updates)
    return jax.tree.map(lambda p, u, frozen: p if frozen else (p + u).astype(p.dtype), params, updates, mask)
