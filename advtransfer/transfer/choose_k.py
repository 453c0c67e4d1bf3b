"""How many blocks to train: by a rule of thumb, or by cross-validation on the training images alone."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import chex
import jax
import numpy as np
from jaxtyping import Array, Float64, Integer, Key

from advtransfer.arrays import AnyArray
from advtransfer.data import Split, check_split
from advtransfer.models import Model
from advtransfer.train import DivergedError
from advtransfer.transfer.activation_cache import own_statistics, prepare
from advtransfer.transfer.recipe import Recipe, resolve_recipe
from advtransfer.transfer.tuning import fine_tune_many

METHODS = ("rule", "cross_validation")

# Utrera et al. (2021) vary k over these; -1: everything.
_DEPTHS = (0, 1, 3, 6, 9, -1)

# (below this many images, k); see `rule_of_thumb`.
RULE = ((100, 0), (1_600, 1), (12_800, 3), (51_200, 9))

# Folded into the key that the folds and their trainings are drawn with.
_FOLD_STREAM = 0xF01D


class Choice(NamedTuple):
    """Which number of blocks was chosen, and why."""

    method: str  # one of METHODS
    num_unfrozen_blocks: int  # the one chosen
    candidates: tuple[int, ...]  # from the fewest trained blocks to all (-1)
    accuracies: Float64[np.ndarray, "candidates folds"] | None  # on the images held out; None: by the rule

    @property
    def means(self) -> Float64[np.ndarray, " candidates"]:
        """Over the folds; NaN where a training diverged."""
        return self._measured.mean(axis=1)

    @property
    def standard_errors(self) -> Float64[np.ndarray, " candidates"]:
        """Of `means`."""
        return self._measured.std(axis=1, ddof=1) / self._measured.shape[1] ** 0.5

    @property
    def _measured(self) -> np.ndarray:
        if self.accuracies is None:
            raise ValueError("the rule of thumb measures no accuracies")
        return self.accuracies


def choose_k(
    method: str,
    model: Model,
    train: Split,
    *,
    num_classes: int,
    key: Key[Array, ""],
    num_folds: int = 5,
    recipe: Recipe = Recipe(),
) -> Choice:
    """The number of blocks to train on `train`, by a method of METHODS.

    Raises:
      ValueError: an unknown method, or as `cross_validate`.
      DivergedError: as `cross_validate`.
    """
    check_split(train)
    num_blocks = model.module.num_blocks
    if method == "rule":
        return Choice("rule", rule_of_thumb(train.num_images, num_blocks), depths(num_blocks), None)
    if method == "cross_validation":
        options = {"num_classes": num_classes, "key": key, "num_folds": num_folds, "recipe": recipe}
        return cross_validate(model, train, **options)
    raise ValueError(
        f"num_unfrozen_blocks={method!r}: give a number of blocks, -1 (everything), or one of "
        f"{', '.join(METHODS)}"
    )


def depths(num_blocks: int) -> tuple[int, ...]:
    """The paper's k that a network of `num_blocks` blocks has, fewest first; -1 is everything."""
    return tuple(k for k in _DEPTHS if k < num_blocks)


def rule_of_thumb(num_images: int, num_blocks: int) -> int:
    """k by the number of training images: the fewer there are, the fewer blocks are trained.

    That is the advice of the paper's authors in their blog (Utrera, "Adversarially-Trained Deep Nets Transfer
    Better", 2020). They give no numbers. Ours, k = 0 below 100 images, 1 below 1,600, 3 below 12,800, 9 below
    51,200 and then everything, follow a sample of the results published with their code
    (github.com/utrerf/robust_transfer_learning, results/consolidated_results.csv, single seeds; for k = 3 the
    means of the paper's table). On CIFAR-10 a ResNet-50 robust to ℓ∞ 8/255 did better with k = 1 than with 3
    at n = 200, 400 and 800 (65 to 60, 73 to 69, 77 to 76 %), and worse at 6,400 (88 to 89) and 25,600 (91 to
    93). On SVHN and FMNIST, far from ImageNet, k = 3 was ahead at n = 100 to 400 already: there the rule
    takes too few. Below n = 100 and above k = 3 it rests on no result and only extrapolates. Where it
    matters, cross-validate.
    """
    k = next((k for below, k in RULE if num_images < below), -1)
    return k if k < num_blocks else -1


def possible_folds(labels: Integer[AnyArray, " n"], num_folds: int) -> int:
    """`num_folds`, or as many as the rarest class has images, so that each fold has every class.

    Raises:
      ValueError: one image of a class, which cannot be trained and measured on, or fewer than two folds.
    """
    chex.assert_rank(labels, 1)
    if num_folds < 2:
        raise ValueError(f"cross-validation in {num_folds} folds: give at least 2")
    classes, counts = np.unique(labels, return_counts=True)
    if counts.min() < 2:
        raise ValueError(
            f"class {classes[counts.argmin()]} has one training image, and cross-validation needs two of "
            "every class: take more images, or choose the number of blocks by the rule"
        )
    return int(min(num_folds, counts.min()))


def make_folds(
    labels: Integer[AnyArray, " n"], num_folds: int, key: Key[Array, ""]
) -> list[Integer[np.ndarray, " _"]]:
    """Random parts of range(N), ascending; sizes, and counts of a class, differ by one at most."""
    chex.assert_rank(labels, 1)
    shuffled = np.asarray(jax.random.permutation(key, len(labels)))
    by_class = shuffled[np.argsort(np.asarray(labels)[shuffled], kind="stable")]
    return [np.sort(by_class[fold::num_folds]) for fold in range(num_folds)]


def cross_validate(
    model: Model,
    train: Split,
    *,
    num_classes: int,
    key: Key[Array, ""],
    num_folds: int = 5,
    recipe: Recipe = Recipe(),
) -> Choice:
    """The smallest k whose accuracy is within one standard error of the best one's.

    The accuracy of a k is its mean over stratified folds of the training images: each is measured on after
    the whole recipe has been run on the others. All k see the same folds, heads and orders. The rule of one
    standard error is that of Breiman, Friedman, Olshen and Stone (1984, §3.4.3).

    Args:
      model: the source.
      train: no other image is looked at.
      num_classes: of the target.
      key: of the folds, and of the heads, orders and augmentation.
      num_folds: fewer where a class has fewer images (see `possible_folds`).
      recipe: a batch larger than the other folds is cut to them.

    Raises:
      ValueError: as `possible_folds`, or as `fine_tune_many`.
      DivergedError: no k was trained without the loss becoming NaN or infinite.
    """
    num_folds = possible_folds(train.labels, num_folds)
    key = jax.random.fold_in(key, _FOLD_STREAM)
    folds = make_folds(train.labels, num_folds, key)
    rests = [np.setdiff1d(np.arange(len(train.labels)), fold) for fold in folds]
    recipe = resolve_recipe(recipe, min(map(len, rests)), train.images)
    recipe = dataclasses.replace(recipe, evaluate_epochs=(recipe.num_epochs,))
    candidates = depths(model.module.num_blocks)
    accuracies = np.full((len(candidates), num_folds), np.nan)
    for c, k in enumerate(candidates):
        shared = None
        if not own_statistics(recipe, k):
            # What the frozen blocks make of the images is the same in every fold; nothing is measured on yet.
            shared = prepare(model, train, Split(*(x[:1] for x in train)), recipe, k)
        for f, (fold, rest) in enumerate(zip(folds, rests, strict=True)):
            prepared = None
            if shared is not None:
                task = shared.task
                held_out = {"test_inputs": task.train_inputs[fold], "test_labels": task.train_labels[fold]}
                prepared = shared._replace(task=task._replace(**held_out))
            history = fine_tune_many(
                model,
                train,
                Split(*(x[fold] for x in train)),
                subsets=rest[None],
                keys=jax.random.fold_in(key, f)[None],
                num_classes=num_classes,
                num_unfrozen_blocks=k,
                recipe=recipe,
                prepared=prepared,
            )
            accuracies[c, f] = history["test_accuracy"][0, -1]
    return Choice("cross_validation", _within_one_error(candidates, accuracies), candidates, accuracies)


def _within_one_error(candidates: tuple[int, ...], accuracies: np.ndarray) -> int:
    choice = Choice("cross_validation", 0, candidates, accuracies)
    means = np.nan_to_num(choice.means, nan=-np.inf)
    best = int(np.argmax(means))
    if not np.isfinite(means[best]):
        raise DivergedError(
            "the loss became NaN or infinite for every number of blocks: lower the learning rate"
        )
    least = means[best] - choice.standard_errors[best]
    # The same accuracies in another order of folds must be as good, whatever the rounding of their mean.
    return candidates[int(np.argmax(means >= least - 1e-9))]
