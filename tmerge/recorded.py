"""A finished run, wherever it is: a folder here, or a repo on the Hub of which only ``tmerge/`` is fetched.

What it recorded of its transport can be fused from again: `RecordedRun`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tmerge.calibration import TextSet, text_digest
from tmerge.errors import CheckpointError, ModelNotFoundError, PlanError, RunNotFoundError
from tmerge.models import ModelReference, Snapshot, fetch, file_digest, open_repo
from tmerge.processes import Processes
from tmerge.recipe import DECIDE_NOTHING, Recipe, load_yaml, unsaid
from tmerge.report import Report
from tmerge.run import Run
from tmerge.transport import Transport, TransportRecord, recorded_layer_maps, recorded_transport

__all__ = ["FoundRun", "RecordedRun", "find_run"]

_RECIPE, _REPORT, _TRANSPORT = "tmerge/recipe.yaml", "tmerge/report.json", "tmerge/transport.safetensors"


@dataclass(frozen=True)
class FoundRun:
    """A run to read from.

    Attributes:
        reference: As it was asked for.
        run: Its folder; of a repo, the one in the Hub's cache, with what has been fetched.
        snapshot: Of a repo; None for a folder.
    """

    reference: str
    run: Run
    snapshot: Snapshot | None

    @property
    def name(self) -> str:
        """The reference with its commit, for a repo; the folder as it was written, otherwise."""
        if self.snapshot is None:
            return self.reference
        return f"{self.snapshot.reference.repo}@{self.snapshot.commit}"

    def fetch(self, name: str) -> Path:
        """One of the run's files, downloaded if need be.

        Raises:
            RunNotFoundError: It has no such file.
        """
        path = self.run.folder / name if self.snapshot is None else fetch(self.snapshot, name)
        if path is None or not path.is_file():
            raise RunNotFoundError(f"{self.reference} is not a finished run of tmerge (it has no {name})")
        return path

    def report(self) -> Report:
        """report.json, validated; raises as `Run.report`."""
        if self.snapshot is not None:
            self.fetch(_REPORT)
        return self.run.report()

    def recipe(self) -> Recipe:
        """The resolved recipe, but for `trusted`: whose code may run here is not for somebody else's recipe to say."""
        return self._written().model_copy(update={"trust_remote_code": ()})

    @property
    def trusted(self) -> tuple[str, ...]:
        """References whose own code the recipe lets run."""
        return self._written().trust_remote_code

    def _written(self) -> Recipe:
        self.fetch(_RECIPE)
        return self.run.recipe()

    def unsaid(self) -> dict[str, Any]:
        """What decides its weights and its recipe does not say, as an earlier tmerge wrote it.

        Returns:
            Key, dotted -> the default of now.
        """
        data = load_yaml(self.fetch(_RECIPE).read_text("utf-8"), _RECIPE)
        return unsaid(data, self.recipe().model_dump(mode="json", exclude=set(DECIDE_NOTHING)))

    def record(self) -> TransportRecord:
        """transport.safetensors."""
        return TransportRecord.load(self.fetch(_TRANSPORT))

    def transport_digest(self) -> str:
        """SHA-256 (hex) of transport.safetensors."""
        return file_digest(self.fetch(_TRANSPORT))


def find_run(reference: str) -> FoundRun:
    """Find a run.

    Args:
        reference: A folder, or ``user/name`` (``@revision``) on the Hub. A folder of that name wins.

    Raises:
        RunNotFoundError: A folder that is not a finished run, or a repo that holds none.
        TmergeError: As `hub_errors`, where the repo cannot be read.
    """
    if Path(reference).is_dir():
        found_run = FoundRun(reference, Run(Path(reference)), None)
        found_run.run.report()
        return found_run
    try:
        where = ModelReference.parse(reference)
    except ModelNotFoundError:
        raise RunNotFoundError(
            f"{reference!r} is neither the folder of a run nor a Hub id (user/name); name the folder that --out named"
        ) from None
    if where.kind != "hub" or "/" not in (where.repo or ""):
        raise RunNotFoundError(
            f"{reference} is not a run of tmerge: no such folder here, and a repo is named as user/name; name the "
            "folder that --out named"
        )
    try:
        # It need not hold a model: a plan is pushed alone too.
        snapshot = open_repo(where, config=_REPORT)
    except CheckpointError:
        raise RunNotFoundError(f"{reference} is not a finished run of tmerge (it has no {_REPORT})") from None
    return FoundRun(reference, Run(snapshot.folder), snapshot)


class RecordedRun:
    """A finished run whose recorded transport is fused from again, without calibrating.

    Attributes:
        found: The run.
        recipe: Its recipe.
        report: Its report.
        key: What identifies the transport: the digest of its file.
    """

    def __init__(self, reference: str) -> None:
        self.found = find_run(reference)
        self.recipe, self.report = self.found.recipe(), self.found.report()
        self.key = self.found.transport_digest()

    @classmethod
    def agreed(cls, reference: str, processes: Processes) -> RecordedRun:
        """A run, at the commit that the first of several processes finds."""
        return cls(reference if processes.count == 1 else processes.from_first(lambda: find_run(reference).name))

    @cached_property
    def record(self) -> TransportRecord:
        """What is stored of its transport."""
        return self.found.record()

    def transport(self, projections: Sequence[str]) -> Transport:
        """Its transport, for the projections to be fused.

        Raises:
            PlanError: A projection was not solved.
        """
        solved = self.report.transport
        return recorded_transport(
            self.record,
            projections,
            eta=solved.eta_used,
            layer_plans_converged=solved.layer_plans_converged,
        )

    def refuse_other_recipe(self, recipe: Recipe, commits: Mapping[str, str], projections: Sequence[str]) -> None:
        """Refuse a recipe that the transport was not solved for.

        Args:
            recipe: The merge's.
            commits: ``target`` and ``source`` -> what identifies the models here.
            projections: To be fused.

        Raises:
            PlanError: Another model or commit, another seed or other transport settings, a projection that it does
                not hold; or ``alpha: auto``, where the run has read the texts that it would be chosen on.
        """
        for role, commit in commits.items():
            there = self.record.facts[role]
            if there["commit"] != commit:
                raise PlanError(
                    f"the plan of {self.found.reference} was made for the {role} {there['ref']} at "
                    f"{_short(there['commit'])}; {getattr(recipe, role)} is at {_short(commit)}: name that commit, or "
                    "merge without --plan"
                )
        other = [name for name in ("transport", "seed") if getattr(recipe, name) != getattr(self.recipe, name)]
        if other:
            raise PlanError(
                f"the plan of {self.found.reference} was made with another {' and '.join(other)}; only fusion, "
                "evaluation and save can change with --plan: leave the rest as it is there"
            )
        own = recipe.calibration
        for key in ("rows", "token_rows", "match_on"):
            asked, there = (str(getattr(of, key)).partition("@")[0] for of in (own, self.recipe.calibration))
            if asked != there:
                raise PlanError(
                    f"calibration.{key} is {asked}, and the plan of {self.found.reference} was matched with {there}; "
                    "nothing is matched with --plan: leave it as it is there"
                )
        chosen = recipe.fusion.chosen
        if chosen and not self.recipe.fusion.chosen and not self.matched_on_others:
            names = " and ".join(key.partition(".")[2] for key in chosen)
            raise PlanError(
                f"the plan of {self.found.reference} has read every text that {' and '.join(chosen)} auto could be "
                f"chosen on; give {names} a number, or merge without --plan"
            )
        recorded_layer_maps(self.record, projections)

    @property
    def matched_on_others(self) -> bool:
        """Whether its neurons were matched on another dataset's texts than those that it scores and chooses on."""
        return self.report.calibration.other > 0

    def refuse_other_texts(self, texts: TextSet) -> None:
        """Refuse texts whose held-out ones, or those to choose on, the run has matched neurons on.

        Args:
            texts: Those of this run.

        Raises:
            PlanError: It has; or its record does not say on which, and they are not the run's own.
        """
        read, dataset, sha256 = self.report.calibration, texts.dataset, texts.sha256
        matched = self.record.facts.get("matched_on")
        if sha256 != read.sha256 and isinstance(matched, list):
            away = (*texts.held_out, *texts.choosing)
            both = len(set(matched).intersection(map(text_digest, away)))
            if both:
                raise PlanError(
                    f"{both} of the {len(away)} texts of {dataset} that are scored or chosen on are among those that "
                    f"the plan of {self.found.reference} was matched on; give other texts"
                )
        elif sha256 != read.sha256:
            raise PlanError(
                f"the texts of {dataset} are not those that the plan of "
                f"{self.found.reference} was made from, which may have read what is held out here; leave the "
                "calibration section as it is there, at the dataset's same commit"
            )


def _short(commit: str) -> str:
    return commit.removeprefix("sha256:")[:12]
