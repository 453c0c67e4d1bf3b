"""The datasets and models that a command needs and that are not on this machine.

A plan lists them. A run downloads the models, and does not begin without the datasets: one error lists them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import NamedTuple

from ml_collections import ConfigDict

from advtransfer.config import ConfigError, flatten, names_key
from advtransfer.data import NotPrepared, check_dataset_name, known_sizes
from advtransfer.data.targets import BY_HAND, DOWNLOAD_MB
from advtransfer.stages.named_models import is_missing, is_trained_here
from advtransfer.torch_checkpoint import file_bytes, known_on_hub


class _Missing(NamedTuple):
    key: str  # of the config, that names it
    error: NotPrepared


def check_datasets(config: ConfigDict) -> None:
    """Raises a ConfigError unless all datasets of config.stage are there."""
    if missing := _missing_datasets(config):
        keys = ", ".join(dict.fromkeys(f"config.{one.key}" for one in missing))
        sets = "; ".join(_describe(one.error) for one in missing)
        raise ConfigError(
            f"{keys}: not prepared (looked in {missing[0].error.root}, TFDS_DATA_DIR says where): {sets}"
        )


def missing_lines(config: ConfigDict) -> list[str]:
    """What the run of config.stage would need first, a line each, with its size and what to do.

    Raises:
      ConfigError: a dataset is neither there nor known.
    """
    datasets = [_describe(one.error) for one in _missing_datasets(config)]
    models = [_describe_model(name) for name in _models(config) if is_missing(name)]
    titles = (
        "datasets to prepare before the run; their sizes above are as published:",
        "models to download, which the run does:",
    )
    return [
        line
        for title, those in zip(titles, (datasets, models), strict=True)
        if those
        for line in (title, *(f"  {text}" for text in those))
    ]


def _missing_datasets(config: ConfigDict) -> list[_Missing]:
    """Those of config.stage that TFDS can prepare, each once.

    Raises:
      ConfigError: of a dataset that is not there for another reason; or of one of unknown size, if it is all
        that is missing.
    """
    found: dict[str, _Missing] = {}
    for key, name in _datasets(config):
        with names_key(key):
            try:
                check_dataset_name(name)
            except NotPrepared as error:
                found.setdefault(name, _Missing(key, error))
    unknown = [one for one in found.values() if known_sizes(one.error.name) is None]
    if len(unknown) == len(found) == 1:
        with names_key(unknown[0].key):
            raise unknown[0].error
    return list(found.values())


def _datasets(config: ConfigDict) -> Iterator[tuple[str, str]]:
    """(key, name) of those that config.stage reads."""
    stage = config.stage
    keys = {
        "transfer": "transfer.target",
        "evaluate": "evaluate.dataset",
        "interpret": "data",
        "import": "verify",
    }
    if stage == "source" or (stage == "study" and any(map(is_trained_here, _names(config.study.sources)))):
        yield "train.dataset", config.train.dataset
    if stage == "study":
        key = "study.targets" if config.study.targets else "transfer.target"
        yield from ((key, name) for name in _names(flatten(config)[key]))
    if stage in keys and (name := flatten(config)[keys[stage]]):
        yield keys[stage], name


def _models(config: ConfigDict) -> list[str]:
    """Those that config.stage loads by their names."""
    names = {
        "study": config.study.sources,
        "interpret": config.models,
        "transfer": config.source,
        "import": config.source,
        "evaluate": config.evaluate.model,
    }.get(config.stage, "")
    return list(dict.fromkeys(_names(names)))


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _describe(error: NotPrepared) -> str:
    """The set, its size, and the command that prepares it."""
    known, base = known_sizes(error.name), error.base
    sizes = [f"{known.num_train:,} + {known.num_test:,} images"] if known else []
    if base in DOWNLOAD_MB:
        sizes.append(f"{DOWNLOAD_MB[base]:,} MB to download")
    if base in BY_HAND:
        sizes.append("by hand, to downloads/manual of the folder of prepared sets")
    size = f" ({', '.join(sizes)})" if sizes else ""
    return f"{error.name}{size}: {error.command}"


def _describe_model(name: str) -> str:
    known = known_on_hub(name)
    size = f" (about {file_bytes(known) / 1e6:,.0f} MB)" if known else ""
    needs = "" if importlib.util.find_spec("huggingface_hub") else ": pip install huggingface_hub"
    return f"{name}{size}{needs}"
