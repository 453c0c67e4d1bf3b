"""Types for annotations of arrays, to which jaxtyping adds shapes and dtypes, and how examples broadcast."""

import jax
import numpy as np
from jaxtyping import PyTree, Shaped

AnyArray = jax.Array | np.ndarray
Variables = dict[str, PyTree]  # of a network: "params" and "batch_stats"


def per_example(values: Shaped[AnyArray, " n"], like: Shaped[AnyArray, "n ..."]) -> Shaped[AnyArray, "n ..."]:
    """One value for each example, shaped to broadcast against an array [N, ...]."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))
