"""Do networks classify by shape or by texture? A section that compares them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from advtransfer.analysis import cue_conflict, shape
from advtransfer.data import LETTERS
from advtransfer.explain.case import Case, Subject, percent
from advtransfer.models import logits_fn
from advtransfer.report.sections import Axis, Entry, Panel, Plot, Section, Series, Table

# Strengths of the two cues; training images have opaque letters and amplitudes of 0.02 to 0.06.
AMPLITUDES = (0.02, 0.06, 0.1, 0.15, 0.2, 0.3)
OPACITIES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
AMPLITUDE = 0.06  # of the gratings below fading letters


def shape_section(case: Case) -> Section:
    """Shape bias on images whose shape and texture are of different classes, which the networks must have."""
    letters = [s for s in case.subjects if tuple(s.model.spec.class_names) == tuple(LETTERS)]
    thousand = [s for s in case.subjects if s.model.spec.num_classes == 1000]
    if letters:
        return _glyph_section(case, letters)
    if thousand and case.settings.cue_conflict:
        return _folder_section(case, thousand)
    finding = (
        "Not measured: it takes networks with the 23 letters of builtin:glyphs, or with ImageNet’s 1,000 "
        "classes and a folder of cue-conflict images (config.interpret.cue_conflict)."
    )
    return Section("Shape against texture", finding)


def _glyph_section(case: Case, subjects: Sequence[Subject]) -> Section:
    strengths = [(a, 1.0) for a in AMPLITUDES] * (not case.brief) + [(AMPLITUDE, o) for o in OPACITIES]
    found = {}
    for amplitude, opacity in strengths:
        conflict = cue_conflict.glyph_cue_conflict(
            amplitude, opacity, seed=case.seed, image_size=case.image_size
        )
        for s in subjects:
            measured = shape.measure(logits_fn(s.model), conflict, cue_conflict.LETTER_OUTPUTS)
            found[s.label, amplitude, opacity] = measured
    records = [
        row
        for (label, amplitude, opacity), measured in found.items()
        for row in _shape_records({"model": label, "amplitude": amplitude, "opacity": opacity}, measured)
    ]

    def panel(title, axis, strengths):
        """`strengths`: the amplitude and opacity at every x."""
        lines = [_bias_series(s, [(x, found[s.label, *at]) for x, at in strengths.items()]) for s in subjects]
        return Panel(title, "Shape bias, %", axis, [line for line in lines if len(line.x)])

    biases = {
        s.label: [float(found[s.label, AMPLITUDE, o].overall.shape_bias.value) for o in OPACITIES]
        for s in subjects
    }
    halves = {label: shape.half_point(OPACITIES, values) for label, values in biases.items()}
    known = {label: x for label, x in halves.items() if not math.isnan(x)}
    fading = Axis("opacity of the letters", log=True)
    panels = [panel("Fading letters", fading, {o: (AMPLITUDE, o) for o in OPACITIES})]
    tables = []
    if not case.brief:
        growing = Axis("amplitude of the gratings")
        panels.append(panel("Stronger gratings", growing, {a: (a, 1.0) for a in AMPLITUDES}))
        middle = np.mean([*known.values()] or [0])
        balanced = min(OPACITIES, key=lambda o: abs(o - middle))
        of = {s.label: found[s.label, AMPLITUDE, balanced] for s in subjects}
        where = f"on gratings of amplitude {AMPLITUDE:g} below letters of opacity {balanced:g}"
        tables = _cue_parts(of, where)
    panels = [each for each in panels if each.series]  # networks may answer neither letter nor grating
    plots = [Plot(_glyph_caption(case, found), panels, "shape")] if panels else []
    finding = "At no opacity that was tried do letters and gratings decide equally often."
    if all(np.greater([*biases.values()], 0.5).flat):
        finding = "Letters outweigh gratings at every opacity that was tried."
    elif known:
        listed = ", ".join(f"{label} {x:.2f}" for label, x in known.items())
        finding = f"Opacity at which letters and gratings decide equally often: {listed}."
    return Section("Shape against texture", finding, [*plots, *tables], {"shape": records})


def _glyph_caption(case: Case, found: dict[tuple[str, float, float], shape.ShapeBias]) -> str:
    number = int(next(iter(found.values())).overall.shape.total)
    fading = f"gratings of amplitude {AMPLITUDE:g}"
    shown = f"All on {fading}." if case.brief else f"Left: {fading}. Right: opaque letters."
    return (
        f"Share of the letter among answers that are the letter’s or the grating’s class, on {number} "
        f"images: each letter on the grating of every other class. {shown} Training images: opaque letters, "
        "amplitudes of 0.02 to 0.06. Bands: 95 % (Wilson)."
    )


def _bias_series(subject: Subject, points: Sequence[tuple[float, shape.ShapeBias]]) -> Series:
    biases = [(x, measured.overall.shape_bias) for x, measured in points]
    known = [(x, float(b.value), float(b.upper - b.lower) / 2) for x, b in biases if not np.isnan(b.value)]
    return Series(subject.style, *(zip(*known, strict=True) if known else ((), (), ())))


def _folder_section(case: Case, subjects: Sequence[Subject]) -> Section:
    conflict = cue_conflict.read_cue_conflict(case.settings.cue_conflict, image_size=case.image_size)
    found = {s.label: shape.measure(logits_fn(s.model), conflict) for s in subjects}
    records = [row for label, x in found.items() for row in _shape_records({"model": label}, x)]
    biases = (f"{label} {100 * float(x.overall.shape_bias.value):.1f} %" for label, x in found.items())
    finding = f"Shape bias where shape and texture are of different classes: {', '.join(biases)}."
    where = f"on {int(next(iter(found.values())).overall.shape.total):,} cue-conflict images"
    return Section("Shape against texture", finding, _cue_parts(found, where), {"shape": records})


def _cue_parts(found: dict[str, shape.ShapeBias], where: str) -> list[Table]:
    overall = ((label, measured.overall) for label, measured in found.items())
    rows = [[label, *map(percent, (of.shape_bias, of.shape, of.texture))] for label, of in overall]
    heads = ["Network", "Shape bias, %", "Answers by shape, %", "Answers by texture, %"]
    caption = f"Answers {where}, with 95 % intervals (Wilson); the rest are other classes."
    of_class = [measured.per_class.shape_bias for measured in found.values()]
    names = next(iter(found.values())).class_names
    bars = [
        [name, *(_bar(*(float(x[i]) for x in share[:3])) for share in of_class)]
        for i, name in enumerate(names)
    ]
    by_class = f"Shape bias by class of the shape, in %, {where}. Lines: 95 % intervals (Wilson)."
    return [Table(caption, heads, rows, "shape"), Table(by_class, ["Shape", *found], bars, "shape")]


def _bar(value: float, low: float, high: float) -> Entry:
    return Entry("–" if math.isnan(value) else f"{100 * value:.0f}", bar=(value, low, high))


def _shape_records(head: dict[str, Any], measured: shape.ShapeBias) -> list[dict]:
    """Over all images first (class ""), then by class."""
    records = []
    for i, name in enumerate(["", *measured.class_names]):
        record = head | {"class": name}
        for what in ("shape_bias", "shape", "texture"):
            share = getattr(measured.per_class if i else measured.overall, what)
            value, low, high = (float(x[i - 1] if i else x) for x in share[:3])
            record |= {what: value, f"{what}_low95": low, f"{what}_high95": high}
        records.append(record)
    return records
