"""The threat models by name, in the order of pages; "none" is natural training."""

SYMBOLS = {"none": "natural", "l2": "ℓ2", "linf": "ℓ∞"}
NORMS = tuple(SYMBOLS)
