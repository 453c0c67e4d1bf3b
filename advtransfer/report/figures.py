"""The report's figures: SVG panels drawn with Matplotlib's object interface, no global state kept.

Text stays text and takes the reader's own sans-serif, so that figures match the page. Colours are
Okabe and Ito's; marker, line style and a label at each line's end say the same without colour.
"""

from __future__ import annotations

import io
import itertools
import math
import warnings
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Num, UInt8

from advtransfer.foreign import printable
from advtransfer.report.sections import Axis, Dumbbell, Panel, Scatter, Series, SourceInfo, Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, RULE = "#1b2430", "#5a6675", "#dfe4ea"
DASHES = {
    "solid": "-",
    "dashed": (0, (4, 2)),
    "dotted": (0, (1, 1.5)),
    "wide dots": ":",
    "short dashes": (0, (2, 1)),
    "dash, dot": (0, (6, 1, 1, 1)),
    "dash, dot, dot": (0, (6, 1, 1, 1, 1, 1)),
}
_NATURAL = (("#4d4d4d", "o", "dashed"), ("#8a8a8a", "p", "dotted"), ("#4d4d4d", "H", "wide dots"))
_ROBUST = (
    ("#0072B2", "s", "solid"),
    ("#D55E00", "^", "solid"),
    ("#009E73", "D", "dash, dot"),
    ("#CC79A7", "v", "dash, dot, dot"),
    ("#E69F00", "P", "solid"),
    ("#56B4E9", "X", "short dashes"),
)
_DEPTHS = (  # viridis, dark to light: the more is trained
    ("#440154", "o", "solid"),
    ("#414487", "s", "solid"),
    ("#2a788e", "^", "solid"),
    ("#22a884", "D", "solid"),
    ("#62a82f", "v", "solid"),
    ("#b58900", "P", "solid"),
)
_BLUE, _ORANGE = np.array((0, 114, 178)) / 255, np.array((213, 94, 0)) / 255


def styles(sources: Iterable[SourceInfo]) -> dict[str, Style]:
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


TRAINING = Style("training images", *_NATURAL[0], True)
TEST = Style("test images", *_ROBUST[0], False)


def value_range(lines: Iterable[Series], *, lead: bool = False) -> tuple[float, float]:
    """The range that holds every mean and interval, and for leads zero, for panels that share an axis."""
    ends = [0.0] if lead else []
    for line in lines:
        mean, ci95 = np.asarray(line.mean, float), np.nan_to_num(np.asarray(line.ci95, float))
        ends += np.concatenate([mean - ci95, mean + ci95])[np.isfinite([*mean, *mean])].tolist()
    if not ends:
        return 0.0, 1.0
    bottom, top = min(ends), max(ends)
    pad = max(0.06 * (top - bottom), 0.01 - (top - bottom) / 2)
    if lead:
        return bottom - pad, top + pad
    # Intervals of few seeds can reach beyond what an accuracy can be; the axis does not.
    return max(bottom - pad, -0.02), min(top + pad, 1.02)


def draw(panel: Panel | Dumbbell | Scatter) -> bytes:
    """The panel as SVG."""
    drawers: dict[type, Any] = {Panel: _lines, Dumbbell: _dumbbell, Scatter: _scatter}
    with _defaults():
        figure = drawers[type(panel)](panel)
        buffer = io.BytesIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        with warnings.catch_warnings():  # of characters that DejaVu Sans has not: the reader's font may
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    fonts = b"system-ui, -apple-system, 'Segoe UI', Roboto, Arial"  # as in page.html
    return printable(buffer.getvalue().decode()).encode().replace(b"'DejaVu Sans'", fonts)


def describe(panel: Panel | Dumbbell | Scatter) -> str:
    """What a reader who cannot see the panel needs from it: both ends of every line, or every point."""
    if isinstance(panel, Dumbbell):
        rows = [(row[0], *(f"{100 * y:.1f}".replace("nan", "–") for y in row[1:])) for row in panel.rows]
        return "; ".join(f"{label}: natural {a}, adversarial {b}" for label, a, b in rows)
    if isinstance(panel, Scatter):
        rows = [f"{style.label} {100 * y[0]:.1f} at {100 * x[0]:.1f}" for style, x, y in panel.points]
        return f"{panel.title}: {panel.ylabel} against {panel.xlabel}. {'; '.join(rows)}."
    lines = []
    for style, x, mean, *_ in panel.series:
        places = [panel.axis.ticks[int(at)] if panel.axis.ticks else f"{round(at, 4):,}" for at in x]
        ends = (f"{100 * mean[i]:.1f} at {places[i]}" for i in sorted({0, len(x) - 1}))
        lines.append(f"{style.label} {' to '.join(ends)}")
    return f"{panel.title}: {panel.ylabel} against {panel.axis.label}. {'; '.join(lines)}."


def png(image: Num[np.ndarray, "h w 3"]) -> bytes:
    """An image [H, W, 3], bytes or in [0, 1], as PNG, pixel for pixel."""
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    nothing: dict[str, Any] = {"Software": None}
    imsave(buffer, to_bytes(image), format="png", metadata=nothing)
    return buffer.getvalue()


def to_bytes(images: Num[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """Images in [0, 1] as uint8 [0, 255], rounded; NaN is black. Bytes stay."""
    if images.dtype == np.uint8:
        return images
    return np.rint(255 * np.clip(np.nan_to_num(np.asarray(images, float)), 0, 1)).astype(np.uint8)


def difference_gain(pairs: Iterable[tuple[Float[np.ndarray, "*shape"], Float[np.ndarray, "*shape"]]]) -> int:
    """The whole number that magnifies differences of [0, 1] images until nearly all fill ±0.5."""
    largest = max((np.quantile(np.abs(a - b), 0.99) for a, b in pairs), default=0.0)
    return max(1, int(0.5 / largest)) if largest > 0 else 1


def cell_colours(values: Num[np.ndarray, "c c"], *, confusion: bool) -> UInt8[np.ndarray, "c c 3"]:
    """The colours of a `Matrix`: white at zero and NaN, then deeper with size.

    In a confusion matrix the deepest is light enough for dark text.
    """
    if confusion:
        shares = values / np.maximum(values.sum(axis=1, keepdims=True), 1)
        depth, is_blue = np.where(shares > 0, 0.08 + 0.47 * shares, 0), np.eye(len(values), dtype=bool)
    else:
        largest = max(np.nanquantile(np.abs(values), 0.99), np.finfo(float).tiny)
        depth, is_blue = np.clip(np.abs(np.nan_to_num(values / largest)), 0, 1), values > 0
    full = np.where(is_blue[..., None], _BLUE, _ORANGE)
    return np.rint(255 * (1 - depth[..., None] * (1 - full))).astype(np.uint8)


def _lines(panel: Panel) -> Figure:
    series, axis = panel.series, panel.axis
    longest = max((len(_short(line.style.label)) for line in series), default=0)
    right = 0.4 + 0.072 * max(longest, len(panel.zero))
    figure, axes = _panel(panel, height=3.3, left=0.45, right=right, top=0.62, bottom=0.5)
    low, high = (100 * end for end in panel.yrange)
    ends = []
    if panel.zero:
        style = Style(panel.zero, *_NATURAL[0], True)
        axes.axhline(0, color=style.colour, linestyle=DASHES[style.line], linewidth=1.4, zorder=2)
        ends.append((0.0, style))
    for line in panel.behind:
        look: dict[str, Any] = {"alpha": 0.6, "linewidth": 1, "marker": "x", "markersize": 4}
        axes.plot(line.x, 100 * np.asarray(line.mean), color=line.style.colour, zorder=1.5, **look)
    apart = min(0.07 if axis.joined else 0.11, 0.6 / max(len(series), 1)) if axis.ticks else 0.0
    for position, line in enumerate(series):
        _line(axes, line, axis, apart * (position - (len(series) - 1) / 2))
        # Marks that are not joined have no end: the names stand in their order.
        last = 100 * line.mean[-1] if axis.joined else high - 0.08 * (high - low) * (position + 1)
        ends.append((last, line.style))
    axes.set_ylim(low, high)
    values = axis.values or sorted({x for line in (*series, *panel.behind) for x in line.x})
    _horizontal_axis(axes, list(values), axis)
    _label_ends(axes, ends)
    return figure


def _line(axes: Axes, line: Series, axis: Axis, shift: float) -> None:
    x, mean, ci95 = (np.asarray(values, float) for values in line[1:4])
    x, mean, ci95, colour = x + shift, 100 * mean, 100 * np.nan_to_num(ci95), line.style.colour
    low, high = 100 * np.asarray(line.bounds).T if line.bounds else (mean - ci95, mean + ci95)
    stroke = DASHES[line.style.line] if axis.joined else ""
    axes.plot(x, mean, color=colour, linestyle=stroke, zorder=3, **_mark(line.style))
    if axis.ticks:
        axes.vlines(x, low, high, color=colour, linewidth=1.4, zorder=2.5)
    else:
        axes.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0, zorder=1)


def _dumbbell(panel: Dumbbell) -> Figure:
    rows = panel.rows
    left = 0.15 + 0.075 * max(len(_short(label)) for label, _, _ in rows)
    figure, axes = _panel(panel, height=1.35 + 0.4 * len(rows), left=left, right=0.6, top=0.85, bottom=0.4)
    for place, (_, natural, adversarial) in enumerate(rows):
        axes.plot([100 * natural, 100 * adversarial], [place] * 2, color="#b6bfca", linewidth=3, zorder=1)
        for share, other, word, marker, colour, face in (
            (natural, adversarial, "natural", "o", _NATURAL[0][0], "white"),
            (adversarial, natural, "adversarial", "D", _ROBUST[1][0], _ROBUST[1][0]),
        ):
            if math.isnan(share):
                continue
            look: dict[str, Any] = {"markersize": 7, "markeredgewidth": 1.6, "markeredgecolor": colour}
            axes.plot(100 * share, place, marker, markerfacecolor=face, zorder=3, **look)
            side = -1 if share < other else 1
            near: dict[str, Any] = {"xy": (100 * share, place), "ha": "left" if side > 0 else "right"}
            near |= {"textcoords": "offset points", "va": "center_baseline"}
            axes.annotate(f"{100 * share:.1f}", xytext=(8 * side, 0), **near)
            if place == 0:
                axes.annotate(word, xytext=(-4 * side, 15), color=MUTED, **near)
    axes.set_xlim(-11, 111)  # for the numbers beside accuracies near 0 and 100
    axes.set_xticks(range(0, 101, 20))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [_short(label) for label, _, _ in rows], parse_math=False)
    return figure


def _scatter(panel: Scatter) -> Figure:
    right = 0.4 + 0.072 * max(len(_short(style.label)) for style, _, _ in panel.points)
    figure, axes = _panel(panel, height=3.3, left=0.45, right=right, top=0.62, bottom=0.5)
    for style, across, up in panel.points:
        (x, *xs), (y, *ys) = (100 * np.asarray(share, float) for share in (across, up))
        axes.plot(xs, [y, y], color=style.colour, linewidth=1.4, zorder=2.5)
        axes.plot([x, x], ys, color=style.colour, linewidth=1.4, zorder=2.5)
        axes.plot(x, y, linestyle="", zorder=3, **_mark(style))
    for values, limit in ((1, axes.set_xlim), (2, axes.set_ylim)):
        ends = 100 * np.asarray([point[values] for point in panel.points], float)
        pad = max(0.06 * np.ptp(ends), 1.0)
        limit(ends.min() - pad, ends.max() + pad)
    axes.grid(visible=True)
    axes.set_xlabel(panel.xlabel, labelpad=4, parse_math=False)
    _label_ends(axes, [(100 * up[0], style) for style, _, up in panel.points])
    return figure


def _defaults() -> AbstractContextManager[None]:
    """Matplotlib's own defaults, whatever a matplotlibrc says, and ids that do not change."""
    import matplotlib

    defaults: dict[Any, Any] = {
        k: v for k, v in matplotlib.rcParamsDefault.items() if not k.startswith("backend")
    }
    edges, texts = ("axes.edgecolor", "xtick.color", "ytick.color"), ("axes", "xtick", "ytick")
    ours: dict[Any, Any] = {
        "svg.hashsalt": "advtransfer",
        "svg.fonttype": "none",
        "font.family": ["sans-serif"],
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 9.5,
        "text.color": INK,
        "xtick.major.size": 3,
        "ytick.major.size": 0,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": RULE,
        **dict.fromkeys(edges, "#9aa5b1"),
        **{f"{name}.labelcolor": MUTED for name in texts},
        **{f"axes.spines.{side}": False for side in ("top", "right", "left")},
    }
    return matplotlib.rc_context(defaults | ours)


def _panel(
    panel: Panel | Dumbbell | Scatter, *, height: float, left: float, right: float, top: float, bottom: float
) -> tuple[Figure, Axes]:
    """A figure with margins in inches: the same space for text whatever the panel's size."""
    from matplotlib.figure import Figure

    width = 4.7
    box = (left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height)
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes(box)
    axes.grid(visible=False, axis="x" if isinstance(panel, Panel) else "y")
    ylabel = "Test accuracy, %" if isinstance(panel, Dumbbell) else panel.ylabel
    heading: dict[str, Any] = {"xycoords": ("figure points", "axes fraction"), "textcoords": "offset points"}
    axes.annotate(panel.title, (1, 1), xytext=(0, 27), **heading, fontsize=11, fontweight="bold")
    axes.annotate(ylabel, (1, 1), xytext=(0, 12), **heading, color=MUTED)
    for text in axes.texts:
        text.set_parse_math(False)
    return figure, axes


def _horizontal_axis(axes: Axes, values: list[float], axis: Axis) -> None:
    from matplotlib.ticker import NullLocator

    axes.set_xlabel(axis.label, labelpad=4)
    if axis.ticks:
        size = 9.5 if len(axis.ticks) * max(map(len, axis.ticks)) < 48 else 7.5
        axes.set_xticks(range(len(axis.ticks)), axis.ticks, fontsize=size, parse_math=False)
        axes.set_xlim(-0.4, len(axis.ticks) - 0.6)
        return
    if axis.log:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
    place = np.log(values) if axis.log else np.asarray(values, float)
    span = (place[-1] - place[0]) or 1.0
    ticks: dict[float, str] = {}
    taken = math.inf
    for value, at in zip(values[::-1], place[::-1], strict=True):  # the largest always shows
        text = f"{value / 1000:g}k" if value >= 10_000 else f"{value:g}"
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
    heights = np.maximum(heights, low + gap * np.arange(len(ends)))  # none on what is below the axis
    beside: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "clip_on": False}
    for height, (_, style) in zip(heights, ends, strict=True):
        axes.plot([1.035], [height], linestyle="", **_mark(style), **beside)
        axes.text(1.07, height, _short(style.label), va="center_baseline", parse_math=False, **beside)


def _mark(style: Style) -> dict[str, Any]:
    return {
        "marker": style.marker,
        "markersize": 5.5,
        "markerfacecolor": "white" if style.hollow else style.colour,
        "markeredgecolor": style.colour if style.hollow else "white",
        "markeredgewidth": 1.5 if style.hollow else 0.7,
        "linewidth": 1.8,
    }


def _short(text: str, limit: int = 22) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
