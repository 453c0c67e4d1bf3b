"""The page that compares networks, from numbers made up here."""

import math

import pytest
from pages import decoded, read_csv, read_page

from advtransfer.report.figures import describe, styles
from advtransfer.report.render import write_page
from advtransfer.report.robustness_page import Measured, robustness_sections
from advtransfer.report.sections import Page, Scatter, SourceInfo

NAMES = ("plain", "sturdy", "middling")
INFOS = (
    SourceInfo("plain", "none", 0.0),
    SourceInfo("sturdy", "l2", 0.5),
    SourceInfo("middling", "l2", 0.25),
)
CURVES = {  # natural, ℓ2 0.25, ℓ2 0.5, ℓ∞ 4/255
    "plain": (0.98, 0.5, 0.1, 0.02),
    "sturdy": (0.9, 0.8, 0.7, 0.4),
    "middling": (0.95, 0.75, 0.4, 0.3),
}
AT = (("none", 0.0), ("l2", 0.25), ("l2", 0.5), ("linf", 4 / 255))


def row(norm, eps, accuracy, attack, **more):
    found = {"norm": norm, "eps": eps, "attack": attack, "num_steps": None, "accuracy": accuracy}
    return (
        found | {"lower": accuracy - 0.03, "upper": accuracy + 0.01, "loss": None, "num_images": 200} | more
    )


def network(info, stages=(), **more):
    rows = [
        row(norm, eps, accuracy, "PGD" if eps else "none", num_steps=7 if eps else None)
        for (norm, eps), accuracy in zip(AT, CURVES[info.name], strict=True)
    ]
    rows.append(row("l2", 0.25, 0.123, "PGD, all steps", num_steps=7, loss=1.5, num_images=50))
    rows += [row("l2", 0.25, accuracy, f"AutoAttack (standard): {name}") for name, accuracy in stages]
    return Measured(info, info.name == "middling", rows, **more)


def bound(sensitivity, sharp, attacked):
    means = {"sensitivity": sensitivity, "loss": 0.1, "sharp_bound": sharp, "bound": 10 * sharp}
    shares = {"keeps_label": 0.25, "attacked_accuracy": 0.5}
    return {"norm": "l2", "eps": 0.25, "num_images": 50, "attacked_loss": attacked} | means | shares


def page_of(networks, folder, norm="l2", eps=0.25):
    sections = robustness_sections(networks, norm=norm, eps=eps)
    headline = [section.finding for section in sections]
    return sections, read_page(write_page(Page("T", sections, headline), folder))


def test_curves_and_tables_hold_every_number(tmp_path):
    sections, page = page_of([network(info) for info in INFOS], tmp_path)
    assert [section.title for section in sections] == [
        "Accuracy against ε",
        "Accuracy and robustness",
        "Warnings",
    ]
    plot, l2, linf = sections[0].parts
    assert [panel.title for panel in plot.panels] == ["ℓ2 attacks", "ℓ∞ attacks"]
    of = {line.style.label: line for line in plot.panels[0].series}
    assert (of["sturdy"].x, of["sturdy"].mean) == ([0.0, 0.25, 0.5], [0.9, 0.8, 0.7])
    assert of["plain"].bounds[1] == pytest.approx((0.47, 0.51))
    assert plot.panels[1].series[2].x == pytest.approx([0, 4])
    assert l2.heads == ["Network", "Natural", "ε = 0.25", "ε = 0.5"] and linf.heads[-1] == "ε = 4/255"
    assert page.rows[1] == ["plain natural", "98.0 95.0 … 99.0", "50.0 47.0 … 51.0", "10.0 7.0 … 11.0"]
    assert page.rows[3][0] == "middling from ℓ2 (ε = 0.25)"
    written = read_csv(tmp_path / "evaluation.csv")
    assert list(written[0])[:5] == ["model", "norm", "eps", "attack", "num_steps"]
    assert len(written) == 15 and {r["model"] for r in written} == {*NAMES}
    assert [r["loss"] for r in written if r["attack"] == "PGD, all steps"] == ["1.5"] * 3
    assert "Natural accuracy on 200 images: plain 98.0 %, sturdy 90.0 %, middling 95.0 %." in page.text


def test_the_trade_off_has_a_point_with_both_intervals_for_every_network(tmp_path):
    sections, page = page_of([network(info) for info in INFOS], tmp_path)
    (part,) = sections[1].parts
    ((style, natural, robust), *_) = part.panels[0].points
    assert style.label == "plain"
    assert (natural, robust) == (pytest.approx((0.98, 0.95, 0.99)), pytest.approx((0.5, 0.47, 0.51)))
    assert sections[1].finding == (
        "Under ℓ2 PGD-7, ε = 0.25, the most robust network is sturdy: 90.0 % natural, 80.0 % under attack; "
        "the most accurate is plain: 98.0 % natural, 50.0 % under attack."
    )
    assert "plain 50.0 at 98.0; sturdy 80.0 at 90.0" in page.text + page.images[2]["alt"]
    kind, content = decoded(page.images[2])
    assert kind == "svg+xml" and b"middling" in content


def test_autoattack_takes_the_place_of_pgd_in_the_trade_off(tmp_path):
    stages = [("apgd-ce", 0.45), ("square", 0.4)]
    sections, page = page_of([network(info, stages) for info in INFOS[:2]], tmp_path)
    assert "Under ℓ2 AutoAttack (standard), ε = 0.25, the most robust" in sections[1].finding
    assert sections[1].parts[0].panels[0].points[0][2] == pytest.approx((0.4, 0.37, 0.41))
    assert sections[2].title == "AutoAttack"
    assert sections[2].finding == "AutoAttack (standard) leaves plain 40.0 %, sturdy 40.0 %."
    assert ["sturdy", "90.0 87.0 … 91.0", "45.0 42.0 … 46.0", "40.0 37.0 … 41.0"] in page.rows
    assert "Square that beats attacks by gradients" in page.text


def test_one_network_has_no_trade_off_and_no_attack_no_warnings(tmp_path):
    sections, _ = page_of([network(INFOS[1])], tmp_path / "one")
    assert [section.title for section in sections] == ["Accuracy against ε", "Warnings"]
    natural = [Measured(info, False, network(info).rows[:1]) for info in INFOS]
    sections, page = page_of(natural, tmp_path / "natural", norm="none")
    assert [section.title for section in sections] == ["Accuracy"]
    assert page.rows[2] == ["sturdy ℓ2 (ε = 0.5)", "90.0 87.0 … 91.0"] and page.images == []


def test_warnings_are_told_with_their_sources_or_their_absence(tmp_path):
    signs = [("steps", "The loss does not rise.", "Carlini et al., 2019, §5.2"), ("x", "<b>.", "AutoAttack")]
    sections, page = page_of([network(INFOS[0]), network(INFOS[1], warnings=signs)], tmp_path / "some")
    assert sections[2].finding == "2 warnings: the accuracy under attack of sturdy may not be robustness."
    assert "sturdy: The loss does not rise. (Carlini et al., 2019, §5.2)" in page.text
    assert "sturdy: <b>. (AutoAttack)" in page.text
    assert [r["name"] for r in read_csv(tmp_path / "some/warnings.csv")] == ["steps", "x"]
    _, page = page_of([network(INFOS[0])], tmp_path / "none")
    assert "No check found a sign that these accuracies are not robustness." in page.text
    assert "Checked: randomness; " in page.text and "Square" not in page.text
    assert not (tmp_path / "none/warnings.csv").exists()


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        (
            [(1, 1, 0.1), (2, 2, 0.2), (3, 3, 0.3)],
            "of 1.00 for the sensitivity alone, 1.00 for the sharp bound",
        ),
        (
            [(3, 1, 0.1), (2, 2, 0.2), (1, 3, 0.3)],
            "of −1.00 for the sensitivity alone, 1.00 for the sharp bound",
        ),
        (
            [(1, 1, 0.1), (3, 3, 0.2), (2, 2, 0.3)],
            "of 0.50 for the sensitivity alone, 0.50 for the sharp bound",
        ),
        (
            [(1, 1, 0.1), (1, 2, 0.2), (1, 3, 0.3)],
            "of nan for the sensitivity alone, 1.00 for the sharp bound",
        ),
    ],
)
def test_whether_the_bound_ranks_networks_as_the_attack_does(numbers, expected, tmp_path):
    """Spearman's ρ by hand: 1 − 6 Σd² / (n (n² − 1))."""
    networks = [network(info, bound=bound(*x)) for info, x in zip(INFOS, numbers, strict=True)]
    sections, page = page_of(networks, tmp_path)
    assert expected in sections[-1].finding and "rank 3 networks as" in sections[-1].finding
    assert "An estimate, not a certificate" in page.text
    assert page.rows[-1][0] == "middling" and page.rows[-1][-2:] == ["25.0", "50.0"]
    assert len(read_csv(tmp_path / "head_bound.csv")) == 3


def test_two_networks_are_not_ranked_and_a_bound_that_fails_is_named(tmp_path):
    networks = [network(info, bound=bound(1, 0.5, 0.1 + i)) for i, info in enumerate(INFOS[:2])]
    finding = page_of(networks, tmp_path)[0][-1].finding
    assert finding == "The attack found more than the estimate allows: sturdy."


def test_a_scatter_is_told_in_words():
    style = styles(INFOS)["plain"]
    found = describe(Scatter("T", "x", "y", [(style, (0.5, 0.4, 0.6), (0.25, math.nan, math.nan))]))
    assert found == "T: y against x. natural 25.0 at 50.0."
