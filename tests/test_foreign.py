"""What comes from outside: names inside a folder, text without control characters, bounded files and JSON."""

import io
import os
import re
from pathlib import Path

import pytest

from advtransfer import foreign, main
from advtransfer.study import finished_rows


@pytest.mark.parametrize("name", ["a.csv", "figures/a b.svg", "ü", "..a", "a..b", "x" * 200])
def test_names_inside_a_folder(tmp_path, name):
    path = foreign.inside(tmp_path, name)
    assert path == tmp_path / name and path.resolve().is_relative_to(tmp_path.resolve())


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../a", "a/../../b", "/etc/passwd", "a//b", "a/", "a\\b", "C:a", "a\0b", "a\nb",
     "x" * 201, "\u202egnp.exe", "a*"],
)  # fmt: skip
def test_names_that_are_none(tmp_path, name):
    with pytest.raises(ValueError) as caught:
        foreign.inside(tmp_path, name)
    assert "\n" not in str(caught.value) and not re.search("[\0-\x1f]", str(caught.value))


def test_text_that_is_shown():
    every = "".join(map(chr, range(0x3000))) + "\ud800\ufffe\U0001f600"
    shown = foreign.printable(every)
    assert len(shown) == len(every)
    assert [c for c in shown if ord(c) < 32 or 0x7F <= ord(c) < 0xA0] == ["\t", "\n"]
    assert shown.encode() and "␛" in shown and "\U0001f600" in shown and "\u202e" not in shown
    assert foreign.printable("ℓ∞ (ε = 4/255) – “é”\n") == "ℓ∞ (ε = 4/255) – “é”\n"


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    assert foreign.read_bytes(tmp_path / "file", 5) == b"12345"
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert foreign.read_bytes(tmp_path / "link") == b"12345"
    with pytest.raises(ValueError, match=r"has 5 bytes, more than 4"):
        foreign.read_bytes(tmp_path / "file", 4)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, words in (
        (tmp_path / "pipe", "not a regular file"),
        (tmp_path, "not a regular file"),
        (Path("/dev/zero"), "not a regular file"),
        (tmp_path / "loop", "a link to itself"),
    ):
        with pytest.raises(ValueError, match=words):
            foreign.read_bytes(path)
    with (tmp_path / "hole").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="more than"):
        foreign.read_json(tmp_path / "hole")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[" * 100_000 + "]" * 100_000, "{", ""])
def test_json_of_any_depth_is_a_value_error(text):
    with pytest.raises(ValueError):
        foreign.parse_json(text)


def test_file_names_differ_whatever_the_capitals():
    taken: set[str] = set()
    texts = ["a b", "a-b", "a-b-1", "A/B", "", "%", "x" * 999, "x" * 998]
    names = [foreign.file_name(text, taken) for text in texts]
    assert len({name.casefold() for name in names}) == len(texts) and names[:3] == ["a-b", "a-b-1", "a-b-1-1"]
    assert all(re.fullmatch(r"[A-Za-z0-9-]{1,70}", name) for name in names)


def test_a_terminal_obeys_progress_bars_alone():
    shown = io.StringIO()
    stream = main._Stream(shown)
    for text in ("\r 50 %|█", "\n\n\x1b[A\x1b[A", "a\x1b[2Jb\rc\x07\n", "\x1b]0;x\x07"):
        stream.write(text)
    assert shown.getvalue() == "\r 50 %|█\n\n\x1b[A\x1b[Aa␛[2Jb␍c␇\n␛]0;x␇"


def test_odd_files_among_a_studys_rows_are_set_aside(tmp_path, caplog):
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "dangling.jsonl").symlink_to("/nowhere")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(bytes(range(256)))
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert finished_rows(tmp_path) == {}
    assert len(list(tmp_path.glob("*.jsonl"))) == 6 and len(caplog.messages) == 6
    assert finished_rows(tmp_path, set_aside=True) == {}
    assert not list(tmp_path.glob("*.jsonl")) and len(list(tmp_path.glob("*.corrupt"))) == 6
