"""The threat models by name, in the order of pages; "none" is natural training."""

SYMBOLS = {"none": "natural", "l2": "ℓ2", "linf": "ℓ∞"}
NORMS = tuple(SYMBOLS)


def check_radius(norm: str, eps: float) -> None:
    """Raises a ValueError for an ℓ∞ radius that is meant in 255ths, as no image is outside it."""
    if norm == "linf" and eps >= 1:
        raise ValueError(
            f"eps={eps:g} of norm=linf allows every image, as pixels are in [0, 1]: did you mean "
            f"{eps:g}/255, {eps / 255:.4f}?"
        )
