"""A push under way, known to its run: it goes on when the page is closed, and a reload finds it.

The token is in the thread that pushes and nowhere else: no state of a page or of a run holds it.
"""

from __future__ import annotations

import os
import re
import threading
import time
from dataclasses import dataclass, field
from typing import Literal

from huggingface_hub import get_token
from huggingface_hub.errors import HfHubHTTPError

from tmerge.errors import PushError, TmergeError
from tmerge.hub import Pushed, merge_licence, plan_push, push
from tmerge.hub_client import hub_client
from tmerge.models import ModelReference
from tmerge.report import Report
from tmerge.ui.server.faults import fault_line
from tmerge.ui.server.limits import AppSettings, BusyError
from tmerge.ui.server.visitor_run import VisitorRun

__all__ = ["PushUnderWay", "account_name", "offers_sign_in", "own_token", "start_push", "suggested_name"]

# The Hub's own limit is 96 characters.
_LONGEST_NAME = 90

_lock = threading.Lock()


@dataclass
class PushUnderWay:
    """One push of a run.

    Attributes:
        repo: As asked for.
        lines: What it has done so far, the last one being what it does now.
        pushed: Where the run has gone, once it is there.
        error: Why it failed, in one line.
        began, ended: `time.time`.
    """

    repo: str
    lines: list[str] = field(default_factory=list)
    pushed: Pushed | None = None
    error: str | None = None
    began: float = field(default_factory=time.time)
    ended: float | None = None

    @property
    def state(self) -> Literal["pushing", "done", "failed"]:
        """Where it is."""
        return "pushing" if self.ended is None else "failed" if self.pushed is None else "done"


def start_push(
    run: VisitorRun, repo: str, *, private: bool, even_if_worse: bool, card: str | None, token: str
) -> PushUnderWay:
    """Begin to push a finished run.

    Args:
        run: Done.
        repo: ``user/name``.
        private: Make the repo private, where it is made.
        even_if_worse: The visitor has said that a model worse than its target may be published.
        card: As edited; the run's own if None.
        token: Of the account that pushes.

    Raises:
        BusyError: It is being pushed already.
        PushError: What can be told before anything is sent: the name, the verdict, the card.
        RunNotFoundError: It is no finished run any more.
    """
    if run.report is not None and run.report.published_verdict == "hurts" and not even_if_worse:
        raise PushError("this model is worse than its target; tick the box that says so to publish it all the same")
    plan_push(run.folder, repo, even_if_worse=even_if_worse, card=card)
    with _lock:
        if run.push is not None and run.push.state == "pushing":
            raise BusyError("this run is being pushed already")
        under_way = run.push = PushUnderWay(repo)

    def work() -> None:
        try:
            under_way.pushed = push(
                run.folder,
                repo,
                private=private,
                even_if_worse=even_if_worse,
                card=card,
                token=token,
                listener=under_way.lines.append,
            )
        except TmergeError as error:
            under_way.error = _for_the_page(run, str(error))
        except Exception:  # noqa: BLE001 - a fault of ours: the log has it, the visitor its number
            under_way.error = fault_line("a push failed")
        under_way.ended = time.time()

    threading.Thread(target=work, name="tmerge-push", daemon=True).start()
    return under_way


def own_token(settings: AppSettings, signed_in: str | None) -> str | None:
    """The token that a visitor pushes with: of who signed in; on one's own machine that of ``hf auth login``.

    On a public app the owner's token is nobody else's, and is never given out.
    """
    return signed_in or (None if settings.public else get_token())


def account_name(token: str) -> str | None:
    """Whose token it is; None where the Hub does not know it.

    Raises:
        PushError: The Hub cannot be reached.
    """
    try:
        return str(hub_client(token=token).whoami()["name"])
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            return None
        raise PushError("the Hub does not say whose account this is; try again later") from None
    except Exception:  # noqa: BLE001 - the client's transport has changed its errors before; all of them mean the same
        raise PushError("the Hub cannot be reached; check the network, and open this tab again") from None


def suggested_name(report: Report) -> str:
    """A repo name for a run's result: both models' names, beginning as the licence asks."""
    names = []
    for reference in (report.target.ref, *([each.reference for each in report.sources] or [report.source.ref])):
        try:
            names.append(ModelReference.parse(reference).name)
        except TmergeError:
            names.append(reference.partition("@")[0].rpartition("/")[2])
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", "-x-".join(names))
    begins = merge_licence(report).name_begins
    if begins and not name.lower().startswith(begins.lower()):
        name = f"{begins}-{name}"
    return re.sub(r"-{2,}|\.{2,}", "-", name)[:_LONGEST_NAME].strip("-.")


def _for_the_page(run: VisitorRun, line: str) -> str:
    return line.replace(str(run.folder), "the run").replace("run `hf auth login` (or set HF_TOKEN)", "sign in")


def offers_sign_in(settings: AppSettings) -> bool:
    """Whether visitors sign in with Hugging Face: on a Space whose README asks for it."""
    return settings.public and bool(os.environ.get("OAUTH_CLIENT_ID"))
