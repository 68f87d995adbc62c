"""The Try tab: one prompt to the target, the fused model and the source, beside the scores that count."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gradio as gr

from tmerge.answers import MOST_CHARACTERS, MOST_TOKENS, Question, Said
from tmerge.errors import TmergeError
from tmerge.plots.words import score_cells
from tmerge.report import Report, summary, training_summary
from tmerge.ui.context import AppContext
from tmerge.ui.parts.cards import error_card, note
from tmerge.ui.parts.prompts import offered_prompts
from tmerge.ui.parts.safe import render
from tmerge.ui.server.examples import Example
from tmerge.ui.server.speaking import ROLES, Speaker

__all__ = ["build_try"]

_FILE = "try_out.html"
_NOTHING = render(_FILE, "nothing")
_GONE = "This run is gone or not finished; start it again, or open its link."
_LABELS = {"target": "Target, unchanged", "fused": "Fused", "source": "Source"}
_PROMPTS = 4
_STYLE = """
.html-container:has(> &) { padding: 0; }
.tm-mine { margin: 0; font-size: .875rem; font-variant-numeric: tabular-nums; color: var(--body-text-color); }
.tm-note { margin: 0; min-height: 1.5em; font-size: .875rem; overflow-wrap: anywhere;
  color: color-mix(in srgb, var(--body-text-color) 74%, transparent); }
.tm-note.tm-failed { color: var(--error-text-color, #b84a00); }
.tm-scores { overflow-x: auto; color: var(--body-text-color); }
.tm-scores p { margin: 0 0 8px; max-width: 90ch; overflow-wrap: anywhere; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 20px 5px 0; vertical-align: top; font-weight: 400;
  border-bottom: 1px solid var(--border-color-primary); }
thead th { font-weight: 600; }
small { display: block; color: color-mix(in srgb, var(--body-text-color) 74%, transparent); }
"""


def build_try(app: AppContext) -> None:
    """Fill the tab; it follows the run that the page looks at."""
    speaker = Speaker(app.store)
    nothing = gr.HTML(_NOTHING, elem_id="try-nothing")
    with gr.Column(visible=False, elem_id="try") as body:
        prompt = gr.Textbox(
            label="Prompt",
            lines=3,
            max_lines=12,
            max_length=MOST_CHARACTERS,
            placeholder="What would you ask the three models?",
            elem_id="try-prompt",
        )
        with gr.Row(elem_id="try-offered"):
            offered = [gr.Button("", size="sm", min_width=140) for _ in range(_PROMPTS)]
        with gr.Accordion("How they answer", open=False) as how:
            with gr.Row():
                tokens = gr.Slider(
                    8, MOST_TOKENS, 64, step=8, label="Most new tokens", elem_id="try-tokens", min_width=200
                )
                temperature = gr.Slider(
                    0, 2, 0, step=0.1, label="Temperature (0: the likeliest token)", elem_id="try-heat", min_width=200
                )
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="try-seed", min_width=200)
            chat = gr.Checkbox(True, label="Use a model's chat template, where it has one", elem_id="try-chat")
        with gr.Row() as buttons:
            go = gr.Button("Ask all three", variant="primary", elem_id="try-go", min_width=160)
            stop = gr.Button("Stop", interactive=False, elem_id="try-stop", min_width=120)
        fault = gr.HTML(elem_id="try-fault", css_template=_STYLE, apply_default_css=False)
        answers: dict[str, gr.Textbox] = {}
        own: dict[str, gr.HTML] = {}
        notes: dict[str, gr.HTML] = {}
        with gr.Row(equal_height=False):
            for role in ROLES:
                with gr.Column(min_width=280):
                    answers[role] = gr.Textbox(
                        label=_LABELS[role],
                        lines=9,
                        max_lines=9,
                        interactive=False,
                        buttons=["copy"],
                        elem_id=f"try-{role}",
                    )
                    own[role] = gr.HTML(elem_id=f"try-{role}-score", css_template=_STYLE, apply_default_css=False)
                    notes[role] = gr.HTML(
                        _note(Said(note="")),
                        elem_id=f"try-{role}-note",
                        css_template=_STYLE,
                        apply_default_css=False,
                    )
        gr.Markdown("## What the held-out texts say")
        score = gr.HTML(elem_id="try-scores", css_template=_STYLE, apply_default_css=False)
    pairs = [part for role in ROLES for part in (answers[role], notes[role])]
    silent = ["", _note(Said(note=""))] * len(ROLES)
    asking_row = [how, buttons]
    ask_here = [gr.update(interactive=True), *[gr.update(visible=True)] * len(asking_row)]

    def fill(run_id: str) -> list[Any]:
        """All of the tab, for the run that is looked at now."""
        run, why = app.finished(run_id), _NOTHING
        try:
            report = None if run is None else run.report()
        except TmergeError as error:
            assert run is not None  # it was its report that could not be read
            report, why = None, error_card("This run cannot be tried", str(error).replace(str(run.folder), "the run"))
        if report is None:
            kept = [gr.skip()] * (_PROMPTS + len(ROLES))
            return [gr.update(visible=True, value=why), gr.update(visible=False), "", *kept, "", *silent, *ask_here]
        example = _example(app, run_id)
        if example is not None:
            prompts = tuple(talk.prompt for talk in example.talks)
            return [*shown_of(report, prompts), *_recited(example, prompts[0]), *_readings(prompts[0])]
        return [*shown_of(report, offered_prompts(report.calibration.dataset)), "", *silent, *ask_here]

    def shown_of(report: Report, prompts: Sequence[str]) -> list[Any]:
        return [
            gr.update(visible=False),
            gr.update(visible=True),
            _scores(report),
            *(gr.update(value=text) for text in prompts),
            *(_own_score(report, role) for role in ROLES),
        ]

    everything = [nothing, body, score, *offered, *own.values(), fault, *pairs, prompt, *asking_row]
    for event in (app.run_id.change, app.ended.change):
        event(fill, [app.run_id], everything, show_progress="hidden", api_visibility="private")

    def take(run_id: str, text: str) -> list[Any]:
        """A prompt that is offered, into the field; and what was recorded of it."""
        example = _example(app, run_id)
        return [text, *([gr.skip()] * (1 + len(pairs)) if example is None else _recited(example, text))]

    for button in offered:
        button.click(
            take,
            [app.run_id, button],
            [prompt, fault, *pairs],
            show_progress="hidden",
            api_visibility="private",
        )

    def ask(
        run_id: str, text: str, most: float, heat: float, number: float, template: bool, request: gr.Request
    ) -> Iterator[list[Any]]:
        """The three answers as they come."""
        run = app.with_weights(run_id)
        if run is None:
            yield [_fault(_GONE), gr.update(interactive=True), gr.update(interactive=False), *silent]
            return
        said = {role: Said() for role in ROLES}
        try:
            question = Question(text or "", bool(template), int(most), float(heat), int(number or 0)).checked()
            for said in speaker.ask(str(request.session_hash), run.recipe(), run.folder, question):
                yield ["", gr.update(interactive=False), gr.update(interactive=True), *_shown(said)]
        except (TmergeError, TypeError, ValueError, OverflowError) as error:
            line = str(error) if isinstance(error, TmergeError) else "the settings are no numbers that can be used"
            yield [_fault(line), gr.update(interactive=True), gr.update(interactive=False), *silent]
            return
        yield ["", gr.update(interactive=True), gr.update(interactive=False), *_shown(said)]

    asking = [app.run_id, prompt, tokens, temperature, seed, chat]
    for event in (go.click, prompt.submit):
        event(
            ask,
            asking,
            [fault, go, stop, *pairs],
            show_progress="hidden",
            concurrency_limit=1,
            concurrency_id="try",
            api_visibility="private",
        )

    def hush(request: gr.Request) -> None:
        """Stop this page's answers."""
        speaker.stop(str(request.session_hash))

    stop.click(hush, None, None, queue=False, show_progress="hidden", api_visibility="private")


def _example(app: AppContext, run_id: str) -> Example | None:
    seen = app.seen(run_id)
    return None if seen is None else seen.example


def _recited(example: Example, prompt: str) -> list[Any]:
    """What was recorded of a prompt: a line above, and each model's answer."""
    talk = next((talk for talk in example.talks if talk.prompt == prompt), example.talks[0])
    said = {role: Said("done", answer.text, f"recorded: {answer.note}") for role, answer in talk.said.items()}
    return [note("A recorded run: its models are not here; these are their answers then."), *_shown(said)]


def _readings(prompt: str) -> list[Any]:
    """The field and what asks, where nothing can be asked."""
    return [gr.update(value=prompt, interactive=False), gr.update(visible=False), gr.update(visible=False)]


def _shown(said: Mapping[str, Said]) -> list[str]:
    return [part for role in ROLES for part in (_printable(said[role].text), _note(said[role]))]


def _printable(text: str) -> str:
    """A model's text without control characters, which move the cursor or turn the direction of writing."""
    return "".join(letter for letter in text if letter.isprintable() or letter in "\n\t")


def _note(said: Said) -> str:
    return render(_FILE, "note", said=said)


def _fault(line: str) -> str:
    return render(_FILE, "fault", line=line)


def _scores(report: Report) -> str:
    """The verdict with its interval, and every model's held-out score."""
    texts = report.evaluation.texts
    return render(
        _FILE, "scores", sentence=training_summary(report) or summary(report), texts=texts, rows=score_cells(report)
    )


def _own_score(report: Report, role: str) -> str:
    """One model's held-out score, to stand beside what it says."""
    evaluation = report.evaluation
    score = {"target": evaluation.base, "fused": report.published_score, "source": evaluation.source}[role]
    line = f"held out: {score.value:.4f} bits per byte"
    if role == "fused":
        change = report.published_difference
        line += f", {change.value:+.4f} [{change.low:+.4f}, {change.high:+.4f}] to the target"
        line += f": {report.verdict}" if report.adaptation is None else ", after training"
    return render(_FILE, "own_score", line=line)
