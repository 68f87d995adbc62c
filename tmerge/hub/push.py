"""Publish a run's folder as a model repo: what goes, what is refused, and every failure said in one line.

What is pushed is the checkpoint that the report was measured on, held against its hashes first; its card is written
anew for the repo's name. The run's own folder is only read, so that a push that fails can be repeated.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, ModelCard, constants, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from tmerge.errors import PushError, RunNotFoundError
from tmerge.evaluation import Verdict
from tmerge.hub.card import card_text, merge_licence, relation
from tmerge.hub.failures import no_token, pushing
from tmerge.hub.plan_card import plan_card_text
from tmerge.hub.published import CARD, STALE, left_behind, published_files, staged
from tmerge.hub_client import hub_client
from tmerge.models import file_digest
from tmerge.quantities import bytes_words, count_words
from tmerge.recipe import Recipe, compared_references, model_references, text_references
from tmerge.report import Report, interval_words, summary, training_summary
from tmerge.run import Run

__all__ = ["PushPlan", "Pushed", "plan_push", "push", "refuse_unready"]

_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".ckpt")


@dataclass(frozen=True)
class PushPlan:
    """What a push would do.

    Attributes:
        folder: The run's.
        repo: Hub id, with its namespace where that is known.
        files: Path in the repo -> bytes, sorted; the card is among them.
        card: Its text.
        verdict: Of the model that the repo would hold.
        warnings: What the user should know before it is public.
        plan_only: Whether the repo would hold the transport alone, and no model.
    """

    folder: Path
    repo: str
    files: dict[str, int]
    card: str
    verdict: Verdict
    warnings: tuple[str, ...]
    plan_only: bool = False

    @property
    def total_bytes(self) -> int:
        """Of all files."""
        return sum(self.files.values())

    def to_dict(self) -> dict[str, Any]:
        """As ``tmerge push --dry-run --json`` prints it."""
        return {
            "repo": self.repo,
            "verdict": self.verdict,
            "plan_only": self.plan_only,
            "files": self.files,
            "total_bytes": self.total_bytes,
            "warnings": list(self.warnings),
            "card": self.card,
        }


@dataclass(frozen=True)
class Pushed:
    """Where a run has gone.

    Attributes:
        repo: Hub id.
        url: Page of the repo, or of the pull request.
        commit: Full hash.
        pull_request: Its page, where one was asked for.
    """

    repo: str
    url: str
    commit: str
    pull_request: str | None


def plan_push(
    folder: str | Path, repo: str, *, even_if_worse: bool = False, card: str | None = None, plan_only: bool = False
) -> PushPlan:
    """Everything that a push needs to know beforehand; asks no network and writes nothing.

    Args:
        folder: Of a finished run.
        repo: ``user/name``, or ``name`` for the user's own.
        even_if_worse: Publish a model that is worse than its target.
        card: An edited card in place of the run's own.
        plan_only: The transport alone, with its recipe and report; then no verdict is in the way.

    Raises:
        PushError: No such repo name; a verdict that needs `even_if_worse`; weights that are not those the report was
            measured on; a card that is not valid, or no longer says that the model is worse.
        RunNotFoundError: Not a finished run.
    """
    run = Run(Path(folder))
    report, recipe = run.report(), run.recipe()
    repo = _repo_id(repo)
    verdict = report.published_verdict
    if plan_only:
        text = plan_card_text(report, recipe, repo)
        files = {name: path.stat().st_size for name, path in published_files(run, plan_only=True).items()}
        files = dict(sorted((files | {CARD: len(text.encode())}).items()))
        return PushPlan(run.folder, repo, files, text, verdict, _warnings(report, recipe, repo, model=False), True)
    if verdict == "hurts" and not even_if_worse:
        raise PushError(
            f"{folder}: {_numbers(report)}, so it is not pushed; to publish it all the same, and say so in its card, "
            "add --even-if-worse"
        )
    _refuse_changed_weights(run, report)
    text = card_text(report, recipe, repo=repo) if card is None else card
    _refuse_invalid_card(text, report, verdict)
    files = {name: path.stat().st_size for name, path in published_files(run).items()} | {CARD: len(text.encode())}
    warnings = (*_warnings(report, recipe, repo), *left_behind(run, files))
    return PushPlan(run.folder, repo, dict(sorted(files.items())), text, verdict, warnings)


def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    even_if_worse: bool = False,
    card: str | None = None,
    plan_only: bool = False,
    token: str | None = None,
    listener: Callable[[str], None] | None = None,
) -> Pushed:
    """Push a finished run; the same call continues one that was interrupted.

    Args:
        folder: Of the run.
        repo: ``user/name``, or ``name`` for the user's own; made if it is not there.
        private: Make it private, where it is made.
        create_pr: Open a pull request instead of writing to the branch.
        revision: Branch to write to, made if it is not there; the default one if left out.
        even_if_worse: As `plan_push`.
        card: As `plan_push`.
        plan_only: As `plan_push`.
        token: In place of the user's own, which ``hf auth login`` has stored.
        listener: Hears in a few words of every step.

    Raises:
        PushError: As `plan_push`; no token or no right to write, a name that is taken by another model, a full quota,
            a network that is lost.
        RunNotFoundError: Not a finished run.
    """
    if create_pr and revision is not None:
        raise PushError("--create-pr opens a pull request against the default branch; leave --revision away, or it")
    say = listener or (lambda what: None)
    say("checking what is to be pushed")
    planned = plan_push(folder, repo, even_if_worse=even_if_worse, card=card, plan_only=plan_only)
    refuse_unready(planned.repo, token)
    api = hub_client(token=token)
    with pushing(planned.repo, token):
        if "/" not in planned.repo:
            name = f"{api.whoami()['name']}/{planned.repo}"
            planned = plan_push(folder, name, even_if_worse=even_if_worse, card=card, plan_only=plan_only)
        _open(api, planned, private=private, create_pr=create_pr, revision=revision, say=say)
        run = Run(planned.folder)
        with staged(run, published_files(run, plan_only=plan_only), planned.card) as laid_out:
            say(f"uploading {count_words(len(planned.files), 'file')}, {bytes_words(planned.total_bytes)}")
            done = api.upload_folder(
                repo_id=planned.repo,
                folder_path=laid_out,
                revision=revision,
                create_pr=create_pr,
                # A single file that an earlier run left would be loaded instead of this run's shards. What is
                # uploaded again is not deleted.
                delete_patterns=None if plan_only else list(STALE),
                commit_message=_message(planned),
            )
    url = done.pr_url or f"{constants.ENDPOINT}/{planned.repo}" + (f"/tree/{revision}" if revision else "")
    say("pushed")
    return Pushed(planned.repo, url, done.oid, done.pr_url)


def refuse_unready(repo: str, token: str | None = None) -> None:
    """Refuse what can be refused before there is anything to push.

    Raises:
        PushError: The name is none, or nobody is signed in.
    """
    _repo_id(repo)
    if token is None and get_token() is None:
        raise no_token(repo)


def _repo_id(repo: str) -> str:
    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise PushError(
            f"{repo!r} is no name of a repo; give user/name, of letters, digits, '-', '_' and '.'"
        ) from None
    return repo


def _open(
    api: HfApi, planned: PushPlan, *, private: bool, create_pr: bool, revision: str | None, say: Callable[[str], None]
) -> None:
    """Make the repo or the branch where it is missing; refuse to write over what is not a run of tmerge."""
    repo = planned.repo
    say(f"looking at {repo}")
    try:
        info = api.model_info(repo)
    except RepositoryNotFoundError:
        if create_pr:
            raise PushError(
                f"{repo} is not there, so there is nothing to open a pull request on; leave --create-pr"
            ) from None
        say(f"making {repo}")
        api.create_repo(repo, private=private or None)
    else:
        names = {entry.rfilename for entry in info.siblings or ()}
        foreign = any(name.endswith(_WEIGHTS) for name in names if not name.startswith("tmerge/"))
        if foreign and "tmerge/report.json" not in names and not create_pr:
            raise PushError(
                f"{repo} holds another model, not a run of tmerge, and is not written over; choose another --repo, "
                "or --create-pr"
            )
        if foreign and planned.plan_only and not create_pr:
            raise PushError(f"{repo} holds a model, which a plan alone would take away; choose another --repo")
        if private and not info.private:
            raise PushError(
                f"{repo} is there and public, so --private cannot be kept; make it private in its settings, or choose "
                "another --repo"
            )
    # A pull request that is open (refs/pr/1) is written to as it is.
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo, branch=revision, exist_ok=True)


def _refuse_changed_weights(run: Run, report: Report) -> None:
    """Refuse a checkpoint that is not the one that was scored."""
    for name, digest in report.weights.items():
        path = run.folder / name
        if not path.is_file():
            raise RunNotFoundError(f"{run.folder} has no {name}, which its report names; run the merge again")
        if file_digest(path) != digest:
            raise PushError(
                f"{path} is not the file that the report was measured on; run the merge again, or push it by hand "
                "without the card"
            )
    unknown = {path.name for path in run.folder.glob("*.safetensors")} - set(report.weights)
    if unknown:
        raise PushError(
            f"{run.folder} holds weights that its report does not name ({', '.join(sorted(unknown))}); move them away"
        )


def _refuse_invalid_card(text: str, report: Report, verdict: str) -> None:
    try:
        data = ModelCard(text).data
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise PushError(
            f"the card's metadata is not valid ({reason}); mend what is between its two --- lines"
        ) from None
    if not data.to_dict():
        raise PushError("the card has no metadata; begin it with metadata between two lines of ---")
    if data.get("base_model") and data.get("base_model_relation") != relation(report):
        raise PushError(f"the card's metadata no longer says base_model_relation: {relation(report)}; put it back")
    if verdict == "hurts":
        body = ModelCard(text).text.strip()
        first = next((part for part in body.split("\n\n") if part.strip() and not part.lstrip().startswith("#")), "")
        if "worse" not in first or f"{report.published_difference.value:+.4f}" not in first:
            said = training_summary(report) or summary(report)
            raise PushError(f"the card's first paragraph no longer says how much worse the model is; put back: {said}")


def _numbers(report: Report) -> str:
    change = report.published_difference
    return (
        f"the model is worse than its target by {change.value:.4f} bits per byte on held-out texts "
        f"(95 % interval {interval_words(change, signed=True)})"
    )


def _warnings(report: Report, recipe: Recipe, repo: str, *, model: bool = True) -> tuple[str, ...]:
    licence = merge_licence(report)
    remarks = [*licence.refusals, *licence.unknown]
    # What a licence asks of a model's name, a plan need not have.
    begins = licence.name_begins if model else None
    if begins and not _letters(repo.rpartition("/")[2]).startswith(_letters(begins)):
        remarks.append(f'the licence asks that the model\'s name begins with "{begins}", which {repo} does not')
    # All that the recipe names, as the card quotes all of it.
    named = model_references(recipe) | text_references(recipe) | compared_references(recipe)
    everything = (*named.values(), *recipe.bases, *recipe.trust_remote_code)
    # What has a path here has one there.
    paths = [name for name in everything if Path(name).is_absolute() or Path(name).exists()]
    if paths:
        files = ["the card", "recipe.yaml", "report.json", *(["adapter_config.json"] if report.saved_adapter else [])]
        named_there = f"{', '.join(files[:-1])} and {files[-1]} name files of this machine"
        remarks.append(f"{named_there}: {', '.join(dict.fromkeys(paths))}")
    return tuple(remarks)


def _letters(name: str) -> str:
    """Without what a repo's name writes otherwise than a product's."""
    return re.sub(r"[\s._-]", "", name).lower()


def _message(planned: PushPlan) -> str:
    if planned.plan_only:
        return "Transport plan by tmerge"
    return f"Merge by tmerge (against its target: {planned.verdict})"
