"""What networks look at, as sections of a page: analyses of models on data, side by side."""

from advtransfer.explain.options import ANALYSES, Interpretation

__all__ = ["ANALYSES", "Interpretation"]
