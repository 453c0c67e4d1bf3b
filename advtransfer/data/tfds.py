"""Prepared TensorFlow Datasets, read without TensorFlow.

`tfds:NAME[/CONFIG][:VERSION][:TRAIN]` is looked up in `$TFDS_DATA_DIR` or `~/tensorflow_datasets`;
`tfds:/prepared/dir[:TRAIN]` (a path that begins with /, ~ or .) is the folder of a version, or one that
contains a single version. TRAIN selects the training images in TFDS's notation, such as `train[:10%]` or
`train+validation`; the default is `train`.
"""

from __future__ import annotations

import difflib
import functools
import io
import os
import re
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from advtransfer import foreign
from advtransfer.data.cache import fingerprint
from advtransfer.data.recorded import SPLITS, Recording, Records, check_training, split_name

_CHUNK = 1024  # records read at a time
_PREPARE = "pip install tensorflow && tfds"

Examples = Callable[[Iterable[SupportsIndex]], Iterator[Any]]


class NotPrepared(ValueError):
    """A dataset of TFDS that is not in the folder of prepared datasets."""

    def __init__(self, name: str, where: str, root: Path):
        self.name, self.root, self.base = name, root, _base(where)
        self.command = f"{_PREPARE} build {where} --file_format=array_record"
        super().__init__(f"{name} is not prepared; {_looked(root)}. To prepare it: {self.command}")


def open_tfds(name: str) -> Recording:
    """Opens a prepared dataset; its images are read later.

    Image and label are the dataset's supervised keys, or else the features `image` and `label`. A test split
    is used only if it is labelled.

    Raises:
      NotPrepared: the dataset is not prepared; `command` prepares it.
      ValueError: it is not stored as array_record, or is not a dataset of images with one label each.
    """
    where, train = split_name(name.removeprefix("tfds:"))
    builder = _find_folder(name, where) if where[:1] in ("/", "~", ".") else _find_named(name, where)
    folder = Path(builder.data_dir)
    formats = {file_format.value for file_format in builder.info.available_file_formats()}
    if "array_record" not in formats:
        raise ValueError(
            f"{name} is stored as {', '.join(formats)}, but only array_record is read without TensorFlow: "
            f"{_PREPARE} convert_format --dataset_version_dir={folder} --out_file_format=array_record"
        )
    image_key, label_key = _keys(name, builder.info)
    recorded = builder.info.splits
    known = [split for split in SPLITS if split in recorded and recorded[split].num_examples]
    if "test" in known:
        _, examples = _open_split(name, builder, "test")
        if next(examples([0]))[label_key].int64_list.value[0] < 0:  # as in competitions
            known.remove("test")
    if not known:
        raise ValueError(
            f"{name} has no labelled train, validation or test images, only {', '.join(recorded)}"
        )
    asked = {split: split for split in known}
    if train is not None:
        used = set(re.findall(r"[a-z]\w*", train))
        check_training(name, used, known)
        asked = {split: split for split in known if split not in used} | {"train": train}
    keys = image_key, label_key
    splits = {ours: _open_records(name, builder, theirs, keys) for ours, theirs in asked.items()}
    height, width = builder.info.features[image_key].shape[-3:-1]
    label = builder.info.features[label_key]
    if len(label.names) != label.num_classes:
        raise ValueError(
            f"{name} has {label.num_classes:,} classes and {len(label.names):,} names for them in {folder}: "
            "it is damaged or was only partly copied"
        )
    return Recording(
        name=name,
        class_names=tuple(label.names),
        splits=splits,
        identity={"files": fingerprint(folder, folder.iterdir()), "train": train},
        upright=False,  # as in TensorFlow, which ignores the EXIF orientation
        side=height if height == width else None,
    )


def _find_folder(name: str, where: str) -> Any:
    import tensorflow_datasets as tfds

    folder = Path(where).expanduser()
    found = [
        path.parent for depth in ("", "*/", "*/*/") for path in sorted(folder.glob(f"{depth}features.json"))
    ]
    if not found:
        raise ValueError(f"{name}: {folder} contains no prepared dataset (no features.json)")
    if len(found) > 1:
        raise ValueError(
            f"{name} contains several prepared datasets, choose one: {', '.join(map(str, found))}"
        )
    _check_features(name, found[0])
    with _one_line(f"{name}: {found[0]} is not a complete prepared dataset"):
        return tfds.builder_from_directory(found[0])


def _check_features(name: str, folder: Path) -> None:
    """Raises a ValueError for feature classes that are not TFDS's own: TFDS would import their modules."""
    path = folder / "features.json"

    def check(node: Any) -> None:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            if key == "pythonClassName" and not re.fullmatch(
                r"tensorflow_datasets\.core\.features\.[\w.]+", value
            ):
                raise ValueError(f"its feature {value!r} is not one of TFDS's own")
            if isinstance(value, dict | list):
                check(value)

    try:
        check(foreign.read_json(path))
    except (ValueError, TypeError, AttributeError, RecursionError, OSError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise ValueError(f"{name}: {path} is not a valid description of a dataset: {why}") from error


def _find_named(name: str, where: str) -> Any:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.read_only_builder import builder_from_files

    root, base = Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser(), _base(where)
    prepared = sorted(path.parent for path in (root / base).rglob("features.json"))
    for folder in prepared:
        _check_features(name, folder)
    try:
        return builder_from_files(where, data_dir=root)
    except (ValueError, tfds.core.DatasetNotFoundError):
        pass  # its message has many lines
    if prepared:
        others = ", ".join(str(folder.relative_to(root)) for folder in prepared)
        raise ValueError(f"{name} is not prepared, only {others}; {_looked(root)}")
    known = tfds.list_builders(with_community_datasets=False)
    if base in known:
        raise NotPrepared(name, where, root)
    known = {*known, *(path.parents[1].name for path in root.glob("*/*/features.json"))}
    near = [f"tfds:{other}" for other in difflib.get_close_matches(base, known, n=2)]
    hint = f"did you mean {' or '.join(near)}?" if near else "TFDS has no similar name"
    raise ValueError(f"unknown dataset {name!r}: {hint}; {_looked(root)}")


def _base(where: str) -> str:
    """The name without configuration and version."""
    return re.split("[/:]", where)[0]


def _looked(root: Path) -> str:
    return f"looked in {root} (set TFDS_DATA_DIR to look elsewhere)"


def _keys(name: str, info: Any) -> tuple[str, str]:
    """The names of the image and label features."""
    import tensorflow_datasets as tfds

    keys = info.supervised_keys if len(info.supervised_keys or ()) == 2 else ("image", "label")
    image, label = (dict(info.features.items()).get(key) for key in keys)
    if (
        not isinstance(image, tfds.features.Image)
        or image.np_dtype == np.float32
        or not isinstance(label, tfds.features.ClassLabel)
    ):
        features = ", ".join(sorted(info.features))
        raise ValueError(f"{name} is not a dataset of images with one label each; its features: {features}")
    return keys


@contextmanager
def _one_line(message: str) -> Generator[None]:
    """Makes one-line ValueErrors of TFDS's and array_record's errors for missing or damaged files."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{message}: {' '.join(str(error).split())}") from error


def _open_split(name: str, builder: Any, split: str) -> tuple[int, Examples]:
    """Number of examples of a split in TFDS's notation, and the undecoded examples by index."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.proto import tf_example_pb2

    with _one_line(f"cannot read {split} of {name}"):
        for shard in builder.info.splits[split].file_instructions:
            Path(shard.filename).stat()
        source = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        count = len(source)
    if count < 1:
        raise ValueError(f"{split} of {name} is empty")
    lock = threading.Lock()

    def examples(indices: Iterable[SupportsIndex]) -> Iterator[Any]:
        # The readers are not thread-safe.
        with lock, _one_line(f"cannot read {split} of {name}"):
            serialized = source.__getitems__([int(index) for index in indices])
        parse = tf_example_pb2.Example.FromString  # ty: ignore[missing-attribute]  # made when imported
        return (parse(record).features.feature for record in serialized)

    return count, examples


def _open_records(name: str, builder: Any, split: str, keys: tuple[str, str]) -> Records:
    count, examples = _open_split(name, builder, split)
    label_key, where = keys[1], f"{split} of {name}"
    num_classes = builder.info.features[label_key].num_classes

    def labels() -> np.ndarray:
        chunks = (range(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK))
        found = (example[label_key].int64_list.value[0] for chunk in chunks for example in examples(chunk))
        values = np.fromiter(found, np.int64, count)
        if values.min() < 0:
            raise ValueError(f"{(values < 0).sum():,} images of {where} have no label")
        if values.max() >= num_classes:
            raise ValueError(_beyond(where, values[values >= num_classes][0], num_classes))
        return values.astype(np.int32)

    read = _Reader(name, builder.data_dir, split, *keys)
    return Records(count, functools.cache(labels), read, lambda index: f"{split}[{index}]")


def _beyond(where: str, label: int, num_classes: int) -> str:
    return f"{where} has the label {label}; its {num_classes:,} classes are labelled 0 to {num_classes - 1}"


class _Reader:
    """Encoded images and labels by index; a copy in another process opens the files again."""

    def __init__(self, *where: str):
        self._where = where  # name, folder, split, keys of the image and of the label

    def __reduce__(self):
        return _Reader, self._where

    @functools.cached_property
    def _opened(self) -> tuple[Examples, int]:
        """The examples by index, and the number of classes."""
        import tensorflow_datasets as tfds

        name, folder, split, _, label_key = self._where
        builder = tfds.builder_from_directory(folder)
        return _open_split(name, builder, split)[1], builder.info.features[label_key].num_classes

    def __call__(self, indices: Iterable[SupportsIndex]) -> list[tuple[io.BytesIO, int]]:
        name, _, split, image_key, label_key = self._where
        (examples, num_classes), found = self._opened, []
        for example in examples(indices):
            label = example[label_key].int64_list.value[0]
            if not 0 <= label < num_classes:
                raise ValueError(_beyond(f"{split} of {name}", label, num_classes))
            found.append((io.BytesIO(example[image_key].bytes_list.value[0]), label))
        return found
