"""A page of another site with the app in an iframe, as a Space's page has it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

__all__ = ["framing"]

# What the Hub lets a Space do within its page.
_SANDBOX = (
    "allow-downloads allow-forms allow-modals allow-popups allow-popups-to-escape-sandbox allow-same-origin "
    "allow-scripts allow-storage-access-by-user-activation"
)


@contextlib.contextmanager
def framing(url: str) -> Iterator[str]:
    """Serve the page; gives its address, at ``localhost``, which is another site than ``127.0.0.1``."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            frame = f'<iframe src="{url}" sandbox="{_SANDBOX}" style="width: 100%; height: 850px"></iframe>'
            self.wfile.write(frame.encode())

        def log_message(self, *words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://localhost:{server.server_port}/"
    finally:
        server.shutdown()
