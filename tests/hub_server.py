"""As much of the Hugging Face hub's HTTP API as its client asks for, on loopback: repositories in memory.

What large files hold goes through LFS, as on the hub: by SHA-256, what is there already is not sent again.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import pytest

SMALL = 600
"""Bytes of the largest file that is no LFS file."""
Files = dict[str, bytes]


@dataclass
class Repo:
    """Commits, the newest last; ``refs`` are branches and tags."""

    private: bool = False
    gated: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Files, revision: str = "main") -> str:
        """Files of a new commit, all of them."""
        sha = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits[sha], self.refs[revision] = dict(files), sha
        return sha


@dataclass
class Hub:
    """What the server holds and what was asked of it.

    Attributes:
        lfs: large files by SHA-256.
        asked: method and path of each request.
        tokens: of each request that had one.
        altered: paths whose content is another than its hash says, which the server does not know.
        closed: whether uploads are refused.
        uploads: how many there were.
        sent: path and bytes of each answer.
        hold_upload: the number of the upload that does not end before ``go_on``; ``held`` says that it waits.
    """

    repos: dict[tuple[str, str], Repo] = field(default_factory=dict)
    lfs: Files = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    altered: dict[str, bytes] = field(default_factory=dict)
    closed: bool = False
    hold_upload: int | None = None
    held: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)
    uploads: int = 0
    sent: list[tuple[str, int]] = field(default_factory=list)
    url: str = ""

    def repo(self, name: str, kind: str = "models") -> Repo:
        """The repository, made if there is none."""
        return self.repos.setdefault((kind, name), Repo())

    def put_folder(self, name: str, folder: Path, kind: str = "models", revision: str = "main") -> str:
        """A commit of all files of a folder."""
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        return self.repo(name, kind).commit(files, revision)

    def files(self, name: str, kind: str = "models") -> Files:
        """Of the newest commit."""
        repo = self.repos[kind, name]
        return repo.commits[repo.refs["main"]]


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _git_hash(content)}
    if len(content) > SMALL:
        entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 130}
    return entry


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self._body())

    def do_PUT(self) -> None:
        self._answer(self._body())

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, body: bytes) -> None:
        path, _, query = self.path.partition("?")
        self.hub.asked.append(f"{self.command} {unquote(path)}")
        if token := self.headers.get("Authorization"):
            self.hub.tokens.add(token)
        with suppress(ConnectionError):  # who asked is gone
            self._route([unquote(part) for part in path.strip("/").split("/")], parse_qs(query), body)

    def _route(self, parts: list[str], query: dict[str, list[str]], body: bytes) -> None:
        match parts:
            case ["api", "repos", "create"]:
                self._create(json.loads(body))
            case ["api", "validate-yaml"]:
                self._json({"errors": [], "warnings": []})
            case ["api", ("models" | "datasets") as kind, owner, name, *rest]:
                self._api(kind, f"{owner}/{name}", rest, query, body)
            case ["lfs", oid]:
                self._upload(oid, body)
            case [*_, name, "info", "lfs", "objects", "batch"] if name.endswith(".git"):
                self._batch(json.loads(body))
            case ["datasets", owner, name, "resolve", revision, *path]:
                self._resolve("datasets", f"{owner}/{name}", revision, "/".join(path))
            case [owner, name, "resolve", revision, *path]:
                self._resolve("models", f"{owner}/{name}", revision, "/".join(path))
            case _:
                self._send(404, b"")

    def _create(self, asked: dict[str, Any]) -> None:
        kind, name = f"{asked.get('type') or 'model'}s", f"{asked['organization']}/{asked['name']}"
        url = f"{self.hub.url}/{'datasets/' if kind == 'datasets' else ''}{name}"
        if (kind, name) in self.hub.repos:
            return self._json({"error": "exists", "url": url}, 409)
        repo = self.hub.repo(name, kind)
        repo.private = asked.get("visibility") == "private" or bool(asked.get("private"))
        repo.commit({".gitattributes": b""})
        return self._json({"url": url})

    def _found(self, kind: str, name: str, revision: str) -> tuple[str, Files] | None:
        """Commit and files; else the refusal is sent."""
        repo, allowed = self.hub.repos.get((kind, name)), self.headers.get("Authorization") is not None
        if repo is None or (repo.private and not allowed):  # as the hub answers who is not logged in
            self._send(401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
            return None
        sha = repo.refs.get(revision, revision)
        if sha not in repo.commits:
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
            return None
        return sha, repo.commits[sha]

    def _api(  # noqa: PLR0911 - an answer a request
        self, kind: str, name: str, rest: list[str], query: dict[str, list[str]], body: bytes
    ) -> None:
        revision = rest[1] if len(rest) > 1 else "main"
        found = self._found(kind, name, revision)
        if found is None:
            return None
        sha, files = found
        match rest:
            case [] | ["revision", _]:
                siblings = [{"rfilename": path} for path in files]
                private = self.hub.repos[kind, name].private
                return self._json(
                    {"id": name, "sha": sha, "private": private, "tags": [], "siblings": siblings}
                )
            case ["tree", _, *path]:
                return self._tree(
                    files, "/".join(path), query.get("recursive", ["false"])[0].lower() == "true"
                )
            case ["paths-info", _]:
                wanted = parse_qs(body.decode())["paths"]
                return self._json([_entry(path, files[path]) for path in wanted if path in files])
            case ["preupload", _]:
                answers = [
                    {
                        "path": each["path"],
                        "uploadMode": "lfs" if each["size"] > SMALL else "regular",
                        "shouldIgnore": False,
                        "oid": _remote_oid(files.get(each["path"])),
                    }
                    for each in json.loads(body)["files"]
                ]
                return self._json({"files": answers})
            case ["commit", _]:
                return self._commit(kind, name, revision, files, body)
        return self._send(404, b"")

    def _tree(self, files: Files, folder: str, recursive: bool) -> None:
        start, entries = f"{folder}/" if folder else "", dict[str, dict[str, Any]]()
        for path, content in files.items():
            if not path.startswith(start):
                continue
            first, below, _ = path[len(start) :].partition("/")
            if below:
                entries[start + first] = {
                    "type": "directory",
                    "path": start + first,
                    "size": 0,
                    "oid": "0" * 40,
                }
            if recursive or not below:
                entries[path] = _entry(path, content)
        if not entries and folder:
            return self._send(
                404, b"", {"X-Error-Code": "EntryNotFound", "X-Error-Message": "no such folder"}
            )
        return self._json(list(entries.values()))

    def _commit(self, kind: str, name: str, revision: str, files: Files, body: bytes) -> None:
        after = dict(files)
        for line in body.splitlines():
            each = json.loads(line)
            value = each["value"]
            if each["key"] == "file":
                after[value["path"]] = base64.b64decode(value["content"])
            elif each["key"] == "lfsFile":
                after[value["path"]] = self.hub.lfs[value["oid"]]
            elif each["key"] == "deletedFile":
                del after[value["path"]]
        sha = self.hub.repos[kind, name].commit(after, revision)
        self._json({"commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "success": True})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = [
            {"oid": each["oid"], "size": each["size"]}
            if each["oid"] in self.hub.lfs
            else {
                **each,
                "actions": {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}?X-Amz-Signature=planted"}},
            }
            for each in asked["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _upload(self, oid: str, body: bytes) -> None:
        self.hub.uploads += 1
        if self.hub.closed:
            return self._send(403, b"")
        if self.hub.uploads == self.hub.hold_upload:
            self.hub.held.set()
            self.hub.go_on.wait(60)
            return  # nothing of it is kept
        if _sha256(body) != oid:
            return self._send(400, b"")
        self.hub.lfs[oid] = body
        return self._send(200, b"")

    def _resolve(self, kind: str, name: str, revision: str, path: str) -> None:
        found = self._found(kind, name, revision)
        if found is None:
            return None
        if self.hub.repos[kind, name].gated and self.headers.get("Authorization") is None:
            message = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model is restricted."}
            return self._send(401, b"", message)
        sha, files = found
        if path not in files:
            return self._send(
                404, b"", {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            )
        content = files[path]
        tag = _sha256(content) if len(content) > SMALL else _git_hash(content)
        headers = {"X-Repo-Commit": sha, "ETag": f'"{tag}"', "Accept-Ranges": "bytes"}
        if len(content) > SMALL:
            headers |= {"X-Linked-Etag": f'"{tag}"', "X-Linked-Size": str(len(content))}
        content = self.hub.altered.get(path, content)
        status, part = 200, self.headers.get("Range")
        if part:
            first, _, last = part.removeprefix("bytes=").partition("-")
            whole, content = len(content), content[int(first) : int(last) + 1 if last else None]
            status, headers["Content-Range"] = 206, f"bytes {first}-{int(first) + len(content) - 1}/{whole}"
        return self._send(status, content, headers)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.hub.sent.append((self.path, len(content)))
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


def _remote_oid(content: bytes | None) -> str | None:
    if content is None:
        return None
    return _sha256(content) if len(content) > SMALL else _git_hash(content)


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Serve an empty hub; it is not used by itself, see ``use_hub``."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        hub.go_on.set()
        server.shutdown()
        server.server_close()
        thread.join()


def environment(hub: Hub, cache: Path) -> dict[str, str]:
    """Of a process that takes ``hub`` for the hub."""
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}


def use_hub(hub: Hub, cache: Path, patch: pytest.MonkeyPatch, *, offline: bool = False) -> None:
    """Have this process take ``hub`` for the hub, with a cache in ``cache``; the client has read the environment."""
    from huggingface_hub import constants

    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        "HF_HUB_CACHE": str(cache / "hub"),
        "HF_ASSETS_CACHE": str(cache / "assets"),
        "HF_TOKEN_PATH": str(cache / "token"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": offline,
    }.items():
        patch.setattr(constants, name, value)
