"""The ResNet family against NumPy, PyTorch, closed forms and known parameter counts."""

import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advtransfer.models import ARCHITECTURES, ResNet, create_module, init_variables
from advtransfer.models.layers import BatchNorm, moments_in_one_pass, moments_in_two_passes

BOTTLENECK = ResNet(stage_sizes=(2, 1), bottleneck=True, num_classes=5, width=8, groups=2, base_width=32)
BASIC = create_module("resnet_tiny", num_classes=5, mean=(0.5,), std=(0.25,)).clone(
    stage_sizes=(1, 1), width=8
)


def random_variables(module, image_size=32):
    """Variables in which no scale, bias, mean or variance has its neutral initial value."""
    variables = init_variables(module, jax.random.key(0), image_size)
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda v: v if v.ndim > 1 else jnp.asarray(rng.uniform(0.5, 1.5, v.shape), jnp.float32),
        variables,
    )


def random_images(*shape):
    return np.random.default_rng(1).random(shape, np.float32)


# torchvision's numbers of parameters.
COUNTS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "wide_resnet50_2": 68_883_240,
    "wide_resnet101_2": 126_886_696,
    "resnext50_32x4d": 25_028_904,
}


FEW = ("resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2_cifar", "resnet_tiny")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FEW else pytest.mark.sweep) for name in ARCHITECTURES]
)
def test_shapes(name):
    module = create_module(name)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), images)
    params = shapes["params"]
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    if name in COUNTS:
        assert count == COUNTS[name]
    if name.endswith("_cifar") and name[:-6] in COUNTS:
        assert count == COUNTS[name[:-6]] - 64 * 3 * (7 * 7 - 3 * 3)
    assert set(params) == {"conv1", "bn1", "fc", *module.block_names}
    assert len(module.block_names) == module.num_blocks
    assert params["fc"]["kernel"].shape == (module.num_features, 1000)
    chex.assert_type(jax.tree.leaves(shapes), jnp.float32)


def test_names_say_how_deep_and_how_wide_networks_are():
    """The depth counts the stem, the head and 2 or 3 convolutions a block (He et al., 2016, table 1)."""
    for name, fields in ARCHITECTURES.items():
        module, depth = create_module(name), re.match(r"(?:wide_)?resne[x]?t(\d+)", name)
        assert module.cifar_stem == (name.endswith("_cifar") or name == "resnet_tiny")
        if name == "resnet_tiny":
            assert (module.num_blocks, module.width, module.bottleneck) == (4, 16, False)
            continue
        assert int(depth[1]) == 2 + (3 if module.bottleneck else 2) * module.num_blocks
        assert module.bottleneck == (int(depth[1]) >= 50) and module.width == 64
        wide = re.match(r"wide_resnet\d+_(\d)", name)
        grouped = re.search(r"_(\d+)x(\d+)d", name)
        expected = (int(grouped[1]), int(grouped[2])) if grouped else (1, 64 * int(wide[1]) if wide else 64)
        assert (module.groups, module.base_width) == expected and len(fields["stage_sizes"]) == 4


def test_paths_mirror_torchvision():
    module = create_module("resnet50")
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    params = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
    assert module.num_blocks == 16
    parts = {"conv1", "bn1", "conv2", "bn2", "conv3", "bn3"}
    assert set(params["layer4_2"]) == parts
    assert set(params["layer2_0"]) == parts | {"downsample_conv", "downsample_bn"}
    assert params["layer4_2"]["conv3"]["kernel"].shape == (1, 1, 512, 2048)
    assert set(params["bn1"]) == {"scale", "bias"}


def test_unknown_architecture():
    with pytest.raises(ValueError, match="unknown architecture 'resent50'; nearest: resnet50"):
        create_module("resent50")


def numpy_conv(x, kernel, stride, groups=1):
    size, out = kernel.shape[0], (x.shape[1] + stride - 1) // stride
    pad = size // 2
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    y = 0.0
    for i, j in np.ndindex(size, size):
        part = x[:, i : i + (out - 1) * stride + 1 : stride, j : j + (out - 1) * stride + 1 : stride]
        parts = np.split(part, groups, -1), np.split(kernel[i, j], groups, -1)
        y = y + np.concatenate([a @ b for a, b in zip(*parts, strict=True)], -1)
    return y


def numpy_resnet(module, variables, images):
    """Logits in evaluation mode, straight from the papers, in float64."""
    params, stats = jax.tree.map(
        partial(np.asarray, dtype=np.float64), (variables["params"], variables["batch_stats"])
    )

    def conv_bn(x, params, stats, conv, bn, stride=1, groups=1):
        y = numpy_conv(x, params[conv]["kernel"], stride, groups)
        y = (y - stats[bn]["mean"]) / np.sqrt(stats[bn]["var"] + 1e-5)
        return y * params[bn]["scale"] + params[bn]["bias"]

    x = (images - np.array(module.mean)) / np.array(module.std)
    x = np.maximum(conv_bn(x, params, stats, "conv1", "bn1", 1 if module.cifar_stem else 2), 0)
    if not module.cifar_stem:
        h, w = x.shape[1:3]
        windows = np.pad(x, ((0, 0), (1, 0), (1, 0), (0, 0)))  # nothing is below zero here
        cuts = [windows[:, i : i + h : 2, j : j + w : 2] for i in range(3) for j in range(3)]
        cuts = [np.pad(v, ((0, 0), (0, h // 2 - v.shape[1]), (0, w // 2 - v.shape[2]), (0, 0))) for v in cuts]
        x = np.max(cuts, axis=0)
    for name in module.block_names:
        stride = 2 if name.endswith("_0") and name != "layer1_0" else 1
        p, s, y = params[name], stats[name], x
        if module.bottleneck:
            y = np.maximum(conv_bn(y, p, s, "conv1", "bn1"), 0)
            y = np.maximum(conv_bn(y, p, s, "conv2", "bn2", stride, module.groups), 0)
            y = conv_bn(y, p, s, "conv3", "bn3")
        else:
            y = np.maximum(conv_bn(y, p, s, "conv1", "bn1", stride), 0)
            y = conv_bn(y, p, s, "conv2", "bn2")
        if "downsample_conv" in p:
            x = conv_bn(x, p, s, "downsample_conv", "downsample_bn", stride)
        x = np.maximum(x + y, 0)
    return x.mean((1, 2)) @ params["fc"]["kernel"] + params["fc"]["bias"]


@pytest.mark.parametrize(("module", "channels"), [(BASIC, 1), (BOTTLENECK, 3)])
@pytest.mark.parametrize("batch", [1, 3])  # the BatchNorm scale is folded into different kernels
def test_against_numpy(module, channels, batch):
    variables = random_variables(module)
    images = random_images(batch, 32, 32, channels)
    want = numpy_resnet(module, variables, images)
    np.testing.assert_allclose(jax.jit(module.apply)(variables, images), want, rtol=2e-4)


@pytest.mark.parametrize("name", ["resnet50", "resnet18_cifar", "resnext50_32x4d"])
def test_against_pytorch(name):
    torch = pytest.importorskip("torch")
    from benchmarks.torch_resnet import make_peer

    module = create_module(name, num_classes=7)
    variables = random_variables(module, 64)
    images = random_images(2, 64, 64, 3)
    peer = make_peer(module, variables).eval()
    x = torch.tensor(images).permute(0, 3, 1, 2).requires_grad_()
    logits = peer(x)
    logits.logsumexp(1).sum().backward()

    def loss(images, variables):
        logits = module.apply(variables, images)
        return jax.nn.logsumexp(logits, axis=1).sum(), logits

    gradient, ours = jax.jit(jax.grad(loss, has_aux=True))(images, variables)
    np.testing.assert_allclose(ours, logits.detach().numpy(), rtol=1e-3)
    want = x.grad.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(gradient, want, rtol=1e-2, atol=1e-3 * np.abs(want).max())


@pytest.mark.parametrize(("module", "channels"), [(BASIC, 1), (BOTTLENECK, 3)])
def test_every_boundary(module, channels):
    variables = random_variables(module)
    images = random_images(2, 32, 32, channels)
    run = jax.jit(module.apply, static_argnames=("start", "stop"))
    whole = run(variables, images)
    blocks = module.num_blocks
    inner = [run(variables, images, stop=b) for b in range(blocks + 1)]
    chex.assert_shape(inner[blocks], (2, module.num_features))
    chex.assert_type(inner[blocks], jnp.float32)
    for b, x in enumerate(inner):
        np.testing.assert_allclose(run(variables, x, start=b), whole, rtol=1e-5)
    np.testing.assert_array_equal(module.apply(variables, inner[1], start=1, stop=1), inner[1])
    onward = run(variables, inner[1], start=1, stop=blocks - 1)
    np.testing.assert_allclose(onward, inner[blocks - 1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        *(
            ({"start": start}, f"start is {start}; this network has the boundaries 0 to 2")
            for start in (-1, 3)
        ),
        *(({"stop": stop}, f"stop is {stop}; this network has the boundaries 0 to 2") for stop in (-1, 3)),
        ({"start": 2, "stop": 1}, "start is 2, after stop, which is 1"),
    ],
)
def test_impossible_boundaries(ends, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(partial(BASIC.init, **ends), jax.random.key(0), jnp.zeros((1, 8, 8, 1)))


def test_activations_of_another_rank_are_refused():
    for start, shape in ((1, (2, 8)), (2, (2, 4, 4, 16))):
        with pytest.raises(AssertionError, match="rank"):
            jax.eval_shape(partial(BASIC.init, start=start), jax.random.key(0), jnp.zeros(shape))


def test_training_from_a_seam_returns_all_statistics():
    variables = random_variables(BASIC)
    images = random_images(2, 32, 32, 1)
    x = jax.jit(partial(BASIC.apply, stop=1))(variables, images)
    run = jax.jit(partial(BASIC.apply, start=1, train=True, mutable=["batch_stats"]))
    stats = run(variables, x)[1]["batch_stats"]
    chex.assert_trees_all_equal_structs(stats, variables["batch_stats"])
    for name in ("bn1", "layer1_0"):
        chex.assert_trees_all_equal(stats[name], variables["batch_stats"][name])
    assert not np.allclose(
        stats["layer2_0"]["bn1"]["mean"], variables["batch_stats"]["layer2_0"]["bn1"]["mean"]
    )


def batch_norm(axis_name=None, **options):
    norm = BatchNorm(4, axis_name, **options)
    variables = {
        "params": {"scale": jnp.float32([1, 2, 3, 4]), "bias": jnp.float32([0, 1, 0, -1])},
        "batch_stats": {"mean": jnp.full(4, 0.5), "var": jnp.full(4, 2.0)},
    }

    def apply(x):
        y, changed = norm.apply(variables, lambda scale: x, True, mutable=["batch_stats"])
        return y, changed["batch_stats"]

    return apply


def test_batch_statistics():
    # A mean far from zero: a variance taken as E[x²] - E[x]² in float32 would be lost.
    x = np.random.default_rng(0).normal(300.0, 0.1, (4, 3, 3, 4)).astype(np.float32)
    y, stats = batch_norm()(x)
    rows = x.reshape(-1, 4).astype(np.float64)
    normal = (rows - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-5)
    want = (normal * [1, 2, 3, 4] + [0, 1, 0, -1]).reshape(x.shape)
    np.testing.assert_allclose(y, want, atol=5e-3)
    np.testing.assert_allclose(stats["mean"], 0.9 * 0.5 + 0.1 * rows.mean(0), rtol=1e-6)
    np.testing.assert_allclose(stats["var"], 0.9 * 2.0 + 0.1 * rows.var(0, ddof=1), rtol=1e-5)


@pytest.mark.parametrize("moments", [moments_in_one_pass, moments_in_two_passes])
@pytest.mark.parametrize("shift", [0.0, 300.0, -1e3])
def test_moments(moments, shift):
    rng = np.random.default_rng(0)
    x = rng.normal(shift, [0.1, 1.0, 3.0], (5, 4, 6, 3)).astype(np.float32)
    exact = x.astype(np.float64)
    mean, var = moments(jnp.asarray(x))
    np.testing.assert_allclose(mean, exact.mean((0, 1, 2)), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(var, exact.var((0, 1, 2)), rtol=1e-4)
    a, b = rng.normal(size=(2, 3))
    gradient = jax.grad(lambda x: sum(jnp.sum(w * m) for w, m in zip((a, b), moments(x), strict=True)))(x)
    want = (a + 2 * b * (exact - exact.mean((0, 1, 2)))) / exact[..., 0].size
    np.testing.assert_allclose(gradient, want, atol=2e-4 * np.abs(want).max())


def test_the_moments_of_equal_values():
    for moments in (moments_in_one_pass, moments_in_two_passes):
        mean, var = moments(jnp.full((2, 3, 3, 4), 0.1))
        np.testing.assert_allclose(mean, 0.1, rtol=1e-6)
        np.testing.assert_allclose(var, 0.0, atol=1e-12)


def test_the_statistics_of_a_single_pixel():
    """Its variance is 0, whatever it is divided by."""
    stats = batch_norm()(jnp.full((1, 1, 1, 4), 3.0))[1]
    np.testing.assert_allclose(stats["mean"], 0.9 * 0.5 + 0.1 * 3.0, rtol=1e-6)
    np.testing.assert_allclose(stats["var"], 0.9 * 2.0, rtol=1e-6)


def test_momentum_zero_keeps_the_last_batch():
    x = random_images(2, 3, 3, 4)
    stats = batch_norm(momentum=0.0)(x)[1]
    np.testing.assert_allclose(stats["mean"], x.reshape(-1, 4).mean(0), rtol=1e-6)


def test_synchronised_statistics_are_those_of_the_whole_batch():
    x = random_images(2, 3, 2, 2, 4) * np.float32([1, 5]).reshape(2, 1, 1, 1, 1)
    y, stats = jax.pmap(batch_norm("devices"), axis_name="devices")(x)
    want, want_stats = batch_norm()(x.reshape(6, 2, 2, 4))
    np.testing.assert_allclose(y.reshape(want.shape), want, atol=1e-5)
    for device in range(2):
        chex.assert_trees_all_close(jax.tree.map(lambda s, d=device: s[d], stats), want_stats, rtol=1e-5)


def test_computing_in_bfloat16():
    variables = random_variables(BASIC)
    images = random_images(2, 32, 32, 1)
    half = BASIC.clone(dtype=jnp.bfloat16)
    run = jax.jit(partial(half.apply, train=True, mutable=["batch_stats"]))
    logits, changed = run(variables, images)
    chex.assert_type([logits, *jax.tree.leaves(changed)], jnp.float32)
    x = jax.eval_shape(partial(half.apply, stop=1), variables, images)
    chex.assert_type(x, jnp.bfloat16)
    features = jax.jit(partial(half.apply, stop=2))(variables, images)
    chex.assert_type(features, jnp.float32)
    want = jax.jit(partial(BASIC.apply, stop=2))(variables, images)
    assert jnp.max(jnp.abs(features - want)) < 0.05 * jnp.max(jnp.abs(want))


def test_normalisation_is_inside():
    variables = random_variables(BASIC)
    images = random_images(2, 32, 32, 1)
    plain = BASIC.clone(mean=(0.0,), std=(1.0,))
    got = jax.jit(BASIC.apply)(variables, images)
    want = jax.jit(plain.apply)(variables, (images - 0.5) / 0.25)
    np.testing.assert_allclose(got, want, rtol=1e-4)


def test_initial_distributions():
    variables = init_variables(create_module("resnet18", num_classes=100), jax.random.key(0))
    params = variables["params"]
    for path in (("layer3_0", "conv1"), ("layer4_0", "downsample_conv"), ("conv1",)):
        leaf = params
        for name in path:
            leaf = leaf[name]
        kernel = np.asarray(leaf["kernel"])
        fan_out = kernel.shape[0] * kernel.shape[1] * kernel.shape[3]
        assert abs(kernel.std() / np.sqrt(2 / fan_out) - 1) < 0.03
        assert abs((np.abs(kernel) < kernel.std()).mean() - 0.683) < 0.02  # normal
    for leaf in (params["fc"]["kernel"], params["fc"]["bias"]):
        bound = 512**-0.5
        assert 0.95 * bound < np.abs(leaf).max() <= bound
        assert abs(np.abs(leaf).mean() - bound / 2) < 0.1 * bound
    assert all((stats == 0).all() for stats in (variables["batch_stats"]["bn1"]["mean"],))
    again = init_variables(create_module("resnet18", num_classes=100), jax.random.key(0), 64)
    chex.assert_trees_all_equal(variables, again)
