"""The configuration of the command line: the packages' options as one tree of keys, parsed, checked and
compared.

`default()` is what experiments change; `read` makes values of it, after which nothing sees a ConfigDict.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from advtransfer import foreign
from advtransfer import options as fields
from advtransfer.data import BROKEN, LOADING, SPLITS, VIEWS
from advtransfer.evaluate import Evaluation
from advtransfer.explain.options import ANALYSES, Interpretation
from advtransfer.models.export import INPUTS, PLATFORMS
from advtransfer.options import NOT_EMPTY, option, options, to_dict
from advtransfer.robustness import Curves
from advtransfer.source import SourceRecipe, parse_source
from advtransfer.study import Grid, Search
from advtransfer.torch_checkpoint.options import CheckpointOptions
from advtransfer.transfer import METHODS, Recipe

STAGES = ("source", "import", "transfer", "study", "evaluate", "predict", "export", "interpret", "report")
_SEED = {"low": 0, "high": 2**32 - 1}


class ConfigError(ValueError):
    """One line that names the key and the fix."""


@options
class Run:
    """What to do, and with what."""

    stage: str = option("study", "what to run", choices=STAGES)
    seed: int = option(
        0, "seed of the sources' initial weights, batch order, augmentation and attacks", **_SEED
    )
    dtype: str = option(
        "auto",
        "type in which networks compute; auto: float32 on a CPU, else bfloat16",
        choices=("auto", "float32", "bfloat16"),
    )
    cache_dir: str = option(
        "",
        "where drawn or decoded datasets and compiled programs are kept; '': the user's cache folder",
        decides=False,
    )
    keep_programs: bool = option(
        True, "keep compiled programs in the cache, for later runs on this kind of machine", decides=False
    )
    broken_images: str = option(
        "refuse", "what to do with images that cannot be decoded; skip: leave them out", choices=BROKEN
    )
    source: str = option(
        "",
        "stage=import, transfer: a model folder, hf:REPO/FILE[@revision] or a PyTorch file; import: or list",
    )
    verify: str = option(
        "", "stage=import: the dataset to measure the imported model on; '': none", decides=False
    )
    models: str = option("", "stage=interpret: models by name, comma-separated")
    data: str = option("", "stage=interpret: the dataset whose images are explained")
    rows: str = option("", "stage=report: a file or folder of rows (CSV, Parquet, JSON lines)", decides=False)


@options
class TrainingData:
    """What a source is trained on."""

    dataset: str = option("builtin:glyphs", "name of the training dataset")
    loading: str = option(
        "auto",
        "memory: decoded once, on the device; stream: decoded on the way; auto: stream above 2 GB",
        choices=LOADING,
    )


@options
class TargetData:
    """What a network is transferred to."""

    target: str = option("builtin:digits", "name of the target dataset")
    view: str = option("natural", "view of the target's images (data/views.py)", choices=tuple(VIEWS))
    num_train_images: int = option(
        200, "stage=transfer; -1: all, with those otherwise set aside for validation", low=1, also=(-1,)
    )
    num_unfrozen_blocks: int = option(
        0, "stage=transfer: blocks trained beside the head; -1: everything", low=-1
    )
    choose_num_unfrozen_blocks: str = option(
        "given",
        "stage=transfer: num_unfrozen_blocks as given, by a rule of thumb on the number of images, or by "
        "cross-validation on the training images (transfer/choose_k.py)",
        choices=("given", *METHODS),
    )
    num_folds: int = option(5, "folds of the cross-validation", low=2)
    stratified: bool = option(
        True,
        "whether subsets are stratified; False: one image of every class, the rest at random",
    )
    input_norm: str = option(
        "source",
        "mean and standard deviation that images are normalised with: the source's own, or for natural "
        "sources those of the target's training images, as in the paper's code",
        choices=("source", "target"),
    )


@options
class StudyNames:
    """What a study is made of, by name, and how it is run."""

    sources: str = option(
        "natural,l2:0.25",
        "comma-separated: natural and NORM:EPS are trained by the recipe of config.train; others are models "
        "by name; NAME=PATTERN, such as l2=runs/l2_*/model: models of one source, trained from several seeds",
    )
    source_seeds: int = option(
        1, "times that each source is trained here, from the seeds config.seed, config.seed + 1, ...", low=1
    )
    targets: str = option("", "datasets, comma-separated; '': config.transfer.target")
    views: tuple[str, ...] = option(
        (), "views of the targets' images; (): config.transfer.view", choices=tuple(VIEWS)
    )
    group_size: int = option(0, "trials in one compiled program; 0: all of one shape", low=0)
    engine: str = option(
        "local",
        "what runs the groups: this process, with others on the same workdir, or a Ray cluster",
        choices=("local", "ray"),
        decides=False,
    )
    ray_address: str = option(
        "", "HOST:PORT of the Ray cluster's head; '': RAY_ADDRESS, or this machine", decides=False
    )
    ray_device: str = option(
        "auto",
        "what each task on Ray has for itself; auto: a GPU where the cluster has any",
        choices=("auto", "gpu", "core"),
        decides=False,
    )
    calibration: float = option(
        30.0, "seconds for which --plan runs trials to predict the hours; 0: no prediction", low=0
    )


@options
class MeasuredModel:
    """What stage=evaluate measures."""

    model: str = option("", "stage=evaluate: a model by name, or several, comma-separated")
    dataset: str = option("builtin:glyphs", "stage=evaluate: name of the dataset")
    split: str = option("test", "split that networks are measured on", choices=SPLITS)


@options
class Prediction:
    """What stage=predict classifies, and when it abstains."""

    model: str = option("", "stage=predict: a model by name")
    images: str = option("", "images to classify: a folder, searched with its subfolders, or a file")
    held_out: str = option(
        "",
        "labelled images that the model was not trained on, a dataset by name, for the temperature; '': the "
        "one that stage=transfer fine-tuned it on; none",
    )
    splits: tuple[str, ...] = option(
        ("validation", "test"),
        "splits of held_out that are used; validation is left out where it was trained on",
        choices=SPLITS[1:],
        lengths=NOT_EMPTY,
    )
    abstain_below: float = option(
        0.5,
        "probability below which no class is answered",
        low=0,
        high=1,
        decides=False,
    )
    num_listed: int = option(3, "most probable classes of each image in predictions.csv", low=1)
    batch_size: int = option(256, "images per batch", low=1, decides=False)


@options
class Export:
    """What stage=export writes (see `models.export`)."""

    model: str = option("", "stage=export: a model by name")
    inputs: str = option(
        "uint8",
        "images that the file takes: uint8; float, in [0, 1]; or normalised with the model's mean and std",
        choices=INPUTS,
    )
    image_size: int = option(0, "pixels; 0: any, resized in the file", low=0)
    batch_size: int = option(0, "images per call; 0: any", low=0)
    temperature: float = option(
        0.0, "of the probabilities that the file gives, such as stage=predict finds; 0: logits", low=0
    )
    platforms: tuple[str, ...] = option(
        ("cpu", "cuda", "tpu"), "that the file runs on", choices=PLATFORMS, lengths=NOT_EMPTY
    )


@options
class Report:
    """What a report shows beside the rows."""

    title: str = option("Do robust sources transfer better?", "title of the page")
    remarks: tuple[str, ...] = option((), "remarks for the reader, such as how hyper-parameters were chosen")
    reference: str = option(
        "none",
        "paper: draw its published accuracies behind the figures (k = 3)",
        choices=("none", "paper"),
    )
    accuracy_unit: str = option(
        "auto",
        "unit of accuracies in stage=report's rows; auto: detected for each file",
        choices=("auto", "fraction", "percent"),
    )
    analyses: tuple[str, ...] = option(
        (), "stage=study: analyses of the sources that it trains", choices=ANALYSES
    )
    num_pictures: int = option(8, "source images to show with their adversarial examples, at most 8", low=0)


class Options(NamedTuple):
    """All options of a run, as values of the packages' types."""

    run: Run = Run()
    checkpoint: CheckpointOptions = CheckpointOptions()
    training_data: TrainingData = TrainingData()
    training: SourceRecipe = SourceRecipe()
    target: TargetData = TargetData()
    recipe: Recipe = Recipe()
    study: StudyNames = StudyNames()
    grid: Grid = Grid()
    search: Search = Search()
    measured: MeasuredModel = MeasuredModel()
    evaluation: Evaluation = Evaluation()
    curves: Curves = Curves()
    prediction: Prediction = Prediction()
    export: Export = Export()
    interpretation: Interpretation = Interpretation()
    report: Report = Report()


# Where the keys of each of `Options`' values are in the tree; "": at the top.
_SECTIONS = {
    "run": "",
    "checkpoint": "checkpoint.",
    "training_data": "train.",
    "training": "train.",
    "target": "transfer.",
    "recipe": "transfer.",
    "study": "study.",
    "grid": "study.",
    "search": "study.",
    "measured": "evaluate.",
    "evaluation": "evaluate.",
    "curves": "evaluate.",
    "prediction": "predict.",
    "export": "export.",
    "interpretation": "interpret.",
    "report": "report.",
}
# Sections that change what is computed or shown beside the results that a workdir holds, but not those.
_FREE_SECTIONS = ("interpret", "report", "study")


def default() -> ConfigDict:
    """The configuration that experiments start from."""
    tree: dict[str, Any] = {}
    for prefix, values in zip(_SECTIONS.values(), Options(), strict=True):
        (tree.setdefault(prefix[:-1], {}) if prefix else tree).update(to_dict(values))
    return ConfigDict(tree).lock()


def read(config: ConfigDict) -> Options:
    """The configuration as values, each checked.

    Raises:
      ConfigError: naming the first bad key, its value and the fix.
    """
    check_keys(config)
    places = zip(_SECTIONS.values(), Options(), strict=True)
    found = Options(
        *(_read(type(x), config[prefix[:-1]] if prefix else config, prefix) for prefix, x in places)
    )
    _check_together(found)
    return found


def _read(cls: type, node: ConfigDict, prefix: str) -> Any:
    values = {
        name: _read(type(usual), node[name], f"{prefix}{name}.")
        if isinstance(node[name], ConfigDict)
        else node[name]
        for name, usual in vars(cls()).items()
    }
    try:
        return cls(**values)
    except ValueError as error:
        raise ConfigError(f"config.{prefix}{error}") from None


def _check_together(found: Options) -> None:
    """Raises a ConfigError for keys of several types that exclude each other."""
    stage, target = found.run.stage, found.target
    if stage != "import" and found.checkpoint != CheckpointOptions():
        key = next(k for k, x in vars(found.checkpoint).items() if x != getattr(CheckpointOptions(), k))
        raise ConfigError(
            f"config.checkpoint.{key} is for config.stage=import: import the file first "
            "(--config=import_source), and name the workdir of the import"
        )
    if stage != "evaluate" and found.curves.is_asked:
        key = next(k for k, x in vars(found.curves).items() if x != getattr(Curves(), k))
        raise ConfigError(
            f"config.evaluate.{key} is for config.stage=evaluate: evaluate the model afterwards"
        )
    for key in ("choose_num_unfrozen_blocks", "num_folds"):
        if stage == "study" and getattr(target, key) != getattr(TargetData(), key):
            raise ConfigError(
                f"config.transfer.{key}={getattr(target, key)} is for config.stage=transfer: a study "
                "compares the numbers of config.study.num_unfrozen_blocks"
            )
    if target.choose_num_unfrozen_blocks != "given" and target.num_unfrozen_blocks:
        raise ConfigError(
            f"config.transfer.choose_num_unfrozen_blocks={target.choose_num_unfrozen_blocks} and "
            f"config.transfer.num_unfrozen_blocks={target.num_unfrozen_blocks} exclude each other: set one "
            "of them"
        )
    if found.run.seed + found.study.source_seeds > 2**32:
        raise ConfigError(
            f"config.study.source_seeds={found.study.source_seeds} from config.seed={found.run.seed} goes "
            "beyond the last seed, 4294967295: begin with a smaller one"
        )
    if found.grid.split != "test" and found.search.is_asked:
        raise ConfigError(
            "config.study.split=validation, but hyper-parameters are chosen on these images: report on test"
        )


def check_keys(config: ConfigDict) -> None:
    """Raises a ConfigError unless the configuration has exactly the keys that exist."""
    values, known = flatten(config), keys()
    for key in sorted(values.keys() - known.keys()):
        near = difflib.get_close_matches(key, known, n=2)
        hint = f": did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(f"config.{key} does not exist{hint}")
    if missing := [key for key in known if key not in values]:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ConfigError(
            f"the config has no {', '.join(missing[:3])}{more}: begin it with advtransfer.config.default()"
        )


def keys() -> dict[str, tuple[type, str]]:
    """The options class and the field of every key."""
    found = {}

    def visit(values: Any, prefix: str) -> None:
        for name, value in vars(values).items():
            if hasattr(type(value), "__dataclass_fields__"):
                visit(value, f"{prefix}{name}.")
            else:
                found[f"{prefix}{name}"] = type(values), name

    for prefix, values in zip(_SECTIONS.values(), Options(), strict=True):
        visit(values, prefix)
    return found


def explain(config: ConfigDict | None = None) -> str:
    """Every key with its meaning, its values and its default, a line each; and, if `config` has another value
    than the default, that."""
    usual = flatten(default())
    given = usual if config is None else flatten(config)
    return "\n".join(
        f"config.{key}: {fields.explain(*place)}" + f"; here {given[key]!r}" * (given[key] != usual[key])
        for key, place in sorted(keys().items())
    )


@contextmanager
def names_key(key: str) -> Generator[None]:
    """Makes a ValueError raised inside a ConfigError that names the key."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"config.{key}: {error}") from error


def flatten(tree: Mapping[str, Any] | ConfigDict) -> dict[str, Any]:
    """{"train.eps": 0.5, ...}."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict | ConfigDict):
            flat |= {f"{key}.{inner}": x for inner, x in flatten(value).items()}
        else:
            flat[key] = value
    return flat


def conflicts(settings: Mapping[str, Any], saved: str) -> list[str]:
    """Keys whose values in the saved JSON make its results another experiment's, as "key: saved, asked".

    Raises:
      ValueError: the text is not a JSON object.
    """
    tree = foreign.parse_json(saved)
    if not isinstance(tree, dict):
        raise ValueError("it is not a JSON object")
    old, new = flatten(tree), flatten(json.loads(json.dumps(settings)))
    known = {key: place for key, place in keys().items() if key.split(".")[0] not in _FREE_SECTIONS}
    if other := sorted({key for key in old if key.split(".")[0] not in _FREE_SECTIONS} ^ known.keys()):
        return [f"of another version of advtransfer: {other[0]} is a key of one of the two alone"]
    different = [
        f"{key}: {old[key]!r} there, {new[key]!r} now"
        for key, (cls, name) in sorted(known.items())
        if fields.find(cls, name).decides and old[key] != new[key]
    ]
    of_stages = [text for text in different if text.startswith("stage: ")]
    return of_stages or different


def set_source(config: ConfigDict, text: str) -> None:
    """Makes config.train train this source, and config.evaluate attack a robust one as in its training.

    Raises:
      ValueError: as `parse_source`.
    """
    config.train.norm, config.train.eps = parse_source(text)
    if config.train.eps:
        config.evaluate.norm, config.evaluate.eps = config.train.norm, config.train.eps


# ImageNet ResNet-50s: torchvision's first one, and those trained against ℓ2 ε = 3, ℓ∞ ε = 4/255 and 8/255.
_PAPER_SOURCES = (
    "hf:timm/resnet50.tv_in1k/model.safetensors",
    "hf:madrylab/robust-imagenet-models/resnet50_l2_eps3.ckpt",
    "hf:madrylab/robust-imagenet-models/resnet50_linf_eps4.0.ckpt",
    "hf:madrylab/robust-imagenet-models/resnet50_linf_eps8.0.ckpt",
)
_PAPER_TARGETS = ("cifar10", "cifar100", "svhn_cropped", "mnist", "fashion_mnist", "kmnist")


def set_paper_grid(config: ConfigDict) -> None:
    """Makes config.study the grid of Utrera et al., "Adversarially-trained deep nets transfer better" (ICLR
    2021): 14,400 models of 4 sources, 6 targets, 4 k, 5 n × 20 and 5 n × 10 seeds.

    What its code calls 6 blocks are the last nine. The paper gives the total alone, from which the number of
    seeds for each n is inferred; the seeds themselves are those of its code.
    """
    config.stage = "study"
    config.study.update(
        sources=",".join(_PAPER_SOURCES),
        targets=",".join(f"tfds:{name}" for name in _PAPER_TARGETS),
        num_train_images=(100, 200, 400, 800, 1600, 3200, 6400, 12800, 25600, -1),
        num_unfrozen_blocks=(0, 1, 3, 9),
        num_seeds=20,
        seeds=tuple(20_000_000 + 100_000 * i for i in range(20)),
        fewer_seeds=((3200, 10),),
    )
    config.transfer.update(num_epochs=150, evaluate_epochs=(1, 11, 21, 41, 81, 150), stratified=False)
    config.report.reference = "paper"
