"""Calibration against closed forms, brute force and simulated networks whose temperature is known."""

import numpy as np
import pytest
import scipy

import advtransfer as at
from advtransfer import calibration


def simulated(num_images, *, temperature=1.0, num_classes=5, seed=0, scale=2.0):
    """Logits, and labels drawn from softmax(logits / temperature)."""
    rng = np.random.default_rng(seed)
    logits = scale * rng.standard_normal((num_images, num_classes))
    drawn = rng.random((num_images, 1)) < np.cumsum(scipy.special.softmax(logits / temperature, 1), axis=1)
    return logits, drawn.argmax(axis=1)


def loss(logits, labels, temperature):
    return scipy.special.log_softmax(logits / temperature, axis=1)[np.arange(len(labels)), labels].mean() * -1


def test_the_temperature_has_the_least_loss():
    logits, labels = simulated(400, temperature=1.7)
    found = calibration.fit_temperature(logits, labels).value
    grid = found * np.geomspace(0.5, 2, 2001)
    best = grid[np.argmin([loss(logits, labels, t) for t in grid])]
    assert found == pytest.approx(best, rel=1e-3)


def test_the_temperature_of_two_classes_in_closed_form():
    # Logits ±a of which a share p is right: 2a / T is the logit of p.
    logits = np.tile([[3.0, -3.0]], (100, 1))
    labels = np.array([0] * 90 + [1] * 10)
    found = calibration.fit_temperature(logits, labels)
    assert found.value == pytest.approx(6 / np.log(9))
    # The information of 1 / T is N (2a)^2 p (1 - p).
    error = found.value / np.sqrt(100 * 36 * 0.09)
    assert found.high == pytest.approx(found.value * np.exp(scipy.special.ndtri(0.975) * error))


def test_the_interval_covers_the_temperature():
    covered = 0
    for seed in range(200):
        found = calibration.fit_temperature(*simulated(300, temperature=1.5, seed=seed))
        covered += found.low < 1.5 < found.high
    assert 180 <= covered <= 199  # binomial: 0.95 within four standard errors


def test_the_error_of_a_calibrated_network_is_in_the_expected_range():
    inside = 0
    for seed in range(100):
        logits, labels = simulated(200, seed=seed)
        found = calibration.measure_calibration(calibration.probabilities(logits), labels)
        inside += found.expected[0] <= found.ece <= found.expected[1]
    assert 86 <= inside <= 100


def test_the_calibration_error_by_hand():
    # Two bins of 1/15: (0.82, 0.84; one of two right) and (0.95; right).
    largest = np.array([0.82, 0.84, 0.95])
    scaled = np.stack([largest, 1 - largest], axis=1)
    found = calibration.measure_calibration(scaled, np.array([0, 1, 0]))
    assert found.ece == pytest.approx((abs(1 - 0.82 - 0.84) + 0.05) / 3)
    assert found.loss == pytest.approx(-np.log([0.82, 0.16, 0.95]).mean())


def test_every_image_is_in_one_point_of_the_curve():
    logits, labels = simulated(137)
    scaled = calibration.probabilities(logits)
    found = calibration.measure_calibration(scaled, labels)
    assert found.count.sum() == 137
    assert (found.count * found.probability).sum() == pytest.approx(scaled.max(axis=1).sum())
    assert (found.count * found.accuracy).sum() == pytest.approx((scaled.argmax(axis=1) == labels).sum())
    assert np.all(found.low <= found.accuracy) and np.all(found.accuracy <= found.high)


def test_scaling_mends_an_overconfident_network():
    logits, labels = simulated(1000, temperature=3.0)
    found = at.calibrate(logits, labels)
    assert found.before.ece > found.before.expected[1]
    assert found.after.expected[0] <= found.after.ece <= found.after.expected[1]
    assert found.after.loss < found.before.loss
    np.testing.assert_array_equal(found.held_out.argmax(1), logits.argmax(1))  # no prediction changes


def test_an_image_has_no_part_in_its_own_temperature():
    logits, labels = simulated(60, temperature=2.0)
    held_out = at.calibrate(logits, labels).held_out
    others = labels.copy()
    others[7] = (labels[7] + 1) % 5
    changed = at.calibrate(logits, others).held_out
    np.testing.assert_array_equal(changed[7], held_out[7])
    assert np.any(changed != held_out)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: (10 * np.eye(5), np.arange(5)), "all 5 held-out images are classified correctly"),
        (lambda: (np.eye(5), np.roll(np.arange(5), 1)), "no better than chance"),
        (lambda: simulated(8, temperature=2.0, seed=3), "8 held-out images are too few for a temperature"),
        (lambda: (np.array([[0.0, 1.0]]), np.array([0])), "on the 1 held-out image the network is no better"),
    ],
)
def test_where_the_images_do_not_tell_it_the_temperature_is_1(make, problem):
    logits, labels = make()
    found = at.calibrate(logits, labels)
    assert found.temperature.value == 1 and problem in found.temperature.problem
    np.testing.assert_allclose(found.probabilities(logits), scipy.special.softmax(logits, axis=1))
    assert found.after is found.before


def test_large_logits():
    logits, labels = simulated(200, temperature=1e4, scale=1e4)
    found = at.calibrate(logits, labels)
    assert found.temperature.value == pytest.approx(1e4, rel=0.3)
    assert np.isfinite(found.after.loss)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.array([[0.0, np.nan]]), np.array([0]), "not finite"),
        (np.zeros((2, 3)), np.array([0, 3]), "labels are not integers from 0 to 2"),
        (np.zeros((2, 3)), np.array([0.0, 1.0]), "labels are not integers from 0 to 2"),
        (np.zeros((2, 3)), np.array([0]), r"logits are \(2, 3\) and labels \(1,\)"),
        (np.zeros((0, 3)), np.zeros(0, int), r"logits are \(0, 3\)"),
    ],
)
def test_bad_input_is_refused(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        at.calibrate(logits, labels)


def test_a_calibration_prints_as_a_line():
    logits, labels = simulated(200, temperature=2.0)
    text = repr(at.calibrate(logits, labels))
    assert text.startswith("Calibration(temperature=") and text.endswith("200 images)") and len(text) < 150
