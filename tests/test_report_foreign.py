"""Rows that others wrote, and folders that are no folders: used as far as they go, and the rest told."""

import csv
import io
import json
import math
import os
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from test_report_rows import make_row

from advtransfer import config as base
from advtransfer import tasks
from advtransfer.report import COLUMNS, read_foreign_rows, read_rows, write_report, write_rows


def foreign(tmp_path, rows):
    path = tmp_path / "foreign.csv"
    with open(path, "w", newline="") as stream:
        names = [*COLUMNS[:11], "test_mean_per_class_accuracy"]
        writer = csv.DictWriter(stream, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_rows_are_used_as_far_as_they_go_and_the_rest_is_told(tmp_path):
    rows = [make_row(seed=seed, test_mean_per_class_accuracy=0.5) for seed in range(6)]
    rows += [make_row(seed="first"), make_row(seed="second")]  # names are as good as numbers
    rows += [make_row(seed=7, test_accuracy="n/a"), make_row(seed=8, test_accuracy=1.7)]
    rows += [make_row(target=""), make_row(num_train_images="all"), make_row(num_train_images="all", seed=9)]
    rows += [make_row(seed=5, test_accuracy=0.25), make_row(seed=11, source_norm="ℓ_2", source_eps="three")]
    path = foreign(tmp_path, rows)
    with open(path, "a") as stream:
        stream.write("natural,none,0")  # the writer was stopped here
    read, told = read_foreign_rows(path, "fraction")
    assert [row["seed"] for row in read] == [0, 1, 2, 3, 4, 5, "first", "second", 7, 8, 11]
    assert [row["seed"] for row in read if math.isnan(row["test_accuracy"])] == [7, 8]
    assert read[5]["test_accuracy"] == 0.25 and read[-1]["source_norm"] == "l2"
    assert read[0]["test_mean_per_class_accuracy"] == "0.5"
    for words in (
        f"1 row: test_accuracy counts as missing; the first is {path}:10: test_accuracy = 'n/a'",
        ":11: test_accuracy = 1.7: accuracies are fractions",
        f"1 row: left out; the first is {path}:12: target = '': is empty",
        f"2 rows: left out; the first is {path}:13: num_train_images = 'all'",
        "source_eps counts as missing",
        ":17: 3 cells under 12 columns",
        "1 duplicate row dropped",
    ):
        assert sum(words in sentence for sentence in told) == 1, (words, told)
    assert len(told) == 7
    text = write_report(rows, tmp_path / "report").read_text()
    assert "num_train_images = &#x27;all&#x27;" in text and "1 duplicate row dropped" in text


def accuracies(tmp_path, train, test, unit="auto", **changes):
    """What is read of two columns of accuracies, and what is told."""
    rows = [
        make_row(seed=i, train_accuracy=x, test_accuracy=y) | changes
        for i, (x, y) in enumerate(zip(train, test, strict=True))
    ]
    read, told = read_foreign_rows(foreign(tmp_path, rows), unit)
    return [row["train_accuracy"] for row in read], [row["test_accuracy"] for row in read], told


def test_accuracies_in_percent_are_taken_as_such_and_told(tmp_path):
    near_chance = [0.9] * 6 + [7.0, 8.0, 9.0, 10.0]  # with a hundred classes
    train, test, told = accuracies(tmp_path, [99.5] * 10, near_chance)
    assert train == pytest.approx([0.995] * 10) and test == pytest.approx([y / 100 for y in near_chance])
    assert sum("4 rows: test_accuracy is above 1" in sentence for sentence in told) == 1
    # What is then outside 0 to 100 is missing, alone.
    _, test, told = accuracies(tmp_path, [99.5] * 10, [-0.5, 100.5, *near_chance[2:]])
    assert [math.isnan(y) for y in test] == [True] * 2 + [False] * 8 and test[2] == pytest.approx(0.009)
    assert any(sentence.startswith("2 rows: test_accuracy counts as missing") for sentence in told)


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
    found_train, found_test, [told] = accuracies(tmp_path, train, test)
    assert all(map(math.isnan, found_train + found_test))
    assert "config.report.accuracy_unit=fraction or =percent" in told and "foreign.csv:" in told
    _, found, _ = accuracies(tmp_path, train, test, "percent")
    assert found == pytest.approx([y / 100 for y in test])
    _, found, _ = accuracies(tmp_path, train, test, "fraction")
    assert found == pytest.approx([y if y <= 1 else math.nan for y in test], nan_ok=True)


def test_a_percent_sign_says_percent_of_its_column(tmp_path):
    train, test, told = accuracies(tmp_path, [0.995, 0.25], ["50.00%", " 0.9 % "])
    assert train == [0.995, 0.25] and test == pytest.approx([0.5, 0.009])
    assert len(told) == 1 and "2 rows: test_accuracy is above 1 or has a % sign" in told[0]
    _, test, [told] = accuracies(tmp_path, [""] * 4, ["50.00%", "51%", 0.5, 0.6])  # half without
    assert all(map(math.isnan, test)) and "cannot be told" in told


@pytest.mark.parametrize(
    "name", ["test_accuracy_percent", "Test accuracy (%)", "test_acc [%]", "TEST-ACC pct"]
)
def test_a_columns_name_says_percent(tmp_path, name):
    path = foreign(tmp_path, [make_row(test_accuracy=0.9), make_row(seed=1, test_accuracy=1)])
    path.write_text(path.read_text().replace("test_accuracy", name, 1))
    read, _ = read_foreign_rows(path)
    assert [row["test_accuracy"] for row in read] == pytest.approx([0.009, 0.01])
    assert {row["train_accuracy"] for row in read} == {1.0}


def test_the_unit_of_a_file_is_decided_beside_the_others(tmp_path):
    for name, scale in (("a", 100), ("b", 100), ("c", 1)):
        rows = [make_row(target=name, seed=s, train_accuracy=scale, test_accuracy=scale / 2) for s in (0, 1)]
        write_rows(rows, tmp_path / f"{name}.csv")
    read, told = read_foreign_rows(tmp_path)
    assert [row["test_accuracy"] for row in read[:4]] == [0.5] * 4
    assert all(math.isnan(row["test_accuracy"]) for row in read[4:]) and "c.csv:" in " ".join(told)
    (tmp_path / "a.csv").unlink(), (tmp_path / "b.csv").unlink()
    assert [row["test_accuracy"] for row in read_foreign_rows(tmp_path)[0]] == [0.5] * 2


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


def test_a_row_without_a_place_is_left_out_whatever_was_measured(tmp_path):
    rows = [make_row(num_train_images=1), make_row(target="", test_accuracy="n/a")]
    rows += [make_row(seed=1, test_accuracy=1 + 5e-7), make_row(seed=2, test_accuracy=-5e-7)]
    read, told = read_foreign_rows(foreign(tmp_path, rows))
    assert [row["seed"] for row in read] == [0, 1, 2] and not any(
        math.isnan(r["test_accuracy"]) for r in read
    )
    assert [sentence.partition(";")[0] for sentence in told] == [
        "1 row: left out",
        "1 row: test_accuracy counts as missing",
    ]
    with pytest.raises(ValueError, match="source = nan: is empty"):
        write_report([make_row(source=math.nan)], tmp_path / "report")


def test_rows_of_which_none_can_be_used_are_refused(tmp_path):
    path = foreign(tmp_path, [make_row(target="")])
    with pytest.raises(ValueError, match=r"foreign.csv:2: target = '': is empty"):
        read_foreign_rows(path)


class Bucket:
    """A folder of an object store: no more than pathlib's and etils' paths share, and no renaming."""

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


def test_parquet_in_a_bucket():
    pyarrow, parquet = map(pytest.importorskip, ("pyarrow", "pyarrow.parquet"))
    buffer, bucket = io.BytesIO(), Bucket({})
    parquet.write_table(pyarrow.Table.from_pylist([make_row()]), buffer)
    (bucket / "rows.parquet").write_bytes(buffer.getvalue())
    assert read_rows(bucket) == [make_row()]


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    path = write_rows([make_row()], tmp_path / "rows.csv")
    before = path.read_bytes()

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(path), "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_rows([make_row(), make_row(seed=1)], path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def table(tmp_path, text, encoding="utf-8"):
    path = tmp_path / "theirs.csv"
    path.write_bytes(text.encode(encoding))
    return read_foreign_rows(path)


HEADER = ",".join(COLUMNS[:11])
LINE = "natural,none,0.5,tä,100,-1,7,150,0.75,0.125,0.5"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_separators_and_encodings(tmp_path, encoding, separator, end):
    text = f"{HEADER}\n{LINE}\n".replace(",", separator).replace("\n", end)
    [[row], told] = table(tmp_path, text, encoding)
    assert not told and (row["target"], row["seed"], row["test_accuracy"]) == ("tä", 7, 0.5)
    if separator != ",":  # as a German spreadsheet writes it
        [[comma], told] = table(tmp_path, text.replace(".", ","), encoding)
        assert not told and comma == row
        assert table(tmp_path, f"sep={separator}{end}{text}", encoding)[0] == [row]


def test_decimal_commas_and_marks_of_thousands_are_not_guessed(tmp_path):
    german = "natural;none;0;t;100;-1;7;150;0,75;0,125;"
    header = HEADER.replace(",", ";")
    rows, told = table(tmp_path, f"{header}\n{german}50,5%\n{german.replace('100', '1.000')}51,5%\n")
    assert [row["test_accuracy"] for row in rows] == pytest.approx([0.505])
    assert any(
        "theirs.csv:3: num_train_images = '1.000' has a point, or a mark of thousands" in t for t in told
    )
    rows, told = table(tmp_path, f"{header}\n{german}0,5\n{german.replace(';7;', ';8;')}1.234,5\n")
    assert any("theirs.csv:3: test_accuracy = '1.234,5'" in sentence for sentence in told)
    # With commas between cells a decimal comma makes one cell more.
    with pytest.raises(ValueError, match=r"theirs.csv:2: 12 cells under 11 columns"):
        table(tmp_path, f"{HEADER}\n{LINE.replace('0.75', '0,75')}\n")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (f"{HEADER}\n{LINE}\n".encode("latin-1"), "theirs.csv:2: target = 't\\udce4': is not UTF-8"),
        (f"{HEADER}\n{LINE}\n".encode("utf-16-le"), "theirs.csv: no text (it holds zero bytes"),
        (f"{HEADER}\n{LINE}\n".encode("utf-16")[:-1], "theirs.csv: no text ("),
        (f"{HEADER},seed\n{LINE},8\n".encode(), "theirs.csv:1: two columns are called seed"),
        (f"{HEADER},Test accuracy (%)\n{LINE},8\n".encode(), "two columns are test_accuracy"),
        (bytes(range(240, 256)) + b"\0" * 16, "theirs.csv: no text ("),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, content, words):
    (tmp_path / "theirs.csv").write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_foreign_rows(tmp_path / "theirs.csv")
    assert words in str(caught.value) and "\n" not in str(caught.value)


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
    [[row], _] = table(tmp_path, f"{HEADER}\n{LINE.replace(',7,', f',{seed},')}\n")
    assert row["seed"] == read and type(row["seed"]) is type(read)


def test_seeds_that_a_float_would_make_one(tmp_path):
    lines = "".join(LINE.replace(",7,", f",{2**53 + i},") + "\n" for i in range(4))
    rows, told = table(tmp_path, f"{HEADER}\n{lines}")
    assert [row["seed"] for row in rows] == [2**53 + i for i in range(4)] and not told
    (tmp_path / "a.jsonl").write_text(json.dumps(make_row(seed=2.0**60)))
    with pytest.raises(ValueError, match="not exact: write it as an integer"):
        read_foreign_rows(tmp_path / "a.jsonl")


def test_fields_of_one_name_are_refused(tmp_path):
    text = json.dumps(make_row())
    (tmp_path / "a.jsonl").write_text(text[:-1] + ', "seed": 1}\n')
    with pytest.raises(ValueError, match=r"a.jsonl:1: two fields are called seed"):
        read_foreign_rows(tmp_path / "a.jsonl")


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


def test_rows_are_bounded_before_they_are_read(tmp_path, monkeypatch):
    pyarrow, parquet = map(pytest.importorskip, ("pyarrow", "pyarrow.parquet"))
    row = make_row()
    del row["config"]
    many = pyarrow.table({name: pyarrow.array([value] * 20) for name, value in row.items()})
    parquet.write_table(
        many.append_column("big", pyarrow.array(["x" * 1000] * 20)), tmp_path / "rows.parquet"
    )
    [read] = read_rows(tmp_path / "rows.parquet")
    assert "big" not in read
    monkeypatch.setattr("advtransfer.report.rows.MAX_ROWS", 19)
    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", None)  # not even begun
    with pytest.raises(ValueError, match=r"rows.parquet: .*20 rows, more than 19"):
        read_rows(tmp_path / "rows.parquet")
    monkeypatch.setattr("advtransfer.report.cells.MAX_ROWS", 19)
    with pytest.raises(ValueError, match=r"rows.csv:21: more than 19 rows"):
        read_rows(write_rows([make_row(seed=s) for s in range(20)], tmp_path / "rows.csv"))


def test_networks_of_one_name_keep_their_rows(tmp_path):
    """Two networks called r, ε equal to six digits, beside one that is called as one of them would be."""
    rows = [make_row(source="r", source_norm="l2", source_eps=eps, test_accuracy=a, seed=s)
            for eps, a in ((0.5, 0.1), (0.50000001, 0.2)) for s in (0, 1)]  # fmt: skip
    rows += [make_row(source="r, ℓ2 (ε = 0.5)", source_norm="l2", source_eps=1, test_accuracy=0.3)]
    write_report(rows, tmp_path)
    with open(tmp_path / "summary.csv", newline="") as stream:
        found = {row["source"]: float(row["mean"]) for row in csv.DictReader(stream)}
    assert sorted(found.values()) == pytest.approx([0.1, 0.2, 0.3])


def test_figures_of_names_with_control_characters_are_xml(tmp_path):
    rows = [
        make_row(source=s, source_norm=norm, source_eps=eps, num_train_images=n, target="t\x0b\x1b[31m")
        for s, norm, eps in (("a", "none", 0), ("\0", "l2", 1), ("c\x1b]\x07", "l2", 1), ("\u202e", "l2", 2))
        for n in (10, 20)
    ]  # fmt: skip
    text = write_report(rows, tmp_path).read_text("utf-8")
    figures = list(tmp_path.rglob("*.svg"))
    for figure in figures:
        ElementTree.parse(figure)
    assert figures and not any(ord(c) < 32 and c not in "\t\n" for c in text) and "\u202e" not in text
