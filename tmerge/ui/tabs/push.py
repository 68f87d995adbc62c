"""The Push tab: who pushes, where to, the card as it will be read, and the push as it goes.

Nobody types a token anywhere. On a Space the visitor signs in with Hugging Face, and the Space may write only to repos
that it makes for them (scope ``contribute-repos``); on one's own machine the token of ``hf auth login`` serves.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from tmerge.errors import PushError, RunNotFoundError, TmergeError
from tmerge.hub import card_text, plan_push
from tmerge.report import summary, training_summary
from tmerge.ui.context import QUIET, UNQUEUED, AppContext
from tmerge.ui.parts.cards import empty_card, error_card, note
from tmerge.ui.parts.push_cards import card_preview, files_card, push_card
from tmerge.ui.parts.returning import sign_in_button
from tmerge.ui.parts.safe import render
from tmerge.ui.parts.style import editor, markup
from tmerge.ui.server.pushes import account_name, offers_sign_in, own_token, start_push, suggested_name
from tmerge.ui.server.visitor_run import GONE

__all__ = ["build_push"]

_EVERY = 1.0
_EXAMPLE = empty_card(
    "A recorded run cannot be pushed", "Its model is not here; the Run tab says how it was made, and has its recipe."
)
_EMPTY = empty_card(
    "Nothing to push yet", "When a merge has finished, its model, its card and its report can be pushed from here."
)


def build_push(app: AppContext) -> None:
    """Lay the tab out and wire it. Call it inside its `gr.Tab`."""
    nothing = markup(_EMPTY, elem_id="push-nothing")
    generated, filled_for = gr.State(""), gr.State("")
    with gr.Column(visible=False, elem_id="push") as body:
        verdict = markup("", elem_id="push-verdict")
        with gr.Row(equal_height=False):
            with gr.Column(min_width=280):
                account = markup(note("", keep=True), elem_id="push-account")
                repo = gr.Textbox(
                    label="Repo",
                    info="user/name; made if it is not there",
                    max_lines=1,
                    elem_id="push-repo",
                    render=False,
                )
                if offers_sign_in(app.settings):
                    sign_in_button(app)
                repo.render()
                private = gr.Checkbox(
                    True, label="Private", info="You can make it public in its settings later", elem_id="push-private"
                )
                worse = gr.Checkbox(
                    False,
                    label="Publish it although it is worse than its target",
                    info="Its card says so in the first paragraph",
                    visible=False,
                    elem_id="push-worse",
                )
                go = gr.Button("Push", variant="primary", elem_id="push-go")
                fault = markup(note("", keep=True), elem_id="push-fault")
                progress = markup("", elem_id="push-progress")
            with gr.Column(min_width=280):
                files = markup("", elem_id="push-files")
        markup("<h2>The model card</h2>", elem_classes="section")
        with gr.Row(equal_height=False):
            with gr.Column(min_width=280):
                label = "README.md, as it will be pushed"
                card = editor("", language="markdown", label=label, lines=18, name="push-card")
                anew = gr.Button("Write the card anew from the report", size="sm", elem_id="push-anew")
            with gr.Column(min_width=280, elem_id="push-preview"):
                metadata = markup("", elem_id="push-metadata")
                preview = gr.Markdown("", elem_id="push-markdown", latex_delimiters=[], container=False)
    clock = gr.Timer(_EVERY, active=False)
    offered = gr.Textbox("", visible="hidden", label="Run, and the name that is proposed for its repo")
    gone = gr.Textbox("", visible="hidden", label="Run, and the repo that it was pushed to")

    def fill(run_id: str, before: str, typed: Any, token: gr.OAuthToken | None) -> dict[Any, Any]:
        """All of the tab, for the run that is looked at now; once, so that nothing that was typed is undone."""
        run = app.with_weights(run_id)
        if run is None:
            return without(_EMPTY if app.finished(run_id) is None else _EXAMPLE)
        if run_id == before:
            return gr.skip()
        try:
            report = run.report()
            line, user = _account(app, token)
            proposed = f"{user or 'user'}/{suggested_name(report)}"
            name = _typed(app, run_id, typed) or proposed
            text = card_text(report, run.recipe(), repo=name)
            said = training_summary(report) or summary(report)
            planned = plan_push(run.folder, name, even_if_worse=True, card=text)
        except TmergeError as error:
            return without(error_card("This run cannot be pushed", str(error)))
        return {
            nothing: gr.HTML(visible=False),
            body: gr.Column(visible=True),
            verdict: render("push_cards.html", "verdict_card", verdict=planned.verdict, line=said),
            account: line,
            repo: name,
            offered: f"{run_id} {proposed}",
            worse: gr.Checkbox(visible=report.published_verdict == "hurts", value=False),
            fault: note("", keep=True),
            files: files_card(planned),
            **written(text),
            **previewed(run_id, text),
            **under_way(run_id),
            filled_for: run_id,
        }

    def without(why: str) -> dict[Any, Any]:
        return {nothing: gr.HTML(why, visible=True), body: gr.Column(visible=False), filled_for: ""}

    def written(text: str) -> dict[Any, Any]:
        return {card: text, generated: text}

    def previewed(run_id: str, text: str) -> dict[Any, Any]:
        run = app.finished(run_id)
        front, text = card_preview(text or "", None if run is None else run.folder)
        return {metadata: front, preview: text}

    def under_way(run_id: str) -> dict[Any, Any]:
        run = app.seen(run_id)
        pushed = None if run is None else run.push
        pushing = pushed is not None and pushed.state == "pushing"
        return {
            progress: push_card(pushed),
            go: gr.Button(interactive=not pushing),
            clock: gr.Timer(active=pushing),
            gone: f"{run_id} {pushed.repo}" if pushed is not None and pushed.state == "done" else "",
        }

    pushes = [progress, go, clock, gone]
    gr.on(
        [app.run_id.change, app.ended.change],
        fill,
        [app.run_id, filled_for, app.repos],
        [
            *(nothing, body, verdict, account, repo, offered, worse, fault, files, card, generated, metadata, preview),
            *(*pushes, filled_for),
        ],
        js="(run, filled) => [run, filled, window.typedRepos.all()]",
        **QUIET,
    )

    def renamed(run_id: str, name: str, text: str, last: str) -> dict[Any, Any]:
        """The card names the repo; one that was edited is left as it is."""
        # The editor gives a last line end or none.
        return written_anew(run_id, name) if text.strip() == last.strip() else gr.skip()

    def written_anew(run_id: str, name: str) -> dict[Any, Any]:
        run = app.finished(run_id)
        if run is None:
            return gr.skip()
        return written(card_text(run.report(), run.recipe(), repo=(name or "").strip() or "user/name"))

    # Typed letters are heard at once, what came in by other ways when the field is left. First what the browser keeps:
    # what is heard after a question to the server waits for its answer.
    heard, keep = [repo.input, repo.blur], "(of, name) => { window.typedRepos.keep(...of.split(' '), name); }"
    gr.on(heard, None, [offered, repo], None, js=keep, trigger_mode="multiple", **UNQUEUED)
    gr.on(
        heard,
        renamed,
        [app.run_id, repo, card, generated],
        [card, generated],
        trigger_mode="always_last",
        **QUIET,
    )
    gone.change(None, gone, None, js="(said) => { window.typedRepos.forget(...said.split(' ')); }", **UNQUEUED)
    anew.click(written_anew, [app.run_id, repo], [card, generated], **QUIET)
    card.change(previewed, [app.run_id, card], [metadata, preview], trigger_mode="always_last", **QUIET)

    def begin(
        run_id: str, name: str, hidden: bool, even_if_worse: bool, text: str, token: gr.OAuthToken | None
    ) -> dict[Any, Any]:
        run = app.seen(run_id)
        try:
            if run is None or app.with_weights(run_id) is None:
                raise RunNotFoundError(GONE)
            signed_in = own_token(app.settings, None if token is None else token.token)
            if signed_in is None:
                raise PushError(_how_to_sign_in(app))
            start_push(
                run,
                (name or "").strip(),
                private=bool(hidden),
                even_if_worse=bool(even_if_worse),
                card=text,
                token=signed_in,
            )
        except TmergeError as error:
            line = str(error) if run is None else str(error).replace(str(run.folder), "the run")
            # What an earlier push came to is no answer to this one, unless it is still under way.
            pushing = run is not None and run.push is not None and run.push.state == "pushing"
            return {fault: note(line, bad=True)} | ({} if pushing else {progress: ""})
        return {fault: note("", keep=True), **under_way(run_id)}

    go.click(begin, [app.run_id, repo, private, worse, card], [fault, *pushes], trigger_mode="once", **QUIET)
    clock.tick(under_way, [app.run_id], pushes, **UNQUEUED)


def _typed(app: AppContext, run_id: str, typed: Any) -> str:
    """The name that was typed for a run's repo, as a browser says; empty once the run has been pushed there."""
    name, run = str(typed.get(run_id) or "")[:200] if isinstance(typed, dict) else "", app.seen(run_id)
    there = run is not None and run.push is not None and run.push.state == "done" and run.push.repo == name
    return "" if there else name


def _account(app: AppContext, token: gr.OAuthToken | None) -> tuple[str, str | None]:
    """Who pushes, in a line, and the account's name."""
    token_here = own_token(app.settings, None if token is None else token.token)
    if token_here is None:
        return note(_how_to_sign_in(app), bad=False), None
    try:
        user = account_name(token_here)
    except TmergeError as error:
        return note(str(error), bad=True), None
    if user is None:
        return note("the Hub does not know your token any more; sign in again", bad=True), None
    return note(f"Signed in as {user}."), user


def _how_to_sign_in(app: AppContext) -> str:
    if not app.settings.public:
        return 'Nobody is signed in: run "hf auth login" in a terminal, then open this run again.'
    if offers_sign_in(app.settings):
        return "Sign in with Hugging Face to push; the app may then write to repos that it makes for you, no others."
    return (
        "This Space offers no way to sign in: its README lacks hf_oauth. Download the recipe, run it with "
        "tmerge merge on your own machine, and push from there."
    )
