"""Analyses that compare models on a dataset, as sections of a page."""

from __future__ import annotations

from advtransfer.explain.case import Case, Subject, brief, owns_classes
from advtransfer.explain.influence import influence_cost, influence_section
from advtransfer.explain.options import ANALYSES, Interpretation
from advtransfer.explain.saliency import saliency_section
from advtransfer.explain.shape import shape_section
from advtransfer.explain.visualisation import visualisation_section
from advtransfer.report.sections import Section
from advtransfer.transfer import Recipe

__all__ = [
    "ANALYSES",
    "Case",
    "Interpretation",
    "Subject",
    "brief",
    "explain",
    "influence_cost",
    "owns_classes",
]


def explain(analysis: str, case: Case, recipe: Recipe = Recipe()) -> Section:
    """The section of one of `ANALYSES`; with `recipe` influence trains a head where a network has none.

    Raises:
      ValueError: the analysis cannot be made of these networks, images and settings.
    """
    if analysis == "influence":
        return influence_section(case, recipe)
    sections = {"saliency": saliency_section, "visualisation": visualisation_section, "shape": shape_section}
    return sections[analysis](case)
