"""What a study takes, counted before it runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from advtransfer.data import Dataset
from advtransfer.models import ResNet
from advtransfer.study.run import shared_inputs
from advtransfer.study.trials import Trial, group, trial_steps
from advtransfer.transfer import cache_bytes, fine_tune_flops, own_statistics, prefix_flops, without_rates

# Dense bfloat16 peaks, FLOP/s, as the vendors publish them.
PEAKS = {"H200": 989e12, "A100": 312e12, "TPU v5e": 197e12}

# Of the peak, in training a ResNet-50: an H100 trains 7,000 images/s in MLPerf 3.0, of 3 × 8.2 GFLOP each.
UTILISATION = 7_000 * 3 * 8.17e9 / 989e12

# What launching the kernels of a step takes, however small they are: an assumption, not measured.
STEP_SECONDS = 2e-4


class Piece(NamedTuple):
    """Trials of one program and one source."""

    first: Trial
    number: int
    module: ResNet  # with the target's classes
    image_size: int
    num_test: int

    @property
    def flops(self) -> float:
        """Floating-point operations of one trial, with those of BatchNorm statistics of its own."""
        recipe, k, n = self.first.recipe, self.first.num_unfrozen_blocks, self.first.num_train_images
        flops = fine_tune_flops(
            self.module, self.image_size, recipe, num_unfrozen_blocks=k, num_train=n, num_test=self.num_test
        )
        if own_statistics(recipe, k):
            flops += (2 * n + self.num_test) * prefix_flops(self.module, self.image_size, k)
        return flops

    @property
    def program(self) -> tuple:
        """What a compiled program is for."""
        _, *shape = self.first._replace(seed=0, recipe=without_rates(self.first.recipe))
        return *shape, self.number, self.module, self.image_size


class Cache(NamedTuple):
    """Activations that several pieces share, or that one trial with BatchNorm statistics of its own has."""

    num_images: int
    num_bytes: int
    flops: float  # of making it; 0 where that is part of the trials
    num_unfrozen_blocks: int  # of its pieces


def pieces_of(
    trials: Iterable[Trial], networks: Mapping[str, tuple[ResNet, int]], datasets: Mapping[str, Dataset]
) -> list[Piece]:
    """The work of some trials.

    Args:
      trials: any.
      networks: by the source's name, the module and the side of its images in pixels.
      datasets: targets by their digest, as for `run_trials`.
    """
    pieces = []
    for members in group(trials):
        module, size = networks[members[0].source.name]
        target = datasets[members[0].data]
        module = module.clone(num_classes=len(target.class_names))
        num_test = getattr(target, members[0].split).num_images
        pieces.append(Piece(members[0], len(members), module, size, num_test))
    return pieces


def caches_of(pieces: Sequence[Piece], datasets: Mapping[str, Dataset]) -> list[Cache]:
    """The caches that pieces need, each once; of images as many as nested subsets of all seeds can take."""
    shared: dict[tuple, list[Piece]] = {}
    for piece in pieces:
        shared.setdefault(shared_inputs(piece.first), []).append(piece)
    caches = []
    for alike in shared.values():
        first, module, size = alike[0].first, alike[0].module, alike[0].image_size
        largest = max(piece.number * piece.first.num_train_images for piece in alike)
        num_train = min(datasets[first.data].train.num_images, largest)
        args = module, first.recipe, first.num_unfrozen_blocks, size, num_train, alike[0].num_test
        if num_bytes := cache_bytes(*args):
            num_images = max(1, first.recipe.num_views) * num_train + alike[0].num_test
            own = own_statistics(first.recipe, first.num_unfrozen_blocks)
            flops = 0.0 if own else num_images * prefix_flops(module, size, first.num_unfrozen_blocks)
            caches.append(Cache(num_images, num_bytes, flops, first.num_unfrozen_blocks))
    return caches


def accelerator_hours(pieces: Sequence[Piece], caches: Sequence[Cache]) -> dict[str, float]:
    """Hours on one device of `PEAKS`, from counts alone."""
    hours = {}
    for name, peak in PEAKS.items():
        speed = UTILISATION * peak
        seconds = sum(cache.flops for cache in caches) / speed
        for piece in pieces:
            k = piece.first.num_unfrozen_blocks
            # Heads run side by side, trained blocks in turn.
            launches = trial_steps(piece.first) * (1 if k == 0 else piece.number) * STEP_SECONDS
            seconds += max(piece.number * piece.flops / speed, launches)
        hours[name] = seconds / 3600
    return hours


def format_seconds(seconds: float) -> str:
    """ "45 s", "12.5 min", "3.4 h"."""
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"
