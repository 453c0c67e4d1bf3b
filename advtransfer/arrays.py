"""Types for annotations of arrays and their containers; jaxtyping adds shapes and dtypes."""

import jax
import numpy as np
from jaxtyping import PyTree

AnyArray = jax.Array | np.ndarray
Variables = dict[str, PyTree]  # of a network: "params" and "batch_stats"
