"""Linear systems and eigenpairs of a symmetric operator that is known by its products alone, in float64.

Vectors are the rows of matrices [m, size]; an operator maps [m, size] to [m, size].
"""

from __future__ import annotations

from collections.abc import Callable

import chex
import numpy as np
import scipy
from jaxtyping import Float64

Operator = Callable[[Float64[np.ndarray, "m size"]], Float64[np.ndarray, "m size"]]

_NEGLIGIBLE = 1e-13  # of the largest eigenvalue, or of a unit vector: what rounding leaves
# A residual bounds the distance to some eigenvalue; it does not show that none above is missing.
_MARGIN = 100
_GROWTH = 1.25  # of the Krylov space between two looks at its Ritz values


def conjugate_gradients(
    operator: Operator,
    targets: Float64[np.ndarray, "m size"],
    *,
    precondition: Operator = lambda vectors: vectors,
    tolerance: float,
    max_iterations: int,
) -> Float64[np.ndarray, "m size"]:
    """Solves a positive definite system for every row of targets [m, size], each by its own recurrence.

    (Hestenes and Stiefel, 1952; preconditioned as in Saad, 2003, algorithm 9.1.) Ends when no row's residual
    is longer than `tolerance` times its target, and computes the residuals anew to make sure of it.

    Raises:
      RuntimeError: that is not reached in `max_iterations`, or not at all for the operator's own rounding.
    """
    chex.assert_rank(targets, 2)
    chex.assert_type(targets, float)
    solution = np.zeros_like(targets)
    residual = targets.copy()
    bound = tolerance * np.linalg.norm(targets, axis=1)
    direction = precondition(residual).copy()
    descent = _dot(residual, direction)
    for iterations in range(max_iterations + 1):
        active = ~(np.linalg.norm(residual, axis=1) <= bound)  # NaN too
        if not active.any() or iterations == max_iterations:
            break
        product = operator(direction)
        step = _divide(descent, _dot(direction, product), active)[:, None]
        solution += step * direction
        residual -= step * product
        image = precondition(residual)
        before, descent = descent, _dot(residual, image)
        direction *= _divide(descent, before, active)[:, None]
        direction += image
    true = np.linalg.norm(targets - operator(solution), axis=1)
    if not np.all(true <= 2 * bound):  # what the recurrence took for a residual may have drifted
        worst = np.max(_divide(true * tolerance, bound, bound > 0))
        raise RuntimeError(
            f"conjugate gradients end at a relative residual of {worst:.1e}, not {tolerance:.1e}, after "
            f"{iterations} iterations of {max_iterations}: raise damping or tolerance"
        )
    return solution


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("mp,mp->m", a, b)


def _divide(a: np.ndarray, b: np.ndarray, where: np.ndarray) -> np.ndarray:
    """a / b, and 0 elsewhere."""
    return np.divide(a, b, out=np.zeros_like(a), where=where & (b != 0))


def leading_eigenpairs(
    operator: Operator,
    size: int,
    *,
    rcond: float,
    max_vectors: int,
    block_size: int = 8,
    tolerance: float = 1e-10,
    seed: int = 0,
) -> tuple[Float64[np.ndarray, " k"], Float64[np.ndarray, "k size"]]:
    """All eigenvalues of a positive semi-definite operator above `rcond` times the largest, and vectors.

    Block Lanczos with full reorthogonalisation (Golub and Underwood, 1977; Saad, 2011, section 6.5) from
    random blocks. A pair counts when its residual is below `tolerance` times the largest eigenvalue; the
    space grows until a Ritz value is settled to lie below the cut-off. What was found is then projected out
    and the search repeated from a fresh block until it finds nothing more: that brings an eigenvalue's
    further copies to light, and anything that the first search might have stepped over.

    Args:
      max_vectors: that may be stored: of one search's Krylov space and of those found together.

    Returns:
      Eigenvalues [k], descending, and orthonormal vectors [k, size].

    Raises:
      RuntimeError: `max_vectors` are not enough.
    """
    rng = np.random.default_rng(seed)
    basis = np.empty((max_vectors, size))  # memory is taken as rows are written
    values = np.empty(0)
    while len(values) < size:
        start = rng.standard_normal((min(block_size, size - len(values)), size))
        largest = values.max(initial=0.0)
        found, vectors = _search(operator, start, basis, len(values), largest, rcond, tolerance)
        if not len(found):
            break
        basis[len(values) : len(values) + len(found)] = vectors
        values = np.concatenate([values, found])
    order = np.argsort(-values, kind="stable")
    order = order[values[order] > rcond * values.max(initial=0.0)]
    return values[order], basis[order]


def _search(operator, start, basis, num_locked, largest, rcond, tolerance):
    """Converged pairs above the cut-off in the complement of the first rows of `basis`.

    The Krylov space of the block `start` is built in the rows behind them.
    """
    size = len(basis) - num_locked
    projected = np.zeros((size, size))  # the operator in the Krylov space
    locked, krylov = basis[:num_locked], basis[num_locked:]
    start = start - (start @ locked.T) @ locked
    block, used, next_look = _orthonormalise(start, locked, 1.0)[0], 0, 0
    while True:
        first, used = used, used + len(block)
        if used > size:
            raise RuntimeError(
                f"{len(basis)} vectors, for which there is memory, do not settle the eigenvalues above "
                f"{rcond:g} of the largest: raise rcond"
            )
        krylov[first:used] = block
        image = operator(block)
        stored = basis[: num_locked + used]
        coefficients = image @ stored.T
        image = image - coefficients @ stored
        coefficients = coefficients[:, num_locked:]
        projected[first:used, :used], projected[:used, first:used] = coefficients, coefficients.T
        scale = max(largest, np.abs(coefficients).max())
        block, coupling = _orthonormalise(image, stored, scale)
        if used < next_look and len(block):
            continue
        next_look = _GROWTH * used
        ritz, mixing = scipy.linalg.eigh(projected[:used, :used])
        ritz, mixing = ritz[::-1], mixing[:, ::-1]
        errors = np.linalg.norm(coupling.T @ mixing[first:used], axis=0)
        top = max(largest, ritz[0])
        num_above = int(np.sum(ritz > rcond * top))
        settled = not len(block) or (
            num_above < used
            and np.all(errors[:num_above] <= tolerance * top)
            and errors[num_above] <= max(tolerance * top, (rcond * top - ritz[num_above]) / _MARGIN)
        )
        if settled:
            return ritz[:num_above], mixing[:, :num_above].T @ krylov[:used]


def _orthonormalise(vectors, against, scale):
    """An orthonormal basis of rows [m, size] that were made orthogonal to `against`, and the rows in it.

    What is negligible to `scale` is dropped, so the basis [k, size] may have fewer rows; the second result is
    [m, k].
    """
    _, lengths, basis = scipy.linalg.svd(vectors, full_matrices=False)
    basis = basis[lengths > _NEGLIGIBLE * scale * np.sqrt(vectors.shape[1])]
    basis -= (basis @ against.T) @ against  # in unit vectors shows what rounding left of these
    basis = scipy.linalg.qr(basis.T, mode="economic")[0].T if len(basis) else basis
    return basis, vectors @ basis.T
