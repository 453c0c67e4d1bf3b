"""The two layers of the residual networks that Flax does not have as PyTorch has them."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from advtransfer import parallel
from advtransfer.arrays import AnyArray
from advtransfer.models.conv import conv2d

# Of the scale of its output channels.
Convolve = Callable[[Float32[Array, " features"] | None], Float[Array, "n h w features"]]

# torchvision's: kaiming_normal_(mode="fan_out").
_conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def _per_channel(vector: Array) -> Array:
    return vector.reshape(1, 1, 1, -1)


@jax.custom_jvp
def _relu_by_result(x):
    return jnp.maximum(x, 0)


# Not result > 0: XLA would turn that into x > 0.
_relu_by_result.defjvps(lambda g, result, x: jax.lax.select(result != 0, g, jnp.zeros_like(g)))


def relu(x: Float[Array, " ..."], train: bool) -> Float[Array, " ..."]:
    """max(x, 0), whose gradient at 0 is 0.

    In evaluation mode the gradient looks at the result, so that nothing else reads x, and a GPU takes bias,
    residual sum and ReLU into the convolution. In training BatchNorm's gradient needs what x is made of.
    """
    return nn.relu(x) if train else _relu_by_result(x)


class Conv(nn.Module):
    """A k×k convolution without bias, padded by (k - 1) / 2 on every side whatever its stride."""

    features: int
    kernel_size: int
    stride: int = 1
    groups: int = 1
    dtype: DTypeLike = jnp.float32
    as_product: bool = False

    @nn.compact
    def __call__(
        self, x: Float[AnyArray, "n h w c"], scale: Float32[Array, " features"] | None = None
    ) -> Float[Array, "n _ _ features"]:
        """Convolves x [N, H, W, C]; `scale` [features] multiplies the output channels."""
        shape = (self.kernel_size, self.kernel_size, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", _conv_init, shape, jnp.float32)
        # A scale is cheapest where there are fewest numbers: in the kernel, or after it. In an exported
        # network, whose batch may be of any size, the kernel is a constant.
        positions = x.shape[0] * (x.shape[1] // self.stride) * (x.shape[2] // self.stride)
        is_any = not isinstance(positions, int)
        fold = scale is not None and (is_any or kernel.size < positions * self.features)
        if fold:
            kernel = kernel * _per_channel(scale)
        y = conv2d(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            stride=self.stride,
            padding=self.kernel_size // 2,
            groups=self.groups,
            as_product=self.as_product,
        )
        return y if scale is None or fold else (y * _per_channel(scale)).astype(self.dtype)


class BatchNorm(nn.Module):
    """Batch normalisation over N, H, W in PyTorch's sense (Ioffe & Szegedy 2015, arXiv:1502.03167).

    It is given the convolution it follows, as a function of the scale of its output channels: in
    evaluation mode the two are one affine map, and the scale goes where it costs least.

    Statistics are taken and kept in float32. The batch is normalised with its biased variance; the
    running average (momentum 0.9) takes the unbiased one, n / (n - 1), which is what PyTorch
    stores. With `axis_name`, mean, variance and n are those of the batch over all devices.
    """

    features: int
    axis_name: str | None = None
    momentum: float = 0.9
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, convolve: Convolve, train: bool) -> Float[Array, "n h w features"]:
        features = (self.features,)
        scale = self.param("scale", nn.initializers.ones, features, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, features, jnp.float32)
        mean = self.variable("batch_stats", "mean", jnp.zeros, features, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, features, jnp.float32)
        if not train:
            scale = scale * jax.lax.rsqrt(var.value + self.epsilon)
            x = convolve(scale)
            # Of x's type, or a GPU would not take the sum into the convolution.
            return x + _per_channel(bias - mean.value * scale).astype(x.dtype)

        x = convolve(None)
        axis_name = None if self.is_initializing() else self.axis_name
        batch_mean, batch_var, count = batch_statistics(x, axis_name)
        if not self.is_initializing():
            unbiased = batch_var * (count / jnp.maximum(count - 1.0, 1.0))
            mean.value += (1.0 - self.momentum) * (batch_mean - mean.value)
            var.value += (1.0 - self.momentum) * (unbiased - var.value)
        scale = scale * jax.lax.rsqrt(batch_var + self.epsilon)
        # The mean's gradient flows through the bias, whose sum over the batch then serves both.
        center = jax.lax.stop_gradient(batch_mean)
        shift = bias + (center - batch_mean) * scale
        x32 = x.astype(jnp.float32) - _per_channel(center)
        return (x32 * _per_channel(scale) + _per_channel(shift)).astype(x.dtype)


def batch_statistics(
    x: Float[AnyArray, "n h w c"], axis_name: str | None
) -> tuple[Float32[Array, " c"], Float32[Array, " c"], Float32[Array, ""]]:
    """Mean [C], biased variance [C] and number of x [N, H, W, C] over all but channels, float32."""
    x = x.astype(jnp.float32)
    count = parallel.total(jnp.float32(x.size // x.shape[-1]), axis_name)
    mean, var = jax.lax.platform_dependent(x, cpu=moments_in_two_passes, default=moments_in_one_pass)
    if axis_name is None:
        return mean, var, count
    overall = parallel.mean(mean, axis_name)
    return overall, parallel.mean(var + jnp.square(mean - overall), axis_name), count


def moments_in_two_passes(
    x: Float32[AnyArray, "n h w c"],
) -> tuple[Float32[Array, " c"], Float32[Array, " c"]]:
    """Mean and biased variance of float32 [N, H, W, C]."""
    mean = jnp.mean(x, (0, 1, 2))
    return mean, jnp.mean(jnp.square(x - _per_channel(mean)), (0, 1, 2))


def moments_in_one_pass(x: Float32[AnyArray, "n h w c"]) -> tuple[Float32[Array, " c"], Float32[Array, " c"]]:
    """The same, reading x once: memory is what limits an accelerator here.

    Both moments are taken around a value of x, so that a mean far from 0 costs no digits (Chan et al., 1983,
    "Algorithms for computing the sample variance", shifted data).
    """
    center = jax.lax.stop_gradient(x[0, 0, 0])
    x = x - _per_channel(center)
    first, second = jnp.mean(x, (0, 1, 2)), jnp.mean(jnp.square(x), (0, 1, 2))
    return center + first, jnp.maximum(second - jnp.square(first), 0.0)
