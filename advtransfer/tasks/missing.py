"""The datasets and models that a command needs and that are not on this machine.

A plan lists them. A run downloads the models, and does not begin without the datasets: one error lists them.
"""

from __future__ import annotations

import importlib.util

from advtransfer.config import ConfigError, Options, names_key
from advtransfer.data import NotPrepared, check_dataset_name, known_sizes
from advtransfer.data.targets import BY_HAND, DOWNLOAD_MB
from advtransfer.hub import names_folder
from advtransfer.tasks.inputs import is_missing, is_trained_here, split_names, study_targets
from advtransfer.torch_checkpoint import file_bytes, known_on_hub


def check_datasets(options: Options) -> None:
    """Raises a ConfigError unless all datasets of the stage are there."""
    if missing := _missing_datasets(options):
        keys = ", ".join(dict.fromkeys(f"config.{key}" for key, _ in missing))
        sets = "; ".join(_describe(error) for _, error in missing)
        raise ConfigError(
            f"{keys}: not prepared (looked in {missing[0][1].root}, TFDS_DATA_DIR says where): {sets}"
        )


def missing_lines(options: Options) -> list[str]:
    """What the run would need first, a line each, with its size and what to do.

    Raises:
      ConfigError: a dataset is neither there nor known.
    """
    lines = []
    if datasets := _missing_datasets(options):
        lines.append("datasets to prepare before the run; their sizes above are as published:")
        lines += [f"  {_describe(error)}" for _, error in datasets]
    if models := [name for name in _models(options) if is_missing(name)]:
        lines.append("models to download, which the run does:")
        lines += [f"  {_describe_model(name)}" for name in models]
    return lines


def _missing_datasets(options: Options) -> list[tuple[str, NotPrepared]]:
    """Those of the stage that TFDS can prepare, each once, with the key that names it.

    Raises:
      ConfigError: of a dataset that is not there for another reason; or of one of unknown size, if it is all
        that is missing.
    """
    found: dict[str, tuple[str, NotPrepared]] = {}
    for key, name in _datasets(options):
        with names_key(key):
            try:
                check_dataset_name(name)
            except NotPrepared as error:
                found.setdefault(name, (key, error))
    if len(found) == 1:
        ((key, error),) = found.values()
        if known_sizes(error.name) is None:
            with names_key(key):
                raise error
    return list(found.values())


def _datasets(options: Options) -> list[tuple[str, str]]:
    """(key, name) of those that the stage reads."""
    run, trained = options.run, [("train.dataset", options.training_data.dataset)]
    if run.stage == "study":
        is_training = any(map(is_trained_here, split_names(options.study.sources)))
        key, names = study_targets(options)
        return trained * is_training + [(key, name) for name in names]
    found = {
        "source": trained,
        "transfer": [("transfer.target", options.target.target)],
        "evaluate": [("evaluate.dataset", options.measured.dataset)],
        "predict": [("predict.held_out", options.prediction.held_out.removeprefix("none"))],
        "interpret": [("data", run.data)],
        "import": [("verify", run.verify)],
    }
    return [(key, name) for key, name in found.get(run.stage, []) if name]


def _models(options: Options) -> list[str]:
    """Those that the stage loads by their names."""
    names = {
        "study": options.study.sources,
        "interpret": options.run.models,
        "transfer": options.run.source,
        "import": options.run.source,
        "evaluate": options.measured.model,
        "predict": options.prediction.model,
        "export": options.export.model,
    }.get(options.run.stage, "")
    return list(dict.fromkeys(split_names(names)))


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
    known = None if names_folder(name) else known_on_hub(name)
    size = f" (about {file_bytes(known) / 1e6:,.0f} MB)" if known else ""
    needs = "" if importlib.util.find_spec("huggingface_hub") else ": pip install huggingface_hub"
    return f"{name}{size}{needs}"
