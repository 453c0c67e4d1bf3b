"""Transfer: a new head, frozen blocks, the constant prefix computed once, fine-tuning of one or many."""

from advtransfer.transfer.fine_tune import fine_tune, fine_tune_many
from advtransfer.transfer.freezing import (
    activation_shape,
    activations,
    first_unfrozen_block,
    frozen_mask,
    prefix_is_constant,
    target_batch_stats,
)
from advtransfer.transfer.head import HEAD_INITS, reset_head
from advtransfer.transfer.recipe import Recipe

__all__ = [
    "HEAD_INITS",
    "Recipe",
    "activation_shape",
    "activations",
    "fine_tune",
    "fine_tune_many",
    "first_unfrozen_block",
    "frozen_mask",
    "prefix_is_constant",
    "reset_head",
    "target_batch_stats",
]
