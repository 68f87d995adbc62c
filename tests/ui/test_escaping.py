"""What others wrote (model cards, repo names, errors) is shown as text, wherever it is shown."""

import pytest
from jinja2 import UndefinedError

pytest.importorskip("gradio", reason="the app extra is not installed")

from tests.ui.search_hub import HOSTILE
from tmerge.preflight.document import CheckDocument
from tmerge.recipe import Recipe
from tmerge.ui.parts import cards
from tmerge.ui.parts.progress import log_lines, result_cards
from tmerge.ui.parts.safe import escape, render
from tmerge.ui.server import runs

ATTACK = '"><script>window.hacked=1</script><img src=x onerror=window.hacked=1>{{value}}${value}\u202e'


def harmless(page):
    return not any(part in page for part in ("<script", "<img", "{{value", "${value", "\u202e"))


def test_what_others_wrote_is_escaped_on_every_card():
    model = dict.fromkeys(("ref", "commit", "architecture", "licence"), ATTACK) | {
        "parameters": 1,
        "weight_bytes": 1,
        "layers": 1,
        "hidden_size": 1,
        "heads": 1,
        "kv_heads": 2,
        "gated": True,
        "private": False,
        "stored": None,
        "download_bytes": 1,
        "tied_embeddings": False,
    }
    facts = {
        "target": model,
        "source": model,
        "source_base": None,
        "projections": {"matched": {ATTACK: {"target": [1, 2], "source": [3, 4]}}, "skipped": {ATTACK: ATTACK}},
        "left_alone": {"target": [ATTACK], "source": []},
        "notes": [ATTACK],
        "licence": {
            "id": ATTACK,
            "name": ATTACK,
            "why": ATTACK,
            "refusals": [ATTACK + "1"],
            "unknown": [ATTACK + "2"],
            "duties": [ATTACK],
            "link": None,
            "links": [[ATTACK, ATTACK]],
        },
        "estimate": {
            "seconds": 1,
            "range_seconds": [1, 2],
            "stages": {ATTACK: 1},
            "time": ATTACK,
            "operations": 1,
            "memory_bytes": 1,
            "disk_bytes": 1,
            "download_bytes": 1,
            "assumes": ATTACK,
            "measured": [ATTACK],
        },
    }
    for page in (
        cards.check_cards(CheckDocument.model_validate(facts), ATTACK),
        cards.error_card(ATTACK, ATTACK),
        cards.empty_card(ATTACK, ATTACK),
        cards.note(ATTACK, bad=True),
        render("push_cards.html", "verdict_card", verdict="hurts", line=ATTACK),
        escape(HOSTILE),
    ):
        assert harmless(page), page
        assert "hacked" in page or "hurts" in page


def test_what_a_run_says_is_escaped(tmp_path):
    run = runs.VisitorRun("id", Recipe(target="a/b", source="c/d"), tmp_path, "me")
    run.say(f"loading {ATTACK}")
    run.state, run.error = "failed", ATTACK
    for page in (log_lines(run), result_cards(run)):
        assert harmless(page) and "hacked" in page


def test_a_piece_of_the_page_escapes_what_it_is_given():
    page = render("cards.html", "empty_card", title=ATTACK, line=None)
    assert harmless(page) and "&#123;&#123;value}}&#36;&#123;value}" in page and "<p>not stated</p>" in page
    with pytest.raises(UndefinedError, match="'line'"):
        render("cards.html", "empty_card", title="without its line")
