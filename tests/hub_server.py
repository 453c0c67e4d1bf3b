"""A hub on this machine: repositories that are made, written in one commit and read, by its HTTP API."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

TOKENS = {"hf_owner": "owner", "hf_reader": ""}  # token -> whose repositories it may write


class Answers(BaseHTTPRequestHandler):
    """As huggingface.co answers; .safetensors are stored as LFS objects, other files inside the commit."""

    def do_GET(self):
        path = unquote(urlparse(self.path).path)
        server = self.server
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/[^/]+)?(?:/.*)?", path):
            repo, kind = match.groups()
            if repo not in server.repos:
                return self.answer(401, headers={"X-Error-Code": "RepoNotFound"})
            files = server.repos[repo]
            if kind == "tree":
                return self.json(
                    [{"type": "file", "path": x, "size": len(y), "oid": _sha1(y)} for x, y in files.items()]
                )
            siblings = [{"rfilename": name} for name in files]
            return self.json({"id": repo, "modelId": repo, "sha": server.commit(repo), "siblings": siblings})
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        repo, _, file = match.groups() if match else ("", "", "")
        if repo not in server.repos:
            return self.answer(401, headers={"X-Error-Code": "RepoNotFound"})
        headers = {"X-Repo-Commit": server.commit(repo)}
        if file not in server.repos[repo]:
            return self.answer(404, headers=headers | {"X-Error-Code": "EntryNotFound"})
        data = server.repos[repo][file]
        self.answer(200, data, headers | {"ETag": f'"{_sha1(data)}"'})

    do_HEAD = do_GET

    def do_POST(self):
        path, server = unquote(urlparse(self.path).path), self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
        if path.endswith("/info/lfs/objects/batch"):
            asked = json.loads(body)["objects"]
            at = f"http://{self.headers['Host']}/lfs/"
            return self.json(
                {
                    "transfer": "basic",
                    "objects": [x | {"actions": {"upload": {"href": at + x["oid"]}}} for x in asked],
                }
            )
        if path == "/api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        if token not in TOKENS:
            return self.answer(401, b'{"error": "Invalid username or password."}')
        if path == "/api/repos/create":
            asked = json.loads(body)
            owner = asked.get("organization") or TOKENS[token]
            repo = f"{owner}/{asked['name']}"
            if owner != TOKENS[token]:
                return self.answer(403, b'{"error": "You do not have the rights"}')
            if repo in server.repos:
                return self.json({"url": repo, "error": "exists"}, 409)
            server.repos[repo], server.private[repo] = {}, asked.get("private")
            return self.json({"url": f"http://{self.headers['Host']}/{repo}"})
        repo, kind = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path).groups()
        if repo.partition("/")[0] != TOKENS[token]:
            return self.answer(403, b'{"error": "You do not have the rights"}')
        if kind == "preupload":
            modes = [
                {
                    "path": x["path"],
                    "uploadMode": "lfs" if x["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for x in json.loads(body)["files"]
            ]
            return self.json({"files": modes})
        files = dict(server.repos[repo])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = server.lfs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "header":
                server.messages.append(value["summary"])
        server.repos[repo] = files
        at = f"http://{self.headers['Host']}/{repo}/commit/{server.commit(repo)}"
        self.json({"commitUrl": at, "commitOid": server.commit(repo), "success": True})

    def do_PUT(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.removeprefix("/lfs/")
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.lfs[oid] = body
        self.answer(200)

    def json(self, value, status=200):
        self.answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer(self, status, body=b"", headers=()):
        self.send_response(status)
        for name, value in {**dict(headers), "Content-Length": len(body)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def _sha1(data):
    """Git's name of a blob."""
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


class Server(ThreadingHTTPServer):
    """The hub; `repos` are repository -> file -> bytes."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.repos, self.private, self.lfs, self.messages = {}, {}, {}, []
        self.address = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def commit(self, repo):
        names = json.dumps({name: _sha1(data) for name, data in sorted(self.repos[repo].items())})
        return hashlib.sha1(names.encode()).hexdigest()
