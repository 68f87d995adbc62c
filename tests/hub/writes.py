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

from tests.hub.jobs import Job, start_job
from tests.hub.server import LoopbackHub, Repo

__all__ = ["Fault", "WritableHub"]

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


class WritableHub(LoopbackHub):
    """A Hub with one account.

    Attributes:
        user: Its name; it may write to repos of this name and of `orgs`.
        readers: Tokens that may read and not write.
        faults: Waiting to happen.
        objects: SHA-256 -> what was uploaded to large-file storage.
        uploads: SHA-256 of every upload that came in whole, in order.
        jobs: By id.
        job_hardware: What jobs can run on, as the Hub lists it.
        job_log: What the next job will say.
        job_stage: How it will end.
        sessions: Tokens of who has signed in to an app, which may write as well.
        hardware: Space -> what it was asked to run on.
        free_spaces: Whether the account may have Gradio Spaces on the Hub's free hardware.
    """

    def __init__(self, repos: dict[str, Repo] | None = None, token: str = "hf_loopback", user: str = "user") -> None:
        super().__init__({} if repos is None else repos, token)
        self.user = user
        self.orgs: list[str] = []
        self.readers: set[str] = set()
        self.faults: list[Fault] = []
        self.objects: dict[str, bytes] = {}
        self.uploads: list[str] = []
        self.commits: list[dict[str, Any]] = []
        self.jobs: dict[str, Job] = {}
        self.job_hardware: list[dict[str, Any]] = []
        self.job_log, self.job_stage = ["merging", "pushed"], "COMPLETED"
        self.sessions: set[str] = set()
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
            if self._is_held():
                self._wait()
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
            if path == "/api/jobs/hardware":
                self.server_hub.requests.append(f"GET {self.path}")
                return self._json(self.server_hub.job_hardware)
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
                "orgs": [{"type": "org", "name": name} for name in hub.orgs],
                "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": role}},
            }
            self._json(account)

        # -- requests that write ---------------------------------------------------------------------------------

        def _write(self) -> None:
            hub = self.server_hub
            if self._faulty():
                return
            address = urlsplit(self.path)
            body = self._body()
            hub.requests.append(f"{self.command} {self.path}")
            parts = [unquote(part) for part in address.path.strip("/").split("/")]
            if parts[0] == "_set":
                # A client's script says what is to go wrong next, or what the next job says and how it ends.
                for name, value in json.loads(body).items():
                    setattr(hub, name, [Fault(**item) for item in value] if name == "faults" else value)
                return self._json({})
            if parts[0] == "_lfs":
                return self._receive(parts[1:], body, parse_qs(address.query))
            if not self._known():
                return self._fail(401, "", "Invalid credentials in Authorization header", True)
            if self._sent() in hub.readers:
                return self._fail(403, "", "Forbidden: your token has no write access", True)
            if parts[:2] == ["api", "validate-yaml"]:
                return self._validate(json.loads(body)["content"])
            if parts[:2] == ["api", "jobs"]:
                return self._json(start_job(hub, json.loads(body)))
            if parts[:3] == ["api", "repos", "create"]:
                return self._create(json.loads(body))
            if address.path.endswith(".git/info/lfs/objects/batch"):
                return self._batch("/".join(parts[:2]).removesuffix(".git"), json.loads(body))
            name, rest = "/".join(parts[2:4]), parts[4:]
            if parts[1] == "spaces":
                name = f"spaces/{name}"
            if name not in hub.repos:
                return self._fail(404, "RepoNotFound", "Repository not found", True)
            pull_request = parse_qs(address.query).get("create_pr") == ["1"]
            if not hub.may_write(name) and not pull_request:
                return self._fail(403, "", f"Forbidden: you may not write to {name}", True)
            if rest[0] == "preupload":
                return self._preupload(hub.repos[name], json.loads(body))
            if rest[0] == "hardware":
                hub.hardware[name] = json.loads(body)["flavor"]
                return self._json({"stage": "BUILDING", "hardware": {"requested": hub.hardware[name]}})
            if rest[0] == "branch":
                hub.repos[name].refs["/".join(rest[1:])] = hub.repos[name].refs["main"]
                return self._json({})
            if rest[0] == "commit":
                return self._commit(name, "/".join(rest[1:]), body, pull_request)
            return self._fail(404, "", f"no such route: {self.path}", True)

        def _body(self, most: int | None = None) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                found = b""
                while size := int(self.rfile.readline().strip() or b"0", 16):
                    found += self.rfile.read(size)
                    self.rfile.readline()
                    if most is not None and len(found) >= most:
                        return found
                self.rfile.readline()
                return found
            length = int(self.headers.get("Content-Length") or 0)
            return self.rfile.read(length if most is None else min(most, length))

        def _faulty(self) -> bool:
            for fault in self.server_hub.faults:
                if fault.path in self.path and fault.method == self.command and fault.times:
                    if fault.passes:
                        fault.passes -= 1
                        continue
                    fault.times -= 1
                    self.server_hub.requests.append(f"{self.command} {self.path} (fails: {fault.status or 'dropped'})")
                    if fault.status:
                        self._body()
                        self._fail(fault.status, "", fault.message, True, fault.headers)
                    else:
                        self._body(fault.bytes)
                        self.close_connection = True
                        with contextlib.suppress(OSError):
                            self.connection.shutdown(socket.SHUT_RDWR)
                    return True
            return False

        def _create(self, asked: dict[str, Any]) -> None:
            hub = self.server_hub
            name = f"{asked.get('organization') or hub.user}/{asked['name']}"
            space = asked.get("type") == "space"
            if space:
                name = f"spaces/{name}"
            if not hub.may_write(name):
                return self._fail(403, "", f"Forbidden: you may not create repos under {name.partition('/')[0]}", True)
            if name in hub.repos:
                return self._fail(409, "", "You already created this model repo", True)
            if space and not hub.free_spaces:
                return self._fail(402, "", "Payment required to host Gradio Spaces", True)
            if space:
                assert asked["sdk"] == "gradio"
                hub.hardware[name] = asked.get("hardware", "cpu-basic")
            repo = Repo(access="private" if asked.get("visibility") == "private" else "open")
            sha = hashlib.sha1(name.encode()).hexdigest()
            repo.commits[sha], repo.refs["main"] = {".gitattributes": b""}, sha
            hub.repos[name] = repo
            self._json({"url": f"{hub.endpoint}/{name}", "name": name, "id": "0"})

        def _validate(self, card: str) -> None:
            """As the Hub does before it takes a card: what it refuses is an error, in its words."""
            data = yaml.safe_load(card.split("---")[1]) if card.startswith("---") else {}
            errors = []
            if isinstance(data.get("license"), str) and data["license"] not in _LICENCES:
                errors.append({"message": f'"license" must be one of [{", ".join(_LICENCES)}]'})
            for result in (data.get("model-index") or [{}])[0].get("results", []):
                if not all(result.get("dataset", {}).get(key) for key in ("type", "name")):
                    errors.append({"message": '"model-index" needs the type and name of each dataset'})
                if not all("type" in metric and "value" in metric for metric in result["metrics"]):
                    errors.append({"message": '"model-index" needs the type and value of each metric'})
            languages = data.get("language") or []
            for code in [languages] if isinstance(languages, str) else languages:
                if not (code.isalpha() and code.islower() and len(code) in (2, 3)):
                    errors.append({"message": '"language" must only contain lowercase ISO 639 codes'})
            answer = json.dumps({"errors": errors, "warnings": []}).encode()
            self._send(400 if errors else 200, answer, {"Content-Type": "application/json"}, True)

        def _preupload(self, repo: Repo, asked: dict[str, Any]) -> None:
            files = [
                {
                    "path": item["path"],
                    "uploadMode": "lfs" if item["path"].endswith(_LARGE) else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for item in asked["files"]
            ]
            self._json({"files": files})

        def _batch(self, name: str, asked: dict[str, Any]) -> None:
            # Who may not write to a repo may still open a pull request on it, so that its files are taken.
            hub, objects = self.server_hub, []
            if name not in hub.repos:
                return self._fail(404, "RepoNotFound", "Repository not found", True)
            for item in asked["objects"]:
                oid, size = item["oid"], item["size"]
                answer: dict[str, Any] = {"oid": oid, "size": size}
                if oid not in hub.objects:
                    place = f"{hub.endpoint}/_lfs/{oid}"
                    upload: dict[str, Any] = {"href": place}
                    if size > _PART:
                        numbers = range(1, -(-size // _PART) + 1)
                        parts = {f"{number:05d}": f"{place}?part={number}" for number in numbers}
                        upload = {"href": f"{place}/complete", "header": {"chunk_size": str(_PART), **parts}}
                    answer["actions"] = {"upload": upload, "verify": {"href": f"{place}/verify"}}
                objects.append(answer)
            self._json({"transfer": "basic", "objects": objects})

        def _receive(self, parts: list[str], body: bytes, query: dict[str, list[str]]) -> None:
            hub, oid = self.server_hub, parts[0]
            if self.command == "PUT" and "part" in query:
                hub.objects[f"{oid}/{query['part'][0]}"] = body
                return self._send(200, b"", {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}, True)
            if self.command == "PUT":
                hub.objects[oid] = body
            elif parts[1] == "complete":
                numbers = [str(part["partNumber"]) for part in json.loads(body)["parts"]]
                hub.objects[oid] = b"".join(hub.objects.pop(f"{oid}/{number}") for number in numbers)
            else:
                whole = hub.objects.get(oid)
                if whole is None or hashlib.sha256(whole).hexdigest() != oid:
                    return self._fail(404, "", "object is not what it should be", True)
                hub.uploads.append(oid)
            return self._json({})

        def _commit(self, name: str, revision: str, body: bytes, pull_request: bool) -> None:
            hub = self.server_hub
            repo = hub.repos[name]
            parent = repo.find(revision)
            if parent is None:
                return self._fail(404, "RevisionNotFound", "Invalid rev id", True)
            files = dict(repo.commits[parent])
            lines = [json.loads(line) for line in body.splitlines()]
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
                elif line["key"] == "lfsFile":
                    if value["oid"] not in hub.objects:
                        return self._fail(400, "", f"{value['path']}: no such object", True)
                    files[value["path"]] = hub.objects[value["oid"]]
            contents = repr([(path, hashlib.sha1(data).hexdigest()) for path, data in sorted(files.items())])
            sha = hashlib.sha1((parent + contents).encode()).hexdigest()
            repo.commits[sha] = files
            answer = {"commitUrl": f"{hub.endpoint}/{name}/commit/{sha}", "commitOid": sha}
            if pull_request:
                number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
                revision = f"refs/pr/{number}"
                answer["pullRequestUrl"] = f"{hub.endpoint}/{name}/discussions/{number}"
            repo.refs[revision] = sha
            hub.commits.append(
                {"repo": name, "revision": revision, "files": sorted(files), "header": lines[0]["value"]}
            )
            self._json(answer)

        def _space(self, parts: list[str]) -> None:
            hub, name = self.server_hub, "/".join(["spaces", *parts[:2]])
            repo = hub.repos.get(name)
            if repo is None or (repo.access == "private" and not self._known()):
                return self._fail(404, "RepoNotFound", "Repository not found", True)
            files = repo.commits[repo.refs["main"]]
            if parts[2:3] == ["tree"]:
                return self._json([{"type": "file", "path": p, "size": len(d), "oid": "0"} for p, d in files.items()])
            info = {"id": "/".join(parts[:2]), "sha": repo.refs["main"], "private": repo.access == "private"}
            hardware = {"current": hub.hardware.get(name, "cpu-basic")}
            siblings = [{"rfilename": path} for path in files]
            self._json(info | {"siblings": siblings, "runtime": {"stage": "RUNNING", "hardware": hardware}})

        def _job(self, rest: list[str]) -> None:
            hub, number = self.server_hub, rest[0]
            if number not in hub.jobs:
                return self._fail(404, "", "Job not found", True)
            if rest[1:2] == ["logs"]:
                return self._send(200, hub.jobs[number].stream(), {"Content-Type": "text/event-stream"}, True)
            self._json(hub.jobs[number].info(number, hub.user))

        def _json(self, document: dict[str, Any]) -> None:
            self._send(200, json.dumps(document).encode(), {"Content-Type": "application/json"}, True)

    return Handler
