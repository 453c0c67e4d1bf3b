"""How convolutions and max-pools are lowered: XLA's own kernels, except on CPU where others win."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax


def conv2d(
    x: jax.Array, kernel: jax.Array, *, stride: int = 1, padding: int = 0, groups: int = 1
) -> jax.Array:
    if groups > 1:
        return _xla(x, kernel, stride, padding, groups)
    return _conv2d(x, kernel, stride, padding)


def _xla(x, kernel, stride, padding, groups=1):
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=[(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv2d(x, kernel, stride, padding):
    return lax.platform_dependent(
        x,
        kernel,
        cpu=partial(_cpu_forward, stride=stride, padding=padding),
        default=partial(_xla, stride=stride, padding=padding),
    )


def _conv2d_fwd(x, kernel, stride, padding):
    return _conv2d(x, kernel, stride, padding), (x, kernel)


def _conv2d_bwd(stride, padding, residuals, g):
    def xla(x, kernel, g):
        return jax.vjp(partial(_xla, stride=stride, padding=padding), x, kernel)[1](g)

    def cpu(x, kernel, g):
        return (
            _cpu_input_grad(x, kernel, g, stride, padding),
            _cpu_kernel_grad(x, kernel, g, stride, padding),
        )

    return lax.platform_dependent(*residuals, g, cpu=cpu, default=xla)


_conv2d.defvjp(_conv2d_fwd, _conv2d_bwd)


def _matmul(x, kernel):
    return lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def _matmul_t(g, kernel):
    return lax.dot_general(g, kernel, (((g.ndim - 1,), (1,)), ((), ())))


def _outer(x, g):
    x, g = (a.reshape(-1, a.shape[-1]) for a in (x, g))
    return lax.dot_general(x, g, (((0,), (0,)), ((), ())))


def _taps(x, size, stride, padding):
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


def _dense_kernel(kernel, size, stride):
    """3x3 on <=2x2 map"""
    out = (size + stride - 1) // stride
    return jnp.stack(
        [
            jnp.stack(
                [
                    kernel[1 - i * stride : 1 - i * stride + size, 1 - j * stride : 1 - j * stride + size]
                    for j in range(out)
                ],
                axis=3,
            )
            for i in range(out)
        ],
        axis=3,
    )


def _dense(x, kernel, stride):
    n, h, _, c = x.shape
    m = _dense_kernel(kernel, h, stride)
    out, o = m.shape[3], m.shape[5]
    return _matmul(x.reshape(n, -1), m.reshape(h * h * c, -1)).reshape(n, out, out, o)


def _is_dense(x, kernel):
    return kernel.shape[:2] == (3, 3) and x.shape[1] == x.shape[2] <= 2


def _cpu_forward(x, kernel, stride, padding):
    size = kernel.shape[0]
    if size == 1:
        return _matmul(x[:, ::stride, ::stride], kernel[0, 0])
    if _is_dense(x, kernel):
        return _dense(x, kernel, stride)
    if size == 3 and ((x.shape[1] <= 8 and stride == 2) or x.shape[1] <= 7 or (stride == 2 and x.shape[1] <= 28)):
        return _matmul(_taps(x, size, stride, padding), kernel.reshape(-1, kernel.shape[-1]))
    return _xla(x, kernel, stride, padding)


def _cpu_input_grad(x, kernel, g, stride, padding):
    size = kernel.shape[0]
    if size == 1:
        dx = _matmul_t(g, kernel[0, 0])
        if stride == 1:
            return dx
        return lax.pad(dx, jnp.zeros((), dx.dtype), [(0, 0, 0)] + [(0, n - 1 - (o - 1) * stride, stride - 1) for n, o in zip(x.shape[1:3], g.shape[1:3])] + [(0, 0, 0)])
    if _is_dense(x, kernel):
        return jax.vjp(lambda x: _dense(x, kernel, stride), x)[1](g)[0]
    if size == 7 and stride == 2 and x.shape[1] % 2 == 0 and x.shape[2] % 2 == 0:
        return _phases(x, kernel, g, padding)
    if size == 3 and (x.shape[1] <= 14 or (stride == 2 and x.shape[1] <= 28)):
        return jax.vjp(lambda x: _matmul(_taps(x, size, stride, padding), kernel.reshape(-1, kernel.shape[-1])), x)[1](g)[0]
    return jax.vjp(lambda x: _xla(x, kernel, stride, padding), x)[1](g)[0]


def _phases(x, kernel, g, padding):
    n, h, w, c = x.shape
    size = kernel.shape[0]
    # dx[2a + r] = sum_t g[a + t] kernel[r + padding - 2t]
    first = -((size - 1 - padding) // 2)
    last = (1 + padding) // 2
    taps = last - first + 1
    # flip: index u = r + padding - 2 t
    low = 2 * last - padding  # pad so that u >= 0 for r=0,t=last
    high = (1 + padding - 2 * first) - (size - 1)
    k = jnp.pad(kernel, ((low, high), (low, high), (0, 0), (0, 0)))
    k = jnp.flip(k.reshape(taps, 2, taps, 2, *k.shape[2:]), (0, 2))
    k = k.transpose(0, 2, 5, 1, 3, 4).reshape(taps, taps, g.shape[-1], 4 * c)
    y = lax.conv_general_dilated(
        g, k, (1, 1), [(-first, last)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y.reshape(n, h // 2, w // 2, 2, 2, c).transpose(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)


def _cpu_kernel_grad(x, kernel, g, stride, padding):
    size = kernel.shape[0]
    if size == 1:
        return _outer(x[:, ::stride, ::stride], g)[None, None]
    if _is_dense(x, kernel):
        m, vjp = jax.vjp(lambda k: _dense_kernel(k, x.shape[1], stride), kernel)
        return vjp(_outer(x.reshape(x.shape[0], -1), g.reshape(x.shape[0], -1)).reshape(m.shape))[0]
    if size == 3 and (x.shape[1] <= 7 or (stride == 2 and x.shape[1] <= 28)):
        return _outer(_taps(x, size, stride, padding), g).reshape(kernel.shape)
    return jax.vjp(lambda k: _xla(x, k, stride, padding), kernel)[1](g)[0]


def max_pool(x: jax.Array) -> jax.Array:
    rows, columns = ((n - 1) // 2 for n in x.shape[1:3])
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    slices = [
        x[:, i : i + rows * 2 + 1 : 2, j : j + columns * 2 + 1 : 2]
        for i in range(3)
        for j in range(3)
    ]
    y = slices[0]
    for s in slices[1:]:
        y = jnp.maximum(y, s)
    return y
