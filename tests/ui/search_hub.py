"""A Hub on loopback that knows the names of some repos and nothing else, for the search fields."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

__all__ = ["HOSTILE", "NAMES", "SearchHub"]

HOSTILE = "evil/<img src=x onerror=window.hacked=1>"
NAMES = {
    "models": ["tiny/llama-one", "tiny/qwen-two", HOSTILE],
    "datasets": ["words/indonesian-news", "words/evil-<b>bold</b>"],
}
ADAPTERS = {"base_model:adapter:tiny/qwen-two": ["tiny/lora-of-two"], "base_model:adapter:tiny/llama-one": []}


class SearchHub:
    """Use as a context manager; `endpoint` is what ``HF_ENDPOINT`` should be."""

    def __init__(self) -> None:
        asked: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                self._send(200, b"")

            def do_GET(self) -> None:
                asked.append(self.path)
                address = urlsplit(self.path)
                kind = address.path.removeprefix("/api/")
                if kind not in NAMES:
                    self._send(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
                    return
                query = parse_qs(address.query)
                wanted, tag = query.get("search", [""])[0].lower(), query.get("filter", [""])[0]
                names = ADAPTERS.get(tag, []) if tag.startswith("base_model:adapter:") else NAMES[kind]
                found = [{"id": name, "_id": name} for name in names if wanted in name.lower()]
                self._send(200, json.dumps(found).encode())

            def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

        self.asked = asked
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> SearchHub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
