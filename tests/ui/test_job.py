"""A run that is too large for a public app, as a job on the account of who signs in; against a loopback Hub."""

import json
import time
import warnings
from copy import copy
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest

pytest.importorskip("gradio", reason="the app extra is not installed")
pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

import yaml
from huggingface_hub import HfApi
from playwright.sync_api import expect

from tests.hub import Fault, Repo, WritableHub
from tests.pico import save_pico
from tests.ui.awaited import awaited
from tests.ui.test_choose import open_fold, write_yaml
from tmerge.errors import RemoteError
from tmerge.ui import AppSettings, build, close, launch_options
from tmerge.ui.parts.job import job_offer, job_timeout, start_as_job
from tmerge.ui.server.aside import patiently

# What gradio signs in with where it is no Space.
TOKEN = "mock-oauth-token-for-local-dev"
PACKAGE = "git+https://example.org/spaces/user/app"
RECIPE = {"target": "user/target", "source": "user/source", "calibration": {"dataset": "samples:thai"}}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    hub = WritableHub(token=TOKEN)
    for name, family in (("target", "llama"), ("source", "qwen2"), ("gated", "qwen2")):
        folder = save_pico(family, root / name)
        (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
        hub.repos[f"user/{name}"] = Repo()
        hub.repos[f"user/{name}"].commit(folder)
    with hub:
        yield hub


@pytest.fixture(scope="module")
def app(hub, tmp_path_factory):
    """A public app that takes no model of more than 1000 parameters."""
    import huggingface_hub.constants

    patch = pytest.MonkeyPatch()
    patch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
    for name, value in {
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path_factory.mktemp("home")),
        "OAUTH_CLIENT_ID": "test",
        "OMP_NUM_THREADS": "1",
    }.items():
        patch.setenv(name, value)
    # gradio's own stand-in for signing in asks whose token the machine has, and says that it is a stand-in.
    patch.setattr("tmerge.ui._use_no_token_of_our_own", lambda: None)
    patch.setattr("gradio.oauth.whoami", HfApi(endpoint=hub.endpoint, token=TOKEN).whoami)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        app = build(AppSettings(public=True, max_parameters=1000, job_package=PACKAGE), RECIPE)
        _, url, _ = app.launch(prevent_thread_lock=True, quiet=True, **launch_options(app))
    app.url = url.rstrip("/")
    yield app
    app.close()
    close(app)
    patch.undo()


@pytest.fixture
def page(app, browser):
    context = browser.new_context(viewport={"width": 1280, "height": 1000})
    page = context.new_page()
    page.set_default_timeout(20_000)
    page.goto(app.url)
    page.wait_for_selector("#start", state="attached")
    yield page
    context.close()


@pytest.mark.slow
def test_a_refused_run_is_offered_as_a_job_and_started_by_who_signs_in(app, hub, page):
    expect(page.locator("#expected")).to_contain_text("Too large for this app", timeout=60_000)
    write = {**RECIPE, "seed": 3}
    open_fold(page, "Recipe (YAML)")
    write_yaml(page, json.dumps(write))
    expect(page.locator("#job-offer")).to_contain_text("Too large for this app, and not for a job", timeout=60_000)
    expect(page.locator("#job-repo input, #job-repo textarea")).to_be_visible()
    page.locator("#job-repo input, #job-repo textarea").fill("fused")
    page.locator("#job-go").click()
    expect(page.locator("#job-result").get_by_role("alert")).to_contain_text("sign in with Hugging Face first")
    assert hub.jobs == {}
    assert page.locator("input[type=password]").count() == 0

    page.locator("#job-sign-in").click()
    page.wait_for_load_state()
    expect(page.locator("#job-sign-in")).to_contain_text("Sign out (user)", timeout=30_000)
    page.wait_for_selector("#start", state="attached")
    if not page.locator("#recipe-yaml .cm-content").is_visible():
        open_fold(page, "Recipe (YAML)")
    write_yaml(page, json.dumps(write))
    expect(page.locator("#job-offer")).to_contain_text("not for a job", timeout=60_000)
    page.locator("#job-repo input, #job-repo textarea").fill("fused")
    page.locator("#job-go").click()
    result = page.locator("#job-result")
    expect(result).to_contain_text("The job has started", timeout=30_000)
    (job,) = hub.jobs.values()
    links = [link.get_attribute("href") for link in result.get_by_role("link").all()]
    assert links == [f"{hub.endpoint}/jobs/user/{1:024x}", f"{hub.endpoint}/user/fused"]
    recipe = yaml.safe_load(job.spec["environment"]["TMERGE_RECIPE"])
    assert recipe["seed"] == 3 and recipe["target"] == "user/target"
    assert job.spec["secrets"] == {"HF_TOKEN": TOKEN} and job.spec["flavor"] == "l4x1"
    # No longer than the sign-in, which is good for eight hours, and than four hours.
    assert job.spec["timeoutSeconds"] == 4 * 3600
    words = " ".join([*job.spec["command"], *job.spec.get("arguments", [])])
    assert f"--with {PACKAGE}" in words and "--push user/fused --private" in words
    assert TOKEN not in page.content() and TOKEN not in words


def test_what_is_wrong_with_the_recipe_is_said_once_at_its_field(page):
    # The fold opens by itself.
    expect(page.locator("#job-offer")).to_contain_text("Too large for this app", timeout=60_000)
    open_fold(page, "Recipe (YAML)")
    write_yaml(page, json.dumps({**RECIPE, "target": "/etc/hostname"}))
    expect(page.locator("#job-offer")).to_contain_text("The recipe has a mistake", timeout=60_000)
    said = page.get_by_text("is a path, and the browser reads none")
    expect(page.locator("#recipe-yaml #problem")).to_contain_text("is a path, and the browser reads none")
    expect(said).to_have_count(1)
    # What a check finds is said once as well, beside the two models.
    write_yaml(page, json.dumps({**RECIPE, "source": "user/nowhere"}))
    expect(page.locator("#expected").get_by_role("alert")).to_contain_text("user/nowhere", timeout=60_000)
    expect(page.locator("#problem")).not_to_contain_text("is a path")
    expect(page.locator("#job-offer")).to_contain_text("The recipe has a mistake")
    expect(page.locator("#job-offer")).not_to_contain_text("user/nowhere")


def waited(function, *words):
    """What it gives, once the check that it asks for is there."""
    return awaited(patiently(partial(function, *words), seconds=60))


def start(app, ends=None, **changes):
    return waited(start_as_job, app.context, {**RECIPE, **changes}, "l4x1", "user/fused", TOKEN, ends)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"calibration": {"dataset": "upload:mine.txt"}}, "an uploaded file stays on this server"),
        ({"target": "demo:smollm2-135m-instruct"}, "on this machine alone|not installed"),
        ({"target": "/etc"}, "is a path"),
        ({"trust_remote_code": ["user/target"]}, "cannot be set from the browser"),
        ({"source": "user/nowhere"}, "user/nowhere"),
    ],
)
def test_what_a_job_could_not_read_starts_none(app, hub, changes, words):
    before = len(hub.jobs)
    with pytest.raises(Exception, match=words) as caught:
        start(app, **changes)
    assert getattr(caught.value, "exit_code", None) == 2 and len(hub.jobs) == before


@pytest.mark.slow
def test_a_gated_model_is_not_for_this_sign_in(app, monkeypatch):
    from tmerge.ui.parts import job

    model = SimpleNamespace(gated=True, private=False, ref="user/gated")
    found = SimpleNamespace(target=model, source=model)
    monkeypatch.setattr(job, "check_here", lambda app, recipe: SimpleNamespace(found=found))
    with pytest.raises(RemoteError, match="'user/gated' is gated or private"):
        start(app)


@pytest.mark.slow
def test_the_hubs_refusal_is_its_line(app, hub):
    hub.faults.append(Fault("/api/jobs", status=402, message="Pre-paid credit balance is insufficient"))
    with pytest.raises(RemoteError, match="a job on l4x1 needs credit on your account"):
        start(app)


def test_a_job_does_not_outlive_the_sign_in_that_it_pushes_with():
    now = time.time()
    assert job_timeout(None) == job_timeout(now + 9 * 3600) == "240m"
    assert 115 <= int(job_timeout(now + 2 * 3600).removesuffix("m")) <= 119
    with pytest.raises(RemoteError, match="sign out and in again"):
        job_timeout(now + 1800)


@pytest.mark.slow
def test_a_run_that_fits_is_not_pressed_upon_anyone(app):
    def with_limits(**limits):
        context = copy(app.context)
        context.settings = replace(app.context.settings, max_parameters=10**9, **limits)
        return context

    roomy, small = with_limits(), with_limits(max_texts=100)
    refused, card = waited(job_offer, roomy, {**RECIPE, "seed": 11})
    assert not refused and "This app can run it" in card
    refused, card = waited(job_offer, roomy, {**RECIPE, "calibration": {"dataset": "samples:thai", "texts": 10**6}})
    assert not refused
    refused, card = waited(job_offer, small, {**RECIPE, "calibration": {"dataset": "samples:thai", "texts": 500}})
    assert refused and "not for a job" in card
