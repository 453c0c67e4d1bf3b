"""How convolutions and max-pools are lowered: as XLA does it, or in another form that measured better.

XLA:CPU runs a matrix product at the machine's peak, its convolutions at anything between that and a
fiftieth of it: 1×1 kernels at a half, small maps at a few percent, and results of fewer than 128
channels on one core. So on CPU some convolutions are written as matrix products, each direction
(value, gradient to the input, gradient to the kernel) as suits it; `lax.platform_dependent` leaves
no trace of them on other platforms. On accelerators the stem runs on blocks of pixels, and on a GPU the
max-pool's gradient gathers instead of scattering. benchmarks/RESULTS.md has the figures.

Gradients that stay convolutions are written in the plain form, NHWC by HWIO to NHWC. XLA:CPU brings
other forms into it only outside of loops; inside (a PGD attack, a scan over training steps) it runs
them 20 to 200 times slower (https://github.com/jax-ml/jax/issues/12868).

The gradients are `jax.custom_vjp`: grad, grad of grad and forward over reverse work, `jax.jvp` alone
does not.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from advtransfer.arrays import AnyArray

_CACHE = 4 << 20  # bytes of the operands of a product that are made for it


def conv2d(
    x: Float[AnyArray, "n h w c"],
    kernel: Float[AnyArray, "k k _ o"],
    *,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    as_product: bool = False,
) -> Float[Array, "n _ _ o"]:
    """`lax.conv_general_dilated` for square kernels, NHWC.

    Args:
        x: [N, H, W, C].
        kernel: [k, k, C / groups, O], of x's type.
        stride: of both axes.
        padding: zeros on each of the four sides; (k - 1) / 2 for odd k keeps H and W at stride 1.
        groups: of channels; grouped convolutions are XLA's own everywhere.
        as_product: write it as a matrix product, which `vmap` over kernels turns into a batched one. A
            convolution it turns into a grouped one, which is slow on a GPU.

    Returns:
        [N, (H + 2 padding - k) / stride + 1, ..., O], of x's type.
    """
    if groups > 1:
        return _native(x, kernel, stride, padding, groups)
    if as_product:
        # Without the barrier XLA:GPU can take slices of stride 2 into the product, and on some a check of its
        # own fails (JAX 0.11.2, triton_tiling_propagation.cc).
        taps = lax.optimization_barrier(_taps(x, kernel.shape[0], stride, padding))
        return _product(taps, kernel.reshape(-1, kernel.shape[3]))
    return _conv2d(x, kernel, stride, padding)


def _native(x, kernel, stride, padding, groups=1):
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((padding, padding), (padding, padding)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _value(x, kernel, stride, padding):
    def cpu(x, kernel):
        return _cpu_value(x, kernel, stride, padding)

    def default(x, kernel):
        return _accelerator_value(x, kernel, stride, padding)

    return lax.platform_dependent(x, kernel, cpu=cpu, default=default)


def _accelerator_value(x, kernel, stride, padding):
    even = x.shape[1] % 2 == 0 and x.shape[2] % 2 == 0
    if stride == 2 and even and x.shape[3] <= 4 and kernel.shape[0] == 2 * padding + 1 > 1:
        return _on_blocks(x, kernel, padding)
    return _native(x, kernel, stride, padding)


_conv2d = jax.custom_vjp(_value, nondiff_argnums=(2, 3))


def _conv2d_forward(x, kernel, stride, padding):
    return _value(x, kernel, stride, padding), (x, kernel)


def _conv2d_backward(stride, padding, operands, g):
    def accelerator(argument):
        def gradient(x, kernel, g):
            convolve = partial(_accelerator_value, stride=stride, padding=padding)
            return jax.vjp(convolve, x, kernel)[1](g)[argument]

        return gradient

    def cpu(gradient):
        return lambda x, kernel, g: gradient(x, kernel, g, stride, padding)

    return (
        lax.platform_dependent(*operands, g, cpu=cpu(_cpu_input_gradient), default=accelerator(0)),
        lax.platform_dependent(*operands, g, cpu=cpu(_cpu_kernel_gradient), default=accelerator(1)),
    )


_conv2d.defvjp(_conv2d_forward, _conv2d_backward)


def _on_blocks(x, kernel, padding):
    """A convolution of stride 2 as one of stride 1 over blocks of 2×2 pixels, with four times the channels.

    For the stem: tensor cores take channels by the eight, and images have three.
    """
    n, h, w, c = x.shape
    size = kernel.shape[0]
    low = padding % 2  # so that a block begins where a window does
    x = jnp.pad(x, ((0, 0), (low, low), (low, low), (0, 0)))
    x = x.reshape(n, h // 2 + low, 2, w // 2 + low, 2, c).transpose(0, 1, 3, 2, 4, 5)
    kernel = jnp.pad(kernel, ((0, 1), (0, 1), (0, 0), (0, 0)))
    kernel = kernel.reshape(size // 2 + 1, 2, size // 2 + 1, 2, c, -1).transpose(0, 2, 1, 3, 4, 5)
    return _native(
        x.reshape(n, h // 2 + low, w // 2 + low, 4 * c),
        kernel.reshape(size // 2 + 1, size // 2 + 1, 4 * c, -1),
        1,
        padding // 2,
    )


def _cpu_value(x, kernel, stride, padding):
    size, _, _, channels = kernel.shape
    if size == 1 and padding == 0:
        return _product(x[:, ::stride, ::stride], kernel[0, 0])
    if _is_tiny(x, kernel, padding):
        matrix = _tiny_matrix(kernel, x.shape[1:3], stride)
        y = _product(x.reshape(x.shape[0], -1), matrix.reshape(-1, matrix[0, 0, 0].size))
        return y.reshape(x.shape[0], *matrix.shape[3:])
    if _is_small(x, kernel, stride):
        return _product(_taps(x, size, stride, padding), kernel.reshape(-1, channels))
    return _native(x, kernel, stride, padding)


def _cpu_input_gradient(x, kernel, g, stride, padding):
    size = kernel.shape[0]
    small = size == 1 or _is_tiny(x, kernel, padding) or _is_small(x, kernel, stride)
    even = x.shape[1] % 2 == 0 and x.shape[2] % 2 == 0
    if not small and stride == 2 and even and size == 2 * padding + 1:
        return _input_gradient_by_phases(x, kernel, g, padding)
    if not small and stride == 1 and size == 2 * padding + 1:
        return _native(g, jnp.flip(kernel, (0, 1)).swapaxes(2, 3), 1, padding)
    convolve = _cpu_value if small else _native
    return jax.vjp(lambda x: convolve(x, kernel, stride, padding), x)[1](g)[0]


def _cpu_kernel_gradient(x, kernel, g, stride, padding):
    size = kernel.shape[0]
    if size == 1 and padding == 0:
        return _outer(x[:, ::stride, ::stride], g).reshape(kernel.shape)
    if _is_tiny(x, kernel, padding):
        matrix, vjp = jax.vjp(lambda k: _tiny_matrix(k, x.shape[1:3], stride), kernel)
        x, g = (a.reshape(a.shape[0], -1) for a in (x, g))
        return vjp(_outer(x, g).reshape(matrix.shape))[0]
    if _is_small(x, kernel, stride):
        return _outer(_taps(x, size, stride, padding), g).reshape(kernel.shape)
    if x.shape[3] >= 32 and min(g.shape[1:3]) >= 14:
        return _kernel_gradient_by_rows(x, kernel, g, stride, padding)
    return _kernel_gradient_as_convolution(x, kernel, g, stride, padding)


def _product(x, matrix):
    """x [..., K] times matrix [K, O]."""
    return lax.dot_general(x, matrix, (((x.ndim - 1,), (0,)), ((), ())))


def _outer(x, g):
    """x [..., K] and g [..., O] summed over the leading axes to [K, O].

    XLA transposes one operand, and repeats in that copy all the sums and ReLUs that it came from. In
    this form, of two axes, it takes the narrower one: a training step of ResNet-50 is a third faster.
    """
    x, g = (a.reshape(-1, a.shape[-1]) for a in (x, g))
    return lax.dot_general(g, x, (((0,), (0,)), ((), ()))).T


def _is_small(x, kernel, stride):
    """Whether a 3×3 convolution is faster as `_taps` times a matrix."""
    return kernel.shape[0] == 3 and -(-max(x.shape[1:3]) // stride) <= (7 if stride == 1 else 14)


def _taps(x, size, stride, padding):
    """The `size`² shifted copies of x that a kernel meets, side by side: [N, H', W', size² C]."""
    rows, columns = ((n + 2 * padding - size) // stride for n in x.shape[1:3])
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    return jnp.concatenate(
        [
            x[:, i : i + rows * stride + 1 : stride, j : j + columns * stride + 1 : stride]
            for i in range(size)
            for j in range(size)
        ],
        axis=-1,
    )


def _is_tiny(x, kernel, padding):
    """Whether every pixel of x is under the 3×3 kernel wherever that stands: maps of 1² and 2²."""
    return kernel.shape[0] == 3 and padding == 1 and max(x.shape[1:3]) <= 2


def _tiny_matrix(kernel, image_shape, stride):
    """The dense layer that a convolution is on a tiny map: [H, W, C, H', W', O]."""
    (h, w), rows = image_shape, []
    for i in range(0, h, stride):
        columns = [kernel[1 - i : 1 - i + h, 1 - j : 1 - j + w] for j in range(0, w, stride)]
        rows.append(jnp.stack(columns, axis=3))
    return jnp.stack(rows, axis=3)


def _input_gradient_by_phases(x, kernel, g, padding):
    """The input gradient at stride 2, as one convolution at stride 1 with four times the channels.

    Pixels of equal parity r in each axis meet the same taps: dx[2a + r] = Σ_t g[a + t] kernel[r +
    padding - 2t], and one kernel [T, T, O, (2, 2, C)], T = padding + 1, makes the four phases at once.
    """
    n, h, w, c = x.shape
    taps, first = padding + 1, -(padding // 2)
    last = first + padding
    # The taps u = r + padding - 2t run over 2T values; those outside the kernel are zeros.
    low = 2 * last - padding
    edge = (low, 2 * taps - low - kernel.shape[0])
    k = jnp.pad(kernel, (edge, edge, (0, 0), (0, 0)))
    k = jnp.flip(k.reshape(taps, 2, taps, 2, c, -1), (0, 2)).transpose(0, 2, 5, 1, 3, 4)
    phases = lax.conv_general_dilated(
        g,
        k.reshape(taps, taps, -1, 4 * c),
        window_strides=(1, 1),
        padding=((-first, last), (-first, last)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    phases = phases.reshape(n, h // 2, w // 2, 2, 2, c)
    return phases.transpose(0, 1, 3, 2, 4, 5).reshape(x.shape)


def _kernel_gradient_by_rows(x, kernel, g, stride, padding):
    """The kernel gradient as matrix products, one for each row of the kernel.

    A few images at a time, so that the copies of x, shifted along W and side by side, stay in the cache. The
    smaller operand comes first, and the results are transposed once, at the end.
    """
    (n, h, w, out), size, channels = g.shape, kernel.shape[0], x.shape[3]
    image_bytes = g.dtype.itemsize * w * (size * channels * (x.shape[1] + 2 * padding) + h * out)
    number = max(m for m in range(1, n + 1) if n % m == 0 and (m == 1 or m * image_bytes <= _CACHE))

    def add(total, images):
        x, g = images
        x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
        x = jnp.concatenate([x[:, :, j : j + stride * (w - 1) + 1 : stride] for j in range(size)], axis=-1)
        rows = [x[:, i : i + stride * (h - 1) + 1 : stride] for i in range(size)]
        axes = (((0, 1, 2), (0, 1, 2)), ((), ()))
        products = [lax.dot_general(g, row, axes, preferred_element_type=jnp.float32) for row in rows]
        return total + jnp.stack(products), None

    parts = [a.reshape(n // number, number, *a.shape[1:]) for a in (x, g)]
    total, _ = lax.scan(add, jnp.zeros((size, out, size * channels), jnp.float32), tuple(parts))
    return total.reshape(size, out, size, channels).transpose(0, 2, 3, 1).astype(kernel.dtype)


def _kernel_gradient_as_convolution(x, kernel, g, stride, padding):
    """The kernel gradient, channels as batch: x [C, H, W, N] convolved with g [H', W', N, O]."""
    size = kernel.shape[0]
    # What the forward pass leaves over on the far side when the stride does not divide is cut off.
    far = [size + stride * (out - 1) - n - padding for n, out in zip(x.shape[1:3], g.shape[1:3], strict=True)]
    gradient = lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0),
        g.transpose(1, 2, 0, 3),
        window_strides=(1, 1),
        padding=tuple((padding, edge) for edge in far),
        rhs_dilation=(stride, stride),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return gradient.transpose(1, 2, 0, 3)


def _max_pool_value(x):
    return lax.platform_dependent(x, cpu=lambda x: _winners(x)[0], default=_native_max_pool)


@jax.custom_vjp
def max_pool(x: Float[Array, "n h w c"]) -> Float[Array, "n _ _ c"]:
    """Maximum over 3×3 windows, stride 2, one pixel of padding: [N, H, W, C] to half of H and W.

    Of equal values the first of the window in row order takes the gradient, as in PyTorch.
    """
    return _max_pool_value(x)


def _native_max_pool(x):
    return lax.reduce_window(
        x,
        -jnp.inf,
        lax.max,
        window_dimensions=(1, 3, 3, 1),
        window_strides=(1, 2, 2, 1),
        padding=((0, 0), (1, 1), (1, 1), (0, 0)),
    )


def _winners(x):
    """The maxima and, int8, which of the nine taps of its window each one is."""
    rows, columns = ((n - 1) // 2 for n in x.shape[1:3])
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    best = x[:, : rows * 2 + 1 : 2, : columns * 2 + 1 : 2]
    winner = jnp.zeros(best.shape, jnp.int8)
    for tap in range(1, 9):
        i, j = divmod(tap, 3)
        value = x[:, i : i + rows * 2 + 1 : 2, j : j + columns * 2 + 1 : 2]
        winner = jnp.where(value > best, jnp.int8(tap), winner)
        best = jnp.maximum(best, value)
    return best, winner


def _max_pool_gradient(x, g):
    """Gathers by parity of the pixel; XLA's select-and-scatter takes nine times as long on a CPU."""
    n, h, w, c = x.shape
    rows, columns = g.shape[1:3]
    edge = ((0, 0), (0, 1), (0, 1), (0, 0))
    winner = jnp.pad(_winners(x)[1], edge, constant_values=-1)
    g = jnp.pad(g, edge)

    def windows(parity):
        """Offset and row of the tap of the windows that hold a pixel of this parity."""
        return [(0, 1)] if parity == 0 else [(0, 2), (1, 0)]

    def phase(row_parity, column_parity):
        total = jnp.zeros((n, rows, columns, c), g.dtype)
        for a, i in windows(row_parity):
            for b, j in windows(column_parity):
                there = (slice(None), slice(a, a + rows), slice(b, b + columns))
                total += jnp.where(winner[there] == 3 * i + j, g[there], 0)
        return total

    phases = [jnp.stack([phase(i, j) for j in (0, 1)], axis=3) for i in (0, 1)]
    return jnp.stack(phases, axis=2).reshape(n, 2 * rows, 2 * columns, c)[:, :h, :w]


def _max_pool_backward(x, g):
    def tpu(x, g):
        return jax.vjp(_native_max_pool, x)[1](g)[0]

    return (lax.platform_dependent(x, g, tpu=tpu, default=_max_pool_gradient),)


max_pool.defvjp(lambda x: (_max_pool_value(x), x), _max_pool_backward)
