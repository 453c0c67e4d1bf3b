"""Influence through the head and the last residual blocks, with the Gauss-Newton matrix for the Hessian.

G = Σ Jᵀ (diag(p) - p pᵀ) J over the training images, J the Jacobian of an image's logits in the trained
parameters, is the Hessian of a network whose logits are linear in them, and positive semi-definite
(Schraudolph, 2002; Martens, 2020, section 8). Only products with it are taken: Jᵀ by one pass backward, J by
a pass backward through that, because the networks' convolutions have no forward derivative.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from advtransfer import parallel
from advtransfer.analysis import krylov
from advtransfer.models import Model


class _Network(NamedTuple):
    """A network in its trained parameters; static in jitted functions."""

    module: Any
    start: int | None  # the seam that the activations stand at; None: images


def block_scores(
    model: Model,
    num_unfrozen_blocks: int,
    train_images: Any,
    train_labels: Any,
    query_images: Any,
    query_labels: Any,
    *,
    damping: float,
    tolerance: float = 1e-4,
    max_iterations: int = 500,
    batch_size: int = 64,
    query_batch_size: int = 16,
    tell: Callable[[str], None] = print,
) -> np.ndarray:
    """∇L(query)ᵀ (G + damping)⁻¹ ∇L(train) over the parameters of the head and the last k residual blocks.

    The network runs in evaluation mode and float32, conjugate gradients in float64 on the host. Float32's
    rounding of G, 6e-8 of its largest eigenvalue, sets the residual that can be reached: about 6e-8 times the
    ratio of that eigenvalue to `damping`. What enters the first trained block is computed once and stays on
    the device. A query costs as many passes over the training images as conjugate gradients take iterations
    (or a training image, where those are fewer).

    Args:
      model: the network.
      num_unfrozen_blocks: k, from 0 (the head alone) to B; -1 takes all parameters.
      train_images: float [N, H, W, 3] in [0, 1], of the network's size.
      train_labels: int [N].
      query_images: [Q, H, W, 3].
      query_labels: int [Q].
      damping: added to G's diagonal.
      tolerance: length of a residual relative to the gradient it is solved for.
      max_iterations: of conjugate gradients, for each batch of queries.
      batch_size: images in one pass; scores do not depend on it, but for rounding.
      query_batch_size: right sides that are solved for together; each takes four float64 vectors of the
        trained parameters on the host, and two float32 ones on the device.
      tell: takes one line with the size of the problem, and after the first batch one with the time it took.

    Returns:
      float64 [Q, N]; larger is more helpful.

    Raises:
      ValueError: k out of range, labels that do not match the images or classes, damping not above 0.
      RuntimeError: conjugate gradients do not reach `tolerance`.
    """
    chex.assert_rank([train_images, query_images], 4)
    chex.assert_type([train_images, query_images], float)
    start = _first_trained_block(model.module, num_unfrozen_blocks)
    if not (np.isfinite(damping) and damping > 0):
        raise ValueError(f"damping is {damping}: G is singular, so it needs a finite one above 0")
    _check("train", train_images, train_labels, model.module.num_classes)
    _check("query", query_images, query_labels, model.module.num_classes)
    network = _Network(model.module.clone(dtype=jnp.float32), start)
    trained, frozen = _split(network, model.variables)
    flat = ravel_pytree(trained)[0]
    # float32 is meant in earnest: accelerators round the factors of their products otherwise.
    with jax.default_matmul_precision("highest"):
        train, queries = (
            _batches(network, model.variables, images, labels, batch_size)
            for images, labels in ((train_images, train_labels), (query_images, query_labels))
        )
        few, many, transposed = queries, train, False
        if len(train_labels) < len(query_labels):
            few, many, transposed = train, queries, True
        num_few, num_many = sorted((len(train_labels), len(query_labels)))
        query_batch_size = min(query_batch_size, num_few)
        tell(
            f"influence on {len(query_labels):,} queries of {len(train_labels):,} training images, "
            f"{flat.size:,} parameters: {-(-num_few // query_batch_size)} systems of {query_batch_size} "
            "right sides"
        )

        def operator(vectors):
            products = _gauss_newton_products(network, trained, frozen, train, jnp.float32(vectors))
            return np.asarray(products, np.float64) + damping * vectors

        scores = np.empty((num_few, num_many))
        for i in range(0, num_few, query_batch_size):
            begin = time.perf_counter()
            chosen = np.arange(i, i + query_batch_size) % num_few  # one shape, one program
            images = jax.tree.map(lambda x, chosen=chosen: x.reshape(-1, *x.shape[2:])[chosen], few)
            targets = np.asarray(_gradients(network, trained, frozen, images), np.float64)
            solution = krylov.conjugate_gradients(
                operator, targets, tolerance=tolerance, max_iterations=max_iterations
            )
            products = _project(network, trained, frozen, many, jnp.float32(solution))
            scores[i : i + query_batch_size] = np.asarray(products)[: num_few - i, :num_many]
            if i == 0:
                tell(f"the first of them took {time.perf_counter() - begin:.1f} s, compilation included")
    return np.ascontiguousarray(scores.T) if transposed else scores


def _check(part: str, images: Any, labels: Any, num_classes: int) -> None:
    labels = np.asarray(labels)
    if labels.shape != images.shape[:1] or not len(labels) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{part}_labels are {labels.dtype} {labels.shape}: pass one integer for each of the "
            f"{len(images)} images, of which there must be some"
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"{part}_labels run from {labels.min()} to {labels.max()}: the network has the classes "
            f"0 to {num_classes - 1}"
        )


def _first_trained_block(module: Any, num_unfrozen_blocks: int) -> int | None:
    """Seam B - k; None when all is trained."""
    if not -1 <= num_unfrozen_blocks <= module.num_blocks:
        raise ValueError(
            f"num_unfrozen_blocks is {num_unfrozen_blocks}: this network has {module.num_blocks} blocks "
            "(-1 takes all parameters)"
        )
    return None if num_unfrozen_blocks == -1 else module.num_blocks - num_unfrozen_blocks


def _split(network: _Network, variables: Any) -> tuple[Any, Any]:
    """The trained parameters, and the other variables that the network reads behind its seam."""
    names = set(variables["params"])
    if network.start is not None:
        names = {*network.module.block_names[network.start :], "fc"}
    trained = {name: leaf for name, leaf in variables["params"].items() if name in names}
    return trained, {"batch_stats": variables["batch_stats"]}


class _Batch(NamedTuple):
    """Images at the seam, in batches; `mask` is 0 for the last one's padding."""

    inputs: jax.Array  # [batches, batch, ...]
    labels: jax.Array  # int32 [batches, batch]
    mask: jax.Array  # float32 [batches, batch]


def _batches(network: _Network, variables: Any, images: Any, labels: Any, batch_size: int) -> _Batch:
    batch_size = min(batch_size, len(labels))
    batches = []
    for i in range(0, len(labels), batch_size):
        piece = (jnp.asarray(images[i : i + batch_size]), jnp.asarray(labels[i : i + batch_size], jnp.int32))
        (x, y), mask = parallel.pad(piece, batch_size)
        batches.append(_Batch(_enter(network, variables, x), jnp.asarray(y), jnp.asarray(mask)))
    return jax.tree.map(lambda *x: jnp.stack(x), *batches)


@partial(jax.jit, static_argnums=0)
def _enter(network, variables, images):
    return images if network.start is None else network.module.apply(variables, images, stop=network.start)


def _logits_and_transposes(network, trained, frozen, inputs):
    """Logits [n, C], and Jᵀ and J as functions of float32 [n, C] and of a flat vector of parameters."""
    flat, unravel = ravel_pytree(trained)

    def apply(flat):
        return network.module.apply({"params": unravel(flat), **frozen}, inputs, start=network.start)

    logits, backward = jax.vjp(apply, flat)
    _, forward = jax.vjp(lambda cotangent: backward(cotangent)[0], jnp.zeros_like(logits))
    return logits, lambda cotangent: backward(cotangent)[0], lambda vector: forward(vector)[0]


def _residuals(logits, labels):
    """p - onehot, without the cancellation of 1 - p where p is close to 1."""
    onehot = jax.nn.one_hot(labels, logits.shape[-1])
    others = jax.nn.softmax(logits) * (1 - onehot)
    return others - onehot * jnp.sum(others, axis=1, keepdims=True)


@partial(jax.jit, static_argnums=0)
def _gauss_newton_products(network, trained, frozen, batches, vectors):
    """G times vectors [m, p]."""

    def add(total, batch):
        logits, transpose, product = _logits_and_transposes(network, trained, frozen, batch.inputs)
        probabilities = jax.nn.softmax(logits)
        top = jnp.argmax(logits, axis=1, keepdims=True)

        def multiply(vector):
            tangent = product(vector)
            # diag(p) - p pᵀ does not see what classes share: see `head_hessian.hessian_product`.
            tangent -= jnp.take_along_axis(tangent, top, axis=1)
            tangent -= jnp.sum(probabilities * tangent, axis=1, keepdims=True)
            return transpose(batch.mask[:, None] * probabilities * tangent)

        return total + jax.lax.map(multiply, vectors), None

    return jax.lax.scan(add, jnp.zeros_like(vectors), batches)[0]


@partial(jax.jit, static_argnums=0)
def _gradients(network, trained, frozen, images):
    """Gradients [N, p] of the images' losses, of a _Batch without its batches."""

    def gradient(image):
        inputs, label = (x[None] for x in image)
        logits, transpose, _ = _logits_and_transposes(network, trained, frozen, inputs)
        return transpose(_residuals(logits, label))

    return jax.lax.map(gradient, (images.inputs, images.labels))


@partial(jax.jit, static_argnums=0)
def _project(network, trained, frozen, batches, vectors):
    """Inner products [m, images] of vectors [m, p] with the gradients of the images, padding included."""

    def project(batch):
        logits, _, product = _logits_and_transposes(network, trained, frozen, batch.inputs)
        residuals = _residuals(logits, batch.labels)
        return jax.lax.map(lambda vector: jnp.sum(residuals * product(vector), axis=1), vectors)

    products = jax.lax.map(project, batches)
    return products.swapaxes(0, 1).reshape(len(vectors), -1)
