"""Rows on disk: what is read, what is coerced, what is refused and with which words."""

import csv
import json
import math
import sys

import pytest

from advtransfer.report import COLUMNS, read_rows, write_rows


def make_row(**changes):
    row = {
        "source": "natural",
        "source_norm": "none",
        "source_eps": 0.0,
        "target": "builtin:digits",
        "num_train_images": 10,
        "num_unfrozen_blocks": 0,
        "seed": 0,
        "epoch": 1,
        "train_accuracy": 1.0,
        "train_loss": 0.1,
        "test_accuracy": 1 / 3,
        "test_loss": 0.2,
        "seconds": 0.3,
        "trial_id": "a",
        "config": '{"lr": 0.1}',
    }
    return row | changes


def refusal(path) -> str:
    with pytest.raises(ValueError) as caught:
        read_rows(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_rows_survive_the_disk(tmp_path, suffix):
    rows = [make_row(), make_row(seed=1, num_unfrozen_blocks=-1, test_accuracy=0.1 + 0.2)]
    path = write_rows(rows, str(tmp_path / "deep" / f"rows.{suffix}"))
    assert read_rows(path) == rows
    write_rows([row | {"note": "x"} for row in rows], path)  # columns of one's own come after the others
    assert [list(row) for row in read_rows(path)] == [[*COLUMNS, "note"]] * 2
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # no temporary stays


def test_parquet_is_read_like_the_rest(tmp_path):
    pyarrow, parquet = map(pytest.importorskip, ("pyarrow", "pyarrow.parquet"))
    rows = [make_row(), make_row(seed=1, test_accuracy=None)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    read = read_rows(tmp_path)
    assert read[0] == rows[0]
    assert math.isnan(read[1]["test_accuracy"])
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 but not really")
    assert "not a Parquet file" in refusal(tmp_path / "rows.parquet")


def test_parquet_without_pyarrow_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    assert "pip install pyarrow" in refusal(tmp_path / "rows.parquet")


def test_missing_cells_are_nan_and_numpy_scalars_are_written(tmp_path):
    import numpy as np

    row = make_row(test_accuracy=np.float32(0.5), test_loss=math.nan, seconds=None)
    for name in ("rows.csv", "rows.jsonl"):
        [read] = read_rows(write_rows([row], tmp_path / name))
        assert read["test_accuracy"] == 0.5
        assert math.isnan(read["test_loss"]) and math.isnan(read["seconds"])
    json.loads((tmp_path / "rows.jsonl").read_text())  # NaN would be no JSON
    assert (tmp_path / "rows.csv").read_text().splitlines()[0] == ",".join(COLUMNS)


def test_other_writers_columns_and_spellings(tmp_path):
    names = [*COLUMNS[:11], "note"]
    values = [
        {**make_row(), "source_norm": "", "source_eps": "", "seed": "3.0", "note": "x"},
        {
            **make_row(),
            "source": "r",
            "source_norm": "L2",
            "source_eps": "3",
            "seed": 3,
            "note": "",
        },
    ]
    with open(tmp_path / "theirs.csv", "w", newline="", encoding="utf-8-sig") as stream:
        writer = csv.DictWriter(stream, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(values)
    natural, robust = read_rows(tmp_path)
    assert (natural["source_norm"], natural["seed"], natural["trial_id"]) == ("none", 3, "")
    assert (robust["source_norm"], robust["source_eps"], robust["note"]) == ("l2", 3.0, "")


def test_last_of_a_repeated_trial_and_epoch_wins(tmp_path, caplog):
    rows = [make_row(test_accuracy=0.1), make_row(epoch=2), make_row(test_accuracy=0.2)]
    with caplog.at_level("INFO"):
        read = read_rows(write_rows(rows, tmp_path / "rows.jsonl"))
    assert [(row["epoch"], row["test_accuracy"]) for row in read] == [(1, 0.2), (2, 1 / 3)]
    assert "1 duplicate" in caplog.text
    # A writer that numbers its trials anew in every cell loses nothing.
    rows = [make_row(trial_id="0"), make_row(trial_id="0", num_train_images=20)]
    assert len(read_rows(write_rows(rows, tmp_path / "rows.jsonl"))) == 2


def test_a_folder_is_read_to_the_bottom_and_other_files_are_passed_over(tmp_path):
    write_rows([make_row(seed=0)], tmp_path / "rows" / "a.jsonl")
    write_rows([make_row(seed=1)], tmp_path / "rows" / "deep" / "b.jsonl")
    write_rows([make_row(seed=0), make_row(seed=1)], tmp_path / "rows.csv")  # the merged copy
    (tmp_path / "train_log.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / ".rows.jsonl").write_text("hidden")
    few = dict(list(make_row().items())[:5])
    (tmp_path / "few.jsonl").write_text(json.dumps(few))  # under half of the columns: not meant to be rows
    assert sorted(row["seed"] for row in read_rows(tmp_path)) == [0, 1]
    (tmp_path / "few.jsonl").write_text(json.dumps(few | {"seed": 1}))
    assert "few.jsonl:1: columns missing: num_unfrozen_blocks, epoch" in refusal(tmp_path)


def test_refusals_name_the_place_in_one_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert "no such file" in refusal(str(path))
    assert "no rows found" in refusal(tmp_path)

    short = {k: v for k, v in make_row().items() if k not in ("seed", "test_accuracy")}
    path.write_text(json.dumps(short))
    assert "rows.jsonl:1: columns missing: seed, test_accuracy" in refusal(path)
    assert "columns missing: seed, test_accuracy" in refusal(tmp_path)

    good = json.dumps(make_row())
    path.write_text(f"{good}\n{good[:40]}\n")
    assert "rows.jsonl:2: not a line of JSON" in refusal(path)
    path.write_text(f"{good}\n\n[1]\n")
    assert "rows.jsonl:3" in refusal(path)

    table = tmp_path / "rows.csv"
    write_rows([make_row()], table)
    table.write_text(table.read_text() + "\n")
    assert len(read_rows(table)) == 1
    write_rows([make_row()], table)
    table.write_text(table.read_text() + "natural,none,0\n")
    assert "rows.csv:3: 3 cells under 15 columns" in refusal(table)
    table.write_text("source,target\n")
    assert "holds no rows" in refusal(table)
    (tmp_path / "rows.txt").write_text("x")
    assert ".jsonl, .csv, .parquet" in refusal(tmp_path / "rows.txt")


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("test_accuracy", 71.3, "fractions in [0, 1]"),
        ("num_unfrozen_blocks", 1.5, "whole number"),
        ("seed", None, "is empty"),
        ("epoch", "nan", "whole number"),
        ("epoch", None, "is empty"),
        ("num_train_images", 0, "at least 1"),
        ("source", "", "is empty"),
        ("train_loss", "low", "could not convert"),
    ],
)
def test_wrong_values_are_refused_by_name(tmp_path, column, value, words):
    path = write_rows([make_row(), make_row(**{column: value})], tmp_path / "rows.jsonl")
    message = refusal(path)
    assert f"rows.jsonl:2: {column} = {value!r}" in message and words in message


def test_rows_are_written_as_csv_or_jsonl_only(tmp_path):
    with pytest.raises(ValueError, match=r"\.csv or \.jsonl"):
        write_rows([make_row()], tmp_path / "rows.xlsx")
