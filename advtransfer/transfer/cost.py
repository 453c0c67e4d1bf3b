"""What fine-tuning costs, counted in floating-point operations before anything runs."""

from __future__ import annotations

from advtransfer.models import ResNet, block_flops
from advtransfer.transfer.freezing import first_unfrozen_block, prefix_is_constant
from advtransfer.transfer.recipe import Recipe, resolve_recipe


def prefix_flops(module: ResNet, image_size: int, num_unfrozen_blocks: int) -> float:
    """Those of `block_flops` below the first trained block; 0 where everything is trained."""
    start = first_unfrozen_block(module, num_unfrozen_blocks)
    return 0.0 if start is None else sum(block_flops(module, image_size)[: start + 1])


def fine_tune_flops(
    module: ResNet,
    image_size: int,
    recipe: Recipe,
    *,
    num_unfrozen_blocks: int,
    num_train: int,
    num_test: int,
) -> float:
    """Floating-point operations of one fine-tuning, with its evaluations and without the making of a cache.

    A step takes three forward passes of what is trained, and one of what lies below unless that is cached; a
    head in dual form takes fewer.
    """
    recipe = resolve_recipe(recipe, num_train)
    frozen = prefix_flops(module, image_size, num_unfrozen_blocks)
    trained = sum(block_flops(module, image_size)) - frozen
    if prefix_is_constant(num_unfrozen_blocks, recipe):
        frozen = 0.0
    num_steps = recipe.num_epochs * num_train
    num_measured = len(recipe.evaluate_epochs) * (num_train + num_test)
    return num_steps * (frozen + 3 * trained) + num_measured * (frozen + trained)
