"""Files that were made to do harm: nothing of them runs, and their memory and time are bounded."""

import copyreg
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
from collections import UserList
from pathlib import Path

import numpy as np
import pytest
from damage_checkpoints import TENSOR, call, integer, name_of, payloads, tensor, text, write_legacy, write_zip
from test_torch_reader import load, refuse

from advtransfer.torch_reader import Stub, open_checkpoint, unpickle, zip_format

ROOT = Path(__file__).parent.parent
TERABYTES = struct.pack("<q", 2**43)


@pytest.mark.process
def test_the_payloads_run_where_a_real_unpickler_reads_them(tmp_path):
    """Otherwise the next test would prove nothing."""
    program = "import os, pickle, time\n"
    for index, operations in enumerate(payloads("CANARY").values()):
        program += f"""
try:
    pickle.loads({operations + b"."!r})
except Exception:
    pass
for _ in range(50):
    time.sleep(0 if os.path.exists("CANARY") else 0.02)
print({index}, os.path.exists("CANARY"))
os.system("rm -rf CANARY")
"""
    out = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert out.stdout.split() == [word for i in range(len(payloads(""))) for word in (str(i), "True")]


@pytest.mark.parametrize("write", [write_zip, write_legacy])
@pytest.mark.parametrize("name", list(payloads("")))
def test_no_payload_runs(tmp_path, write, name):
    canary = tmp_path / "canary"
    operations = payloads(str(canary))[name]
    one = tensor(legacy=write is write_legacy)
    path = write(tmp_path / "a.pt", b"]" + operations + b"a" + operations + b"}b" + b"a" + one + b"a")
    with open_checkpoint(path) as contents:
        np.testing.assert_array_equal(
            contents.tree[2].read(), np.arange(6.0).reshape(2, 3)
        )  # the data beside it is good
        assert all(isinstance(stub, Stub) for stub in contents.tree[:2])
    assert contents.stubs and not canary.exists()


def test_nothing_that_is_named_is_imported_or_changed(tmp_path):
    """Setting items, appending, setting state and slots: of what a pickle names, never of the real thing."""
    before = dict(os.environ), list(sys.path), set(sys.modules), dict(vars(UserList))
    state = b"}" + text("canary") + b"K\x01s"
    for operations in (
        name_of("os.environ") + text("CANARY") + text("1") + b"s",
        name_of("sys.path") + text("/canary") + b"a",
        name_of("sys.modules") + text("canary") + b"Ns",
        name_of("collections.UserList") + b"(N" + state + b"tb",
        name_of("collections.UserList") + state + b"b",
        call("importlib.import_module", text("antigravity")),
        name_of("antigravity.fly"),
        call("torch.storage._load_from_bytes", text(b"\x80\x02" + call("os.system", text("true")) + b".")),
        call("builtins.setattr", name_of("collections.UserList"), text("canary"), b"N"),
        b"\x82\xf0(" + text("true") + b"tR",
    ):
        copyreg.add_extension("os", "system", 0xF0)
        try:
            tree = load(write_zip(tmp_path / "a.pt", operations)).tree
        finally:
            copyreg.remove_extension("os", "system", 0xF0)
        assert isinstance(tree, Stub)
    assert (dict(os.environ), list(sys.path), set(sys.modules), dict(vars(UserList))) == before
    assert "builtins.object" not in load(write_zip(tmp_path / "a.pt", name_of("builtins.object"))).stubs


@pytest.mark.parametrize(
    ("operations", "message"),
    [
        (text("os.system") + b"(" + text("true") + b"tR", "it calls a str"),
        (b"]K\x01a)R", "it calls a list"),
        (name_of("os.system") + text("true") + b"R", "calls os.system with a str"),
        (b"0", "more from the stack"),
        (b"](K\x01a", "more from the stack"),  # the list lies below a mark
        (b"(](K\x01a", "more from the stack"),
        (b"K\x01t", "a mark that is not there"),
        (b"h\x05", "an object that it never stored"),
        (b"}(K\x01u", "a key without a value"),
        (b"K\x01K\x02a", "appends to a int"),
        (b"K\x05Q", "refers to data in a way that PyTorch does not"),
        (b"P0\n", "PERSID is not supported"),
        (b"X\x02\x00\x00\x00\xff\xfe", "damaged near byte"),
        (b"I" + b"9" * 5000 + b"\n", "damaged near byte"),
        (b"\x8b\x00\x10\x00\x00" + b"\x7f" * 4096, "an integer of 32,7"),
        (b"\x8e" + TERABYTES, "truncated in its pickle"),  # a text of 8 TB
        (b"\x8d" + TERABYTES, "truncated in its pickle"),
        (b"T\xff\xff\xff\x7f", "truncated in its pickle"),
        (b"\x95" + TERABYTES, "more from the stack"),  # a frame of 8 TB, which is only a hint
        (b"Np-1\n", "a number out of range"),
        (b"Np%d\n" % 2**32, "a number out of range"),
        (b"X\x58\x02\x00\x00" + b"a" * 600 + b"2\x93", "something else than a short text"),
        (text("a") + text("b" * 501) + b"\x93", "something else than a short text"),
        (text("a" * 501) + text("b") + b"\x93", "something else than a short text"),
        (text("a") + b"K\x01\x93", "something else than a short text"),
        (b"K\x01" + text("a") + b"\x93", "something else than a short text"),
    ],
)
def test_damaged_pickles_say_where(tmp_path, operations, message):
    refuse(write_zip(tmp_path / "a.pt", operations), message)
    refuse(write_legacy(tmp_path / "a.pt", operations), message)


ENCODE = call("_codecs.encode", b"h\x00", text("latin1")) + b"0"
PAIRS = b"](" + b"".join(integer(i) + b"N\x86" for i in range(20_000)) + b"eq\x00"
ORDERED = call("collections.OrderedDict", b"h\x00")
DEFAULT = call("collections.defaultdict", b"N", b"h\x00") + b"0"
MAKER = name_of(TENSOR)
HEAVY = {
    "memo": b"N" + b"r\xff\xff\xff\xff" * 10 + b"0N",  # an index of 2^32 - 1 is no allocation
    "laughs": b"]q\x00" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(200)),
    "tuples as keys": b"}Nq\x000" + b"h\x00h\x00\x86q\x000" * 300 + b"h\x00K\x01s",
    "deep tuples": b"N" + b"\x85" * 60_000,
    "deep lists": b"]" * 60_000 + b"a" * 59_999,
    "deep marks": b"(" * 60_000 + b"N",
    "itself": b"]q\x00h\x00a" + b"}q\x01" + b"K\x01h\x01sa",
    "copies": text("x" * 100_000) + b"q\x00" + ENCODE * 30_000,
    "copied lists": b"](" + b"N" * 100_000 + b"eq\x00" + (call("builtins.list", b"h\x00") + b"0") * 20_000,
    "copied dicts": PAIRS + ORDERED * 2_000,
    "copied defaults": PAIRS + DEFAULT * 200,
    "hashes": b"}(" + b"".join(integer((2**61 - 1) * i) + b"N" for i in range(1, 50_000)) + b"u",
    "names": b"".join(b"ca\n%d\n0" % i for i in range(5_000)) + b"N",
    "long names": text("x" * 5_000_000) + b"q\x000" + b"h\x00h\x00\x93" * 10_000,
    "bytes": b"B\x00\x00\x00\x02" + bytes(1 << 25),
    "dicts": b"}" * 3_000_000,
    "stored dicts": b"".join(b"}r" + struct.pack("<I", i) for i in range(1_500_000)),
    "encoded": text("x" * 1_000_000) + b"q\x00" + ENCODE[:-1] * 500,
    "tensors": MAKER + b"q\x000" + tensor()[len(MAKER) : -1] + b"q\x01" + b"h\x00h\x01R" * 400_000,
}  # fmt: skip
REFUSED = ("copies", "copied dicts", "copied defaults", "copied lists", "names", "long names", "bytes")
REFUSED += ("dicts", "stored dicts", "encoded", "tensors")


@pytest.mark.parametrize("name", list(HEAVY))
def test_memory_and_recursion_are_bounded(tmp_path, name):
    path = write_zip(tmp_path / "a.pt", HEAVY[name])
    tracemalloc.start()
    try:
        if name in REFUSED:
            refuse(path, "bytes of memory|1,000 functions|short text|at most 33,554,432")
        else:
            load(path)
        assert tracemalloc.get_traced_memory()[1] < 250e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_long_lists_beside_the_weights_are_read(tmp_path, write):
    """The order of an epoch of ImageNet, every loss of 90 epochs, the names of 200,000 files."""
    values = {"order": list(range(1_281_167)), "losses": [0.5 * i for i in range(200_000)]}
    files = [f"train/n{i % 1000:08}/{i}.JPEG" for i in range(200_000)]
    for value in (values, files):
        one = tensor(legacy=write is write_legacy)
        path = write(tmp_path / "a.pt", b"](" + pickle.dumps(value, 2)[2:-1] + one + b"e")
        assert load(path).tree[0] == value


def test_the_limits_of_a_pickle(tmp_path, monkeypatch):
    path, longest = tmp_path / "a.pt", "a" * 500
    assert load(write_zip(path, text(longest) * 2 + b"\x93")).tree.name == f"{longest}.{longest}"[:100]
    bits, names = unpickle._MAX_INTEGER, [name_of(f"a.b{i}") + b"0" for i in range(1001)]
    large = [2 ** (size - 1) for size in (bits, bits + 1)]
    push = [b"\x8b" + struct.pack("<I", bits // 8 + 1) + x.to_bytes(bits // 8 + 1, "little") for x in large]
    assert load(write_zip(path, push[0])).tree == large[0]
    assert len(load(write_zip(path, b"".join(names[:1000]) * 2 + b"N")).stubs) == 1000
    assert load(write_zip(path, b"N0" * 65_000 + b"N")).tree is None  # a ResNet-152 and its Adam take as many
    assert load(write_zip(path, b"N(0")).tree is None  # takes the mark away
    for write, operations, message in (
        (write_zip, push[1], f"it holds an integer of {bits + 1:,} bits"),
        (write_zip, b"".join(names) + b"N", "it names more than 1,000 functions and classes"),
        (
            write_zip,
            b"N0" * 1_100_000 + b"N",
            "what its .* takes more than 134,217,728 bytes of memory: save",
        ),
        (write_legacy, b"B\x00\x00\x00\x02" + bytes(1 << 25), "its pickle has more than 33,554,432 bytes: s"),
    ):
        refuse(write(path, operations), message)
    monkeypatch.setattr(zip_format, "MAX_BYTES", 4)
    assert load(write_zip(path, b"N")).tree is None
    refuse(write_zip(path, b"NN"), "its data.pkl has 5 bytes; at most 4 are read")


@pytest.mark.parametrize("name", ["builtins.list", "collections.defaultdict", TENSOR])
def test_a_constructor_takes_sixteen_arguments(tmp_path, name):
    """Another would cut a tuple from the memo into pieces again and again."""
    path, module = tmp_path / "a.pt", name_of(name)[1:]
    for count in (16, 17):
        for operations in (
            name_of(name) + b"(" + b"N" * count + b"tR",
            name_of(name) + b"(" + b"N" * count + b"t\x81",
            name_of(name) + b"(" + b"N" * count + b"t}\x92",
            b"(" + b"N" * count + b"i" + module,
            b"(" + name_of(name) + b"N" * count + b"o",
        ):
            write_zip(path, operations)
            if count == 16:
                assert isinstance(load(path).tree, dict | Stub)
            else:
                refuse(path, f"it calls {name} with 17 arguments")


def test_only_text_is_a_key(tmp_path):
    """The hashes of text are salted; numbers can be chosen whose hashes collide."""
    others = (b"K\x01", b"N", b"\x88", b"G" + bytes(8), text(b"b"), b")", b"]")
    pairs = [text("a") + b"K\x05", *(key + b"K\x06" for key in others)]
    lists = b"](" + b"".join(pair + b"\x86" for pair in pairs) + b"e"
    for operations in (
        b"}(" + b"".join(pairs) + b"u",
        b"}" + b"".join(pair + b"s" for pair in pairs),
        b"(" + b"".join(pairs) + b"d",
        call("collections.OrderedDict", lists),
    ):
        assert load(write_zip(tmp_path / "a.pt", operations)).tree == {"a": 5}


def test_names_and_texts_can_be_printed(tmp_path):
    """No escape sequence reaches a terminal, and no lone surrogate an encoder."""
    for write in (write_zip, write_legacy):
        one = tensor(legacy=write is write_legacy) + b"0"
        strange = name_of("os\x1b[31m.system") + b"0" + text("a\u202e\x9b") + text("b") + b"\x93"
        assert load(write(tmp_path / "a.pt", one + strange)).stubs == ("a??.b", "os?[31m.system")
        lone = b"X\x05\x00\x00\x00a\xed\xa0\x80b"
        for operations in (lone, b"Va\\ud800b\n"):
            tree = load(write(tmp_path / "a.pt", one + b"}" + operations * 2 + b"s")).tree
            assert tree == {"a?b": "a?b"} and next(iter(tree)).encode() == b"a?b"


@pytest.mark.process
def test_a_slice_of_the_fuzzing_campaign():
    """1,000 mutants; the whole campaign is a command of BUILD.md."""
    command = [sys.executable, "-m", "tests.fuzz_checkpoints", "--mutations=1000", "--seed=1"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert out.returncode == 0 and " 0 failures" in out.stdout, out.stdout + out.stderr
