"""Tables of images: the same dataset as its folder, in every format; what contradicts itself is refused."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from test_data_folder import UPRIGHT, color_of, serials_of, write_images

from advtransfer.data import check_dataset_name, datasets, load_dataset, plan_dataset, recorded, table_images
from advtransfer.data.stream import StreamOrder, iterate, read_batch
from advtransfer.data.table import open_table

COUNTS = {"train/cat": 14, "train/dog": 9, "train/10": 7, "test/cat": 3, "test/dog": 4, "test/10": 2}
STRUCT = ("bytes", "path")


def load(table, **options):
    return load_dataset(f"table:{table}", cache_dir=table.parent / "cache", **options)


def write_table(file, lines, header="image,label", **options):
    options = {"encoding": "utf-8", "newline": ""} | options
    file.write_text("\n".join([header, *lines]) + "\n", **options)
    return file


def listed(root):
    """Path below `root`, class and split of every image, in the order of a folder."""
    for path in sorted(root.rglob("*.png")):
        split, label, _ = path.relative_to(root).parts
        yield str(path.relative_to(root)), label, split


def assert_equal(one, other):
    assert one.class_names == other.class_names
    for split in ("train", "validation", "test"):
        for left, right in zip(getattr(one, split), getattr(other, split), strict=True):
            np.testing.assert_array_equal(left, right)


@pytest.fixture
def root(tmp_path):
    write_images(tmp_path / "set", COUNTS)
    return tmp_path / "set"


@pytest.fixture
def as_folder(root):
    return load_dataset(f"folder:{root}", cache_dir=root.parent / "cache")


@pytest.mark.parametrize(
    ("kind", "remarks"),
    [
        ("plain", ()),
        ("shuffled", ()),
        ("absolute", ()),
        ("outside", ()),
        ("windows", ()),
        ("quoted", ()),
        ("blanks", ()),
        ("excel", ()),
        ("tabs", ()),
        ("other names", ("read the columns File Name as image, CATEGORY as label, Set as split",)),
        ("ids", ("read the columns id as image", "added .png to 39 paths")),
        ("unquoted tsv", ()),
    ],
)
def test_a_table_is_the_dataset_of_its_folder(root, as_folder, kind, remarks):
    rows, header, sep, end, file, options = [*listed(root)], "image,label,split", ",", "\n", "labels.csv", {}
    if kind == "shuffled":
        rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    if kind == "absolute":
        rows = [(str(root / path), *rest) for path, *rest in rows]
    if kind == "outside":
        rows, file = [(f"../{root.name}/{path}", *rest) for path, *rest in rows], "../tables/labels.csv"
    if kind == "windows":
        rows = [(path.replace("/", "\\"), *rest) for path, *rest in rows]
        end, options = "\r\n", {"encoding": "utf-8-sig"}
    if kind == "quoted":
        rows = [tuple(f'"{cell}"' for cell in row) for row in rows]
    if kind == "blanks":
        header, sep = "image, label, split", ", "
        rows.insert(4, ("", "", ""))
    if kind == "excel":
        header, sep = "image;label;split", ";"
    if kind in ("tabs", "unquoted tsv"):
        header, sep, file = "image\tlabel\tsplit", "\t", "labels.tsv" if kind == "unquoted tsv" else file
    if kind == "other names":
        header = "Unnamed,File Name,CATEGORY,Set"
        rows = [("7", *row) for row in rows]
    if kind == "ids":
        header, rows = "id,label,split", [(path.removesuffix(".png"), *rest) for path, *rest in rows]
    text = end.join([header, *(sep.join(row) for row in rows)]) + end
    (root / file).parent.mkdir(exist_ok=True)
    (root / file).write_bytes(text.encode(options.get("encoding", "utf-8")))
    dataset = load(root / file)
    assert_equal(dataset, as_folder)
    assert dataset.class_names == ("10", "cat", "dog") and sorted(dataset.remarks) == sorted(remarks)
    assert dataset.skipped == ()


def test_without_splits_a_table_is_split_as_one_tree_and_files_are_splits_by_their_names(root, as_folder):
    rows = [*listed(root)]
    for split in ("train", "test"):
        write_table(root / f"{split}.csv", [f"{path},{label}" for path, label, its in rows if its == split])
    assert_equal(load(root / "t*.csv"), as_folder)
    test = load(root / "test.csv")
    assert not test.train.num_images
    np.testing.assert_array_equal(test.test.images, as_folder.test.images)

    (root / "test.csv").rename(root / "Testing_set-00000-of-00001.csv")
    assert load(root / "[Tt]*.csv").remarks == ("read Testing_set-00000-of-00001.csv as test",)

    tree = load_dataset(f"folder:{root / 'train'}", cache_dir=root.parent / "cache")
    lines = [f"{path},{label}" for path, label, split in rows if split == "train"]
    assert_equal(load(write_table(root / "labels.csv", lines)), tree)


def test_a_table_in_the_working_directory(root, as_folder, monkeypatch):
    write(root, "csv")
    monkeypatch.chdir(root)
    assert_equal(load_dataset("table:labels.csv", cache_dir=root.parent / "cache"), as_folder)


def test_slices_are_those_of_folders(root):
    file = write_table(root / "labels.csv", map(",".join, listed(root)), "image,label,split")
    for train in ("train[:50%]", "train[-6:]", "train[:3]+train[20:]"):
        one, other = (
            load_dataset(f"{kind}:{train}", cache_dir=root.parent / "cache")
            for kind in (f"table:{file}", f"folder:{root}")
        )
        assert_equal(one, other)
    with pytest.raises(ValueError, match="would train on its test images"):
        load_dataset(f"table:{file}:test[:3]", cache_dir=root.parent / "cache")


def test_classes_are_text_in_the_order_of_folders(tmp_path):
    names = ["10", "9", "001", "NA", "None", "3.0", "nan", "a, b", "café", "cafe\u0301 noir"]
    rows = []
    for i, name in enumerate(names):
        Image.new("RGB", (4, 4), color_of(i)).save(tmp_path / f"{i}.png")
        rows.append(f'{i}.png,"{name}",test')
    dataset = load(write_table(tmp_path / "labels.csv", rows, "image,label,split"))
    expected = ("001", "9", "10", "3.0", "NA", "None", "a, b", "café", "café noir", "nan")
    assert dataset.class_names == expected
    named = {
        serial: dataset.class_names[label]
        for serial, label in zip(serials_of(dataset.test), dataset.test.labels, strict=True)
    }
    assert [named[i] for i in range(10)] == [*names[:-1], "café noir"]


def test_rows_that_repeat_an_image_are_left_out_and_counted(root, as_folder):
    rows = [",".join(row) for row in listed(root)]
    rows += [rows[0], f"./{rows[3]}", rows[7].replace("train/", "train/../train/", 1)]
    dataset = load(write_table(root / "labels.csv", rows, "image,label,split"))
    assert_equal(dataset, as_folder)
    assert dataset.remarks == ("left out 3 rows repeating an image with its class",)


def test_missing_images_are_named_at_once_and_refused_or_skipped(root, monkeypatch):
    rows = [",".join(row) for row in listed(root)]
    file = write_table(root / "labels.csv", rows, "image,label,split")
    gone = [root / line.split(",")[0] for line in rows[-8:-1]]
    for path in gone[1:]:
        path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(recorded, "decode_images", None)
        with pytest.raises(ValueError, match="6 images of table:.* do not exist: ") as error:
            load(file)
    assert error.value.args[0].count("; ") == 5 and "\n" not in error.value.args[0]
    name, _, _ = rows[-7].split(",")
    assert f"{name}, row {len(rows) - 5} of labels.csv; " in error.value.args[0]
    dataset = load(file, broken="skip")
    assert len(dataset.skipped) == 6 and dataset.skipped[0].endswith(
        "of labels.csv (No such file or directory)"
    )
    assert dataset.remarks[0].startswith("left out 6 images that cannot be decoded")
    before = dataset.train.num_images + dataset.validation.num_images
    Image.new("RGB", (6, 6), color_of(500)).save(gone[1])
    again = load(file, broken="skip")
    assert again.train.num_images + again.validation.num_images == before + 1


def test_the_cache_follows_the_table_and_images_wherever_they_are(root, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    rows = [f"{root / path},{label}" for path, label, split in listed(root) if split == "test"]
    file = write_table(tmp_path / "elsewhere/test.csv", rows)
    first = load(file).test
    with monkeypatch.context() as patch:
        patch.setattr(recorded, "decode_images", None)
        np.testing.assert_array_equal(load(file).test.images, first.images)
    path = root / "test/cat" / sorted(os.listdir(root / "test/cat"))[0]
    Image.new("RGB", (6, 6), color_of(700)).save(path)
    assert 700 in serials_of(load(file).test)
    write_table(file, [line.replace(",10", ",dog") for line in rows])
    assert load(file).class_names == ("cat", "dog")


# What the hub's files hold: `datasets` writes the features into the schema, and structs of bytes and path.


def write_parquet(file, rows, *, names=None, kind="hub", group=4, **columns):
    """Rows of path, label; `names` declares the classes of integer labels."""
    pyarrow, parquet = map(pytest.importorskip, ("pyarrow", "pyarrow.parquet"))
    data = [None if kind == "paths" else path.read_bytes() for path, _ in rows]
    files = [str(path) if kind == "paths" else path.name for path, _ in rows]
    struct = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    images = {
        "hub": lambda: pyarrow.array(
            [*map(lambda *x: dict(zip(STRUCT, x, strict=True)), data, files)], struct
        ),
        "bytes": lambda: pyarrow.array(data, pyarrow.large_binary()),
        "text": lambda: pyarrow.array([str(path) for path, _ in rows]),
    }
    labels = [label for _, label in rows] if names is None else [names.index(label) for _, label in rows]
    table = pyarrow.table({"image": images.get(kind, images["hub"])(), "label": labels} | columns)
    if names is not None:
        label = {"names": names, "_type": "ClassLabel"}
        features = {"info": {"features": {"image": {"_type": "Image"}, "label": label}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    parquet.write_table(table, file, row_group_size=group)
    return file


def shards(root, data, **options):
    """The layout of the hub: two files of training images and one of test images."""
    data.mkdir()
    for split in ("train", "test"):
        rows = [(root / path, label) for path, label, its in listed(root) if its == split]
        rows.sort(key=lambda row: ("10", "cat", "dog").index(row[1]))
        parts = [rows[:17], rows[17:]] if split == "train" else [rows]
        for i, part in enumerate(parts):
            write_parquet(data / f"{split}-{i:05}-of-{len(parts):05}.parquet", part, **options)
    return data


def write(root, kind):
    """The images of a folder as a table of paths, or in Parquet files with several row groups."""
    if kind == "parquet":
        return shards(root, root.parent / "data", group=3)
    return write_table(root / "labels.csv", map(",".join, listed(root)), "image,label,split")


@pytest.mark.parametrize("kind", ["hub", "bytes", "paths", "text"])
@pytest.mark.parametrize("names", [None, ["10", "cat", "dog"]])
def test_parquet_as_on_the_hub_is_the_dataset_of_the_folder(root, as_folder, kind, names):
    data = shards(root, root.parent / "data", kind=kind, names=names)
    assert_equal(load(data), as_folder)
    assert_equal(load(data / "t*.parquet"), as_folder)
    for train in ("train[:40%]", "train[:5]+train[9:]"):
        one, other = (
            load_dataset(f"{kind}:{train}", cache_dir=root.parent / "cache")
            for kind in (f"table:{data}", f"folder:{root}")
        )
        assert_equal(one, other)


def test_declared_names_keep_their_order_and_a_column_may_hold_the_splits(root):
    rows = [(root / path, label) for path, label, _ in listed(root)]
    splits = [split for *_, split in listed(root)]
    names = ["dog", "Dog", "10", "cat"]
    rows.append((root / listed_first(root), "Dog"))
    file = write_parquet(root / "all.parquet", rows, names=names, split=[*splits, "train"])
    dataset = load(file)
    assert dataset.class_names == tuple(names)
    label_of = {int(path.stem): names.index(label) for path, label in rows[:-1]}
    assert dataset.test.labels.tolist() == [label_of[serial] for serial in serials_of(dataset.test)]
    integers = write_parquet(root / "numbers.parquet", [(path, len(label)) for path, label in rows])
    assert load(integers).class_names == ("2", "3")


def listed_first(root):
    return next(listed(root))[0]


def test_test_images_that_are_not_labelled_are_left_out(root):
    data = shards(root, root.parent / "data", names=["10", "cat", "dog"])
    pyarrow, parquet = map(pytest.importorskip, ("pyarrow", "pyarrow.parquet"))
    (file,) = data.glob("test-*")
    table = parquet.read_table(file)
    hidden = pyarrow.array([-1] * len(table))
    parquet.write_table(table.set_column(1, "label", hidden), file)
    dataset = load(data)
    assert dataset.remarks == ("left out 9 test images, which have no class",)
    assert dataset.train.num_images + dataset.validation.num_images + dataset.test.num_images == 30


@pytest.mark.parametrize("orientation", [3, 6])
def test_images_are_turned_upright(tmp_path, orientation):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    files = [
        write_table(tmp_path / "test.csv", ["x.png,a"]),
        write_parquet(tmp_path / "test.parquet", [(tmp_path / "x.png", "a")]),
    ]
    for file in files:
        np.testing.assert_array_equal(load(file).test.images[0], UPRIGHT[orientation](pixels))


def test_broken_images_in_parquet_are_named(root):
    data = shards(root, root.parent / "data")
    path = root / next(path for path, _, split in listed(root) if split == "test")
    path.write_bytes(b"hello")
    (data / "test-00000-of-00001.parquet").unlink()
    rows = [(root / path, label) for path, label, split in listed(root) if split == "test"]
    write_parquet(data / "test-00000-of-00001.parquet", rows)
    message = "1 of 9 test images .*: row 0 of test-00000-of-00001.parquet (not a known image format)"
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        load(data)
    assert load(data, broken="skip").test.num_images == 8


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_images_are_read_by_any_thread(root, kind):
    name = write(root, kind)
    train = open_table(f"table:{name}").splits["train"]
    expected = read_all(train.read)
    assert [int(Image.open(io.BytesIO(data)).getpixel((0, 0))[0]) for data, _ in expected] == [
        int(path.stem)
        for path in sorted((root / "train").rglob("*.png"), key=lambda path: (path.parent.name, path.name))
    ]
    copy = pickle.loads(pickle.dumps(train.read))
    assert read_all(copy) == expected
    with ThreadPoolExecutor(8) as pool:
        order = [*np.random.default_rng(0).permutation(30), *range(30)]
        found = list(pool.map(lambda i: read_all(train.read, [i])[0], order))
    assert found == [expected[i] for i in order]
    assert pickle.loads(pickle.dumps(train.describe))(3) == train.describe(3)


def read_all(read, indices=range(30)):
    """Bytes and labels."""
    return [
        (image.getvalue() if isinstance(image, io.BytesIO) else image.read_bytes(), label)
        for image, label in read(indices)
    ]


def test_a_row_group_is_read_once_for_its_images_in_order(root, monkeypatch):
    data, read = shards(root, root.parent / "data", group=5), []
    records = open_table(f"table:{data}").splits["train"]
    inner = table_images._read_group.__wrapped__
    spied = table_images.functools.lru_cache(2)(lambda *where: read.append(where[:2]) or inner(*where))
    monkeypatch.setattr(table_images, "_read_group", spied)
    for start in range(0, 30, 6):
        records.read(range(start, start + 6))
    assert len(read) == len(set(read)) == 4 + 3
    records.read([29, 0, 28, 1, 27, 2])
    assert len(read) == 7 + 1  # the last is still there


def test_a_file_that_changes_while_it_is_used_is_reported(root):
    file = write_parquet(root / "train.parquet", [(root / path, label) for path, label, _ in listed(root)])
    read = open_table(f"table:{file}").splits["train"].read
    write_parquet(file, [(root / path, label) for path, label, _ in listed(root)], group=3)
    with pytest.raises(ValueError, match="train.parquet has changed or is damaged in row group 0"):
        read([0])
    file.write_bytes(b"PAR1")
    table_images._read_group.cache_clear()
    with pytest.raises(ValueError, match="train.parquet cannot be read: "):
        read([0])


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_streamed_and_planned(root, as_folder, kind):
    name = write(root, kind)
    dataset = load(name, loading="stream")
    np.testing.assert_array_equal(dataset.test.images, as_folder.test.images)
    same = load_dataset(f"folder:{root}", cache_dir=root.parent / "cache", loading="stream").train
    order = StreamOrder(seed=0, batch_size=8)
    batches = iterate(dataset.train, order, 0, 6, num_workers=0)
    for step, batch in enumerate(batches):
        expected = read_batch(same, order, step)
        np.testing.assert_array_equal(batch.images, expected.images)
        np.testing.assert_array_equal(batch.labels, expected.labels)
    batches.close()
    planned = plan_dataset(f"table:{name}", image_size=6, cache_dir=root.parent / "cache")
    assert not planned.is_placeholder
    assert_equal(planned, as_folder)


@pytest.mark.process
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_images_are_read_in_other_processes(root, kind):
    read = open_table(f"table:{write(root, kind)}").splits["train"].read
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(read_all, (read, [5, 20, 5, 0, 29])) == read_all(read, [5, 20, 5, 0, 29])


@pytest.mark.process
def test_streamed_by_worker_processes(root):
    data = shards(root, root.parent / "data")
    train, order = load(data, loading="stream").train, StreamOrder(seed=0, batch_size=8)
    batches = iterate(train, order, 0, 6, num_workers=2)
    for step, batch in enumerate(batches):
        np.testing.assert_array_equal(batch.images, read_batch(train, order, step).images)
    batches.close()


REFUSED = {
    "no file": (None, "there is no table "),
    "empty": ("", "cannot read labels.csv: the file is empty"),
    "header only": ("image,label\n", "labels.csv has no rows"),
    "no header": (
        "1.png,a\n2.png,b\n",
        "no column is called image, path, file, filename or alike; the columns are 1.png, a: rename",
    ),
    "no classes": (
        "image,cat,dog\n1.png,1,0\n",
        "no column is called label, class, category, species or alike; the columns are image, cat, dog",
    ),
    "two classes": ("image,label,class\n1.png,a,a\n", "label and class could each be the label; the columns"),
    "same name": ("image,label,label\n1.png,a,a\n", "label and label could each be the label"),
    "two paths": ("image,path,label\n1.png,1.png,a\n", "image and path could each be the image"),
    "two splits": ("image,label,set,Split\n1.png,a,x,train\n", "set and Split could each be the split"),
    "long row": ("image,label\n1.png,a\n2.png,b,c\n", "Expected 2 fields in line 3, saw 3: check the quotes"),
    "open quote": (
        'image,label\n1.png,"a\n2.png,b\n',
        "EOF inside string starting at row 1: check the quotes",
    ),
    "no label": (
        "image,label\n1.png,a\n2.png,\n3.png, \n",
        "no class in row 3 of labels.csv, row 4 of labels.csv",
    ),
    "short row": ("image,label\n1.png,a\n2.png\n", "no class in row 3 of labels.csv: fill in or delete"),
    "no path": ("image,label\n1.png,a\n,b\n", "no path in row 3 of labels.csv"),
    "no split": (
        "image,label,split\n1.png,a,train\n2.png,a,\n",
        "no split in row 3 of labels.csv: write train",
    ),
    "odd split": (
        "image,label,split\n1.png,a,train\n2.png,a,trian\n",
        "'trian' in row 3 of labels.csv is not",
    ),
    "capitals": (
        "image,label\n1.png,cat\n2.png,dog\n\n3.png,Cat\n",
        "the classes 'cat' in row 2 of labels.csv and 'Cat' in row 5 of labels.csv differ only in capitals",
    ),
    "blanks": (
        "image,label\n1.png,cat\n2.png,cat \n",
        "the classes 'cat' in row 2 of labels.csv and 'cat ' in row 3",
    ),
    "inner blanks": (
        "image,label\n1.png,a b\n2.png, a  b\n",
        "'a b' in row 2 of labels.csv and ' a  b' in row 3",
    ),
    "two labels": (
        "image,label\n1.png,a\n./1.png,b\n",
        "'./1.png' has two classes, in row 2 of labels.csv and in",
    ),
    "leaky": (
        "image,label,split\n1.png,a,train\n2.png,a,test\n1.png,a,test\n",
        "'1.png' has two splits, in row 2 of labels.csv and in row 4 of labels.csv",
    ),
    "untrained": (
        "image,label,split\n1.png,a,train\n2.png,b,test\n",
        "do not occur in training: b; the training",
    ),
    "folder": ("image,label\n1.png,a\nsub,a\n", "'sub' in row 3 of labels.csv is a folder, not an image"),
    "text": (
        "image,label\n1.png,a\nlabels.csv,a\n",
        "'labels.csv' in row 3 of labels.csv is no image: files called .csv",
    ),
    "address": ("image,label\nhttps://x.org/1.png,a\n", "is an address: download the images"),
    "suffixes": (
        "image,label\n1.png,a\nboth,a\n",
        "'both' in row 3 of labels.csv could be the file with .jpg or .png",
    ),
    "all gone": ("image,label\na/1.png,a\na/2.png,a\n", "none of its 2 images exists, such as "),
    "latin": (
        "image,label\n1.png,a\n2.png,caf\udce9\n",
        "byte 0xe9 in line 3 is not UTF-8: save the table as CSV",
    ),
    "utf-16": ("\udcff\udcfei\0m\0", "byte 0xff in line 1 is not UTF-8"),
    "slice": ("image,label\n1.png,a\n2.png,a\n", "'validation' selects no images; use train"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_tables_that_cannot_be_read_in_one_way_get_one_clear_line(tmp_path, case):
    text, message = REFUSED[case]
    for name in ("1.png", "2.png", "3.png", "both.png", "both.jpg"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "sub").mkdir()
    if text is not None:
        (tmp_path / "labels.csv").write_bytes(text.encode("utf-8", "surrogateescape"))
    name = f"table:{tmp_path / 'labels.csv'}" + (":validation" if case == "slice" else "")
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        check_dataset_name(name)
    assert "\n" not in str(error.value) and str(error.value).startswith("table:")


def test_more_than_five_rows_are_counted(tmp_path):
    file = write_table(tmp_path / "labels.csv", ["1.png,"] * 7)
    rows = ", ".join(f"row {number} of labels.csv" for number in range(2, 7))
    with pytest.raises(ValueError, match=f"no class in {rows} and 2 more: fill in"):
        check_dataset_name(f"table:{file}")


def damaged(root, data, kind):
    pyarrow, parquet = map(pytest.importorskip, ("pyarrow", "pyarrow.parquet"))
    rows = [(root / path, label) for path, label, split in listed(root) if split == "test"]
    extra, test = data / "extra.parquet", data / "test-00000-of-00001.parquet"
    table = parquet.read_table(test)
    declared = {b"huggingface": table.schema.metadata[b"huggingface"]}

    def replace(column, values, metadata=declared):
        place = table.column_names.index(column)
        changed = table.set_column(place, column, values).replace_schema_metadata(metadata)
        parquet.write_table(changed, test)

    if kind == "shard":
        (data / "train-00001-of-00002.parquet").unlink()
    elif kind == "mixed names":
        write_parquet(extra, rows, names=["10", "cat", "dog"])
    elif kind == "other classes":
        write_parquet(test, rows, names=["cat", "10", "dog"])
    elif kind == "other kind":
        write_parquet(test, rows, names=["10", "cat", "dog"], kind="text")
    elif kind == "unused":
        for file in data.iterdir():
            file.unlink()
        write_parquet(extra, rows, names=["10", "cat", "cow", "dog"])
    elif kind == "split":
        for file in data.iterdir():
            some = parquet.read_table(file)
            parquet.write_table(some.append_column("split", pyarrow.array(["train"] * len(some))), file)
    elif kind == "beyond":
        replace("label", pyarrow.array([*range(4), *[0] * 5]))
    elif kind == "null":
        replace("label", pyarrow.array([0, None, *[1] * 7], pyarrow.int64()))
    elif kind == "floats":
        replace("label", pyarrow.array([1.0] * 9))
    elif kind == "pixels":
        replace("image", pyarrow.array([[1, 2]] * 9))
    elif kind == "metadata":
        replace("label", table["label"], {b"huggingface": b"[]"})
    elif kind == "rubbish":
        test.write_bytes(b"PAR1" + bytes(100))
    elif kind == "no shards":
        for file in data.iterdir():
            file.unlink()
        write_table(data / "labels.csv", [])
    elif kind == "excel":
        (data / "x.xlsx").write_bytes(b"PK")


@pytest.mark.parametrize(
    ("kind", "pattern", "message"),
    [
        ("shard", "", "lacks 1 of 2 files of train, such as train-00001-of-00002.parquet: copy them there"),
        ("mixed names", "", "extra.parquet is not called train, validation or test, as other files are"),
        ("other classes", "", "differ in format, columns, class names or kind of images"),
        ("other kind", "", "differ in format, columns, class names or kind of images"),
        ("unused", "", "there are no training images of cow"),
        ("split", "", "another split than in the file's name in row 0 of test-00000-of-00001.parquet, row 1"),
        ("beyond", "", "row 3 has the label 3, but class names for 0 to 2"),
        ("null", "", "no class in row 1 of test-00000-of-00001.parquet: fill in or delete"),
        ("floats", "", "the column label is double, not text or integers"),
        ("pixels", "", "the column image is list<element: int64>, not images as bytes or paths"),
        ("metadata", "", "metadata called huggingface do not describe its columns"),
        ("rubbish", "", "cannot read test-00000-of-00001.parquet: "),
        ("no shards", "", "contains no .parquet files: name the table itself, such as table:"),
        ("excel", "/x.xlsx", "cannot read x.xlsx: only .csv, .tsv and .parquet are read: save"),
        ("excel", "/*", "cannot read x.xlsx: only .csv, .tsv and .parquet are read: save"),
        ("", "/..", "contains no .parquet files: name the table itself, such as table:"),
        ("", "/../*", "is not a file"),
    ],
)
def test_parquet_that_cannot_be_read_in_one_way_gets_one_clear_line(root, kind, pattern, message):
    data = shards(root, root.parent / "data", names=["10", "cat", "dog"])
    damaged(root, data, kind)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        check_dataset_name(f"table:{data}{pattern}")
    assert "\n" not in str(error.value) and str(error.value).startswith("table:")


def test_row_groups_that_arrow_cannot_read_at_once_are_refused(root, monkeypatch):
    file = write_parquet(
        root / "all.parquet", [(root / path, label) for path, label, _ in listed(root)], group=99
    )
    monkeypatch.setattr("advtransfer.data.table_files._MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="a row group has 0.0 GB of images.* row groups of about 100 rows"):
        check_dataset_name(f"table:{file}")


def test_parquet_needs_pyarrow(root, monkeypatch):
    file = write_parquet(root / "all.parquet", [(root / path, label) for path, label, _ in listed(root)])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match="needs pyarrow: pip install pyarrow"):
        check_dataset_name(f"table:{file}")


def test_tables_are_among_the_known_datasets():
    assert "table" in datasets.OPENERS
    with pytest.raises(ValueError, match="known datasets: .*, table:/path/labels.csv"):
        check_dataset_name("nothing")
