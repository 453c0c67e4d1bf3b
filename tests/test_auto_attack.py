"""AutoAttack against closed forms, SciPy, hand-worked schedules, and the authors' own code."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog, minimize

import advtransfer as at
from advtransfer.attacks import L2, Linf, dlr, targeted_dlr
from advtransfer.attacks.apgd import apgd, next_schedule, start_schedule, targeted_apgd
from advtransfer.attacks.autoattack import attacks_of, auto_attack
from advtransfer.attacks.fab import project_to_hyperplane, targeted_fab
from advtransfer.attacks.square import sides_of, square
from advtransfer.compilation import compile_clock

OFFICIAL = Path(__file__).parent / "fixtures" / "autoattack"
THREATS = {"l2": L2(0.4), "linf": Linf(0.03)}
SHAPE = (4, 6, 3)


def _linear(num_classes, seed=1):
    weights = np.random.default_rng(seed).normal(size=(int(np.prod(SHAPE)), num_classes)).astype(np.float32)
    return weights, lambda x: x.reshape(len(x), -1) @ weights


def _images(number, low=0.3, high=0.7, seed=0):
    return np.random.default_rng(seed).uniform(low, high, (number, *SHAPE)).astype(np.float32)


def _distances(moves, threat_model):
    moves = moves.reshape(len(moves), -1)
    return np.linalg.norm(moves, axis=1) if isinstance(threat_model, L2) else np.abs(moves).max(axis=1)


def _linear_distances(weights, images, threat_model):
    """To the nearest boundary of a linear network, were there no box."""
    logits = images.reshape(len(images), -1) @ weights
    labels = logits.argmax(1)
    dual = 2 if isinstance(threat_model, L2) else 1
    found = []
    for scores, label in zip(logits, labels, strict=True):
        others = [j for j in range(len(scores)) if j != label]
        norms = np.linalg.norm(weights[:, others] - weights[:, [label]], ord=dual, axis=0)
        found.append(((scores[label] - scores[others]) / norms).min())
    return labels, np.array(found)


# --- the whole ---------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize(
    ("attack", "num_classes"),
    [
        ("standard", 2),
        ("standard", 3),
        ("apgd-ce", 5),
        ("apgd-t", 5),
        ("fab-t", 5),
        *(pytest.param("plus", number, marks=pytest.mark.sweep) for number in (2, 3, 5)),
    ],
)
def test_a_linear_network_is_robust_up_to_its_margin(attack, norm, num_classes):
    """The box is nowhere near: an image holds where its distance to the boundary is larger than ε."""
    weights, network = _linear(num_classes)
    images = _images(40)
    labels, distances = _linear_distances(weights, images, THREATS[norm])
    threat_model = type(THREATS[norm])(float(np.median(distances)))
    all_attacks = attacks_of("plus" if attack == "plus" else "standard", num_classes)
    # Square finds nothing more here, and takes long to say so.
    names = [attack] if attack in all_attacks else [name for name in all_attacks if name != "square"]
    chosen = {name: all_attacks[name] for name in names}
    found = auto_attack(network, images, labels, threat_model, attacks=chosen, batch_size=16)
    clear = np.abs(distances / threat_model.eps - 1) > 0.01
    assert clear.sum() >= 35
    np.testing.assert_array_equal(found.robust[clear], (distances > threat_model.eps)[clear])
    _check_found(found, network, images, labels, threat_model)


def _check_found(found, network, images, labels, threat_model):
    """What is returned is allowed, and fools exactly where it says so."""
    assert found.images.min() >= 0 and found.images.max() <= 1
    assert _distances(found.images - images, threat_model).max() <= threat_model.eps * (1 + 1e-5)
    np.testing.assert_array_equal(np.argmax(network(found.images), axis=1) == labels, found.robust)
    np.testing.assert_array_equal(found.images[found.robust], images[found.robust])
    assert list(found.accuracy.values())[-1] == found.robust.mean()


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_square_finds_much_of_it_without_gradients(norm):
    weights, network = _linear(3)
    images = _images(40)
    labels, distances = _linear_distances(weights, images, THREATS[norm])
    threat_model = type(THREATS[norm])(float(np.median(distances)))
    found = auto_attack(network, images, labels, threat_model, attacks={"square": square(num_queries=2000)})
    _check_found(found, network, images, labels, threat_model)
    assert found.robust[distances > 1.01 * threat_model.eps].all()
    # These weights are noise; in ℓ2 Square moves by smooth patterns.
    share = 0.8 if norm == "linf" else 0.2
    assert (~found.robust).sum() >= share * (distances < threat_model.eps).sum()


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_images_at_the_edge_of_the_box(norm):
    """Black, white and mixed pixels: every attack keeps to the box, on images that are not square."""
    _, network = _linear(5)
    images = np.round(_images(12, low=0.0, high=1.0))
    labels = np.argmax(network(images), axis=1)
    attacks = attacks_of("standard", 5) | {"square": square(num_queries=200)}
    for name, search in attacks.items():
        found = auto_attack(network, images, labels, THREATS[norm], attacks={name: search})
        _check_found(found, network, images, labels, THREATS[norm])


def test_the_batch_size_changes_nothing_and_fewer_images_compile_nothing():
    weights, network = _linear(5)
    images = _images(48)
    labels, distances = _linear_distances(weights, images, L2(1))
    attacks = {name: search for name, search in attacks_of("standard", 5).items() if name != "square"}
    attacks["square"] = square(num_queries=300)

    def robust(number, batch_size):
        with compile_clock() as compiled:
            args = images[:number], labels[:number], L2(float(np.median(distances)))
            found = auto_attack(network, *args, attacks=attacks, batch_size=batch_size)
        return found.robust, len(compiled)

    all_at_once, _ = robust(48, 64)
    np.testing.assert_array_equal(robust(48, 16)[0], all_at_once)
    again, compiled = robust(48, 16)
    np.testing.assert_array_equal(again, all_at_once)
    assert compiled == 0
    fewer, compiled = robust(47, 16)
    np.testing.assert_array_equal(fewer, all_at_once[:47])
    assert compiled == 0


def test_right_answers_where_there_is_nothing_to_attack():
    _, network = _linear(4)
    images = _images(6)
    labels = np.argmax(network(images), axis=1)
    none = auto_attack(network, images[:0], labels[:0], L2(0.1))
    assert none.images.shape == (0, *SHAPE) and none.robust.shape == (0,) and np.isnan(none.accuracy["clean"])
    wrong = auto_attack(network, images, (labels + 1) % 4, L2(0.1))
    assert not wrong.robust.any() and set(wrong.accuracy.values()) == {0.0}
    np.testing.assert_array_equal(wrong.images, images)
    _, one_class = _linear(1)
    alone = auto_attack(one_class, images, np.zeros(6, int), Linf(0.5))
    assert alone.robust.all() and set(alone.accuracy.values()) == {1.0}


def test_warnings_come_with_the_numbers():
    """A network whose logits are rounded has no gradient; Square alone gets somewhere."""
    weights, network = _linear(3)
    images = _images(40)
    labels, distances = _linear_distances(weights, images, Linf(1))
    threat_model = Linf(float(np.quantile(distances, 0.8)))
    attacks = attacks_of("standard", 3) | {"square": square(num_queries=2000)}
    found = auto_attack(
        lambda x: jnp.round(network(x) * 20) / 20, images, labels, threat_model, attacks=attacks
    )
    assert [warning.name for warning in found.warnings] == ["zero gradient", "black box"]
    assert found.accuracy["fab-t"] > found.accuracy["square"] + 0.1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"threat_model": at.Unconstrained()}, "not Unconstrained"),
        ({"version": "rand"}, "standard, plus"),
        ({"images": _images(4) * 255}, "pass pixels in"),
        ({"images": (_images(4) * 255).astype(np.uint8)}, "uint8"),
        ({"labels": np.array([0, 1, 2, 3])}, "3 classes"),
        ({"logits_fn": lambda x: x.reshape(len(x), -1)[:, :3] / 0}, "4 of 4 images are not finite"),
    ],
)
def test_a_mistake_is_one_line(change, words):
    args = {"logits_fn": _linear(3)[1], "images": _images(4), "labels": np.zeros(4, int)}
    args = args | {"threat_model": L2(0.1)} | change
    with pytest.raises(ValueError, match=words) as error:
        auto_attack(**args)
    assert "\n" not in str(error.value)


# --- against the authors' code -----------------------------------------------------------------


def _official():
    facts = json.loads((OFFICIAL / "official.json").read_text())
    about, stored = facts["network"], np.load(OFFICIAL / "images.npz")
    model = at.import_torch_checkpoint(
        OFFICIAL / "digits.safetensors",
        architecture=about["architecture"],
        mean=tuple(about["mean"]),
        std=tuple(about["std"]),
    )
    return facts["robust"], at.logits_fn(model), stored["images"] / np.float32(255), stored["labels"]


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize(
    "name",
    [
        "apgd-ce",
        *(pytest.param(name, marks=pytest.mark.sweep) for name in ("standard", "apgd-t", "fab-t", "square")),
    ],
)
def test_the_authors_code_says_the_same_of_a_network(norm, name):
    """64 images; a random start moves one or two of them."""
    facts, network, images, labels = _official()
    theirs = np.array([*facts[norm][name]]) == "1"
    threat_model = (L2 if norm == "l2" else Linf)(facts[norm]["eps"])
    all_attacks = attacks_of("standard", 10)
    attacks = all_attacks if name == "standard" else {name: all_attacks[name]}
    found = auto_attack(network, images, labels, threat_model, attacks=attacks, batch_size=64)
    _check_found(found, network, images, labels, threat_model)
    assert 10 < theirs.sum() < 54
    assert (found.robust != theirs).sum() <= (5 if name == "square" else 2)


# --- the parts ---------------------------------------------------------------------------------


def test_the_step_size_halves_as_worked_by_hand():
    """10 steps: looks after 2 steps, then after every one."""
    schedule = start_schedule(1.0, jnp.array([0.5]), 10)
    assert schedule.step_size == 2 and schedule.period == 2
    # (whether the loss rose, the best so far, step size after it, whether the image goes back)
    steps = [
        (True, 1.0, 2.0, False),  # no look yet
        (False, 1.0, 1.0, True),  # 1 of 2 steps rose, fewer than 1.5
        (True, 2.0, 1.0, False),  # 1 of 1
        (True, 2.0, 0.5, True),  # rose, but neither step size nor best have changed since the last look
        (True, 2.0, 0.5, False),  # the step size has
        (False, 2.0, 0.25, True),
    ]
    for rose, best, size, back in steps:
        schedule, goes_back = next_schedule(schedule, jnp.array([rose]), jnp.array([best]), 10)
        assert (float(schedule.step_size[0]), bool(goes_back[0])) == (size, back)
    # 100 steps: 22, 3 fewer each time, down to 6; after the steps 22, 41, 57, 70, 80, 87, 93, 99 (§3.1).
    schedule, periods = start_schedule(1.0, jnp.array([0.0]), 100), []
    for _ in range(100):
        before = int(schedule.period[0])
        schedule, _ = next_schedule(schedule, jnp.array([True]), jnp.array([1.0]), 100)
        if schedule.since[0] == 0:
            periods.append(before)
    assert periods == [22, 19, 16, 13, 10, 7, 6, 6]


def _dlr_by_formula(logits, label):
    ordered = np.sort(logits)[::-1]
    return -(logits[label] - np.delete(logits, label).max()) / (ordered[0] - ordered[2] + 1e-12)


def _targeted_dlr_by_formula(logits, label, target):
    ordered = np.sort(logits)[::-1]
    return -(logits[label] - logits[target]) / (ordered[0] - (ordered[2] + ordered[3]) / 2 + 1e-12)


def test_dlr_is_its_formula():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(50, 6)).astype(np.float32)
    logits[:10] = np.round(logits[:10])  # ties, also of the largest
    logits[0], logits[1] = 1.0, [2, 2, 2, 0, 0, 0]
    labels, targets = rng.integers(0, 6, (2, 50)).astype(np.int32)
    expected = [_dlr_by_formula(x, y) for x, y in zip(logits.astype(float), labels, strict=True)]
    np.testing.assert_allclose(dlr(logits, labels), expected, rtol=1e-4)
    expected = [
        _targeted_dlr_by_formula(*each) for each in zip(logits.astype(float), labels, targets, strict=True)
    ]
    np.testing.assert_allclose(targeted_dlr(logits, labels, targets), expected, rtol=1e-4)
    for loss, number in ((lambda x: dlr(x, labels), 2), (lambda x: targeted_dlr(x, labels, targets), 3)):
        with pytest.raises(ValueError, match="take the margin"):
            loss(logits[:, :number])


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_projection_onto_a_hyperplane_is_scipys(norm):
    rng = np.random.default_rng(3)
    images, normals = rng.uniform(size=(30, 7)), rng.normal(size=(30, 7))
    normals[::5, 2] = 0.0
    images[::3] = np.round(images[::3])
    heights = rng.normal(size=30)
    args = (jnp.asarray(x, jnp.float32) for x in (images, normals, heights))
    moves = np.asarray(project_to_hyperplane(*args, L2(1.0) if norm == "l2" else Linf(1.0)), float)
    assert (images + moves).min() > -1e-6 and (images + moves).max() < 1 + 1e-6
    reached = 0
    for x, w, height, move in zip(images, normals, heights, moves, strict=True):
        most = np.maximum(w * np.sign(height) * (1 - x), -w * np.sign(height) * x).sum()
        if most < abs(height):  # the box does not meet it: as near as the box allows
            np.testing.assert_allclose(abs(move @ w), most, rtol=1e-4)
            continue
        reached += 1
        np.testing.assert_allclose(move @ w, height, rtol=1e-3, atol=1e-5)
        if norm == "l2":
            constraint = {"type": "eq", "fun": lambda d, w=w, height=height: d @ w - height}
            bounds = list(zip(-x, 1 - x, strict=True))
            best = minimize(
                lambda d: d @ d, np.zeros(7), jac=lambda d: 2 * d, bounds=bounds, constraints=constraint
            )
            assert best.success
            np.testing.assert_allclose(move @ move, best.fun, rtol=1e-3, atol=1e-6)
        else:  # the least t with -t <= d <= t
            eye, ones = np.eye(7), np.ones((7, 1))
            best = linprog(
                np.eye(8)[7],
                A_ub=np.block([[eye, -ones], [-eye, -ones]]),
                b_ub=np.zeros(14),
                A_eq=np.append(w, 0)[None],
                b_eq=[height],
                bounds=[*zip(-x, 1 - x, strict=True), (0, None)],
            )
            assert best.success
            np.testing.assert_allclose(np.abs(move).max(), best.fun, rtol=1e-3, atol=1e-6)
    assert reached > 15


def _side_as_published(query, pixels):
    """The schedule of the authors' code, branch by branch."""
    for first, last, share in (
        (10, 50, 2),
        (50, 200, 4),
        (200, 500, 8),
        (500, 1000, 16),
        (1000, 2000, 32),
        (2000, 4000, 64),
        (4000, 6000, 128),
    ):
        if first < query <= last:
            return round(np.sqrt(0.8 / share * pixels))
    return round(np.sqrt(0.8 * pixels))


def test_squares_shrink_as_published():
    expected = [max(_side_as_published(i, 32 * 32), 1) for i in range(5000)]
    assert expected[0] == 29 and expected[-1] == 3
    np.testing.assert_array_equal(sides_of((32, 32), 5000, odd=False), expected)
    odd = [max(side, 3) for side in expected]
    odd = [side + (side % 2 == 0) for side in odd]
    np.testing.assert_array_equal(sides_of((32, 32), 5000, odd=True), odd)
    assert sides_of((2, 50), 100, odd=True).max() == 2


def test_targets_are_the_most_probable_classes_but_the_label():
    """A network with one other class that can be reached, the second most probable or the last but one."""
    size = int(np.prod(SHAPE))
    images = np.full((1, *SHAPE), 0.5, np.float32)

    def network(x):
        rise = jnp.sum(x, axis=(1, 2, 3)) - size / 2  # 0 at the image
        zero = jnp.zeros_like(rise)
        return jnp.stack([zero + 1, zero + 0.9, zero + 0.8, zero + 0.5 + rise, zero + 0.1], axis=1)

    label = np.zeros(1, int)
    for num_targets, is_robust in ((2, True), (3, False)):
        attacks = {"apgd-t": targeted_apgd("margin", num_targets=num_targets)}
        assert auto_attack(network, images, label, Linf(0.02), attacks=attacks).robust.all() == is_robust
        attacks = {"fab-t": targeted_fab(num_targets=num_targets)}
        assert auto_attack(network, images, label, Linf(0.02), attacks=attacks).robust.all() == is_robust


def test_the_key_decides_where_apgd_starts():
    """One step from another start ends elsewhere; with the same key at the same place."""
    _, linear = _linear(3)
    images = _images(16)

    def network(x):
        return jnp.sin(40 * linear(x))

    labels = np.argmax(network(images), axis=1)
    attacks = {"apgd": apgd(num_steps=1)}
    first, same, other = (
        auto_attack(network, images, labels, Linf(0.01), key=jax.random.key(i), attacks=attacks).images
        for i in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, same)
    assert (first != images).any() and (first != other).any()
