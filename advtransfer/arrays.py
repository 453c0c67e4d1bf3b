"""Names for annotations: which arrays a function takes. Their shapes and dtypes stand beside them (jaxtyping)."""

import jax
import numpy as np
from jaxtyping import PyTree

AnyArray = jax.Array | np.ndarray
Variables = dict[str, PyTree]  # of a network: "params" and "batch_stats"
