"""Solving the transport between the two models' features, and asking whether they correspond at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tmerge.hub.pull import Plan
from tmerge.recipe import Recipe
from tmerge.report import relatedness_words
from tmerge.solving import Solving, measure_relatedness, solve_apart, solve_shared
from tmerge.stages.notes import TransportNote
from tmerge.stages.step import Progress

__all__ = ["Transport"]


@dataclass(frozen=True)
class Transport:
    """The stage ``transport``.

    Attributes:
        recipe: Of the run.
        solving: The features, and where what is solved is kept.
        read: ``target`` and ``source`` -> the key of the stage that read it.
        recorded: A recorded transport, with which nothing is solved.
    """

    recipe: Recipe
    solving: Solving
    read: dict[str, str]
    recorded: Plan | None

    name = "transport"
    note = TransportNote

    def inputs(self) -> dict[str, Any]:
        """What decides the plans."""
        plan = None if self.recorded is None else self.recorded.key
        return {"recipe": self.recipe.digest("transport"), **self.read, "plan": plan}

    def do(self, key: str, progress: Progress) -> TransportNote:
        """Solve, and tell the relatedness before anything is fused."""
        if self.recorded is not None:
            solved = self.recorded.report["transport"]
            names = ("problems", "iterations", "worst_marginal_violation", "converged", "relatedness")
            return TransportNote.model_validate({name: solved.get(name) for name in names})
        solve = solve_shared if self.recipe.transport.structure == "shared" else solve_apart
        solved = solve(self.solving, progress)
        relatedness = measure_relatedness(self.solving, progress)
        if relatedness is not None:
            progress.note(relatedness_words(relatedness))
        return TransportNote.model_validate({**solved, "relatedness": relatedness})
