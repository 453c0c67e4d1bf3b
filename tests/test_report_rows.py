"""Rows on disk, ours and others’: what is read, coerced, left out or refused, and in which words."""

import csv
import json
import math
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from etils import epath

from advtransfer import config as base
from advtransfer import tasks
from advtransfer.report import COLUMNS, read_foreign_rows, read_rows, write_report, write_rows


def make_row(**changes):
    values = (
        "natural",
        "none",
        0.0,
        "builtin:digits",
        10,
        0,
        0,
        1,
        1.0,
        0.1,
        1 / 3,
        0.2,
        0.3,
        0,
        "a",
        '{"lr": 0.1}',
    )
    return dict(zip(COLUMNS, values, strict=True)) | changes


def foreign(tmp_path, rows, names=(*COLUMNS[:11], "note")):
    """A file of somebody else's, without the columns that need not be there."""
    path = tmp_path / "foreign.csv"
    with open(path, "w", newline="", encoding="utf-8-sig") as stream:
        writer = csv.DictWriter(stream, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def refusal(path) -> str:
    with pytest.raises(ValueError) as caught:
        read_rows(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Files and folders.


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_rows_survive_the_disk(tmp_path, suffix):
    rows = [make_row(), make_row(seed=1, num_unfrozen_blocks=-1, test_accuracy=0.1 + 0.2)]
    path = write_rows(rows, str(tmp_path / "deep" / f"rows.{suffix}"))
    assert read_rows(path) == rows
    write_rows([row | {"note": "x"} for row in rows], path)  # columns of one's own come after the others
    assert [list(row) for row in read_rows(path)] == [[*COLUMNS, "note"]] * 2
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # no temporary stays
    with pytest.raises(ValueError, match=r"\.csv or \.jsonl"):
        write_rows(rows, tmp_path / "rows.xlsx")


def test_missing_cells_are_nan_and_numpy_scalars_are_written(tmp_path):
    row = make_row(test_accuracy=np.float32(0.5), test_loss=math.nan, seconds=None)
    for name in ("rows.csv", "rows.jsonl"):
        [read] = read_rows(write_rows([row], tmp_path / name))
        assert read["test_accuracy"] == 0.5
        assert math.isnan(read["test_loss"]) and math.isnan(read["seconds"])
    json.loads((tmp_path / "rows.jsonl").read_text())  # NaN would not be JSON
    assert (tmp_path / "rows.csv").read_text().splitlines()[0] == ",".join(COLUMNS)


def test_parquet_is_read_like_the_rest_and_bounded_before_it_is_read(tmp_path, monkeypatch):
    pyarrow, parquet = map(pytest.importorskip, ("pyarrow", "pyarrow.parquet"))
    path = tmp_path / "rows.parquet"
    rows = [make_row(big="x"), make_row(seed=2**53 + 1, test_accuracy=None, big="y")]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    first, second = read_rows(tmp_path)
    assert first == make_row()  # other columns are not even read
    assert second["seed"] == 2**53 + 1 and math.isnan(second["test_accuracy"])
    bucket = Bucket({})
    (bucket / "rows.parquet").write_bytes(path.read_bytes())
    assert read_rows(bucket)[0] == make_row()
    monkeypatch.setattr("advtransfer.report.rows.MAX_ROWS", 1)
    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", None)  # not even begun
    assert "rows.parquet: cannot be read (2 rows, more than 1)" in refusal(path)
    path.write_bytes(b"PAR1 but not really")
    assert "not a Parquet file" in refusal(path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert "pip install pyarrow" in refusal(path)
    path = write_rows([make_row(), make_row(seed=1)], tmp_path / "rows.csv")
    with pytest.raises(ValueError, match=r"rows.csv:3: more than 1 rows"):
        read_rows(path)


def test_last_of_a_repeated_trial_and_epoch_wins(tmp_path, caplog):
    rows = [make_row(test_accuracy=0.1), make_row(epoch=2), make_row(test_accuracy=0.2)]
    with caplog.at_level("INFO"):
        read = read_rows(write_rows(rows, tmp_path / "rows.jsonl"))
    assert {row["epoch"]: row["test_accuracy"] for row in read} == {1: 0.2, 2: 1 / 3} and len(read) == 2
    assert "1 duplicate row dropped" in caplog.text
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


def test_odd_files_among_rows_are_passed_over(tmp_path):
    write_rows([make_row()], tmp_path / "good.csv")
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "dangling.csv").symlink_to("/nowhere")
    (tmp_path / "up").symlink_to(tmp_path)
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)) * 100)
    (tmp_path / "binary.jsonl").write_bytes(bytes(range(256)) * 100)
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    assert read_rows(tmp_path) == [make_row()]
    for name in ("pipe.csv", "dangling.csv"):
        with pytest.raises(ValueError, match="neither a regular file nor a folder|no such file"):
            read_rows(tmp_path / name)


class Bucket:
    """A folder of an object store: no more than pathlib's and etils' paths share, and no renaming."""

    __class__ = epath.Path

    def __init__(self, store, parts=()):
        self.store, self.parts = store, parts

    def __truediv__(self, name):
        return Bucket(self.store, (*self.parts, *name.split("/")))

    def __str__(self):
        return "bucket://" + "/".join(self.parts)

    name = property(lambda self: self.parts[-1] if self.parts else "")
    suffix = property(lambda self: "." + self.name.rpartition(".")[2] if "." in self.name else "")
    parent = property(lambda self: Bucket(self.store, self.parts[:-1]))

    def mkdir(self, parents=False, exist_ok=False):
        assert parents and exist_ok

    def is_file(self):
        return self.parts in self.store

    def is_dir(self):
        return any(key[: len(self.parts)] == self.parts for key in self.store if key != self.parts)

    def exists(self):
        return self.is_file() or self.is_dir()

    def iterdir(self):
        depth = len(self.parts)
        below = {key[: depth + 1] for key in self.store if key[:depth] == self.parts}
        return (Bucket(self.store, key) for key in below)

    def stat(self):
        return SimpleNamespace(length=len(self.store[self.parts]))

    def write_bytes(self, content):
        self.store[self.parts] = bytes(content)

    def read_bytes(self):
        return self.store[self.parts]


def test_rows_and_report_may_lie_in_a_bucket(tmp_path):
    rows = [make_row(), make_row(source="l2", source_norm="l2", source_eps=0.5)]
    bucket = Bucket({})
    write_rows(rows[:1], bucket / "runs" / "rows.jsonl")
    write_rows(rows[1:], bucket / "runs/deep/rows.jsonl")
    write_rows(rows[1:], bucket / "runs/deep/rows.csv")
    assert sorted(row["source"] for row in read_rows(bucket / "runs")) == ["l2", "natural"]
    assert [row["source"] for row in read_rows(bucket / "runs/deep/rows.csv")] == ["l2"]
    path = write_report(rows, bucket / "report")
    assert str(path) == "bucket://report/report.html"
    write_report(rows, tmp_path)
    here = {
        file.relative_to(tmp_path).parts: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()
    }
    assert {key[1:]: content for key, content in bucket.store.items() if key[0] == "report"} == here


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    path = write_rows([make_row()], tmp_path / "rows.csv")
    before = path.read_bytes()

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(path), "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_rows([make_row(), make_row(seed=1)], path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# What is refused, or left out and reported.


def test_refusals_name_the_place_in_one_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert "no such file" in refusal(str(path))
    assert "no rows found" in refusal(tmp_path)
    good = json.dumps(make_row())
    short = json.dumps({k: v for k, v in make_row().items() if k not in ("seed", "test_accuracy")})
    for content, words in (
        (short, "rows.jsonl:1: columns missing: seed, test_accuracy"),
        (f"{good}\n{good[:40]}\n", "rows.jsonl:2: not a line of JSON"),
        (f"{good}\n\n[1]\n", "rows.jsonl:3: not a JSON object"),
        (f'{good}\n"text"\n', "rows.jsonl:2: not a JSON object"),
        (f'{good[:-1]}, "seed": 1}}\n', "rows.jsonl:1: two fields are called seed"),
        (json.dumps(make_row(seed=2.0**60)), "not exact: write it as an integer"),
    ):
        path.write_text(content)
        assert words in refusal(path)
    table = write_rows([make_row()], tmp_path / "rows.csv")
    text = table.read_text()
    table.write_text(text + "\n")
    assert len(read_rows(table)) == 1
    for content, words in (
        (text + "natural,none,0\n", "rows.csv:3: 3 cells under 16 columns"),
        ("source,target\n", "holds no rows"),
    ):
        table.write_text(content)
        assert words in refusal(table)
    (tmp_path / "rows.txt").write_text("x")
    assert ".jsonl, .csv, .parquet" in refusal(tmp_path / "rows.txt")


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("test_accuracy", 71.3, "fractions in [0, 1]"),
        ("num_unfrozen_blocks", 1.5, "whole number"),
        ("num_unfrozen_blocks", True, "whole number"),
        ("seed", None, "is empty"),
        ("epoch", "nan", "whole number"),
        ("epoch", None, "is empty"),
        ("epoch", "1e1000000000", "more than 1,000 digits"),
        ("epoch", "1e-1000000000", "whole number"),
        ("num_train_images", 0, "at least 1"),
        ("num_train_images", 1e308, "is a float beyond"),
        ("source", "", "is empty"),
        ("target", "x" * 501, "longer than 500"),
        ("train_loss", "low", "could not convert"),
        ("train_loss", "1_0", "not a number"),
    ],
)
def test_wrong_values_are_refused_by_name(tmp_path, column, value, words):
    message = refusal(write_rows([make_row(), make_row(**{column: value})], tmp_path / "rows.jsonl"))
    assert f"rows.jsonl:2: {column} = {repr(value)[:100]}" in message and words in message


def test_usable_rows_are_used_and_the_rest_is_reported(tmp_path):
    rows = [make_row(seed=seed, note=0.5) for seed in range(6)]
    rows += [make_row(seed="first"), make_row(seed="second")]  # names are as good as numbers
    rows += [make_row(seed=7, test_accuracy="n/a"), make_row(seed=8, test_accuracy=1.7)]
    rows += [make_row(target=""), make_row(num_train_images="all"), make_row(num_train_images="all", seed=9)]
    rows += [make_row(seed=5, test_accuracy=0.25), make_row(seed=11, source_norm="ℓ_2", source_eps="three")]
    path = foreign(tmp_path, rows)
    with open(path, "a") as stream:
        stream.write("natural,none,0")  # the writer was stopped here
    read, remarks = read_foreign_rows(path, "fraction")
    read = {row["seed"]: row for row in read}
    assert {*read} == {0, 1, 2, 3, 4, 5, "first", "second", 7, 8, 11}
    assert [seed for seed, row in read.items() if math.isnan(row["test_accuracy"])] == [7, 8]
    assert read[5]["test_accuracy"] == 0.25 and read[11]["source_norm"] == "l2" and read[0]["note"] == "0.5"
    for words in (
        f"1 row: test_accuracy counts as missing; the first is {path}:10: test_accuracy = 'n/a'",
        ":11: test_accuracy = 1.7: accuracies are fractions",
        f"1 row: left out; the first is {path}:12: target = '': is empty",
        f"2 rows: left out; the first is {path}:13: num_train_images = 'all'",
        "source_eps counts as missing",
        ":17: 3 cells under 12 columns",
        "1 duplicate row dropped",
    ):
        assert sum(words in sentence for sentence in remarks) == 1, (words, remarks)
    assert len(remarks) == 7
    text = write_report(rows, tmp_path / "report").read_text()
    assert "num_train_images = &#39;all&#39;" in text and "1 duplicate row dropped" in text


def test_a_row_without_a_place_is_left_out_whatever_was_measured(tmp_path):
    rows = [make_row(num_train_images=1), make_row(target="", test_accuracy="n/a")]
    rows += [make_row(seed=1, test_accuracy=1 + 5e-7), make_row(seed=2, test_accuracy=-5e-7)]
    read, remarks = read_foreign_rows(foreign(tmp_path, rows))
    assert [(row["seed"], math.isnan(row["test_accuracy"])) for row in read] == [
        (seed, False) for seed in (0, 1, 2)
    ]
    kinds = [sentence.partition(";")[0] for sentence in remarks]
    assert kinds == ["1 row: left out", "1 row: test_accuracy counts as missing"]
    with pytest.raises(ValueError, match=r"foreign.csv:2: target = '': is empty"):
        read_foreign_rows(foreign(tmp_path, rows[1:2]))
    with pytest.raises(ValueError, match="source = nan: is empty"):
        write_report([make_row(source=math.nan)], tmp_path / "report")


def test_the_stage_tells_it_too_and_draws_the_papers_numbers(tmp_path, capsys):
    rows = [
        make_row(source=s, source_norm=norm, target="tfds:svhn", num_unfrozen_blocks=3, num_train_images=n)
        for s, norm in (("a", "none"), ("b", "l2"))
        for n in (100, 400)
    ]
    config = base.default()
    config.stage, config.rows = "report", str(foreign(tmp_path, [*rows, make_row(target="")]))
    config.report.reference = "paper"
    tasks.run(config, tmp_path / "report")
    assert "1 row: left out" in capsys.readouterr().out
    text = (tmp_path / "report" / "report.html").read_text()
    assert "1 row: left out" in text and "arXiv:2007.05869" in text
    config.report.reference = "other"
    with pytest.raises(ValueError, match="config.report.reference='other' must be one of none, paper"):
        tasks.run(config, tmp_path / "report")


# Fractions and percent.


def accuracies(tmp_path, train, test, unit="auto", **changes):
    """The accuracies that are read of two columns, and the remarks."""
    rows = [
        make_row(seed=i, train_accuracy=x, test_accuracy=y) | changes
        for i, (x, y) in enumerate(zip(train, test, strict=True))
    ]
    read, remarks = read_foreign_rows(foreign(tmp_path, rows), unit)
    return [row["train_accuracy"] for row in read], [row["test_accuracy"] for row in read], remarks


def test_accuracies_in_percent_are_recognised_and_reported(tmp_path):
    near_chance = [0.9] * 6 + [7.0, 8.0, 9.0, 10.0]  # with a hundred classes
    train, test, remarks = accuracies(tmp_path, [99.5] * 10, near_chance)
    assert train == pytest.approx([0.995] * 10) and test == pytest.approx([y / 100 for y in near_chance])
    assert sum("4 rows: test_accuracy is above 1" in sentence for sentence in remarks) == 1
    # What is then outside 0 to 100 is missing, alone.
    _, test, remarks = accuracies(tmp_path, [99.5] * 10, [-0.5, 100.5, *near_chance[2:]])
    assert [math.isnan(y) for y in test] == [True] * 2 + [False] * 8 and test[2] == pytest.approx(0.009)
    assert any(sentence.startswith("2 rows: test_accuracy counts as missing") for sentence in remarks)


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ([""] * 4, [0.57, 0.58, 57.0, 58.0]),  # of two writers, or near chance
        ([0.99, 0.98, 99.0, 98.0], [0.57, 0.58, 57.0, 58.0]),
        ([""] * 4, [0, 1, 1, 0]),  # no point anywhere: fractions of one image, or rounded percent
        ([1, 1, 1, 1], [0, 1, 1, 0]),
    ],
)
def test_accuracies_of_which_nobody_can_tell_the_unit_are_asked_for(tmp_path, train, test):
    found_train, found_test, [remarks] = accuracies(tmp_path, train, test)
    assert all(map(math.isnan, found_train + found_test))
    assert "config.report.accuracy_unit=fraction or =percent" in remarks and "foreign.csv:" in remarks
    _, found, _ = accuracies(tmp_path, train, test, "percent")
    assert found == pytest.approx([y / 100 for y in test])
    _, found, _ = accuracies(tmp_path, train, test, "fraction")
    assert found == pytest.approx([y if y <= 1 else math.nan for y in test], nan_ok=True)


def test_a_percent_sign_says_percent_of_its_column(tmp_path):
    train, test, remarks = accuracies(tmp_path, [0.995, 0.25], ["50.00%", " 0.9 % "])
    assert train == [0.995, 0.25] and test == pytest.approx([0.5, 0.009])
    assert len(remarks) == 1 and "2 rows: test_accuracy is above 1 or has a % sign" in remarks[0]
    _, test, [remarks] = accuracies(tmp_path, [""] * 4, ["50.00%", "51%", 0.5, 0.6])  # half without
    assert all(map(math.isnan, test)) and "cannot be known" in remarks
    for name in ("test_accuracy_percent", "Test accuracy (%)", "test_acc [%]", "TEST-ACC pct"):
        path = foreign(tmp_path, [make_row(test_accuracy=0.9), make_row(seed=1, test_accuracy=1)])
        path.write_text(path.read_text().replace("test_accuracy", name, 1))
        read, _ = read_foreign_rows(path)
        assert [row["test_accuracy"] for row in read] == pytest.approx([0.009, 0.01])
        assert {row["train_accuracy"] for row in read} == {1.0}


def test_the_unit_of_a_file_is_decided_beside_the_others(tmp_path):
    for name, scale in (("a", 100), ("b", 100), ("c", 1)):
        rows = [make_row(target=name, seed=s, train_accuracy=scale, test_accuracy=scale / 2) for s in (0, 1)]
        write_rows(rows, tmp_path / f"{name}.csv")
    read, remarks = read_foreign_rows(tmp_path)
    assert [row["test_accuracy"] for row in read[:4]] == [0.5] * 4
    assert all(math.isnan(row["test_accuracy"]) for row in read[4:]) and "c.csv:" in " ".join(remarks)
    # A file of whole zeros and ones takes the unit that the others share.
    write_rows([make_row(target="c", train_accuracy=None, test_accuracy=1)], tmp_path / "c.csv")
    assert read_foreign_rows(tmp_path)[0][-1]["test_accuracy"] == 0.01
    (tmp_path / "a.csv").unlink(), (tmp_path / "b.csv").unlink()
    write_rows([make_row(target="c", test_accuracy=0.5)], tmp_path / "c.csv")
    assert [row["test_accuracy"] for row in read_foreign_rows(tmp_path)[0]] == [0.5]


# Dialects.


def table(tmp_path, text, encoding="utf-8"):
    path = tmp_path / "theirs.csv"
    path.write_bytes(text.encode(encoding))
    return read_foreign_rows(path)


HEADER = ",".join(COLUMNS[:11])
LINE = "natural,none,0.5,tä,100,-1,7,150,0.75,0.125,0.5"


def test_other_writers_columns_and_spellings(tmp_path):
    rows = [make_row(source_norm="", source_eps="", seed="3.0", note="x")]
    rows += [make_row(source="r", source_norm="L2", source_eps="3", seed=3, note="")]
    natural, robust = read_rows(foreign(tmp_path, rows))
    assert (natural["source_norm"], natural["seed"], natural["trial_id"]) == ("none", 3, "")
    assert (robust["source_norm"], robust["source_eps"], robust["note"]) == ("l2", 3.0, "")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_separators_and_encodings(tmp_path, encoding, separator, end):
    text = f"{HEADER}\n{LINE}\n".replace(",", separator).replace("\n", end)
    [[row], remarks] = table(tmp_path, text, encoding)
    assert not remarks and (row["target"], row["seed"], row["test_accuracy"]) == ("tä", 7, 0.5)
    if separator != ",":  # as a German spreadsheet writes it
        for comma in (text.replace(".", ","), f"sep={separator}{end}{text}"):
            [[again], remarks] = table(tmp_path, comma, encoding)
            assert not remarks and repr(again) == repr(row)


def test_decimal_commas_and_marks_of_thousands_are_not_guessed(tmp_path):
    german = "natural;none;0;t;100;-1;7;150;0,75;0,125;"
    header = HEADER.replace(",", ";")
    rows, remarks = table(tmp_path, f"{header}\n{german}50,5%\n{german.replace('100', '1.000')}51,5%\n")
    assert [row["test_accuracy"] for row in rows] == pytest.approx([0.505])
    words = "theirs.csv:3: num_train_images = '1.000' has a point, or a mark of thousands"
    assert any(words in sentence for sentence in remarks)
    rows, remarks = table(tmp_path, f"{header}\n{german}0,5\n{german.replace(';7;', ';8;')}1.234,5\n")
    assert any("theirs.csv:3: test_accuracy = '1.234,5'" in sentence for sentence in remarks)
    # With commas between cells a decimal comma makes one cell more.
    with pytest.raises(ValueError, match=r"theirs.csv:2: 12 cells under 11 columns"):
        table(tmp_path, f"{HEADER}\n{LINE.replace('0.75', '0,75')}\n")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (f"{HEADER}\n{LINE}\n".encode("latin-1"), "theirs.csv:2: target = 't\\udce4': is not UTF-8"),
        (f"{HEADER}\n{LINE}\n".encode("utf-16-le"), "theirs.csv: cannot be read (it holds zero bytes"),
        (f"{HEADER}\n{LINE}\n".encode("utf-16")[:-1], "theirs.csv: cannot be read ("),
        (f"{HEADER},seed\n{LINE},8\n".encode(), "theirs.csv:1: two columns are called seed"),
        (f"{HEADER},Test accuracy (%)\n{LINE},8\n".encode(), "two columns are test_accuracy"),
        (bytes(range(240, 256)) + b"\0" * 16, "theirs.csv: cannot be read ("),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, content, words):
    (tmp_path / "theirs.csv").write_bytes(content)
    assert words in refusal(tmp_path / "theirs.csv")


@pytest.mark.parametrize(
    ("seed", "read"),
    [
        (str(2**53 + 1), 2**53 + 1),
        (str(2**64 - 1), 2**64 - 1),
        ("1e3", 1000),
        ("3.0", 3),
        ("-4", -4),
        ("1" * 40, int("1" * 40)),
        ("9007199254740993.0", 2**53 + 1),
        ("1e1000000000", "1e1000000000"),  # a name as good as any
        ("1_000", "1_000"),
        ("run-3", "run-3"),
    ],
)
def test_seeds_are_exact(tmp_path, seed, read):
    lines = f"{LINE.replace(',7,', f',{seed},')}\n{LINE.replace(',7,', f',{2**53},')}\n"
    [[row, other], remarks] = table(tmp_path, f"{HEADER}\n{lines}")
    assert row["seed"] == read and type(row["seed"]) is type(read)
    assert other["seed"] == 2**53 and not remarks


NAMES = [
    "=1+1",
    "+cmd|' /C calc'!A0",
    "-2+3",
    "@SUM(1)",
    "\t=1",
    "\r=1",
    "'=1",
    "''@x",
    "＝1",
    "'quoted'",
    "-3",
]


def test_no_cell_is_a_formula_and_names_come_back(tmp_path):
    rows = [make_row(source=name, target=name, seed=i) for i, name in enumerate(NAMES)]
    path = write_rows(rows, tmp_path / "rows.csv")
    assert [row["source"] for row in read_rows(path)] == NAMES
    write_report(rows, tmp_path / "report")
    for file in [path, *(tmp_path / "report").rglob("*.csv")]:
        with file.open(newline="") as stream:
            for cell in (cell for line in csv.reader(stream) for cell in line):
                number = cell.replace(".", "").replace(" ", "").lstrip("-").isdigit() or "e-" in cell
                assert cell[:1] not in tuple("=+-@\t\r＝") or number, (file.name, cell)
