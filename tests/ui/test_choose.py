"""The Choose tab in a browser: search, check cards, form and YAML in step, uploads, and what is refused."""

import asyncio
import json
import re

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from playwright.sync_api import expect

from tests.ui import questions
from tests.ui.search_hub import HOSTILE
from tmerge.ui.parts import expected
from tmerge.ui.server.changes import Change


def name_model(page, role, name):
    field = page.locator(f"#{role}-model input")
    field.fill(name)
    field.press("Enter")


def yaml_text(page):
    return "\n".join(page.locator("#recipe-yaml .cm-line").all_inner_texts())


def write_yaml(page, text):
    page.locator("#recipe-yaml .cm-content").click()
    page.keyboard.press("Control+A")
    page.keyboard.insert_text(text)


def open_fold(page, name):
    page.get_by_role("button", name=name).click()


@pytest.fixture
def picos(served):
    return {role: str(served.root / role) for role in ("target", "source")}


def test_both_models_are_checked_side_by_side_before_anything_starts(visit, picos):
    page = visit()
    for role, path in picos.items():
        name_model(page, role, path)
    cards = page.locator("#expected")
    expect(cards).to_contain_text("qwen3", timeout=60_000)
    expect(cards).to_contain_text("llama")
    expect(cards).to_contain_text("Projections that meet")
    expect(cards.locator("tbody tr")).to_have_count(4)
    expect(cards.locator("dt", has_text="memory")).to_be_visible()
    expect(cards).to_contain_text("The target states no licence")
    # One that is no causal decoder, or not there at all, is said in a line.
    name_model(page, "source", "tiny/llama-one")
    expect(cards.get_by_role("alert")).to_contain_text("tiny/llama-one", timeout=60_000)


@pytest.mark.slow
def test_the_hub_is_searched_as_one_types_and_names_are_shown_as_text(visit):
    page = visit()
    name_model(page, "target", "a/b")
    field = page.locator("#source-model input")
    field.fill("")
    field.press_sequentially("qwe", delay=30)
    expect(page.get_by_role("option", name="tiny/qwen-two")).to_be_visible()
    field.fill("")
    field.press_sequentially("evil", delay=30)
    option = page.get_by_role("option", name=HOSTILE)
    expect(option).to_be_visible()
    option.click()
    expect(page.locator("#problem")).to_contain_text("<img")
    expect(page.locator("#expected")).to_contain_text("The recipe has a mistake")
    assert page.evaluate("window.hacked") is None
    assert page.locator("img[src=x]").count() == 0


def test_adapters_of_the_source_are_offered_and_what_they_change_is_carried(visit):
    page = visit()
    name_model(page, "source", "tiny/qwen-two")
    open_fold(page, "Recipe (YAML)")
    field = page.locator("#adapter-model input")
    field.press_sequentially("lora", delay=30)
    option = page.get_by_role("option", name="tiny/lora-of-two")
    expect(option).to_be_visible()
    option.click()
    yaml = page.locator("#recipe-yaml .cm-content")
    expect(yaml).to_contain_text("adapter: tiny/lora-of-two")
    open_fold(page, "All settings")
    expect(page.get_by_label("What is transported")).to_have_value("task-vector")
    page.get_by_label("Written as").click()
    page.get_by_role("option", name="a LoRA of the target").click()
    expect(yaml).to_contain_text("form: adapter")
    expect(page.get_by_label("Embeddings and norms")).not_to_be_checked()
    # And without it the source's weights are carried again.
    field.fill("")
    field.press("Tab")
    expect(yaml).not_to_contain_text("adapter: tiny")
    expect(page.get_by_label("What is transported")).to_have_value("weights")


@pytest.mark.slow
def test_one_line_says_that_the_hub_cannot_be_reached(visit, served, monkeypatch):
    import huggingface_hub.constants

    # A port that nothing listens on.
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    page = visit()
    field = page.locator("#target-model input")
    field.fill("")
    field.press_sequentially("zz", delay=30)
    expect(page.locator("#target-model")).to_contain_text("cannot be reached", timeout=20_000)


def test_form_and_yaml_are_in_step_both_ways(visit):
    page = visit()
    open_fold(page, "All settings")
    open_fold(page, "Recipe (YAML)")
    expect(page.locator("#recipe-yaml .cm-content")).to_contain_text("samples:indonesian")
    alpha = page.get_by_label("Strength (alpha)")
    alpha.press("Control+A")
    alpha.press_sequentially("auto")
    expect(page.locator("#recipe-yaml .cm-content")).to_contain_text("alpha: auto")
    page.get_by_label("gate").check()
    expect(page.locator("#recipe-yaml .cm-content")).to_contain_text("[q, k, v, o, gate]")
    write_yaml(page, "target: a/b\nsource: c/d\ntransport:\n  epsilon: 0.03\nfusion:\n  alpha: 0.25\n  units: layer\n")
    expect(page.locator("#target-model input")).to_have_value("a/b")
    expect(alpha).to_have_value("0.25")
    expect(page.get_by_label("Epsilon")).to_have_value("0.03")
    expect(page.get_by_label("Units", exact=True)).to_have_value("layer")
    expect(page.get_by_label("gate")).not_to_be_checked()
    # What is misspelt is named, with the key that was meant; what is no YAML, with its line.
    write_yaml(page, "target: a/b\nsource: c/d\nfusion:\n  alhpa: 0.25\n")
    expect(page.locator("#problem")).to_contain_text("did you mean 'alpha'?")
    write_yaml(page, "target: a/b\nsource: [c\n")
    expect(page.locator("#problem")).to_contain_text("not YAML")


def test_a_line_that_is_typed_is_checked_once_at_its_end(visit, picos, served, monkeypatch):
    page = visit()
    for role, path in picos.items():
        name_model(page, role, path)
    cards = page.locator("#expected")
    expect(cards).to_contain_text("qwen3", timeout=60_000)
    open_fold(page, "All settings")
    asked, ask = [], served.context.aside.ask

    def counting(question, *words, **options):
        asked.append((question.__name__, words[0].fusion.alpha))
        return ask(question, *words, **options)

    monkeypatch.setattr(served.context.aside, "ask", counting)

    # However slowly a busy machine takes the letters in.
    async def settled(change):
        await asyncio.sleep(3)
        return change.is_last()

    monkeypatch.setattr(Change, "settled", settled)
    alpha = page.get_by_label("Strength (alpha)")
    alpha.press("Control+A")
    alpha.press_sequentially("0.12345678", delay=50)
    page.wait_for_timeout(1000)
    assert asked == []
    page.wait_for_timeout(4000)
    # More than once where the answer takes longer.
    assert set(asked) == {("_check", 0.12345678)}


def test_a_slow_answer_comes_by_itself(visit, picos, served, monkeypatch):
    monkeypatch.setattr(expected, "_check", questions.held)
    page = visit()
    open_fold(page, "Recipe (YAML)")
    write_yaml(page, json.dumps({**picos, "seed": 77, "calibration": {"dataset": "samples:indonesian"}}))
    cards = page.locator("#expected")
    expect(cards).to_contain_text("Still asking", timeout=60_000)
    (served.root / "open").touch()
    try:
        expect(cards).to_contain_text("qwen3", timeout=60_000)
    finally:
        (served.root / "open").unlink()


@pytest.mark.slow
def test_a_recipe_outlives_a_reload_as_when_signing_in(visit, picos):
    page = visit()
    open_fold(page, "All settings")
    alpha = page.get_by_label("Strength (alpha)")
    alpha.press("Control+A")
    alpha.press_sequentially("0.07")
    for role, path in picos.items():
        name_model(page, role, path)
    expect(page.locator("#expected")).to_contain_text("qwen3", timeout=60_000)
    # Until the browser keeps all of it. That is encrypted, in whole blocks after a colon, so its length is what tells.
    open_fold(page, "Recipe (YAML)")
    expect(page.locator("#recipe-yaml .cm-content")).to_contain_text(picos["source"])
    blocks = len(json.dumps(yaml_text(page))) // 16
    page.wait_for_function(
        "(bytes) => atob(localStorage.getItem('tmerge-recipe')?.split(':')[1] ?? '').length >= bytes",
        arg=16 * (blocks + 1),
    )
    visit.reload(page)
    expect(page.locator("#target-model input")).to_have_value(picos["target"], timeout=20_000)
    open_fold(page, "Recipe (YAML)")
    expect(page.locator("#recipe-yaml .cm-content")).to_contain_text("alpha: 0.07")
    expect(page.locator("#expected")).to_contain_text("qwen3", timeout=60_000)
    # Another visitor's browser does not have it.
    expect(visit().locator("#target-model input")).not_to_have_value(picos["target"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("trust_remote_code: [a/b]", "cannot be set from the browser"),
        ("plan: /etc", "is a path"),
        ("calibration: {dataset: /etc/passwd}", "is not a Hub dataset"),
    ],
)
def test_no_yaml_runs_code_or_reads_a_path(visit, served, line, why):
    page = visit()
    open_fold(page, "Recipe (YAML)")
    page.set_input_files(
        "#upload-recipe input, input[type=file][accept*=yaml]",
        {"name": "r.yaml", "mimeType": "text/yaml", "buffer": f"target: a/b\nsource: c/d\n{line}\n".encode()},
    )
    expect(page.locator("#problem")).to_contain_text(why)
    before = len(served.context.store._runs)
    page.locator("#start").click()
    # It has been looked at, and may be pressed again.
    expect(page.locator("#start")).to_be_disabled()
    expect(page.locator("#start")).to_be_enabled()
    expect(page.locator("#problem")).to_contain_text(why)
    assert len(served.context.store._runs) == before


def test_a_path_of_the_server_is_refused_whether_or_not_it_exists(visit):
    page = visit()
    said = []
    for path in ("/etc/hostname", "/etc/no-such-file"):
        name_model(page, "source", "a/b")
        name_model(page, "target", path)
        expect(page.locator("#problem")).to_contain_text(path)
        # Beside it the page may still say how long the check took.
        [line] = [line for line in page.locator("#problem").inner_text().splitlines() if path in line]
        said.append(line.replace(path, ""))
    assert "is a path" in said[0] and said[0] == said[1]


@pytest.mark.slow
def test_an_uploaded_file_is_looked_into_and_its_column_found(visit):
    page = visit()
    name_model(page, "target", "a/b")
    name_model(page, "source", "c/d")
    page.get_by_label("Upload", exact=True).check()
    expect(page.locator("#problem")).to_contain_text("upload a file")
    rows = "id,sentence,note\n" + "".join(f"{i},<b>Kalimat {i}</b>,n\n" for i in range(40))
    page.set_input_files(
        "#texts-file input[type=file]", {"name": "my texts;.csv", "mimeType": "text/csv", "buffer": rows.encode()}
    )
    found = page.locator("#texts-found")
    expect(found).to_contain_text("Text column: sentence", timeout=30_000)
    expect(found).to_contain_text("<b>Kalimat 0</b>")
    open_fold(page, "Recipe (YAML)")
    expect(page.locator("#recipe-yaml .cm-content")).to_contain_text("upload:my-texts.csv")
    expect(page.locator("#problem")).not_to_contain_text("upload")


@pytest.mark.slow
def test_a_preset_fills_the_form(visit):
    page = visit()
    field = page.get_by_label("Preset")
    field.click()
    page.get_by_role("option", name="malay").click()
    expect(page.locator("#target-model input")).to_have_value("mesolitica/Malaysian-Llama-3.2-1B-Instruct")
    expect(page.get_by_label("Hub dataset", exact=True).nth(1)).to_have_value("mesolitica/Malaysian-SFT")
    page.locator("#way-strangers").click()
    expect(page.locator("#target-model input")).to_have_value(re.compile("smollm2"))


@pytest.mark.slow
def test_the_recipe_can_be_downloaded(visit, tmp_path):
    page = visit()
    open_fold(page, "Recipe (YAML)")
    with page.expect_download() as download:
        page.locator("#recipe-yaml").get_by_role("link").or_(page.locator("#recipe-yaml a[download]")).first.click()
    download.value.save_as(tmp_path / "r.yaml")
    assert "samples:indonesian" in (tmp_path / "r.yaml").read_text()


def test_the_api_does_not_offer_what_the_page_does(served):
    import urllib.request

    with urllib.request.urlopen(f"{served.url}/gradio_api/info") as answer:
        offered = json.load(answer)
    assert offered["named_endpoints"] == {}
