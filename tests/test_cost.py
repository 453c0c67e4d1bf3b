"""What fine-tuning costs, against published counts and a count by hand."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from advtransfer.data import Augmentation
from advtransfer.models import block_flops, create_module, flops_per_weight, init_variables
from advtransfer.models.cost import layers
from advtransfer.transfer import Recipe, fine_tune_flops


@pytest.mark.parametrize(
    ("architecture", "published"),  # 10⁹ products and sums for an image of 224², by torchvision's tables
    [
        ("resnet18", 1.81),
        ("resnet50", 4.09),
        ("resnet152", 11.51),
        ("wide_resnet50_2", 11.40),
        ("resnext50_32x4d", 4.23),
    ],
)
def test_the_forward_pass_is_the_published_count(architecture, published):
    flops = block_flops(create_module(architecture, num_classes=1000), 224)
    assert sum(flops) / 2e9 == pytest.approx(published, abs=0.006)


def test_a_small_network_by_hand():
    """One block of width 4 on 8²: the stem, two 3×3 convolutions, a head of 3 classes."""
    module = create_module("resnet_tiny", num_classes=3).clone(width=4, stage_sizes=(1,))
    stem, block, head = 2 * 64 * 27 * 4, 2 * 2 * 64 * 36 * 4, 2 * 4 * 3
    assert block_flops(module, 8) == (stem, block, head)

    recipe = Recipe(num_epochs=5, evaluate_epochs=(1, 5))
    options = {"num_train": 10, "num_test": 100}
    steps, measured = 5 * 10, 2 * 110
    for k, own, frozen in ((0, head, stem + block), (1, block + head, stem), (-1, stem + block + head, 0)):
        cached = fine_tune_flops(module, 8, recipe, num_unfrozen_blocks=k, **options)
        assert cached == steps * 3 * own + measured * own
        moving = replace(recipe, augmentation=Augmentation(flip=True))
        recomputed = fine_tune_flops(module, 8, moving, num_unfrozen_blocks=k, **options)
        assert recomputed == steps * (3 * own + frozen) + measured * (own + frozen)


def test_a_network_that_jax_has_traced_before_is_counted():
    module = create_module("resnet_tiny", num_classes=7)
    variables = jax.eval_shape(lambda: init_variables(module, jax.random.key(0), 8))
    jax.eval_shape(module.apply, variables, jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32))
    assert layers(module, 8)[-1] == ("fc", (1, 7), (128, 7))
    weights = sum(math.prod(layer.kernel) for layer in layers(module, 8))
    assert flops_per_weight(module, 8) == sum(block_flops(module, 8)) / weights
