"""Coming back to a run: within an iframe, whose address is not the visitor's, from a list, and from a refusal."""

import json
import re
from dataclasses import replace

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from playwright.sync_api import TimeoutError, expect

from tests.ui.framed import framing
from tests.ui.test_choose import open_fold
from tests.ui.test_running import fill, start
from tmerge.hub import Pushed
from tmerge.ui.server.limits import TooManyRunsError
from tmerge.ui.server.pushes import PushUnderWay


@pytest.fixture
def framed(visitors, served):
    """The app as a Space shows it, within a page of another site, which knows nothing of it."""
    page = visitors.page(1280, 900)
    with framing(f"{served.url}/") as address:
        page.goto(address)
        page.frame_locator("iframe").locator("#start").wait_for()
        yield page
        visitors.leave(page, served.url)


def come_back(page):
    """Reload; once more where the frame stays empty, as it did once in some dozens of runs on a busy machine."""
    page.reload()
    start = page.frame_locator("iframe").locator("#start")
    try:
        start.wait_for(state="attached", timeout=40_000)
    except TimeoutError:
        page.reload()
        start.wait_for(state="attached", timeout=60_000)


def test_in_an_iframe_a_reload_comes_back_to_the_run_and_its_tab(framed, served, gate):
    gate.close_at("target")
    frame = framed.frame_locator("iframe")
    expect(frame.locator("#expected")).not_to_contain_text("Checking the two models")
    open_fold(frame, "Recipe (YAML)")
    frame.locator("#recipe-yaml .cm-content").click()
    framed.keyboard.press("Control+A")
    framed.keyboard.insert_text(served.recipe().to_yaml())
    expect(frame.locator("#target-model input")).to_have_value(str(served.root / "target"))
    frame.locator("#start").click()
    link = frame.locator("#run-link :is(input, textarea)")
    expect(link).to_have_value(re.compile(f"^{served.url}/.*run=."), timeout=60_000)
    run_id = link.input_value().partition("run=")[2]
    assert not served.context.store.get(run_id).over
    come_back(framed)
    expect(frame.locator("#run-head")).to_contain_text("Running", timeout=60_000)
    frame.locator("#cancel").click()
    expect(frame.locator("#run-head")).to_contain_text("Cancelled")
    assert served.ended(run_id).state == "cancelled"
    frame.get_by_role("tab", name="Look").click()
    expect(frame.locator("#look-nothing")).to_be_visible()
    come_back(framed)
    expect(frame.get_by_role("tab", name="Look")).to_have_attribute("aria-selected", "true", timeout=60_000)


def test_the_open_tab_is_kept_whatever_the_server_answers(framed):
    framed.route("**/gradio_api/**", lambda route: route.abort())
    framed.frame_locator("iframe").get_by_role("tab", name="Look").click()
    framed.frames[1].wait_for_function("localStorage.getItem('tmerge-tab') === 'look'", timeout=5_000)
    framed.unroute_all()


def test_a_refusal_leads_to_the_run_in_the_way_and_runs_are_listed(visit, served, gate, monkeypatch):
    gate.close_at("target")
    page = visit()
    first = start(page, served)
    expect(page.get_by_label("Your runs")).to_have_value(re.compile("running|waiting"))
    page.goto(f"{served.url}/?__theme=light")
    expect(page.locator("#run-head")).to_contain_text("Running")
    page.get_by_role("tab", name="Choose").click()

    def refuse(*words, **named):
        raise TooManyRunsError("you have 1 run waiting or running, as many as this app gives one visitor")

    with monkeypatch.context() as patch:
        patch.setattr(served.context.store, "start", refuse)
        fill(page, served, seed=3)
        page.locator("#start").click()
        expect(page.locator("#problem")).to_contain_text("you have 1 run waiting or running")
    page.locator("#open-other").click()
    expect(page.locator("#run-head")).to_contain_text("Running")
    assert page.url.partition("run=")[2] == first
    page.get_by_role("tab", name="Choose").click()
    page.locator("#start").click()
    page.wait_for_url(lambda url: "run=" in url and first not in url)
    expect(page.locator("#open-other")).to_be_hidden()
    second = page.url.partition("run=")[2]
    expect(page.locator("#run-head")).to_contain_text("1 run before this one")
    page.get_by_label("Your runs").click()
    expect(page.get_by_role("option")).to_have_count(2)
    page.get_by_role("option", name=re.compile("running")).click()
    page.wait_for_url(f"**run={first}")
    expect(page.locator("#run-head")).to_contain_text("Running")
    for run_id in (second, first):
        served.context.store.cancel(run_id)
        served.ended(run_id)


def test_who_comes_back_to_a_run_that_was_removed_is_told_why(visit, served, monkeypatch):
    page, store = visit(), served.context.store
    served.ended(start(page, served, seed=21))
    monkeypatch.setattr(store, "settings", replace(store.settings, runs_kept_seconds=-1.0))
    store.sweep()
    # By the app's own address, not by the run's.
    page.evaluate("history.replaceState(null, '', '/?__theme=light')")
    visit.reload(page)
    expect(page.locator("#run-head")).to_contain_text("not here any more", timeout=60_000)
    expect(page.locator("#run-head")).to_contain_text("It was removed: nobody has looked for some hours.")


def test_two_pages_of_a_browser_keep_each_others_runs(visit, served):
    page = visit()
    other = page.context.new_page()
    other.set_default_timeout(20_000)
    other.goto(f"{served.url}/?__theme=light")
    other.wait_for_selector("#start", state="attached")
    expect(other.locator("#expected")).not_to_contain_text("Checking the two models")
    page.bring_to_front()
    first = start(page, served, seed=11)
    served.ended(first)
    # It is offered on the other page without its doing.
    other.bring_to_front()
    other.get_by_role("tab", name="Run", exact=True).click()
    other.get_by_label("Your runs").click()
    expect(other.get_by_role("option")).to_have_count(1)
    other.keyboard.press("Escape")
    other.get_by_role("tab", name="Choose").click()
    second = start(other, served, seed=12)
    served.ended(second)
    # Neither has undone what the other has kept.
    for each, opened in ((page, first), (other, second)):
        each.bring_to_front()
        visit.reload(each)
        expect(each.locator("#run-head")).to_contain_text("Done", timeout=60_000)
        assert each.url.endswith(opened)
        each.get_by_label("Your runs").click()
        expect(each.get_by_role("option")).to_have_count(2)
    other.close()


def test_older_runs_that_were_removed_are_told_of_once(visit, served, monkeypatch):
    page, store = visit(), served.context.store
    shown = start(page, served, seed=22)
    served.ended(shown)
    monkeypatch.setitem(store._gone, "old", "nobody has looked for some hours")
    kept = {shown: 3, "old": 2, "of another day": 1}
    kept = {name.replace(" ", "-"): when for name, when in kept.items()}
    page.evaluate(f"localStorage.setItem('tmerge-shown-runs', '{json.dumps(kept)}')")
    visit.reload(page)
    told = page.locator("#runs-removed")
    expect(told).to_have_text(
        "2 older runs were removed from this server: nobody has looked for some hours; none is kept over a restart of "
        "the app.",
        timeout=60_000,
    )
    page.wait_for_function("Object.keys(JSON.parse(localStorage.getItem('tmerge-shown-runs'))).length === 1")
    expect(page.locator("#run-files")).to_contain_text("model.safetensors")
    visit.reload(page)
    expect(page.locator("#run-head")).to_contain_text("Done", timeout=60_000)
    expect(told).to_have_text("")


def test_a_name_typed_for_a_runs_repo_is_that_runs_until_it_is_pushed_there(visit, served):
    store, page = served.context.store, visit()
    first, second = start(page, served, seed=23), served.context.store.start(served.recipe(seed=24), "someone")
    for run_id in (first, second):
        served.ended(run_id)
    repo = page.locator("#push-repo input")

    def opens(query):
        visit.reload(page, f"&tab=push{query}")
        expect(repo).to_be_visible(timeout=60_000)

    opens(f"&run={first}")
    suggested = repo.input_value()
    repo.fill("")
    repo.press_sequentially("me/typed")
    page.wait_for_function("localStorage.getItem('tmerge-repos')?.includes('me/typed')")
    # What is another run's stays so.
    opens(f"&run={second}")
    expect(repo).to_have_value(suggested)
    page.get_by_role("tab", name="Run", exact=True).click()
    page.get_by_label("Your runs").click()
    page.get_by_role("option", name=re.compile("merge of")).nth(1).click()
    page.wait_for_url(f"**run={first}")
    page.get_by_role("tab", name="Push").click()
    expect(repo).to_have_value("me/typed")
    # As a sign-in comes back, and as it is reloaded then, with nothing more in its address.
    opens(f"&run={second}&repo=me/brought")
    expect(repo).to_have_value("me/brought")
    assert "repo=" not in page.url
    visit.reload(page)
    page.get_by_role("tab", name="Push").click()
    expect(repo).to_have_value("me/brought", timeout=60_000)
    # What came in by other ways than letter by letter is heard when the field is left.
    repo.fill("me/pasted")
    repo.blur()
    page.wait_for_function("localStorage.getItem('tmerge-repos').includes('me/pasted')")
    there = Pushed("me/pasted", "https://hub/me/pasted", "0" * 40, None)
    store.get(second).push = PushUnderWay("me/pasted", pushed=there, ended=1.0)
    visit.reload(page)
    page.get_by_role("tab", name="Push").click()
    expect(repo).to_have_value(suggested, timeout=60_000)
    page.wait_for_function("localStorage.getItem('tmerge-repos').includes('me/typed')")
    assert "me/pasted" not in page.evaluate("localStorage.getItem('tmerge-repos')")


@pytest.mark.parametrize("kept", [None, "x", ["x"], f"../.. {'x' * 500}", {"runs": 1}])
def test_what_a_browser_claims_to_have_kept_is_a_strangers(served, kept):
    from tmerge.ui.parts.returning import under_way

    assert under_way(served.context, kept) is None


def test_a_browser_that_lends_no_storage_is_served_all_the_same(framed):
    framed.add_init_script(
        "Object.defineProperty(window, 'localStorage', { configurable: true, get() { throw new DOMException('no'); } })"
    )
    framed.reload()
    frame = framed.frame_locator("iframe")
    expect(frame.locator("#expected")).to_contain_text("Name a target")
    open_fold(frame, "Recipe (YAML)")
    expect(frame.locator("#recipe-yaml .cm-content")).to_be_visible()
