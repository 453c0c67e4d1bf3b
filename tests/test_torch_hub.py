"""Files of the hub by name: the real huggingface_hub against a server that speaks the hub's API."""

import errno
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

from advtransfer.hub import _check_announced
from advtransfer.torch_checkpoint import fetch
from advtransfer.torch_reader import CheckpointError

ROOT = Path(__file__).parent.parent
L2_3 = "hf:madrylab/robust-imagenet-models/resnet50_l2_eps3.ckpt"
COMMITS = {"main": "a" * 40, "v1": "b" * 40}
FILES = {  # repository -> file -> bytes at main; v1 has them reversed
    repo: {"nets/net.ckpt": random.Random(repo).randbytes(300_000)}
    for repo in ("some/nets", "more/nets", "other/nets", "torn/nets", "gated/open", "gated/closed")
}
SALMAN = "madrylab/robust-imagenet-models"
FILES[SALMAN] = {"README.md": b"ResNets"}
TOKEN = "hf_test"


class Answers(BaseHTTPRequestHandler):
    """What huggingface.co answers: resolve/ redirects to a store of blobs, which takes ranges."""

    def do_GET(self):
        self.server.requests.append(self.path)
        if self.path.startswith("/cdn/"):
            return self.send_blob(bytes.fromhex(self.path.removeprefix("/cdn/")))
        match = re.fullmatch(r"/(\w+/[\w-]+)/resolve/(\w+)/(.+)", unquote(self.path))
        repo, revision, file = match.groups() if match else ("", "", "")
        files = FILES.get(repo)
        commit = COMMITS.get(revision, revision if revision in COMMITS.values() else None)
        if self.server.broken:
            self.answer(500)
        elif files is None:
            self.answer(401, {"X-Error-Code": "RepoNotFound"})
        elif repo == "gated/closed" or (
            repo == "gated/open" and self.headers["Authorization"] != f"Bearer {TOKEN}"
        ):
            self.answer(403, {"X-Error-Code": "GatedRepo"})
        elif commit is None:
            self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        elif file not in files:
            self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        else:
            data = files[file] if commit == COMMITS["main"] else files[file][::-1]
            digest = hashlib.sha256(data)
            self.server.blobs[digest.digest()] = data
            location = f"http://localhost:{self.server.server_port}/cdn/{digest.hexdigest()}"
            linked = {"X-Linked-Size": len(data), "X-Linked-Etag": f'"{digest.hexdigest()}"'}
            self.answer(302, {"Location": location, "X-Repo-Commit": commit, **linked})

    do_HEAD = do_GET

    def send_blob(self, digest):
        data = self.server.replaced.get(digest, self.server.blobs[digest])
        start = int(re.match(r"bytes=(\d+)-|", self.headers.get("Range", ""))[1] or 0)
        headers = {"ETag": f'"{digest.hex()}"', "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if self.server.torn == "gone":
            return self.answer(500)
        cut = len(data) // 2 if self.server.torn else 0
        self.server.torn = self.server.torn and "gone"
        self.answer(206 if start else 200, headers, data[start:], cut)

    def answer(self, status, headers=(), body=b"", cut=0):
        self.send_response(status)
        for name, value in {**dict(headers), "Content-Length": len(body)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) - cut])

    def log_message(self, *_):
        pass


class Hub:
    """The server, which can be taken down, and a process that fetches from it."""

    def __init__(self, home):
        self.home, self.server, self.port = home, None, 0
        self.blobs = {}
        self.start()

    def start(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Answers)
        self.port = self.server.server_port
        self.server.requests, self.server.broken, self.server.torn = [], False, ""
        self.server.blobs, self.server.replaced = self.blobs, {}
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()

    def fetcher(self, **environment):
        """fetch(name) -> its fields, or {"error": message}, in a process of its own, as the variables are
        read when huggingface_hub is imported."""
        program = (
            "import json, sys\n"
            "from advtransfer.torch_checkpoint import CheckpointError, fetch\n"
            "for line in sys.stdin:\n"
            "    try:\n"
            "        found = fetch(line.rstrip())\n"
            "        answer = {**found._asdict(), 'path': str(found.path)}\n"
            "    except CheckpointError as error:\n"
            "        answer = {'error': str(error)}\n"
            "    print(json.dumps(answer), flush=True)\n"
        )
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
        environment |= {"HF_HOME": str(self.home / "hf"), "XDG_CACHE_HOME": str(self.home / "cache")}
        environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{self.port}", "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL},
            text=True,
            env=kept | environment,
        )

        def fetch(name):
            process.stdin.write(name + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        return fetch, process


@pytest.fixture(scope="module")
def online(tmp_path_factory):
    pytest.importorskip("huggingface_hub")
    hub = Hub(tmp_path_factory.mktemp("home"))
    hub.fetch, process = hub.fetcher(HF_TOKEN=TOKEN)
    hub.fetch_offline, other = hub.fetcher(HF_HUB_OFFLINE="1")
    yield hub
    for child in (process, other):
        child.kill()
        child.communicate()
    hub.stop()


@pytest.fixture
def hub(online):
    """The server in good order."""
    online.stop()
    online.start()
    return online


def whole_files(hub, repo):
    return [p for p in (hub.home / "hf").rglob("net.ckpt") if repo.replace("/", "--") in str(p)]


def by_hand(hub, name):
    """What a message says to do: the address, and where to put the file."""
    rest = name.removeprefix("hf:").removesuffix("/nets/net.ckpt")
    url = f"http://127.0.0.1:{hub.port}/{rest}/resolve/main/nets/net.ckpt"
    path = f"{hub.home}/cache/advtransfer/checkpoints/{rest}/nets/net.ckpt"
    return f"or download {url} manually, save it as {path}, "


def test_a_file_is_downloaded_once(hub):
    truth = FILES["some/nets"]["nets/net.ckpt"]
    found = hub.fetch("hf:some/nets/nets/net.ckpt")
    assert Path(found["path"]).read_bytes() == truth and found["path"].endswith("/nets/net.ckpt")
    assert [found[key] for key in ("repo", "file")] == ["some/nets", "nets/net.ckpt"]
    assert found["revision"] == COMMITS["main"]
    pinned = hub.fetch("hf:some/nets/nets/net.ckpt@v1")
    assert Path(pinned["path"]).read_bytes() == truth[::-1] and pinned["revision"] == COMMITS["v1"]
    hub.stop()
    hub.server.requests.clear()
    assert hub.fetch("hf:some/nets/nets/net.ckpt") == found
    assert hub.fetch("hf:some/nets/nets/net.ckpt@v1") == pinned
    assert hub.fetch(f"hf:some/nets/nets/net.ckpt@{COMMITS['v1']}") == pinned
    hub.start()


def test_offline_the_cache_is_enough_and_the_message_says_what_to_do(hub):
    found = hub.fetch("hf:some/nets/nets/net.ckpt")
    hub.server.requests.clear()
    assert hub.fetch_offline("hf:some/nets/nets/net.ckpt") == found
    error = hub.fetch_offline("hf:more/nets/nets/net.ckpt")["error"]
    assert "is not in the cache and HF_HUB_OFFLINE is set: unset it, " in error
    assert error.endswith(by_hand(hub, "hf:more/nets/nets/net.ckpt") + "and run the same command again")
    assert not hub.server.requests and "\n" not in error


def test_bytes_that_are_not_what_was_announced(hub):
    """Neither those of a mirror that sends others, which are not kept, nor those that changed here."""
    digest = hashlib.sha256(FILES["other/nets"]["nets/net.ckpt"])
    hub.server.replaced[digest.digest()] = bytes(300_000)
    error = hub.fetch("hf:other/nets/nets/net.ckpt")["error"]
    assert f"the hub announced {digest.hexdigest()[:16]}; it was deleted: run the same command again" in error
    assert "\n" not in error and not whole_files(hub, "other/nets")
    hub.server.replaced.clear()
    path = Path(hub.fetch("hf:other/nets/nets/net.ckpt")["path"])
    assert path.read_bytes() == FILES["other/nets"]["nets/net.ckpt"]
    blob = path.resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    for ask in (hub.fetch, hub.fetch_offline):
        error = ask("hf:other/nets/nets/net.ckpt")["error"]
        assert f"; delete {blob} and run the same command again" in error and blob.exists()
    blob.unlink()
    assert Path(hub.fetch("hf:other/nets/nets/net.ckpt")["path"]).read_bytes()[-1:] != b"?"


@pytest.mark.parametrize("name", ["git's", "the bytes'"])
def test_a_small_file_has_a_sha1(tmp_path, name):
    data = b"a small network"
    start = b"" if name == "the bytes'" else f"blob {len(data)}\0".encode()
    blob = tmp_path / "blobs" / hashlib.sha1(start + data).hexdigest()
    blob.parent.mkdir()
    blob.write_bytes(data)
    (tmp_path / "net.pt").symlink_to(blob)
    _check_announced(tmp_path / "net.pt", "", "hf:a/b/net.pt")
    blob.write_bytes(data[::-1])
    with pytest.raises(
        CheckpointError, match="hf:a/b/net.pt: the file is damaged or a different one: its hash"
    ):
        _check_announced(tmp_path / "net.pt", "", "hf:a/b/net.pt")
    blob.rename(other := blob.with_name("an-etag-of-a-mirror"))
    _check_announced(other, "", "hf:a/b/net.pt")


def test_a_cache_that_was_carried_to_a_machine_without_a_network(hub):
    """Copied without its refs/, or with an end of line behind the commit."""
    commits, truth = (COMMITS["main"], COMMITS["v1"]), b"weights"
    folder = hub.home / "hf/hub/models--lab--nets"
    name, refs = "hf:lab/nets/nets/net.ckpt", folder / "refs"
    for commit in commits:
        path = folder / "snapshots" / commit / "nets/net.ckpt"
        path.parent.mkdir(parents=True)
        path.write_bytes(truth)
    refs.mkdir()
    (refs / "main").write_text(commits[1] + "\n")
    assert hub.fetch_offline(name)["revision"] == commits[1]
    (refs / "main").unlink()
    for commit in commits:
        assert hub.fetch_offline(f"{name}@{commit[:8]}")["revision"] == commit
    for asked in (name, f"{name}@v1"):  # which of the two is not known
        error = hub.fetch_offline(asked)["error"]
        assert error.endswith(f"; in the cache: @{commits[0]}, @{commits[1]}") and "\n" not in error
    path.unlink()
    assert hub.fetch_offline(name)["revision"] == commits[0]
    assert f"in the cache: @{commits[0]}" in hub.fetch_offline(f"{name}@v1")["error"]
    assert "is not in a public repository" in hub.fetch(name)["error"]  # a hub that answers is believed


def test_a_torn_download_leaves_nothing_and_the_next_try_completes(hub):
    hub.server.torn = "once"
    error = hub.fetch("hf:torn/nets/nets/net.ckpt")["error"]
    assert "cannot be downloaded (" in error and by_hand(hub, "hf:torn/nets/nets/net.ckpt") in error
    assert any(path.startswith("/cdn/") for path in hub.server.requests)
    assert not whole_files(hub, "torn/nets")
    hub.server.torn = ""
    found = hub.fetch("hf:torn/nets/nets/net.ckpt")
    assert Path(found["path"]).read_bytes() == FILES["torn/nets"]["nets/net.ckpt"]


def test_a_token_opens_a_gated_repository(hub):
    found = hub.fetch("hf:gated/open/nets/net.ckpt")
    assert Path(found["path"]).read_bytes() == FILES["gated/open"]["nets/net.ckpt"]
    error = hub.fetch("hf:gated/closed/nets/net.ckpt")["error"]
    assert f"is gated: accept its terms at http://127.0.0.1:{hub.port}/gated/closed" in error
    assert "HF_TOKEN" in error and by_hand(hub, "hf:gated/closed/nets/net.ckpt") in error


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            L2_3.replace("models", "model"),
            f"is not in a public repository: .* name; similar known names: {L2_3}",
        ),
        (L2_3.replace("_l2_", "-l2-"), f"is not in the repository: .*; similar known names: {L2_3}, hf:"),
        ("hf:some/nets/net.ckpt", "is not in the repository: see .*/some/nets/tree/main$"),
        ("hf:some/nets/nets/net.ckpt@v9", "names a revision that does not exist: see .*/commits"),
        ("hf:so--me/nets/net.ckpt", f"is not a valid name on the hub: use one such as {L2_3}$"),
    ],
)
def test_what_the_hub_does_not_have(hub, name, message):
    error = hub.fetch(name)["error"]
    assert re.match(re.escape(name) + " " + message, error) and "\n" not in error


@pytest.mark.parametrize("down", [True, False], ids=["no network", "a broken hub"])
def test_a_hub_that_does_not_answer_is_asked_once(hub, down):
    hub.server.broken = True
    if down:
        hub.stop()
    error = hub.fetch("hf:more/nets/nets/net.ckpt")["error"]
    assert ("Connection refused" if down else "500") in error and "\n" not in error
    assert by_hand(hub, "hf:more/nets/nets/net.ckpt") in error and "check the network" in error
    assert len(hub.server.requests) == (0 if down else 1)
    if down:
        hub.start()


def test_a_full_disk(monkeypatch, tmp_path):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: None)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", full)
    with pytest.raises(CheckpointError, match="does not fit on the disk: free space or set HF_HOME"):
        fetch(L2_3, tmp_path)


# --- by hand ------------------------------------------------------------------------------------------------


def test_without_the_package_a_file_fetched_by_hand_is_enough(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, folder, revision in ((L2_3, SALMAN, "main"), (f"{L2_3}@v1", f"{SALMAN}@v1", "v1")):
        path = tmp_path / "advtransfer/checkpoints" / folder / "resnet50_l2_eps3.ckpt"
        url = f"https://huggingface.co/{SALMAN}/resolve/{revision}/resnet50_l2_eps3.ckpt"
        instead = f"or download {url} manually, save it as {path}, and run the same command again"
        with pytest.raises(CheckpointError) as caught:  # also of v1, when main is there
            fetch(name)
        assert str(caught.value) == f"{name} needs huggingface_hub: pip install huggingface_hub, {instead}"
        path.parent.mkdir(parents=True)
        path.touch()
        assert fetch(name) == (path, SALMAN, "resnet50_l2_eps3.ckpt", revision.replace("main", ""))
    assert fetch(L2_3, tmp_path / "advtransfer/checkpoints").path.is_file()
    with pytest.raises(CheckpointError, match=f"save it as {tmp_path}/other/madrylab/"):
        fetch(L2_3, tmp_path / "other")


def test_a_file_fetched_by_hand_comes_before_the_cache(hub):
    hub.fetch("hf:some/nets/nets/net.ckpt@v1")
    path = hub.home / "cache/advtransfer/checkpoints/some/nets@v1/nets/net.ckpt"
    path.parent.mkdir(parents=True)
    path.touch()
    assert hub.fetch("hf:some/nets/nets/net.ckpt@v1")["path"] == str(path)
    path.unlink()


MALFORMED = ("", "owner", "owner/name", "/owner/name/file", "owner/name/", "owner/name//file")
MALFORMED += ("owner/../file", "owner/name/../../file", "owner/name/.", "owner/name/file@", "owner/name/a\nb")
MALFORMED += (
    "owner/name/file@../x",
    "owner/name/file?download=true",
    r"owner/name/..\file",
    "https://x.co/a/b",
)


def test_malformed_names(tmp_path):
    for name in MALFORMED:
        message = r"is not of the form hf:OWNER/NAME/FILE\[@REVISION\], such as hf:madry"
        with pytest.raises(CheckpointError, match=message) as caught:
            fetch(f"hf:{name}", tmp_path)
        assert "\n" not in str(caught.value)
