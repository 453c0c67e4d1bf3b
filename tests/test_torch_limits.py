"""How much of a file is read and how often, what of it is not believed, and which file it is."""

import hashlib
import os
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy
from damage_checkpoints import SIX, name_of, tensor, text, write_legacy, write_zip

import advtransfer as at
from advtransfer.models import ARCHITECTURES
from advtransfer.torch_checkpoint import convert, import_torch_checkpoint, reader, tensors, zip_format
from advtransfer.torch_checkpoint.catalogue import KnownModel, find_known
from advtransfer.torch_checkpoint.hub import Fetched
from advtransfer.torch_checkpoint.reader import CheckpointError, Stub, open_checkpoint

NETWORKS = Path(__file__).parent / "fixtures" / "networks"


@pytest.fixture(autouse=True)
def small_architectures(monkeypatch):
    """That of fixtures/make_networks.py in these files."""
    bottleneck = {"stage_sizes": (2, 1), "bottleneck": True, "width": 4, "groups": 2, "base_width": 32}
    monkeypatch.setitem(ARCHITECTURES, "small_bottleneck", bottleneck)


def refused(message, *args, **options):
    with pytest.raises(CheckpointError, match=message) as caught:
        import_torch_checkpoint(*args, **options)
    assert "\n" not in str(caught.value)


def read(path):
    with open_checkpoint(path) as contents:
        return contents.tree.read()


def unreadable(path, message):
    """Opening the file, or reading the tensor that is its tree, says `message`."""
    with pytest.raises(CheckpointError, match=message):
        read(path)


# --- what of a file is read, and believed -------------------------------------------------------------------


@pytest.mark.parametrize("piece", [5, 8, 1 << 20])  # of 24 bytes
def test_damage_outside_of_what_is_read(tmp_path, monkeypatch, piece):
    """The checksum is that of the whole storage, and is taken once."""
    monkeypatch.setattr(tensors, "_CHUNK", piece)
    path = write_zip(tmp_path / "a.pt", tensor(shape=(1,), strides=(1,)))
    assert read(path) == [0.0]
    path.write_bytes(path.read_bytes().replace(SIX, SIX[:-1] + b"x"))
    unreadable(path, "storage 0 is damaged")


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
    file = tensors.File(Path("a.pt"), Slow(data), 20)
    for start, size in ((0, 20), (4, 7), (13, 7), (20, 0)):
        assert file.read(start, size).tobytes() == data[start : start + size]
    for start, size in ((-1, 2), (14, 7)):
        with pytest.raises(CheckpointError, match="truncated: it has 20 bytes"):
            file.read(start, size)
    with pytest.raises(CheckpointError, match="became shorter while it was read"):
        tensors.File(Path("a.pt"), Slow(data[:16]), 20).read(4, 16)
    with pytest.raises(CheckpointError, match="storage 3 is not in the file"):
        tensors.Storage(file, "3", "uint8", 1, 4).read(0, 4)


def test_a_damaged_storage_is_summed_once(tmp_path, monkeypatch):
    ones = (
        tensor(shape=(1,), strides=(1,))
        + tensor(shape=(), strides=())
        + tensor(offset=5, shape=(), strides=())
    )
    path = write_zip(tmp_path / "a.pt", b"](" + ones * 20 + b"e")
    path.write_bytes(path.read_bytes().replace(SIX, SIX[:-1] + b"x"))
    summed = []
    crc32 = tensors.zlib.crc32
    with open_checkpoint(path) as contents, monkeypatch.context() as patch:
        patch.setattr(tensors.zlib, "crc32", lambda data, *start: summed.append(0) or crc32(data, *start))
        for value in contents.tree:
            with pytest.raises(CheckpointError, match="storage 0 is damaged"):
                value.read()
    assert len(summed) == 1


def test_a_damaged_pickle_that_can_be_read(tmp_path):
    path = write_zip(tmp_path / "a.pt", text("epoch"))
    path.write_bytes(path.read_bytes().replace(b"epoch", b"epoxy"))
    unreadable(path, "its data.pkl is damaged")


def test_any_byte_but_zero_is_true(tmp_path):
    """As numpy's bools they would be other numbers than 1."""
    raw = bytes([0, 1, 2, 255, 0, 128])
    values = read(write_zip(tmp_path / "a.pt", tensor(kind="torch.BoolStorage"), (raw,)))
    np.testing.assert_array_equal(values.view(np.uint8), [[0, 1, 1], [1, 0, 1]])
    header = b'{"a":{"dtype":"BOOL","shape":[6],"data_offsets":[0,6]}}'
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + raw)
    with open_checkpoint(tmp_path / "a.safetensors") as contents:
        np.testing.assert_array_equal(contents.tree["a"].read().view(np.uint8), [0, 1, 1, 1, 0, 1])


@pytest.mark.parametrize("word", ["neg", "conj"])
def test_a_lazily_negated_view_is_not_taken_for_its_storage(tmp_path, word):
    for version, dtype in ((b"_v2", b""), (b"_v3", name_of("torch.float32"))):
        start = tensor().replace(b"_v2", version).removesuffix(b"tR") + dtype
        np.testing.assert_array_equal(
            read(write_zip(tmp_path / "a.pt", start + b"}tR")), [[0, 1, 2], [3, 4, 5]]
        )
        with open_checkpoint(
            write_zip(tmp_path / "a.pt", start + b"}" + text(word) + b"\x88stR")
        ) as contents:
            assert isinstance(contents.tree, Stub)
            assert contents.stubs == (f"torch._utils._rebuild_tensor{version.decode()}",)


def test_a_storage_has_one_type(tmp_path):
    two = b"](" + tensor() + tensor(kind="torch.IntStorage") + b"e"
    unreadable(
        write_zip(tmp_path / "a.pt", two), "storage 0 has 24 bytes of float32, not 6 elements of int32"
    )
    two = b"](" + tensor(legacy=True) + tensor(kind="torch.IntStorage", legacy=True) + b"e"
    unreadable(write_legacy(tmp_path / "a.pt", two), "storage 0 is described in two ways")


def test_few_elements_far_apart(tmp_path):
    """Two of a storage of 2^23, whose rest is a hole in the file."""
    limit = 4 * 2 + 4_194_304
    for span in (limit, limit + 1):
        operations = tensor(numel=2**23, shape=(2,), strides=(span - 1,), legacy=True)
        path = write_legacy(tmp_path / "a.pt", operations)
        path.write_bytes(path.read_bytes().replace(struct.pack("<q", 6) + SIX, struct.pack("<q", 2**23)))
        start = path.stat().st_size
        os.truncate(path, start + 2**25)
        with open(path, "r+b") as file:
            file.seek(start + 4 * (span - 1))
            file.write(struct.pack("<f", 2.5))
        if span == limit:
            np.testing.assert_array_equal(read(path), [0, 2.5])
        else:
            unreadable(path, "a tensor of 2 elements spread over 4,194,313 is absurd")


def test_a_safetensors_header_is_read_once(tmp_path, monkeypatch):
    """Whatever the number of tensors: twice by us, by the library for itself."""
    path, count = tmp_path / "a.safetensors", 300
    values = {f"layer{i}": np.float32([i, -i]) for i in range(count)}
    safetensors.numpy.save_file(values, path, {"note": "x" * 100_000})
    opened, sizes = [], []
    safe_open, file_read = reader.safe_open, tensors.File.read
    monkeypatch.setattr(reader, "safe_open", lambda *a, **k: opened.append(0) or safe_open(*a, **k))
    monkeypatch.setattr(tensors.File, "read", lambda f, start, n: sizes.append(n) or file_read(f, start, n))
    with open_checkpoint(path) as contents:
        for name, value in values.items():
            np.testing.assert_array_equal(contents.tree[name].read(), value)
    assert len(opened) <= 1
    assert sum(sizes) < path.stat().st_size + 4096  # all of the file once, and its beginning


def test_a_safetensors_file_that_ends_with_its_header(tmp_path):
    path = tmp_path / "a.safetensors"
    for length, message in (
        (2, ""),
        (3, "a truncated or damaged safetensors file: 10 bytes with a header of 3"),
    ):
        path.write_bytes(struct.pack("<Q", length) + b"{}")
        if message:
            with pytest.raises(CheckpointError, match=message), open_checkpoint(path):
                pass
        else:
            with open_checkpoint(path) as contents:
                assert contents.tree == {}


def test_offsets_that_do_not_fit_a_shape_are_not_read():
    """Nor would the library let them through."""
    file = tensors.File(Path("a.safetensors"), Slow(bytes(40)), 40)
    good = {"dtype": "F32", "shape": [2, 1], "data_offsets": [4, 12]}
    assert reader._safetensor(file, 8, "a", **good).read().shape == (2, 1)
    for change in (
        {"data_offsets": [4, 11]},
        {"data_offsets": [-4, 4]},
        {"data_offsets": [12, 4]},
        {"shape": [-2, -1]},
        {"dtype": "F8_E5M2", "data_offsets": [12, 4]},
    ):
        with pytest.raises(ValueError, match="do not fit its shape"):
            reader._safetensor(file, 8, "a", **good | change)


def test_a_long_safetensors_header_is_refused(tmp_path):
    """Even a good one: the library would parse whatever is there."""
    for length in (2**21, 2**21 + 1):
        header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'.ljust(length)
        path = tmp_path / "a.safetensors"
        path.write_bytes(struct.pack("<Q", length) + header + struct.pack("<2f", 1, 2))
        if length == 2**21:
            with open_checkpoint(path) as contents:
                np.testing.assert_array_equal(contents.tree["a"].read(), [1, 2])
        else:
            unreadable(path, "safetensors file: .* with a header of 2,097,153")


# --- which file it is ---------------------------------------------------------------------------------------


def test_what_is_no_file_is_said(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "loop.pt").symlink_to("loop.pt")
    for path, words in (
        (tmp_path, "a folder, not a file"),
        (tmp_path / "pipe.pt", "not a regular file"),
        ("/dev/null", "not a regular file"),
        ("/proc/self/mem", "an empty file|cannot be read|not a regular file|there is no such file"),
        ("a" * 300 + ".pt", "cannot be opened"),
        (tmp_path / "loop.pt", "cannot be opened"),
        ("a\0b.pt", "cannot be opened|no such file"),
        ("", "a folder, not a file|no such file"),
    ):
        with pytest.raises(at.torch_checkpoint.CheckpointError, match=words) as caught:
            at.import_torch_checkpoint(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["hub.ckpt", "timm.safetensors"])
@pytest.mark.parametrize("when", ["file_sha256", "find_known", "find_network"])  # opened, hashed, parsed
def test_the_file_that_is_hashed_is_the_file_that_is_read(tmp_path, monkeypatch, file, when):
    path, other = shutil.copy(NETWORKS / file, tmp_path), tmp_path / "other"
    sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    want = import_torch_checkpoint(path)
    swapped = at.export_torch_state_dict(want)
    swapped["fc.bias"] += 1
    safetensors.numpy.save_file(swapped, other)
    original, done = getattr(convert, when), []

    def swap(*args, **options):
        if not done:
            done.append(os.replace(other, path))
        return original(*args, **options)

    monkeypatch.setattr(convert, when, swap)
    model = import_torch_checkpoint(path, sha256=sha256)
    assert done and model.spec.provenance["sha256"] == sha256
    bias = np.asarray(model.variables["params"]["fc"]["bias"])
    np.testing.assert_array_equal(bias, want.variables["params"]["fc"]["bias"])
    refused("has the SHA-256", path, sha256=sha256)  # now it is the other one


@pytest.mark.parametrize("name", ["resnetaa50", "resnetblur50", "resnetaa101d"])
def test_networks_that_blur_are_refused_by_name(tmp_path, monkeypatch, name):
    """They have the names and the shapes of a ResNet-50."""
    path = shutil.copy(NETWORKS / "hub.ckpt", tmp_path / f"{name}_a1h-0123abcd.pth")
    refused(name.rstrip("d"), path)
    plain = shutil.copy(NETWORKS / "hub.ckpt", tmp_path / "model.safetensors")
    fetched = Fetched(Path(plain), f"timm/{name}.sw_in12k", "model.safetensors", "abc")
    monkeypatch.setattr(convert, "fetch", lambda _: fetched)
    refused(name.rstrip("d"), "hf:timm/any/model.safetensors")
    assert import_torch_checkpoint(plain).spec.architecture == "small_bottleneck"


def known(**fields):
    values = ("hub.ckpt", "", "small_bottleneck", "l2", 3.0, "ImageNet", 0.5, "", "MIT", "X")
    return KnownModel(*values, image_size=99)._replace(**fields)


def test_a_known_model_says_what_it_is(monkeypatch):
    monkeypatch.setattr(convert, "find_known", lambda *args, **repo: known())
    spec = import_torch_checkpoint(NETWORKS / "hub.ckpt").spec
    assert (spec.norm, spec.eps, spec.provenance["threat_model"]) == ("l2", 3.0, "table")
    assert spec.image_size == 99
    published = {"dataset": "ImageNet", "accuracy": 0.5, "licence": "MIT", "source": "X"}
    assert spec.provenance["published"] == published
    spec = import_torch_checkpoint(NETWORKS / "hub.ckpt", norm="none").spec
    assert (spec.norm, spec.eps, spec.provenance["threat_model"]) == ("none", 0.0, "argument")


def test_a_namesake_of_a_known_model_is_not_trusted(monkeypatch):
    monkeypatch.setattr(convert, "find_known", lambda *args, **repo: known(architecture="resnet50"))
    spec = import_torch_checkpoint(NETWORKS / "hub.ckpt").spec
    assert (spec.norm, spec.provenance["threat_model"]) == ("none", "unknown")
    assert "published" not in spec.provenance


def test_hashes_that_are_pinned(monkeypatch, tmp_path):
    path = NETWORKS / "hub.ckpt"
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert import_torch_checkpoint(path, sha256=sha256.upper()).spec.provenance["sha256"] == sha256
    with monkeypatch.context() as patch:
        patch.setattr(convert, "read_contents", lambda file: pytest.fail("read before it was compared"))
        for wrong in ("0" * 64, sha256[:8] + "0" * 56, sha256[:56] + "0" * 8):
            refused(f"has the SHA-256 {sha256}, not {wrong} as asked for", path, sha256=wrong)
        patch.setattr(convert, "find_known", lambda *args, **repo: known(sha256="1" * 64, source="the hub"))
        refused("published is 11111111: download it again from the hub", path)
        patch.setattr(convert, "find_known", find_known)
        refused("published is f37072fd", shutil.copy(path, tmp_path / "resnet18-f37072fd.pth"))
    for name in ("resnet18-20240315.pth", f"resnet50-{sha256[:8]}.pth"):  # of nobody: a date, any digits
        assert import_torch_checkpoint(shutil.copy(path, tmp_path / name)).spec.num_classes == 5
    assert import_torch_checkpoint(path, sha256=sha256[:8]).spec.num_classes == 5
    monkeypatch.setattr(convert, "find_known", lambda *args, **repo: known(sha256="1" * 64))
    spec = import_torch_checkpoint(path, sha256=sha256).spec  # asked for, but not the one of the table
    assert spec.provenance["threat_model"] == "unknown"


def test_names_of_the_hub(monkeypatch):
    fetched = Fetched(NETWORKS / "hub.ckpt", "some/repo", "folder/hub.ckpt", "abc")
    monkeypatch.setattr(convert, "fetch", lambda name: {"hf:some/repo/folder/hub.ckpt": fetched}[name])
    spec = import_torch_checkpoint("hf:some/repo/folder/hub.ckpt").spec
    assert spec.provenance["hub"] == {"repo": "some/repo", "file": "folder/hub.ckpt", "revision": "abc"}
    assert spec.provenance["file"] == "hub.ckpt"


def test_a_zip_directory_is_read_up_to_a_limit(monkeypatch):
    """However large the file says that it is."""
    asked = []
    raw = SimpleNamespace(seek=None, tell=None, seekable=None)
    raw.read = lambda size: asked.append(size) or bytes(min(size, 64))
    monkeypatch.setattr(zip_format, "_MAX_DIRECTORY", 64)
    directory = zip_format._Directory(raw)
    assert [len(directory.read(*size)) for size in ((5,), (2**40,), ())] == [5, 64, 64]
    assert asked == [5, 65, 65]
    raw.read = bytes
    assert len(directory.read(64)) == 64
    with pytest.raises(CheckpointError, match="a directory of more than 64 bytes"):
        directory.read(2**40)
