"""A Hugging Face Hub on localhost: the endpoints that huggingface_hub's uploads and downloads of data sets call.

Keeps repositories in memory: commits that name their parent, branches, files in git and by LFS. What it is sent by LFS
it compares with its SHA-256, as the Hub does; lists come in pages of PAGE entries, so that who reads one page fails.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

PAGE = 5
TOKEN = "hf_stubtokenofatest"


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Blob:
    """A file as git or as LFS keeps it."""

    data: bytes
    is_lfs: bool

    @property
    def oid(self) -> str:
        return hashlib.sha256(self.data).hexdigest() if self.is_lfs else git_oid(self.data)


Tree = dict[str, Blob]


@dataclass
class Repo:
    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Tree] = field(default_factory=dict)

    def commit(self, branch: str, tree: Tree) -> str:
        oid = hashlib.sha1(f"{len(self.commits)}{branch}".encode()).hexdigest()
        self.commits[oid] = dict(tree)
        self.branches[branch] = oid
        return oid


@dataclass
class Hub:
    """What it holds, and what was asked: `requests` of (method, path), `stored` names of LFS objects that were sent."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    stored: list[str] = field(default_factory=list)
    ignored: set[str] = field(default_factory=set)
    failing: set[str] = field(default_factory=set)
    """Paths in a repository whose download answers 500."""
    tokens: dict[str | None, list[str]] = field(default_factory=dict)
    """What was asked with which Authorization."""

    def files(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        repo = self.repos[repo_id]
        return {name: blob.data for name, blob in repo.commits[repo.branches[branch]].items()}

    def put(self, repo_id: str, changes: dict[str, bytes | None], branch: str = "main") -> None:
        """A commit by somebody else."""
        repo = self.repos[repo_id]
        tree = dict(repo.commits[repo.branches[branch]])
        for name, data in changes.items():
            if data is None:
                del tree[name]
            else:
                tree[name] = Blob(data, tree[name].is_lfs if name in tree else False)
        repo.commit(branch, tree)

    def writes(self) -> list[tuple[str, str]]:
        return [(method, path) for method, path in self.requests if method not in ("GET", "HEAD")]


class Refusal(Exception):
    def __init__(self, status: int, code: str = "", message: str = "", **more: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.more = status, code, message, more


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(iter(self._chunk, b""))
        parts = urlsplit(self.path)
        self.hub.requests.append((self.command, unquote(parts.path)))
        try:
            self._route([unquote(p) for p in parts.path.strip("/").split("/")], parse_qs(parts.query), body)
        except Refusal as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.message} if error.code else {}
            self._send(error.status, json.dumps({"error": error.message, **error.more}).encode(), headers)

    def _chunk(self) -> bytes:
        data = self.rfile.read(int(self.rfile.readline(), 16))
        self.rfile.readline()
        return data

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, value: object, headers: dict[str, str] | None = None) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _route(self, path: list[str], query: dict[str, list[str]], body: bytes) -> None:
        if path[0] == "lfs":
            if hashlib.sha256(body).hexdigest() != path[1]:
                raise Refusal(400, message="not the object it says")
            self.hub.objects[path[1]] = body
            self.hub.stored.append(path[1])
            return self._send(200, b"")
        if path[-1] == "agent-harnesses":  # the client's own question, once a process
            raise Refusal(404)
        self.hub.tokens.setdefault(self.headers.get("Authorization"), []).append(self.path)
        if path[:3] == ["api", "repos", "create"]:
            return self._create(json.loads(body))
        if path[:2] == ["api", "validate-yaml"]:
            return self._json({})
        if path[:2] == ["api", "datasets"]:
            return self._api("/".join(path[2:4]), path[4:], query, body)
        if path[0] == "datasets" and path[3:] == ["info", "lfs", "objects", "batch"]:
            return self._batch(json.loads(body))
        if path[0] == "datasets" and path[3] == "resolve":
            return self._resolve("/".join(path[1:3]), path[4], "/".join(path[5:]))
        raise Refusal(501, message=self.path)

    def _repo(self, repo_id: str) -> Repo:
        if repo_id not in self.hub.repos:
            raise Refusal(404, "RepoNotFound", "Repository not found")
        return self.hub.repos[repo_id]

    def _oid(self, repo: Repo, revision: str) -> str:
        oid = repo.branches.get(revision, revision)
        if oid not in repo.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid

    def _create(self, asked: dict[str, Any]) -> None:
        repo_id = f"{asked['organization']}/{asked['name']}"
        url = f"{self.hub.url}/datasets/{repo_id}"
        if repo_id in self.hub.repos:
            raise Refusal(409, message="You already created this dataset repo", url=url)
        repo = self.hub.repos[repo_id] = Repo(asked.get("visibility") == "private" or bool(asked.get("private")))
        repo.commit("main", {".gitattributes": Blob(b"*.npy filter=lfs\n", False)})
        self._json({"url": url, "id": repo_id})

    def _api(self, repo_id: str, rest: list[str], query: dict[str, list[str]], body: bytes) -> None:
        repo = self._repo(repo_id)
        if not rest or rest[0] == "revision":
            oid = self._oid(repo, rest[1] if rest else "main")
            return self._json({"id": repo_id, "sha": oid, "private": repo.private, "siblings": []})
        if rest[0] == "tree":
            return self._tree(repo.commits[self._oid(repo, rest[1])], query)
        if rest[0] == "branch":
            repo.branches[rest[1]] = repo.branches["main"]
            return self._json({})
        if rest[0] == "preupload":
            return self._preupload(repo.commits[self._oid(repo, rest[1])], json.loads(body)["files"])
        if rest[0] == "commit":
            return self._commit(repo_id, repo, rest[1], [json.loads(line) for line in body.splitlines()])
        raise Refusal(501, message=self.path)

    def _tree(self, tree: Tree, query: dict[str, list[str]]) -> None:
        start = int(query.get("cursor", ["0"])[0])
        names = sorted(tree)
        folders = sorted({name.rsplit("/", 1)[0] for name in names if "/" in name})
        entries: list[dict[str, Any]] = [{"type": "directory", "path": f, "oid": "0" * 40} for f in folders]
        for name in names:
            blob = tree[name]
            entry = {"type": "file", "path": name, "size": len(blob.data), "oid": git_oid(blob.data)}
            if blob.is_lfs:
                entry["lfs"] = {"oid": blob.oid, "size": len(blob.data), "pointerSize": 130}
            entries.append(entry)
        headers = {}
        if start + PAGE < len(entries):
            link = f"{self.hub.url}{urlsplit(self.path).path}?recursive=true&cursor={start + PAGE}"
            headers["Link"] = f'<{link}>; rel="next"'
        self._json(entries[start : start + PAGE], headers)

    def _preupload(self, tree: Tree, files: list[dict[str, Any]]) -> None:
        answers = []
        for file in files:
            sample = base64.b64decode(file["sample"])
            is_lfs = file["path"].endswith((".npy", ".arrow")) or b"\0" in sample
            answer = {"path": file["path"], "uploadMode": "lfs" if is_lfs else "regular"}
            answer["shouldIgnore"] = file["path"] in self.hub.ignored
            if file["path"] in tree:
                answer["oid"] = tree[file["path"]].oid
            answers.append(answer)
        self._json({"files": answers})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for wanted in asked["objects"]:
            if wanted["oid"] not in self.hub.objects:
                wanted["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}
            objects.append(wanted)
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, repo_id: str, repo: Repo, branch: str, lines: list[dict[str, Any]]) -> None:
        head, *operations = lines
        if head["value"].get("parentCommit", repo.branches[branch]) != repo.branches[branch]:
            raise Refusal(412, message="A commit has happened since. Please refresh and try again.")
        tree = dict(repo.commits[repo.branches[branch]])
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                tree[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif operation["key"] == "lfsFile":
                tree[value["path"]] = Blob(self.hub.objects[value["oid"]], True)
            elif operation["key"] == "deletedFile":
                del tree[value["path"]]
            else:
                raise Refusal(501, message=operation["key"])
        oid = repo.commit(branch, tree)
        self._json({"commitUrl": f"{self.hub.url}/datasets/{repo_id}/commit/{oid}", "commitOid": oid})

    def _resolve(self, repo_id: str, revision: str, name: str) -> None:
        repo = self._repo(repo_id)
        oid = self._oid(repo, revision)
        blob = repo.commits[oid].get(name)
        if blob is None:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        if self.command == "GET" and name in self.hub.failing:
            raise Refusal(500, message="no such luck")
        self._send(200, blob.data, {"X-Repo-Commit": oid, "ETag": f'"{blob.oid}"'})


@contextmanager
def running() -> Iterator[Hub]:
    """A Hub on a free port, until the end of the block."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
