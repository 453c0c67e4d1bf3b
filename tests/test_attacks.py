"""Attacks against closed forms on linear models, and the promises that hold on any network."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advtransfer.attacks import (
    L2,
    THREAT_MODELS,
    Linf,
    Unconstrained,
    cross_entropy,
    log_odds,
    make_attack,
    margin,
    pgd,
)

SHAPE = (5, 4, 4, 3)
MODELS = {"l2": L2(0.7), "linf": Linf(0.05), "unconstrained": Unconstrained()}


def _images(seed=0, low=0.0, high=1.0):
    return jnp.asarray(np.random.default_rng(seed).uniform(low, high, SHAPE), jnp.float32)


def _weights(num_classes=3, seed=1):
    size = int(np.prod(SHAPE[1:]))
    return jnp.asarray(np.random.default_rng(seed).normal(size=(size, num_classes)), jnp.float32)


def _linear(weights):
    return lambda x: x.reshape(len(x), -1) @ weights


def _network(weights):
    """Not linear, so that the attack has to look for its way."""
    return lambda x: jnp.tanh((x.reshape(len(x), -1) - 0.5) @ weights) * 3.0


LABELS = jnp.array([0, 1, 2, 1, 0])


def _margin(logits, labels):
    """A loss that is linear on a linear two-class model: the other logit minus the label's."""
    return (
        jnp.take_along_axis(logits, 1 - labels[:, None], 1)[:, 0]
        - (jnp.take_along_axis(logits, labels[:, None], 1)[:, 0])
    )


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_on_a_linear_model_the_attack_is_the_closed_form(norm):
    """The maximum of a linear loss over the ball, for images so far inside the box that it does not bind."""
    images, weights = _images(low=0.4, high=0.6), _weights(num_classes=2)
    labels = jnp.array([0, 1, 0, 1, 1])
    direction = np.asarray(weights[:, 1] - weights[:, 0])
    direction = np.where(np.asarray(labels)[:, None] == 0, direction, -direction).reshape(SHAPE)
    if norm == "linf":
        threat, best = Linf(0.1), np.asarray(images) + 0.1 * np.sign(direction)
    else:
        unit = direction / np.linalg.norm(direction[0])
        threat, best = L2(0.3), np.asarray(images) + 0.3 * unit
    found = pgd(_linear(weights), images, labels, threat, num_steps=10, step_size=0.05, loss_fn=_margin)
    np.testing.assert_allclose(found, best, atol=1e-5)
    targeted = pgd(
        _linear(weights),
        images,
        1 - labels,
        threat,
        num_steps=10,
        step_size=0.05,
        loss_fn=_margin,
        targeted=True,
    )
    np.testing.assert_allclose(targeted, best, atol=1e-5)


@pytest.mark.parametrize("norm", MODELS)
def test_a_zero_gradient_leaves_the_image_alone(norm):
    images = _images()
    flat = lambda x: jnp.zeros((len(x), 3)) + 0.0 * x.sum()  # noqa: E731
    found = pgd(flat, images, LABELS, MODELS[norm], num_steps=5, step_size=0.1)
    chex.assert_trees_all_equal(found, images)


@pytest.mark.parametrize("norm", MODELS)
@pytest.mark.parametrize("options", [{}, {"use_best": False}, {"early_finish": True}])
@pytest.mark.parametrize("num_restarts", [0, 3])
def test_every_output_is_in_the_ball_and_in_the_box(norm, options, num_restarts):
    images = _images()  # many pixels close to 0 or 1
    if num_restarts:
        options = options | {
            "random_start": True,
            "key": jax.random.key(3),
            "num_restarts": num_restarts,
        }
    found = pgd(_network(_weights()), images, LABELS, MODELS[norm], num_steps=7, step_size=0.4, **options)
    offsets = np.asarray(found - images)
    assert found.dtype == jnp.float32
    assert found.min() >= 0.0 and found.max() <= 1.0
    if norm == "l2":
        assert np.linalg.norm(offsets.reshape(5, -1), axis=1).max() <= 0.7 + 1e-6
    if norm == "linf":
        assert np.abs(offsets).max() <= 0.05 + 1e-6
    assert np.abs(offsets).max() > 1e-3


def _losses(logits_fn, images, labels=LABELS):
    return np.asarray(cross_entropy(logits_fn(images), labels))


def test_use_best_never_returns_less_than_it_has_seen():
    """Against every iterate, stepped by hand; steps this long overshoot, so the last is not the best."""
    images, network, threat = _images(), _network(_weights()), L2(0.7)
    iterates, x = [images], images
    for _ in range(5):
        gradient = jax.grad(lambda x: cross_entropy(network(x), LABELS).sum())(x)
        x = threat.project(threat.step(x, gradient, 1.3), images)
        iterates.append(x)
    losses = np.stack([_losses(network, x) for x in iterates])
    options = {"num_steps": 5, "step_size": 1.3, "loss_fn": cross_entropy}
    best = pgd(network, images, LABELS, threat, **options)
    last = pgd(network, images, LABELS, threat, use_best=False, **options)
    np.testing.assert_allclose(_losses(network, best), losses.max(0), rtol=1e-5)
    np.testing.assert_allclose(last, iterates[-1], atol=1e-5)
    assert (losses.max(0) > losses[-1] + 1e-3).any()


def test_restarts_keep_the_worst_loss_of_every_example():
    """One run with three restarts equals the best, example by example, of three runs."""
    images, network, key = _images(), _network(_weights()), jax.random.key(8)
    options = {"num_steps": 2, "step_size": 0.1, "random_start": True}
    keys = jax.random.split(key, len(images))
    single = [
        _losses(
            network,
            pgd(
                network,
                L2(0.7).random_start(jax.vmap(lambda k, r=restart: jax.random.fold_in(k, r))(keys), images),
                LABELS,
                _Around(images, L2(0.7)),
                num_steps=2,
                step_size=0.1,
            ),
        )
        for restart in range(3)
    ]
    together = pgd(network, images, LABELS, L2(0.7), key=key, num_restarts=3, **options)
    np.testing.assert_allclose(_losses(network, together), np.max(single, 0), rtol=1e-5)
    assert len({int(i) for i in np.argmax(single, 0)}) > 1, "every example chose the same restart"


class _Around(tuple):
    """A threat model around other centres than the images that the attack starts from."""

    def __new__(cls, centers, threat):
        return super().__new__(cls, (centers, threat))

    def project(self, images, centers):
        return self[1].project(images, self[0])

    def step(self, images, gradients, step_size):
        return self[1].step(images, gradients, step_size)

    def random_start(self, keys, centers):
        return self[1].random_start(keys, self[0])


jax.tree_util.register_pytree_node(_Around, lambda a: (tuple(a), None), lambda _, a: _Around(*a))


def test_targeted_descends_towards_the_target():
    images, network = _images(), _network(_weights())
    found = pgd(network, images, LABELS, L2(0.7), targeted=True, step_size=0.1)
    assert (_losses(network, found) < _losses(network, images)).all()


def test_early_finish_stops_at_the_first_error_and_fools_as_many():
    images, network = _images(), _network(_weights())
    labels = jnp.argmax(network(images), -1)
    full = pgd(network, images, labels, L2(0.7), step_size=0.05)
    early = pgd(network, images, labels, L2(0.7), step_size=0.05, early_finish=True)
    fooled = np.asarray(jnp.argmax(network(full), -1) != labels)
    assert fooled.any()
    np.testing.assert_array_equal(jnp.argmax(network(early), -1) != labels, fooled)
    length = lambda x: np.linalg.norm(np.asarray(x - images).reshape(5, -1), axis=1)  # noqa: E731
    assert (length(early) <= length(full) + 1e-5).all()
    assert (length(early)[fooled] < length(full)[fooled] - 0.04).all()


def test_what_is_never_fooled_is_searched_to_the_end():
    """On a linear model, far from the ball's edge: every step goes as far as the last one."""
    images, network = _images(low=0.4, high=0.6), _linear(_weights(num_classes=2))
    labels = jnp.argmax(network(images), -1)
    options = {"num_steps": 3, "step_size": 1e-4}
    full = pgd(network, images, labels, L2(0.3), **options)
    assert (jnp.argmax(network(full), -1) == labels).all()
    for use_best in (True, False):
        early = pgd(network, images, labels, L2(0.3), early_finish=True, use_best=use_best, **options)
        np.testing.assert_allclose(early, full, atol=1e-7)
    lengths = np.linalg.norm(np.asarray(full - images).reshape(5, -1), axis=1)
    np.testing.assert_allclose(lengths, 3e-4, rtol=1e-2)


def test_early_finish_does_not_ask_whether_the_best_is_wanted():
    images, network = _images(), _network(_weights())
    labels = jnp.argmax(network(images), -1)
    either = [
        pgd(
            network, images, labels, L2(0.7), step_size=1.3, num_steps=4, early_finish=True, use_best=use_best
        )
        for use_best in (True, False)
    ]
    np.testing.assert_array_equal(*either)


def test_early_finish_towards_a_target_stops_where_it_is_reached():
    images, network = _images(), _network(_weights())
    labels = (jnp.argmax(network(images), -1) + 1) % 3
    options = {"num_steps": 30, "step_size": 0.05, "targeted": True}
    full, early = (pgd(network, images, labels, L2(0.7), early_finish=e, **options) for e in (False, True))
    reached = np.asarray(jnp.argmax(network(full), -1) == labels)
    assert reached.any()
    np.testing.assert_array_equal(jnp.argmax(network(early), -1) == labels, reached)
    assert (_losses(network, early, labels) >= _losses(network, full, labels) - 1e-5).all()
    assert (_losses(network, early, labels) > _losses(network, full, labels) + 1e-3)[reached].all()


def test_two_restarts_are_compared_by_loss_even_where_the_last_iterate_is_wanted():
    """Without a step each is its random start; the losses of both are known."""
    images, network, keys = _images(), _network(_weights()), jax.random.split(jax.random.key(8), 5)
    starts = [
        L2(0.7).random_start(jax.vmap(lambda k: jax.random.fold_in(k, i))(keys), images)  # noqa: B023
        for i in (0, 1)
    ]
    options = {"num_steps": 0, "random_start": True, "key": keys, "use_best": False}
    one = pgd(network, images, LABELS, L2(0.7), **options)
    np.testing.assert_allclose(one, starts[0], atol=1e-6)
    two = pgd(network, images, LABELS, L2(0.7), num_restarts=2, **options)
    losses = np.stack([_losses(network, start) for start in starts])
    np.testing.assert_allclose(_losses(network, two), losses.max(0), rtol=1e-5)
    assert (losses[0] > losses[1]).any() and (losses[0] < losses[1]).any()


def test_no_steps_from_the_image_leave_it_as_it_is():
    np.testing.assert_array_equal(
        pgd(_network(_weights()), _images(), LABELS, L2(0.7), num_steps=0), _images()
    )


def test_a_ball_without_extent_holds_its_centre_alone():
    centers = _images()
    for images in (centers, _images(1)):
        np.testing.assert_array_equal(L2(0.0).project(images, centers), centers)
        np.testing.assert_array_equal(Linf(0.0).project(images, centers), centers)


@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.3), ("linf", 0.02)])
def test_an_attack_with_everything_chosen(norm, eps):
    images, network = _images(low=0.4, high=0.6), _linear(_weights())
    attack = make_attack(norm, eps, num_steps=1, step_ratio=0.25)
    offsets = np.asarray(attack(network, images, LABELS) - images).reshape(5, -1)
    size = np.linalg.norm(offsets, axis=1) if norm == "l2" else np.abs(offsets)
    np.testing.assert_allclose(size, 0.25 * eps, rtol=1e-3)
    assert attack is make_attack(norm, eps, num_steps=1, step_ratio=0.25)
    assert make_attack("none", 0.0, num_steps=1, step_ratio=0.25) is None
    ball = THREAT_MODELS[norm](eps)
    same = make_attack(ball, num_steps=1, step_size=0.25 * eps)(network, images, LABELS)
    np.testing.assert_array_equal(attack(network, images, LABELS), same)
    usual = make_attack(ball)(network, images, LABELS)
    np.testing.assert_array_equal(usual, pgd(network, images, LABELS, ball))
    for wrong in (("l1", eps), (norm,), (ball, eps)):
        with pytest.raises(ValueError, match="eps"):
            make_attack(*wrong)
    with pytest.raises(ValueError, match="one of step_size and step_ratio"):
        make_attack(ball, step_size=0.1, step_ratio=0.1)


def test_an_example_does_not_depend_on_its_batch():
    images, network, keys = _images(), _network(_weights()), jax.random.split(jax.random.key(0), 5)
    options = {"random_start": True, "num_restarts": 2}
    together = pgd(network, images, LABELS, L2(0.7), key=keys, **options)
    alone = pgd(network, images[2:3], LABELS[2:3], L2(0.7), key=keys[2:3], **options)
    np.testing.assert_allclose(together[2:3], alone, atol=1e-6)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_random_start_is_uniform_in_the_ball(norm):
    """Kolmogorov-Smirnov: radii are distributed as r^d (ℓ2), each coordinate is uniform (ℓ∞)."""
    stats = pytest.importorskip("scipy.stats")
    centers = jnp.full((4000, 1, 2, 1), 0.5)
    keys = jax.random.split(jax.random.key(0), 4000)
    offsets = np.asarray(
        (L2(0.3) if norm == "l2" else Linf(0.3)).random_start(keys, centers) - centers
    ).reshape(4000, 2)
    if norm == "l2":
        radii = np.linalg.norm(offsets, axis=1) / 0.3
        angles = np.arctan2(*offsets.T) / (2 * np.pi) + 0.5
        samples = [radii**2, angles]
    else:
        samples = list((offsets / 0.6 + 0.5).T)
    for sample in samples:
        assert stats.kstest(sample, "uniform").pvalue > 0.01


def test_updates_are_float32_when_the_network_computes_in_bfloat16():
    """Steps of 1e-4 vanish in bfloat16 around 0.5; they must add up all the same."""
    weights = _weights().astype(jnp.bfloat16)
    network = lambda x: x.reshape(len(x), -1).astype(jnp.bfloat16) @ weights  # noqa: E731
    images = jnp.full(SHAPE, 0.5)
    found = pgd(network, images, LABELS, Linf(0.1), num_steps=5, step_size=1e-4, use_best=False)
    moved = np.abs(np.asarray(found - images))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(moved[moved > 0], 5e-4, rtol=1e-2)


def test_gradients_with_respect_to_the_images_only():
    """The compiled attack holds no kernel gradient: its FLOPs are forward and input gradient."""
    weights = [jnp.full((48, 256), 0.01), jnp.full((256, 256), 0.01), jnp.full((256, 3), 0.01)]

    def network(weights, x):
        x = x.reshape(len(x), -1)
        for w in weights[:-1]:
            x = jnp.tanh(x @ w)
        return x @ weights[-1]

    def attack(weights, images):
        network_now = jax.tree_util.Partial(network, weights)
        return pgd(network_now, images, LABELS, L2(0.5), num_steps=1, use_best=False)

    cost = jax.jit(attack).lower(weights, _images()).compile().cost_analysis()
    one_pass = 2 * 5 * (48 * 256 + 256 * 256 + 256 * 3)
    assert cost["flops"] < 2.2 * one_pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"random_start": True}, "needs a key"),
        ({"num_restarts": 2}, "random_start"),
        ({"num_steps": -1}, "num_steps"),
        ({"num_restarts": 0}, "num_restarts >= 1"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        pgd(_network(_weights()), _images(), LABELS, L2(0.5), **options)


def test_one_network_is_compiled_once():
    network = _network(_weights())
    calls = []

    def counting(x):
        calls.append(1)
        return network(x)

    pgd(counting, _images(), LABELS, L2(0.5))
    traced = len(calls)
    pgd(counting, _images(1), LABELS, L2(0.3), step_size=0.1)
    assert len(calls) == traced + 1  # to see which weights it has now


def test_a_key_of_the_old_form_is_the_same_key():
    images, network = _images(), _network(_weights())
    options = {"num_steps": 2, "step_size": 0.1, "random_start": True}
    found = [
        pgd(network, images, LABELS, L2(0.7), key=key, **options)
        for key in (jax.random.key(3), jax.random.PRNGKey(3), jax.random.key(4))
    ]
    chex.assert_trees_all_equal(found[0], found[1])
    assert np.abs(found[0] - found[2]).max() > 1e-3


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (_images() * 255, "images run from 0.* to 25.*: pass pixels in \\[0, 1\\], such as images / 255"),
        ((_images() - 0.5) / 0.25, "images run from -.*: pass pixels in \\[0, 1\\], not normalised"),
        (_images().at[1, 2, 3, 0].set(jnp.nan), "images run from nan to nan"),
        (_images().at[0, 0, 0, 0].set(1.001), "images run from .* to 1"),
    ],
)
def test_images_that_are_no_pixels_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        pgd(_linear(_weights()), images, LABELS, L2(0.5))


@pytest.mark.parametrize("labels", [[0, 1, 2, 3, 0], [0, 1, -1, 1, 0]])
def test_labels_that_are_no_classes_are_refused(labels):
    with pytest.raises(
        ValueError, match="labels run from .* the network has 3 classes, whose labels are 0 to 2"
    ):
        pgd(_linear(_weights()), _images(), np.array(labels), L2(0.5))


@pytest.mark.parametrize(
    ("threat", "options", "message"),
    [
        (L2(-0.5), {}, "eps is -0.5"),
        (L2(float("nan")), {}, "eps is nan"),
        (L2(float("inf")), {}, "eps is inf"),
        (Linf(8.0), {}, r"Linf\(eps=8\) allows every image.* did you mean 8/255\?"),
        (Linf(1), {}, r"Linf\(eps=1\) allows every image"),
        (Linf(0.1), {"step_size": -1}, "step_size is -1"),
        (Linf(0.1), {"step_size": float("nan")}, "step_size is nan"),
        (Unconstrained(), {}, "Unconstrained has no eps for step_size to follow"),
    ],
)
def test_sizes_that_cannot_be_meant_are_refused(threat, options, message):
    with pytest.raises(ValueError, match=message):
        pgd(_linear(_weights()), _images(), LABELS, threat, **options)


@pytest.mark.parametrize("threat", [L2(0.3), Linf(0.02)])
def test_the_default_step_is_2_5_eps_over_their_number(threat):
    options = {"num_steps": 4, "use_best": False}
    default = pgd(_network(_weights()), _images(), LABELS, threat, **options)
    given = pgd(_network(_weights()), _images(), LABELS, threat, step_size=2.5 * threat.eps / 4, **options)
    chex.assert_trees_all_equal(default, given)


@pytest.mark.parametrize("options", [{}, {"use_best": False}, {"early_finish": True}])
@pytest.mark.parametrize("kind", ["logits", "gradient"])
def test_what_is_not_a_number_is_no_robustness(kind, options):
    """Refused where values are known; inside of jit those images become NaN, and no other."""

    def network(x):
        logits = _linear(_weights())(x)
        # The square root of 0 has an infinite derivative.
        odd = jnp.nan if kind == "logits" else jnp.sqrt(0.0 * x[:, 0, 0, :1])
        return jnp.where(x[:, :1, 0, 0] > 0.5, logits + odd, logits)

    images = _images()
    bad = np.asarray(images[:, 0, 0, 0] > 0.5)
    assert 0 < bad.sum() < 5
    options = options | {"num_steps": 3}
    if kind == "gradient":
        bad = np.full(5, True)  # 0 times inf, also where the other branch is taken
    with pytest.raises(ValueError, match=f"is not a number on {bad.sum()} of 5 images"):
        pgd(network, images, LABELS, L2(0.1), **options)
    inside = jax.jit(lambda x: pgd(network, x, LABELS, L2(0.1), **options))(images)
    np.testing.assert_array_equal(np.isnan(inside).any(axis=(1, 2, 3)), bad)


@pytest.mark.parametrize("threat", [L2(0.3), Linf(0.02)])
@pytest.mark.parametrize("scale", [1e-12, 10.0, 1e4])
def test_logits_on_another_scale_are_attacked_as_well(threat, scale):
    """With two classes the log odds have one direction at every scale; saturated cross-entropy has none."""
    labels = jnp.array([0, 1, 0, 1, 1])
    images, network = _images(low=0.3, high=0.7), _network(_weights(num_classes=2))
    plain = pgd(network, images, labels, threat, num_steps=5)
    scaled = pgd(lambda x: scale * network(x), images, labels, threat, num_steps=5)
    np.testing.assert_allclose(scaled, plain, atol=1e-4)


def test_an_attack_on_the_margin_is_the_same_at_every_scale():
    images, network = _images(low=0.3, high=0.7), _network(_weights())
    for threat in (L2(0.3), Linf(0.02)):
        found = [
            pgd(lambda x, s=s: s * network(x), images, LABELS, threat, num_steps=5, loss_fn=margin)
            for s in (1.0, 128.0)
        ]
        np.testing.assert_allclose(*found, atol=1e-5)


def test_losses_are_what_they_say():
    logits = np.random.default_rng(0).normal(0, 3, (7, 4)).astype(np.float32)
    labels = np.array([0, 1, 2, 3, 0, 1, 2])
    p = np.exp(np.float64(logits))
    p = (p / p.sum(1, keepdims=True))[np.arange(7), labels]
    np.testing.assert_allclose(cross_entropy(logits, labels), -np.log(p), rtol=1e-5)
    np.testing.assert_allclose(log_odds(logits, labels), np.log((1 - p) / p), rtol=1e-4, atol=1e-5)
    others = np.where(np.arange(4) == labels[:, None], -np.inf, logits).max(1)
    np.testing.assert_allclose(margin(logits, labels), others - logits[np.arange(7), labels], rtol=1e-6)
    one, other = (jax.grad(lambda x, f=f: f(x, labels).sum())(logits) for f in (cross_entropy, log_odds))
    np.testing.assert_allclose(one, (1 - p)[:, None] * other, atol=1e-6)
    sure = 1e4 * jax.nn.one_hot(labels, 4)
    assert float(jnp.abs(jax.grad(lambda x: log_odds(x, labels).sum())(sure)).max()) == 1


def test_the_attack_is_no_part_of_what_is_differentiated():
    def loss(weights, stop, **options):
        found = pgd(
            jax.tree_util.Partial(_apply_linear, weights), _images(), LABELS, L2(0.5), num_steps=3, **options
        )
        found = jax.lax.stop_gradient(found) if stop else found
        return cross_entropy(_apply_linear(weights, found), LABELS).mean()

    for options in ({}, {"early_finish": True}, {"use_best": False}):
        one, other = (jax.grad(loss)(_weights(), stop, **options) for stop in (False, True))
        chex.assert_trees_all_close(one, other, rtol=1e-5)


def _apply_linear(weights, x):
    return _linear(weights)(x)


@pytest.mark.parametrize("threat", MODELS.values())
def test_64_bit_mode_of_the_user_s_own_code_changes_nothing(threat):
    options = {"num_steps": 2, "step_size": 0.1, "key": jax.random.key(0), "random_start": True}
    expected = pgd(_network(_weights()), _images(), LABELS, threat, **options)
    with jax.enable_x64(True):
        found = pgd(_network(_weights()), np.asarray(_images()), np.asarray(LABELS), threat, **options)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)
