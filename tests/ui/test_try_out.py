"""The Try tab: three models answer, one at a time and heard as they speak, and nothing that is typed or said acts."""

import gc
import threading
import time
import weakref

import pytest
import torch

pytest.importorskip("gradio", reason="the app extra is not installed")

from tests.ui.looked import opened
from tmerge.calibration import sample_languages
from tmerge.errors import ModelNotFoundError
from tmerge.models import load_model
from tmerge.run import Run
from tmerge.ui.parts.prompts import offered_prompts
from tmerge.ui.server import speaking
from tmerge.ui.server.speaking import MOST_CHARACTERS, MOST_TOKENS, ROLES, PromptError, Question, Said, Speaker

pytestmark = pytest.mark.filterwarnings("ignore")  # Gradio's own, from its server's threads

HOSTILE = (
    '<img src=x onerror="window.hit=1"> **bold** [x](javascript:window.hit=1) <script>window.hit=1</script> ${1+1}'
)


@pytest.fixture
def asked(run):
    """Recipe and folder, as `Speaker.ask` takes them."""
    found = Run(run[0].get(run[1]).folder)
    return found.recipe(), found.folder


def heard(speaker, asked, question, visitor="a"):
    """All that was heard, the last of it what was said in the end."""
    return list(speaker.ask(visitor, *asked, question))


# -- the models --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("chat", [True, False])
def test_each_model_says_what_transformers_would(run, asked, chat):
    question = Question("Ibu kota Indonesia adalah", chat=chat, tokens=12)
    steps = heard(Speaker(run[0]), asked, question)
    said = steps[-1]
    assert [said[role].state for role in ROLES] == ["done"] * 3
    for role, reference in zip(ROLES, (asked[0].target, str(asked[1]), asked[0].source), strict=True):
        loaded = load_model(reference, dtype="float32")
        tokenizer = loaded.tokenizer
        template = chat and tokenizer.chat_template is not None
        assert template == (chat and role != "source")  # the source has none
        ids = (
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question.prompt}], add_generation_prompt=True, return_tensors="pt"
            )["input_ids"]
            if template
            else tokenizer(question.prompt, return_tensors="pt")["input_ids"]
        )
        new = loaded.model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=2)[0, ids.shape[1] :]
        assert said[role].text == tokenizer.decode(new, skip_special_tokens=True).rstrip("\ufffd")
        assert ("chat template" in said[role].note) == (template or chat) and f"{len(new)} tokens" in said[role].note
    # It was heard as it was said.
    assert len({len(step["target"].text) for step in steps}) > 1 or len(steps) > 3


@pytest.mark.slow
def test_a_seed_repeats_what_was_drawn(run, asked):
    speaker = Speaker(run[0])

    def texts(**settings):
        said = heard(speaker, asked, Question("Kucing itu", tokens=16, **settings))[-1]
        return [said[role].text for role in ROLES]

    state = torch.get_rng_state()
    hot = texts(temperature=1.5, seed=7)
    assert hot == texts(temperature=1.5, seed=7) != texts(temperature=1.5, seed=8)
    assert torch.equal(state, torch.get_rng_state())  # the draws of others are theirs


@pytest.mark.slow
def test_one_model_at_a_time_for_all_visitors_and_none_afterwards(run, asked, monkeypatch):
    alive, most, ever = weakref.WeakSet(), [], []

    def counted(*args, **options):
        gc.collect()
        loaded = load_model(*args, **options)
        alive.add(loaded.model)
        ever.append(1)
        most.append(len(alive))
        return loaded

    monkeypatch.setattr(speaking, "load_model", counted)
    speaker = Speaker(run[0])
    results = {}
    threads = [
        threading.Thread(
            target=lambda who=who: results.update({who: heard(speaker, asked, Question("Kota", tokens=8), who)[-1]})
        )
        for who in ("a", "b", "c")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert all(said[role].state == "done" for said in results.values() for role in ROLES) and len(results) == 3
    assert len(ever) == 9 and max(most) == 1
    gc.collect()
    assert not alive


def test_not_beside_a_merge(run, asked):
    with run[0].alone():
        said = heard(Speaker(run[0]), asked, Question("Kota"))[-1]
    assert {item.state for item in said.values()} == {"failed"}
    assert "a merge is running" in said["target"].note and "\n" not in said["target"].note


def test_stop_ends_a_model_between_two_tokens(run, asked, monkeypatch):
    monkeypatch.setattr(speaking._Heard, "put", slowly(speaking._Heard.put))
    speaker = Speaker(run[0])
    for said in speaker.ask("a", *asked, Question("Kota", tokens=MOST_TOKENS)):
        if len(said["target"].text) > 3:
            speaker.stop("b")  # another visitor's
            speaker.stop("a")
    assert [said[role].state for role in ROLES] == ["stopped"] * 3
    assert said["target"].note.endswith("stopped") and said["fused"].text == ""
    with run[0].alone():  # nothing holds on to it
        assert not speaker._one.locked() and not speaker._talks


def test_a_model_that_nobody_hears_falls_silent(run, asked, monkeypatch):
    monkeypatch.setattr(speaking, "_UNHEARD", 0.4)
    monkeypatch.setattr(speaking._Heard, "put", slowly(speaking._Heard.put))
    speaker = Speaker(run[0])
    listening = speaker.ask("a", *asked, Question("Kota", tokens=MOST_TOKENS))
    next(listening)  # and then the page is closed
    end = time.monotonic() + 20
    while speaker._one.locked() or not speaker._talks["a"].over.is_set():
        assert time.monotonic() < end
        time.sleep(0.05)
    assert speaker._talks["a"].said["source"].state == "stopped"


def slowly(put):
    def slow(self, value):
        time.sleep(0.05)
        put(self, value)

    return slow


@pytest.mark.parametrize(
    ("question", "line"),
    [
        (Question("  \n"), "there is no prompt"),
        (Question("x" * (MOST_CHARACTERS + 1)), "4,001 characters"),
        (Question("x", tokens=0), "0 new tokens"),
        (Question("x", tokens=10**6), "1000000 new tokens"),
        (Question("x", temperature=-1), "temperature is -1"),
        (Question("x", temperature=float("nan")), "temperature is nan"),
        (Question("x", seed=-1), "seed is -1"),
    ],
)
def test_a_question_that_cannot_be_put_is_refused_in_one_line(run, asked, question, line):
    with pytest.raises(PromptError, match=line) as caught:
        heard(Speaker(run[0]), asked, question)
    assert "\n" not in str(caught.value)


def test_a_model_that_fails_says_so_and_the_others_speak(run, asked, monkeypatch):
    def broken(reference, **options):
        if reference == asked[0].source:
            raise ModelNotFoundError("it is gone; name another")
        if reference == str(asked[1]):
            raise RuntimeError(f"secret in {asked[1]}")
        return load_model(reference, **options)

    monkeypatch.setattr(speaking, "load_model", broken)
    said = heard(Speaker(run[0]), asked, Question("Kota", tokens=4))[-1]
    assert said["target"].state == "done"
    assert said["source"] == Said("failed", "", "it is gone; name another")
    assert said["fused"].state == "failed" and "secret" not in said["fused"].note


def test_a_prompt_longer_than_a_model_reads_is_that_models_fault(run, asked):
    said = heard(Speaker(run[0]), asked, Question("x,y;" * 900, tokens=8))[-1]
    assert {item.state for item in said.values()} == {"failed"}
    assert "tokens long, where this model reads" in said["target"].note


def test_prompts_are_offered_in_every_sample_language():
    offered = {language: offered_prompts(f"samples:{language}") for language in sample_languages()}
    assert len(set(offered.values())) == len(offered) == 5
    assert offered_prompts("someone/texts") == offered["english"]


# -- the page ----------------------------------------------------------------------------------------------------------


def test_answers_stream_side_by_side(visitors, url, run):
    report = Run(run[0].get(run[1]).folder).report()
    with opened(visitors, url, run[1], "Try") as page:
        assert page.locator("#try-offered button").first.inner_text() == offered_prompts("samples:indonesian")[0]
        page.locator("#try-offered button").nth(2).click()
        page.wait_for_function("() => document.querySelector('#try-prompt textarea').value.startsWith('Ibu kota')")
        page.evaluate(
            "() => { window.seen = new Set(); window.watch = setInterval(() => "
            "window.seen.add(document.querySelector('#try-target textarea').value.length), 20); }"
        )
        page.locator("#try-go").click()
        page.wait_for_function("() => !document.querySelector('#try-stop').disabled")
        page.wait_for_function("() => !document.querySelector('#try-go').disabled")
        assert page.evaluate("window.seen.size") >= 2  # it grew; a busy machine shows few of its sizes
        for role in ROLES:
            assert page.locator(f"#try-{role} textarea").input_value()
            assert "64 tokens in " in page.inner_text(f"#try-{role}-note")
        evaluation = report.evaluation
        assert f"{evaluation.base.value:.4f} bits per byte" in page.inner_text("#try-target-score")
        fused = page.inner_text("#try-fused-score")
        assert f"{evaluation.difference.value:+.4f} [" in fused and report.verdict in fused
        assert "95 % interval" in page.inner_text("#try-scores")


@pytest.mark.slow
def test_stop_on_the_page(visitors, url, run, monkeypatch):
    put, stop, pressed = speaking._Heard.put, Speaker.stop, threading.Event()

    def held(self, value):
        """Some tokens, and no more before the visitor has pressed Stop."""
        assert len(self.ids) < 8 or pressed.wait(60)
        put(self, value)

    def heard_stop(self, visitor):
        """Whoever asks ends his own earlier question first; that is not the button."""
        answering = visitor in self._talks
        stop(self, visitor)
        if answering:
            pressed.set()

    monkeypatch.setattr(speaking._Heard, "put", held)
    monkeypatch.setattr(Speaker, "stop", heard_stop)
    with opened(visitors, url, run[1], "Try") as page:
        page.locator("#try-prompt textarea").fill("Kota")
        page.locator("#try-go").click()
        page.wait_for_function("() => document.querySelector('#try-target textarea').value.length > 2")
        page.locator("#try-stop").click()
        page.wait_for_function("() => !document.querySelector('#try-go').disabled")
        assert "stopped" in page.inner_text("#try-target-note") and "stopped" in page.inner_text("#try-source-note")
        assert page.locator("#try-stop").is_disabled()


@pytest.mark.slow
def test_what_is_typed_and_what_is_said_is_text(visitors, url, run, monkeypatch):
    def hostile(self, visitor, recipe, folder, question):
        yield {role: Said("failed", f"{question.prompt}\u202e", question.prompt) for role in ROLES}

    monkeypatch.setattr(Speaker, "ask", hostile)
    with opened(visitors, url, run[1], "Try") as page:
        page.locator("#try-prompt textarea").fill(HOSTILE)
        page.locator("#try-go").click()
        page.locator("#try-source-note", has_text="onerror").wait_for()
        for role in ROLES:
            assert page.locator(f"#try-{role} textarea").input_value() == HOSTILE
            assert page.inner_text(f"#try-{role}-note").strip() == HOSTILE
        assert page.locator("#try img, #try script, #try-source-note a").count() == 0
        assert page.evaluate("window.hit") is None


def test_bad_input_is_one_line(visitors, url, run):
    with opened(visitors, url, run[1], "Try", width=380, dark=True) as page:
        page.locator("#try-go").click()
        page.get_by_role("alert").filter(has_text="there is no prompt").wait_for()
        assert page.locator("#try-go").is_enabled()
        assert page.evaluate("document.documentElement.scrollWidth") <= 380
