"""What a public app holds against its visitors, each limit against the real functions, or the real app over HTTP."""

import json
import time
import urllib.error
import urllib.request
import uuid
from dataclasses import replace
from types import SimpleNamespace
from urllib.parse import quote

import pytest

pytest.importorskip("gradio", reason="the app extra is not installed")

from tests.hub import LoopbackHub, Repo, run_client
from tests.pico import save_pico
from tests.ui import merges
from tmerge.errors import DatasetError, RecipeError, RemoteError, TmergeError
from tmerge.preflight.check import check
from tmerge.recipe import Recipe
from tmerge.ui.parts.fields import SETTINGS
from tmerge.ui.parts.form import typed_value
from tmerge.ui.parts.texts import upload_name
from tmerge.ui.server import limits, pushes, runs
from tmerge.ui.server.limits import AppSettings, describe_limits, refuse_large, settings_here, vetted
from tmerge.ui.server.runs import RunStore
from tmerge.ui.server.visitor import visitor_of

PUBLIC = AppSettings(public=True, max_texts=500)


# -- what is asked for ---------------------------------------------------------------------------------------------

SCRIPT = """
import json
from tmerge.recipe import Recipe
from tmerge.ui.parts.expected import _check
from tmerge.ui.server.limits import AppSettings
recipe = Recipe(target="user/target", source="user/source")
cases = {
    "small enough": AppSettings(max_parameters=10**9, max_download_bytes=10**9, max_operations=1e15),
    "parameters": AppSettings(max_parameters=1000),
    "download": AppSettings(max_download_bytes=1000),
    "work": AppSettings(max_operations=1),
}
print("RESULTS" + json.dumps({name: _check(recipe, settings).refused for name, settings in cases.items()}))
"""


@pytest.mark.slow
def test_sizes_and_time_are_refused_before_any_weight_is_fetched(tmp_path):
    hub = LoopbackHub({})
    for name, family in (("target", "llama"), ("source", "qwen2")):
        hub.repos[f"user/{name}"] = Repo()
        hub.repos[f"user/{name}"].commit(save_pico(family, tmp_path / name))
    with hub:
        ended = run_client(hub, tmp_path / "home", SCRIPT)
    assert ended.returncode == 0, ended.stderr[-2000:]
    refused = json.loads(ended.stdout.rpartition("RESULTS")[2])
    assert refused["small enough"] is None
    assert "has 104,768 parameters, where this app takes 1,000;" in refused["parameters"]
    assert " kB to fetch, where this app takes 1 kB;" in refused["download"]
    assert "operations, where this app takes 1e-12 trillion operations" in refused["work"]
    # Of the weights, headers alone are read, as ranges.
    fetched = [line for line in hub.requests if line.startswith("GET") and "model.safetensors" in line]
    assert all("bytes=" in line for line in fetched), fetched
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_who_is_refused_hangs_on_the_work_and_not_on_the_machines_speed(models):
    found = check(Recipe(target=str(models / "target"), source=str(models / "source"), dtype="float32"))
    within, beyond = (AppSettings(max_operations=share * found.estimate.operations) for share in (1.1, 0.9))
    for seconds in (1e-3, 1e9):
        timed = replace(found, estimate=replace(found.estimate, stages={"source": seconds}))
        refuse_large(timed, within)
        with pytest.raises(RecipeError, match="trillion operations, where this app takes"):
            refuse_large(timed, beyond)


def test_a_disk_that_is_too_full_is_said_before_anything_is_read(models, monkeypatch):
    monkeypatch.setattr(runs, "merge", merges.on_a_full_disk)
    recipe = Recipe(
        target=str(models / "target"), source=str(models / "source"), calibration={"dataset": str(models / "texts.txt")}
    )
    store = RunStore(AppSettings())
    run = store.get(store.start(recipe, "me"))
    until = time.monotonic() + 60
    while not run.over and time.monotonic() < until:
        time.sleep(0.05)
    assert run.state == "failed" and "of disk in the run's folder, where 10 B are free" in run.error
    assert list(run.stages) == [] and not run.folder.parent.exists()
    store.close()


@pytest.mark.parametrize(("name", "read", "most"), limits._MOST)
def test_numbers_that_decide_the_work_are_bounded(name, read, most):
    key = name.removeprefix("the number of ")
    value = [0.01 * i for i in range(1, int(most) + 2)] if key == "fusion.alphas" else int(most) + 1
    section, _, field = key.partition(".")
    kind = {"what": "reconstruct"} if key == "fusion.keep_texts" else {}
    more = Recipe.from_mapping({"target": "a/b", "source": "c/d", section: {**kind, field: value}})
    with pytest.raises(RecipeError, match=f"where this app takes {most:g}"):
        vetted(more, AppSettings(public=True))
    assert vetted(more, AppSettings()).target == "a/b"
    within = value[:-1] if isinstance(value, list) else value - 1
    assert vetted(
        Recipe.from_mapping({"target": "a/b", "source": "c/d", section: {**kind, field: within}}),
        AppSettings(public=True),
    )


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"calibration": {"texts": 501}}, "calibration.texts is 501, where this app takes 500"),
        ({"trust_remote_code": ["a/b"]}, "cannot be set from the browser"),
        ({"source_base": "/etc", "fusion": {"what": "task-vector"}}, "is a path"),
        ({"fusion": {"what": "reconstruct", "keep": "/etc/passwd"}}, "fusion.keep"),
        ({"target": "~/x"}, "is a path"),
        (
            {"source": "e/f", "source_base": "e/f", "sources": [{"source": "a/b"}, {"adapter": "/etc"}]},
            "source 2 .*path",
        ),
        (
            {"source": "e/f", "source_base": "e/f", "sources": [{"adapter": f"a/{n}"} for n in range(5)]},
            "the number of sources is 5, where this app takes 4",
        ),
        ({"target": "../x"}, "is a path"),
        ({"plan": "demo:gemma-3-270m"}, "is a path"),
        ({"calibration": {"dataset": "../../etc/passwd"}}, "is not a Hub dataset"),
        ({"calibration": {"dataset": "/proc/self/environ"}}, "is not a Hub dataset"),
        ({"calibration": {"dataset": "user/texts.csv"}}, "is not a Hub dataset"),
        ({"device": "cuda:0; rm"}, "choose auto"),
        ({"save": {"max_shard_size": "1KB"}}, "max_shard_size"),
    ],
)
def test_what_no_browser_may_ask_for(changes, why):
    with pytest.raises(TmergeError, match=why):
        vetted(Recipe.from_mapping({"target": "a/b", "source": "c/d", **changes}), PUBLIC)


@pytest.mark.parametrize("size", [5_000_000_000, "1TB", "1.5GB", "500mb", " 5 GB "])
def test_sizes_of_weight_files_are_the_recipes_own(size):
    given = {"target": "a/b", "source": "c/d", "calibration": {"texts": 100}, "save": {"max_shard_size": size}}
    recipe = Recipe.from_mapping(given)
    assert vetted(recipe, PUBLIC).save.max_shard_size == vetted(recipe, AppSettings()).save.max_shard_size == size
    # As the form gives it, whose field holds text.
    setting = next(setting for setting in SETTINGS if setting.key == "save.max_shard_size")
    assert typed_value(setting, str(size)) == (size.strip() if isinstance(size, str) else size)


def test_small_weight_files_are_refused_on_a_public_app_alone():
    recipe = Recipe.from_mapping({"target": "a/b", "source": "c/d", "save": {"max_shard_size": "999KB"}})
    assert vetted(recipe, AppSettings()).save.shard_bytes == 999_000
    with pytest.raises(RecipeError, match="'999KB', where this app takes 1MB at least"):
        vetted(recipe, PUBLIC)


def test_a_space_has_every_limit(monkeypatch):
    monkeypatch.setenv("SPACE_ID", "user/app")
    settings = settings_here()
    named = ("max_parameters", "max_download_bytes", "max_texts", "max_operations", "runs_per_visitor", "total_runs")
    assert settings.public and settings.local_root is None and not settings.zero_gpu
    assert all(getattr(settings, name) is not None for name in named)
    assert settings.job_package.endswith("/spaces/user/app") and settings.job_package.startswith("git+http")
    assert len(describe_limits(settings)) >= 5
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    monkeypatch.setenv(limits.PACKAGE_VARIABLE, "tmerge-llm==9.9")
    assert settings_here().zero_gpu and settings_here().max_gpu_seconds
    assert settings_here().job_package == "tmerge-llm==9.9"
    monkeypatch.delenv("SPACE_ID")
    assert not settings_here().public and settings_here().job_package is None


def test_a_space_whose_jobs_would_install_another_package_says_so_in_a_line(monkeypatch):
    monkeypatch.setenv("SPACE_ID", "user/app")
    monkeypatch.setenv(limits.PACKAGE_VARIABLE, "tmerge==0.1.0")
    with pytest.raises(RemoteError, match="the variable TMERGE_PACKAGE is 'tmerge==0.1.0'.*; set it to git") as caught:
        settings_here()
    assert "\n" not in str(caught.value)


# -- who asks ------------------------------------------------------------------------------------------------------


def asking(forwarded, host="10.0.0.1"):
    return SimpleNamespace(client=SimpleNamespace(host=host), headers={"x-forwarded-for": forwarded}, username=None)


def test_a_visitor_cannot_be_many_by_saying_so(monkeypatch):
    monkeypatch.setenv("SPACE_ID", "user/app")
    # Only what the Space's proxy adds at the end counts.
    assert visitor_of(asking("1.1.1.1, 9.9.9.9")) == visitor_of(asking("2.2.2.2, 9.9.9.9"))
    assert visitor_of(asking("9.9.9.9")) != visitor_of(asking("8.8.8.8"))
    assert "9.9.9.9" not in visitor_of(asking("9.9.9.9"))
    monkeypatch.delenv("SPACE_ID")
    assert visitor_of(asking("1.1.1.1")) == visitor_of(asking("2.2.2.2"))


def test_the_owners_token_is_no_visitors(monkeypatch):
    monkeypatch.setattr(pushes, "get_token", lambda: "hf_the_owners")
    assert pushes.own_token(AppSettings(public=True), None) is None
    assert pushes.own_token(AppSettings(public=True), "hf_mine") == "hf_mine"
    assert pushes.own_token(AppSettings(), None) == "hf_the_owners"


# -- folders -------------------------------------------------------------------------------------------------------


def test_nothing_of_a_run_that_failed_stays_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "merge", merges.failing_with_files)
    texts = tmp_path / "mine.txt"
    texts.write_text("secret")
    store = RunStore(AppSettings())
    run = store.get(
        store.start(Recipe(target="a/b", source="c/d", calibration={"dataset": "upload:mine.txt"}), "me", texts)
    )
    until = time.monotonic() + 60
    while not run.over and time.monotonic() < until:
        time.sleep(0.01)
    # The upload was copied into the run's folder, which is gone with the copy.
    assert run.state == "failed" and run.error == "no such column" and list(store.root.iterdir()) == []
    # It was read from there, which is nobody's business.
    assert run.stages["target"].what == "mine.txt" and str(store.root) not in "".join(run.log)
    store.close()
    assert not store.root.exists()


# -- uploads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["model.bin", "weights.pt", "run.py", "a.pickle", "a.yaml", "texts", "a.zip", "a.txt.gz"]
)
def test_a_file_that_is_no_data_is_not_read(name):
    with pytest.raises(DatasetError, match="not a kind of file that is read"):
        upload_name(f"/tmp/x/{name}")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/tmp/x/../../etc/passwd.txt", "passwd.txt"),
        ("/tmp/x/..txt.txt", "txt.txt"),
        ("/tmp/x/a: b\n!!python/object.txt", "object.txt"),
        ("/tmp/x/<img src=x>.csv", "img-src-x.csv"),
        ("/tmp/x/;$(rm -rf).TXT", "rm--rf.txt"),
    ],
)
def test_an_uploads_name_is_no_more_than_a_name(path, name):
    assert upload_name(path) == name


# -- the server ----------------------------------------------------------------------------------------------------


def get(url):
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_no_path_of_the_server_is_served(served):
    store = served.context.store
    run_id = store.start(served.recipe(), "me")
    assert served.ended(run_id).state == "done"
    secret = store.get(run_id).folder / "tmerge" / "report.json"
    assert secret.is_file()
    paths = [
        "/etc/passwd",
        "/proc/self/environ",
        str(served.root / "texts.txt"),
        str(served.root / "target" / "config.json"),
        str(secret),
        str(store.root),
        runs.__file__,
        "pyproject.toml",
        "../../../../etc/passwd",
        "file:///etc/passwd",
    ]
    for path in paths:
        for route in ("/gradio_api/file=", "/gradio_api/file/", "/file="):
            for written in (path, quote(path, safe=""), path.replace("/", "//")):
                status, body = get(f"{served.url}{route}{written.replace(' ', '%20')}")
                assert status in (401, 403, 404), (route, written, status)
                assert b"root:" not in body and b"verdict" not in body


def call(served, function, data):
    """Call an event of the page as its own script does: the outcome that the server streams back."""
    session = uuid.uuid4().hex
    asked = json.dumps({"data": data, "fn_index": function, "session_hash": session}).encode()
    headers = {"Content-Type": "application/json"}
    urllib.request.urlopen(urllib.request.Request(f"{served.url}/gradio_api/queue/join", asked, headers), timeout=20)
    with urllib.request.urlopen(f"{served.url}/gradio_api/queue/data?session_hash={session}", timeout=60) as stream:
        for line in stream:
            if line.startswith(b"data: "):
                said = json.loads(line[6:])
                if said["msg"] == "process_completed":
                    return said
    raise AssertionError("the stream ended before the event did")


def upload(served, content, name):
    edge = uuid.uuid4().hex
    head = f'--{edge}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    body = head.encode() + content + f"\r\n--{edge}--\r\n".encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={edge}"}
    request = urllib.request.Request(f"{served.url}/gradio_api/upload", body, headers)
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)[0]


def test_a_path_of_the_server_is_not_taken_for_an_upload(served):
    config = json.loads(get(f"{served.url}/config")[1])
    names = {item["props"].get("elem_id"): item["id"] for item in config["components"]}
    tried = 0
    for event in config["dependencies"]:
        for name in ("texts-file", "upload-recipe"):
            if event["inputs"][:1] == [names[name]]:
                tried += 1
                ours = upload(served, b"target: a/b\n", "mine.yaml" if name == "upload-recipe" else "mine.txt")
                for path, taken in (("/etc/hostname", False), (str(served.root / "texts.txt"), False), (ours, True)):
                    file = {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": path.rpartition("/")[2]}
                    data = [file, *[None] * (len(event["inputs"]) - 1)]
                    if name == "texts-file":
                        data[1] = {}
                    outcome = call(served, event["id"], data)
                    assert outcome["success"] is taken, (name, path, outcome)
    assert tried >= 2


def test_the_server_is_launched_with_the_limit_of_uploads(served, monkeypatch):
    from tmerge.ui import launch_options

    assert launch_options(served.app)["max_file_size"] == settings_here().max_upload_bytes
    monkeypatch.setenv("SPACE_ID", "user/app")
    options = launch_options(served.app)
    assert options["max_file_size"] == 50 * 2**20
    assert options["allowed_paths"] == [] and not options["share"] and not options["mcp_server"]


def test_nothing_of_a_run_is_told_to_who_lacks_its_link(served):
    store = served.context.store
    recipe = served.recipe(seed=987_654_321)
    run_id = store.start(recipe, "someone")
    folder = store.get(run_id).folder.parent.name
    assert served.ended(run_id).state == "done"
    for page in ("/", "/config", "/gradio_api/info", "/?run=wrong", "/gradio_api/startup-events", "/robots.txt"):
        _, body = get(served.url + page)
        for secret in (run_id, folder, "987654321", str(store.root)):
            assert secret.encode() not in body, (page, secret)
    assert served.context.seen(run_id[:-1]) is None and served.context.seen("") is None
