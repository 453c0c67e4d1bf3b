"""Gradients and Hessian of softmax cross-entropy in the last layer, in closed form and float64.

For features f [D], f~ = (f, 1) and p the softmax of kernelᵀ f + bias, an example's gradient in (kernel, bias)
is f~ ⊗ (p - onehot) and its Hessian f~ f~ᵀ ⊗ S with S = diag(p) - p pᵀ (Böhning, 1992, equations 3.3, 3.4).
A vector of the parameters' space is an array [C, r], a stack of them [m, C, r]: r is D + 1, or less where the
features of few images span less (`Examples`).

Both annihilate, or are orthogonal to, what is the same for all classes, because p - onehot and the rows of S
sum to zero. The dense form leaves the last class out for that.
"""

from __future__ import annotations

from typing import NamedTuple

import chex
import numpy as np
import scipy
from jaxtyping import Float64, Integer, Real

PANEL = 2048  # columns that are factorised at a time
_BLOCK = 1024  # examples that are projected on at a time


class Examples(NamedTuple):
    """What is needed of a set of images, float64."""

    features: Float64[np.ndarray, "n r"]  # f~ in an orthonormal basis of what the training images' f~ span
    residuals: Float64[np.ndarray, "n c"]  # p - onehot
    probabilities: Float64[np.ndarray, "n c"]  # p
    complements: Float64[np.ndarray, "n c"]  # 1 - p without its cancellation where p is close to 1


def make_examples(
    features: Real[np.ndarray, "n d"],
    labels: Integer[np.ndarray, " n"],
    kernel: Real[np.ndarray, "d c"],
    bias: Real[np.ndarray, " c"],
    basis: Float64[np.ndarray, "d+1 r"] | None,
) -> Examples:
    """Examples of features [N, D] and labels [N] under a head [D, C], [C].

    `basis` [D + 1, r] holds orthonormal columns, None the identity. Features may lose what lies outside of
    it: H maps its span to itself, so that part meets no training image's gradient in a score.
    """
    chex.assert_rank([features, labels, kernel, bias], [2, 1, 2, 1])
    chex.assert_equal_shape_prefix([features, labels], 1)
    chex.assert_shape(kernel, (features.shape[1], None))
    chex.assert_shape(bias, kernel.shape[1:])
    chex.assert_type(labels, int)
    if basis is not None:
        chex.assert_shape(basis, (features.shape[1] + 1, None))
    features = np.concatenate([features, np.ones((len(features), 1))], axis=1, dtype=np.float64)
    logits = features @ np.concatenate([kernel, bias[None]]).astype(np.float64)
    top = np.argmax(logits, axis=1)
    rows = np.arange(len(features))
    odds = np.exp(logits - logits[rows, top][:, None])  # to the likeliest class
    total = odds.sum(axis=1)
    probabilities = odds / total[:, None]
    complements = 1 - probabilities
    odds[rows, top] = 0
    complements[rows, top] = odds.sum(axis=1) / total
    residuals = probabilities.copy()
    residuals[rows, labels] = -complements[rows, labels]
    if basis is not None:
        features = features @ basis
    return Examples(features, residuals, probabilities, complements)


def basis_of_few(features: Real[np.ndarray, "n d"]) -> Float64[np.ndarray, "d+1 n"] | None:
    """An orthonormal basis [D + 1, n] of a space that holds the f~ of features [n, D]; None if n > D."""
    chex.assert_rank(features, 2)
    if len(features) > features.shape[1]:
        return None
    extended = np.concatenate([features, np.ones((len(features), 1))], axis=1, dtype=np.float64)
    return scipy.linalg.qr(extended.T, mode="economic", overwrite_a=True)[0]


def gradients(examples: Examples) -> Float64[np.ndarray, "n c r"]:
    """Gradients of the examples' losses, [N, C, r]."""
    return examples.residuals[:, :, None] * examples.features[:, None, :]


def project(vectors: Float64[np.ndarray, "m c r"], examples: Examples) -> Float64[np.ndarray, "m n"]:
    """Inner products [m, N] of vectors [m, C, r] with the examples' gradients, which are not formed.

    Vectors of fewer classes meet the gradients in those alone.
    """
    chex.assert_shape(vectors, (None, None, examples.features.shape[1]))
    m, num_classes, _ = vectors.shape
    flat = vectors.reshape(m * num_classes, -1)
    products = np.empty((m, len(examples.features)))
    for i in range(0, len(examples.features), _BLOCK):
        block = slice(i, i + _BLOCK)
        logits = (flat @ examples.features[block].T).reshape(m, num_classes, -1)
        residuals = examples.residuals[block, :num_classes].T
        products[:, block] = np.einsum("mcn,cn->mn", logits, residuals)
    return products


def hessian_product(vectors: Float64[np.ndarray, "m c r"], train: Examples) -> Float64[np.ndarray, "m c r"]:
    """H times vectors [m, C, r], without forming H."""
    chex.assert_shape(vectors, (None, train.residuals.shape[1], train.features.shape[1]))
    m, num_classes, width = vectors.shape
    flat = vectors.reshape(m * num_classes, width)
    logits = (flat @ train.features.T).reshape(m, num_classes, -1)
    # S does not see what all classes share: without the likeliest class's share, S of a confident
    # prediction is not the difference of two large numbers.
    top = np.argmax(train.probabilities, axis=1)[None, None]
    logits -= np.take_along_axis(logits, top, axis=1)
    weights = train.probabilities.T
    logits -= np.einsum("mcn,cn->mn", logits, weights)[:, None]
    logits *= weights
    return (logits.reshape(m * num_classes, -1) @ train.features).reshape(vectors.shape)


def hessian_diagonal(train: Examples) -> Float64[np.ndarray, "c r"]:
    """The diagonal of H, [C, r]."""
    return (train.probabilities * train.complements).T @ train.features**2


def dense_hessian(train: Examples, damping: float) -> Float64[np.ndarray, "q q"]:
    """H + damping in the coordinates of all classes but the last: [q, q] in Fortran order, q = (C - 1) r.

    Vectors that sum to zero over the classes are spanned by e_c - 1 / C, c < C. In these coordinates H is its
    own first C - 1 classes, a gradient its first C - 1 classes, and the identity I - 1 1ᵀ / C. A block of two
    classes is a Gram matrix of weighted features, which takes half of a product. Blocks above the diagonal
    are left zero.
    """
    num_classes, width = train.probabilities.shape[1], train.features.shape[1]
    matrix = np.zeros(((num_classes - 1) * width,) * 2, order="F")
    for row in range(num_classes - 1):
        for column in range(row + 1):
            other = train.complements if row == column else train.probabilities
            weighted = train.features * np.sqrt(train.probabilities[:, row] * other[:, column])[:, None]
            half = scipy.linalg.blas.dsyrk(1.0, weighted.T, lower=1)
            block = np.tril(half) + np.tril(half, -1).T
            if row != column:
                block *= -1
            block[np.diag_indices(width)] += damping * ((row == column) - 1 / num_classes)
            matrix[row * width : (row + 1) * width, column * width : (column + 1) * width] = block
    return matrix


def factorise(matrix: Float64[np.ndarray, "q q"], *, panel: int = PANEL) -> Float64[np.ndarray, "q q"]:
    """The Cholesky factor, in the lower triangle of the same memory.

    A panel of columns at a time (Golub and Van Loan, 2013, algorithm 4.2.4, in blocks): OpenBLAS's `dpotrf`
    crashes on 16,384 columns and more where it has AVX-512 and two threads (0.3.30, 0.3.31).

    Raises:
      ValueError: the matrix is not positive definite to working precision.
    """
    chex.assert_shape(matrix, matrix.shape[:1] * 2)
    for start in range(0, len(matrix), panel):
        stop = min(start + panel, len(matrix))
        factor, info = scipy.linalg.lapack.dpotrf(
            matrix[start:stop, start:stop], lower=1, clean=0, overwrite_a=1
        )
        if info != 0:
            raise ValueError("H with its damping is singular to float64: choose a larger damping")
        matrix[start:stop, start:stop] = factor
        below = scipy.linalg.blas.dtrsm(1.0, factor, matrix[stop:, start:stop], side=1, lower=1, trans_a=1)
        matrix[stop:, start:stop] = below
        for i in range(stop, len(matrix), panel):
            rows = below[i - stop :]
            matrix[i:, i : i + panel] -= rows @ rows[:panel].T
    return matrix


def solve(
    factor: Float64[np.ndarray, "q q"], vectors: Float64[np.ndarray, "m c r"]
) -> Float64[np.ndarray, "m c r"]:
    """Solves for right sides [m, C - 1, r], which are overwritten."""
    chex.assert_rank(vectors, 3)
    chex.assert_shape(factor, (vectors[0].size,) * 2)
    flat = vectors.reshape(len(vectors), -1).T
    return scipy.linalg.lapack.dpotrs(factor, flat, lower=1, overwrite_b=1)[0].T.reshape(vectors.shape)
