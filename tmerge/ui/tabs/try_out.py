"""The Try tab: one prompt to the target, the fused model and the source, beside the scores that count."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import gradio as gr

from tmerge.answers import MOST_CHARACTERS, MOST_TOKENS, Question, Said
from tmerge.errors import RunNotFoundError, TmergeError
from tmerge.plots.words import score_cells
from tmerge.report import Report, summary, training_summary
from tmerge.ui.context import QUIET, AppContext
from tmerge.ui.parts.cards import empty_card, error_card, note
from tmerge.ui.parts.prompts import offered_prompts
from tmerge.ui.parts.safe import printable, render
from tmerge.ui.parts.style import markup
from tmerge.ui.server.examples import Example
from tmerge.ui.server.speaking import ROLES, Speaker
from tmerge.ui.server.visitor_run import GONE

__all__ = ["build_try"]

_NOTHING = empty_card(
    "Nothing to try yet",
    "When a merge has finished, the target, the fused model and the source answer your prompts here, side by side.",
)
_LABELS = {"target": "Target, unchanged", "fused": "Fused", "source": "Source"}
_PROMPTS = 4
_SILENT: Mapping[str, Said] = {role: Said(note="") for role in ROLES}


def build_try(app: AppContext) -> None:
    """Fill the tab; it follows the run that the page looks at."""
    speaker = Speaker(app.store)
    nothing = markup(_NOTHING, elem_id="try-nothing")
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
        fault = markup("", elem_id="try-fault")
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
                    own[role] = markup("", elem_id=f"try-{role}-score")
                    notes[role] = markup(_note(_SILENT[role]), elem_id=f"try-{role}-note")
        gr.Markdown("## What the held-out texts say")
        score = markup("", elem_id="try-scores")
    said_parts = [*answers.values(), *notes.values()]

    def told(said: Mapping[str, Said]) -> dict[Any, Any]:
        return {answers[role]: printable(said[role].text) for role in ROLES} | {
            notes[role]: _note(said[role]) for role in ROLES
        }

    def recited(example: Example, text: str) -> dict[Any, Any]:
        """What was recorded of a prompt: a line above, and each model's answer."""
        talk = next((talk for talk in example.talks if talk.prompt == text), example.talks[0])
        said = {role: Said("done", each.text, f"recorded: {each.note}") for role, each in talk.said.items()}
        return {fault: note("A recorded run: its models are not here; these are their answers then."), **told(said)}

    def without(why: str) -> dict[Any, Any]:
        return {nothing: gr.HTML(why, visible=True), body: gr.Column(visible=False)}

    def fill(run_id: str) -> dict[Any, Any]:
        """All of the tab, for the run that is looked at now."""
        seen, run = app.seen(run_id), app.finished(run_id)
        if seen is None or run is None:
            return without(_NOTHING)
        try:
            report = run.report()
        except TmergeError as error:
            line = str(error).replace(str(run.folder), "the run")
            return without(error_card("This run cannot be tried", line))
        shown = {
            nothing: gr.HTML(visible=False),
            body: gr.Column(visible=True),
            score: _scores(report),
            how: gr.Accordion(visible=seen.example is None),
            buttons: gr.Row(visible=seen.example is None),
            **{own[role]: _own_score(report, role) for role in ROLES},
        }
        if seen.example is None:
            prompts = offered_prompts(report.calibration.dataset)
            shown |= {prompt: gr.Textbox(interactive=True), fault: "", **told(_SILENT)}
        else:
            prompts = tuple(talk.prompt for talk in seen.example.talks)
            shown |= {prompt: gr.Textbox(prompts[0], interactive=False), **recited(seen.example, prompts[0])}
        return shown | dict(zip(offered, prompts, strict=True))

    gr.on(
        [app.run_id.change, app.ended.change],
        fill,
        app.run_id,
        [nothing, body, score, how, buttons, *own.values(), prompt, fault, *said_parts, *offered],
        **QUIET,
    )

    def take(run_id: str, text: str) -> dict[Any, Any]:
        """A prompt that is offered, into the field; and what was recorded of it."""
        seen = app.seen(run_id)
        return {prompt: text} | (recited(seen.example, text) if seen is not None and seen.example is not None else {})

    for button in offered:
        button.click(take, [app.run_id, button], [prompt, fault, *said_parts], **QUIET)

    def ask(
        run_id: str, text: str, most: float, heat: float, number: float, template: bool, request: gr.Request
    ) -> Iterator[dict[Any, Any]]:
        """The three answers as they come."""
        said, why = _SILENT, ""
        try:
            run = app.with_weights(run_id)
            if run is None:
                raise RunNotFoundError(GONE)
            question = Question(text or "", bool(template), int(most), float(heat), int(number or 0))
            for said in speaker.ask(str(request.session_hash), run.recipe(), run.folder, question):
                yield {fault: "", go: gr.Button(interactive=False), stop: gr.Button(interactive=True), **told(said)}
        except TmergeError as error:
            said, why = _SILENT, str(error)
        except (TypeError, ValueError, OverflowError):
            said, why = _SILENT, "the settings are no numbers that can be used"
        yield {
            fault: note(why, bad=True),
            go: gr.Button(interactive=True),
            stop: gr.Button(interactive=False),
            **told(said),
        }

    gr.on(
        [go.click, prompt.submit],
        ask,
        [app.run_id, prompt, tokens, temperature, seed, chat],
        [fault, go, stop, *said_parts],
        **QUIET,
    )

    def hush(request: gr.Request) -> None:
        """Stop this page's answers."""
        speaker.stop(str(request.session_hash))

    stop.click(hush, None, None, queue=False, **QUIET)


def _note(said: Said) -> str:
    return note(said.note, bad=said.state == "failed", keep=True)


def _scores(report: Report) -> str:
    """The verdict with its interval, and every model's held-out score."""
    sentence, texts = training_summary(report) or summary(report), report.evaluation.texts
    return render("try_out.html", "held_out", sentence=sentence, texts=texts, rows=score_cells(report))


def _own_score(report: Report, role: str) -> str:
    """One model's held-out score, to stand beside what it says."""
    evaluation = report.evaluation
    score = {"target": evaluation.base, "fused": report.published_score, "source": evaluation.source}[role]
    line = f"held out: {score.value:.4f} bits per byte"
    if role == "fused":
        change = report.published_difference
        line += f", {change.value:+.4f} [{change.low:+.4f}, {change.high:+.4f}] to the target"
        line += f": {report.verdict}" if report.adaptation is None else ", after training"
    return note(line)
