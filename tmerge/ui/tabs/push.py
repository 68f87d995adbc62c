"""The Push tab: who pushes, where to, the card as it will be read, and the push as it goes.

Nobody types a token anywhere. On a Space the visitor signs in with Hugging Face, and the Space may write only to repos
that it makes for them (scope ``contribute-repos``); on one's own machine the token of ``hf auth login`` serves.
"""

from __future__ import annotations

import logging
from typing import Any

import gradio as gr

from tmerge.errors import TmergeError
from tmerge.hub import card_text, plan_push
from tmerge.report import summary, training_summary
from tmerge.ui.context import AppContext
from tmerge.ui.parts.cards import empty_card, error_card, heading, note
from tmerge.ui.parts.push_cards import card_preview, files_card, push_card, verdict_card
from tmerge.ui.parts.returning import sign_in_button
from tmerge.ui.parts.style import markup
from tmerge.ui.server.pushes import account_name, offers_sign_in, own_token, start_push, suggested_name
from tmerge.ui.server.visitor_run import VisitorRun

__all__ = ["build_push"]

_log = logging.getLogger(__name__)

_EVERY = 1.0
_EXAMPLE = empty_card(
    "A recorded run cannot be pushed", "Its model is not here; the Run tab says how it was made, and has its recipe."
)
_EMPTY = empty_card(
    "Nothing to push yet", "When a merge has finished, its model, its card and its report can be pushed from here."
)
_QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": 16}


def build_push(app: AppContext) -> None:
    """Lay the tab out and wire it. Call it inside its `gr.Tab`."""
    nothing = markup(_EMPTY, elem_id="push-nothing")
    generated, seen_before = gr.State(""), gr.State("")
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
                    sign_in_button(app.link, repo)
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
        markup(heading(2, "The model card"), elem_classes="section")
        with gr.Row(equal_height=False):
            with gr.Column(min_width=280):
                card = gr.Code(
                    "",
                    language="markdown",
                    label="README.md, as it will be pushed",
                    lines=18,
                    max_lines=30,
                    interactive=True,
                    show_line_numbers=False,
                    buttons=["copy", "download"],
                    elem_id="push-card",
                )
                anew = gr.Button("Write the card anew from the report", size="sm", elem_id="push-anew")
            with gr.Column(min_width=280, elem_id="push-preview"):
                metadata = markup("", elem_id="push-metadata")
                preview = gr.Markdown("", elem_id="push-markdown", latex_delimiters=[], container=False)
    clock = gr.Timer(_EVERY, active=False)

    def fill(run_id: str, before: str, typed: str, token: gr.OAuthToken | None) -> list[Any]:
        """All of the tab, for the run that is looked at now; once, so that nothing that was typed is undone."""
        run = app.with_weights(run_id)
        if run is None:
            why = _EMPTY if app.finished(run_id) is None else _EXAMPLE
            nothing_yet = gr.update(visible=True, value=why)
            return [nothing_yet, gr.update(visible=False), *(gr.skip() for _ in range(13)), ""]
        if run_id == before:
            return [gr.skip() for _ in range(16)]
        try:
            report = run.report()
            line, user = _account(app, token)
            name = typed or f"{user or 'user'}/{suggested_name(report)}"
            text = card_text(report, run.recipe(), repo=name)
            planned = plan_push(run.folder, name, even_if_worse=True, card=text)
        except TmergeError as error:
            return [error_card("This run cannot be pushed", str(error)), *(gr.skip() for _ in range(15))]
        hurts = report.published_verdict == "hurts"
        seen = app.seen(run_id)
        pushing = seen is not None and seen.push is not None and seen.push.state == "pushing"
        return [
            gr.update(visible=False),
            gr.update(visible=True),
            verdict_card(planned.verdict, training_summary(report) or summary(report)),
            line,
            name,
            gr.update(visible=hurts, value=False),
            gr.update(interactive=not pushing),
            note("", keep=True),
            push_card(None if seen is None else seen.push),
            files_card(planned),
            text,
            text,
            *card_preview(text, run.folder),
            gr.Timer(active=pushing),
            run_id,
        ]

    filled = [
        nothing,
        body,
        verdict,
        account,
        repo,
        worse,
        go,
        fault,
        progress,
        files,
        card,
        generated,
        metadata,
        preview,
        clock,
        seen_before,
    ]
    for event in (app.run_id.change, app.ended.change):
        event(fill, [app.run_id, seen_before, app.kept.typed], filled, **_QUIET)

    def renamed(run_id: str, name: str, text: str, last: str) -> list[Any]:
        """The card names the repo; one that was edited is left as it is."""
        run = app.finished(run_id)
        # The editor gives a last line end or none.
        if run is None or text.strip() != last.strip():
            return [gr.skip(), gr.skip()]
        text = card_text(run.report(), run.recipe(), repo=(name or "").strip() or "user/name")
        return [text, text]

    # Typed letters are heard at once, what came in by other ways when the field is left.
    gr.on(
        [repo.input, repo.blur],
        renamed,
        [app.run_id, repo, card, generated],
        [card, generated],
        trigger_mode="always_last",
        **_QUIET,
    )

    repo.input(
        lambda run_id, name: [run_id, name or ""],
        [app.run_id, repo],
        app.kept.repo,
        trigger_mode="always_last",
        **_QUIET,
    )

    def written_anew(run_id: str, name: str) -> list[Any]:
        run = app.finished(run_id)
        if run is None:
            return [gr.skip(), gr.skip()]
        text = card_text(run.report(), run.recipe(), repo=(name or "").strip() or "user/name")
        return [text, text]

    anew.click(written_anew, [app.run_id, repo], [card, generated], **_QUIET)

    def shown(run_id: str, text: str) -> tuple[str, str]:
        run = app.finished(run_id)
        return card_preview(text or "", None if run is None else run.folder)

    card.change(shown, [app.run_id, card], [metadata, preview], trigger_mode="always_last", **_QUIET)

    def begin(
        run_id: str, name: str, hidden: bool, even_if_worse: bool, text: str, token: gr.OAuthToken | None
    ) -> list[Any]:
        run = app.seen(run_id)
        if run is None or app.with_weights(run_id) is None:
            return _not_begun(run, "this run is gone or not finished")
        signed_in = own_token(app.settings, None if token is None else token.token)
        if signed_in is None:
            return _not_begun(run, _how_to_sign_in(app))
        try:
            under_way = start_push(
                run,
                (name or "").strip(),
                private=bool(hidden),
                even_if_worse=bool(even_if_worse),
                card=text,
                token=signed_in,
            )
        except TmergeError as error:
            return _not_begun(run, str(error).replace(str(run.folder), "the run"))
        return [note("", keep=True), push_card(under_way), gr.update(interactive=False), gr.Timer(active=True)]

    go.click(
        begin,
        [app.run_id, repo, private, worse, card],
        [fault, progress, go, clock],
        trigger_mode="once",
        **_QUIET,
    )

    def tick(run_id: str) -> list[Any]:
        run = app.seen(run_id)
        under_way = None if run is None else run.push
        over = under_way is None or under_way.state != "pushing"
        return [push_card(under_way), gr.update(interactive=True) if over else gr.skip(), gr.Timer(active=not over)]

    clock.tick(tick, [app.run_id], [progress, go, clock], **{**_QUIET, "queue": False})


def _not_begun(run: VisitorRun | None, why: str) -> list[Any]:
    """Why a push has not begun; what an earlier one came to is no answer to this one, unless it is still under way."""
    pushing = run is not None and run.push is not None and run.push.state == "pushing"
    return [note(why, bad=True), gr.skip() if pushing else "", gr.skip(), gr.skip()]


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
