"""The reader of PyTorch's files against what PyTorch 2.13 wrote, and against files of other kinds."""

import collections
import hashlib
import io
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

from advtransfer.torch_checkpoint import tensors
from advtransfer.torch_checkpoint.plain_data import PLAIN_DATA
from advtransfer.torch_checkpoint.reader import CheckpointError, Stub, file_sha256, open_checkpoint, open_file
from advtransfer.torch_checkpoint.unpickle import unpickle

FIXTURES = Path(__file__).parent / "fixtures/checkpoints"
ZOOS = ("zoo.pt", "zoo_protocol4.pt", "zoo_legacy.pt")
DTYPES = ("float16", "float32", "float64", "bool", "complex64", "complex128", "bfloat16", "uint8", "uint16")
DTYPES += ("uint32", "uint64", "int8", "int16", "int32", "int64")


def numbers(*shape, dtype="float32"):
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    return np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(kind)


def load(path):
    with open_checkpoint(path) as contents:
        return contents


def refuse(path, match):
    """Opening the file, or reading the tensor that is its tree, says `match` in one line."""
    with pytest.raises(CheckpointError, match=match) as caught, open_checkpoint(path) as contents:
        contents.tree.read()
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


# --- what PyTorch wrote -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOOS)
def test_every_tensor_is_read_as_it_was_written(name):
    base, images = numbers(24), numbers(2, 3, 4, 5)
    truth = {
        **{"base": base, "slice": base[5:11], "rows": base.reshape(4, 6)[1:3], "strided": base[1::5]},
        "transposed": base.reshape(4, 6).T,
        "block": base.reshape(2, 3, 4)[:, 1:, ::2],
        **{
            "expanded": np.full((2, 3), 7, "f4"),
            "scalar": np.array(2.5, "f4"),
            "empty": np.zeros((0, 3), "f4"),
        },
        **{"channels_last": images, "parameter": numbers(3), "noted_parameter": numbers(3)},
        **{"noted": numbers(2), "buffer": numbers(3)},
    }
    with open_checkpoint(FIXTURES / name) as contents:
        tree = contents.tree
        for key, value in truth.items():
            read = tree[key].read()
            np.testing.assert_array_equal(read, value, strict=True)
            assert tree[key].shape == value.shape and read.flags.c_contiguous
        for dtype in DTYPES:
            assert tree["dtypes"][dtype].dtype == dtype
            np.testing.assert_array_equal(
                tree["dtypes"][dtype].read(), numbers(2, 3, dtype=dtype), strict=True
            )
        with pytest.raises(CheckpointError, match="type float8_e4m3fn are not supported"):
            tree["dtypes"]["float8_e4m3fn"].read()
        module = tree["module"]
        assert list(module)[:3] == ["0.weight", "0.bias", "1.weight"]
        np.testing.assert_array_equal(module["0.weight"].read(), numbers(4, 3, 3, 3))
    assert contents.format == ("PyTorch legacy" if "legacy" in name else "PyTorch zip")
    assert contents.stubs == ("torch.float8_e4m3fn",)


@pytest.mark.parametrize("name", ZOOS)
def test_what_is_no_tensor_is_plain_data(name):
    tree = load(FIXTURES / name).tree
    assert tree["plain"] == [None, True, 3, -(2**40), 2.5, "text é", b"bytes", (1, 2), [3], 1 + 2j]
    assert tree["default"] == {"a": [1]} and 1 not in tree  # of the keys only text is kept
    assert tree["numpy"] == (76.5, 0.25, -7, True) and type(tree["numpy"][3]) is bool
    assert tree["torch"][:2] == ((1, 2), "cpu") and tree["torch"][2].name == "torch.float32"


class Thing:
    """What is no plain data."""


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

    two = b"](K\x01K\x02e"
    assert read(call("__builtin__.tuple", two)) == ((1, 2), set())
    assert read(call("__builtin__.list", two)) == read(call("__builtin__.set", two)) == ([1, 2], set())
    assert read(call("__builtin__.bytes")) == (b"", set())
    assert read(call("__builtin__.dict", b"}" + text("a") + b"K\x01s")) == ({"a": 1}, set())
    pairs = b"](](" + text("a") + b"K\x01ee"
    assert read(call("collections.OrderedDict", pairs)) == ({"a": 1}, set())
    for name, argument in (("tuple", b"K\x01"), ("bytes", b"K\x01"), ("dict", two), ("complex", two)):
        found, stubbed = read(call(f"__builtin__.{name}", argument))
        assert found.name == f"__builtin__.{name}" and stubbed == {found.name}


@pytest.mark.parametrize("name", ["little_endian.pt", "big_endian.pt", "no_crc.pt"])
def test_either_byte_order_and_files_without_checksums(name):
    with open_checkpoint(FIXTURES / name) as contents:
        np.testing.assert_array_equal(contents.tree["weight"].read(), numbers(4, 6), strict=True)
        np.testing.assert_array_equal(contents.tree["view"].read(), numbers(4, 6).T[1:], strict=True)
        for dtype in ("float16", "bfloat16", "float64", "int64", "complex64", "bool"):
            np.testing.assert_array_equal(
                contents.tree[dtype].read(), numbers(2, 3, dtype=dtype), strict=True
            )


@pytest.mark.parametrize("name", ["training.pt", "training_legacy.pt"])
def test_a_training_state_pickled_with_dill(name):
    with open_checkpoint(FIXTURES / name) as contents:
        tree = contents.tree
        np.testing.assert_array_equal(tree["model"]["module.0.weight"].read(), numbers(4, 3, 3, 3))
        np.testing.assert_array_equal(tree["model"]["module.1.running_var"].read(), numbers(4))
        assert tree["nat_prec1"].read() == 57.5 and tree["adv_prec1"] == 33.25 and tree["epoch"] == 7
        assert tree["optimizer"]["state"] == {}  # its keys are numbers
    assert isinstance(tree["args"], Stub) and isinstance(tree["schedule"]["function"], Stub)
    assert {"dill._dill._create_function", "dill._dill._create_type"} < set(contents.stubs)
    assert all(name.startswith(("dill.", "__builtin__.", "__main__.")) for name in contents.stubs)


def test_safetensors_by_their_own_library():
    with open_checkpoint(FIXTURES / "zoo.safetensors") as contents:
        for dtype in set(DTYPES) - {"complex128"}:
            np.testing.assert_array_equal(
                contents.tree[dtype].read(), numbers(2, 3, dtype=dtype), strict=True
            )
        with pytest.raises(CheckpointError, match="type float8_e4m3fn are not supported"):
            contents.tree["float8_e4m3fn"].read()
    assert contents.format == "safetensors" and contents.metadata == {"format": "pt"}
    with pytest.raises(CheckpointError, match="it is closed"):
        contents.tree["int8"].read()


@pytest.mark.parametrize("first", [b"\x80", b"P"])
def test_a_safetensors_header_of_any_length(tmp_path, first):
    """The file begins with that length, whose bytes may be those that other formats begin with."""
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    length = first[0] + (0 if first[0] > len(header) else 256)
    header = header.ljust(length)
    values = np.array([1.5, -2.0], np.float32)
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", length) + header + values.tobytes())
    assert path.read_bytes().startswith(first)
    with open_checkpoint(path) as contents:
        np.testing.assert_array_equal(contents.tree["a"].read(), values)


def test_shared_memory_is_known_without_reading():
    tree = load(FIXTURES / "little_endian.pt").tree
    again = load(FIXTURES / "little_endian.pt").tree
    assert tree["weight"].same_memory(tree["weight"]) and not tree["weight"].same_memory(tree["view"])
    assert not tree["weight"].same_memory(tree["scalar"]) and not tree["weight"].same_memory(again["weight"])
    with pytest.raises(CheckpointError, match="it is closed"):
        tree["weight"].read()


def test_shared_memory_of_two_names(tmp_path):
    three = b"](" + tensor() + tensor() + tensor(shape=(3,), strides=(1,)) + b"e"
    twice = load(write_zip(tmp_path / "a.pt", three)).tree
    assert twice[0] is not twice[1] and twice[0].same_memory(twice[1]) and not twice[0].same_memory(twice[2])


def test_legacy_views_of_a_storage(tmp_path):
    """Before PyTorch 0.4 a storage could be elements 2 to 5 of another one."""
    pid = b"(" + text("storage") + name_of("torch.FloatStorage") + text("0") + text("cpu") + b"K\x06"
    view = pid + b"(" + text("1") + b"K\x02K\x04ttQ"
    one = call("torch._utils._rebuild_tensor", view, b"K\x01", b"K\x03\x85", b"K\x01\x85")
    path = write_legacy(tmp_path / "a.pt", one)
    with open_checkpoint(path) as contents:
        np.testing.assert_array_equal(contents.tree.read(), [3, 4, 5])
    outside = pid + b"(" + text("1") + b"K\x03K\x04ttQ"
    refuse(write_legacy(path, call(TENSOR, outside, b"K\x00", b")", b")")), "a view reaches out of storage 0")


def test_only_what_is_asked_for_is_read(tmp_path):
    """A damaged storage matters only to who reads it, and then its neighbours are still good."""
    two = b"](" + tensor() + tensor(key="1") + b"e"
    path = write_zip(tmp_path / "a.pt", two, (SIX, SIX[::-1]))
    path.write_bytes(path.read_bytes().replace(SIX[::-1], b"x" * 24))
    with open_checkpoint(path) as contents:
        np.testing.assert_array_equal(contents.tree[0].read(), numbers(2, 3))
        with pytest.raises(CheckpointError, match="storage 1 is damaged"):
            contents.tree[1].read()


def test_six_numbers_of_a_gigabyte_are_read_alone(tmp_path):
    """The rest of the storage is a hole in the file."""
    path = write_legacy(tmp_path / "a.pt", tensor(numel=2**28, legacy=True))
    path.write_bytes(path.read_bytes().replace(struct.pack("<q", 6), struct.pack("<q", 2**28)))
    os.truncate(path, path.stat().st_size + 2**30 - len(SIX))
    tracemalloc.start()
    with open_checkpoint(path) as contents:
        np.testing.assert_array_equal(contents.tree.read(), numbers(2, 3))
    assert tracemalloc.get_traced_memory()[1] < 40e6
    tracemalloc.stop()
    os.truncate(path, path.stat().st_size - 1)
    refuse(path, "truncated: it has 1,0.* bytes")


def test_the_hash_of_a_file(tmp_path):
    path = tmp_path / "a"
    for data, start in (
        (b"abc", "ba7816bf8f01cfea414140de5dae2223"),  # FIPS 180-2, appendix B.1
        (b"a" * 1_000_000, "cdc76e5c9914fb9281a1c7e284d73e67"),  # appendix B.3
        (b"ab" * 2**21 + b"c", hashlib.sha256(b"ab" * 2**21 + b"c").hexdigest()),  # more than one piece
    ):
        path.write_bytes(data)
        with open_file(path) as file:
            assert file_sha256(file).startswith(start)


# --- sizes that lie, and files that are something else -----------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"numel": 2**40, "shape": (2**40,), "strides": (1,)}, "not the|24 bytes of float32|has 6 elements"),
        ({"shape": (2**40,), "strides": (0,)}, "absurd"),
        ({"shape": (2**20, 2**20, 2**20), "strides": (0, 0, 0)}, "absurd"),
        ({"shape": (0, 2**59), "strides": (1, 1)}, "absurd"),
        ({"shape": (7,), "strides": (1,)}, "reaches 7 elements into a storage of 6"),
        ({"offset": 1}, "reaches 7 elements into a storage of 6"),
        ({"offset": 2**59}, "into a storage of 6"),
        ({"strides": (-1, 1)}, "are no sizes"),
        ({"shape": (-2, -3)}, "are no sizes"),
        ({"offset": -1}, "are no sizes"),
        ({"shape": (6,)}, "are no sizes"),
        ({"shape": (1,) * 33, "strides": (1,) * 33}, "at most 32"),
        ({"shape": (1,), "strides": (2**60,)}, "are no sizes"),
        ({"numel": 5, "shape": (5,), "strides": (1,)}, "storage 0"),
        ({"key": "../../etc/passwd"}, "storage"),
        ({"key": "0\x1b[2J"}, "refers to a storage in a way that PyTorch does not"),
        ({"kind": "torch.DoubleStorage"}, "storage 0 has 24 bytes|truncated"),
    ],
)
def test_tensors_that_do_not_fit_their_storage(tmp_path, change, message):
    refuse(write_zip(tmp_path / "a.pt", tensor(**change)), message)
    refuse(write_legacy(tmp_path / "a.pt", tensor(**change, legacy=True)), message)


@pytest.mark.parametrize(
    ("kind", "itemsize"), [("QInt8", 1), ("QUInt8", 1), ("QUInt4x2", 1), ("QUInt2x4", 1), ("QInt32", 4)]
)
def test_quantised_storages_are_known_and_not_read(tmp_path, kind, itemsize):
    count = len(SIX) // itemsize
    quantised = tensor(numel=count, shape=(count,), strides=(1,), kind=f"torch.{kind}Storage")
    path = write_zip(tmp_path / "a.pt", quantised)
    assert load(path).tree.shape == (count,)
    refuse(path, f"tensors of type {kind.lower()} are not supported")


def test_a_storage_that_the_file_does_not_have(tmp_path):
    refuse(write_zip(tmp_path / "a.pt", tensor(key="7")), "storage 7 is not in the file")
    refuse(write_legacy(tmp_path / "a.pt", tensor(key="7", legacy=True)), "list of storages does not name")


def test_a_tensor_of_32_dimensions(tmp_path):
    with open_checkpoint(
        write_zip(tmp_path / "a.pt", tensor(shape=(1,) * 32, strides=(1,) * 32))
    ) as contents:
        assert contents.tree.read().shape == (1,) * 32


def test_a_tensor_may_have_as_many_numbers_as_its_storage_or_the_limit(tmp_path, monkeypatch):
    for limit, count, good in ((5, 6, True), (5, 7, False), (7, 7, True), (7, 8, False)):
        monkeypatch.setattr(tensors, "_MAX_EXPANDED", limit)
        path = write_zip(tmp_path / "a.pt", tensor(shape=(count,), strides=(int(count == 6),)))
        if good:
            with open_checkpoint(path) as contents:
                np.testing.assert_array_equal(
                    contents.tree.read(), np.arange(6) if count == 6 else [0] * count
                )
        else:
            refuse(path, "absurd")


def test_a_big_tensor_of_few_numbers_is_read_up_to_a_limit(tmp_path):
    path = write_zip(tmp_path / "a.pt", tensor(shape=(2**21, 2), strides=(0, 1)))
    with open_checkpoint(path) as contents:
        assert contents.tree.read().sum() == 2**21
    refuse(write_zip(tmp_path / "a.pt", tensor(shape=(2**21, 3), strides=(0, 1))), "absurd")


def test_zip_bombs_and_records_out_of_place(tmp_path):
    path = tmp_path / "a.pt"
    refuse(write_zip(path, tensor(), method=zipfile.ZIP_DEFLATED), "compressed")
    good = write_zip(path, tensor()).read_bytes()
    entry = good.index(b"PK\1\2", good.index(b"PK\1\2") + 1)  # of data/0
    for field, value, message in (
        (42, 0, "overlap"),  # where the record begins
        (42, 2**31, "overlap"),
        (42, 1, "overlap|not where it should be"),
        (20, 2**31, "overlap"),  # its compressed size
        (24, 2**31, "not where it should be"),  # its size
        (16, 5, "storage 0 is damaged"),  # its CRC-32
    ):
        path.write_bytes(good[: entry + field] + struct.pack("<I", value) + good[entry + field + 4 :])
        refuse(path, message)
    end = good.index(b"PK\5\6")
    path.write_bytes(good[: end + 12] + struct.pack("<I", 2**31) + good[end + 16 :])  # size of the directory
    refuse(path, "truncated or damaged zip file|directory")
    path.write_bytes(good.replace(b"archive/data/0", b"archive/data/1"))
    refuse(path, "storage 0 is not in the file")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.json", "{}")
    refuse(path, "a zip file that PyTorch did not save: it holds model.json")


def test_records_beside_the_data(tmp_path):
    path = tmp_path / "a.pt"
    for order, message in (
        (b"little", ""),
        (b"middle", "its byte order is neither little nor big"),
        (b"little and or big", "its byteorder has 17 bytes; at most 16 are read"),
        (b"little or so big", "its byte order is neither little nor big"),
    ):
        with zipfile.ZipFile(write_zip(path, tensor()), "a") as archive:
            archive.writestr("archive/byteorder", order)
        if message:
            refuse(path, message)
        else:
            with open_checkpoint(path) as contents:
                np.testing.assert_array_equal(contents.tree.read(), numbers(2, 3))
    two = write_zip(path, tensor(), (SIX, SIX)).read_bytes()
    path.write_bytes(two.replace(b"archive/data/1", b"archive/data/0"))
    refuse(path, "a damaged zip file: two records have one name")
    good = write_zip(path, tensor()).read_bytes()
    flags = good.index(b"PK\1\2") + 8
    for bits, message in ((1, r"compressed or encrypted records \(archive/data.pkl\)"), (2, "")):
        path.write_bytes(good[:flags] + bytes([bits]) + good[flags + 1 :])
        if message:
            refuse(path, message)
        else:
            load(path)


@pytest.mark.parametrize("count", [0, 1, 3, 4])
def test_what_another_zip_file_holds(tmp_path, count):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        for i in range(count):
            archive.writestr(f"{i}.txt", "")
    names = {0: "nothing", 1: "0.txt", 3: "0.txt, 1.txt, 2.txt", 4: "0.txt, 1.txt, 2.txt, ..."}[count]
    refuse(tmp_path / "a.pt", f"a zip file that PyTorch did not save: it holds {re.escape(names)}$")


def persistent(*parts):
    """The operations of a persistent id."""
    return b"(" + b"".join(parts) + b"tQ"


ID = (text("storage"), name_of("torch.FloatStorage"), text("0"), text("cpu"), b"K\x06")


def test_storages_that_are_referred_to_in_another_way(tmp_path):
    path = tmp_path / "a.pt"
    for operations in (
        persistent(*ID[:4]),
        persistent(text("other"), *ID[1:]),
        persistent(ID[0], text("torch.FloatStorage"), *ID[2:]),
        persistent(*ID[:2], b"K\x00", *ID[3:]),
        persistent(*ID[:4], b"G" + struct.pack(">d", 6)),
        persistent(*ID[:4], integer(-1)),
        persistent(*ID[:4], integer(2**60)),
        persistent(text("module")),
        persistent(text("module"), b"K\x05"),
        persistent(text("other"), name_of("os.system")),
    ):
        refuse(write_zip(path, operations), "refers to (data|a storage) in a way that PyTorch does not")
        for legacy in (operations, operations.replace(b"tQ", b"NtQ")):
            refuse(write_legacy(path, legacy), "refers to (data|a storage) in a way that PyTorch does not")
    for kind in ("os.FloatStorage", "torch.FooStorage"):
        stub = load(write_zip(path, persistent(ID[0], name_of(kind), *ID[2:]))).tree
        assert isinstance(stub, Stub) and stub.name == kind
        refuse(
            write_legacy(path, persistent(ID[0], name_of(kind), *ID[2:], b"N")),
            f"its storages of type {kind} are not supported",
        )


def test_a_class_in_a_legacy_file_comes_with_its_source(tmp_path):
    operations = persistent(text("module"), name_of("my.Net"), text("net.py"), text("class Net: ..."))
    contents = load(write_legacy(tmp_path / "a.pt", b"](" + operations + tensor(legacy=True) + b"e"))
    assert contents.tree[0].name == "my.Net" and contents.stubs == ("my.Net",)


def test_views_of_legacy_storages_that_cannot_be(tmp_path):
    path = tmp_path / "a.pt"
    for view, message in (
        (b"K\x05", "a view of storage 0 is described in no known way"),
        (b"(" + text("1") + b"K\x02t", "a view of storage 0 is described in no known way"),
        (b"(" + text("1") + integer(-1) + b"K\x02t", "a view reaches out of storage 0"),
        (b"(" + text("1") + b"K\x02" + integer(-1) + b"t", "a view reaches out of storage 0"),
        (b"(" + text("1") + text("2") + b"K\x02t", "a view reaches out of storage 0"),
        (b"(" + text("1") + b"K\x02" + text("2") + b"t", "a view reaches out of storage 0"),
    ):
        refuse(write_legacy(path, persistent(*ID, view)), message)
    two = b"](" + tensor(legacy=True) + tensor(numel=5, shape=(5,), strides=(1,), legacy=True) + b"e"
    refuse(write_legacy(path, two), "storage 0 is described in two ways")


def test_the_pickles_around_a_legacy_tree(tmp_path):
    path = write_legacy(tmp_path / "a.pt", tensor(legacy=True))
    good = path.read_bytes()
    path.write_bytes(good.replace(pickle.dumps(1001, 2), pickle.dumps(1002, 2)))
    refuse(path, "of an unknown protocol: save it again with a newer PyTorch")
    for keys in ("0", {"0": 0}, [0], ["0", 0]):
        path.write_bytes(good.replace(pickle.dumps(["0"], 2), pickle.dumps(keys, 2)))
        refuse(path, "its list of storages is damaged")


@pytest.mark.parametrize("count", range(4))
def test_tensors_of_too_few_arguments_are_no_tensors(tmp_path, count):
    storage = persistent(*ID)
    arguments = [storage, b"K\x00", b"K\x06\x85", b"K\x01\x85", b"\x89", b"N", name_of("torch.float32")]
    path, v3 = tmp_path / "a.pt", "torch._utils._rebuild_tensor_v3"
    for name, taken in ((TENSOR, arguments[:count]), (v3, arguments[: count + 3])):
        stub = load(write_zip(path, call(name, *taken))).tree
        assert isinstance(stub, Stub) and stub.name == name
    for name, taken in ((TENSOR, arguments[:4]), (v3, arguments)):
        with open_checkpoint(write_zip(path, call(name, *taken))) as contents:
            np.testing.assert_array_equal(contents.tree.read(), np.arange(6))


def test_what_tensors_are_wrapped_in(tmp_path):
    path, from_type = tmp_path / "a.pt", "torch._tensor._rebuild_from_type_v2"
    inner = tensor().partition(b"\n_rebuild_tensor_v2\n")[2].removesuffix(b"R")  # its arguments alone
    whole = (name_of(TENSOR), name_of("my.Tensor"), inner)
    for name, arguments, good in (
        ("torch._utils._rebuild_parameter", (tensor(), b"\x88", b"}"), True),
        ("torch._utils._rebuild_parameter", (), False),
        ("torch._utils._rebuild_parameter", (b"K\x05",), False),
        (from_type, (*whole, b"}"), True),
        (from_type, whole, True),
        (from_type, whole[:2], False),
        (from_type, (text("f"), *whole[1:]), False),
        (from_type, (*whole[:2], b"]"), False),
        (from_type, (name_of("os.system"), *whole[1:]), False),
    ):
        with open_checkpoint(write_zip(path, call(name, *arguments))) as contents:
            assert isinstance(contents.tree, Stub) != good, (name, arguments)
            if good:
                np.testing.assert_array_equal(contents.tree.read(), numbers(2, 3))
    for name, argument, value in (("torch.Size", b"K\x02\x85", (2,)), ("torch.device", text("cpu"), "cpu")):
        assert load(write_zip(path, call(name, argument))).tree == value
        for arguments in ((), (b"K\x05",)):
            assert isinstance(load(write_zip(path, call(name, *arguments))).tree, Stub)


@pytest.mark.parametrize("name", ["little_endian.pt", "training_legacy.pt", "zoo.safetensors"])
def test_every_truncation_is_refused(tmp_path, name):
    data, path = (FIXTURES / name).read_bytes(), tmp_path / "a.pt"
    for size in [*range(1, len(data), 37), len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError):
            load(path)
    path.write_bytes(data[:-1])
    refuse(path, f"{len(data) - 1:,} bytes|damaged safetensors")


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
    "pickle that holds the magic number": (
        pickle.dumps([bytes(64), 0x1950A86A20F9469CFC6C], 2),
        "an ordinary pickle",
    ),
    "zeros": (bytes(100), "begins with the bytes 00 00"),
    "text": (b"hello", "begins with the bytes 68 65"),
    "header": (struct.pack("<Q", 2**40) + b"{}", "damaged safetensors file"),
    "not JSON": (struct.pack("<Q", 4) + b"{abc", "damaged safetensors file"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(FOUND))
def test_what_is_no_checkpoint_is_named(tmp_path, name):
    data, message = FOUND[name]
    (tmp_path / "a.pt").write_bytes(data)
    refuse(tmp_path / "a.pt", re.escape(message))


def test_what_is_no_file_is_named(tmp_path):
    refuse(tmp_path, "a folder, not a file")
    refuse(tmp_path / "none.pt", "there is no such file")
    refuse(tmp_path / "a.pt" / "\0", "cannot be opened|no such file")
    os.mkfifo(tmp_path / "pipe")
    refuse(tmp_path / "pipe", "not a regular file")
    refuse(FIXTURES / "torchscript.pt", "a TorchScript archive")


def test_a_whole_pickled_module_keeps_its_name():
    contents = load(FIXTURES / "whole_module.pt")
    assert isinstance(contents.tree, Stub) and contents.tree.name == "torch.nn.modules.linear.Linear"
    assert contents.stubs == ("torch.nn.modules.linear.Linear",)


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
            read = contents.tree[name].read()
            assert f"torch.{contents.tree[name].dtype}" == str(value.dtype)
            np.testing.assert_array_equal(read.astype(np.float64), value.double().numpy(), strict=True)
