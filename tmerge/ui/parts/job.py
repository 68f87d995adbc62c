"""On the Choose tab of a public app: a run that is too large for it, as a Hugging Face Job on the visitor's account.

The visitor signs in with Hugging Face; no field asks for a token. The job belongs to their account, is paid by it, and
leaves its result in a private repo of theirs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import gradio as gr
from huggingface_hub import JobHardware, constants

from tmerge.errors import RemoteError, TmergeError
from tmerge.hub.jobs import RemoteRun, start_job
from tmerge.recipe import Recipe
from tmerge.ui.context import WAITING, AppContext
from tmerge.ui.parts.cards import empty_card, error_card, note
from tmerge.ui.parts.expected import check_here, refused_here
from tmerge.ui.parts.following import follow
from tmerge.ui.parts.form import recipe_of
from tmerge.ui.parts.returning import sign_in_button
from tmerge.ui.parts.safe import render
from tmerge.ui.parts.style import markup
from tmerge.ui.server.aside import StillAskingError, patiently
from tmerge.ui.server.changes import always
from tmerge.ui.server.faults import FaultError, fault_line
from tmerge.ui.server.limits import UPLOAD_PREFIX, vetted
from tmerge.ui.server.pushes import account_name, offers_sign_in, own_token

__all__ = ["build_job", "job_offer", "job_timeout", "start_as_job"]

_USUAL = JobHardware.L4X1.value
_LONGEST = 4 * 3600
# A sign-in that ends sooner than this is renewed first: the job pushes with it at its end.
_SHORTEST = 3600
_TITLE = "A job on your account"
_WHAT = (
    "The same recipe on hardware of Hugging Face that your account pays for; its result goes to a private repo of "
    "yours, whatever the verdict, with its report and its card."
)


def build_job(app: AppContext, good: gr.State, upload: gr.State) -> None:
    """Lay the part out and wire it; nothing where the app offers no jobs.

    Args:
        app: What the tabs share.
        good: The form's recipe.
        upload: The uploaded file's path, or None.
    """
    if app.settings.job_package is None:
        return
    with gr.Accordion("Run it as a job on your own account", open=False, elem_id="job") as fold:
        offer = markup(empty_card(_TITLE, _WHAT), elem_id="job-offer")
        with gr.Row(equal_height=False):
            hardware = gr.Dropdown(
                [item.value for item in JobHardware],
                value=_USUAL,
                label="Hardware",
                info="Prices: huggingface.co/docs/hub/jobs",
                elem_id="job-hardware",
                min_width=220,
            )
            repo = gr.Textbox(
                label="Repo for the result",
                info="user/name, or a name for your own; made private",
                max_lines=1,
                elem_id="job-repo",
                min_width=220,
            )
        if offers_sign_in(app.settings):
            sign_in_button(app, tab="choose", name="job-sign-in")
        go = gr.Button("Start the job", elem_id="job-go")
        result = markup(note("", keep=True), elem_id="job-result")

    def offered(draft: dict[str, Any], uploaded: str | None, *, wanted: Callable[[], bool]) -> dict[Any, Any]:
        refused, card = job_offer(app, draft, wanted)
        return {offer: card} | ({fold: gr.Accordion(open=True)} if refused else {})

    follow(app, [good.change, upload.change], offered, [good, upload], [fold, offer], {})

    async def begin(draft: dict[str, Any], flavor: str, name: str, token: gr.OAuthToken | None) -> str:
        try:
            signed_in = own_token(app.settings, None if token is None else token.token)
            if signed_in is None:
                raise RemoteError(
                    "nobody is signed in; sign in with Hugging Face first"
                    if offers_sign_in(app.settings)
                    else "this app does not offer to sign in; run `tmerge merge --remote` on your own machine"
                )
            ends = None if token is None else token.expires_at
            # It asks the same, whose answer is there then.
            await patiently(partial(job_offer, app, draft))
            job = await asyncio.to_thread(start_as_job, app, draft, flavor, name, signed_in, ends)
            return render("choose.html", "job_started", job=job, result=f"{constants.ENDPOINT}/{job.repo}")
        except (TmergeError, StillAskingError) as error:
            return error_card("No job was started", str(error))
        except Exception:  # noqa: BLE001 - a fault of ours: the log has it, and the visitor a card
            return error_card("No job was started", fault_line("a job could not be started"))

    go.click(begin, [good, hardware, repo], result, trigger_mode="once", **{**WAITING, "show_progress": "minimal"})


def job_offer(app: AppContext, draft: Mapping[str, Any], wanted: Callable[[], bool] = always) -> tuple[bool, str]:
    """Whether this app refuses the form's recipe as too large or too long, and the card that says what a job would do.

    Args:
        app: What the tabs share.
        draft: The form's recipe.
        wanted: As for `Aside.ask`.

    Raises:
        StillAskingError: It is not known yet.
        SupersededError: It is not wanted any more.
    """
    if not draft.get("target") or not draft.get("source"):
        return False, empty_card(_TITLE, _WHAT)
    try:
        recipe = recipe_of(draft)
        refused = refused_here(app, recipe, wanted)
    except FaultError:
        return False, empty_card(_TITLE, _WHAT)
    except TmergeError:
        # Which one is said at its field, or in the place of the two models' cards.
        return False, empty_card(_TITLE, "The recipe has a mistake; mend it, and a job can run it.")
    try:
        _refuse_unreachable(app, recipe)
    except TmergeError as error:
        return False, empty_card("This cannot be run as a job", str(error))
    if refused is None:
        return False, empty_card("This app can run it; so can a job on your account", _WHAT)
    return True, empty_card("Too large for this app, and not for a job on your account", _WHAT)


def start_as_job(
    app: AppContext, draft: Mapping[str, Any], flavor: str, repo: str, token: str, ends: float | None
) -> RemoteRun:
    """Start the form's recipe as a job.

    Args:
        app: What the tabs share.
        draft: The form's recipe.
        flavor: One of ``JobHardware``.
        repo: ``user/name``, or ``name`` for the visitor's own.
        token: Of who signed in.
        ends: When the sign-in ends, `time.time`; None if it does not.

    Raises:
        TmergeError: The recipe cannot be merged or read elsewhere, the sign-in ends too soon, or the Hub refused.
    """
    recipe = recipe_of(draft)
    refused_here(app, recipe)
    _refuse_unreachable(app, recipe)
    name = (repo or "").strip().strip("/")
    if not name:
        raise RemoteError("name the repo that the result goes to")
    if "/" not in name:
        user = account_name(token)
        if user is None:
            raise RemoteError("the Hub does not know your sign-in any more; sign in again")
        name = f"{user}/{name}"
    assert app.settings.job_package is not None
    return start_job(
        vetted(recipe, app.settings.elsewhere),
        flavor,
        name,
        package=app.settings.job_package,
        timeout=job_timeout(ends),
        token=token,
    )


def job_timeout(ends: float | None) -> str:
    """How long a job may take, as the Hub reads it: no longer than the sign-in that it pushes with.

    Raises:
        RemoteError: The sign-in ends too soon.
    """
    # A minute for the push itself.
    left = _LONGEST if ends is None else min(_LONGEST, ends - time.time() - 60)
    if left < _SHORTEST:
        raise RemoteError("your sign-in ends within the hour, and the job pushes with it; sign out and in again")
    return f"{int(left // 60)}m"


def _refuse_unreachable(app: AppContext, recipe: Recipe) -> None:
    """Refuse what a job on the visitor's account could not read, before it costs anything."""
    if recipe.calibration.dataset.startswith(UPLOAD_PREFIX):
        raise RemoteError(
            "an uploaded file stays on this server, and the job runs elsewhere; push the file as a dataset to the Hub, "
            "and name its id"
        )
    facts = check_here(app, recipe).found
    for role, model in (("target", facts.target), ("source", facts.source)):
        if model.gated or model.private:
            raise RemoteError(
                f"the {role} {model.ref!r} is gated or private, and your sign-in here lets a job make repos, "
                "not read yours; run `tmerge merge --remote` on your own machine for that"
            )
