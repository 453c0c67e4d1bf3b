"""Networks of every kind, given as callables: the weights of now, one program, nothing left behind."""

import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import advtransfer as at
from advtransfer.attacks.network import _KNOWN, as_network

IMAGES = np.random.default_rng(0).random((6, 4, 4, 3)).astype(np.float32)
LABELS = np.arange(6) % 3
SPLIT = at.Split(np.uint8(255 * IMAGES), LABELS)
ATTACK = at.make_attack(at.L2(0.5), num_steps=1)
KERNEL = np.random.default_rng(1).normal(size=(48, 3)).astype(np.float32)


class Holder:
    """A network with its weights in an attribute, called, or by a method."""

    def __init__(self, kernel):
        self.kernel = jnp.asarray(kernel)

    def __call__(self, images):
        return jax.nn.relu(images.reshape(len(images), -1) - 0.5) @ self.kernel

    def logits(self, images):
        return self(images)


class Module(nnx.Module):
    def __init__(self, kernel):
        self.dense = nnx.Linear(48, 3, use_bias=False, rngs=nnx.Rngs(0))
        self.dense.kernel[...] = kernel

    def __call__(self, images):
        return self.dense(jax.nn.relu(images.reshape(len(images), -1) - 0.5))


def network(kind):
    """A callable, and what puts other weights into it."""
    holder = Holder(KERNEL)

    def change(kernel):
        holder.kernel = jnp.asarray(kernel)

    if kind == "nnx":
        module = Module(KERNEL)
        return module, lambda kernel: module.dense.kernel.__setitem__(..., kernel)
    if kind == "numpy":
        arrays = {"kernel": KERNEL.copy()}
        return (lambda x: jax.nn.relu(x.reshape(len(x), -1) - 0.5) @ arrays["kernel"]), (
            lambda kernel: arrays.update(kernel=kernel)
        )
    kinds = {
        "object": holder,
        "method": holder.logits,
        "function": lambda images: holder(images),
        "partial": functools.partial(Holder.__call__, holder),
        "jit": jax.jit(lambda images: holder(images)),
    }
    return kinds[kind], change


KINDS = ("nnx", "numpy", "object", "method", "function", "partial", "jit")


def truth(kernel):
    """What `pgd`, a gradient, predictions and an accuracy are, the weights being arguments."""
    fixed = jax.tree_util.Partial(
        lambda w, x: jax.nn.relu(x.reshape(len(x), -1) - 0.5) @ w, jnp.asarray(kernel)
    )
    return measured(fixed)


def measured(logits_fn):
    return [
        at.pgd(logits_fn, IMAGES, LABELS, at.L2(0.5), num_steps=2),
        at.saliency.gradients(logits_fn, IMAGES, LABELS, batch_size=4),
        at.predict(logits_fn, IMAGES, batch_size=4),
        at.evaluate(logits_fn, SPLIT, batch_size=4)["loss"],
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_of_any_kind_is_seen_as_it_is_now(kind):
    logits_fn, change = network(kind)
    for kernel in (KERNEL, -KERNEL, KERNEL[:, ::-1]):
        change(kernel)
        for found, expected in zip(measured(logits_fn), truth(kernel), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_one_program_whatever_the_weights_are(kind):
    logits_fn, change = network(kind)
    first = as_network(logits_fn, IMAGES)
    change(2 * KERNEL)
    second = as_network(logits_fn, IMAGES)
    assert second.func is first.func
    np.testing.assert_allclose(second(IMAGES), 2 * first(IMAGES), rtol=1e-5)
    fewer = as_network(logits_fn, IMAGES[:2])
    assert fewer.func is not first.func and as_network(logits_fn, IMAGES).func is first.func


def test_what_is_computed_otherwise_is_another_program():
    state = {"factor": 2.0, "activation": jax.nn.relu}
    logits_fn = lambda x: state["activation"](x.reshape(len(x), -1) @ KERNEL) * state["factor"]  # noqa: E731
    programs = [as_network(logits_fn, IMAGES)]
    for change in ({"factor": 3.0}, {"activation": jnp.tanh}):
        state.update(change)
        programs.append(as_network(logits_fn, IMAGES))
        np.testing.assert_allclose(programs[-1](IMAGES), logits_fn(IMAGES), rtol=1e-5)
    assert len({id(program.func) for program in programs}) == 3


def test_programs_inside_of_a_network_are_those_of_now():
    """A `jax.jit` below the surface holds what it was traced with; when it is another, so is the program."""
    inner = {"layer": None}

    def use(kernel):
        inner["layer"] = jax.jit(lambda x: x @ jnp.asarray(kernel))

    logits_fn = lambda x: inner["layer"](x.reshape(len(x), -1))  # noqa: E731
    for kernel in (KERNEL, -KERNEL):
        use(kernel)
        np.testing.assert_allclose(at.predict(logits_fn, IMAGES), IMAGES.reshape(6, -1) @ kernel, rtol=1e-4)


@pytest.mark.parametrize("kind", ["object", "method", "function", "partial"])
def test_a_network_that_is_gone_leaves_nothing(kind):
    logits_fn, _ = network(kind)
    alive, known = weakref.ref(getattr(logits_fn, "__self__", logits_fn)), len(_KNOWN)
    at.pgd(logits_fn, IMAGES, LABELS, at.L2(0.5), num_steps=1)
    assert len(_KNOWN) == known + 1
    arrays = len(jax.live_arrays())
    del logits_fn, _
    gc.collect()
    assert alive() is None and len(_KNOWN) == known and len(jax.live_arrays()) < arrays


CALLS = {
    "pgd": lambda logits_fn: at.pgd(logits_fn, IMAGES, LABELS, at.L2(0.5), num_steps=2),
    "evaluate": lambda logits_fn: at.evaluate(logits_fn, SPLIT, batch_size=4, attack=ATTACK),
    "predict": lambda logits_fn: at.predict(logits_fn, IMAGES, batch_size=4),
    "gradients": lambda logits_fn: at.saliency.gradients(logits_fn, IMAGES, LABELS),
    "smooth_grad": lambda logits_fn: at.saliency.smooth_grad(
        logits_fn, IMAGES, LABELS, key=jax.random.key(0), num_samples=2
    ),
    "integrated_gradients": lambda logits_fn: at.saliency.integrated_gradients(logits_fn, IMAGES, LABELS),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_what_was_compiled_for_a_network_goes_with_it(call):
    def executables():
        gc.collect()
        return len(jax.devices()[0].client.live_executables())

    def of_a_new_network():
        logits_fn, _ = network("function")
        call(logits_fn)
        return executables()

    of_a_new_network()  # what is compiled for all networks stays
    before = executables()
    assert of_a_new_network() > before
    assert executables() == before


def test_a_network_inside_of_a_transformation():
    """Weights that are being differentiated, and images that are mapped over."""

    def loss(kernel):
        logits_fn = lambda x: x.reshape(len(x), -1) @ kernel  # noqa: E731
        adversarial = at.pgd(logits_fn, IMAGES, LABELS, at.L2(0.5), num_steps=2)
        return at.cross_entropy(logits_fn(adversarial), LABELS).mean()

    adversarial = at.pgd(lambda x: x.reshape(len(x), -1) @ KERNEL, IMAGES, LABELS, at.L2(0.5), num_steps=2)
    fixed = jax.grad(lambda w: at.cross_entropy(adversarial.reshape(6, -1) @ w, LABELS).mean())(KERNEL)
    for transformed in (jax.grad(loss), jax.jit(jax.grad(loss))):
        np.testing.assert_allclose(transformed(jnp.asarray(KERNEL)), fixed, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("logits_fn", "message"),
    [
        (
            lambda x: x,
            r"the network makes \(6, 4, 4, 3\) of images \(6, 4, 4, 3\); expected logits \[N, classes\]",
        ),
        (lambda x: x.reshape(len(x), -1).sum(0, keepdims=True), r"makes \(1, 48\)"),
        (lambda x: (x.reshape(len(x), -1), x), r"makes \(\(6, 48\), \(6, 4, 4, 3\)\)"),
    ],
)
def test_what_makes_no_logits_is_named(logits_fn, message):
    for call in (
        lambda: at.pgd(logits_fn, IMAGES, LABELS, at.L2(0.5)),
        lambda: at.predict(logits_fn, IMAGES),
        lambda: at.saliency.gradients(logits_fn, IMAGES, LABELS),
    ):
        with pytest.raises(ValueError, match=message):
            call()
