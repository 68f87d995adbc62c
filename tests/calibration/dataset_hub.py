"""The Hub on the loopback interface, for datasets: the same protocol under ``datasets/``."""

from __future__ import annotations

import hashlib
import json
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub import LoopbackHub, Repo

__all__ = ["DatasetHub"]


class DatasetHub(LoopbackHub):
    """Serves its repos as datasets; use as a context manager."""

    def __init__(self, repos: dict[str, Repo]) -> None:
        super().__init__(repos)
        self._server.RequestHandlerClass = _for_datasets(self._server.RequestHandlerClass)


def _for_datasets(handler: Any) -> Any:
    class Handler(handler):
        def _answer(self, body: bool) -> None:
            self.path = self.path.replace("/api/datasets/", "/api/models/", 1)
            if self.path.startswith("/datasets/"):
                self.path = self.path.removeprefix("/datasets")
            super()._answer(body)

        def do_POST(self) -> None:
            # `paths-info`: which of some paths there are. The form is read either way, or the connection is spoilt.
            form = self.rfile.read(int(self.headers["Content-Length"])).decode()
            parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
            repo = self.server_hub.repos.get("/".join(parts[2:4]))
            if repo is None or parts[4] != "paths-info":
                return self._fail(404, "RepoNotFound", "Repository not found", True)
            files = repo.commits[repo.find("/".join(parts[5:])) or ""]
            wanted = json.loads(form)["paths"] if form.startswith("{") else parse_qs(form)["paths"]
            found = []
            for path in wanted:
                if path in files:
                    oid = hashlib.sha1(files[path]).hexdigest()
                    found.append({"type": "file", "path": path, "size": len(files[path]), "oid": oid})
                elif any(name.startswith(f"{path}/") for name in files):
                    found.append({"type": "directory", "path": path, "oid": "0"})
            return self._send(200, json.dumps(found).encode(), {}, True)

    return Handler
