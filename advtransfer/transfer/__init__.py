"""Transfer: a new head, frozen blocks, the constant prefix computed once, fine-tuning of one or many."""

from advtransfer.transfer.cost import block_flops, fine_tune_flops
from advtransfer.transfer.fine_tune import Prepared, fine_tune, fine_tune_many, own_statistics, prepare
from advtransfer.transfer.freezing import (
    activation_shape,
    activations,
    first_unfrozen_block,
    frozen_mask,
    prefix_is_constant,
    target_batch_stats,
)
from advtransfer.transfer.head import HEAD_INITS, reset_head
from advtransfer.transfer.program import Rates
from advtransfer.transfer.recipe import Recipe, check_recipe

__all__ = [
    "HEAD_INITS",
    "Prepared",
    "Rates",
    "Recipe",
    "activation_shape",
    "activations",
    "block_flops",
    "check_recipe",
    "fine_tune",
    "fine_tune_flops",
    "fine_tune_many",
    "first_unfrozen_block",
    "frozen_mask",
    "own_statistics",
    "prefix_is_constant",
    "prepare",
    "reset_head",
    "target_batch_stats",
]
