"""The log of a training that is resumed."""

import json

from advtransfer.progress import RunLog


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
