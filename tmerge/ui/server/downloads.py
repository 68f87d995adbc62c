"""A finished run's files for who has its link: one at a time, or all as one zip that is written as it is sent."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from tmerge.errors import OutputExistsError, RunNotFoundError
from tmerge.ui.server.visitor_run import GONE, VisitorRun

__all__ = ["download_routes", "files_of", "keep_in", "link_or_copy"]

_CHUNK = 1 << 20


def files_of(folder: Path) -> list[Path]:
    """The files of a run's model and its report, relative to its folder, in order; nothing of its cache."""
    cache = Path("tmerge/cache")
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in found if cache not in path.parents)


def download_routes(seen: Callable[[str], VisitorRun | None]) -> list[Route]:
    """Where the app serves ``run/ID/model.zip``, ``run/ID/files/PATH`` and a comparison's ``run/ID/compare.html``.

    Args:
        seen: The run of an id; None where there is none.
    """

    def finished(request: Request) -> VisitorRun | None:
        run = seen(request.path_params["run_id"])
        return run if run is not None and run.state == "done" and run.report is not None else None

    def zipped(request: Request) -> Response | _Held:
        run = finished(request)
        if run is None or run.example is not None:
            return PlainTextResponse(GONE, status_code=404)
        headers = {"Content-Disposition": 'attachment; filename="fused.zip"'}
        if request.method == "HEAD":
            return Response(media_type="application/zip", headers=headers)
        return _Held(run, StreamingResponse(_zip(run), media_type="application/zip", headers=headers))

    def one(request: Request) -> Response | _Held:
        run, name = finished(request), Path(request.path_params["path"])
        # Of what is listed, so that no path leads elsewhere.
        if run is None or name not in files_of(run.folder):
            return PlainTextResponse(GONE, status_code=404)
        return _Held(run, FileResponse(run.folder / name, filename=name.name))

    def compared(request: Request) -> Response | _Held:
        run = finished(request)
        if run is None or run.asks != "comparison":
            return PlainTextResponse(GONE, status_code=404)
        return _Held(run, FileResponse(run.folder.parent / "compare.html", filename="compare.html"))

    return [
        Route("/run/{run_id}/compare.html", compared, methods=["GET"]),
        Route("/run/{run_id}/model.zip", zipped, methods=["GET"]),
        Route("/run/{run_id}/files/{path:path}", one, methods=["GET"]),
    ]


def keep_in(run: VisitorRun, folder: Path) -> None:
    """Have a finished run's files in a folder of one's own, of which the app removes nothing.

    Args:
        run: Done.
        folder: New, or empty. Within one file system the files are the same ones, and take no room twice.

    Raises:
        OutputExistsError: Something is there.
        RunNotFoundError: The run is gone.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputExistsError(f"{folder} is there and not empty; name a new folder")
    with run.being_read():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as holder:
            part = Path(holder) / folder.name
            for name in files_of(run.folder):
                (part / name).parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(run.folder / name, part / name)
            if folder.exists():
                folder.rmdir()
            part.rename(folder)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """A file under a second name, or copied, where that is on another file system, or on one without links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@dataclass(frozen=True)
class _Held:
    """An answer that reads a run's files, and the run, which is kept until all of it is sent."""

    run: VisitorRun
    answer: Response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sent(message: Message) -> None:
            await send(message)
            self.run.looked_at = time.time()

        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self.run.being_read())
            except RunNotFoundError:
                # Removed since it was looked up: nothing is sent yet, so that this can still be said.
                await PlainTextResponse(GONE, status_code=404)(scope, receive, send)
                return
            await self.answer(scope, receive, sent)


class _Sink(bytearray):
    """Where a zip is written that is sent on: it holds what was not sent yet."""

    def write(self, data: bytes) -> int:
        """As of a file."""
        self.extend(data)
        return len(data)

    def flush(self) -> None:
        """Likewise."""

    def taken(self) -> bytes:
        """What was written since the last time."""
        data = bytes(self)
        self.clear()
        return data


def _zip(run: VisitorRun) -> Iterator[bytes]:
    """The files as they are: weights do not get smaller by packing."""
    sink: Any = _Sink()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as packed:
        for name in files_of(run.folder):
            with (run.folder / name).open("rb") as file, packed.open(f"fused/{name}", "w", force_zip64=True) as into:
                while data := file.read(_CHUNK):
                    into.write(data)
                    yield sink.taken()
    yield sink.taken()
