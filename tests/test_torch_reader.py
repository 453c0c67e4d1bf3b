"""The reader of PyTorch's files against what PyTorch 2.13 wrote, and against files of other kinds."""

import collections
import functools
import hashlib
import io
import json
import os
import pickle
import re
import struct
import tracemalloc
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from damage_checkpoints import SIX, TENSOR, call, integer, name_of, tensor, text, write_legacy, write_zip

from advtransfer.torch_reader import (
    CheckpointError,
    File,
    Stub,
    open_checkpoint,
    open_file,
    tensors,
    zip_format,
)
from advtransfer.torch_reader.plain_data import PLAIN_DATA
from advtransfer.torch_reader.unpickle import unpickle

FIXTURES = Path(__file__).parent / "fixtures/checkpoints"
ZOOS = ("zoo.pt", "zoo_protocol4.pt", "zoo_legacy.pt")
DTYPES = ("float16", "float32", "float64", "bool", "complex64", "complex128", "bfloat16", "uint8", "uint16")
DTYPES += ("uint32", "uint64", "int8", "int16", "int32", "int64")


same = functools.partial(np.testing.assert_array_equal, strict=True)


def numbers(*shape, dtype="float32"):
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    return np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(kind)


def load(path):
    """What a checkpoint holds; its tensors cannot be read any more."""
    with open_checkpoint(path) as contents:
        return contents


def read(path):
    """The tensor that is the tree of a checkpoint."""
    with open_checkpoint(path) as contents:
        return contents.tree.read()


def refuse(path, match):
    """Opening the file, or reading the tensor that is its tree, says `match` in one line."""
    with pytest.raises(CheckpointError, match=match) as caught:
        read(path)
    name, message = f"{Path(path)}: ", str(caught.value)
    assert message.startswith(name) and message.removeprefix(name).isprintable()


def expect(path, want):
    """The tensor that is the file's tree, or (a text) what is said instead of it."""
    if isinstance(want, str):
        refuse(path, want)
    else:
        np.testing.assert_array_equal(read(path), want)


def in_both_formats(tmp_path, want, **changed):
    """A tensor with these changes in a zip and in a legacy file."""
    expect(write_zip(tmp_path / "a.pt", tensor(**changed)), want)
    expect(write_legacy(tmp_path / "a.pt", tensor(**changed, legacy=True)), want)


# --- what PyTorch wrote -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOOS)
def test_every_tensor_is_read_as_it_was_written(name):
    base, images = numbers(24), numbers(2, 3, 4, 5)
    truth = {
        **{"base": base, "slice": base[5:11], "rows": base.reshape(4, 6)[1:3], "strided": base[1::5]},
        **{"transposed": base.reshape(4, 6).T, "block": base.reshape(2, 3, 4)[:, 1:, ::2]},
        **{"expanded": np.full((2, 3), 7, "f4"), "scalar": np.array(2.5, "f4")},
        **{"empty": np.zeros((0, 3), "f4"), "channels_last": images, "parameter": numbers(3)},
        **{"noted_parameter": numbers(3), "noted": numbers(2), "buffer": numbers(3)},
    }
    with open_checkpoint(FIXTURES / name) as contents:
        tree = contents.tree
        for key, value in truth.items():
            array = tree[key].read()
            same(array, value)
            assert tree[key].shape == value.shape and array.flags.c_contiguous
        for dtype in DTYPES:
            assert tree["dtypes"][dtype].dtype == dtype
            same(tree["dtypes"][dtype].read(), numbers(2, 3, dtype=dtype))
        with pytest.raises(CheckpointError, match="type float8_e4m3fn are not supported"):
            tree["dtypes"]["float8_e4m3fn"].read()
        assert list(tree["module"])[:3] == ["0.weight", "0.bias", "1.weight"]
        same(tree["module"]["0.weight"].read(), numbers(4, 3, 3, 3))
    assert contents.format == ("PyTorch legacy" if "legacy" in name else "PyTorch zip")
    assert contents.stubs == ("torch.float8_e4m3fn",)
    assert tree["plain"] == [None, True, 3, -(2**40), 2.5, "text é", b"bytes", (1, 2), [3], 1 + 2j]
    assert tree["default"] == {"a": [1]} and 1 not in tree  # of the keys only text is kept
    assert tree["numpy"] == (76.5, 0.25, -7, True) and type(tree["numpy"][3]) is bool
    assert tree["torch"][:2] == ((1, 2), "cpu") and tree["torch"][2].name == "torch.float32"


class Thing:
    """What is not plain data."""


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_of_every_protocol_as_python_itself_reads_it(protocol):
    def read(value):
        return unpickle(io.BytesIO(pickle.dumps(value, protocol)), PLAIN_DATA)

    numbers = (0, 255, 256, -1, 2**31, -(2**63), 2**80, 2.5, 1 + 2j)
    texts = ("text é", "a\nb\\", b"\x00\xff", b"")
    several = ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], [1, [2]], {"a": {"b": 1}})
    for value in (None, True, False, *numbers, *texts, *several):
        found, stubbed = read(value)
        assert type(found) is type(value) and found == value and not stubbed, value
    mappings = (collections.OrderedDict(a=1, b=[2]), collections.defaultdict(list, a=[1]))
    for value in (*mappings, collections.Counter("aab"), {"b": 2, 3: 4}):
        assert read(value) == ({key: x for key, x in value.items() if type(key) is str}, set())
    assert read({1}) == read(frozenset({1})) == ([1], set()) and read(set()) == ([], set())
    assert read(bytearray(b"ab\xe9")) == (b"ab\xe9", set())
    for code in (">f8", ">i4", "<f4", "i1", "u8", "f2", "?"):
        value = np.array(77, code)[()]
        found, stubbed = read(value)
        assert type(found) is type(value.item()) and found == value.item() and not stubbed, code
    found, stubbed = read([np.dtype("float32"), Thing()])
    assert [stub.name for stub in found] == ["numpy.dtype", f"{__name__}.Thing"]
    assert stubbed == {f"{__name__}.Thing"}


def test_python_2_s_constructors():
    def read(operations):
        return unpickle(io.BytesIO(operations + b"."), PLAIN_DATA)

    two, pairs = b"](K\x01K\x02e", b"](](" + text("a") + b"K\x01ee"
    assert read(call("__builtin__.tuple", two)) == ((1, 2), set())
    assert read(call("__builtin__.list", two)) == read(call("__builtin__.set", two)) == ([1, 2], set())
    assert read(call("__builtin__.bytes")) == (b"", set())
    assert read(call("__builtin__.dict", b"}" + text("a") + b"K\x01s")) == ({"a": 1}, set())
    assert read(call("collections.OrderedDict", pairs)) == ({"a": 1}, set())
    for name, argument in (("tuple", b"K\x01"), ("bytes", b"K\x01"), ("dict", two), ("complex", two)):
        found, stubbed = read(call(f"__builtin__.{name}", argument))
        assert found.name == f"__builtin__.{name}" and stubbed == {found.name}


@pytest.mark.parametrize("name", ["little_endian.pt", "big_endian.pt", "no_crc.pt"])
def test_either_byte_order_and_files_without_checksums(name):
    with open_checkpoint(FIXTURES / name) as contents:
        truth = {"weight": numbers(4, 6), "view": numbers(4, 6).T[1:]}
        for dtype in ("float16", "bfloat16", "float64", "int64", "complex64", "bool"):
            truth[dtype] = numbers(2, 3, dtype=dtype)
        for key, value in truth.items():
            same(contents.tree[key].read(), value)


@pytest.mark.parametrize("name", ["training.pt", "training_legacy.pt"])
def test_a_training_state_pickled_with_dill(name):
    with open_checkpoint(FIXTURES / name) as contents:
        tree = contents.tree
        same(tree["model"]["module.0.weight"].read(), numbers(4, 3, 3, 3))
        same(tree["model"]["module.1.running_var"].read(), numbers(4))
        assert tree["nat_prec1"].read() == 57.5 and tree["adv_prec1"] == 33.25 and tree["epoch"] == 7
        assert tree["optimizer"]["state"] == {}  # its keys are numbers
    assert isinstance(tree["args"], Stub) and isinstance(tree["schedule"]["function"], Stub)
    assert {"dill._dill._create_function", "dill._dill._create_type"} < set(contents.stubs)
    assert all(name.startswith(("dill.", "__builtin__.", "__main__.")) for name in contents.stubs)


def test_whole_modules_and_classes_keep_their_names(tmp_path):
    contents = load(FIXTURES / "whole_module.pt")
    assert isinstance(contents.tree, Stub) and contents.tree.name == "torch.nn.modules.linear.Linear"
    assert contents.stubs == ("torch.nn.modules.linear.Linear",)
    with_source = reference(text("module"), name_of("my.Net"), text("net.py"), text("class Net: ..."))
    contents = load(write_legacy(tmp_path / "a.pt", b"](" + with_source + tensor(legacy=True) + b"e"))
    assert contents.tree[0].name == "my.Net" and contents.stubs == ("my.Net",)


def test_shared_memory_is_known_without_reading(tmp_path):
    tree, again = (load(FIXTURES / "little_endian.pt").tree for _ in range(2))
    assert tree["weight"].same_memory(tree["weight"])
    for other in (tree["view"], tree["scalar"], again["weight"]):
        assert not tree["weight"].same_memory(other)
    with pytest.raises(CheckpointError, match="the file is closed"):
        tree["weight"].read()
    three = b"](" + tensor() + tensor() + tensor(shape=(3,), strides=(1,)) + b"e"
    first, second, part = load(write_zip(tmp_path / "a.pt", three)).tree
    assert first is not second and first.same_memory(second) and not first.same_memory(part)


@pytest.mark.parametrize("legacy", [False, True])
def test_random_views_against_the_pytorch_that_is_here(tmp_path, legacy):
    torch = pytest.importorskip("torch")
    rng, saved = np.random.default_rng(0), {}
    for index in range(60):
        kind = (torch.float32, torch.float16, torch.bfloat16, torch.int64)[index % 4]
        base = torch.arange(120).to(kind).reshape(2, 3, 4, 5).permute(*rng.permutation(4).tolist())
        for axis in range(4):
            first, step = (int(x) for x in rng.integers(1, 3, 2))
            base = base.transpose(0, axis)[first - 1 :: step].transpose(0, axis)
        saved[str(index)] = torch.nn.Parameter(base, requires_grad=False) if index % 3 else base
    torch.save(saved, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    with open_checkpoint(tmp_path / "a.pt") as contents:
        assert list(contents.tree) == list(saved) and contents.stubs == ()
        for name, value in saved.items():
            array = contents.tree[name].read()
            assert f"torch.{contents.tree[name].dtype}" == str(value.dtype)
            same(array.astype(np.float64), value.double().numpy())


# --- safetensors --------------------------------------------------------------------------------------------


def write_safetensors(path, header, data=b"", length=None):
    header = header.encode() if isinstance(header, str) else header
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def entry(name, dtype="F32", shape=(2,), offsets=(0, 8), more=""):
    fields = f'"dtype":{json.dumps(dtype)},"shape":{json.dumps(shape)},"data_offsets":{json.dumps(offsets)}'
    return f'"{name}":{{{fields}{more}}}'


def test_safetensors_by_their_own_library():
    with open_checkpoint(FIXTURES / "zoo.safetensors") as contents:
        for dtype in set(DTYPES) - {"complex128"}:
            same(contents.tree[dtype].read(), numbers(2, 3, dtype=dtype))
        with pytest.raises(CheckpointError, match="type float8_e4m3fn are not supported"):
            contents.tree["float8_e4m3fn"].read()
    assert contents.format == "safetensors" and contents.metadata == {"format": "pt"}


def header(*parts):
    return "{" + ",".join(parts) + "}"


A, B, C = entry("a"), entry("b", offsets=(8, 16)), entry("b")
BEFORE = '"__metadata__":{"a":"b"}'
GOOD = {  # header, bytes of data
    "two": (header(A, B), 16),
    "in another order": (header(B, A) + "  ", 16),
    "with metadata": (header(BEFORE, A), 8),
    "metadata null": (header('"__metadata__": null', A), 8),
    "nothing": ("{}", 0),
    "of no elements": (header(entry("a", shape=(0, 3), offsets=(0, 0)), C), 8),
    "a scalar": (header(entry("a", shape=(), offsets=(0, 4))), 4),
    "half bytes": (header(entry("a", "F4", (2, 3), (0, 3))), 3),
}
BAD = {
    "a gap first": (header(B), 16),
    "a gap between": (header(A, entry("b", offsets=(12, 20))), 20),
    "a gap between, reaching out": (header(A, entry("b", offsets=(12, 20))), 16),
    "a gap last": (header(A), 9),
    "an overlap": (header(A, entry("b", offsets=(4, 12))), 12),
    "an overlap, and a gap": (header(A, entry("b", offsets=(4, 12))), 16),
    "the same place": (header(A, C), 8),
    "data cut off": (header(A, B), 15),
    "too few bytes": (header(entry("a", offsets=(0, 7))), 7),
    "too many bytes": (header(entry("a", offsets=(0, 9))), 9),
    "backwards": (header(entry("a", "U8", (0,), (8, 0))), 8),
    "negative offsets": (header(entry("a", offsets=(-8, 0))), 0),
    "negative sizes": (header(entry("a", shape=(-2, -1))), 8),
    "a fraction": (header(entry("a", shape=(2.0,))), 8),
    "true": (header(entry("a", "F64", (True,))), 8),
    "a text as a size": (header(entry("a", shape=("2",))), 8),
    "no list": (header(entry("a", shape=2)), 8),
    "three offsets": (header(entry("a", offsets=(0, 8, 16))), 8),
    "one offset": (header(entry("a", offsets=(0,))), 8),
    "sizes that overflow": (header(entry("a", shape=(2**62, 4, 2))), 8),
    "a huge size": (header(entry("a", shape=(0, 2**64), offsets=(0, 0))), 0),
    "half a byte": (header(entry("a", "F4", (3,), (0, 2))), 2),
    "an unknown dtype": (header(entry("a", "F33")), 8),
    "no dtype": (header(entry("a", None)), 8),
    "a field missing": ('{"a":{"dtype":"F32","shape":[2]}}', 8),
    "a field twice": (header(entry("a", more=',"shape":[2]')), 8),
    "a list": ('{"a":[]}', 0),
    "metadata of numbers": (header('"__metadata__":{"a":1}', A), 8),
    "metadata as a list": (header('"__metadata__":["a"]', A), 8),
    "metadata twice": (header(BEFORE, BEFORE, A), 8),
    "no JSON": ("{abc", 0),
    "something behind": (header(A) + "x", 8),
    "a comma too many": (header(A, ""), 8),
    "a control character": (header(entry("\1")), 8),
    "a lone surrogate": (header(entry(r"\ud800")), 8),
    "a lone surrogate in metadata": (header(r'"__metadata__":{"a":"\ud800"}', A), 8),
    "no UTF-8": (header(entry("é")).encode("latin-1"), 8),
    "UTF-16": (header(A).encode("utf-16-le"), 8),
    "nested deep": ('{"a":' + "[" * 100_000, 0),
}
STRICTER = {  # than the library
    "a name twice": (header(A, A), 8),
    "an unknown field": (header(entry("a", more=',"other":5')), 8),
    "33 dimensions": (header(entry("a", shape=(1,) * 32 + (2,))), 8),
    "a long header": (header(A).ljust(2**21 + 1), 8),
}


@pytest.mark.parametrize("name", [*GOOD, *BAD, *STRICTER])
def test_safetensors_headers_are_refused_as_by_their_own_library(tmp_path, name):
    library = pytest.importorskip("safetensors")
    text, size = (GOOD | BAD | STRICTER)[name]
    data = bytes(range(size))
    path = write_safetensors(tmp_path / "a.safetensors", text, data)
    if name in BAD:
        with pytest.raises(library.SafetensorError):
            library.safe_open(path, "numpy")
    if name not in GOOD:
        return refuse(path, "a (truncated or )?damaged safetensors file[:,] ")
    with open_checkpoint(path) as contents, library.safe_open(path, "numpy") as file:
        assert contents.metadata == (file.metadata() or {}) and set(contents.tree) == set(file.keys())
        for key, tensor in contents.tree.items():
            assert tensor.shape == tuple(file.get_slice(key).get_shape())
            if tensor.dtype == "float32":
                same(tensor.read(), file.get_tensor(key))


@pytest.mark.parametrize("length", [0x80, 0x100 + ord("P"), 2**21, 2**21 + 1])
def test_a_safetensors_header_of_any_length(tmp_path, length):
    """The file begins with that length, whose bytes may be those that other formats begin with."""
    path = write_safetensors(tmp_path / "a", header(A).ljust(length), np.float32([1.5, -2]).tobytes())
    if length > 2**21:
        return refuse(path, "safetensors file: .* with a header of 2,097,153")
    with open_checkpoint(path) as contents:
        same(contents.tree["a"].read(), np.float32([1.5, -2]))
    refuse(write_safetensors(path, "{}", length=3), "damaged safetensors file: 10 bytes with a header of 3")


def test_a_file_is_read_once_whatever_the_number_of_its_tensors(tmp_path, monkeypatch):
    entries = [entry(f"a{i}", offsets=(8 * i, 8 * i + 8)) for i in range(300)]
    note = '"__metadata__":{"note":"' + "x" * 100_000 + '"}'
    values = np.arange(600, dtype="<f4").reshape(300, 2)
    path = write_safetensors(tmp_path / "a", header(note, *entries), values.tobytes())
    sizes, file_read = [], File.read
    monkeypatch.setattr(File, "read", lambda file, start, n: sizes.append(n) or file_read(file, start, n))
    with open_checkpoint(path) as contents:
        arrays = [contents.tree[f"a{i}"].read() for i in range(300)]
    same(arrays, values)
    assert sum(sizes) < path.stat().st_size + 2048


# --- how much is read ---------------------------------------------------------------------------------------


class Slow:
    """A file that gives three bytes at a time, and no more than it has."""

    closed = False

    def __init__(self, data):
        self.data, self.place = data, 0

    def seek(self, place):
        self.place = place

    def readinto(self, view):
        piece = self.data[self.place : self.place + min(3, len(view))]
        view[: len(piece)] = piece
        self.place += len(piece)
        return len(piece)


def test_files_are_read_in_as_many_pieces_as_they_come():
    data = bytes(range(20))
    file = File(Path("a.pt"), Slow(data), 20)
    for start, size in ((0, 20), (4, 7), (13, 7), (20, 0)):
        assert file.read(start, size).tobytes() == data[start : start + size]
    for start, size in ((-1, 2), (14, 7)):
        with pytest.raises(CheckpointError, match="truncated: it has 20 bytes"):
            file.read(start, size)
    with pytest.raises(CheckpointError, match="became shorter while it was read"):
        File(Path("a.pt"), Slow(data[:16]), 20).read(4, 16)


def test_the_hash_of_a_file(tmp_path):
    for data, start in (
        (b"abc", "ba7816bf8f01cfea414140de5dae2223"),  # FIPS 180-2, appendix B.1
        (b"a" * 1_000_000, "cdc76e5c9914fb9281a1c7e284d73e67"),  # appendix B.3
        (b"ab" * 2**21 + b"c", hashlib.sha256(b"ab" * 2**21 + b"c").hexdigest()),  # more than one piece
    ):
        (tmp_path / "a").write_bytes(data)
        with open_file(tmp_path / "a") as file:
            assert file.sha256().startswith(start)


@pytest.mark.parametrize("piece", [5, 8, 1 << 20])  # of 24 bytes
def test_a_damaged_storage_matters_to_who_reads_any_of_it(tmp_path, monkeypatch, piece):
    """Its neighbours are still good; the checksum is that of the whole storage, and is taken once."""
    monkeypatch.setattr(tensors, "_CHUNK", piece)
    parts = [tensor(shape=(1,), strides=(1,)), tensor(offset=5, shape=(), strides=())] * 20
    path = write_zip(tmp_path / "a.pt", b"](" + tensor(key="1") + b"".join(parts) + b"e", (SIX, SIX[::-1]))
    summed, crc32 = [], tensors.zlib.crc32
    for damaged in (False, True):
        if damaged:
            path.write_bytes(path.read_bytes().replace(SIX, SIX[:-1] + b"x"))
        with open_checkpoint(path) as contents, monkeypatch.context() as patch:
            other, *values = contents.tree
            assert other.read().tobytes() == SIX[::-1]
            patch.setattr(tensors.zlib, "crc32", lambda d, *first: summed.append(len(d)) or crc32(d, *first))
            for value in values:
                if damaged:
                    with pytest.raises(CheckpointError, match="storage 0 is damaged"):
                        value.read()
                else:
                    assert value.read() == (5 if value.shape == () else 0)
    assert sum(summed) == 2 * len(SIX)
    path = write_zip(tmp_path / "a.pt", text("epoch"))
    path.write_bytes(path.read_bytes().replace(b"epoch", b"epoxy"))
    refuse(path, "its data.pkl is damaged")


def write_with_a_hole(path, operations, count, last=None):
    """A legacy file whose storage has `count` floats: six, then a hole, and in it `last`, (place, value)."""
    write_legacy(path, operations)
    path.write_bytes(path.read_bytes().replace(struct.pack("<q", 6), struct.pack("<q", count)))
    os.truncate(path, path.stat().st_size + 4 * count - len(SIX))
    if last is not None:
        position, value = last
        with open(path, "r+b") as file:
            file.seek(path.stat().st_size - 4 * (count - position))
            file.write(struct.pack("<f", value))
    return path


def test_few_numbers_of_a_large_storage(tmp_path):
    path = write_with_a_hole(tmp_path / "a.pt", tensor(numel=2**28, legacy=True), 2**28)
    tracemalloc.start()
    expect(path, numbers(2, 3))
    assert tracemalloc.get_traced_memory()[1] < 40e6
    tracemalloc.stop()
    os.truncate(path, path.stat().st_size - 1)
    refuse(path, "truncated: it has 1,0.* bytes")
    limit = 4 * 2 + 4_194_304  # of the distance of two numbers
    for span, want in ((limit, [0, 2.5]), (limit + 1, "2 elements spread over 4,194,313 is absurd")):
        operations = tensor(numel=2**23, shape=(2,), strides=(span - 1,), legacy=True)
        expect(write_with_a_hole(path, operations, 2**23, (span - 1, 2.5)), want)


# --- sizes that lie -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "want"),
    [
        ({}, numbers(2, 3)),
        ({"shape": (3, 2), "strides": (1, 3)}, numbers(2, 3).T),
        ({"shape": (1,) * 32, "strides": (1,) * 32}, np.zeros((1,) * 32)),
        ({"numel": 2**40, "shape": (2**40,), "strides": (1,)}, "not the 4,398,046,511,104|has 6 elements"),
        ({"shape": (2**40,), "strides": (0,)}, "absurd"),
        ({"shape": (2**20, 2**20, 2**20), "strides": (0, 0, 0)}, "absurd"),
        ({"shape": (0, 2**59), "strides": (1, 1)}, "absurd"),
        ({"shape": (7,), "strides": (1,)}, "reaches 7 elements into a storage of 6"),
        ({"offset": 1}, "reaches 7 elements into a storage of 6"),
        ({"offset": 2**59}, "into a storage of 6"),
        ({"strides": (-1, 1)}, "are not sizes"),
        ({"shape": (-2, -3)}, "are not sizes"),
        ({"offset": -1}, "are not sizes"),
        ({"shape": (6,)}, "are not sizes"),
        ({"shape": (1,) * 33, "strides": (1,) * 33}, "at most 32"),
        ({"shape": (1,), "strides": (2**60,)}, "are not sizes"),
        ({"numel": 5, "shape": (5,), "strides": (1,)}, "storage 0"),
        ({"key": "7"}, "storage 7 is not in the file|list of storages does not name"),
        ({"key": "../../etc/passwd"}, "storage"),
        ({"key": "0\x1b[2J"}, "refers to a storage in a way that PyTorch does not"),
        ({"kind": "torch.DoubleStorage"}, "storage 0 has 24 bytes|truncated"),
    ],
)
def test_tensors_that_do_not_fit_their_storage(tmp_path, change, want):
    in_both_formats(tmp_path, want, **change)


def test_a_tensor_may_have_as_many_numbers_as_its_storage_or_the_limit(tmp_path, monkeypatch):
    expect(write_zip(tmp_path / "a.pt", tensor(shape=(2**21, 2), strides=(0, 1))), [[0, 1]] * 2**21)
    refuse(write_zip(tmp_path / "a.pt", tensor(shape=(2**21, 3), strides=(0, 1))), "absurd")
    for limit, count, want in (
        (5, 6, np.arange(6)),
        (5, 7, "absurd"),
        (7, 7, np.zeros(7)),
        (7, 8, "absurd"),
    ):
        monkeypatch.setattr(tensors, "_MAX_EXPANDED", limit)
        expect(write_zip(tmp_path / "a.pt", tensor(shape=(count,), strides=(int(count == 6),))), want)


def test_any_byte_but_zero_is_true(tmp_path):
    """As NumPy's bools they would be other numbers than 1."""
    raw = bytes([0, 1, 2, 255, 0, 128])
    values = read(write_zip(tmp_path / "a.pt", tensor(kind="torch.BoolStorage"), (raw,)))
    same(values.view(np.uint8), np.uint8([[0, 1, 1], [1, 0, 1]]))
    path = write_safetensors(tmp_path / "a", header(entry("a", "BOOL", (6,), (0, 6))), raw)
    with open_checkpoint(path) as contents:
        same(contents.tree["a"].read().view(np.uint8), np.uint8([0, 1, 1, 1, 0, 1]))


@pytest.mark.parametrize(
    ("kind", "itemsize"), [("QInt8", 1), ("QUInt8", 1), ("QUInt4x2", 1), ("QUInt2x4", 1), ("QInt32", 4)]
)
def test_quantised_storages_are_known_and_not_read(tmp_path, kind, itemsize):
    count = len(SIX) // itemsize
    quantised = tensor(numel=count, shape=(count,), strides=(1,), kind=f"torch.{kind}Storage")
    path = write_zip(tmp_path / "a.pt", quantised)
    assert load(path).tree.shape == (count,)
    refuse(path, f"tensors of type {kind.lower()} are not supported")


# --- storages and what is made of them ----------------------------------------------------------------------


def reference(*parts):
    """The operations of a reference to a storage."""
    return b"(" + b"".join(parts) + b"tQ"


ID = (text("storage"), name_of("torch.FloatStorage"), text("0"), text("cpu"), b"K\x06")


def test_storages_that_are_referred_to_in_another_way(tmp_path):
    path, message = tmp_path / "a.pt", "refers to (data|a storage) in a way that PyTorch does not"
    for operations in (
        reference(*ID[:4]),
        reference(text("other"), *ID[1:]),
        reference(ID[0], text("torch.FloatStorage"), *ID[2:]),
        reference(*ID[:2], b"K\x00", *ID[3:]),
        reference(*ID[:4], b"G" + struct.pack(">d", 6)),
        reference(*ID[:4], integer(-1)),
        reference(*ID[:4], integer(2**60)),
        reference(text("module")),
        reference(text("module"), b"K\x05"),
        reference(text("other"), name_of("os.system")),
    ):
        refuse(write_zip(path, operations), message)
        for legacy in (operations, operations.replace(b"tQ", b"NtQ")):
            refuse(write_legacy(path, legacy), message)
    for kind in ("os.FloatStorage", "torch.FooStorage"):
        stub = load(write_zip(path, reference(ID[0], name_of(kind), *ID[2:]))).tree
        assert isinstance(stub, Stub) and stub.name == kind
        legacy = write_legacy(path, reference(ID[0], name_of(kind), *ID[2:], b"N"))
        refuse(legacy, f"its storages of type {kind} are not supported")
    for other in ({"kind": "torch.IntStorage"}, {"numel": 5, "shape": (5,), "strides": (1,)}):
        for legacy, write in ((False, write_zip), (True, write_legacy)):
            two = b"](" + tensor(legacy=legacy) + tensor(**other, legacy=legacy) + b"e"
            refuse(write(path, two), "storage 0 is described in two ways")


def test_legacy_views_of_a_storage(tmp_path):
    """Before PyTorch 0.4 a storage could be elements 2 to 5 of another one."""
    for view, want in (
        (text("1") + b"K\x02K\x04", [3, 4, 5]),
        (text("1") + b"K\x03K\x04", "a view reaches out of storage 0"),
        (text("1") + integer(-1) + b"K\x02", "a view reaches out of storage 0"),
        (text("1") + b"K\x02" + integer(-1), "a view reaches out of storage 0"),
        (text("1") + text("2") + b"K\x02", "a view reaches out of storage 0"),
        (text("1") + b"K\x02" + text("2"), "a view reaches out of storage 0"),
        (text("1") + b"K\x02", "the view of storage 0 has an unknown form"),
        (b"K\x05", "the view of storage 0 has an unknown form"),
    ):
        storage = reference(*ID, b"(" + view + b"t")
        one = call("torch._utils._rebuild_tensor", storage, b"K\x01", b"K\x03\x85", b"K\x01\x85")
        expect(write_legacy(tmp_path / "a.pt", one), want)
    refuse(write_legacy(tmp_path / "a.pt", reference(*ID, b"K\x05")), "has an unknown form")


def test_the_pickles_around_a_legacy_tree(tmp_path):
    path = write_legacy(tmp_path / "a.pt", tensor(legacy=True))
    good = path.read_bytes()
    path.write_bytes(good.replace(pickle.dumps(1001, 2), pickle.dumps(1002, 2)))
    refuse(path, "of an unknown protocol: save it again with a newer PyTorch")
    for keys in ("0", {"0": 0}, [0], ["0", 0]):
        path.write_bytes(good.replace(pickle.dumps(["0"], 2), pickle.dumps(keys, 2)))
        refuse(path, "its list of storages is damaged")
    path.write_bytes(good.replace(pickle.dumps(["0"], 2), pickle.dumps(["0", "0"], 2)) + good[-32:])
    refuse(path, "does not name those that its tensors use, each once")


def test_what_is_made_of_too_few_or_other_arguments_is_a_stub(tmp_path):
    path, v3, from_type = tmp_path / "a.pt", TENSOR.replace("v2", "v3"), "torch._tensor._rebuild_from_type_v2"
    sizes = (reference(*ID), b"K\x00", b"K\x02K\x03\x86", b"K\x03K\x01\x86")
    whole = (*sizes, b"\x89", b"N", name_of("torch.float32"))
    inner = b"(" + b"".join(sizes) + b"t"
    typed = (name_of(TENSOR), name_of("my.Tensor"), inner)
    parameter = "torch._utils._rebuild_parameter"
    cases = [
        *((TENSOR, sizes[:n], n == 4) for n in range(5)),
        *((v3, whole[:n], n == 7) for n in range(3, 8)),
        (parameter, (tensor(), b"\x88", b"}"), True),
        (parameter, (), False),
        (parameter, (b"K\x05",), False),
        (from_type, (*typed, b"}"), True),
        (from_type, typed, True),
        (from_type, typed[:2], False),
        (from_type, (text("f"), *typed[1:]), False),
        (from_type, (*typed[:2], b"]"), False),
        (from_type, (name_of("os.system"), *typed[1:]), False),
    ]
    for word in ("neg", "conj"):  # a lazily negated or conjugated view is not what its storage holds
        for name, arguments in ((TENSOR, whole[:6]), (v3, whole)):
            cases += [
                (name, (*arguments, b"}"), True),
                (name, (*arguments, b"}" + text(word) + b"\x88s"), False),
            ]
    for name, arguments, good in cases:
        write_zip(path, call(name, *arguments))
        if good:
            expect(path, numbers(2, 3))
        else:
            contents = load(path)
            assert isinstance(contents.tree, Stub) and name in contents.stubs, (name, arguments)
    for name, argument, value in (("torch.Size", b"K\x02\x85", (2,)), ("torch.device", text("cpu"), "cpu")):
        assert load(write_zip(path, call(name, argument))).tree == value
        for arguments in ((), (b"K\x05",)):
            assert isinstance(load(write_zip(path, call(name, *arguments))).tree, Stub)


# --- zip files ----------------------------------------------------------------------------------------------


def test_zip_bombs_and_records_out_of_place(tmp_path):
    path = tmp_path / "a.pt"
    refuse(write_zip(path, tensor(), method=zipfile.ZIP_DEFLATED), "compressed")
    good = write_zip(path, tensor()).read_bytes()
    first = good.index(b"PK\1\2")  # of data.pkl
    entry, end = good.index(b"PK\1\2", first + 1), good.index(b"PK\5\6")
    for place, value, want in (
        (entry + 42, 0, "overlap"),  # where the record begins
        (entry + 42, 2**31, "overlap"),
        (entry + 42, 1, "overlap|not where it should be"),
        (entry + 20, 2**31, "overlap"),  # its compressed size
        (entry + 24, 2**31, "not where it should be"),  # its size
        (entry + 16, 5, "storage 0 is damaged"),  # its CRC-32
        (end + 12, 2**31, "truncated or damaged zip file|directory"),  # the size of the directory
        (first + 8, 1, r"compressed or encrypted records \(archive/data.pkl\)"),  # flags and method
        (first + 8, 2, numbers(2, 3)),
    ):
        path.write_bytes(good[:place] + struct.pack("<I", value) + good[place + 4 :])
        expect(path, want)
    path.write_bytes(good.replace(b"archive/data/0", b"archive/data/1"))
    refuse(path, "storage 0 is not in the file")
    two = write_zip(path, tensor(), (SIX, SIX)).read_bytes()
    path.write_bytes(two.replace(b"archive/data/1", b"archive/data/0"))
    refuse(path, "a damaged zip file: two records have one name")
    for order, want in (
        (b"little", numbers(2, 3)),
        (b"middle", "its byte order is neither little nor big"),
        (b"little or so big", "its byte order is neither little nor big"),
        (b"little and or big", "its byteorder has 17 bytes; at most 16 are read"),
    ):
        with zipfile.ZipFile(write_zip(path, tensor()), "a") as archive:
            archive.writestr("archive/byteorder", order)
        expect(path, want)


@pytest.mark.parametrize("count", [0, 1, 3, 4])
def test_what_another_zip_file_holds(tmp_path, count):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        for i in range(count):
            archive.writestr(f"{i}.txt", "")
    names = {0: "nothing", 1: "0.txt", 3: "0.txt, 1.txt, 2.txt", 4: "0.txt, 1.txt, 2.txt, ..."}[count]
    refuse(tmp_path / "a.pt", f"a zip file that PyTorch did not save: it holds {re.escape(names)}$")


def test_a_zip_directory_is_read_up_to_a_limit(tmp_path, monkeypatch):
    """However large the file says that it is."""
    path = tmp_path / "a.pt"
    sizes = []
    for count in (0, 40):
        operations = b"](" + b"".join(tensor(key=str(i)) for i in range(count)) + b"e"
        data = write_zip(path, operations, (SIX,) * count).read_bytes()
        sizes.append(data.index(b"PK\5\6") - data.index(b"PK\1\2"))
    monkeypatch.setattr(zip_format, "_MAX_DIRECTORY", sizes[1])
    assert len(load(path).tree) == 40
    monkeypatch.setattr(zip_format, "_MAX_DIRECTORY", sizes[1] - 1)
    refuse(path, f"a directory of more than {sizes[1] - 1:,} bytes")
    path.write_bytes(b"PK")
    os.truncate(path, 2**30)  # a hole
    with open(path, "ab") as file:
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 2**30, 0, 0))
    tracemalloc.start()
    refuse(path, f"a directory of more than {sizes[1] - 1:,} bytes")
    assert tracemalloc.get_traced_memory()[1] < 40e6
    tracemalloc.stop()


# --- files that are something else --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["little_endian.pt", "training_legacy.pt", "zoo.safetensors"])
def test_every_truncation_is_refused(tmp_path, name):
    data, path = (FIXTURES / name).read_bytes(), tmp_path / "a.pt"
    for size in [*range(1, len(data), 37), len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError):
            load(path)
    path.write_bytes(data[:-1])
    refuse(path, f"{len(data) - 1:,} bytes|of {len(data) - 1:,}: download it again")


FOUND = {
    "HTML": (b"\n<!DOCTYPE html><title>Drive -\n &lt;5&gt;</title>", 'titled "Drive - <5>", not weights'),
    "old HTML": (b"<HTML><BODY>404", "an HTML page, not weights"),
    "XML": (b"<?xml version='1.0'?><Error>AccessDenied", "an XML answer of a server"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "a git-lfs pointer"),
    "empty": (b"", "an empty file"),
    "gzip": (b"\x1f\x8b\x08" + bytes(50), "a gzip archive"),
    "tar": (b"weights".ljust(257, b"\0") + b"ustar\x0000", "a tar archive"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(50), "an HDF5 file"),
    "numpy": (b"\x93NUMPY" + bytes(50), "a numpy array"),
    "pickle": (pickle.dumps({"a": 1}), "an ordinary pickle"),
    "magic number far behind": (pickle.dumps([bytes(64), 0x1950A86A20F9469CFC6C], 2), "an ordinary pickle"),
    "zeros": (bytes(100), "begins with the bytes 00 00"),
    "text": (b"hello", "begins with the bytes 68 65"),
    "header": (struct.pack("<Q", 2**40) + b"{}", "damaged safetensors file"),
}


@pytest.mark.parametrize("name", list(FOUND))
def test_what_is_no_checkpoint_is_named(tmp_path, name):
    data, message = FOUND[name]
    (tmp_path / "a.pt").write_bytes(data)
    refuse(tmp_path / "a.pt", re.escape(message))


def test_what_is_no_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop.pt").symlink_to("loop.pt")
    for path, message in (
        (tmp_path, "a folder, not a file"),
        ("", "a folder, not a file"),
        (tmp_path / "none.pt", "there is no such file$"),
        ("https://host/resnet50.pth", "there is no such file; it looks like a URL: download it"),
        (tmp_path / "a.pt" / "\0", "cannot be opened|no such file"),
        ("a" * 300 + ".pt", "cannot be opened"),
        (tmp_path / "loop.pt", "cannot be opened"),
        (tmp_path / "pipe", "not a regular file"),
        ("/dev/null", "not a regular file"),
        ("/proc/self/mem", "an empty file|cannot be read|not a regular file|there is no such file"),
        (FIXTURES / "torchscript.pt", "a TorchScript archive"),
    ):
        refuse(path, message)
