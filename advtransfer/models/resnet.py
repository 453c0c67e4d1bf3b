"""The ResNet family: pixels in, logits out, addressable by residual block.

The networks are torchvision's (He et al. 2016, arXiv:1512.03385, in the "v1.5" form whose
bottlenecks stride on the 3×3; Zagoruyko & Komodakis 2016, arXiv:1605.07146; Xie et al. 2017,
arXiv:1611.05431) and their parameter paths mirror torchvision's names, so a checkpoint of one is a
checkpoint of the other: `layer4.2.conv3.weight` is `layer4_2/conv3/kernel`.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import partial
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from advtransfer.arrays import AnyArray, Variables
from advtransfer.models.conv import max_pool
from advtransfer.models.layers import BatchNorm, Conv, relu

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# PyTorch's default for a Linear: uniform in ±1/sqrt(fan_in), kernel and bias alike.
_head_init = nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")


class ResidualBlock(nn.Module):
    """One residual block: two 3×3 convolutions, or (`bottleneck`) 1×1, 3×3, 1×1.

    `planes` is torchvision's name for the stage's width before the bottleneck's fourfold expansion.
    """

    planes: int
    stride: int
    bottleneck: bool
    groups: int
    base_width: int
    dtype: DTypeLike
    axis_name: str | None
    momentum: float
    as_products: bool

    @nn.compact
    def __call__(
        self, x: Float[AnyArray, "n h w c"], train: bool, fake_relu: bool = False
    ) -> Float[Array, "n _ _ features"]:
        def conv_bn(x, name, features, kernel_size, **options):
            options |= {"dtype": self.dtype, "as_product": self.as_products}
            conv = Conv(features, kernel_size, name=name.format("conv"), **options)
            norm = BatchNorm(features, self.axis_name, self.momentum, name=name.format("bn"))
            return norm(partial(conv, x), train)

        if self.bottleneck:
            width = self.planes * self.base_width // 64 * self.groups
            features = 4 * self.planes
            y = relu(conv_bn(x, "{}1", width, 1), train)
            y = relu(conv_bn(y, "{}2", width, 3, stride=self.stride, groups=self.groups), train)
            y = conv_bn(y, "{}3", features, 1)
        else:
            features = self.planes
            y = relu(conv_bn(x, "{}1", features, 3, stride=self.stride), train)
            y = conv_bn(y, "{}2", features, 3)
        if self.stride != 1 or x.shape[-1] != features:
            x = conv_bn(x, "downsample_{}", features, 1, stride=self.stride)
        x = x + y
        # Forward the same bits: what is added is 0, or cancels x.
        return x + jax.lax.stop_gradient(nn.relu(x) - x) if fake_relu else relu(x, train)


class ResNet(nn.Module):
    """A residual network; see `create_module` for the named ones."""

    stage_sizes: tuple[int, ...]
    bottleneck: bool
    num_classes: int
    cifar_stem: bool = False
    width: int = 64
    groups: int = 1
    base_width: int = 64
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    dtype: DTypeLike = jnp.float32
    axis_name: str | None = None
    momentum: float = 0.9  # of the running statistics; 0: those of the last batch
    as_products: bool = False  # the blocks' convolutions as matrix products, for `vmap` over kernels

    @property
    def num_blocks(self) -> int:
        """B, the number of residual blocks."""
        return sum(self.stage_sizes)

    @property
    def num_features(self) -> int:
        """C, the size of the pooled representation that the head reads."""
        expansion = 4 if self.bottleneck else 1
        return self.width * 2 ** (len(self.stage_sizes) - 1) * expansion

    @property
    def block_names(self) -> tuple[str, ...]:
        """The blocks' parameter paths in order: "layer1_0", ..., "layer4_2"."""
        return tuple(
            f"layer{stage}_{i}" for stage, size in enumerate(self.stage_sizes, start=1) for i in range(size)
        )

    @nn.compact
    def __call__(
        self,
        x: Float[AnyArray, "n ... c"],
        *,
        train: bool = False,
        start: int | None = None,
        stop: int | None = None,
        fake_relu: bool = False,
    ) -> Float[AnyArray, "n ... _"]:
        """Runs the network, or the part of it between two boundaries.

        Boundary b < B is the activation that enters block b, [N, h, w, c] in the compute type; boundary B is
        the pooled representation, float32 [N, C]. `apply(v, apply(v, x, stop=b), start=b)` is
        `apply(v, x)`.

        Args:
            x: images [N, H, W, 3] in [0, 1] if `start` is None, otherwise the activation at boundary `start`.
            train: normalise with the batch's statistics and update the running ones (pass
                `mutable=["batch_stats"]`; the whole collection comes back, with the entries of
                blocks that did not run as they were).
            start: the boundary to start from. None: the images.
            stop: the boundary to stop at. None: the logits.
            fake_relu: let gradients through the ReLU at the end of the last block that runs as if it were
                the identity; the outputs stay the same (Engstrom et al. 2019, arXiv:1906.00945).

        Returns:
            float32 logits [N, num_classes], or the activation at boundary `stop`.

        Raises:
            ValueError: a boundary outside 0 ... B, or `start` after `stop`.
        """
        num_blocks = self.num_blocks
        first = -1 if start is None else start
        last = num_blocks + 1 if stop is None else stop
        if start is not None and not 0 <= start <= num_blocks:
            raise ValueError(f"start is {start}; this network has the boundaries 0 to {num_blocks}")
        if stop is not None and not 0 <= stop <= num_blocks:
            raise ValueError(f"stop is {stop}; this network has the boundaries 0 to {num_blocks}")
        if start is None and not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"images are {x.dtype}: pass floats in [0, 1], such as images / 255")
        if first > last:
            raise ValueError(f"start is {start}, after stop, which is {stop}")
        if start is None:
            chex.assert_shape(x, (None, None, None, len(self.mean)))
        chex.assert_rank(x, 2 if start == num_blocks else 4)

        if first < 0:
            x = self._stem(x, train)
        last_block = min(last, num_blocks) - 1
        for index, (stage, i) in enumerate(
            (stage, i) for stage, size in enumerate(self.stage_sizes) for i in range(size)
        ):
            if first <= index < last:
                x = ResidualBlock(
                    planes=self.width * 2**stage,
                    stride=2 if stage > 0 and i == 0 else 1,
                    bottleneck=self.bottleneck,
                    groups=self.groups,
                    base_width=self.base_width,
                    dtype=self.dtype,
                    axis_name=self.axis_name,
                    momentum=self.momentum,
                    as_products=self.as_products,
                    name=f"layer{stage + 1}_{i}",
                )(x, train, fake_relu and index == last_block)
        if first < num_blocks <= last:
            x = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
        if last > num_blocks:
            x = self._head(x)
        return x

    def _stem(self, images: AnyArray, train: bool) -> Array:
        mean, std = (np.asarray(v, np.float32).reshape(1, 1, 1, -1) for v in (self.mean, self.std))
        x = (images.astype(jnp.float32) - mean) / std
        kernel_size, stride = (3, 1) if self.cifar_stem else (7, 2)
        conv = Conv(self.width, kernel_size, stride, dtype=self.dtype, name="conv1")
        norm = BatchNorm(self.width, self.axis_name, self.momentum, name="bn1")
        x = relu(norm(partial(conv, x), train), train)
        return x if self.cifar_stem else max_pool(x)

    def _head(self, features: AnyArray) -> Array:
        bound = features.shape[-1] ** -0.5
        return nn.Dense(
            self.num_classes,
            kernel_init=_head_init,
            bias_init=lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound),
            name="fc",
        )(features.astype(jnp.float32))


def _family(cifar_stem: bool) -> dict[str, dict[str, Any]]:
    basic = {"bottleneck": False, "cifar_stem": cifar_stem}
    bottleneck = {"bottleneck": True, "cifar_stem": cifar_stem}
    networks = {
        "resnet18": {"stage_sizes": (2, 2, 2, 2), **basic},
        "resnet34": {"stage_sizes": (3, 4, 6, 3), **basic},
        "resnet50": {"stage_sizes": (3, 4, 6, 3), **bottleneck},
        "resnet101": {"stage_sizes": (3, 4, 23, 3), **bottleneck},
        "resnet152": {"stage_sizes": (3, 8, 36, 3), **bottleneck},
        "wide_resnet50_2": {"stage_sizes": (3, 4, 6, 3), "base_width": 128, **bottleneck},
        "wide_resnet50_4": {"stage_sizes": (3, 4, 6, 3), "base_width": 256, **bottleneck},
        "wide_resnet101_2": {"stage_sizes": (3, 4, 23, 3), "base_width": 128, **bottleneck},
        "resnext50_32x4d": {
            "stage_sizes": (3, 4, 6, 3),
            "base_width": 4,
            "groups": 32,
            **bottleneck,
        },
    }
    return {name + ("_cifar" if cifar_stem else ""): spec for name, spec in networks.items()}


#: Name -> the fields of `ResNet` that make it. A `_cifar` network has a 3×3 stem of stride 1 and no
#: max-pool, for images of some 16 to 64 pixels.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    **_family(cifar_stem=False),
    **_family(cifar_stem=True),
    "resnet_tiny": {
        "stage_sizes": (1, 1, 1, 1),
        "bottleneck": False,
        "cifar_stem": True,
        "width": 16,
    },
}


def create_module(
    architecture: str,
    *,
    num_classes: int = 1000,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    dtype: DTypeLike = jnp.float32,
    axis_name: str | None = None,
) -> ResNet:
    """Makes a network of the family, without weights.

    Args:
        architecture: a key of `ARCHITECTURES`.
        num_classes: size of the logits.
        mean: per channel, subtracted from the [0, 1] images inside the network.
        std: per channel, what the difference is divided by.
        dtype: the type that the blocks compute in. Parameters, statistics, pooled features and
            logits are float32 whatever it is.
        axis_name: device axis over which BatchNorm's batch statistics are averaged in training.
            None: every device normalises with its own.

    Returns:
        A Flax module: `module.apply(variables, images) -> logits`; see `ResNet.__call__`.

    Raises:
        ValueError: an unknown architecture (the nearest names are in the message).
    """
    if architecture not in ARCHITECTURES:
        near = difflib.get_close_matches(architecture, ARCHITECTURES, n=3, cutoff=0.4)
        raise ValueError(
            f"unknown architecture {architecture!r}; nearest: {', '.join(near or ARCHITECTURES)}"
        )
    return ResNet(
        **ARCHITECTURES[architecture],
        num_classes=num_classes,
        mean=tuple(float(v) for v in mean),
        std=tuple(float(v) for v in std),
        dtype=dtype,
        axis_name=axis_name,
    )


@partial(jax.jit, static_argnums=(0, 2))
def init_variables(module: ResNet, key: PRNGKeyArray, image_size: int = 32) -> Variables:
    """Draws fresh variables, {"params": ..., "batch_stats": ...}, all float32.

    The distributions are `module.init`'s. All convolutions share one draw, because every random
    generator in a program takes XLA some 0.2 s to compile, and Flax asks for one per kernel.

    Args:
        module: the network.
        key: PRNG key.
        image_size: height and width of the images traced through the network; the variables' shapes
            and values do not depend on it.
    """
    images = jax.ShapeDtypeStruct((1, image_size, image_size, len(module.mean)), jnp.float32)
    variables = module.lazy_init(key, images)
    sizes = [leaf.size for leaf in jax.tree.leaves(variables) if leaf.ndim == 4]
    # Behind a barrier, or XLA would repeat the generator inside every kernel that reads from it.
    draws = jax.lax.optimization_barrier(jax.random.normal(key, (sum(sizes),), jnp.float32))
    parts = iter(jnp.split(draws, np.cumsum(sizes)[:-1]))

    def redraw(leaf: Array) -> Array:
        if leaf.ndim != 4:
            return leaf
        fan_out = leaf.shape[0] * leaf.shape[1] * leaf.shape[3]
        return next(parts).reshape(leaf.shape) * np.float32(np.sqrt(2.0 / fan_out))

    return jax.tree.map(redraw, variables)
