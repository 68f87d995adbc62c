"""A finished merge's models, for what is done after it: those that were merged, whatever their names stand for by now.

What a merge noted (scores, features, transported neurons) is of the very models that it read. A Hub repo is read at its
commit; a folder or a file, which cannot be read as it was, is refused where it has become another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from tmerge.errors import CheckpointError
from tmerge.models import LoadedModel, Model, Projection, give_back_memory, model_commit
from tmerge.preflight.models import Models
from tmerge.recipe import Recipe
from tmerge.stages.scoring import load, opened
from tmerge.stages.step import Progress

__all__ = ["SINCE_THE_MERGE", "MergedModels", "Since", "refuse_moved"]


@dataclass(frozen=True)
class Since:
    """From when on a model has to stay what it is.

    Attributes:
        words: When that was, after "since".
        remedy: What to do where it has become another.
    """

    words: str
    remedy: str


SINCE_THE_MERGE = Since("it was merged", "put the former one back, or run the merge again and then this")
"""Of what goes on from a finished run."""


class MergedModels:
    """The models of a finished merge.

    Args:
        recipe: Names them.
        commits: Role -> what the merge's report says of its model; nobody is asked again.
        progress: Hears that one is loaded.
        since: From when on they have to be those.
    """

    def __init__(self, recipe: Recipe, commits: Mapping[str, str], progress: Progress, since: Since) -> None:
        self._handles, self._commits = Models.of(recipe, commits), commits
        self._progress, self._since = progress, since

    def refuse_changed(self, *roles: str) -> None:
        """Refuse local models that are others by now, before they are loaded: their files are hashed, nothing else.

        Of a Hub repo nobody is asked: it is read at its commit.

        Raises:
            CheckpointError: One has changed.
            ModelNotFoundError: One is not there any more.
        """
        for role in roles:
            handle, before = self.handle(role), self._commits[role]
            if before.startswith("sha256:"):
                # Found apart from the handle, whose own commit is of the files as they are when they are loaded.
                now = model_commit(handle.reference, handle.adapter, handle.base)
                refuse_moved(_name(handle), before, now, self._since)

    def load(self, role: str) -> LoadedModel:
        """A model in memory, kept until it is let go.

        Raises:
            CheckpointError: A folder or file has changed.
        """
        return self._kept(role, load)

    def read(self, role: str) -> LoadedModel:
        """A model to be read, in memory or by blocks, kept until it is let go; raises as `load`."""
        return self._kept(role, opened)

    @contextmanager
    def reading(self, role: str) -> Iterator[LoadedModel]:
        """As `read`, and let go afterwards."""
        try:
            yield self.read(role)
        finally:
            self.release(role)

    def _kept(self, role: str, get: Callable[[Model, Progress], LoadedModel]) -> LoadedModel:
        handle = self.handle(role)
        loaded = get(handle, self._progress)
        refuse_moved(_name(handle), self._commits[role], loaded.commit, self._since)
        return loaded

    def target_layers(self) -> list[dict[str, Projection]]:
        """The loaded target's projections."""
        self.load("target")
        return self.handle("target").views.views

    def unfused_target(self) -> list[dict[str, Projection]]:
        """Those of them that are read from its files."""
        return self.handle("target").unfused

    def release(self, role: str) -> None:
        """Let a model's weights go."""
        self.handle(role).release()
        give_back_memory()

    def handle(self, role: str) -> Model:
        """The target's, or the source's: of several sources their base's."""
        return self._handles.target if role == "target" else self._handles.source


def _name(handle: Model) -> str:
    return handle.reference if handle.adapter is None else f"{handle.reference} + {handle.adapter}"


def refuse_moved(reference: str, before: str, now: str, since: Since) -> None:
    """Refuse a model that is another than the one that something is kept of.

    Args:
        reference: Names it.
        before: What identified it.
        now: What identifies it.
        since: When it had to be the former.

    Raises:
        CheckpointError: It is another.
    """
    if before != now:
        raise CheckpointError(
            f"model {reference!r} changed since {since.words} ({before[:19]} then, {now[:19]} now); {since.remedy}"
        )
