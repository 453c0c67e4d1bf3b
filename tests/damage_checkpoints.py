"""Checkpoints made by hand, pickles that would run code if they could, and how the fuzzer damages files."""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import random
import struct
import zipfile
from pathlib import Path

NUMBERS = (0, 1, 2, 3, 7, 16, 127, 128, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**43)
NUMBERS += (2**63 - 1, 2**64 - 1)
SIX = struct.pack("<6f", *range(6))  # what a storage holds if nothing else is said
TENSOR = "torch._utils._rebuild_tensor_v2"
GLOBALS = ("os.system", "builtins.eval", "torch.FloatStorage", "builtins.list", "_codecs.encode")
GLOBALS += ("torch.Size",)


def text(value: str | bytes) -> bytes:
    """A pickle's operation that pushes a text, or bytes."""
    code, raw = (b"B", value) if isinstance(value, bytes) else (b"X", value.encode())
    return code + struct.pack("<I", len(raw)) + raw


def call(name: str, *arguments: bytes) -> bytes:
    """A pickle's operations that call module.name."""
    return name_of(name) + b"(" + b"".join(arguments) + b"tR"


def name_of(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def integer(value: int) -> bytes:
    """A pickle's operation that pushes an integer."""
    return b"\x8a\x0b" + value.to_bytes(11, "little", signed=True)


def tensor(
    numel=6, offset=0, shape=(2, 3), strides=(3, 1), kind="torch.FloatStorage", key="0", legacy=False
) -> bytes:
    """The operations that make a tensor of storage `key`, as the format writes them."""
    view = [b"N"] if legacy else []
    pid = [text("storage"), name_of(kind), text(key), text("cpu"), integer(numel), *view]
    sizes = [b"(" + b"".join(integer(x) for x in values) + b"t" for values in (shape, strides)]
    return call(TENSOR, b"(" + b"".join(pid) + b"tQ", integer(offset), *sizes, b"\x89", b"}")


def write_zip(path: Path, operations: bytes, storages: tuple[bytes, ...] = (SIX,), method: int = 0) -> Path:
    """A file of the zip format with a pickle of these operations, and what is in its storages 0, 1, ..."""
    records = [("data.pkl", b"\x80\x02" + operations + b".")]
    records += [(f"data/{key}", data) for key, data in enumerate(storages)]
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in records:
            archive.writestr(f"archive/{name}", data)
    return path


def write_legacy(path: Path, operations: bytes) -> Path:
    """A file of the legacy format with a pickle of these operations, and six floats in its storage 0."""
    head = [pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    keys = pickle.dumps(["0"], 2)
    path.write_bytes(b"".join(head) + b"\x80\x02" + operations + b"." + keys + struct.pack("<q", 6) + SIX)
    return path


def payloads(canary: str) -> dict[str, bytes]:
    """Operations that each leave one object, and the file `canary` where a real unpickler runs them."""
    command, script = text(f"touch {canary}"), text(f"open({canary!r}, 'w')")
    system = name_of("os.system")
    module = call("builtins.__import__", text("os"))
    return {
        "os.system": call("os.system", command),
        "posix.system": call("posix.system", command),
        "subprocess.getoutput": call("subprocess.getoutput", command),
        "subprocess.Popen": call("subprocess.Popen", b"]" + text("touch") + b"a" + text(canary) + b"a"),
        "builtins.eval": call("builtins.eval", script),
        "builtins.exec": call("builtins.exec", script),
        "__builtin__.eval": call("__builtin__.eval", script),
        "builtins.open": call("builtins.open", text(canary), text("w")),
        "io.open": call("io.open", text(canary), text("w")),
        "os.mkdir": call("os.mkdir", text(canary)),
        "getattr": call("builtins.getattr", module, text("system")) + b"(" + command + b"tR",
        "attrgetter": call("operator.attrgetter", text("system")) + b"(" + module + b"tR(" + command + b"tR",
        "methodcaller": call("operator.methodcaller", text("system"), command) + b"(" + module + b"tR",
        "partial": call("functools.partial", system, command) + b")R",
        "map": call("builtins.list", call("builtins.map", system, b"]" + command + b"a")),
        "pickle.loads": call("pickle.loads", text(call("os.system", command) + b".")),
        "INST": b"(" + command + b"ios\nsystem\n",
        "OBJ": b"(csubprocess\nPopen\n]" + text("touch") + b"a" + text(canary) + b"ao",
        "STACK_GLOBAL": text("os") + text("system") + b"\x93(" + command + b"tR",
        "NEWOBJ": name_of("subprocess.Popen") + b")\x81" + b"0" + call("os.system", command),
        "memo": system + b"r\x00\x00\x01\x000j\x00\x00\x01\x00(" + command + b"tR",
    }


def damage(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """One to four changes of raw bytes."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        if not out:
            break
        i, size = rng.randrange(len(out)), rng.choice((1, 2, 4, 8, 30, 200))
        kind = rng.randrange(8)
        if kind == 0:
            out[i] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[i] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
        elif kind == 2:
            del out[i:]
        elif kind == 3:
            del out[i : i + size]
        elif kind == 4:
            out[i:i] = out[i : i + size] * rng.choice((1, 1, 3, 50))
        elif kind == 5:
            j = rng.randrange(len(other) or 1)
            out[i : i + size * rng.randrange(2)] = other[j : j + size]
        elif kind == 6:
            raw = struct.pack("<Q", rng.choice(NUMBERS))[: rng.choice((1, 2, 4, 8))]
            out[i : i + len(raw)] = raw
        else:
            out[i : i + size] = bytes(rng.randrange(256) for _ in range(size))
    return bytes(out)


def damage_pickle(data: bytes, rng: random.Random, other: bytes, canary: str) -> bytes:
    """Operations of a pickle removed, repeated, swapped, replaced or put in: hostile ones among them."""
    try:
        starts = [position for _, _, position in pickletools.genops(data)]
    except ValueError:
        return damage(data, rng, other)
    pieces = [data[i:j] for i, j in zip(starts, [*starts[1:], len(data)], strict=True)]
    for _ in range(rng.choice((1, 1, 1, 1, 2, 5))):
        i, j = rng.randrange(len(pieces)), rng.randrange(len(pieces))
        kind = rng.choice((0, 1, 2, 3, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9))
        if kind == 0:
            del pieces[i : i + rng.choice((1, 1, 3))]
        elif kind == 1:
            pieces.insert(i, pieces[j])
        elif kind == 2:
            pieces[i], pieces[j] = pieces[j], pieces[i]
        elif kind == 3:
            pieces[i] = bytes([rng.choice(pickletools.opcodes).code.encode("latin-1")[0]]) + pieces[i][1:]
        elif kind == 4:
            pieces.insert(i, rng.choice(pickletools.opcodes).code.encode("latin-1"))
        elif kind == 5:
            _replace(pieces, rng, b"KMJ\x8a", integer(rng.choice(NUMBERS) * rng.choice((1, 1, 1, -1))))
        elif kind == 6:
            _replace(pieces, rng, b"KMJ\x8aXBGN}]\x8c", rng.choice(list(payloads(canary).values())))
        elif kind == 7:
            attack = rng.choice(list(payloads(canary).values()))
            pieces.insert(i, attack + rng.choice((b"", b"0", b"0", b"0")))
        elif kind == 8:
            _replace(pieces, rng, b"c", name_of(rng.choice(GLOBALS)))
        else:
            pieces[i] = damage(pieces[i], rng, other)
        if not pieces:
            break
    return b"".join(pieces)


def _replace(pieces: list[bytes], rng: random.Random, codes: bytes, new: bytes) -> None:
    """Puts `new` in the place of an operation of one of these codes."""
    where = [k for k, piece in enumerate(pieces) if piece[:1] in codes]
    if where:
        pieces[rng.choice(where)] = new


def damage_zip(data: bytes, rng: random.Random, other: bytes, canary: str) -> bytes:
    """A record changed, dropped, renamed or repeated, in an archive that is whole again."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = [(entry.filename, _content(archive, entry)) for entry in archive.infolist()]
    pickle = next(i for i, (name, _) in enumerate(records) if name.endswith("data.pkl"))
    i = pickle if rng.random() < 0.8 else rng.randrange(len(records))
    name, content = records[i]
    if i == pickle:
        records[i] = (name, damage_pickle(content, rng, other, canary))
    elif rng.random() < 0.5:
        records[i] = (name, damage(content, rng, other))
    else:
        records[i : i + 1] = rng.choice(([], [(rng.choice(records)[0], content)], [(name + "x", content)]))
    out = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if rng.random() < 0.02 else zipfile.ZIP_STORED
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, content in records:
            info = zipfile.ZipInfo(name)  # writestr would warn of a repeated name and of nothing else
            archive.NameToInfo.pop(name, None)
            archive.writestr(info, content, method)
    return out.getvalue()


def _content(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    with archive.open(entry) as record:
        record._expected_crc = None  # PyTorch can leave it out
        return record.read()


def damage_legacy(data: bytes, rng: random.Random, other: bytes, canary: str) -> bytes:
    """One of the five pickles changed, the rest where it belongs."""
    stream, ends = io.BytesIO(data), [0]
    for _ in range(5):
        for _ in pickletools.genops(stream):
            pass
        ends.append(stream.tell())
    parts = [data[i:j] for i, j in zip(ends, [*ends[1:], len(data)], strict=True)]
    i = rng.choice((0, 1, 2, 3, 3, 3, 3, 3, 3, 4, 5))
    parts[i] = damage(parts[i], rng, other) if i == 5 else damage_pickle(parts[i], rng, other, canary)
    return b"".join(parts)


def damage_safetensors(data: bytes, rng: random.Random, other: bytes, canary: str) -> bytes:
    """The header changed, as text or as numbers, with the right length before it."""
    size = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + size], data[8 + size :]
    if rng.random() < 0.5:
        header = damage(header, rng, other)
    else:
        tree = json.loads(header)
        entry = tree[rng.choice([name for name in tree if name != "__metadata__"])]
        field = rng.choice(("shape", "data_offsets", "dtype"))
        if field == "dtype":
            entry[field] = rng.choice(("F64", "F8_E5M2", "F4", "I8", "C64", "X", "", None, 5))
        else:
            values = entry[field] or [0]
            values[rng.randrange(len(values))] = rng.choice((*NUMBERS, -1, 1.5, 2**80, "1", None, []))
            entry[field] = values
        header = json.dumps(tree).encode()
    return struct.pack("<Q", len(header)) + header + rest


STRUCTURED = {"zip": damage_zip, "legacy": damage_legacy, "safetensors": damage_safetensors}
