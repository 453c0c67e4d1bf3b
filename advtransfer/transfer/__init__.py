"""Transfer: a new head, frozen blocks, the constant prefix computed once, fine-tuning of one or many."""

from advtransfer.transfer.activation_cache import Prepared, cache_bytes, own_statistics, prepare
from advtransfer.transfer.choose_k import (
    METHODS,
    RULE,
    Choice,
    choose_k,
    depths,
    possible_folds,
    rule_of_thumb,
)
from advtransfer.transfer.cost import fine_tune_flops, prefix_flops
from advtransfer.transfer.freezing import (
    activation_shape,
    activations,
    first_unfrozen_block,
    frozen_mask,
    prefix_is_constant,
    target_batch_stats,
)
from advtransfer.transfer.head import HEAD_INITS, reset_head
from advtransfer.transfer.input_norm import normalised_by
from advtransfer.transfer.one_model import FineTuned, fine_tune, make_page, tune
from advtransfer.transfer.program import Rates
from advtransfer.transfer.recipe import Recipe, resolve_recipe, without_rates
from advtransfer.transfer.tuning import fine_tune_many, fine_tune_one, num_streams

__all__ = [
    "HEAD_INITS",
    "METHODS",
    "RULE",
    "Choice",
    "FineTuned",
    "Prepared",
    "Rates",
    "Recipe",
    "activation_shape",
    "activations",
    "cache_bytes",
    "choose_k",
    "depths",
    "fine_tune",
    "fine_tune_flops",
    "fine_tune_many",
    "fine_tune_one",
    "first_unfrozen_block",
    "frozen_mask",
    "make_page",
    "normalised_by",
    "num_streams",
    "own_statistics",
    "possible_folds",
    "prefix_flops",
    "prefix_is_constant",
    "prepare",
    "reset_head",
    "resolve_recipe",
    "rule_of_thumb",
    "target_batch_stats",
    "tune",
    "without_rates",
]
