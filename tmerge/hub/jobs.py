"""The same recipe, run as a Hugging Face Job on the user's account, with its result in the user's repo.

The job installs tmerge, reads the recipe from its environment and runs ``tmerge merge --push``. The token goes to it
as a secret, which the Hub keeps encrypted and shows to nobody; it is in no argument, no variable and no log.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass

from huggingface_hub import HfApi, JobHardware, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from tmerge.calibration import SAMPLES_PREFIX
from tmerge.calibration.files import local_file
from tmerge.errors import ModelNotFoundError, RemoteError
from tmerge.hub.failures import pushing, running_jobs
from tmerge.hub_client import hub_client
from tmerge.models import ModelReference
from tmerge.preflight.hardware import CARDS
from tmerge.recipe import RECIPE_VARIABLE, Recipe, model_references, text_references

__all__ = ["RemoteRun", "follow_job", "start_job"]

_PATIENCE = 2.0  # seconds between two looks at a job that has stopped talking
# Debian with uv and git; where the Hub's own `run_uv_job` runs a command. That one takes an argument that ends as a
# file's name does, such as a repo user/fused.sh, for a file of this machine, so the command is put together here.
_IMAGE = "ghcr.io/astral-sh/uv:python3.12-bookworm"
_TIMEOUT = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhd])|([0-9]{1,9})")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
# What a repo may hold that no run has been pushed to yet.
_EMPTY = {".gitattributes", "README.md"}


@dataclass(frozen=True)
class RemoteRun:
    """A job that was started.

    Attributes:
        job: Its id.
        url: Its page.
        repo: Where its result goes.
        before: The repo's commit before the job began, by which its result is told from an older one.
    """

    job: str
    url: str
    repo: str
    before: str


def start_job(
    recipe: Recipe, flavor: str, repo: str, *, package: str, timeout: str = "4h", token: str | None = None
) -> RemoteRun:
    """Start a job that runs a recipe and pushes its result.

    The repo is private: what would be lost with the job's machine is kept whatever the verdict, and is published when
    its owner has read it. It is made here where it is not there, so that what stands against the push is said before
    the job costs anything; it stays, empty, if the job is then refused.

    Args:
        recipe: Names nothing that is on this machine alone.
        flavor: Of the Hub's hardware, such as ``cpu-upgrade`` or ``l4x1``.
        repo: ``user/name``.
        package: What ``uv`` installs tmerge from: ``git+https://...`` of this project, or a wheel's address.
        timeout: After which the Hub stops it: ``30m``, ``4h``, ``1.5h``, or seconds.
        token: In place of the user's own.

    Raises:
        RemoteError: A recipe with local files, a flavor that is not known, no repo's name, no span of time, no token, a
            repo that the job could not push to, or the Hub refused.
        PushError: The repo cannot be looked at or made.
    """
    _refuse_local(recipe)
    _refuse_name(repo)
    seconds = _seconds(timeout)
    known = [hardware.value for hardware in JobHardware]
    close = difflib.get_close_matches(flavor, known, 1)
    if flavor not in known and close:
        raise RemoteError(f"the Hub has no hardware {flavor!r}; did you mean {close[0]}? All: {', '.join(known)}")
    token = token or get_token()
    if token is None:
        raise RemoteError("nobody is signed in to the Hub; run `hf auth login` (or set HF_TOKEN)")
    words = ["merge", f"env:{RECIPE_VARIABLE}", "--out", "/tmp/fused", "--push", repo, "--private", "--even-if-worse"]
    api = hub_client(token=token)
    before = _open_repo(api, repo, token)
    with running_jobs(flavor):
        job = api.run_job(
            image=_IMAGE,
            command=["uv", "run", "--with", package, *_launched(flavor), *words],
            env={RECIPE_VARIABLE: recipe.to_yaml()},
            secrets={"HF_TOKEN": token},
            flavor=flavor,
            timeout=seconds,
            # A job's name is a tag as well, which has no dots.
            name=f"tmerge-{repo.rpartition('/')[2]}".replace(".", "-")[:60],
        )
    return RemoteRun(job.id, job.url, repo, before)


def follow_job(run: RemoteRun, log: Callable[[str], None], *, token: str | None = None) -> str:
    """Pass on what a job says until it has ended.

    Args:
        run: The job.
        log: Hears each line.
        token: In place of the user's own.

    Returns:
        The commit that its result is at.

    Raises:
        RemoteError: It failed, was stopped, left no result, or cannot be heard any more.
    """
    api = hub_client(token=token)
    with running_jobs("the Hub"):
        for line in api.fetch_job_logs(job_id=run.job, follow=True):
            log(line.rstrip("\n"))
        job = api.wait_for_job(run.job, poll_interval=_PATIENCE)
        if job.status.stage != "COMPLETED":
            reason = f" ({job.status.message})" if job.status.message else ""
            raise RemoteError(f"the job ended as {str(job.status.stage)}{reason}; its log: {run.url}")
        try:
            commit = api.model_info(run.repo).sha or ""
        except RepositoryNotFoundError:
            commit = run.before
    if commit == run.before:
        raise RemoteError(f"the job ended without a result: it pushed nothing to {run.repo}; its log: {run.url}")
    return commit


def _launched(flavor: str) -> list[str]:
    """What runs tmerge on a flavor: of several cards, a process on each."""
    cards = CARDS.search(flavor)
    if cards is None or int(cards[1]) == 1:
        return ["tmerge"]
    return ["accelerate", "launch", "--multi_gpu", "--num_processes", cards[1], "-m", "tmerge"]


def _refuse_name(repo: str) -> None:
    """Refuse what is no name of a repo, before the Hub is asked."""
    try:
        validate_repo_id(repo)
    except HFValidationError:
        named = False
    else:
        named = "/" in repo
    if not named:
        raise RemoteError(f"{repo!r} is no name of a repo; give user/name, of letters, digits, '-', '_' and '.'")


def _seconds(timeout: str) -> int:
    """A span of time as the Hub's client takes it; it has no words for one that it cannot read."""
    span = _TIMEOUT.fullmatch(timeout.strip())
    seconds = 0
    if span is not None:
        number, unit, bare = span.groups()
        seconds = int(bare) if bare else int(float(number) * _SECONDS[unit])
    if seconds < 1:
        raise RemoteError(f"the job's timeout {timeout!r} is no span of time; write one number and its unit: 30m, 4.5h")
    return seconds


def _open_repo(api: HfApi, repo: str, token: str) -> str:
    """The commit of the repo that the result goes to, made private if it is not there; refused as the push would be."""
    with pushing(repo, token):
        try:
            info = api.model_info(repo)
        except RepositoryNotFoundError:
            api.create_repo(repo, private=True)
            return api.model_info(repo).sha or ""
        if not info.private:
            raise RemoteError(
                f"{repo} is there and public, and a job's result is private until you have read its verdict; make it "
                "private in its settings, or choose another repo"
            )
        names = {entry.rfilename for entry in info.siblings or ()}
        if names - _EMPTY and "tmerge/report.json" not in names:
            raise RemoteError(
                f"{repo} holds something else than a run of tmerge, and is not written over; choose another repo"
            )
        account = api.whoami()
        readers = {org["name"] for org in account.get("orgs", ()) if org.get("roleInOrg") == "read"}
        writers = {account["name"], *(org["name"] for org in account.get("orgs", ()))} - readers
        if repo.partition("/")[0] not in writers:
            raise RemoteError(f"{repo} is not of {account['name']}, who may not write there; choose another repo")
        return info.sha or ""


def _refuse_local(recipe: Recipe) -> None:
    """Refuse what a machine elsewhere cannot read."""
    for key, reference in model_references(recipe).items():
        try:
            kind = ModelReference.parse(reference).kind
        except ModelNotFoundError:
            kind = "folder"
        if kind != "hub":
            raise RemoteError(
                f"{key} {reference!r} is on this machine alone, and the job runs elsewhere; push it and name its Hub id"
            )
    for key, dataset in text_references(recipe).items():
        if not dataset.startswith(SAMPLES_PREFIX) and local_file(dataset) is not None:
            raise RemoteError(
                f"{key} {dataset!r} is a file of this machine, and the job runs elsewhere; push it as a "
                "dataset, and name its Hub id"
            )
