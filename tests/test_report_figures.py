"""What stands in a figure, read from Matplotlib's own objects."""

import io
import math

import numpy as np
import pytest
from PIL import Image

from advtransfer.report import figures
from advtransfer.report.sections import Axis, Dumbbell, Panel, Scatter, Series, SourceInfo

SOURCES = [SourceInfo("nat", "none", 0.0), SourceInfo("a", "l2", 0.5), SourceInfo("b", "linf", 0.1)]
NATURAL, ROBUST, OTHER = figures.styles(SOURCES).values()
FULL = (0.0, 1.0)


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """Matplotlib's figures, in place of what is written of them."""
    kept = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda figure, *args, **options: kept.append(figure)
    )
    return kept


@pytest.fixture
def axes_of(drawn):
    def draw(panel):
        figures.draw(panel)
        (axes,) = drawn.pop().axes
        return axes

    return draw


@pytest.fixture
def axes_with(axes_of):
    def draw(series, axis, yrange=FULL, **options):
        return axes_of(Panel("T", "y", axis, series, yrange, **options))

    return draw


def _drawn(axes, colour):
    """The line of a colour through data, without the mark beside its name."""
    return next(line for line in axes.lines if line.get_color() == colour and len(line.get_xdata()) > 1)


def _names(axes):
    """Height of every name beside the panel."""
    return {text.get_text(): text.get_position()[1] for text in axes.texts if text.get_position()[0] == 1.07}


def test_lines_bands_and_ends_on_a_logarithmic_axis(axes_with):
    line = Series(ROBUST, [1, 10, 20_000], [0.2, 0.5, 0.4], [0.1, math.nan, 0.05])
    thin = Series(OTHER, [10, 100], [0.3, 0.35], [math.nan] * 2)
    axes = axes_with([line], Axis("n", log=True), (-0.1, 0.6), zero="natural", behind=[thin])
    drawn, behind = _drawn(axes, ROBUST.colour), _drawn(axes, OTHER.colour)
    np.testing.assert_allclose(drawn.get_xydata(), [(1, 20), (10, 50), (20_000, 40)])
    np.testing.assert_allclose(behind.get_xydata(), [(10, 30), (100, 35)])
    assert behind.get_marker() == "x"
    (band,) = axes.collections
    corners = {tuple(np.round(corner, 9)) for corner in band.get_paths()[0].vertices}
    assert corners == {(1, 10), (1, 30), (10, 50), (20_000, 35), (20_000, 45)}
    np.testing.assert_allclose(axes.get_ylim(), (-10, 60))
    assert axes.get_xscale() == "log" and axes.get_xlabel() == "n"
    title, ylabel = axes.texts[:2]
    assert (title.get_text(), title.get_weight(), ylabel.get_text()) == ("T", "bold", "y")
    assert [text.get_text() for text in axes.get_xticklabels()] == ["20k", "100", "10", "1"]
    span = math.log(20_000)
    np.testing.assert_allclose(np.log(axes.get_xlim()), (-0.035 * span, 1.035 * span))
    assert _names(axes) == {"natural": pytest.approx(0), "ℓ2 (ε = 0.5)": pytest.approx(40)}
    assert list(_drawn(axes, NATURAL.colour).get_ydata()) == [0, 0]


def test_names_at_one_height_are_pushed_apart_in_their_order(axes_with):
    lines = [
        Series(style, [1], [y], [math.nan]) for style, y in ((ROBUST, 0.51), (OTHER, 0.5), (NATURAL, 0.9))
    ]
    names = _names(axes_with(lines, Axis("n")))
    assert names["natural"] == pytest.approx(90)
    low, high = names["ℓ∞ (ε = 0.1)"], names["ℓ2 (ε = 0.5)"]
    assert high - low == pytest.approx(7.5) and (high + low) / 2 == pytest.approx(50.5)


def test_categories_have_marks_side_by_side_with_bars(axes_with):
    ticks = ["head", "all"]
    lines = [Series(style, [0, 1], [0.2, 0.6], [0.1, 0.05]) for style in (ROBUST, OTHER)]
    for joined, apart, style in ((True, 0.07, "-"), (False, 0.11, "None")):
        axes = axes_with(lines, Axis("k", ticks=ticks, joined=joined), (-0.2, 1.0))
        for line, side in ((ROBUST, -1), (OTHER, 1)):
            drawn = _drawn(axes, line.colour)
            np.testing.assert_allclose(
                drawn.get_xydata(), [(side * apart / 2, 20), (1 + side * apart / 2, 60)]
            )
            assert drawn.get_linestyle() == style
        bars = [path.vertices[:, 1].tolist() for group in axes.collections for path in group.get_paths()]
        np.testing.assert_allclose(bars, [(10, 30), (55, 65)] * 2)
        assert [text.get_text() for text in axes.get_xticklabels()] == ["head", "all"]
        np.testing.assert_allclose(axes.get_xlim(), (-0.4, 1.4))
        ends = list(_names(axes).values())
        assert sorted(ends) == pytest.approx([55.5, 64.5] if joined else [80.8, 90.4])  # below the upper edge
    many = [Series(ROBUST, [0, 1], [0.2, 0.6], [0.0] * 2) for _ in range(12)]
    places = [
        line.get_xdata()[0]
        for line in axes_with(many, Axis("k", ticks=ticks)).lines
        if len(line.get_xdata()) > 1
    ]
    np.testing.assert_allclose(places, 0.05 * (np.arange(12) - 5.5))  # 0.6 for all of them


@pytest.mark.parametrize("values", [range(0, 101, 2), range(5, 90, 17), [3]])
def test_values_are_named_from_the_largest_as_far_as_there_is_room(values, axes_with):
    axes = axes_with([Series(ROBUST, list(values), [0.5] * len(values), [0.0] * len(values))], Axis("epoch"))
    shown = [float(text.get_text()) for text in axes.get_xticklabels()]
    span = (values[-1] - values[0]) or 1
    half = {value: (0.014 * len(str(value)) + 0.016) * span for value in values}
    expected = []
    for value in sorted(values, reverse=True):
        if all(value + half[value] <= other - half[other] for other in expected):
            expected.append(value)
    assert sorted(shown) == sorted(expected)
    np.testing.assert_allclose(axes.get_xlim(), (values[0] - 0.035 * span, values[-1] + 0.035 * span))


def test_both_accuracies_of_every_source_with_their_values(axes_of):
    rows = [("first", 0.9, 0.3), ("second", 0.5, math.nan), ("third", 0.2, 0.8)]
    axes = axes_of(Dumbbell("T", rows))
    assert [text.get_text() for text in axes.texts[:2]] == ["T", "Test accuracy, %"]
    annotations = {text.get_text(): (text.xy, text.get_ha(), text.xyann[0]) for text in axes.texts[2:]}
    assert annotations == {
        "90.0": ((pytest.approx(90), 0), "left", 8),
        "natural": ((pytest.approx(90), 0), "left", -4),
        "30.0": ((pytest.approx(30), 0), "right", -8),
        "adversarial": ((pytest.approx(30), 0), "right", 4),
        "50.0": ((pytest.approx(50), 1), "left", 8),
        "20.0": ((pytest.approx(20), 2), "right", -8),
        "80.0": ((pytest.approx(80), 2), "left", 8),
    }
    marks = {
        (*line.get_xydata()[0].round(6), line.get_marker())
        for line in axes.lines
        if len(line.get_xdata()) == 1
    }
    assert marks == {(90, 0, "o"), (30, 0, "D"), (50, 1, "o"), (20, 2, "o"), (80, 2, "D")}
    joined = [line.get_xydata()[:, 1].tolist() for line in axes.lines if len(line.get_xdata()) == 2]
    assert joined == [[place] * 2 for place in range(3)]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["first", "second", "third"]
    assert axes.get_ylim() == (2.5, -0.5)  # the first on top
    low, high = axes.get_xlim()
    assert low < 0 and high > 100 and axes.get_xticks().tolist() == [0, 20, 40, 60, 80, 100]


def test_margins_are_inches_whatever_the_size(axes_with, axes_of):
    axes = axes_of(Dumbbell("T", [("ten signs!", 0.9, 0.3)]))
    width, height = axes.figure.get_size_inches()
    box = axes.get_position()
    assert (width, height) == (pytest.approx(4.7), pytest.approx(1.75))
    margins = (box.x0 * width, (1 - box.x1) * width, (1 - box.y1) * height, box.y0 * height)
    assert margins == pytest.approx((0.15 + 0.075 * 10, 0.6, 0.85, 0.4))
    for zero, longest in (("natural source!", "natural source!"), ("zero", ROBUST.label), ("", ROBUST.label)):
        axes = axes_with([Series(ROBUST, [1], [0.5], [0.0])], Axis("n"), zero=zero)
        box = axes.get_position()
        width = axes.figure.get_size_inches()[0]
        assert (1 - box.x1) * width == pytest.approx(0.4 + 0.072 * len(longest))


def test_long_names_and_large_numbers_are_shortened(axes_with):
    sources = [
        SourceInfo("x" * 22, "l2", 1.0),
        SourceInfo("y" * 23, "l2", 1.0),
        SourceInfo("nat", "none", 0.0),
    ]
    first, second, natural = figures.styles(sources).values()
    assert natural.label == "natural" and first.label == "x" * 22  # two of one threat go by their names
    assert (natural.hollow, first.hollow) == (True, False) and first.colour != second.colour
    lines = [Series(style, [9_999, 10_000], [y, y], [0.0] * 2) for style, y in ((first, 0.2), (second, 0.8))]
    axes = axes_with(lines, Axis("n"))
    assert set(_names(axes)) == {"x" * 22, "y" * 21 + "…"}
    assert "10k" in [text.get_text() for text in axes.get_xticklabels()]
    axes = axes_with([Series(first, [9_999], [0.5], [0.0])], Axis("n"))
    assert [text.get_text() for text in axes.get_xticklabels()] == ["9999"]


def test_marks_of_natural_sources_are_hollow(axes_with):
    lines = [Series(style, [1, 2], [y, y], [0.0] * 2) for style, y in ((NATURAL, 0.2), (ROBUST, 0.8))]
    axes = axes_with(lines, Axis("n"))
    for style, face, edge in ((NATURAL, "white", NATURAL.colour), (ROBUST, ROBUST.colour, "white")):
        drawn = _drawn(axes, style.colour)
        assert (drawn.get_markerfacecolor(), drawn.get_markeredgecolor()) == (face, edge)


def test_a_picture_is_cut_off_and_what_is_no_number_is_black():
    data = figures.png(np.array([[[-1.0, 2.0, math.nan], [0.5, 0.25, 1.0]]]))
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert pixels.tolist() == [[[0, 255, 0], [128, 64, 255]]]


def test_differences_are_magnified_until_the_largest_fills_half_of_the_range():
    zeros = np.zeros((2, 3, 3, 3))
    for pairs, gain in (
        ([(zeros, zeros + 0.1)], 5),
        ([(zeros, zeros + 0.01), (zeros + 0.1, zeros)], 5),
        ([(zeros + 0.5, zeros + 0.4)], 5),
        ([(zeros, zeros + 0.7)], 1),
        ([(zeros, zeros)], 1),
        ([], 1),
    ):
        assert figures.difference_gain(pairs) == gain


def test_a_range_holds_every_interval():
    lines = [Series(None, [1, 2], [0.2, 0.5], [0.1, math.nan]), Series(None, [1], [math.nan], [9.0])]
    # From 0.1 to 0.5, and 6 % of that on either side.
    assert figures.value_range(lines) == pytest.approx((0.076, 0.524))
    assert figures.value_range(lines, lead=True) == pytest.approx((-0.03, 0.53))
    beyond = [Series(None, [1], [0.5], [0.9])]
    assert figures.value_range(beyond) == (-0.02, 1.02)  # what an accuracy can be
    assert figures.value_range(beyond, lead=True) == pytest.approx((-0.508, 1.508))
    high = Series(None, [1], [0.9], [0.05])
    assert figures.value_range([*lines, high]) == pytest.approx((0.1 - 0.051, 0.95 + 0.051))
    assert figures.value_range([Series(None, [1], [0.5], [0.0])]) == pytest.approx((0.49, 0.51))
    assert figures.value_range([]) == (0.0, 1.0)


def test_bounds_take_the_place_of_a_symmetric_band(axes_with):
    line = Series(ROBUST, [0, 2], [0.0, 0.5], [math.nan] * 2, [(0.0, 0.1), (0.4, 0.7)])
    (band,) = axes_with([line], Axis("ε")).collections
    corners = {tuple(np.round(corner, 9)) for corner in band.get_paths()[0].vertices}
    assert corners == {(0, 0), (0, 10), (2, 40), (2, 70)}


def test_names_of_lines_that_end_at_zero_stay_above_the_axis(axes_with):
    lines = [Series(style, [0, 1], [1.0, 0.0], [math.nan] * 2) for style in (NATURAL, ROBUST, OTHER)]
    heights = sorted(_names(axes_with(lines, Axis("ε"))).values())
    assert heights == pytest.approx([0, 7.5, 15])


def test_a_scatter_has_marks_and_intervals_in_both_directions(axes_of):
    points = [(ROBUST, (0.9, 0.88, 0.91), (0.5, 0.4, 0.65)), (NATURAL, (0.99, 0.98, 1.0), (0.1, 0.08, 0.2))]
    axes = axes_of(Scatter("T", "natural", "robust", points))
    drawn = {tuple(map(tuple, np.round(line.get_xydata(), 9))) for line in axes.lines}
    assert {((88, 50), (91, 50)), ((90, 40), (90, 65)), ((90, 50),)} <= drawn
    assert {((98, 10), (100, 10)), ((99, 8), (99, 20)), ((99, 10),)} <= drawn
    assert axes.get_xlim() == pytest.approx((87, 101)) and axes.get_ylim() == pytest.approx((4.58, 68.42))
    assert _names(axes) == {"ℓ2 (ε = 0.5)": pytest.approx(50), "natural": pytest.approx(10)}
    assert (axes.get_xlabel(), axes.texts[1].get_text()) == ("natural", "robust")
