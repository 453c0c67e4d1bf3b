"""The one step and the loop: against PyTorch's formulas, and one device against two."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from advtransfer import parallel
from advtransfer.checkpoint import Checkpoints, UnreadableCheckpoints
from advtransfer.data import Augmentation, Batch, Dataset, Split
from advtransfer.optim import apply_updates, freeze_mask, make_schedule, sgd
from advtransfer.source import SourceRecipe, start_training
from advtransfer.train import (
    DivergedError,
    Preempted,
    TrainState,
    fit,
    init_state,
    make_train_step,
    means,
    on_sigterm,
    smoothed_cross_entropy,
)

pytestmark = pytest.mark.usefixtures("two_blocks")


def _dataset(num_images=64, size=8, num_classes=4):
    rng = np.random.default_rng(0)

    def split(n):
        images = rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8)
        return Split(images, rng.integers(0, num_classes, n).astype(np.int32))

    names = tuple("abcd"[:num_classes])
    return Dataset("random", names, split(num_images), split(16), split(16))


RECIPE = SourceRecipe(
    image_size=8,
    batch_size=16,
    num_epochs=2,
    learning_rate=0.05,
    schedule="constant",
    norm="l2",
    eps=0.5,
    attack_random_start=True,
    augmentation=Augmentation(crop_padding=1, flip=True, jitter=0.2, rotation=5.0),
)


# --- optim ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_pytorchs(nesterov, weight_decay, momentum):
    """The update of torch.optim.SGD, written out in float64."""
    nesterov = nesterov and momentum > 0
    rng = np.random.default_rng(0)
    p = expected = rng.normal(size=5)
    tx = sgd(0.1, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)
    p = jnp.asarray(p, jnp.float32)
    state, buffer = tx.init(p), np.zeros(5)
    for _ in range(5):
        g = rng.normal(size=5)
        updates, state = tx.update(jnp.asarray(g, jnp.float32), state, p)
        p = optax.apply_updates(p, updates)
        g = g + weight_decay * expected
        buffer = momentum * buffer + g
        expected = expected - 0.1 * (g + momentum * buffer if nesterov else buffer)
    np.testing.assert_allclose(p, expected, rtol=1e-5)


def test_schedules_at_the_points_that_define_them():
    step = make_schedule("step", 0.1, 150)
    np.testing.assert_allclose(
        [step(i) for i in (0, 49, 50, 99, 100, 149)],
        [0.1, 0.1, 0.01, 0.01, 0.001, 0.001],
        rtol=1e-5,
    )
    cosine = make_schedule("cosine", 0.1, 100)
    points = np.arange(100)
    np.testing.assert_allclose(
        [cosine(i) for i in points], 0.05 * (1 + np.cos(np.pi * points / 100)), atol=1e-7
    )
    cyclic = make_schedule("cyclic", 0.2, 150)
    epochs = np.arange(150) / 10
    np.testing.assert_allclose(
        [cyclic(i) for i in range(150)], np.interp(epochs, [0, 4, 15], [0, 0.2, 0]), atol=1e-6
    )
    # Of so few steps each is a part of its own, and the rate goes up before it goes down.
    for name, rates in (("step", [0.2, 0.02, 0.002]), ("cyclic", [0.0, 0.2, 0.1])):
        np.testing.assert_allclose([make_schedule(name, 0.2, 3)(i) for i in range(3)], rates, rtol=1e-5)
    assert make_schedule("cyclic", 0.2, 1)(0) == 0.0
    assert make_schedule("constant", 0.3, 10)(7) == pytest.approx(0.3)
    assert [make_schedule(name, 0.1, 1)(0) for name in ("step", "cosine")] == pytest.approx([0.1, 0.1])
    with pytest.raises(ValueError, match="unknown schedule 'stpe'.*step"):
        make_schedule("stpe", 0.1, 10)


def test_rates_are_numbers_and_updates_have_the_shapes_of_what_they_update():
    for wrong in (
        lambda: make_schedule("constant", np.ones(1), 10),
        lambda: sgd(0.1, weight_decay=np.ones(2)),
        lambda: apply_updates({"w": np.ones(2)}, {"w": np.ones(1)}, None),
    ):
        with pytest.raises(AssertionError):
            wrong()


def test_freeze_mask_says_what_it_missed():
    params = {"conv1": {"kernel": 0}, "layer1_0": {"bn1": {"scale": 0}}, "fc": {"bias": 0}}
    mask = freeze_mask(params, trainable=["fc/"], frozen=["conv1/", "layer1_0/"])
    assert mask == {
        "conv1": {"kernel": True},
        "layer1_0": {"bn1": {"scale": True}},
        "fc": {"bias": False},
    }
    with pytest.raises(ValueError, match="layer1_0/bn1/scale is matched by neither"):
        freeze_mask(params, trainable=["fc/"], frozen=["conv1/"])
    with pytest.raises(ValueError, match="fc/bias is matched by both"):
        freeze_mask(params, trainable=["fc/"], frozen=["conv1/", "layer1_0/", "f"])
    with pytest.raises(ValueError, match="'layer9/' matches no parameter"):
        freeze_mask(params, trainable=["fc/"], frozen=["conv1/", "layer1_0/", "layer9/"])


def test_a_frozen_negative_zero_stays_negative():
    params, updates = {"a": jnp.array(-0.0)}, {"a": jnp.array(0.0)}
    assert np.signbit(apply_updates(params, updates, {"a": True})["a"])
    assert not np.signbit(apply_updates(params, updates, {"a": False})["a"])


# --- the step -------------------------------------------------------------------------------------


def test_smoothed_cross_entropy_is_the_cross_entropy_to_the_smoothed_target():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(6, 4)), rng.integers(0, 4, 6)
    target = 0.9 * np.eye(4)[labels] + 0.1 / 4
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    found = smoothed_cross_entropy(jnp.asarray(logits, jnp.float32), jnp.asarray(labels), 0.1)
    np.testing.assert_allclose(found, -(target * log_probs).sum(1), rtol=1e-5)


def test_the_step_trains_on_what_the_attack_returns():
    """A linear model of one weight: the step on attacked images is plain SGD on those images, by hand."""

    def apply(params, batch_stats, images, train):
        scores = params["w"] * images.mean((1, 2, 3))
        return jnp.stack([scores, -scores], axis=1), batch_stats + train

    def attack(logits_fn, images, labels, *, key):
        del labels, key
        assert logits_fn(images).shape == (4, 2)
        return jnp.clip(images + 0.25, 0.0, 1.0)

    images = jnp.asarray(np.random.default_rng(0).uniform(size=(4, 2, 2, 1)), jnp.float32)
    labels = jnp.array([0, 1, 1, 0])
    batch = Batch(images, labels, jax.random.split(jax.random.key(0), 4))
    tx = sgd(0.5, momentum=0.0)
    variables = {"params": {"w": jnp.float32(0.7)}, "batch_stats": jnp.float32(0)}
    step = jax.jit(make_train_step(apply, tx, attack=attack))
    state, metrics = step(init_state(variables, tx), batch)

    x = np.clip(np.asarray(images) + 0.25, 0, 1).mean((1, 2, 3))
    sign = np.where(np.asarray(labels) == 0, 1, -1)
    losses = np.log1p(np.exp(-2 * sign * 0.7 * x))
    gradient = np.mean(-2 * sign * x / (1 + np.exp(2 * sign * 0.7 * x)))
    np.testing.assert_allclose(state.params["w"], 0.7 - 0.5 * gradient, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], (losses.sum(), 4.0), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], ((sign * x > 0).sum(), 4.0))
    assert (int(state.step), float(state.batch_stats)) == (1, 1.0)


def test_the_attack_draws_its_own_numbers():
    """Augmentation and attack share no random stream: the attack's keys are none that splitting gives."""
    seen = []

    def attack(logits_fn, images, labels, *, key):
        seen.append(jax.random.key_data(key))
        return images

    def apply(params, batch_stats, images, train):
        return params["w"] * images.mean((1, 2)), batch_stats

    keys = jax.random.split(jax.random.key(0), 3)
    batch = Batch(jnp.ones((3, 2, 2, 3)), jnp.zeros(3, jnp.int32), keys)
    tx = sgd(0.1)
    state = init_state({"params": {"w": jnp.ones(())}, "batch_stats": {}}, tx)
    make_train_step(apply, tx, attack=attack)(state, batch)
    drawn = {
        tuple(np.asarray(k)) for i in range(3) for k in jax.random.key_data(jax.random.split(keys[i], 16))
    }
    assert not drawn & {tuple(np.asarray(k)) for k in seen[0]}


def _train(recipe, dataset, num_steps, *, devices):
    """The states of a training on the first `devices` virtual devices."""
    run = start_training(replace(recipe, num_devices=devices), dataset)
    state, states, metrics = run.state, [], []
    for step in range(num_steps):
        state, found = run.run_step(state, step)
        assert len(state.step.sharding.device_set) == devices
        states.append(jax.device_get(state))
        metrics.append(means(found))
    return states, metrics


@pytest.fixture(scope="module")
def alone(two_blocks):
    """Six steps on one device: the states, the metrics."""
    return _train(RECIPE, _dataset(), 6, devices=1)


def test_two_devices_take_the_steps_of_one(alone):
    """With synchronised BatchNorm, augmentation and a random start: float32, every step, 1e-5."""
    ones, one_metrics = alone
    twos, two_metrics = _train(RECIPE, _dataset(), 6, devices=2)
    for one, two in zip(ones, twos, strict=True):
        chex.assert_trees_all_close(one, two, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(one_metrics, two_metrics, rtol=1e-5)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), ones[0].params, ones[-1].params)
    assert min(jax.tree.leaves(moved)) > 1e-6


def test_batch_norm_per_device_is_another_training(alone):
    """The same comparison fails when every device normalises with its own half of the batch."""
    twos, _ = _train(replace(RECIPE, sync_batch_norm=False), _dataset(), 1, devices=2)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(alone[0][0].params, twos[0].params, atol=1e-5)


def test_a_batch_that_the_devices_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="a batch of 15 .* 2 devices: use a multiple of 2"):
        start_training(replace(RECIPE, batch_size=15, num_devices=2), _dataset())
    with pytest.raises(ValueError, match="num_devices=3 is more than the 2 that there are"):
        start_training(replace(RECIPE, num_devices=3), _dataset())


# --- fit ------------------------------------------------------------------------------------------


def _counting_fit(
    folder,
    *,
    num_steps=10,
    losses=None,
    grow=0.0,
    log=lambda *_: None,
    state=None,
    at=lambda _: None,
    **options,
):
    """fit() on a state that counts; `losses` by step, `grow` added to the weight at every step."""
    state = state or TrainState(jnp.zeros((), jnp.int32), {"w": jnp.float32(0)}, {}, ())

    def run_step(state, step):
        at(step)
        loss = 1.0 if losses is None else losses[step]
        state = state._replace(step=state.step + 1, params={"w": state.params["w"] + grow})
        return state, {"loss": (np.float32(loss), 1.0), "accuracy": (np.float32(step), 1.0)}

    checkpoints = Checkpoints(folder)
    restored = checkpoints.restore(state)
    return fit(
        restored or state,
        run_step,
        num_steps=num_steps,
        checkpoints=checkpoints,
        save_every=4,
        log_every=3,
        log=log,
        **{"schedule": make_schedule("constant", 0.1, 10), **options},
    )


def test_fit_logs_means_and_keeps_the_last_checkpoints(tmp_path):
    logged = []
    state = _counting_fit(tmp_path, log=lambda step, scalars: logged.append((step, scalars)))
    assert int(state.step) == 10
    assert [step for step, _ in logged] == [3, 4, 6, 8, 9, 10]
    assert [scalars["accuracy"] for _, scalars in logged] == [1.0, 3.0, 4.5, 6.5, 8.0, 9.0]
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == [8, 10]


def test_the_log_has_the_rate_of_the_last_step_and_what_was_validated(tmp_path):
    logged, seen = {}, []

    def validate(state):
        seen.append(int(state.step))
        return {"found": 2.0 * int(state.step)}

    options = {"schedule": lambda step: 0.1 * step, "validate": validate, "validate_every": 5}
    _counting_fit(tmp_path, log=logged.__setitem__, **options)
    assert list(logged) == [3, 4, 5, 6, 8, 9, 10] and seen == [5, 10]
    for step, scalars in logged.items():
        assert scalars["learning_rate"] == pytest.approx(0.1 * (step - 1))
        assert scalars.get("found") == {5: 10.0, 10: 20.0}.get(step)


def test_sigterm_saves_the_step_in_flight_and_the_handler_before_comes_back(tmp_path):
    stray = []
    before = signal.signal(signal.SIGTERM, lambda *_: stray.append(1))
    try:
        own = signal.getsignal(signal.SIGTERM)
        with pytest.raises(Preempted, match="SIGTERM: saved at step 6 of 10"):
            _counting_fit(tmp_path, at=lambda step: step == 5 and os.kill(os.getpid(), signal.SIGTERM))
        assert signal.getsignal(signal.SIGTERM) is own and not stray
    finally:
        signal.signal(signal.SIGTERM, before)
    assert Checkpoints(tmp_path).latest() == 6


def test_signals_are_left_alone_in_other_threads_and_in_one_of_several_processes(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)

    def inside():
        with on_sigterm(lambda: None):
            return signal.getsignal(signal.SIGTERM)

    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(inside).result() is before
    assert inside() is not before
    monkeypatch.setattr(parallel, "num_processes", lambda: 2)
    assert inside() is before


@pytest.mark.parametrize("step", [jnp.zeros((1,), jnp.int32), jnp.zeros(())])
def test_steps_are_whole_numbers(step, tmp_path):
    with pytest.raises(AssertionError):
        _counting_fit(tmp_path, state=TrainState(step, {"w": jnp.float32(0)}, {}, ()))


def test_a_loss_that_is_no_number_names_step_rate_and_checkpoint(tmp_path):
    losses = [1.0] * 6 + [np.inf] + [1.0] * 3
    message = r"at step 6 \(learning rate 0.1\); last good checkpoint: step 4 in .*"
    with pytest.raises(DivergedError, match=message):
        _counting_fit(tmp_path, losses=losses)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() == 4


def test_weights_that_are_no_numbers_are_never_saved(tmp_path):
    with pytest.raises(DivergedError, match="at step 3 .*no checkpoint was saved"):
        _counting_fit(tmp_path, grow=np.nan)
    assert not [path for path in tmp_path.iterdir() if path.name.isdigit()]


def test_an_unreadable_checkpoint_falls_back_to_the_one_before(tmp_path, caplog):
    _counting_fit(tmp_path)
    for path in (tmp_path / "10").rglob("*"):
        if path.is_file():
            path.write_bytes(b"torn")
    state = _counting_fit(tmp_path, num_steps=12)
    assert "checkpoint 10" in caplog.text
    assert int(state.step) == 12
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == [8, 12]


def test_no_readable_checkpoint_is_an_error_that_deletes_nothing(tmp_path):
    _counting_fit(tmp_path)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            path.write_bytes(b"torn")
    with pytest.raises(UnreadableCheckpoints, match="none of the checkpoints"):
        _counting_fit(tmp_path)
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == [8, 10]
