"""Where results lie: folders of this machine, and gs:// and s3:// addresses, written whole or not at all.

Here, and nowhere else, it is decided how a name becomes a path and how a file, a folder or a tree of arrays
gets there. A local file is written beside its place and renamed. An object store has no rename, but an object
is there as a whole or not at all: a file is one object, and of a folder the file that tells that it is
complete goes last. Orbax writes to local folders; for an address it is given a temporary one.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import logging
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Generator
from pathlib import Path
from typing import TypeGuard

import fsspec.config
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import PyTree

from advtransfer import parallel
from advtransfer.foreign import AnyPath, inside

_PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}  # that fsspec needs for each kind of address


class SaveError(OSError):
    """A file of a run could not be written, because the disk is full, say."""


def to_path(name: str | os.PathLike[str]) -> AnyPath:
    """The path that a name means: a local one, or that of an address.

    Raises:
      ValueError: an address of another kind, without a bucket, or whose package is not installed; a ~USER
        that there is not.
    """
    scheme, separator, place = os.fspath(name).partition("://")
    if not separator:
        return Path(name).expanduser()
    if scheme not in _PACKAGES or not place.strip("/"):
        raise ValueError(f"{name}: an address is gs://BUCKET/PATH or s3://BUCKET/PATH")
    package = _PACKAGES[scheme]
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{name}: {scheme}:// addresses need {package}: pip install {package}")
    # TensorFlow, where it happens to be installed, would be asked instead, and knows no s3://.
    os.environ.setdefault("EPATH_USE_TF", "false")
    # gcsfs would ask Google's control plane what kind of bucket it is, which needs a permission of its own.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    for logger in ("gcsfs", "google.auth"):  # what they log in pages is raised as well
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    # Other processes write too: a listing that is remembered would not show it.
    for protocol in ("gs", "gcs", "s3"):
        fsspec.config.conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)
    return epath.Path(name)


def is_address(path: AnyPath) -> TypeGuard[epath.Path]:
    """Whether a path lies in an object store."""
    return "://" in os.fspath(path)


def reason(error: Exception) -> str:
    """What is wrong, in one line, out of an exception of Orbax, TensorStore, a client or the system."""
    if isinstance(error, OSError) and (error.strerror or str(error)):
        return (error.strerror or str(error)).splitlines()[0]
    return f"{type(error).__name__}: {error}".splitlines()[0]


def check_writable(folder: AnyPath) -> None:
    """Writes and deletes a file in `folder`, or in the nearest folder above that exists.

    Permissions alone do not tell: root has them all, a mount may be read-only, a disk full, a bucket missing.

    Raises:
      ValueError: `folder` cannot be written.
    """
    if not is_address(folder):
        parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        try:
            with tempfile.TemporaryFile(dir=parent, buffering=0) as probe:
                probe.write(bytes(4096))
        except OSError as error:
            raise ValueError(f"{parent}: {error.strerror}") from error
        return
    probe = folder / f".probe{uuid.uuid4().hex}"
    try:
        probe.write_bytes(bytes(4096))
        probe.unlink()
    except Exception as error:  # the clients of the stores each raise their own
        raise ValueError(reason(error)) from error


def check_ours(folder: AnyPath, *markers: str) -> None:
    """Raises a ValueError if `folder` holds anything, but none of the files that mark what we may replace."""
    if not folder.exists() or any((folder / marker).exists() for marker in markers):
        return
    if others := sorted(path.name for path in folder.iterdir() if path.name[0] != "."):
        more = ", ..." if len(others) > 3 else ""
        raise ValueError(
            f"{folder} holds files that advtransfer did not write ({', '.join(others[:3])}{more}): "
            "choose another, or an empty folder"
        )


def is_file(path: AnyPath) -> bool:
    """Whether there is a file at `path`.

    Raises:
      ValueError: the object store cannot be asked.
    """
    with reading(path):
        return path.is_file()


@contextlib.contextmanager
def reading(path: AnyPath) -> Generator[None]:
    """Makes one ValueError of whatever the client of an object store raises inside."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        if not is_address(path):
            raise
        raise ValueError(f"{path} cannot be read: {reason(error)}") from error


def make_folder(folder: AnyPath) -> None:
    """Makes a folder and those above it; object stores have none, and need none."""
    if not is_address(folder):
        folder.mkdir(parents=True, exist_ok=True)


def write(path: AnyPath, content: str | bytes) -> None:
    """Writes a file whole or not at all, in a folder that exists.

    Raises:
      SaveError: the object store did not take it. A local file raises OSError as ever.
    """
    data = content.encode() if isinstance(content, str) else content
    if is_address(path):
        with _says_what_is_wrong(path):
            path.write_bytes(data)
        return
    # A name of its own: processes in several containers may have the same number.
    partial = path.with_name(f".{path.name[:200]}.{uuid.uuid4().hex}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def remove(path: AnyPath) -> None:
    """Deletes a folder and all that is in it, if it is there; of an address, a file too."""
    if is_address(path):
        with _says_what_is_wrong(path), contextlib.suppress(FileNotFoundError):
            path.rmtree()
    else:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def new_folder(folder: AnyPath, *, last: str) -> Generator[Path]:
    """A local folder to fill, which at the end takes the place of `folder`; after an exception it does not.

    Args:
      folder: where it goes; what is there is replaced.
      last: the file in it without which an address does not count as complete.
    """
    if is_address(folder):
        with tempfile.TemporaryDirectory() as new:
            yield Path(new)
            remove(folder / last)
            remove(folder)
            content = (Path(new) / last).read_bytes()
            (Path(new) / last).unlink()
            upload(Path(new), folder)
            write(folder / last, content)
        return
    recover(folder)
    folder = Path(folder)
    name = uuid.uuid4().hex
    new, old = (folder.with_name(f".{folder.name}.{name}.{word}") for word in ("new", "old"))
    new.mkdir(parents=True)
    try:
        yield new
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def recover(folder: AnyPath) -> None:
    """Puts a folder back that a process put aside and was killed before the new one took its place; where the
    new one is there, what was put aside is deleted."""
    if is_address(folder) or not folder.parent.is_dir():
        return
    for old in sorted(folder.parent.glob(f".{glob.escape(folder.name)}.*.old")):
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):  # another process was quicker
                os.replace(old, folder)
        shutil.rmtree(old.with_suffix(".new"), ignore_errors=True)


def save_tree(folder: AnyPath, tree: PyTree) -> None:
    """Writes a pytree of arrays by Orbax as `folder`, which must not exist; this process alone does."""
    if is_address(folder):
        with tempfile.TemporaryDirectory() as staged:
            save_tree(Path(staged) / "tree", tree)
            upload(Path(staged) / "tree", folder)
        return
    if parallel.num_processes() == 1:
        with _plain(folder) as place, _checkpointer() as checkpointer:
            checkpointer.save(place, tree)
        return
    # Orbax leaves out a NumPy array on every process but the first, and refuses arrays of local devices only;
    # of an array on all devices this handler writes the copy that the process has. It must not be an
    # asynchronous checkpointer: those of two processes take each other's signals, and wait for ever.
    handler = ocp.type_handlers.ArrayHandler(
        primary_host=parallel.process(),
        replica_id=None,
        use_replica_parallel=False,
        enable_write_sharding_file=False,
    )
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, handler))
    alone = _this_process_alone()
    writer = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, multiprocessing_options=alone)
    with _plain(folder) as place, ocp.Checkpointer(writer, multiprocessing_options=alone) as checkpointer:
        checkpointer.save(place, ocp.args.PyTreeSave(parallel.replicate_globally(tree)))


def load_tree(folder: AnyPath, template: PyTree = None) -> PyTree:
    """The host arrays that `save_tree` wrote; those of `template`, where one is given."""
    if is_address(folder):
        with tempfile.TemporaryDirectory() as fetched:
            download(folder, Path(fetched))
            return load_tree(Path(fetched), template)
    template = tree_shapes(folder) if template is None else template
    template = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), template)
    with _plain(folder) as place, _checkpointer() as checkpointer:
        return checkpointer.restore(place, template)


def tree_shapes(folder: AnyPath) -> PyTree:
    """The arrays that `save_tree` wrote as a tree of `jax.ShapeDtypeStruct`; none of them is read."""
    if is_address(folder):
        with tempfile.TemporaryDirectory() as fetched:
            download(folder, Path(fetched))
            return tree_shapes(Path(fetched))
    with _plain(folder) as place, _checkpointer() as checkpointer:
        stored = checkpointer.metadata(place).item_metadata.tree
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), stored)


@contextlib.contextmanager
def _plain(folder: AnyPath) -> Generator[Path]:
    """The path under which Orbax is given a local folder: TensorStore cannot read back what it wrote below
    names with brackets and the like, so these are reached by a link."""
    folder = Path(folder).absolute()
    if not re.search(r"[^\w/.,=+@~ -]", str(folder)):
        yield folder
        return
    with tempfile.TemporaryDirectory() as links:
        link = Path(links) / "folder"
        link.symlink_to(folder.parent, target_is_directory=True)
        yield link / folder.name


def upload(folder: Path, address: AnyPath) -> None:
    """Copies what is in a local folder to an address, file by file."""
    with _says_what_is_wrong(address):
        system, place = fsspec.url_to_fs(str(address))
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            system.put_file(str(file), f"{place}/{file.relative_to(folder).as_posix()}")


def download(address: epath.Path, folder: Path) -> None:
    """Copies what is under an address into a local folder that exists.

    Raises:
      ValueError: the name of an object leads out of the folder.
    """
    system, place = fsspec.url_to_fs(str(address))
    names = system.find(place)
    if not names:
        raise FileNotFoundError(f"nothing is at {address}")
    files = [inside(folder, name.removeprefix(f"{place}/")) for name in names]
    for name, file in zip(names, files, strict=True):
        file.parent.mkdir(parents=True, exist_ok=True)
        system.get_file(name, str(file))


@contextlib.contextmanager
def _says_what_is_wrong(path: AnyPath) -> Generator[None]:
    try:
        yield
    except SaveError:
        raise
    except Exception as error:  # the clients of the stores each raise their own
        raise SaveError(f"{path} cannot be written: {reason(error)}") from error


def _checkpointer() -> ocp.StandardCheckpointer:
    return ocp.StandardCheckpointer(multiprocessing_options=_this_process_alone())


def _this_process_alone() -> ocp.options.MultiprocessingOptions:
    """Of several processes, each writes and reads something else."""
    process = parallel.process()
    return ocp.options.MultiprocessingOptions(
        primary_host=process, active_processes={process}, barrier_sync_key_prefix=f"process {process}"
    )
