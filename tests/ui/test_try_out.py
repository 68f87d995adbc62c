"""The Try tab: three models answer, one at a time and heard as they speak, and nothing that is typed or said acts."""

import re
import shutil
import threading
import time

import psutil
import pytest

pytest.importorskip("gradio", reason="the app extra is not installed")

from tests.pico import save_pico
from tests.ui import answering, merges
from tests.ui.looked import opened
from tmerge.answers import MOST_CHARACTERS, MOST_TOKENS, PromptError, Question, Said
from tmerge.calibration import sample_languages
from tmerge.models import load_model
from tmerge.recipe import Recipe
from tmerge.run import Run
from tmerge.ui.parts.prompts import offered_prompts
from tmerge.ui.server import runs, speaking
from tmerge.ui.server.limits import AppSettings
from tmerge.ui.server.runs import RunStore
from tmerge.ui.server.speaking import ROLES, Speaker

pytestmark = pytest.mark.filterwarnings("ignore")  # Gradio's own, from its server's threads

HOSTILE = (
    '<img src=x onerror="window.hit=1"> **bold** [x](javascript:window.hit=1) <script>window.hit=1</script> ${1+1}'
)


@pytest.fixture
def asked(run):
    """Recipe and folder, as `Speaker.ask` takes them."""
    found = Run(run[0].get(run[1]).folder)
    return found.recipe(), found.folder


@pytest.fixture
def speaker(run):
    speaker = Speaker(run[0])
    yield speaker
    speaker.let_go()
    assert speaker._child is None


def until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def process_of(speaker):
    return psutil.Process(speaker._child.pid)


def heard(speaker, asked, question, visitor="a"):
    """All that was heard, the last of it what was said in the end."""
    return list(speaker.ask(visitor, *asked, question))


# -- the models --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("chat", [True, False])
def test_each_model_says_what_transformers_would(speaker, asked, chat, monkeypatch):
    # A pico says all that it has to say between two looks at it.
    monkeypatch.setattr(speaking, "answer", answering.slowly)
    question = Question("Ibu kota Indonesia adalah", chat=chat, tokens=12)
    steps = heard(speaker, asked, question)
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
        # It was heard as it was said, and not at its end alone.
        assert len({step[role].text for step in steps} - {""}) > 1


@pytest.mark.slow
def test_a_seed_repeats_what_was_drawn(speaker, asked):
    def texts(**settings):
        said = heard(speaker, asked, Question("Kucing itu", tokens=16, **settings))[-1]
        return [said[role].text for role in ROLES]

    hot = texts(temperature=1.5, seed=7)
    assert hot == texts(temperature=1.5, seed=7) != texts(temperature=1.5, seed=8)


def test_visitors_who_ask_at_once_are_answered_in_turn(speaker, asked):
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
    assert len(results) == 3 and len({said["source"].text for said in results.values()}) == 1
    assert all(said[role].state == "done" for said in results.values() for role in ROLES)


def test_models_stay_beside_the_app_and_not_in_it(run, tmp_path):
    folder = save_pico("llama", tmp_path / "large", layers=2, hidden_size=512, intermediate_size=8192)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert size > 100e6
    recipe = Recipe(target=str(folder), source=str(folder), dtype="float32")
    speaker, app = Speaker(run[0]), psutil.Process()
    before, steps = app.memory_info().rss, [({}, 0)]
    for step in speaker.ask("a", recipe, folder, Question("Kota", tokens=4)):
        steps.append((step, app.memory_info().rss))
    said, most = steps[-1][0], max(held for _, held in steps)
    assert [said[role].state for role in ROLES] == ["done"] * 3
    assert most - before < size / 3
    # The next question is answered with what is in memory there.
    process = process_of(speaker)
    shutil.rmtree(folder)
    again = heard(speaker, (recipe, folder), Question("Kota", tokens=4))[-1]
    assert [again[role].text for role in ROLES] == [said[role].text for role in ROLES]
    assert process_of(speaker) == process
    speaker.let_go()
    assert not process.is_running()
    lost = heard(speaker, (recipe, folder), Question("Kota", tokens=4))[-1]
    assert lost["target"].state == "failed"
    speaker.let_go()


def test_the_process_of_another_run_or_of_none_is_ended(speaker, asked, tmp_path, monkeypatch):
    heard(speaker, asked, Question("Kota", tokens=2))
    first = process_of(speaker)
    shutil.copytree(asked[1], tmp_path / "fused")
    said = heard(speaker, (asked[0], tmp_path / "fused"), Question("Kota", tokens=2))[-1]
    assert said["fused"].state == "done" and not first.is_running()
    second = process_of(speaker)
    monkeypatch.setattr(speaking, "_IDLE", 0.3)
    heard(speaker, (asked[0], tmp_path / "fused"), Question("Kota", tokens=2))
    until(lambda: not second.is_running())


def test_a_merge_takes_the_place_of_the_models(asked, monkeypatch):
    monkeypatch.setattr(runs, "merge", merges.done)
    store = RunStore(AppSettings())
    try:
        speaker = Speaker(store)
        heard(speaker, asked, Question("Kota", tokens=2))
        process = process_of(speaker)
        run_id = store.start(asked[0], "visitor")
        until(lambda: store.get(run_id).over)
        assert not process.is_running()
        heard(speaker, asked, Question("Kota", tokens=2))
        process = process_of(speaker)
    finally:
        store.close()
    assert not process.is_running()


def test_not_beside_a_merge(run, speaker, asked):
    with run[0].alone():
        said = heard(speaker, asked, Question("Kota"))[-1]
    assert {item.state for item in said.values()} == {"failed"}
    assert "a merge is running" in said["target"].note and "\n" not in said["target"].note


def test_stop_ends_a_model_between_two_tokens(run, speaker, asked, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(speaking, "answer", answering.slowly)
        for said in speaker.ask("a", *asked, Question("Kota", tokens=MOST_TOKENS)):
            if len(said["target"].text) > 3:
                speaker.stop("b")  # another visitor's
                speaker.stop("a")
    assert [said[role].state for role in ROLES] == ["stopped"] * 3
    assert said["target"].note.endswith("stopped") and said["fused"].text == ""
    with run[0].alone():  # nothing holds on to it
        assert not speaker._one.locked() and not speaker._talks
    # Its model is there for the next question.
    process = process_of(speaker)
    assert heard(speaker, asked, Question("Kota", tokens=2))[-1]["target"].state == "done"
    assert process_of(speaker) == process


def test_stop_ends_what_does_not_come_to_a_token(speaker, asked, monkeypatch):
    monkeypatch.setattr(speaking, "_GRACE", 0.5)
    monkeypatch.setattr(speaking, "answer", answering.never)
    for said in speaker.ask("a", *asked, Question("Kota")):
        if said["target"].state == "speaking":
            speaker.stop("a")
    assert [said[role].state for role in ROLES] == ["stopped"] * 3
    assert not psutil.pid_exists(int(said["target"].text))


@pytest.mark.parametrize(
    ("model", "limit", "line"),
    [
        (answering.target_unloaded, "_LOADING", r"no answer within \d+ s: it was not loaded by then"),
        (answering.target_unbegun, "_FIRST_TOKEN", r"no answer within \d+ s of being loaded"),
        (answering.target_unended, "_TO_THE_END", r"no answer within \d+ s of its first token"),
    ],
)
def test_a_model_that_takes_for_ever_is_ended_though_it_is_wanted(run, speaker, asked, monkeypatch, model, limit, line):
    assert asked[0].target.endswith("target") and not asked[0].source.endswith("target")
    heard(speaker, asked, Question("Kota", tokens=1))  # the process is there, and has imported everything
    first = process_of(speaker)
    monkeypatch.setattr(speaking, "answer", model)
    speak = Speaker._speak

    def speak_soon(self, talk, role):
        # The others are asked in a new process, which takes its time to be there.
        monkeypatch.setattr(speaking, limit, 1.0 if role == "target" else 300.0)
        speak(self, talk, role)

    monkeypatch.setattr(Speaker, "_speak", speak_soon)
    said = heard(speaker, asked, Question("Kota"))[-1]
    assert re.match(line, said["target"].note) and "\n" not in said["target"].note
    assert said["target"].state == "failed" and not first.is_running()
    assert [said[role].state for role in ("fused", "source")] == ["done"] * 2
    with run[0].alone():  # nothing holds on to it
        assert not speaker._one.locked()


def test_where_no_process_can_be_started_the_page_says_so(speaker, asked, monkeypatch, caplog):
    def none(name):
        raise OSError(12, "Cannot allocate memory: secret")

    monkeypatch.setattr(speaking, "Child", none)
    said = heard(speaker, asked, Question("Kota"))[-1]
    assert [said[role].state for role in ROLES] == ["failed"] * 3
    for role in ROLES:
        words, _, number = said[role].note.rpartition(" ")
        assert words == "a fault of ours; the server's log has it under" and number in caplog.text
    assert "secret" in caplog.text and not speaker._one.locked()


def test_what_fails_around_the_models_is_no_stop(speaker, asked, monkeypatch, caplog):
    def at_fault(self, talk, role):
        if role == "source":
            raise ZeroDivisionError("secret")
        talk.tell(role, Said("done", "said", ""))

    monkeypatch.setattr(Speaker, "_speak", at_fault)
    said = heard(speaker, asked, Question("Kota"))[-1]
    assert [said[role].state for role in ROLES] == ["done", "done", "failed"]
    assert said["source"].note.rpartition(" ")[2] in caplog.text and "secret" in caplog.text


def test_a_model_that_nobody_hears_falls_silent(speaker, asked, monkeypatch):
    monkeypatch.setattr(speaking, "_UNHEARD", 0.4)
    monkeypatch.setattr(speaking, "answer", answering.slowly)
    listening = speaker.ask("a", *asked, Question("Kota", tokens=MOST_TOKENS))
    next(listening)  # and then the page is closed
    until(lambda: not speaker._one.locked() and speaker._talks["a"].over.is_set())
    assert speaker._talks["a"].said["source"].state == "stopped"


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
def test_a_question_that_cannot_be_put_is_refused_in_one_line(speaker, asked, question, line):
    with pytest.raises(PromptError, match=line) as caught:
        heard(speaker, asked, question)
    assert "\n" not in str(caught.value)


def test_a_model_that_fails_says_so_and_the_others_are_asked(speaker, asked, monkeypatch, caplog):
    monkeypatch.setattr(speaking, "answer", answering.broken)
    said = heard(speaker, asked, Question("Kota", tokens=4))[-1]
    assert said["source"] == Said("failed", "", "it is gone; name another")
    assert said["fused"].state == "failed" and "secret" not in said["fused"].note
    assert said["fused"].note.rpartition(" ")[2] in caplog.text and "secret" in caplog.text
    assert said["target"].state == "failed" and "where memory runs out" in said["target"].note


def test_a_prompt_longer_than_a_model_reads_is_that_models_fault(speaker, asked):
    said = heard(speaker, asked, Question("x,y;" * 900, tokens=8))[-1]
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
    monkeypatch.setattr(speaking, "answer", answering.slowly)
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
