"""Every lowering of a convolution or max-pool gives what `lax` gives: values and gradients."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from advtransfer.models import conv
from advtransfer.models.conv import _on_blocks, conv2d, max_pool

PLATFORMS = ("cpu", "cuda", "tpu")


def reference(x, kernel, *, stride, groups=1, padding=None):
    padding = kernel.shape[0] // 2 if padding is None else padding
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def ours(x, kernel, *, stride, groups=1):
    return conv2d(x, kernel, stride=stride, padding=kernel.shape[0] // 2, groups=groups)


def value_and_gradients(convolve, x, kernel, g):
    y, vjp = jax.vjp(convolve, x, kernel)
    return y, *vjp(g)


def operands(size, kernel_size, stride, channels=(6, 10), batch=2, lead=(), groups=1):
    """x, kernel and the gradient of the result; `size` is the side, or height and width."""
    rng = np.random.default_rng(0)
    size = size if isinstance(size, tuple) else (size, size)
    shapes = (
        (*lead, batch, *size, channels[0]),
        (*lead, kernel_size, kernel_size, channels[0] // groups, channels[1]),
        (*lead, batch, *((side + stride - 1) // stride for side in size), channels[1]),
    )
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


def assert_close(got, want):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.max(jnp.abs(b))))


def resnet50_shapes(image_size):
    """(input size, kernel size, stride) of every convolution of ResNet-50."""
    shapes = [(image_size, 7, 2)]
    size = image_size // 4
    for stage in range(4):
        if stage:
            shapes += [(size, 1, 1), (size, 1, 2), (size, 3, 2)]
            size //= 2
        shapes += [(size, 1, 1), (size, 3, 1)]
    return shapes


CIFAR_STEM = [(32, 3, 1), (16, 3, 1), (32, 3, 2), (16, 3, 2)]
ODD = [(5, 3, 1), (5, 3, 2), (3, 3, 2), (9, 1, 2), (33, 7, 2), (2, 7, 2), (1, 1, 2), (1, 3, 2)]
SHAPES = sorted({*resnet50_shapes(32), *resnet50_shapes(224), *CIFAR_STEM, *ODD})
SOME = [(8, 1, 1), (8, 1, 2), (4, 3, 1), (2, 3, 1), (2, 3, 2), (1, 3, 1), (16, 3, 2), (16, 7, 2)]
EVERY = [*SOME, *(pytest.param(*shape, marks=pytest.mark.sweep) for shape in SHAPES if shape not in SOME)]


@pytest.mark.parametrize(("size", "kernel_size", "stride"), SOME)
def test_as_products_of_kernels_side_by_side(size, kernel_size, stride):
    arrays = operands(size, kernel_size, stride, lead=(3,))
    form = partial(conv2d, stride=stride, padding=kernel_size // 2, as_product=True)
    found = jax.jit(jax.vmap(partial(value_and_gradients, form)))
    assert "convolution" not in found.lower(*arrays).as_text()
    known = [
        value_and_gradients(partial(reference, stride=stride), *each) for each in zip(*arrays, strict=True)
    ]
    assert_close(found(*arrays), jax.tree.map(lambda *x: jnp.stack(x), *known))


@pytest.mark.parametrize(("size", "kernel_size", "stride"), EVERY)
def test_values_and_both_gradients(size, kernel_size, stride):
    arrays = operands(size, kernel_size, stride)

    @jax.jit
    def both(*arrays):
        return tuple(value_and_gradients(partial(f, stride=stride), *arrays) for f in (ours, reference))

    assert_close(*both(*arrays))


OBLONG = [((2, 1), 3, 1, 1), ((5, 7), 3, 1, 1), ((9, 12), 3, 2, 1), ((9, 6), 3, 1, 1), ((6, 9), 1, 2, 0)]
OBLONG += [((10, 8), 7, 2, 3), ((10, 9), 7, 2, 3)]
PADDED = [((4, 6), 1, 1, 1), ((2, 2), 3, 1, 2), ((9, 8), 3, 1, 0), ((32, 30), 3, 2, 0), ((10, 8), 7, 2, 2)]
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # compiled


def test_oblong_maps_and_any_padding():
    cases = OBLONG + PADDED
    arrays = [operands(size, kernel_size, stride)[:2] for size, kernel_size, stride, _ in cases]

    def run(convolve):
        found = []
        for (x, kernel), (_, _, stride, padding) in zip(arrays, cases, strict=True):
            y, vjp = jax.vjp(partial(convolve, stride=stride, padding=padding), x, kernel)
            found += [y, *vjp(jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))]
        return found

    assert_close(*(jax.jit(partial(run, f), compiler_options=QUICKLY)() for f in (conv2d, reference)))


@pytest.mark.parametrize("at_a_time", [1, 2, 6])
@pytest.mark.parametrize(
    ("size", "kernel_size", "stride"),
    [((14, 17), 3, 1), ((29, 32), 3, 2), ((31, 28), 7, 2), ((16, 14), 5, 1)],
)
def test_kernel_gradients_of_a_few_images_at_a_time(size, kernel_size, stride, at_a_time, monkeypatch):
    """Of 32 channels or more on maps of 14² or more, against sums in float64."""
    x, kernel, g = operands(size, kernel_size, stride, channels=(32, 7), batch=6)
    (h, w), padding = g.shape[1:3], kernel_size // 2
    image = 4 * w * (kernel_size * 32 * (size[0] + 2 * padding) + h * 7)
    monkeypatch.setattr(conv, "_CACHE", at_a_time * image)
    scanned = []
    monkeypatch.setattr(conv.lax, "scan", lambda *args, scan=lax.scan: scanned.append(args[2]) or scan(*args))
    found = jax.jit(lambda *a: value_and_gradients(partial(ours, stride=stride), *a)[2])(x, kernel, g)
    assert {a.shape[:2] for part in scanned for a in part} == {(6 // at_a_time, at_a_time)}
    wide = np.pad(np.asarray(x, np.float64), ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0)))
    for i in range(kernel_size):
        for j in range(kernel_size):
            there = wide[:, i : i + stride * h : stride, j : j + stride * w : stride][:, :h, :w]
            want = np.einsum("nhwc,nhwo->co", there, np.asarray(g, np.float64))
            np.testing.assert_allclose(found[i, j], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("size", "kernel_size", "stride"), SOME)
def test_vmapped_images_and_kernels(size, kernel_size, stride):
    arrays = operands(size, kernel_size, stride, lead=(3,))
    got = jax.jit(jax.vmap(partial(value_and_gradients, partial(ours, stride=stride))))(*arrays)
    loop = jax.jit(partial(value_and_gradients, partial(reference, stride=stride)))
    want = [loop(*(a[i] for a in arrays)) for i in range(3)]
    assert_close(got, [jnp.stack(parts) for parts in zip(*want, strict=True)])


@pytest.mark.parametrize(("size", "kernel_size", "stride"), [(8, 1, 2), (2, 3, 1), (8, 3, 1)])
def test_under_pmap(size, kernel_size, stride):
    arrays = operands(size, kernel_size, stride, lead=(2,))
    got = jax.pmap(partial(value_and_gradients, partial(ours, stride=stride)))(*arrays)
    want = jax.vmap(partial(value_and_gradients, partial(reference, stride=stride)))(*arrays)
    assert_close(jax.device_get(got), want)


def test_without_jit_and_grouped():
    for shape, groups in (((4, 3, 1), 1), ((4, 3, 2), 2)):
        arrays = operands(*shape, groups=groups)
        options = {"stride": shape[2], "groups": groups}
        assert_close(
            value_and_gradients(partial(ours, **options), *arrays),
            value_and_gradients(partial(reference, **options), *arrays),
        )


@pytest.mark.parametrize(("size", "kernel_size", "stride"), [(4, 1, 2), (2, 3, 1), (8, 3, 2)])
def test_second_derivatives(size, kernel_size, stride):
    x, kernel, _ = operands(size, kernel_size, stride)

    def curvature(convolve):
        def loss(x, kernel):
            return jnp.sum(jnp.sin(convolve(x, kernel, stride=stride)))

        def slope(x, kernel):
            return sum(jnp.sum(jnp.square(g)) for g in jax.grad(loss, (0, 1))(x, kernel))

        hvp = jax.jvp(jax.grad(loss, (0, 1)), (x, kernel), (x, kernel))[1]
        return *jax.grad(slope, (0, 1))(x, kernel), *hvp

    got, want = (jax.jit(partial(curvature, f))() for f in (ours, reference))
    assert_close(got, want)


def test_bfloat16():
    arrays = [a.astype(jnp.bfloat16) for a in operands(4, 3, 1)]
    got = value_and_gradients(partial(ours, stride=1), *arrays)
    chex.assert_type(got, jnp.bfloat16)
    exact = value_and_gradients(partial(reference, stride=1), *(a.astype(jnp.float32) for a in arrays))
    for a, b in zip(got, exact, strict=True):
        error = jnp.max(jnp.abs(a.astype(jnp.float32) - b))
        assert error < 0.02 * jnp.max(jnp.abs(b))


def test_each_platform_holds_only_its_own_lowering():
    x, kernel, g = operands(4, 1, 1)
    step = jax.jit(partial(value_and_gradients, partial(ours, stride=1)))
    assert "convolution" not in step.lower(x, kernel, g).compile().as_text()
    for platform in ("cuda", "tpu"):
        text = step.trace(x, kernel, g).lower(lowering_platforms=(platform,)).as_text()
        assert "stablehlo.convolution" in text
        assert "dot_general" not in text
    pool = jax.jit(max_pool).trace(x)
    assert "reduce_window" in pool.lower(lowering_platforms=("tpu",)).as_text()
    assert "reduce_window" not in pool.lower(lowering_platforms=("cpu",)).as_text()
    of_pool = jax.jit(lambda x, g: jax.vjp(max_pool, x)[1](g)).trace(x, max_pool(x))
    scatters = {
        p: "select_and_scatter" in of_pool.lower(lowering_platforms=(p,)).as_text() for p in PLATFORMS
    }
    assert scatters == {"cpu": False, "cuda": False, "tpu": True}


@pytest.mark.parametrize(("kernel_size", "size"), [(3, (8, 6)), (5, (8, 12)), (7, (12, 8))])
def test_a_stem_on_blocks_of_pixels(kernel_size, size):
    x, kernel, g = operands(size, kernel_size, 2, channels=(3, 10))
    got = value_and_gradients(partial(_on_blocks, padding=kernel_size // 2), x, kernel, g)
    assert_close(got, value_and_gradients(partial(reference, stride=2), x, kernel, g))


def test_which_lowering_an_accelerator_gets():
    """Blocks of 2×2 pixels for a stride of 2 over images of even sides."""
    for size, kernel_size, channels, blocks in (
        ((224, 224), 7, 3, True),
        ((32, 48), 3, 3, True),
        ((223, 224), 7, 3, False),
        ((32, 32), 3, 64, False),
        ((32, 32), 1, 3, False),
    ):
        x, kernel, _ = operands(size, kernel_size, 2, channels=(channels, 8))
        convolve = jax.jit(partial(ours, stride=2)).trace(x, kernel)
        for platform in ("cuda", "tpu"):
            text = convolve.lower(lowering_platforms=(platform,)).as_text()
            assert ("stride = [2, 2]" in text) != blocks


@pytest.mark.parametrize(
    ("size", "kernel_size", "stride", "form"),
    [
        *((8, 1, stride, "product") for stride in (1, 2)),
        *((2, 3, stride, "dense") for stride in (1, 2)),
        *((size, 3, 1, "taps") for size in (3, 7)),
        *((size, 3, 2, "taps") for size in (3, 28)),
        *((8, 3, 1, "convolution"), (29, 3, 2, "convolution"), (9, 7, 2, "convolution")),
        *((30, 3, 2, "phases"), (8, 7, 2, "phases")),
        *((size, 3, 1, "convolution") for size in ((3, 8), (8, 3))),
        *((size, 3, 2, "convolution") for size in ((30, 31), (31, 30))),
    ],
)
def test_which_lowering_a_cpu_gets(size, kernel_size, stride, form):
    """All give the same values; which is the fastest depends on the shapes, not on batch and channels."""
    x, kernel, g = operands(size, kernel_size, stride, channels=(31, 10), batch=30)

    def text(function, *arrays):
        return jax.jit(function).trace(*arrays).lower(lowering_platforms=("cpu",)).as_text()

    convolve = partial(ours, stride=stride)
    value = text(convolve, x, kernel)
    of_input = text(lambda x, kernel, g: jax.vjp(convolve, x, kernel)[1](g)[0], x, kernel, g)
    of_kernel = text(lambda x, kernel, g: jax.vjp(convolve, x, kernel)[1](g)[1], x, kernel, g)
    number = int(form in ("convolution", "phases"))
    for program in (value, of_input, of_kernel):
        assert program.count("stablehlo.convolution(") == number
    assert ("stablehlo.pad" in value) == (form == "taps")
    assert ("lhs_dilate = [2, 2]" in of_input) == (form == "convolution" and stride == 2)


def torch_max_pool(x, g):
    """Values and gradient of PyTorch's max_pool2d(3, 2, 1): of equals, the first in a window wins."""
    n, h, w, c = x.shape
    y, dx = np.empty(g.shape, x.dtype), np.zeros_like(x)
    for i, j in np.ndindex(g.shape[1:3]):
        rows = range(max(2 * i - 1, 0), min(2 * i + 2, h))
        columns = range(max(2 * j - 1, 0), min(2 * j + 2, w))
        window = x[:, rows.start : rows.stop, columns.start : columns.stop].reshape(n, -1, c)
        first = np.argmax(window, axis=1)
        y[:, i, j] = window.max(axis=1)
        for a, b in np.ndindex(n, c):
            row, column = divmod(first[a, b], len(columns))
            dx[a, rows.start + row, columns.start + column, b] += g[a, i, j, b]
    return y, dx


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 2)])
def test_max_pool_with_ties(size):
    rng = np.random.default_rng(0)
    x = np.maximum(rng.integers(-3, 4, (2, *size, 3)), 0).astype(np.float32)
    g = rng.normal(size=(2, (size[0] + 1) // 2, (size[1] + 1) // 2, 3)).astype(np.float32)
    y, vjp = jax.vjp(max_pool, x)
    want, want_dx = torch_max_pool(x, g)
    np.testing.assert_array_equal(y, want)
    np.testing.assert_allclose(vjp(g)[0], want_dx, atol=1e-6)
    stacked = jax.vmap(lambda x, g: jax.vjp(max_pool, x)[1](g)[0])(x[None], g[None])[0]
    np.testing.assert_allclose(stacked, want_dx, atol=1e-6)
