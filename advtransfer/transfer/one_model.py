"""One network for one target, and what it is worth."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, Key, Num, UInt8

from advtransfer import storage
from advtransfer.arrays import AnyArray
from advtransfer.attacks import SLACK
from advtransfer.data import Split
from advtransfer.evaluate import predict
from advtransfer.labels import check_labels
from advtransfer.models import Model, package_versions, save_model
from advtransfer.report import ModelPage, Outcome, make_outcome, write_model_page
from advtransfer.report.sections import SourceInfo
from advtransfer.train import DivergedError
from advtransfer.transfer.choose_k import RULE, Choice, choose_k
from advtransfer.transfer.recipe import Recipe, resolve_recipe
from advtransfer.transfer.tuning import fine_tune_one

Images = UInt8[AnyArray, "_ _ _ 3"] | Float[AnyArray, "_ _ _ 3"]

_MARKER = "fine_tune.json"  # of a folder whose files a later call may replace
_EVALUATE_EPOCHS = (1, 2, 5, 10, 20, 50, 100, 150)
_MAX_SIDE = 224  # pixels of a picture on the page
_NUM_PICTURES = 16


class FineTuned(NamedTuple):
    """A transferred network and everything that was measured of it."""

    model: Model
    history: dict[str, Num[np.ndarray, " epochs"]]  # "epoch", and those of `fine_tune_one`
    choice: Choice | None  # of the number of blocks, where it was not given
    outcome: Outcome | None  # on the test images, where there are any
    test: Split | None


def fine_tune(
    model: Model,
    images: Images,
    labels: Integer[AnyArray, " n"] | Sequence[int],
    *,
    test_images: Images | None = None,
    test_labels: Integer[AnyArray, " m"] | Sequence[int] | None = None,
    class_names: Sequence[str] | None = None,
    num_unfrozen_blocks: int | str = 0,
    num_folds: int = 5,
    recipe: Recipe | None = None,
    key: Key[Array, ""] | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> FineTuned:
    """Fine-tunes a source network on all of the labelled images.

    Args:
      model: the source, of `load_model` or `import_torch_checkpoint`.
      images: uint8, or floats in [0, 1], which are rounded to 8 bits; [N, H, H, 3]. Those of another
        resolution than the source's are resized on the device, batch by batch.
      labels: from 0 to C - 1.
      test_images, test_labels: to measure on, and nothing else; or neither.
      class_names: of the C classes; None: "0", "1", ..., and there is an image of each.
      num_unfrozen_blocks: residual blocks trained beside the head, counted from the end; -1: everything;
        "rule": by `rule_of_thumb`; "cross_validation": the fewest whose accuracy on held-out folds of
        `images` is within one standard error of the best.
      num_folds: of the cross-validation.
      recipe: the hyper-parameters; None: `Recipe()`, measured after several epochs.
      key: of the new head, the batch order, the augmentation and the folds; None: `jax.random.key(0)`.
      folder: where to leave `model/`, `report.html` and its tables (see `write_model_page`), in the place of
        what an earlier call left there, which `fine_tune.json` tells; None: nowhere.

    Returns:
      `FineTuned`: the model, its history by epoch, and its predictions on the test images with the confusion
      matrix, the accuracy of each class and the mistakes, most confident first.

    Raises:
      ValueError: images or labels that are not as above, a network with fewer blocks, a recipe that cannot
        be, too few images of a class to cross-validate, or a folder that cannot be written or holds other
        files.
      DivergedError: the loss became NaN or infinite; nothing was written.
    """
    train = _split(images, labels, "images", "labels")
    names = _class_names(train.labels, class_names)
    test = None
    if test_images is not None or test_labels is not None:
        if test_images is None or test_labels is None:
            raise ValueError("test_images and test_labels go together: give both, or neither")
        test = _split(test_images, test_labels, "test_images", "test_labels")
        check_labels(test.labels, test.num_images, len(names), name="test_labels")
    if folder is not None:
        folder = storage.to_path(folder)
        storage.check_ours(folder, _MARKER)
        storage.check_writable(folder)
    key = jax.random.key(0) if key is None else key
    if recipe is None:
        recipe = Recipe(evaluate_epochs=_EVALUATE_EPOCHS)
    recipe = resolve_recipe(recipe, train.num_images, train.images)
    choice = None
    if isinstance(num_unfrozen_blocks, str):
        options = {"num_classes": len(names), "key": key, "num_folds": num_folds, "recipe": recipe}
        choice = choose_k(num_unfrozen_blocks, model, train, **options)
        num_unfrozen_blocks = choice.num_unfrozen_blocks
    options = {"class_names": names, "num_unfrozen_blocks": num_unfrozen_blocks, "choice": choice}
    tuned = tune(model, train, test, key=key, recipe=recipe, **options)
    if folder is not None:
        provenance = json.dumps(tuned.model.spec.provenance, default=str, indent=1)
        storage.make_folder(folder)
        storage.write(folder / _MARKER, provenance.encode())
        save_model(tuned.model, folder / "model", overwrite=True)
        write_model_page(make_page(tuned, title="A fine-tuned network"), folder)
    return tuned


def tune(
    model: Model,
    train: Split,
    test: Split | None,
    *,
    key: Key[Array, ""],
    class_names: tuple[str, ...],
    num_unfrozen_blocks: int,
    recipe: Recipe,
    choice: Choice | None = None,
) -> FineTuned:
    """Trains as `fine_tune_one`, and looks at every test image.

    Raises:
      ValueError: as `fine_tune_one`.
      DivergedError: the loss became NaN or infinite.
    """
    options = {"class_names": class_names, "num_unfrozen_blocks": num_unfrozen_blocks, "recipe": recipe}
    tuned, history = fine_tune_one(model, train, test, key=key, **options)
    if not np.isfinite(history["train_loss"][-1]):
        raise DivergedError(
            f"the loss became NaN or infinite (learning rate {recipe.learning_rate:g}); nothing was saved. "
            "Lower the learning rate (recipe.learning_rate, config.transfer.learning_rate)"
        )
    history = {"epoch": np.asarray(recipe.evaluate_epochs), **history}
    outcome = None if test is None else make_outcome(test.labels, predict(tuned, test.images), class_names)
    return FineTuned(tuned, history, choice, outcome, test)


def make_page(
    tuned: FineTuned,
    *,
    title: str,
    source: str = "",
    target: str = "",
    files: Sequence[str] = (),
    command: str = "",
    config: Mapping[str, Any] | None = None,
    versions: dict[str, str] | None = None,
) -> ModelPage:
    """What there is to tell; `source` and `target` in words, `files`, the names of the test images, and
    `config` for the recipe of the model."""
    provenance = tuned.model.spec.provenance
    parent, k = provenance["source"], provenance["num_unfrozen_blocks"]
    threat = SourceInfo("", parent["norm"], parent["eps"]).constraint
    facts = [
        ("Source", ", ".join(filter(None, [source, parent["architecture"], threat]))),
        ("Size of its images", f"{tuned.model.spec.image_size}² pixels"),
        ("Target", target or f"{len(tuned.model.spec.class_names):,} classes"),
        ("Training images", f"{provenance['num_train_images']:,}"),
        ("Trained blocks", {0: "none, the head alone", -1: "all"}.get(k, f"{k}, and the head")),
        ("Epochs", f"{provenance['recipe']['num_epochs']:,}"),
        ("Test images", f"{len(tuned.test.labels) if tuned.test else 0:,}"),
    ]
    said, rows = _told(tuned.choice, provenance["num_train_images"])
    return ModelPage(
        title=title,
        history=tuned.history,
        facts=facts,
        outcome=tuned.outcome,
        files=files,
        pictures=_pictures(tuned.test.images, tuned.outcome) if tuned.test and tuned.outcome else (),
        choice=said,
        choice_rows=rows,
        command=command,
        versions=versions or package_versions(),
        config=config or provenance["recipe"],
    )


def _told(choice: Choice | None, num_images: int) -> tuple[str, list[dict[str, Any]]]:
    """How the number of blocks was chosen: in a sentence, and as a table."""
    if choice is None:
        return "", []
    k = choice.num_unfrozen_blocks
    chosen = {0: "the head alone", 1: "the last block and the head", -1: "everything"}.get(
        k, f"the last {k} blocks and the head"
    )
    if choice.accuracies is None:
        said = (
            f"By the rule of thumb, the fewer images the fewer blocks: with {num_images:,} training images "
            f"{chosen}. The direction is the advice of Utrera et al. (2021), the numbers are this library’s."
        )
        taken = sum(num_images >= below for below, _ in RULE)
        return said, [
            {"below_num_images": below, "num_unfrozen_blocks": blocks, "chosen": int(i == taken)}
            for i, (below, blocks) in enumerate((*RULE, (None, -1)))
        ]
    rows = [
        {
            "num_unfrozen_blocks": candidate,
            "mean_accuracy": float(mean),
            "standard_error": float(error),
            "chosen": int(candidate == k),
            **{f"fold_{f + 1}": float(x) for f, x in enumerate(accuracies)},
        }
        for candidate, mean, error, accuracies in zip(
            choice.candidates, choice.means, choice.standard_errors, choice.accuracies, strict=True
        )
    ]
    said = (
        f"By cross-validation on the training images alone, in {choice.accuracies.shape[1]} folds: {chosen}, "
        "the fewest trained blocks whose accuracy is within one standard error of the best (Breiman et al., "
        "1984). No test image had a part in it."
    )
    return said, rows


def _pictures(images: np.ndarray, outcome: Outcome) -> np.ndarray:
    """The most confident mistakes [M, h, w, 3] in [0, 1]; of large images every second, third, ... pixel."""
    images = images[outcome.mistakes[:_NUM_PICTURES]]
    step = -(-max(images.shape[1:3]) // _MAX_SIDE)
    return images[:, ::step, ::step] / np.float32(255)


def _split(images: Any, labels: Any, images_name: str, labels_name: str) -> Split:
    """Images and labels as the engine takes them; a ValueError says what is wrong with them."""
    images, labels = np.asarray(images), np.asarray(labels)
    if images.ndim != 4 or images.shape[-1] != 3:
        hint = ""
        if images.ndim == 4 and images.shape[1] == 3:
            hint = f": move the channels last, np.moveaxis({images_name}, 1, -1)"
        elif images.ndim == 3 or (images.ndim == 4 and images.shape[-1] == 1):
            hint = ": repeat grey images three times along a last axis"
        raise ValueError(f"{images_name} have the shape {images.shape}, not [N, H, H, 3]{hint}")
    if not len(images):
        raise ValueError(f"{images_name} are empty: give at least one image of every class")
    if images.shape[1] != images.shape[2]:
        raise ValueError(
            f"{images_name} of {images.shape[1]} × {images.shape[2]} are not square: crop or pad them"
        )
    check_labels(labels, len(images), name=labels_name)
    if jnp.issubdtype(images.dtype, jnp.floating):
        images = _to_bytes(images, images_name)
    if images.dtype != np.uint8:
        raise ValueError(f"{images_name} are {images.dtype}: give uint8, or floats in [0, 1]")
    return Split(images, labels.astype(np.int32))


def _to_bytes(images: np.ndarray, name: str) -> np.ndarray:
    low, high = float(images.min()), float(images.max())
    if not np.isfinite(low + high):
        raise ValueError(f"{name} hold NaN or infinite values: fix or remove those images")
    if low < -SLACK or high > 1 + SLACK:
        raise ValueError(
            f"{name} reach from {low:g} to {high:g}: floats must lie in [0, 1], without normalisation; "
            "divide 8-bit values by 255"
        )
    return np.rint(images.astype(np.float32) * np.float32(255)).astype(np.uint8)


def _class_names(labels: np.ndarray, class_names: Sequence[str] | None) -> tuple[str, ...]:
    if class_names is None:
        classes = np.unique(labels)
        missing = np.setdiff1d(np.arange(classes[-1] + 1), classes)
        if len(missing):
            raise ValueError(
                f"no label is {missing[0]}, and the largest is {classes[-1]}: number the classes from 0 "
                "without gaps, or name all of them in class_names"
            )
        class_names = tuple(map(str, classes))
    if len(class_names) < 2:
        raise ValueError("there is one class: a classifier needs two at least")
    check_labels(labels, len(labels), len(class_names))
    return tuple(map(str, class_names))
