"""Repos found as a visitor types, and what a dataset holds. Both only read what is public, or the visitor's own."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import get_session

from tmerge.calibration.columns import choose_column
from tmerge.calibration.files import read_file
from tmerge.errors import DatasetError
from tmerge.hub_client import hub_client
from tmerge.ui.server.changes import Changes

__all__ = ["Choice", "DatasetFacts", "HubSearch", "Kind", "dataset_facts", "file_facts", "offered"]

Choice = tuple[str, str]
Kind = Literal["model", "adapter", "dataset"]

# The HTTP library under the Hub's client has changed before: its error class is taken from where it is sure to be.
_TransportError: type[Exception] = HfHubHTTPError.__mro__[1]

_FOUND = 12
_OFFERED = 60
_SHORTEST = 2
_SETTLED_SECONDS = 0.2
_KEPT_SECONDS = 300
# After the Hub could not be reached, it is not asked again for so long: a visitor's typing should not wait for it.
_PAUSE_SECONDS = 20
_PATIENCE = 4.0
_EXAMPLES = 20
_PREVIEW = 240


class HubSearch:
    """Names of repos that match what is typed, most downloaded first; answers are kept for a few minutes.

    Args:
        private: Whether the machine's own token is used, and its owner's private repos are found too.
    """

    def __init__(self, private: bool) -> None:
        self._token = None if private else False
        self._typing = Changes(_SETTLED_SECONDS)
        # What was found in this period of `_KEPT_SECONDS`: of the next one the Hub is asked anew.
        self._found = functools.lru_cache(maxsize=500)(self._search)
        self._unreachable_until = 0.0

    def find(self, kind: Kind, typed: str, base: str = "") -> tuple[list[str], str]:
        """Repo ids, and one line where the Hub cannot be asked (empty where it can).

        Args:
            kind: Of the repos.
            typed: By the visitor.
            base: Of adapters: the model that they are of, where that is a repo.
        """
        try:
            return self._found(kind, typed.strip()[:80].lower(), base, int(time.monotonic() // _KEPT_SECONDS)), ""
        except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, _TransportError, OSError):
            if time.monotonic() >= self._unreachable_until:
                self._unreachable_until = time.monotonic() + _PAUSE_SECONDS
            return [], _UNREACHABLE

    async def settled(self, page: str | None, typed: str) -> bool:
        """Wait a moment, and say whether enough has been typed on this page, and nothing more meanwhile."""
        # Of quick letters the first may be heard last: it is no reason to drop what has been typed since.
        return len(typed.strip()) >= _SHORTEST and await self._typing.begin(page).settled()

    def _search(self, kind: Kind, typed: str, base: str, _period: int) -> list[str]:
        if time.monotonic() < self._unreachable_until:
            raise OSError("the Hub could not be reached a moment ago")
        # Asked once and shortly: the client itself tries for half a minute before it says that there is no network.
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
        api = hub_client(token=self._token)
        if kind == "dataset":
            return [found.id for found in api.list_datasets(search=typed, sort="downloads", limit=_FOUND)]
        options: dict[str, Any] = {"pipeline_tag": "text-generation", "filter": "safetensors"}
        if kind == "adapter":
            # As the Hub tags what a card names as its base and as an adapter of it.
            options = {"filter": f"base_model:adapter:{base}" if base else "peft"}
        return [found.id for found in api.list_models(search=typed, sort="downloads", limit=_FOUND, **options)]


def offered(
    search: HubSearch, kind: Kind, typed: str, before: Sequence[Choice], base: str = ""
) -> tuple[list[Choice], str]:
    """What a search field offers now: what matches, first, and what it has offered before.

    The list never gets shorter: Gradio's dropdown, open as it is while one types, looks its entries up by their place
    in the list before, and stops working where that place is gone.

    Returns:
        Choices and the line of `HubSearch.find`.
    """
    names, line = search.find(kind, typed, base)
    choices: list[Choice] = [(name, name) for name in names]
    merged = [*choices, *(choice for choice in before if tuple(choice) not in choices)]
    return merged[: max(_OFFERED, len(before))], line


_UNREACHABLE = "The Hub cannot be reached, so nothing is searched: type the name in full, or use what is built in"


@dataclass(frozen=True)
class DatasetFacts:
    """What a calibration set holds, from its first rows.

    Attributes:
        columns: All of them.
        column: The one (or several, joined by +) that holds the text; "" where it is for the visitor to say.
        why: Why no column was found.
        example: The first text, cut.
        configs: Configurations of a Hub dataset.
        splits: Splits of the configuration.
    """

    columns: list[str]
    column: str
    why: str = ""
    example: str = ""
    configs: list[str] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)


def file_facts(path: str, name: str, wanted: str | None) -> DatasetFacts:
    """What an uploaded file holds; it is read as data, by its suffix, and nothing in it is run.

    Raises:
        DatasetError: It cannot be read, with the line that is wrong.
    """
    rows = list(itertools.islice(read_file(Path(path)), _EXAMPLES))
    if not rows:
        raise DatasetError(f"{name!r} is empty; upload a file with a text in each row")
    return _facts(rows, tuple(dict.fromkeys(key for row in rows for key in row)), name, wanted)


def dataset_facts(repo: str, config: str | None, split: str, wanted: str | None) -> DatasetFacts:
    """What a Hub dataset holds: its configurations and splits, its columns and the one that holds the text.

    Raises:
        DatasetError: No such dataset, or it cannot be read.
    """
    import datasets

    from tmerge.calibration.remote import open_remote

    name, _, revision = repo.partition("@")
    configs: list[str] = []
    splits: list[str] = []
    try:
        configs = datasets.get_dataset_config_names(name, revision=revision or None)
        chosen = config or (configs[0] if len(configs) == 1 else None)
        if chosen is not None:
            splits = datasets.get_dataset_split_names(name, chosen, revision=revision or None)
    except (datasets.exceptions.DatasetsError, HfHubHTTPError, _TransportError, OSError, ValueError, RuntimeError):
        pass  # `open_remote` says what is wrong, in our words
    if config is None and len(configs) > 1:
        return DatasetFacts([], "", "choose a configuration first", "", configs, [])
    if splits and split not in splits:
        return DatasetFacts([], "", f"there is no split {split!r}; choose one", "", configs, splits)
    remote = open_remote(repo, config, split, seed=0, buffer=_EXAMPLES)
    rows = list(itertools.islice(iter(remote), _EXAMPLES))
    if not rows:
        raise DatasetError(f"dataset {repo!r} has no rows in this split; choose another")
    columns = remote.columns or tuple(dict.fromkeys(key for row in rows for key in row))
    return replace(_facts(rows, columns, repo, wanted), configs=configs, splits=splits)


def _facts(rows: Sequence[dict[str, Any]], columns: tuple[str, ...], name: str, wanted: str | None) -> DatasetFacts:
    names = [str(one) for one in columns][:200]
    try:
        column = choose_column(wanted or None, columns, rows, repr(name))
    except DatasetError as error:
        return DatasetFacts(names, "", str(error))
    return DatasetFacts(names, str(column), example=str(rows[0].get(column.names[0]) or "").strip()[:_PREVIEW])
