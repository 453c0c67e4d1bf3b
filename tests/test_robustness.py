"""Curves against closed forms and plain counts; what is compiled; AutoAttack's place; warnings."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from advtransfer import parallel
from advtransfer.attacks import Linf, auto_attack, cross_entropy, pgd
from advtransfer.compilation import compile_clock
from advtransfer.data import Split, to_float
from advtransfer.evaluate import Evaluation, evaluate, evaluation_key
from advtransfer.intervals import wilson
from advtransfer.robustness import LARGE, NATURAL, PGD, PROBE, Curves, measure_robustness, probed

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(90, 166, (37, 4, 4, 3), dtype=np.uint8)  # far inside the box
WEIGHTS = RNG.normal(size=48).astype(np.float32)
HIDDEN = RNG.normal(size=(48, 8)).astype(np.float32), RNG.normal(size=(8, 3)).astype(np.float32)


def line(weights, x):
    """Two classes: the side of a plane."""
    score = (x.reshape(len(x), -1) - 0.5) @ weights
    return jnp.stack([-score, score], axis=1)


def curve(weights, x):
    return 2 * jnp.tanh(jax.nn.softplus(4 * (x.reshape(len(x), -1) - 0.5)) @ weights[0] / 4) @ weights[1]


LINE, CURVE = Partial(line, jnp.asarray(WEIGHTS)), Partial(curve, tuple(map(jnp.asarray, HIDDEN)))
SCORES = (IMAGES.reshape(37, -1) / np.float32(255) - 0.5) @ WEIGHTS
LABELS = np.int32(SCORES > 0)
LABELS[:4] = 1 - LABELS[:4]  # which the network gets wrong
SPLIT = Split(IMAGES, LABELS)
CURVED = Split(IMAGES, np.asarray(CURVE(IMAGES / np.float32(255))).argmax(1).astype(np.int32))
EVALUATION = Evaluation(norm="linf", eps=0.02, num_steps=5, step_ratio=0.5, batch_size=8)


def points(found, attack=PGD):
    return {(row["norm"], row["eps"]): row for row in found.rows if row["attack"] == attack}


def test_of_a_plane_every_point_is_the_closed_form():
    """An image stands exactly while its distance to the plane, in the dual norm, exceeds ε."""
    curves = Curves(l2_epsilons=(0.4, 0.05, 0.15, 0.0), linf_epsilons=(0.005, 0.05))
    found = measure_robustness(LINE, SPLIT, EVALUATION, curves)
    (natural,) = points(found, NATURAL).values()
    assert natural["accuracy"] == 33 / 37 and natural["num_images"] == 37
    distances = {"l2": np.linalg.norm(WEIGHTS), "linf": np.abs(WEIGHTS).sum()}
    curve = points(found)
    assert [*curve] == [("l2", e) for e in (0.05, 0.15, 0.4)] + [("linf", e) for e in (0.005, 0.02, 0.05)]
    for (norm, eps), row in curve.items():
        expected = int(np.sum(np.abs(SCORES[4:]) / distances[norm] > eps))
        assert row["accuracy"] == expected / 37
        assert (row["lower"], row["upper"]) == pytest.approx(wilson(expected, 37))
        assert (row["loss"], row["num_steps"], row["num_images"]) == (None, 5, 37)
    assert len({row["accuracy"] for row in curve.values()}) > 3
    assert found.warnings == ()


def test_a_curve_is_its_points_one_by_one_and_never_rises():
    """Against `pgd` on all images at every ε: what a smaller ε fools counts at the larger."""
    epsilons, fooled = (0.002, 0.005, 0.01, 0.02), np.zeros(37, bool)
    found = points(measure_robustness(CURVE, CURVED, EVALUATION, Curves(linf_epsilons=epsilons)))
    images = to_float(jnp.asarray(IMAGES))
    for eps in epsilons:
        attacked = pgd(
            CURVE, images, CURVED.labels, Linf(eps), num_steps=5, step_size=0.5 * eps, early_finish=True
        )
        fooled |= np.asarray(CURVE(attacked)).argmax(1) != CURVED.labels
        assert found["linf", eps]["accuracy"] == np.mean(~fooled)
    assert 0 < found["linf", 0.02]["accuracy"] < found["linf", 0.005]["accuracy"] < 1


def test_what_a_small_ball_holds_counts_for_the_large_one():
    """A narrow valley beside every image, which the long steps of a large ε jump over."""

    def valley(depth, x):
        z = (x - 0.5).mean(axis=(1, 2, 3))
        score = 1 - depth * jnp.exp(-(((z - 0.01) / 0.004) ** 2)) + 0 * z
        return jnp.stack([score, 0 * z], axis=1)

    network, grey = Partial(valley, 3.0), Split(np.full((3, 4, 4, 3), 128, np.uint8), np.zeros(3, np.int32))
    alone = measure_robustness(network, grey, replace(EVALUATION, eps=0.4))
    assert points(alone)["linf", 0.4]["accuracy"] == 1
    both = measure_robustness(network, grey, EVALUATION, Curves(linf_epsilons=(0.4,)))
    assert [row["accuracy"] for row in points(both).values()] == [0, 0]


def test_natural_accuracy_and_loss_are_those_of_evaluate():
    found = measure_robustness(LINE, SPLIT, EVALUATION).rows[0]
    expected = evaluate(LINE, SPLIT, batch_size=8)
    assert found["accuracy"] == pytest.approx(expected["accuracy"])
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_losses_are_of_all_steps_whatever_was_fooled_before():
    found = [row for row in measure_robustness(CURVE, CURVED, EVALUATION).rows if row["attack"] == PROBE]
    assert [row["num_steps"] for row in found] == [0, 1, 5]
    images = to_float(jnp.asarray(IMAGES))
    for row, step in zip(found, (0.0, 0.05, 0.01), strict=True):
        attacked = pgd(CURVE, images, CURVED.labels, Linf(0.02), num_steps=row["num_steps"], step_size=step)
        expected = float(cross_entropy(CURVE(attacked), CURVED.labels).mean())
        assert row["loss"] == pytest.approx(expected, rel=1e-5)
    assert found[0]["loss"] < found[1]["loss"]


@pytest.mark.parametrize("restarts", [1, 2])
def test_neither_the_batch_nor_the_devices_change_a_row(restarts, monkeypatch):
    evaluation = dict(norm="l2", eps=0.3, num_steps=3, num_restarts=restarts)
    rows = [
        measure_robustness(CURVE, CURVED, Evaluation(**evaluation, batch_size=size), Curves(), seed=3).rows
        for size in (4, 64)
    ]
    assert parallel.choose_devices(4) == 2
    monkeypatch.setattr(parallel, "choose_devices", lambda _: 1)
    rows.append(
        measure_robustness(CURVE, CURVED, Evaluation(**evaluation, batch_size=8), Curves(), seed=3).rows
    )
    for other in rows[1:]:
        assert len(other) == len(rows[0])
        for a, b in zip(rows[0], other, strict=True):
            assert a | {"loss": 0} == b | {"loss": 0}
            assert a["loss"] == (b["loss"] and pytest.approx(b["loss"], rel=1e-5))


def test_all_radii_of_a_norm_are_one_program():
    """And those of another network of the same kind."""
    first, second = Curves(l2_epsilons=(0.1, 0.2)), Curves(l2_epsilons=(0.05, 0.3, 0.7, 0.9))
    evaluation = Evaluation(norm="l2", eps=0.15, num_steps=4, batch_size=8)
    measure_robustness(LINE, SPLIT, evaluation, first)
    other = Partial(line, jnp.asarray(WEIGHTS[::-1].copy()))
    with compile_clock() as compiled:
        measure_robustness(LINE, SPLIT, evaluation, second)
        measure_robustness(other, SPLIT, evaluation, second)
    assert compiled == []


def test_images_of_another_size_are_resized():
    small = Split(IMAGES[:, :3, :3], LABELS)
    found = measure_robustness(LINE, small, EVALUATION, image_size=4).rows[0]
    assert found["accuracy"] == pytest.approx(evaluate(LINE, small, image_size=4, batch_size=8)["accuracy"])


def test_the_first_images_are_measured_and_probed_ones_are_drawn_among_them():
    found = measure_robustness(LINE, SPLIT, Evaluation(norm="none", num_images=10, batch_size=8))
    assert found.rows[0]["num_images"] == 10 and len(found.rows) == 1 and found.warnings == ()
    many = Split(np.repeat(IMAGES, 10, axis=0), np.arange(370, dtype=np.int32) % 2)
    chosen = probed(many, 0)
    assert chosen.num_images == 256 and np.ptp(chosen.labels) == 1
    np.testing.assert_array_equal(chosen.images, probed(many, 0).images)
    assert not np.array_equal(chosen.images, probed(many, 1).images)


def test_a_network_that_hides_its_gradients_is_warned_of():
    """Pixels in steps: no attack by gradients moves them, at whatever ε."""
    rounded = Partial(lambda w, x: line(w, jnp.round(16 * x) / 16), jnp.asarray(WEIGHTS))
    labels = np.asarray(rounded(IMAGES / np.float32(255))).argmax(1).astype(np.int32)
    found = measure_robustness(rounded, Split(IMAGES, labels), EVALUATION, Curves(l2_epsilons=(0.1, 0.2)))
    assert [warning.name for warning in found.warnings] == ["zero gradient", *["steps", "large ε"] * 2]
    assert all("Carlini et al., 2019, §" in warning.source for warning in found.warnings)
    steps = [warning.message for warning in found.warnings if warning.name == "steps"]
    assert "ℓ2 PGD, ε = 0.2" in steps[0] and "ℓ∞ PGD, ε = 0.02" in steps[1]
    (large,) = {eps: row for (norm, eps), row in points(found, LARGE).items() if norm == "l2"}.items()
    assert large[0] == pytest.approx(0.5 * 48**0.5) and large[1]["accuracy"] == 1.0


def test_a_network_is_any_callable_and_one_that_draws_is_found_out():
    """Whose state is looked at anew."""
    numbers = itertools.count()

    def noisy(x):
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), next(numbers)), (len(x), 2))
        return LINE(x) + 1e-3 * noise

    found = measure_robustness(noisy, SPLIT, EVALUATION)
    assert [warning.name for warning in found.warnings] == ["randomness"]
    plain = measure_robustness(lambda x: LINE(x), SPLIT, EVALUATION)
    assert plain.warnings == () and plain.rows == measure_robustness(LINE, SPLIT, EVALUATION).rows


def test_autoattack_is_shown_attack_by_attack():
    """In the norm and ε of the evaluation, with its batches, and with the warnings of both once."""

    def flat(x):  # no gradient, and logits of all attacks alike
        return jnp.round(LINE(x) * 50) / 50

    found = measure_robustness(flat, SPLIT, EVALUATION, Curves(auto_attack="standard"))
    images = IMAGES / np.float32(255)
    own = auto_attack(flat, images, SPLIT.labels, Linf(0.02), key=evaluation_key(0), batch_size=8)
    rows = [row for row in found.rows if row["attack"].startswith("AutoAttack")]
    assert [row["attack"] for row in rows] == [
        f"AutoAttack (standard): {name}" for name in ("apgd-ce", "apgd-t", "fab-t", "square")
    ]
    assert [row["accuracy"] for row in rows] == pytest.approx([*own.accuracy.values()][1:])
    assert {(row["norm"], row["eps"], row["num_steps"], row["num_images"]) for row in rows} == {
        ("linf", 0.02, None, 37)
    }
    names = [warning.name for warning in found.warnings]
    assert "zero gradient" in names and len(names) == len(set(names))
    assert {warning.name for warning in own.warnings} <= set(names)


@pytest.mark.parametrize(
    ("evaluation", "curves", "message"),
    [
        ({"norm": "none"}, {"l2_epsilons": (0.1,)}, "norm=none measures natural accuracy alone"),
        ({"norm": "none"}, {"auto_attack": "plus"}, "norm=none measures natural accuracy alone"),
        ({"eps": 0.0}, {"auto_attack": "standard"}, "eps=0 leaves auto_attack=standard nothing to change"),
    ],
)
def test_what_does_not_go_together_is_refused(evaluation, curves, message):
    with pytest.raises(ValueError, match=message):
        measure_robustness(LINE, SPLIT, Evaluation(**evaluation, batch_size=8), Curves(**curves))


def test_logits_that_are_no_numbers_are_no_robustness():
    network = Partial(
        lambda w, x: line(w, x) / jnp.where(x.mean(axis=(1, 2, 3)) > 0.5, 1.0, 0.0)[:, None],
        jnp.asarray(WEIGHTS),
    )
    with pytest.raises(ValueError, match="images are not finite numbers"):
        measure_robustness(network, SPLIT, EVALUATION)


def test_labels_that_are_no_classes_are_refused():
    with pytest.raises(ValueError, match="the network has 2 classes"):
        measure_robustness(LINE, Split(IMAGES, LABELS + 1), EVALUATION)
