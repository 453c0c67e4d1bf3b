"""What a long run says while it works: a progress bar with an ETA, JSON lines, TensorBoard."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from typing import Any

from tqdm import tqdm

from advtransfer import foreign, parallel, storage


def progress_bar(
    items: Iterable, description: str, unit: str, *, done: int = 0, total: int | None = None
) -> Iterator:
    """Iterates over `items` and draws a bar with an ETA; `done` items were done before. For items without a
    length `total` gives it. What their method `status` says, if they have one, stands behind the bar."""
    if total is None and isinstance(items, Sized):
        total = done + len(items)
    bar = tqdm(
        items,
        desc=f"{description:<24}",
        unit=f" {unit}",
        total=total,
        initial=done,
        dynamic_ncols=True,
        disable=not parallel.is_main_process(),
    )
    status = getattr(items, "status", None)
    for item in bar:
        if callable(status):
            bar.set_postfix_str(status())
        yield item


class RunLog:
    """Scalars of a training run, in `log.jsonl` and as TensorBoard events, in one folder, by process 0.

    A run that resumes at `first_step` drops what an interrupted one logged after it, so every step
    appears once. Object stores cannot append: there `log.jsonl` is rewritten with every line, and the
    events are written when the run ends, unless it is killed.
    """

    def __init__(self, folder: str | os.PathLike[str], *, first_step: int):
        self._events: Any = None  # a SummaryWriter
        self._staged = None
        if not parallel.is_main_process():
            return
        self._folder = storage.to_path(folder)
        self._path = self._folder / "log.jsonl"
        from tensorboardX import SummaryWriter  # it imports PyTorch and clients of clouds where they are

        storage.make_folder(self._folder)
        self._lines = [line for line in _read_lines(self._path) if line["step"] <= first_step]
        self._write()
        if storage.is_address(self._folder):
            self._staged = tempfile.TemporaryDirectory()
            self._events = SummaryWriter(self._staged.name)
            for line in self._lines:
                self._show(line)
        else:
            self._events = SummaryWriter(str(folder), purge_step=first_step + 1)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._events:
            self._events.close()
        if self._staged:
            for old in self._folder.glob("events.out.tfevents.*"):
                storage.remove(old)
            storage.upload(Path(self._staged.name), self._folder)
            self._staged.cleanup()

    def __call__(self, step: int, scalars: dict[str, float]) -> None:
        """Adds one line, {"step": ..., **scalars}."""
        if not self._events:
            return
        line = {"step": step, **scalars}
        if self._staged:
            self._lines.append(line)
            self._write()
        else:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        self._show(line)

    def _write(self) -> None:
        storage.write(self._path, "".join(json.dumps(line) + "\n" for line in self._lines))

    def _show(self, line: dict[str, float]) -> None:
        for name, value in line.items():
            if name != "step":
                self._events.add_scalar(name, value, line["step"])


def _read_lines(path: foreign.AnyPath) -> list[dict]:
    """The complete lines of a JSON-lines file; a killed process may have left half a line."""
    if not path.exists():
        return []
    lines = []
    for text in foreign.read_bytes(path).decode().splitlines():
        try:
            lines.append(foreign.parse_json(text))
        except ValueError:
            break
    return lines
