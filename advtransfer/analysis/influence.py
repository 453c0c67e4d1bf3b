"""Influence of training images on the loss of other images, through the last layer.

Koh and Liang, 2017 (arXiv:1703.04730), equation 2, as Utrera et al., 2021, section 5, use it: gradients and
Hessian are those of the head alone, and the Hessian is summed over the training images.
"""

from __future__ import annotations

import difflib
import logging
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import psutil
import scipy
from jaxtyping import Float64, Integer, Real

from advtransfer.analysis import head_hessian, krylov
from advtransfer.analysis.head_hessian import Examples
from advtransfer.arrays import AnyArray

_log = logging.getLogger(__name__)

RCOND = 0.05  # Utrera et al., 2021
WEIGHT_DECAY = 5e-4  # of their fine-tuning, per training image

# What the cost of an iterative solver is reckoned with: vectors of a Krylov space, iterations of a solution.
_TYPICAL_VECTORS, _TYPICAL_ITERATIONS = 500, 100
_MAX_ITERATIONS = 2000
_BLOCK = 256  # right sides solved for at a time, fewer where their copies would take more than
_BLOCK_BYTES = 2**30
_SATURATED = 1e-12  # 1 - p of a label, below which nothing is left of its gradient beside any damping
_PANELS = 3  # copies of a panel of columns that factorising takes
_COPIES = 8  # of a block that a solver makes


class Cost(NamedTuple):
    """What a solver takes; `flops` of the iterative ones are for a typical number of iterations."""

    num_parameters: int  # (D + 1) C
    flops: float
    num_bytes: int  # at the peak, without the arguments


class _Options(NamedTuple):
    damping: float
    rcond: float
    tolerance: float
    num_bytes: int  # that may be taken
    tell: Callable[[str], None]


def last_layer_scores(
    train_features: Real[AnyArray, "n d"],
    train_labels: Integer[AnyArray, " n"],
    query_features: Real[AnyArray, "q d"],
    query_labels: Integer[AnyArray, " q"],
    kernel: Real[AnyArray, "d c"],
    bias: Real[AnyArray, " c"],
    *,
    solver: str = "damped",
    damping: float | None = None,
    rcond: float = RCOND,
    tolerance: float = 1e-8,
    tell: Callable[[str], None] = _log.info,
) -> Float64[np.ndarray, "q n"]:
    """How much each training image helps each query: ∇L(query)ᵀ H⁺ ∇L(train).

    L is softmax cross-entropy as a function of the head's kernel and bias, H the sum of its Hessians over the
    training images, plus `damping` times the identity. To first order a query's loss rises by its score when
    the training image is left out of a training that minimises Σ L + damping / 2 ‖(kernel, bias)‖².

    H alone is singular, because it does not see what all classes share, so `damped` and `cg` need damping.
    `damped` factorises H, leaving the last class out (exact; 2.7 GB for 2,048 features and 10 classes).
    `truncated` is the pseudo-inverse of Utrera et al. (2021, section 5): eigenvalues of H above `rcond` times
    its largest, by block Lanczos on products with H. `cg` solves by preconditioned conjugate gradients and
    stores no more than a few vectors of parameters at a time. With fewer images than features all three work
    in the space that these images span, which changes no score.

    Args:
      train_features: [N, D], what enters the head.
      train_labels: int [N], in 0 ... C - 1.
      query_features: [Q, D].
      query_labels: int [Q].
      kernel: [D, C].
      bias: [C].
      solver: "damped", "truncated" or "cg".
      damping: added to H's diagonal. None: 0 for `truncated`; for the others N times 5e-4, the weight decay
        of the paper's fine-tuning in a loss that is summed.
      rcond: cut-off of `truncated` relative to H's largest eigenvalue, between 0 and 1; others do not use it.
      tolerance: of `cg`: length of a residual relative to the training (or query) gradient it is solved for.
      tell: takes one line with the expected time and memory before the work starts, and what was found; such
        as `print`. By default they go to the log, as information.

    Returns:
      float64 [Q, N]; larger is more helpful, negative harmful.

    Raises:
      ValueError: shapes that do not match, labels out of range, features that are not finite, an unknown
        solver, damping or rcond out of range, a problem too large for the memory that is free, a head so
        certain of all labels that no gradient is left.
      RuntimeError: an iterative solver does not converge.
    """
    arrays = _checked(train_features, train_labels, query_features, query_labels, kernel, bias)
    train_features, train_labels, query_features, query_labels, kernel, bias = arrays
    if solver not in SOLVERS:
        near = difflib.get_close_matches(str(solver), SOLVERS, n=1, cutoff=0.4)
        raise ValueError(f"unknown solver {solver!r}; nearest: {', '.join(near or SOLVERS)}")
    num_train, num_queries = len(train_features), len(query_features)
    if damping is None:
        damping = 0.0 if solver == "truncated" else WEIGHT_DECAY * num_train
    _check_numbers(solver, damping, rcond)
    price = cost(num_train, num_queries, *kernel.shape, solver=solver)
    free = psutil.virtual_memory().available
    tell(
        f"influence on {num_queries:,} queries of {num_train:,} training images, solver {solver}, "
        f"{price.num_parameters:,} parameters: about {expected_seconds(price):.0f} s and "
        f"{price.num_bytes / 1e9:.1f} GB ({free / 1e9:.1f} GB are free)"
    )
    if price.num_bytes > free:
        other = "score fewer images at a time" if solver == "cg" else "use solver='cg'"
        raise ValueError(f"solver={solver!r} does not fit into the memory that is free: {other}")
    basis = head_hessian.basis_of_few(train_features)
    train = head_hessian.make_examples(train_features, train_labels, kernel, bias, basis)
    queries = head_hessian.make_examples(query_features, query_labels, kernel, bias, basis)
    _check_gradients({"training images": train, "queries": queries})
    options = _Options(damping, rcond, tolerance, free - price.num_bytes, tell)
    return SOLVERS[solver](train, queries, options)


def cost(num_train: int, num_queries: int, num_features: int, num_classes: int, *, solver: str) -> Cost:
    """Operations and memory of `last_layer_scores`."""
    width = min(num_train, num_features + 1)
    size = width * num_classes
    few, many = sorted((num_train, num_queries))
    product = 4 * num_train * size  # of H and a vector
    block = 8 * _COPIES * size * _block(few, size)
    examples = 8 * (num_train + num_queries) * (width + num_features + 1 + 4 * num_classes)
    scores = 8 * num_train * num_queries
    flops = 2 * few * many * size
    if solver == "damped":
        size -= width
        build = num_train * width * size * num_classes / 2
        flops += build + size**3 / 3 + 2 * few * size**2
        panels = 8 * _PANELS * size * head_hessian.PANEL if size > head_hessian.PANEL else 0
        work = 8 * size**2 + max(0, panels - block)  # factorised first, solved for the block then
    elif solver == "truncated":
        vectors = min(_TYPICAL_VECTORS, size)
        flops = vectors * (product + 4 * vectors * size + 2 * (num_train + num_queries) * size)
        flops += 2 * vectors * num_train * num_queries
        work = 16 * vectors * (size + num_train + num_queries)
    else:
        flops += few * _TYPICAL_ITERATIONS * product
        work = 8 * num_train * width + 16 * width**2
    return Cost(num_classes * (num_features + 1), flops, int(examples + 2 * scores + work + block))


def _block(num_vectors: int, size: int) -> int:
    """How many right sides of `size` numbers are solved for at a time."""
    return max(1, min(_BLOCK, num_vectors, _BLOCK_BYTES // (8 * _COPIES * size)))


def expected_seconds(price: Cost) -> float:
    """At the rate of a matrix product of this machine, now."""
    matrix = np.ones((1024, 1024))
    begin = time.perf_counter()
    matrix @ matrix
    return price.flops * (time.perf_counter() - begin) / (2 * 1024**3)


def _damped(train: Examples, queries: Examples, options: _Options) -> np.ndarray:
    factor = head_hessian.factorise(head_hessian.dense_hessian(train, options.damping))

    def solve(gradients):
        return head_hessian.solve(factor, np.ascontiguousarray(gradients[:, :-1]))

    return _scores(train, queries, solve)


def _cg(train: Examples, queries: Examples, options: _Options) -> np.ndarray:
    # In the eigenvectors of the features' second moments, which damping does not see, H is nearly diagonal.
    rotation = scipy.linalg.eigh(train.features.T @ train.features, overwrite_a=True)[1]
    train, queries = (x._replace(features=x.features @ rotation) for x in (train, queries))
    diagonal = head_hessian.hessian_diagonal(train) + options.damping
    shape = (-1, *diagonal.shape)

    def operator(vectors):
        product = head_hessian.hessian_product(vectors.reshape(shape), train)
        return product.reshape(vectors.shape) + options.damping * vectors

    def precondition(vectors):
        vectors = vectors.reshape(shape) / diagonal
        vectors -= vectors.mean(axis=1, keepdims=True)  # where no gradient lies, H is its damping alone
        return vectors.reshape(len(vectors), -1)

    def solve(gradients):
        flat = gradients.reshape(len(gradients), -1)
        solution = krylov.conjugate_gradients(
            operator,
            flat,
            precondition=precondition,
            tolerance=options.tolerance,
            max_iterations=_MAX_ITERATIONS,
        )
        return solution.reshape(gradients.shape)

    return _scores(train, queries, solve)


def _scores(train: Examples, queries: Examples, solve: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Solves for the gradients of the smaller set, block by block, and projects on those of the other."""
    if len(queries.features) < len(train.features):
        few, many, transposed = queries, train, False
    else:
        few, many, transposed = train, queries, True
    size = few.features.shape[1] * few.residuals.shape[1]
    scores = np.empty((len(few.features), len(many.features)))
    step = _block(len(few.features), size)
    for i in range(0, len(scores), step):
        block = Examples(*(x[i : i + step] for x in few))
        scores[i : i + step] = head_hessian.project(solve(head_hessian.gradients(block)), many)
    return np.ascontiguousarray(scores.T) if transposed else scores


def _truncated(train: Examples, queries: Examples, options: _Options) -> np.ndarray:
    shape = (-1, train.residuals.shape[1], train.features.shape[1])
    size = shape[1] * shape[2]

    def operator(vectors):
        return head_hessian.hessian_product(vectors.reshape(shape), train).reshape(vectors.shape)

    # One more vector takes its own memory, and the operator among them at most three times as much again.
    max_vectors = min(size, _TYPICAL_VECTORS + int(options.num_bytes // (32 * size)))
    values, vectors = krylov.leading_eigenpairs(operator, size, rcond=options.rcond, max_vectors=max_vectors)
    options.tell(f"{len(values)} eigenvalues of H lie above {options.rcond:g} of the largest")
    vectors = vectors.reshape(shape)
    weights = 1 / (values + options.damping)
    return (head_hessian.project(vectors, queries).T * weights) @ head_hessian.project(vectors, train)


SOLVERS = {"damped": _damped, "truncated": _truncated, "cg": _cg}


def _checked(*arrays: AnyArray) -> tuple[np.ndarray, ...]:
    names = ("train_features", "train_labels", "query_features", "query_labels", "kernel", "bias")
    found = dict(zip(names, map(np.asarray, arrays), strict=True))
    kernel = found["kernel"]
    if kernel.ndim != 2 or kernel.shape[1] < 2:
        raise ValueError(f"kernel has shape {kernel.shape}: pass [D, C] with two classes or more")
    if kernel.shape[0] == found["bias"].size != kernel.shape[1] == found["train_features"].shape[-1]:
        raise ValueError(f"kernel has shape {kernel.shape}, which is [C, D]: transpose it, kernel.T")
    num_features, num_classes = kernel.shape
    if found["bias"].shape != (num_classes,):
        raise ValueError(
            f"bias has shape {found['bias'].shape}: the kernel's classes ask for ({num_classes},)"
        )
    for part in ("train", "query"):
        features, labels = found[f"{part}_features"], found[f"{part}_labels"]
        if features.ndim != 2 or features.shape[1] != num_features or not len(features):
            raise ValueError(
                f"{part}_features has shape {features.shape}: the kernel asks for [N, {num_features}], N > 0"
            )
        if labels.shape != features.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(
                f"{part}_labels are {labels.dtype} {labels.shape}: pass {len(features)} integers"
            )
        if labels.min() < 0 or labels.max() >= num_classes:
            raise ValueError(
                f"{part}_labels run from {labels.min()} to {labels.max()}: the head has the classes "
                f"0 to {num_classes - 1}"
            )
    for name in ("train_features", "query_features", "kernel", "bias"):
        if not np.all(np.isfinite(found[name])):
            raise ValueError(f"{name} holds NaN or infinity: influence needs finite numbers")
    return tuple(found.values())


def _check_gradients(examples: dict[str, Examples]) -> None:
    for name, found in examples.items():
        if (largest := np.max(np.abs(found.residuals))) < _SATURATED:
            raise ValueError(
                f"the head is certain of the labels of all {name} (1 - p is {largest:.0e} at most), so their "
                "gradients and all scores are zero: train it with more weight decay or for fewer steps"
            )


def _check_numbers(solver: str, damping: float, rcond: float) -> None:
    if not np.isfinite(damping) or damping < 0 or (damping == 0 and solver != "truncated"):
        raise ValueError(
            f"damping is {damping}: H is singular, so solver={solver!r} needs a finite one above 0 "
            "('truncated' takes 0)"
        )
    if solver == "truncated" and not 0 < rcond < 1:
        raise ValueError(f"rcond is {rcond}: pass a number between 0 and 1")
