"""A workdir: the folder of one config's results."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from advtransfer import parallel
from advtransfer.config import ConfigError, conflicts, to_json
from advtransfer.models import package_versions


def check_workdir(config: ConfigDict, workdir: Path) -> None:
    """Raises a ConfigError if `workdir` holds another config's results or cannot be written."""
    saved = workdir / "config.json"
    if saved.exists():
        try:
            different = conflicts(config, saved.read_text())
        except ValueError as error:
            raise ConfigError(f"{saved} is not a configuration ({error}): mend or delete it") from error
        if different:
            raise ConfigError(
                f"--workdir={workdir} holds the results of another config ({'; '.join(different)}): "
                "choose another --workdir, or go back to that config"
            )
    parent = next(p for p in (workdir, *workdir.absolute().parents) if p.exists())
    try:
        # Permissions alone do not tell: root has them all, a mount may be read-only, a disk full.
        with tempfile.TemporaryFile(dir=parent, buffering=0) as probe:
            probe.write(bytes(4096))
    except OSError as error:
        raise ConfigError(f"--workdir={workdir} cannot be written: {parent}: {error.strerror}") from error


def open_workdir(config: ConfigDict, workdir: Path) -> None:
    """Checks the workdir, makes it, and leaves `config.json` in it."""
    check_workdir(config, workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / "config.json", json.loads(to_json(config)))


def write_json(path: Path, value: Any) -> None:
    """Writes JSON whole or not at all; process 0 does."""
    if not parallel.is_main_process():
        return
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    os.replace(partial, path)


def versions() -> dict[str, str]:
    """Of the packages that results depend on, and the kind of device."""
    return package_versions() | {"device": jax.devices()[0].device_kind}
