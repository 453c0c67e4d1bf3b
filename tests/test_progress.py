"""The log of a training that is resumed."""

import json

import pytest

from advtransfer import parallel, progress
from advtransfer.progress import RunLog, progress_bar


def _steps(folder):
    return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_every_step_stands_once_however_often_a_run_was_killed(tmp_path):
    with RunLog(tmp_path, first_step=0) as log:
        for step in (2, 4, 6):
            log(step, {"loss": 1.0 / step})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # as a killed process leaves it
    with RunLog(tmp_path, first_step=4) as log:  # its last checkpoint
        assert _steps(tmp_path) == [2, 4]
        log(6, {"loss": 0.5})
    assert _steps(tmp_path) == [2, 4, 6]
    assert list(tmp_path.glob("events.out.tfevents.*"))


@pytest.mark.parametrize(
    ("items", "options", "total"),
    [(range(5), {}, 5), (range(5), {"done": 2}, 7), (iter(range(5)), {"total": 9, "done": 3}, 9)],
)
def test_a_bar_counts_what_was_done_before_and_is_drawn_by_one_process(items, options, total, monkeypatch):
    asked = []
    monkeypatch.setattr(progress, "tqdm", lambda items, **kwargs: asked.append(kwargs) or items)
    assert list(progress_bar(items, "train", "steps", **options)) == list(range(5))
    monkeypatch.setattr(parallel, "is_main_process", lambda: False)
    assert list(progress_bar([1], "train", "steps")) == [1]
    assert (asked[0]["total"], asked[0]["initial"]) == (total, options.get("done", 0))
    assert [kwargs["disable"] for kwargs in asked] == [False, True]


def test_events_have_the_scalars_of_the_log_and_forget_what_was_interrupted(tmp_path, monkeypatch):
    events = []

    class Writer:
        def __init__(self, folder, *, purge_step):
            events.append((folder, purge_step))

        def add_scalar(self, *scalar):
            events.append(scalar)

        def close(self):
            events.append("closed")

    monkeypatch.setattr("tensorboardX.SummaryWriter", Writer)
    with RunLog(tmp_path, first_step=4) as log:
        log(6, {"loss": 0.5, "accuracy": 0.25})
    assert events == [(str(tmp_path), 5), ("loss", 0.5, 6), ("accuracy", 0.25, 6), "closed"]
    monkeypatch.setattr(parallel, "is_main_process", lambda: False)
    with RunLog(tmp_path / "other", first_step=0) as log:
        log(1, {"loss": 0.5})
    assert len(events) == 4 and not (tmp_path / "other").exists()
