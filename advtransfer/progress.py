"""What a long run says while it works: a progress bar with an ETA, JSON lines, TensorBoard."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from tensorboardX import SummaryWriter
from tqdm import tqdm

from advtransfer import parallel


def progress_bar(items: Iterable, description: str, unit: str, *, done: int = 0) -> Iterator:
    """Iterates over `items` and draws a bar with an ETA; `done` items were done before."""
    total = done + len(items)
    yield from tqdm(
        items,
        desc=f"{description:<24}",
        unit=f" {unit}",
        total=total,
        initial=done,
        dynamic_ncols=True,
        disable=not parallel.is_main_process(),
    )


class RunLog:
    """Scalars of a training run, in `log.jsonl` and as TensorBoard events, in one folder, by process 0.

    A run that resumes at `first_step` drops what an interrupted one logged after it, so every step
    stands once.
    """

    def __init__(self, folder: str | Path, *, first_step: int):
        self._events = None
        if not parallel.is_main_process():
            return
        self._lines = Path(folder) / "log.jsonl"
        self._lines.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in _read_lines(self._lines) if line["step"] <= first_step]
        partial = self._lines.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(partial, self._lines)
        self._events = SummaryWriter(str(folder), purge_step=first_step + 1)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._events:
            self._events.close()

    def __call__(self, step: int, scalars: dict[str, float]) -> None:
        """Appends one line, {"step": ..., **scalars}."""
        if not self._events:
            return
        with self._lines.open("a") as file:
            file.write(json.dumps({"step": step, **scalars}) + "\n")
        for name, value in scalars.items():
            self._events.add_scalar(name, value, step)


def _read_lines(path: Path) -> list[dict]:
    """The complete lines of a JSON-lines file; a killed process may have left half a line."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
