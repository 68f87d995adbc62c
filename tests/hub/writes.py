"""The write side of the Hub's HTTP protocol, on 127.0.0.1: accounts, making repos, uploads, commits, and what fails.

Answered beyond `LoopbackHub`: ``api/whoami-v2``, ``api/repos/create``, ``preupload``, ``commit`` (also
``?create_pr=1``), ``branch``, the LFS batch with its basic and multipart uploads and its verification, and jobs.
Spaces are repos of their own under ``spaces/user/name``: made, asked about, written to, and given hardware.
A `Fault` answers instead, as often as it says. A client's script reaches the hub's own settings at ``/_set``.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import socket
import threading
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.hub.server import LoopbackHub, Repo

__all__ = ["Fault", "Job", "WritableHub"]

_LARGE = (".safetensors", ".png", ".bin")
_PART = 200_000
_LICENCES = ("apache-2.0", "mit", "gemma", "llama3.2", "cc-by-4.0", "other")


@dataclass
class Fault:
    """What goes wrong.

    Attributes:
        path: In the address of the requests that it meets.
        method: Theirs.
        status: Answered; 0 drops the connection after `bytes` of the request's body.
        times: How often; then all is well.
        message: Of the Hub.
        headers: Sent with it.
        passes: Requests that are let through before.
    """

    path: str
    method: str = "POST"
    status: int = 0
    times: int = 1
    message: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    bytes: int = 1000
    passes: int = 0


@dataclass
class Job:
    """A job that was asked for, and what it is to say."""

    spec: dict[str, Any]
    log: list[str]
    stage: str


class WritableHub(LoopbackHub):
    """A Hub with one account.

    Attributes:
        user: Its name; it may write to repos of this name and of `orgs`.
        readers: Tokens that may read and not write.
        sessions: Tokens of who has signed in to an app, which may write as well.
        faults: Waiting to happen.
        objects: SHA-256 -> what was uploaded to large-file storage.
        uploads: SHA-256 of every upload that came in whole, in order.
        jobs: By id.
        job_log: What the next job will say.
        job_stage: How it will end.
        hardware: Space -> what it was asked to run on.
        free_spaces: Whether the account may have Gradio Spaces on the Hub's free hardware.
    """

    def __init__(self, repos: dict[str, Repo] | None = None, token: str = "hf_loopback", user: str = "user") -> None:
        super().__init__({} if repos is None else repos, token)
        self.user = user
        self.orgs: list[str] = []
        self.readers: set[str] = set()
        self.sessions: set[str] = set()
        self.faults: list[Fault] = []
        self.objects: dict[str, bytes] = {}
        self.uploads: list[str] = []
        self.commits: list[dict[str, Any]] = []
        self.jobs: dict[str, Job] = {}
        self.job_log, self.job_stage = ["merging", "pushed"], "COMPLETED"
        self.hardware: dict[str, str] = {}
        self.free_spaces = True
        self.bodies: list[bytes] = []
        self.lock = threading.Lock()
        self._server.RequestHandlerClass = _writing(self._server.RequestHandlerClass)

    def knows(self, token: str) -> bool:
        """Whether a token is the account's, to read or to write."""
        return token in (self.token, *self.sessions) or token in self.readers

    def may_write(self, repo: str) -> bool:
        """Whether the account owns the repo's namespace."""
        return repo.removeprefix("spaces/").partition("/")[0] in (self.user, *self.orgs)


def _writing(handler: Any) -> Any:
    class Handler(handler):
        server_hub: WritableHub

        def do_PUT(self) -> None:
            self._write()

        def do_POST(self) -> None:
            self._write()

        def do_GET(self) -> None:
            if self._faulty():
                return
            path = urlsplit(self.path).path
            if path == "/api/whoami-v2":
                self.server_hub.requests.append(f"GET {self.path}")
                return self._whoami()
            if path.startswith("/api/jobs/"):
                self.server_hub.requests.append(f"GET {self.path}")
                return self._job(path.split("/")[4:])
            if path.startswith("/api/spaces/"):
                self.server_hub.requests.append(f"GET {self.path}")
                return self._space([unquote(part) for part in path.split("/")[3:]])
            super().do_GET()

        # -- who asks --------------------------------------------------------------------------------------------

        def _sent(self) -> str:
            return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

        def _known(self) -> bool:
            return self.server_hub.knows(self._sent())

        def _whoami(self) -> None:
            if not self._known():
                return self._fail(401, "", "Invalid credentials in Authorization header", True)
            hub = self.server_hub
            role = "read" if self._sent() in hub.readers else "write"
            account = {
                "type": "user",
                "id": "0",
                "name": hub.user,
                "fullname": hub.user,
                "avatarUrl": "/avatar.svg",
