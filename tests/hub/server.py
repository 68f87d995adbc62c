"""The read side of the Hub's HTTP protocol, on 127.0.0.1: enough for the real client to load models from it.

Answered: ``api/models?search=``, ``api/models/<id>[/revision/<rev>]``, ``api/models/<id>/tree/<rev>`` and
``<id>/resolve/<rev>/<file>`` (HEAD, GET and ranges), with the headers and error codes that ``huggingface_hub`` reads.
The client takes ``HF_ENDPOINT`` when it is imported, so it runs in a process of its own: `run_client`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests import forked

__all__ = ["LoopbackHub", "Repo", "STOP_THE_HUB", "run_client"]


@dataclass
class Repo:
    """A model repo: commits, and the branches and tags that point to them.

    `access`: ``open``; ``gated`` (listed for everyone, files for no one); ``private`` (only with the hub's token);
    ``broken`` (every answer is a 503).
    """

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    access: str = "open"

    def commit(self, folder: Path, *branches: str) -> str:
        """Commit a folder's files, and point the branches to it; "main" if none is named."""
        files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        sha = hashlib.sha1(repr([(n, hashlib.sha1(b).hexdigest()) for n, b in files.items()]).encode()).hexdigest()
        self.commits[sha] = files
        for branch in branches or ("main",):
            self.refs[branch] = sha
        return sha

    def find(self, revision: str) -> str | None:
        """The full hash of a revision."""
        return self.refs.get(revision) or (revision if revision in self.commits else None)


class LoopbackHub:
    """Use as a context manager; `endpoint` is what ``HF_ENDPOINT`` should be.

    `states_digests`: whether a repo's listing has its weights in large-file storage, with their SHA-256. `hold`: part
    of an address at which a body is sent or taken by half, until `released`; `reached` says that it has come to that.
    """

    def __init__(self, repos: dict[str, Repo], token: str = "hf_loopback") -> None:
        self.repos = repos
        self.token = token
        self.states_digests = True
        self.hold = ""
        self.reached, self.released = threading.Event(), threading.Event()
        self.requests: list[str] = []
        self.connections: set[socket.socket] = set()
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def knows(self, token: str) -> bool:
        """Whether a token is the account's."""
        return token == self.token

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> LoopbackHub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop listening: from now on the connection is refused."""
        if self._thread.is_alive():
            self._server.shutdown()
            # Connections that a client keeps would go on being served by their threads.
            for connection in list(self.connections):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self._server.server_close()
            self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    server_hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.server_hub.connections.add(self.connection)

    def finish(self) -> None:
        self.server_hub.connections.discard(self.connection)
        super().finish()

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        hub = self.server_hub
        address = urlsplit(self.path)
        wanted = self.headers.get("Range")
        hub.requests.append(f"{self.command} {self.path}" + (f" {wanted}" if wanted else ""))
        if address.path == "/_stop":
            # In answer to the client's own script, so that "the Hub went away" is tested in one process.
            # The client's kept connection goes too, or it would go on being served.
            self._send(200, b"", {"Connection": "close"}, body)
            threading.Thread(target=hub.stop).start()
            return
        sent = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if address.path == "/api/models":
            self._list(parse_qs(address.query).get("search", [""])[0], body)
            return
        api = address.path.startswith("/api/models/")
        parts = [unquote(part) for part in address.path.removeprefix("/api/models").strip("/").split("/")]
        repo = hub.repos.get("/".join(parts[:2]))
        rest = parts[2:]
        if sent and not hub.knows(sent):
            self._fail(401, "", "Invalid credentials in Authorization header", body)
        elif repo is None or (repo.access == "private" and not hub.knows(sent)):
            # The Hub does not tell a stranger which of the two it is.
            self._fail(404 if sent else 401, "RepoNotFound", "Repository not found", body)
        elif repo.access == "broken":
            self._fail(503, "", "Service unavailable", body)
        elif api:
            self._api(repo, "/".join(parts[:2]), rest, parse_qs(address.query), body)
        elif repo.access == "gated":
            self._fail(401 if not sent else 403, "GatedRepo", "Access to model is restricted", body)
        else:
            self._resolve(repo, rest, body)

    def _list(self, wanted: str, body: bool) -> None:
        names = [name for name, repo in self.server_hub.repos.items() if repo.access == "open"]
        found = [{"_id": name, "id": name} for name in names if wanted.lower() in name.lower()]
        self._send(200, json.dumps(found).encode(), {}, body)

    def _api(self, repo: Repo, name: str, rest: list[str], query: dict[str, list[str]], body: bool) -> None:
        cut = self._cut(repo, rest) if rest else 0
        if cut is None:
            return self._fail(404, "RevisionNotFound", "Invalid rev id", body)
        sha = repo.find("/".join(rest[1:cut]) if rest else "main")
        assert sha is not None
        files = repo.commits[sha]
        if rest and rest[0] == "tree":
            folder = "".join(f"{part}/" for part in rest[cut:])
            entries = [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in files.items()
                if path.startswith(folder)
            ]
            if folder and not entries:
                return self._fail(404, "EntryNotFound", f"{folder} does not exist on this revision", body)
            return self._send(200, json.dumps(entries).encode(), {}, body)
        with_sizes = query.get("blobs") == ["True"] or query.get("blobs") == ["true"]
        siblings = [
            {"rfilename": path} | (_blob(path, d, self.server_hub.states_digests) if with_sizes else {})
            for path, d in files.items()
        ]
        info = {
            "_id": "0",
            "id": name,
            "sha": sha,
            "private": repo.access == "private",
            "gated": "manual" if repo.access == "gated" else False,
            "siblings": siblings,
            "tags": [],
            "cardData": _front_matter(files.get("README.md", b"")),
        }
        return self._send(200, json.dumps(info).encode(), {}, body)

    def _cut(self, repo: Repo, rest: list[str]) -> int | None:
        """Where a revision that starts at rest[1] ends; one such as refs/pr/1 has slashes (sent quoted)."""
        return next((n for n in range(2, len(rest) + 1) if repo.find("/".join(rest[1:n]))), None)

    def _resolve(self, repo: Repo, rest: list[str], body: bool) -> None:
        assert rest[0] == "resolve"
        cut = self._cut(repo, rest)
        if cut is None:
            return self._fail(404, "RevisionNotFound", "Invalid rev id", body)
        sha = repo.find("/".join(rest[1:cut]))
        assert sha is not None
        data = repo.commits[sha].get("/".join(rest[cut:]))
        headers = {"X-Repo-Commit": sha}
        if data is None:
            return self._fail(404, "EntryNotFound", "Entry not found", body, headers)
        headers |= {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        wanted = self.headers.get("Range")
        if wanted is None:
            return self._send(200, data, headers, body)
        start, _, end = wanted.removeprefix("bytes=").partition("-")
        first, last = int(start), min(int(end) if end else len(data) - 1, len(data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        return self._send(206, data[first : last + 1], headers, body)

    def _fail(self, status: int, code: str, message: str, body: bool, headers: dict[str, str] | None = None) -> None:
        headers = {**(headers or {}), "X-Error-Message": message}
        if code:
            headers["X-Error-Code"] = code
        self._send(status, json.dumps({"error": message}).encode(), headers, body)

    def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body and self._is_held():
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self._wait()
            data = data[len(data) // 2 :]
        if body:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(data)

    def _is_held(self) -> bool:
        hub = self.server_hub
        return bool(hub.hold) and hub.hold in self.path and not hub.released.is_set()

    def _wait(self) -> None:
        self.server_hub.reached.set()
        self.server_hub.released.wait(120)


def _blob(path: str, data: bytes, stored_apart: bool) -> dict[str, Any]:
    """What a listing with ``blobs`` says of a file."""
    if not stored_apart or not path.endswith(".safetensors"):
        return {"size": len(data)}
    stored = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 134}
    return {"size": len(data), "lfs": stored}


def _front_matter(readme: bytes) -> dict[str, Any]:
    text = readme.decode()
    return yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}


STOP_THE_HUB = """
import socket, time
from urllib.parse import urlsplit
from huggingface_hub import constants, get_session
get_session().get(constants.ENDPOINT + "/_stop")
address = urlsplit(constants.ENDPOINT)
for _ in range(600):
    try:
        socket.create_connection((address.hostname, address.port), 1).close()
    except OSError:
        break
    time.sleep(0.05)
else:
    raise SystemExit("the Hub is still there")
"""
"""For a client's script: from here on the Hub is gone, and the script goes on when that is so."""


def run_client(
    hub: LoopbackHub, home: Path, script: str, *, token: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a Python script whose Hub is `hub`, with a cache of its own, from the repository's root."""
    root = Path(__file__).parents[2]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment = {
        **inherited,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": "1",
        **({} if token is None else {"HF_TOKEN": token}),
        **environment,
    }
    return forked.run(script=script, cwd=root, env=environment)
