"""The report's figures: SVG panels drawn with Matplotlib's object interface, no global state kept.

Text stays text and takes the reader's own sans-serif, so that figures match the page. Colours are
Okabe and Ito's; marker, line style and a label at each line's end say the same without colour.
"""

from __future__ import annotations

import io
import itertools
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from advtransfer.foreign import printable
from advtransfer.report.summary import Source

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, RULE = "#1b2430", "#5a6675", "#dfe4ea"


class Style(NamedTuple):
    """How one source looks in every figure."""

    label: str
    colour: str
    marker: str
    line: str | tuple[int, tuple[float, ...]]
    hollow: bool  # markers of natural sources


class Series(NamedTuple):
    """One line: `x`, `mean` (finite) and `ci95` (NaN: no interval), of equal length; in [0, 1]."""

    style: Style
    x: Sequence[float]
    mean: Sequence[float]
    ci95: Sequence[float]


class Axis(NamedTuple):
    """A horizontal axis. `ticks` (place -> text) makes it one of categories: error bars, side by side."""

    label: str
    log: bool = False
    ticks: Mapping[float, str] = MappingProxyType({})
    joined: bool = True  # neighbouring marks by a line


_NATURAL = (("#4d4d4d", "o", (0, (4, 2))), ("#8a8a8a", "p", (0, (1, 1.5))), ("#4d4d4d", "H", ":"))
_ROBUST = (
    ("#0072B2", "s", "-"),
    ("#D55E00", "^", "-"),
    ("#009E73", "D", (0, (6, 1, 1, 1))),
    ("#CC79A7", "v", (0, (6, 1, 1, 1, 1, 1))),
    ("#E69F00", "P", "-"),
    ("#56B4E9", "X", (0, (2, 1))),
)
_DEPTHS = (  # viridis, dark to light: the more is trained
    ("#440154", "o", "-"),
    ("#414487", "s", "-"),
    ("#2a788e", "^", "-"),
    ("#22a884", "D", "-"),
    ("#62a82f", "v", "-"),
    ("#b58900", "P", "-"),
)


def styles(sources: Iterable[Source]) -> dict[str, Style]:
    """A style per source name: grey, broken and hollow if natural, else the palette in order."""
    sources = list(sources)
    constraints = [source.constraint for source in sources]
    natural, robust = itertools.cycle(_NATURAL), itertools.cycle(_ROBUST)
    found = {}
    for source in sources:
        label = source.constraint if constraints.count(source.constraint) == 1 else source.name
        hollow = source.norm == "none"
        found[source.name] = Style(label, *next(natural if hollow else robust), hollow)
    return found


def depth_styles(labels: Mapping[int, str]) -> dict[int, Style]:
    """A style per number of unfrozen blocks, for figures whose lines are these."""
    looks = itertools.cycle(_DEPTHS)
    return {blocks: Style(label, *next(looks), False) for blocks, label in labels.items()}


def value_range(
    groups: Iterable[Sequence[Series]], *, include: Sequence[float] = (), least: float = 0.02
) -> tuple[float, float]:
    """The range that holds every mean and interval, so that neighbouring panels share one axis."""
    low, high = [*include], [*include]
    for series in groups:
        for line in series:
            mean, ci95 = np.asarray(line.mean, float), np.nan_to_num(np.asarray(line.ci95, float))
            low += (mean - ci95)[np.isfinite(mean)].tolist()
            high += (mean + ci95)[np.isfinite(mean)].tolist()
    if not low:
        return 0.0, 1.0
    bottom, top = min(low), max(high)
    pad = max(0.06 * (top - bottom), (least - (top - bottom)) / 2)
    return bottom - pad, top + pad


def line_panel(
    series: Sequence[Series],
    axis: Axis,
    *,
    title: str,
    ylabel: str,
    yrange: tuple[float, float],
    zero: str = "",
    behind: Sequence[Series] = (),
) -> bytes:
    """One panel of lines with their intervals, as SVG.

    Args:
      yrange: limits of the vertical axis in [0, 1] units; ticks are in percent or points.
      zero: if given, a reference line at zero with this label at its end.
      behind: thin lines with crosses behind the others, in the style's colour, without intervals.
    """
    with _defaults():
        figure, axes = _panel(title, ylabel, width=4.7, height=3.3)
        longest = max((len(_short(line.style.label)) for line in series), default=0)
        _place(axes, left=0.45, right=0.4 + 0.072 * max(longest, len(zero)), top=0.62, bottom=0.5)
        ends = []
        if zero:
            style = Style(zero, *_NATURAL[0], True)
            axes.axhline(0, color=style.colour, linestyle=style.line, linewidth=1.4, zorder=2)
            ends.append((0.0, style))
        for line in behind:
            look = {"color": line.style.colour, "alpha": 0.6, "linewidth": 1, "marker": "x", "markersize": 4}
            axes.plot(line.x, 100 * np.asarray(line.mean), zorder=1.5, **look)
        for position, line in enumerate(series):
            dodge = (
                min(0.07 if axis.joined else 0.11, 0.6 / len(series)) * (position - (len(series) - 1) / 2)
                if axis.ticks
                else 0.0
            )
            _draw_line(axes, line, axis, dodge)
            if axis.joined:
                ends.append((100 * line.mean[-1], line.style))
            else:  # marks that are not joined have no end: the names stand in their order
                step = 0.08 * (yrange[1] - yrange[0])
                ends.append((100 * (yrange[1] - step * (position + 1)), line.style))
        axes.set_ylim(100 * yrange[0], 100 * yrange[1])
        _horizontal_axis(axes, sorted({v for line in (*series, *behind) for v in line.x}), axis)
        _label_ends(axes, ends)
        return _svg(figure)


def _draw_line(axes: Axes, line: Series, axis: Axis, dodge: float) -> None:
    x, mean, ci95 = (np.asarray(values, float) for values in line[1:])
    ci95, look = 100 * np.nan_to_num(ci95), _dot(line.style)
    x, mean = x + dodge, 100 * mean
    stroke = line.style.line if axis.joined else ""
    axes.plot(x, mean, color=line.style.colour, linestyle=stroke, zorder=3, **look)
    if axis.ticks:
        axes.vlines(x, mean - ci95, mean + ci95, color=line.style.colour, linewidth=1.4, zorder=2.5)
    else:
        axes.fill_between(
            x, mean - ci95, mean + ci95, color=line.style.colour, alpha=0.16, linewidth=0, zorder=1
        )


def dumbbell_panel(rows: Sequence[tuple[str, float, float]], *, title: str) -> bytes:
    """(label, natural, adversarial accuracy) per source, joined by a line; NaN is left out."""
    with _defaults():
        figure, axes = _panel(title, "Test accuracy, %", width=4.7, height=1.35 + 0.4 * len(rows))
        longest = max(len(_short(label)) for label, _, _ in rows)
        _place(axes, left=0.15 + 0.075 * longest, right=0.6, top=0.85, bottom=0.4)
        for place, (_, natural, adversarial) in enumerate(rows):
            ends = [100 * natural, 100 * adversarial]
            axes.plot(ends, [place] * 2, color="#b6bfca", linewidth=3, zorder=1)
            for value, other, word, marker, colour, face in (
                (*ends, "natural", "o", _NATURAL[0][0], "white"),
                (*ends[::-1], "adversarial", "D", _ROBUST[1][0], _ROBUST[1][0]),
            ):
                if math.isnan(value):
                    continue
                look = {"markersize": 7, "markeredgewidth": 1.6, "markeredgecolor": colour}
                axes.plot(value, place, marker, markerfacecolor=face, zorder=3, **look)
                side = -1 if value < other else 1
                near = {
                    "xy": (value, place),
                    "textcoords": "offset points",
                    "va": "center_baseline",
                }
                beside = {"xytext": (8 * side, 0), "ha": "left" if side > 0 else "right"}
                axes.annotate(f"{value:.1f}", **near, **beside)
                if place == 0:
                    above = {"xytext": (-4 * side, 15), "ha": "left" if side > 0 else "right"}
                    axes.annotate(word, **near, **above, color=MUTED)
        axes.set_xlim(-11, 111)  # room for the numbers beside accuracies near 0 and 100
        axes.set_xticks(range(0, 101, 20))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x", color=RULE, linewidth=0.8)
        labels = [_short(label) for label, _, _ in rows]
        axes.set_yticks(range(len(rows)), labels, parse_math=False)
        return _svg(figure)


def png(image: np.ndarray) -> bytes:
    """An image [H, W, 3] in [0, 1] as PNG, pixel for pixel."""
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    imsave(buffer, to_bytes(image), format="png", metadata={"Software": None})
    return buffer.getvalue()


def to_bytes(images: np.ndarray) -> np.ndarray:
    """Images in [0, 1] as uint8 [0, 255], rounded; NaN is black."""
    return np.round(255 * np.clip(np.nan_to_num(np.asarray(images, float)), 0, 1)).astype(np.uint8)


def difference_gain(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> int:
    """The whole number that magnifies differences of [0, 1] images until nearly all fill ±0.5."""
    largest = max((np.quantile(np.abs(a - b), 0.99) for a, b in pairs), default=0.0)
    return max(1, int(0.5 / largest)) if largest > 0 else 1


def _defaults() -> AbstractContextManager[None]:
    """Matplotlib's own defaults, whatever a matplotlibrc says, and ids that do not change."""
    import matplotlib

    settings = {k: v for k, v in matplotlib.rcParamsDefault.items() if not k.startswith("backend")}
    return matplotlib.rc_context(
        settings
        | {
            "svg.hashsalt": "advtransfer",
            "svg.fonttype": "none",
            "font.family": ["sans-serif"],
            "font.sans-serif": ["DejaVu Sans"],
            "font.size": 9.5,
            "text.color": INK,
            "axes.edgecolor": "#9aa5b1",
            "axes.labelcolor": MUTED,
            "xtick.color": "#9aa5b1",
            "ytick.color": "#9aa5b1",
            "xtick.labelcolor": MUTED,
            "ytick.labelcolor": MUTED,
        }
    )


def _panel(title: str, ylabel: str, *, width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(visible=True, axis="y", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, axis="y")
    axes.tick_params(length=3, axis="x")
    heading = {"xycoords": ("figure points", "axes fraction"), "textcoords": "offset points"}
    axes.annotate(title, (1, 1), xytext=(0, 27), **heading, fontsize=11, fontweight="bold")
    axes.annotate(ylabel, (1, 1), xytext=(0, 12), **heading, color=MUTED)
    for text in axes.texts:
        text.set_parse_math(False)
    return figure, axes


def _place(axes: Axes, *, left: float, right: float, top: float, bottom: float) -> None:
    """Margins in inches: the same room for text whatever the panel's size."""
    width, height = axes.figure.get_size_inches()
    box = (left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height)
    axes.set_position(box)


def _horizontal_axis(axes: Axes, values: list[float], axis: Axis) -> None:
    from matplotlib.ticker import NullLocator

    axes.set_xlabel(axis.label, labelpad=4)
    if axis.ticks:
        size = 9.5 if len(axis.ticks) * max(map(len, axis.ticks.values())) < 48 else 7.5
        axes.set_xticks(list(axis.ticks), list(axis.ticks.values()), fontsize=size, parse_math=False)
        axes.set_xlim(min(axis.ticks) - 0.4, max(axis.ticks) + 0.4)
        return
    if axis.log:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
    place = np.log(values) if axis.log else np.asarray(values, float)
    span = (place[-1] - place[0]) or 1.0
    ticks: dict[float, str] = {}
    taken = math.inf
    for value, at in zip(values[::-1], place[::-1], strict=True):  # the largest always shows
        text = _thousands(value)
        half = (0.014 * len(text) + 0.016) * span
        if at + half <= taken:
            ticks[value], taken = text, at - half
    axes.set_xticks(list(ticks), list(ticks.values()))
    margin = 0.035 * span
    limits = np.array([place[0] - margin, place[-1] + margin])
    axes.set_xlim(*(np.exp(limits) if axis.log else limits))


def _label_ends(axes: Axes, ends: list[tuple[float, Style]]) -> None:
    """Names every line at its right end, pushed apart where the ends are close."""
    low, high = axes.get_ylim()
    gap = 0.075 * (high - low)
    ends = sorted(ends, key=lambda end: end[0])
    heights = np.array([height for height, _ in ends])
    for _ in range(20 * len(ends)):  # neighbours that overlap move apart by equal shares
        overlap = np.maximum(0, gap - np.diff(heights)) / 2
        heights[:-1] -= overlap
        heights[1:] += overlap
    beside = {"transform": axes.get_yaxis_transform(), "clip_on": False}
    for height, (_, style) in zip(heights, ends, strict=True):
        axes.plot([1.035], [height], linestyle="", **_dot(style), **beside)
        text = _short(style.label)
        axes.text(1.07, height, text, va="center_baseline", parse_math=False, **beside)


def _dot(style: Style) -> dict[str, object]:
    return {
        "marker": style.marker,
        "markersize": 5.5,
        "markerfacecolor": "white" if style.hollow else style.colour,
        "markeredgecolor": style.colour if style.hollow else "white",
        "markeredgewidth": 1.5 if style.hollow else 0.7,
        "linewidth": 1.8,
    }


def _svg(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with warnings.catch_warnings():  # of characters that DejaVu Sans has not: the reader's font may have them
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    fonts = b"system-ui, -apple-system, 'Segoe UI', Roboto, Arial"  # as in template.html
    text = printable(buffer.getvalue().decode())
    return text.encode().replace(b"'DejaVu Sans'", fonts)


def _thousands(value: float) -> str:
    return f"{value / 1000:g}k" if value >= 10_000 else f"{value:g}"


def _short(text: str, limit: int = 22) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
