"""The 16 entry-level categories of Geirhos et al. as outputs of a network trained on ImageNet (ILSVRC 2012).

Outputs are counted as everywhere, in the order of the classes' WordNet names. The grouping is that of
code/helper/human_categories.py in github.com/rgeirhos/texture-vs-shape, the same in bethgelab/model-vs-human:
the leaves below each category in WordNet, without those that the authors left out by hand. Its lists of
WordNet names, looked up in ILSVRC's order, give the same indices as its lists of indices.
"""

from __future__ import annotations


def _outputs(*spans: int | tuple[int, int]) -> tuple[int, ...]:
    """Single outputs, and spans from the first to the last."""
    ends = (span if isinstance(span, tuple) else (span, span) for span in spans)
    return tuple(output for first, last in ends for output in range(first, last + 1))


IMAGENET16: dict[str, tuple[int, ...]] = {
    "airplane": _outputs(404),
    "bear": _outputs((294, 297)),
    "bicycle": _outputs(444, 671),
    "bird": _outputs(8, (10, 16), (18, 20), (22, 24), (80, 83), (87, 96), (98, 100), (127, 133), (135, 145)),
    "boat": _outputs(472, 554, 625, 814, 914),
    "bottle": _outputs(440, 720, 737, 898, 899, 901, 907),
    "car": _outputs(436, 511, 817),
    "cat": _outputs((281, 286)),
    "chair": _outputs(423, 559, 765, 857),
    "clock": _outputs(409, 530, 892),
    "dog": _outputs(
        *((152, 191), (193, 203), (205, 226), (228, 241), (243, 250)),
        *((252, 257), 259, (261, 263), (265, 268)),
    ),
    "elephant": _outputs(385, 386),
    "keyboard": _outputs(508, 878),
    "knife": _outputs(499),
    "oven": _outputs(766),
    "truck": _outputs(555, 569, 656, 675, 717, 734, 864, 867),
}
