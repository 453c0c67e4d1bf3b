"""Every public function refuses arrays of another rank, length or kind than its docstring names.

A refusal comes before anything is computed, and its message holds the shape or the dtype that was given.
"""

import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jax.tree_util import Partial

from advtransfer import intervals, models, optim, report, train, transfer
from advtransfer.analysis import (
    head_bound,
    head_hessian,
    influence,
    krylov,
    matches,
    saliency,
    shape,
    visualise,
)
from advtransfer.analysis.cue_conflict import CueConflict
from advtransfer.attacks import (
    L2,
    Linf,
    Unconstrained,
    auto_attack,
    check_network,
    cross_entropy,
    dlr,
    log_odds,
    margin,
    pgd,
    targeted_dlr,
)
from advtransfer.calibration import calibrate
from advtransfer.data import (
    Augmentation,
    Batch,
    Split,
    augment,
    batches,
    choose_augmentation,
    datasets,
    feed,
    glyphs,
    resize,
    subsets,
    to_float,
    transforms,
    views,
)
from advtransfer.evaluate import (
    Evaluation,
    evaluate,
    evaluation_metrics,
    make_evaluate_step,
    measure,
    predict,
    unseen,
)
from advtransfer.models import Model, ModelSpec, create_module
from advtransfer.robustness import measure_robustness
from advtransfer.train import TrainState
from advtransfer.transfer import Rates, Recipe, choose_k, dual, one_model, resolve_recipe
from advtransfer.transfer.program import Task, make_fine_tune

N, C, D, Q = 3, 4, 5, 2
IMAGES = np.zeros((N, 8, 8, 3), np.uint8)
FLOATS = np.zeros((N, 8, 8, 3), np.float32)
LABELS = np.arange(N, dtype=np.int32)
LOGITS = np.zeros((N, C), np.float32)
FEATURES, QUERIES = np.zeros((N, D)), np.zeros((Q, D))
MASK = np.ones(N, np.float32)
KEYS = jax.random.split(jax.random.key(0), N)
SPLIT = Split(IMAGES, LABELS)
MODULE = create_module("resnet_tiny", num_classes=C).clone(width=4, stage_sizes=(1,))
MODEL = Model(MODULE, {}, ModelSpec("resnet_tiny", C, 8, MODULE.mean, MODULE.std))
HEAD = {"kernel": np.zeros((D, C), np.float32), "bias": np.zeros(C, np.float32)}
SCORES = np.zeros((Q, N))
EXAMPLES = head_hessian.Examples(FEATURES, LOGITS, LOGITS, LOGITS)
RECIPE = Recipe(num_epochs=1, evaluate_epochs=(1,), batch_size=2)


def flat(x):
    return x.reshape(len(x), -1)


def train_step(**arguments):
    apply = lambda *_: (LOGITS, {})  # noqa: E731
    return train.make_train_step(apply, optim.sgd(0.1))(**arguments)


def evaluate_step(**arguments):
    return make_evaluate_step()(flat, **arguments)


def fine_tune(**arguments):
    return make_fine_tune(MODULE, RECIPE, 0)({}, {}, key=KEYS[0], rates=Rates(0.1, 0.0), **arguments)


def network(x):
    return MODULE.apply({"params": {}}, x)


class Door(NamedTuple):
    """A function, arguments that it takes, and those of them that are then broken: "NAME how"."""

    function: Callable
    arguments: dict[str, Any]
    broken: str
    tested: Callable | None = None  # the public function, where `function` calls what it returns


def batch_of(images):
    return Batch(images, LABELS, KEYS)


def views_door(function):
    return Door(function, {"images": IMAGES}, "images rank, images kind")


def keyed(function, **options):
    return Door(
        function, {"keys": KEYS, "images": FLOATS, **options}, "images rank, images kind, keys length"
    )


def moved(function, name, array, **options):
    """Of the deterministic transforms, which take an array [N, ...] beside the images."""
    return Door(
        function, {"images": FLOATS, name: array, **options}, f"images rank, {name} rank, {name} length"
    )


def threats(threat_model):
    pair = {"centers": FLOATS, "images": FLOATS}
    ascent = {"images": FLOATS, "gradients": FLOATS, "step_size": 0.1}
    return [
        Door(threat_model.project, pair, "images rank, images length"),
        Door(threat_model.step, ascent, "gradients rank, gradients length"),
        Door(threat_model.random_start, {"keys": KEYS, "centers": FLOATS}, "keys rank, keys length"),
    ]


ATTACKED = {"logits_fn": flat, "images": FLOATS, "labels": LABELS}
ON_LABELS = "labels rank, labels column, labels length, labels kind"
ON_IMAGES = f"images rank, images kind, {ON_LABELS}"
RANKED = {"scores": SCORES, "query_labels": np.zeros(Q, int), "train_labels": LABELS}
ON_SCORES = "scores rank, query_labels length, train_labels length"
SETS = {"model": MODEL, "train": SPLIT, "test": SPLIT}
ON_SPLITS = ", ".join(
    f"{split}.{part}"
    for split in ("train", "test")
    for part in ("images rank", "images kind", "labels rank", "labels length", "labels kind")
)

DOORS = [
    # attacks
    *(
        Door(loss, {"logits": LOGITS, "labels": LABELS}, f"logits rank, {ON_LABELS}")
        for loss in (cross_entropy, dlr, log_odds, margin)
    ),
    Door(
        pgd,
        {**ATTACKED, "threat_model": L2(0.5), "key": KEYS, "random_start": True},
        f"{ON_IMAGES}, key length",
    ),
    Door(check_network, ATTACKED, ON_IMAGES),
    Door(auto_attack, ATTACKED | {"threat_model": L2(1.0)}, ON_IMAGES),
    Door(
        targeted_dlr,
        {"logits": LOGITS, "labels": LABELS, "targets": LABELS},
        f"logits rank, {ON_LABELS}, targets length, targets kind",
    ),
    *threats(L2(0.5)),
    *threats(Linf(0.1)),
    *threats(Unconstrained()),
    *threats(visualise.Fourier(L2(0.5))),
    # data
    Door(
        batches.make_batch,
        {"images": IMAGES, "labels": LABELS, "indices": LABELS, "keys": KEYS, "augmentation": Augmentation()},
        f"{ON_IMAGES}, indices rank, indices kind, keys length",
    ),
    Door(batches.check_batch, {"batch": batch_of(FLOATS)}, "batch.images length, batch.labels kind"),
    Door(
        unseen,
        {"split": SPLIT, "spec": MODEL.spec},
        "split.images rank, split.images kind, split.labels length",
    ),
    Door(datasets.check_split, {"split": SPLIT}, "split.images rank, split.images kind, split.labels length"),
    Door(
        feed.make_feed,
        {
            "train": SPLIT,
            "augmentation": Augmentation(),
            "key": KEYS[0],
            "batch_size": 2,
            "num_steps": 1,
            "seed": 0,
            "num_workers": 0,
        },
        "train.images rank, train.labels length",
    ),
    Door(
        glyphs.render_glyphs,
        {"letters": LABELS, "textures": LABELS, "image_size": 16, "rng": None},
        "textures length, letters rank",
    ),
    Door(
        subsets.subset_indices,
        {"labels": LABELS, "num_images": 1, "dataset": "a", "seed": 0},
        "labels rank, labels kind",
    ),
    Door(subsets.stratified_order, {"labels": LABELS, "length": 1, "rng": None}, "labels rank"),
    Door(choose_augmentation, {"augmentation": Augmentation(), "images": IMAGES}, "images rank"),
    Door(to_float, {"images": IMAGES}, "images rank, images kind"),
    Door(resize, {"images": FLOATS, "size": 4}, "images rank"),
    keyed(augment, augmentation=Augmentation()),
    keyed(transforms.random_crop),
    keyed(transforms.random_resized_crop, min_area=0.5),
    keyed(transforms.random_flip),
    keyed(transforms.color_jitter),
    keyed(transforms.random_lighting, scale=0.1),
    keyed(transforms.random_rotation, degrees=2.0),
    moved(transforms.crop_at, "offsets", np.zeros((N, 2), int), padding=1),
    moved(transforms.resized_crop_at, "boxes", np.ones((N, 4), np.float32)),
    moved(transforms.flip_where, "flipped", np.zeros(N, bool)),
    moved(transforms.adjust_colors, "order", np.zeros((N, 3), int), factors=np.ones((N, 3))),
    moved(transforms.light_by, "shares", np.zeros((N, 3), np.float32)),
    moved(transforms.rotate_by, "degrees", np.zeros(N, np.float32)),
    *map(views_door, [views.low_pass, views.grey, views.patch_shuffle, views.amplitude_swap]),
    *map(views_door, [views.edges, views.silhouette]),
    Door(views.patch_order, {"image": IMAGES[0]}, "image rank"),
    # models, training, evaluation
    Door(network, {"x": FLOATS}, "x rank, x kind", models.ResNet.__call__),
    Door(
        optim.make_schedule,
        {"name": "constant", "learning_rate": np.float32(0.1), "num_steps": 1},
        "learning_rate rank",
    ),
    Door(optim.sgd, {"schedule": 0.1, "weight_decay": np.float32(0.1)}, "weight_decay rank"),
    Door(
        optim.apply_updates,
        {"params": {"w": MASK}, "updates": {"w": MASK}, "mask": None},
        "updates.w rank, updates.w length",
    ),
    Door(
        train_step,
        {"state": TrainState(0, {}, {}, ()), "batch": batch_of(FLOATS)},
        "batch.images length, batch.labels rank, batch.labels length, batch.labels kind, batch.keys length",
        train.make_train_step,
    ),
    Door(
        train.smoothed_cross_entropy,
        {"logits": LOGITS, "labels": LABELS, "smoothing": 0.0},
        f"logits rank, {ON_LABELS}",
    ),
    Door(
        train.sum_metrics,
        {"losses": MASK, "logits": LOGITS, "labels": LABELS, "mask": MASK},
        "losses length, logits rank, labels rank, labels length, mask length",
    ),
    Door(
        train.fit,
        {
            "state": TrainState(np.int32(0), {}, {}, ()),
            "run_step": None,
            "num_steps": 1,
            "schedule": None,
            "checkpoints": None,
            "save_every": 1,
            "log_every": 1,
            "log": None,
        },
        "state.step rank, state.step kind",
    ),
    Door(
        evaluate_step,
        {"batch": batch_of(FLOATS), "mask": MASK},
        "batch.images length, batch.labels length, mask length, mask rank",
        make_evaluate_step,
    ),
    Door(
        evaluation_metrics,
        {"logits": LOGITS, "labels": LABELS, "mask": MASK},
        f"logits rank, {ON_LABELS}, mask length",
    ),
    Door(
        evaluate,
        {"network": flat, "split": SPLIT, "batch_size": 2},
        "split.images rank, split.images kind, split.labels length, split.labels kind",
    ),
    Door(
        measure,
        {"model": MODEL, "split": SPLIT, "evaluation": Evaluation(norm="none", batch_size=2)},
        "split.images rank, split.images kind, split.labels length, split.labels kind",
    ),
    Door(predict, {"network": flat, "images": FLOATS}, "images rank, images kind"),
    Door(
        measure_robustness,
        {"network": flat, "split": SPLIT, "evaluation": Evaluation(norm="none", batch_size=2)},
        "split.images rank, split.images kind, split.labels length, split.labels kind",
    ),
    # transfer
    Door(
        transfer.fine_tune_one,
        {**SETS, "key": KEYS[0], "class_names": ("a", "b", "c"), "recipe": RECIPE},
        ON_SPLITS,
    ),
    Door(
        transfer.fine_tune_many,
        {**SETS, "subsets": np.zeros((N, 2), int), "keys": KEYS, "num_classes": C, "recipe": RECIPE},
        f"{ON_SPLITS}, subsets rank, subsets kind, keys rank, keys length",
    ),
    Door(
        transfer.prepare,
        {**SETS, "recipe": RECIPE, "num_unfrozen_blocks": -1, "used": LABELS},
        f"{ON_SPLITS}, used rank, used kind",
    ),
    Door(
        fine_tune,
        {"task": Task(IMAGES, LABELS, IMAGES, LABELS), "indices": LABELS},
        "task.train_labels rank, task.test_labels length, indices rank",
        make_fine_tune,
    ),
    Door(
        transfer.activations,
        {"module": MODULE, "variables": {}, "images": IMAGES, "start": 0, "numbers": LABELS},
        "images rank, images kind, numbers rank, numbers length, numbers kind",
    ),
    Door(
        transfer.target_batch_stats,
        {"module": MODULE, "variables": {}, "images": IMAGES},
        "images rank, images kind",
    ),
    Door(transfer.normalised_by, {"model": MODEL, "images": IMAGES}, "images rank, images kind"),
    Door(
        lambda kernel: transfer.reset_head({"params": {"fc": {"kernel": kernel}}}, KEYS[0], num_classes=C),
        {"kernel": HEAD["kernel"]},
        "kernel rank",
        transfer.reset_head,
    ),
    Door(
        choose_k,
        {"method": "rule", "model": MODEL, "train": SPLIT, "num_classes": C, "key": KEYS[0]},
        "train.images rank, train.images kind, train.labels length, train.labels kind",
    ),
    Door(transfer.possible_folds, {"labels": LABELS, "num_folds": 2}, "labels rank"),
    Door(
        dual.make_dual,
        {"features": FEATURES, "kernel": HEAD["kernel"]},
        "features rank, kernel rank, kernel length",
    ),
    Door(dual.dual_params, {"num_images": N, "bias": HEAD["bias"]}, "bias rank"),
    Door(dual.dual_inputs, {"dual": None, "places": LABELS}, "places rank, places kind"),
    Door(
        lambda rows, logits, places: dual.dual_apply({}, {}, (rows, logits, places), True),
        {"rows": np.zeros((N, N)), "logits": LOGITS, "places": LABELS},
        "rows rank, rows length, logits rank, logits length, places rank, places length",
        dual.dual_apply,
    ),
    Door(
        dual.primal_head,
        {"params": {"coefficients": LOGITS}, "features": FEATURES, "kernel": HEAD["kernel"]},
        "params.coefficients rank, params.coefficients length, features rank, kernel rank, kernel length",
    ),
    Door(
        one_model.fine_tune,
        {"model": MODEL, "images": IMAGES, "labels": LABELS, "test_images": IMAGES, "test_labels": LABELS},
        f"images rank, {ON_LABELS}, test_images rank, test_labels rank, test_labels length, test_labels kind",
    ),
    Door(
        one_model.tune,
        {**SETS, "key": KEYS[0], "class_names": ("a", "b"), "num_unfrozen_blocks": 0, "recipe": RECIPE},
        ON_SPLITS,
    ),
    Door(resolve_recipe, {"recipe": RECIPE, "num_images": N, "images": IMAGES}, "images rank"),
    # analysis
    Door(saliency.stable_cross_entropy, {"logits": LOGITS, "labels": LABELS}, f"logits rank, {ON_LABELS}"),
    Door(saliency.gradients, ATTACKED, ON_IMAGES),
    Door(saliency.smooth_grad, {**ATTACKED, "key": KEYS[0]}, ON_IMAGES),
    Door(saliency.integrated_gradients, ATTACKED, ON_IMAGES),
    Door(saliency.to_picture, {"values": FLOATS}, "values rank"),
    Door(saliency.low_frequency_share, {"values": FLOATS}, "values rank"),
    Door(saliency.alignment, {"values": FLOATS, "images": FLOATS}, "values rank, values length, images rank"),
    Door(visualise.scale_spectrum, {"images": FLOATS, "power": 1}, "images rank"),
    Door(
        visualise.visualise,
        {"objective": visualise.Objective(Partial(flat), LABELS), "images": FLOATS},
        "images rank, objective.chosen length, objective.chosen kind",
    ),
    Door(visualise.grid, {"pictures": FLOATS[None]}, "pictures rank"),
    Door(shape.decide, {"logits": LOGITS, "groups": {"a": (0,)}}, "logits rank"),
    Door(
        shape.shape_bias,
        {"decisions": LABELS, "shapes": LABELS, "textures": LABELS},
        "decisions rank, shapes rank, shapes length, textures length",
    ),
    Door(
        shape.measure,
        {"logits_fn": flat, "conflict": CueConflict(IMAGES, LABELS, LABELS)},
        "conflict.images rank, conflict.images kind, conflict.shapes length, conflict.textures length",
    ),
    Door(shape.half_point, {"strengths": MASK, "biases": MASK}, "strengths length, biases rank"),
    Door(intervals.share, {"count": LABELS, "total": LABELS}, "count rank, total length"),
    Door(
        head_bound.feature_sensitivity,
        {"features_fn": flat, "images": FLOATS, "threat_model": L2(0.5), "key": KEYS[0]},
        "images rank, images kind",
    ),
    Door(
        head_bound.head_bound,
        {"features": FEATURES, "labels": LABELS, **HEAD, "sensitivity": MASK},
        f"features rank, {ON_LABELS}, kernel rank, kernel length, bias rank, bias length, sensitivity length",
    ),
    Door(matches.most_helpful, {"scores": SCORES, "num": 1}, "scores rank"),
    Door(matches.most_harmful, {"scores": SCORES, "num": 1}, "scores rank"),
    Door(matches.match_rates, RANKED, ON_SCORES),
    Door(matches.match_shares, RANKED, ON_SCORES),
    Door(matches.class_heat_map, {**RANKED, "num_classes": C}, ON_SCORES),
    Door(
        matches.harmful_table,
        {"scores": SCORES, "train_labels": LABELS, "is_wrong": np.zeros(N, bool)},
        "scores rank, train_labels length, is_wrong rank, is_wrong length",
    ),
    Door(
        influence.last_layer_scores,
        {
            "train_features": FEATURES,
            "train_labels": LABELS,
            "query_features": QUERIES,
            "query_labels": LABELS[:Q],
            **HEAD,
        },
        "train_features rank, train_labels length, train_labels kind, query_features rank, "
        "query_labels length, query_labels kind, kernel rank, bias rank, bias length",
    ),
    Door(
        head_hessian.make_examples,
        {"features": FEATURES, "labels": LABELS, **HEAD, "basis": np.eye(D + 1)},
        f"features rank, {ON_LABELS}, kernel rank, kernel length, bias length, basis rank, basis length",
    ),
    Door(head_hessian.basis_of_few, {"features": FEATURES}, "features rank"),
    Door(head_hessian.project, {"vectors": np.zeros((Q, C, D)), "examples": EXAMPLES}, "vectors rank"),
    Door(head_hessian.hessian_product, {"vectors": np.zeros((Q, C, D)), "train": EXAMPLES}, "vectors rank"),
    Door(head_hessian.factorise, {"matrix": np.eye(D)}, "matrix rank, matrix length"),
    Door(
        head_hessian.solve,
        {"factor": np.eye(C * D), "vectors": np.zeros((Q, C, D))},
        "factor rank, factor length, vectors rank",
    ),
    Door(
        krylov.conjugate_gradients,
        {"operator": None, "targets": SCORES, "tolerance": 1.0, "max_iterations": 1},
        "targets rank, targets kind",
    ),
    Door(calibrate, {"logits": LOGITS, "labels": LABELS}, "logits rank, labels rank, labels length"),
    # report
    Door(
        report.make_outcome,
        {"labels": LABELS, "logits": LOGITS, "class_names": "abcd"},
        "labels rank, labels length, logits rank",
    ),
]

# What takes arrays, or may, and has no door of its own.
EXCEPTIONS = {
    "data.cache.image_hashes": "`unseen` and fine-tuning check their split; others decoded it",
    "attacks.network.as_network": "images of any shape that the network takes",
    "attacks.network.in_batches": "a network of `as_network`, and images that it takes",
    "attacks.network.jit_for": "a network of `as_network`",
    "attacks.pgd.check_images": "`pgd` checks their shape",
    "attacks.pgd.make_attack": "names and numbers",
    "data.planned.plan_dataset": "names and numbers",
    "models.bundle.digest": "any tree of weights",
    "models.resnet.init_variables": "jax.random refuses what is no single key",
    "optim.freeze_mask": "any tree of parameters",
    "train.init_state": "any tree of variables",
    "transfer.freezing.frozen_mask": "`optim.freeze_mask` compares the names",
    "analysis.head_hessian.gradients": "Examples are what make_examples made",
    "analysis.head_hessian.hessian_diagonal": "Examples are what make_examples made",
    "analysis.head_hessian.dense_hessian": "Examples are what make_examples made",
    "analysis.visualise.noise": "jax.random refuses what is no single key",
    "analysis.visualise.unit": "`visualise` checks an Objective, beside its images",
    "analysis.visualise.logit": "`visualise` checks an Objective, beside its images",
    "analysis.visualise.match": "activations of any rank, compared with the network's by `visualise`",
    "data.views.otsu_threshold": "pixels in any arrangement",
    "transfer.choose_k.make_folds": "`cross_validate` calls it behind `possible_folds`",
    "transfer.choose_k.cross_validate": "`choose_k`'s second half; `possible_folds` checks its labels",
    "robustness.probed": "of the split that `measure_robustness` checks",
    "study.rows.history_rows": "the history of a fine-tuning as it came",
}

MODULES = [
    "advtransfer",
    "attacks",
    "attacks.threat_models",
    "data",
    "data.subsets",
    "data.transforms",
    "data.views",
    "evaluate",
    "models",
    "optim",
    "report",
    "robustness",
    "transfer.one_model",
    "study",
    "torch_checkpoint",
    "train",
    "transfer",
    "transfer.choose_k",
    "transfer.dual",
    "analysis.cue_conflict",
    "analysis.head_bound",
    "analysis.head_hessian",
    "analysis.influence",
    "analysis.krylov",
    "analysis.matches",
    "analysis.saliency",
    "analysis.shape",
    "analysis.visualise",
]
ARRAYS = re.compile(
    r"\b(Array|AnyArray|ndarray|PRNGKeyArray|PyTree|Variables|Images)\b"
    r"|\b(Split|Batch|CueConflict|Examples|DualHead|Objective|TrainState)\b|^Any\b"
)
NO_ARRAYS = {"module", "dtype", "config"}  # parameters of type Any


def rank(x):
    """An axis fewer; of a scalar one more."""
    return x[0] if x.ndim else x[None]


def column(x):
    """As some tables hold labels."""
    return x[:, None]


def length(x):
    return x[:-1]


def kind(x):
    return x.astype(np.float32 if np.issubdtype(x.dtype, np.integer) else np.int32)


BREAKS = {"rank": rank, "column": column, "length": length, "kind": kind}


def parts(container):
    return container if isinstance(container, dict) else container._asdict()


def replaced(container, path, value):
    """A copy of nested dicts and named tuples with another value at "NAME.FIELD"."""
    name, _, rest = path.partition(".")
    value = replaced(parts(container)[name], rest, value) if rest else value
    return {**container, name: value} if isinstance(container, dict) else container._replace(**{name: value})


def found(container, path):
    for name in path.split("."):
        container = parts(container)[name]
    return container


CASES = [
    pytest.param(door, *case.split(), id=f"{name_of}-{case.replace(' ', '-')}")
    for door in DOORS
    for name_of in [getattr(door.tested or door.function, "__qualname__", "")]
    for case in door.broken.split(", ")
]


@pytest.mark.parametrize(("door", "path", "how"), CASES)
def test_what_is_not_as_the_docstring_says_is_refused(door, path, how):
    broken = BREAKS[how](found(door.arguments, path))
    with pytest.raises((AssertionError, ValueError)) as refusal:
        door.function(**replaced(door.arguments, path, broken))
    message = str(refusal.value)
    given = str(broken.dtype) if how == "kind" else str(broken.shape)
    # Of leading axes compared a message holds the leading axes.
    assert given in message or (how != "kind" and str(broken.shape[:1]) in message)


def name_of(function):
    function = inspect.unwrap(function)
    return f"{function.__module__}.{function.__qualname__}".removeprefix("advtransfer.")


def public(module):
    """The functions that a module exports, and the methods of the threat models that it defines."""
    names = getattr(module, "__all__", None) or [
        name
        for name, x in vars(module).items()
        if not name.startswith("_") and getattr(x, "__module__", "") == module.__name__
    ]
    for name in names:
        x = getattr(module, name)
        if inspect.isfunction(inspect.unwrap(x)) if callable(x) else False:
            yield x
        elif inspect.isclass(x) and hasattr(x, "random_start") and not getattr(x, "_is_protocol", False):
            yield from (getattr(x, method) for method in ("project", "step", "random_start"))


def takes_arrays(function):
    annotations = inspect.unwrap(function).__annotations__
    types = {name: str(x) for name, x in annotations.items() if name not in {"return", *NO_ARRAYS}}
    # A function among the arguments checks its own.
    return any(ARRAYS.search(x) for x in types.values() if not re.match("Callable|Apply", x))


def test_every_public_function_that_takes_arrays_has_a_door():
    tested = {name_of(door.tested or door.function) for door in DOORS}
    modules = [
        importlib.import_module("advtransfer" if name == "advtransfer" else f"advtransfer.{name}")
        for name in MODULES
    ]
    functions = {name_of(x): x for module in modules for x in public(module)}
    assert "attacks.pgd.pgd" in functions and "attacks.threat_models.L2.project" in functions
    wanted = {name for name, x in functions.items() if takes_arrays(x) or "threat_models" in name}
    assert sorted(wanted - tested - EXCEPTIONS.keys()) == []
    assert sorted(EXCEPTIONS.keys() & tested) == []
    assert sorted(EXCEPTIONS.keys() - wanted) == []
