"""Every kind of step and program, built and run with JAX's checks on: no leaked tracer, no NaN.

Inputs are a few 8² images and one network of one block. Programs that take long to compile are only traced,
which is where a tracer leaks; what is computed is compared with truths elsewhere.
"""

import contextlib
import functools
import importlib
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advtransfer import parallel, source
from advtransfer.analysis import influence, matches, saliency, shape, visualise
from advtransfer.analysis.cue_conflict import CueConflict
from advtransfer.analysis.head_bound import feature_sensitivity
from advtransfer.attacks import L2, Linf, Unconstrained, make_attack, pgd
from advtransfer.data import Augmentation, Batch, Dataset, Split, make_batch
from advtransfer.data.views import VIEWS
from advtransfer.evaluate import Evaluation, evaluate, make_evaluate_step, predict
from advtransfer.models import (
    ARCHITECTURES,
    Model,
    ModelSpec,
    create_module,
    init_variables,
    logits_fn,
)
from advtransfer.optim import sgd
from advtransfer.report import make_outcome
from advtransfer.robustness import Curves, measure_robustness
from advtransfer.train import init_state, make_train_step, module_apply
from advtransfer.transfer import (
    Rates,
    Recipe,
    activation_shape,
    activations,
    fine_tune_one,
    first_unfrozen_block,
    normalised_by,
    prefix_is_constant,
    target_batch_stats,
)
from advtransfer.transfer.program import Task, make_fine_tune

pytestmark = pytest.mark.usefixtures("unoptimised")

# The package's function of this name hides the module.
tuning = importlib.import_module("advtransfer.transfer.tuning")

TINY = {"stage_sizes": (1,), "width": 4}
NUM_IMAGES, CLASSES = 6, ("a", "b", "c")
ALL = Augmentation(crop_padding=1, flip=True, jitter=0.2, rotation=5.0, lighting=0.05, resized_crop=0.5)


@contextlib.contextmanager
def strict():
    with jax.checking_leaks(), jax.debug_nans(True), np.errstate(invalid="raise", divide="raise"):
        yield


def _split(num_images=NUM_IMAGES):
    rng = np.random.default_rng(num_images)
    images = rng.integers(0, 256, (num_images, 8, 8, 3), dtype=np.uint8)
    return Split(images, np.arange(num_images, dtype=np.int32) % len(CLASSES))


SPLIT = _split()
IMAGES, LABELS = jnp.float32(SPLIT.images) / 255, jnp.asarray(SPLIT.labels)
KEY = jax.random.key(0)
KEYS = jax.random.split(KEY, NUM_IMAGES)
WEIGHTS = np.random.default_rng(0).normal(size=(8 * 8 * 3, len(CLASSES))).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    module = create_module("resnet_tiny", num_classes=len(CLASSES)).clone(**TINY)
    spec = ModelSpec("resnet_tiny", len(CLASSES), 8, module.mean, module.std)
    return Model(module, init_variables(module, KEY, 8), spec)


def _finite(tree):
    return all(np.all(np.isfinite(x)) for x in jax.tree.leaves(tree))


def test_the_checks_find_what_they_are_for():
    leaked = []
    with strict():
        with pytest.raises(Exception, match="Leaked"):
            jax.eval_shape(lambda x: leaked.append(x + 1), jnp.ones(2))
        with pytest.raises(FloatingPointError, match="nan"):
            jax.jit(lambda x: x / x)(jnp.zeros(2))
        with pytest.raises(FloatingPointError, match="invalid value"):
            np.zeros(2) / np.zeros(2)


# --- steps ----------------------------------------------------------------------------------------

STEPS = {
    "natural": {},
    "smoothed, in parts, averaged": {"label_smoothing": 0.1, "num_parts": 3, "average_decay": 0.9},
    "l2": {"attack": make_attack(L2(0.5), num_steps=2, random_start=True, use_best=False)},
    "linf, of the batch's statistics": {
        "attack": make_attack(Linf(0.1), num_steps=2),
        "attack_in_train_mode": True,
    },
}


@pytest.mark.parametrize("kind", STEPS)
def test_no_tracer_leaks_out_of_a_training_step_on_all_devices(model, kind):
    tx = sgd(0.1, weight_decay=5e-4)
    with strict():
        apply = module_apply(model.module.clone(axis_name=parallel.AXIS))
        train_step = make_train_step(apply, tx, axis_name=parallel.AXIS, **STEPS[kind])

        def step(state, images, labels, indices, keys):
            return train_step(state, make_batch(images, labels, indices, keys, ALL, image_size=8))

        state = init_state(model.variables, tx, average="average_decay" in STEPS[kind])
        split = parallel.split((LABELS, KEYS))
        step = parallel.data_parallel(step, num_shared=3, num_split=2)
        jax.eval_shape(step, state, jnp.asarray(SPLIT.images), LABELS, *split)


def test_an_adversarial_step_without_nan(model):
    tx = sgd(0.1, weight_decay=5e-4)
    with strict():
        step = jax.jit(make_train_step(module_apply(model.module), tx, **STEPS["l2"]))
        assert _finite(step(init_state(model.variables, tx), Batch(IMAGES, LABELS, KEYS)))


def test_a_source_training_on_all_devices(monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "resnet_tiny", ARCHITECTURES["resnet_tiny"] | TINY)
    recipe = source.SourceRecipe(
        image_size=8, batch_size=4, num_epochs=1, augmentation=Augmentation(flip=True)
    )
    with strict():
        run = source.start_training(recipe, Dataset("random", CLASSES, SPLIT, SPLIT, SPLIT))
        assert _finite(run.run_step(run.state, 0))


@pytest.mark.parametrize("norm", ["none", "l2"])
def test_no_tracer_leaks_out_of_an_evaluation_step(model, norm):
    attack = make_attack(norm, 0.5, num_steps=2, random_start=True, num_restarts=2)
    with strict():
        step = make_evaluate_step(attack)
        jax.eval_shape(step, logits_fn(model), Batch(IMAGES, LABELS, KEYS), jnp.ones(NUM_IMAGES))


def test_an_evaluation_on_all_devices_without_nan(model):
    with strict():
        assert _finite(evaluate(logits_fn(model), SPLIT, batch_size=4))


# --- attacks --------------------------------------------------------------------------------------

THREATS = {"l2": L2(0.5), "linf": Linf(0.1), "unconstrained": Unconstrained()}
SEARCH = {
    "num_steps": 2,
    "step_size": 0.2,
    "random_start": True,
    "num_restarts": 2,
    "early_finish": True,
    "key": KEYS,
}


def _linear(x):
    return jnp.tanh(x.reshape(len(x), -1) @ jnp.asarray(WEIGHTS))


@pytest.mark.parametrize("norm", THREATS)
def test_no_tracer_leaks_out_of_an_attack(model, norm):
    with strict():
        attack = functools.partial(pgd, logits_fn(model), threat_model=THREATS[norm], **SEARCH)
        jax.eval_shape(attack, IMAGES, LABELS)


@pytest.mark.parametrize("norm", THREATS)
def test_an_attack_without_nan(norm):
    with strict():
        found = pgd(_linear, IMAGES, LABELS, THREATS[norm], **SEARCH)
    assert _finite(found)


@pytest.mark.parametrize("norm", THREATS)
def test_a_step_where_the_gradient_is_zero(norm):
    with strict():
        moved = THREATS[norm].step(IMAGES, jnp.zeros_like(IMAGES), 0.1)
        np.testing.assert_array_equal(THREATS[norm].project(moved, IMAGES), IMAGES)


def test_curves_warnings_and_the_sensitivity_of_features_without_nan():
    with strict():
        evaluation = Evaluation(norm="linf", eps=0.1, num_steps=2, num_restarts=2, batch_size=4)
        found = measure_robustness(_linear, SPLIT, evaluation, Curves(l2_epsilons=(0.5,)))
        assert all(np.isfinite(row["accuracy"]) for row in found.rows)
        assert _finite(feature_sensitivity(_linear, IMAGES, L2(0.5), key=KEY, num_steps=2, batch_size=4))


# --- fine-tuning ----------------------------------------------------------------------------------

RECIPE = Recipe(num_epochs=2, evaluate_epochs=(1, 2), batch_size=3, label_smoothing=0.1)
# (images, k, what of the recipe is other): the network has 4 features and one block.
TUNINGS = {
    "everything, augmented": (6, -1, {"augmentation": ALL}),
    "a block, statistics of the batches": (6, 1, {"frozen_batch_norm": "update"}),
    "a block, not cached": (6, 1, {"augmentation": Augmentation(flip=True)}),
    "a block, fixed views": (6, 1, {"augmentation": Augmentation(flip=True), "num_views": 2}),
    "the head": (6, 0, {}),
    "the head in dual form": (4, 0, {"schedule": "cosine", "head_init": "normal"}),
}


def _task(module, recipe, k, num_images):
    """Shapes of what `prepare` makes."""
    images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.uint8)
    if prefix_is_constant(k, recipe):
        images = activation_shape(module, first_unfrozen_block(module, k), 8)
    inputs = [
        jax.ShapeDtypeStruct((number, *images.shape[1:]), images.dtype)
        for number in (max(1, recipe.num_views) * num_images, NUM_IMAGES)
    ]
    labels = [jax.ShapeDtypeStruct((number,), jnp.int32) for number in (num_images, NUM_IMAGES)]
    return Task(inputs[0], labels[0], inputs[1], labels[1])


MARKS = dict.fromkeys(("a block, not cached", "a block, fixed views"), pytest.mark.sweep)


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=MARKS.get(kind, ())) for kind in TUNINGS])
def test_no_tracer_leaks_out_of_a_fine_tuning(model, kind):
    num_images, k, options = TUNINGS[kind]
    recipe = replace(RECIPE, **options)
    params, batch_stats = model.variables["params"], model.variables["batch_stats"]
    indices, rates = jnp.arange(num_images), Rates(0.1, 5e-4)
    with strict():
        run = make_fine_tune(model.module, recipe, k, 8)
        task = _task(model.module, recipe, k, num_images)
        jax.eval_shape(run, params, batch_stats, task, indices, KEY, rates)


@pytest.mark.parametrize(("form", "k"), [("sharing", 0), ("separate", 1)])
def test_no_tracer_leaks_out_of_many_fine_tunings(model, k, form):
    """Three subsets with two rates each, on two devices: of one task, or of a task each."""
    with strict():
        programs = tuning._many.__wrapped__(model.module, RECIPE, k, 8, 1, 2)
        params, rates = model.variables["params"], Rates(jnp.float32([0.1, 0.01]), jnp.float32([0, 5e-4]))
        own = jnp.zeros((2, 2, 4), jnp.int32), jax.random.split(KEY, (2, 2))
        start = model.variables["batch_stats"], _task(model.module, RECIPE, k, NUM_IMAGES)
        if form == "separate":
            start = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, 2, *x.shape), x.dtype), start)
        found = jax.eval_shape(getattr(programs, form), params, rates, *start, *own)
    assert found["test_accuracy"].shape == (2, 2, 2, 2)


def test_no_tracer_leaks_out_of_what_is_prepared(model):
    """The activations of two views at the first trained block, and the target's statistics."""
    with strict():
        views = {"augmentation": Augmentation(flip=True), "num_views": 2}
        start = functools.partial(activations, model.module, model.variables, start=0, image_size=8, **views)
        stats = functools.partial(target_batch_stats, model.module, model.variables, image_size=8)
        found = jax.eval_shape(start, images=jnp.asarray(SPLIT.images))
        jax.eval_shape(stats, images=jnp.asarray(SPLIT.images))
    assert found.shape == (2 * NUM_IMAGES, 8, 8, 4)


def test_a_fine_tuning_without_nan(model):
    """Of a head in dual form, from activations of a network that its target normalises."""
    num_images, k, options = TUNINGS["the head in dual form"]
    with strict():
        tuned, history = fine_tune_one(
            normalised_by(model, SPLIT.images),
            _split(num_images),
            SPLIT,
            key=KEY,
            class_names=CLASSES,
            num_unfrozen_blocks=k,
            recipe=replace(RECIPE, **options),
        )
    assert _finite((tuned.variables, history))


# --- data -----------------------------------------------------------------------------------------


def test_batches_with_every_augmentation():
    images = jnp.concatenate([jnp.asarray(SPLIT.images[:4]), jnp.zeros((2, 8, 8, 3), jnp.uint8)])
    with strict():
        make = jax.jit(make_batch, static_argnames=("augmentation", "image_size"))
        batch = make(images, LABELS, LABELS, KEYS, augmentation=ALL, image_size=12)
    assert _finite(batch.images)


def test_views():
    images = np.concatenate([SPLIT.images, np.zeros((2, 8, 8, 3), np.uint8)])
    with strict():
        for view in VIEWS.values():
            assert view(images).shape == images.shape


# --- analysis -------------------------------------------------------------------------------------

SALIENCIES = {
    "smooth_grad": lambda fn: saliency.smooth_grad(fn, IMAGES, LABELS, key=KEY, num_samples=2),
    "integrated_gradients": lambda fn: saliency.integrated_gradients(
        fn, IMAGES, LABELS, num_steps=2, max_steps=4
    ),
}


@pytest.mark.parametrize("kind", SALIENCIES)
def test_saliency(kind):
    with strict():
        found = SALIENCIES[kind](_linear)
    assert _finite(found)


def test_numbers_of_saliency_where_there_is_nothing():
    nothing = np.zeros(IMAGES.shape)
    with strict():
        assert _finite(saliency.to_picture(nothing))
        assert _finite(saliency.low_frequency_share(nothing))
        assert _finite(saliency.alignment(nothing, nothing))


OBJECTIVES = {
    "unit": (lambda model: visualise.unit(model, 0, np.arange(NUM_IMAGES) % 4), "pixels"),
    "logit": (lambda model: visualise.logit(model, 1), "fourier"),
    "match": (
        lambda model: visualise.match(visualise.features_fn(model, 1), jnp.zeros((1, 4))),
        "pixels",
    ),
}


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_no_tracer_leaks_out_of_a_visualisation(model, kind):
    make, parameterisation = OBJECTIVES[kind]
    with strict():
        search = functools.partial(
            visualise.visualise, make(model), num_steps=2, parameterisation=parameterisation
        )
        jax.eval_shape(search, IMAGES)


def test_a_visualisation_without_nan():
    with strict():
        start = visualise.noise(KEY, IMAGES.shape)
        objective = visualise.Objective(jax.tree_util.Partial(_linear), 1)
        assert _finite(visualise.visualise(objective, start, num_steps=2, parameterisation="fourier"))


@pytest.mark.parametrize("solver", ["damped", "truncated", "cg"])
def test_influence_through_the_head(solver):
    rng = np.random.default_rng(0)
    train, queries, kernel = (rng.normal(size=size) for size in ((6, 4), (2, 4), (4, 3)))
    with strict():
        scores = influence.last_layer_scores(
            train,
            SPLIT.labels,
            queries,
            np.array([0, 1]),
            50 * kernel,
            np.zeros(3),
            solver=solver,
            tell=lambda _: None,
        )
        rates = matches.match_rates(scores, np.array([0, 1]), SPLIT.labels)
    assert _finite((scores, rates))


def test_shape_bias_and_outcomes(model):
    names = np.array(CLASSES)[SPLIT.labels]
    conflict = CueConflict(SPLIT.images, names, np.roll(names, 1))
    groups = {name: (output,) for output, name in enumerate(CLASSES)}
    with strict():
        found = shape.measure(logits_fn(model), conflict, groups, batch_size=4)
        outcome = make_outcome(SPLIT.labels, predict(logits_fn(model), IMAGES), CLASSES)
    assert _finite(found.overall.shape) and _finite(outcome.probabilities)
