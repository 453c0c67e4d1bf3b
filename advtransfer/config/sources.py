"""Sources by name: what an experiment's argument and config.study.sources say of the attack in training."""

from __future__ import annotations

import math

from ml_collections import ConfigDict


def parse_source(text: str) -> tuple[str, float]:
    """The threat model and its radius in pixel units: ("none", 0.0) for a natural source.

    Args:
      text: natural; NORM:EPS in pixel units (l2:0.5, linf:0.03); or, as published models are named, l2_3 in
        pixel units and linf_4 in 255ths of them.

    Raises:
      ValueError: anything else.
    """
    if text == "natural":
        return "none", 0.0
    separator = ":" if ":" in text else "_"
    norm, _, radius = text.partition(separator)
    unit = 255 if (norm, separator) == ("linf", "_") else 1
    try:
        eps = float(radius) / unit
    except ValueError:
        eps = 0.0
    if norm not in ("l2", "linf") or not 0 < eps < math.inf:
        raise ValueError(
            f"{text!r}: write natural, NORM:EPS with a positive number of pixel units, such as l2:0.5, or "
            "l2_3, linf_4 (255ths) and the like"
        )
    return norm, eps


def set_source(config: ConfigDict, text: str) -> None:
    """Makes config.train train this source, and config.evaluate attack a robust one as in its training.

    Raises:
      ValueError: as `parse_source`.
    """
    config.train.norm, config.train.eps = parse_source(text)
    if config.train.eps:
        config.evaluate.norm, config.evaluate.eps = config.train.norm, config.train.eps
