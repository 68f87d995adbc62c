"""A run's files over HTTP: the zip as it is streamed, single files, and nothing else; kept in a folder of one's own."""

import asyncio
import io
import os
import shutil
import time
import urllib.error
import urllib.request
import zipfile
from dataclasses import replace

import pytest
from starlette.requests import Request

from tests.ui.awaited import awaited
from tmerge.errors import OutputExistsError, RunNotFoundError
from tmerge.recipe import Recipe
from tmerge.ui.server.downloads import download_routes, files_of, keep_in
from tmerge.ui.server.room import goes_now, may_go
from tmerge.ui.server.visitor_run import GONE, Further, VisitorRun


@pytest.fixture(scope="module")
def done(served):
    run_id = served.context.store.start(served.recipe(seed=11), "someone")
    run = served.ended(run_id)
    assert run.state == "done", run.error
    return run


def fetch(url):
    with urllib.request.urlopen(url, timeout=60) as answer:
        return answer.headers, answer.read()


def test_the_zip_is_the_run_without_its_cache(served, done):
    headers, data = fetch(f"{served.url}/run/{done.id}/model.zip")
    assert "fused.zip" in headers["Content-Disposition"]
    with zipfile.ZipFile(io.BytesIO(data)) as packed:
        assert packed.testzip() is None
        names = {name.removeprefix("fused/") for name in packed.namelist()}
        assert {"config.json", "model.safetensors", "README.md", "tmerge/report.json"} <= names
        assert not any(name.startswith("tmerge/cache") for name in names)
        for name in names:
            assert packed.read(f"fused/{name}") == (done.folder / name).read_bytes()


def test_one_file_is_what_the_run_wrote(served, done):
    _, data = fetch(f"{served.url}/run/{done.id}/files/tmerge/report.json")
    assert data == (done.folder / "tmerge/report.json").read_bytes()


@pytest.mark.parametrize(
    "path",
    [
        "run/{id}x/model.zip",
        "run/{id}/files/../texts.txt",
        "run/{id}/files/tmerge/cache/texts.json",
        "run/{id}/files/%2e%2e/%2e%2e/etc/passwd",
        "run/{id}/files//etc/passwd",
        "run/{id}/files/",
    ],
)
def test_nothing_else_is_served(served, done, path):
    with pytest.raises(urllib.error.HTTPError) as refused:
        fetch(f"{served.url}/{path.format(id=done.id)}")
    assert refused.value.code == 404


def test_a_kept_model_outlives_the_app_and_replaces_nothing(done, tmp_path):
    keep_in(done, tmp_path / "new" / "fused")
    kept = tmp_path / "new" / "fused"
    assert files_of(kept) == files_of(done.folder)
    for name in files_of(kept):
        assert (kept / name).read_bytes() == (done.folder / name).read_bytes()
    with pytest.raises(OutputExistsError, match="not empty"):
        keep_in(done, kept)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputExistsError):
        keep_in(done, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    assert os.listdir(tmp_path / "new") == ["fused"]


def test_nothing_of_ones_own_beside_it_is_touched(done, tmp_path):
    mine = tmp_path / "model.part" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    keep_in(done, tmp_path / "model")
    assert mine.read_text() == "mine" and sorted(os.listdir(tmp_path)) == ["model", "model.part"]


def test_asking_for_the_zips_headers_makes_no_zip(served, done):
    asked = urllib.request.Request(f"{served.url}/run/{done.id}/model.zip", method="HEAD")
    with urllib.request.urlopen(asked, timeout=60) as answer:
        assert "fused.zip" in answer.headers["Content-Disposition"] and answer.read() == b""


def test_across_file_systems_it_is_copied(done, tmp_path, monkeypatch):
    def no_links(*paths):
        raise OSError("another file system")

    monkeypatch.setattr(os, "link", no_links)
    keep_in(done, tmp_path / "fused")
    assert files_of(tmp_path / "fused") == files_of(done.folder)


@pytest.fixture
def asked(tmp_path):
    """A finished comparison that was looked up by a route, not yet answered; and what is sent for it."""
    (tmp_path / "home/merge").mkdir(parents=True)
    (tmp_path / "home/merge/config.json").write_text("{}")
    (tmp_path / "home/compare.html").write_text("rows")
    recipe = Recipe.from_mapping({"target": "a", "source": "b"})
    run = VisitorRun("x", recipe, tmp_path / "home/merge", "someone", state="done", report=object())
    run.further = Further(run.folder, 1, "compare")

    def ask(path, params):
        scope = {"type": "http", "method": "GET", "headers": [], "path_params": {"run_id": "x", **params}}
        (route,) = [route for route in download_routes({"x": run}.get) if route.path == path]
        answer, sent = route.endpoint(Request(scope)), []

        async def send(message):
            sent.append((message, bool(run.reading)))

        async def receive():
            await asyncio.sleep(60)

        return lambda: awaited(answer(scope, receive, send)) or sent

    return run, ask


PATHS = [
    ("/run/{run_id}/compare.html", {}),
    ("/run/{run_id}/model.zip", {}),
    ("/run/{run_id}/files/{path:path}", {"path": "config.json"}),
]


@pytest.mark.parametrize(("path", "params"), PATHS)
def test_what_is_sent_is_held(asked, path, params):
    run, ask = asked
    sent = ask(path, params)()
    assert sent[0][0]["status"] == 200 and all(held for _, held in sent)
    assert not run.reading and goes_now(run)


@pytest.mark.parametrize(("path", "params"), PATHS)
@pytest.mark.parametrize("swept", ["going", "gone"])
def test_a_run_that_goes_before_it_is_sent_is_told_gone(asked, path, params, swept):
    run, ask = asked
    answer = ask(path, params)
    assert goes_now(run)
    if swept == "gone":
        shutil.rmtree(run.folder.parent)
    sent = answer()
    assert sent[0][0]["status"] == 404 and GONE.encode() in sent[1][0]["body"]
    assert not run.reading


def test_a_run_stays_while_a_download_of_it_is_open(served, monkeypatch):
    store = served.context.store
    run = served.ended(store.start(served.recipe(seed=12), "someone"))
    # More than is on its way.
    with (run.folder / "large.bin").open("wb") as large:
        large.truncate(64 * 2**20)
    # All that are over go now: this test is the last one here.
    monkeypatch.setattr(store, "settings", replace(store.settings, runs_kept_seconds=-1.0))
    for path in ("model.zip", "files/large.bin"):
        with urllib.request.urlopen(f"{served.url}/run/{run.id}/{path}", timeout=60) as answer:
            assert answer.read(1000)
            store.sweep()
            assert store.get(run.id) is run and run.folder.exists()
        # It was left before its end.
        until = time.monotonic() + 30
        while run.reading and time.monotonic() < until:
            time.sleep(0.05)
        assert not run.reading
    with run.being_read():
        assert not may_go(run)
        run.looked_at -= 3600
        assert may_go(run)
    store.sweep()
    assert store.get(run.id) is None
    with pytest.raises(RunNotFoundError), run.being_read():
        pass
