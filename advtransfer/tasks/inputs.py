"""Models and datasets by the names that the command line gives them."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import Any

from advtransfer import hub
from advtransfer.config import Options, Run, names_key
from advtransfer.data import Dataset, load_dataset, plan_dataset
from advtransfer.models import Model, compute_dtype, create_module, load_model
from advtransfer.norms import NORMS
from advtransfer.torch_checkpoint import import_torch_checkpoint, known_on_hub, known_spec

_SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors")  # of a file that is not there


def load_data(
    run: Run, key: str, name: str, *, splits: tuple[str, ...], planned: bool = False, **options: Any
) -> Dataset:
    """A dataset by name; small squares keep their size, and skipped images are reported.

    Args:
      run: where decoded images are kept and what becomes of broken ones.
      key: of the configuration, that names it.
      name, splits, options: as for `load_dataset`.
      planned: whether `plan_dataset` finds it, with a placeholder for a known set that is not prepared.

    Raises:
      ConfigError: naming the key: no such dataset, or no images in one of `splits`.
    """
    with names_key(key):
        dataset = (plan_dataset if planned else load_dataset)(
            name,
            cache_dir=run.cache_dir or None,
            splits=splits,
            broken=run.broken_images,
            enlarge=False,
            **options,
        )
        for split in splits:
            if not getattr(dataset, split).num_images:
                raise ValueError(f"{name} has no {split} images")
    return dataset


def find_model(name: str, dtype: str, *, planned: bool = False) -> Model:
    """A model by name: a folder, `hf:OWNER/NAME[@REVISION]`, `hf:OWNER/NAME/FILE[@REVISION]`, or a PyTorch
    file.

    Args:
      name: of the model.
      dtype: that it computes in, see `compute_dtype`.
      planned: whether nothing is downloaded: a known model of the hub then has no variables.

    Raises:
      ValueError: no name, no such model, or one that cannot be read; a model that is planned with and not
        known.
    """
    if not name:
        raise ValueError("name a model: a folder, hf:OWNER/NAME, hf:OWNER/NAME/FILE or a PyTorch file")
    if planned and is_missing(name):
        known = None if hub.names_folder(name) else known_on_hub(name)
        if known is None:
            raise ValueError(
                f"{name} is not on this machine, and what it is cannot be known without it: fetch it first "
                "(hf download REPO FILE), or start the run, which does"
            )
        spec, own = known_spec(known), compute_dtype(dtype)
        module = create_module(
            spec.architecture, num_classes=spec.num_classes, mean=spec.mean, std=spec.std, dtype=own
        )
        return Model(module, {}, spec)
    if _is_checkpoint(name):
        return import_torch_checkpoint(name, dtype=compute_dtype(dtype))
    return load_model(name, dtype=compute_dtype(dtype))


def find_models(names: str, dtype: str, *, planned: bool = False) -> dict[str, Model]:
    """The models of a comma-separated list by what rows call them; as `find_model`.

    Raises:
      ValueError: as `find_model`, or two are called the same.
    """
    models: dict[str, Model] = {}
    for name in split_names(names) or [""]:
        model, called = find_model(name, dtype, planned=planned), model_name(name)
        if called in models:
            raise ValueError(f"two models are called {called!r}: rename a folder, or leave one away")
        models[called] = model
    return models


def find_source_models(text: str, dtype: str) -> tuple[str, list[tuple[str, Model]]]:
    """Of NAME=PATTERN the name, and every model whose path matches, in the order of their paths.

    Raises:
      ValueError: no name, no match, or a model that cannot be read.
    """
    name, _, pattern = text.partition("=")
    if not pattern or "/" in name or not name:
        raise ValueError(
            f"{text!r} names several models: write NAME=PATTERN, with the name that rows give them"
        )
    places = sorted(glob.glob(pattern, recursive=True))
    if not places:
        raise ValueError(f"nothing on this machine matches {pattern!r}")
    return name, [(place, find_model(place, dtype)) for place in places]


def is_trained_here(source: str) -> bool:
    """Whether a name in config.study.sources, natural or NORM:EPS, is of a network that the study trains."""
    return source == "natural" or source.partition(":")[0] in NORMS[1:]


def is_missing(name: str) -> bool:
    """Whether a model has to be downloaded."""
    return name.startswith("hf:") and not hub.is_on_this_machine(name)


def model_name(name: str) -> str:
    """What rows call a model: its file without the ending, or its folder; for "model" the folder above it."""
    path = Path(name.removeprefix("hf:").partition("@")[0]).absolute()
    last = path.stem if _is_checkpoint(name) else path.name
    return path.parent.name if last == "model" else last


def split_names(text: str) -> list[str]:
    """The names in a comma-separated list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def study_targets(options: Options) -> tuple[str, list[str]]:
    """The datasets that a study transfers to, and the key that names them."""
    key = "study.targets" if options.study.targets else "transfer.target"
    return key, split_names(options.study.targets or options.target.target)


def _is_checkpoint(name: str) -> bool:
    if hub.names_folder(name):
        return False
    return name.startswith("hf:") or os.path.isfile(name) or name.endswith(_SUFFIXES)
