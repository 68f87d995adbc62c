"""Rows of a Hub dataset, streamed: nothing is downloaded but what is read, and no repo's code ever runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import pyarrow
from datasets.exceptions import DatasetsError
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tmerge.calibration.files import AS_A_FILE
from tmerge.errors import DatasetError
from tmerge.hub_client import hub_client, is_silent, seconds_to_wait

__all__ = ["RemoteRows", "open_remote", "remote_commit"]

# The HTTP library under the Hub's client has changed before: its error class is taken from where it is sure to be.
_TransportError: type[Exception] = HfHubHTTPError.__mro__[1]
# What `datasets` raises for a repo it cannot read; it has few classes of its own.
_READING_ERRORS = (DatasetsError, pyarrow.ArrowException, ValueError, RuntimeError, NotImplementedError, OSError)


@dataclass(frozen=True)
class RemoteRows:
    """An opened Hub dataset.

    Attributes:
        repo: Hub id.
        revision: Full commit hash, so that a repo that changes meanwhile is not mixed.
        config: The configuration that was read; None where there is none to choose.
        columns: Its columns, or None where only the rows tell.
        stream: The rows, shuffled.
    """

    repo: str
    revision: str
    config: str | None
    columns: tuple[str, ...] | None
    stream: datasets.IterableDataset

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rows = iter(self.stream)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except (HfHubHTTPError, _TransportError, *_READING_ERRORS) as error:
                raise _explain(self.repo, error) from None
            yield row


def remote_commit(reference: str) -> str:
    """The commit that a Hub dataset's reference stands for now: one request.

    Raises:
        DatasetError: No such dataset or revision, no access, no network.
    """
    repo, _, asked = reference.partition("@")
    try:
        return str(hub_client().dataset_info(repo, revision=asked or None).sha)
    except RevisionNotFoundError:
        raise DatasetError(
            f"dataset {repo!r} has no revision {asked!r}; see {constants.ENDPOINT}/datasets/{repo}/commits/main"
        ) from None
    except (HfHubHTTPError, HFValidationError, _TransportError, *_READING_ERRORS) as error:
        raise _explain(repo, error) from None


def open_remote(
    reference: str, config: str | None, split: str, *, seed: int, buffer: int, further: bool = False
) -> RemoteRows:
    """Open a Hub dataset for streaming.

    Args:
        reference: Hub id, with ``@revision`` if wanted.
        config: Its configuration; None for the only one.
        split: Its split.
        seed: Of the shuffling.
        buffer: Rows that are shuffled at a time; the order of the shards is shuffled too.
        further: As `read_texts`.

    Raises:
        DatasetError: No such dataset, revision, configuration or split; no access, no network; or a dataset that only
            its own script could read.
    """
    repo = reference.partition("@")[0]
    commit = remote_commit(reference)
    try:
        stream = datasets.load_dataset(repo, config, split=split, revision=commit, streaming=True)
        columns = tuple(stream.features) if stream.features else None
        if stream.features:
            # Images and sound would be decoded row by row, and are not read here.
            written = [name for name, kind in stream.features.items() if _is_written(kind)]
            stream = stream.select_columns(written)
        read = stream.info.config_name
        shuffled = stream.shuffle(seed=seed, buffer_size=buffer)
        return RemoteRows(repo, commit, config or (None if read == "default" else read), columns, shuffled)
    except (HfHubHTTPError, HFValidationError, _TransportError, *_READING_ERRORS) as error:
        raise _explain(repo, error, config, split, further) from None


def _is_written(kind: Any) -> bool:
    """Whether a feature is made of plain values, lists and structs."""
    return isinstance(kind, (datasets.Value, datasets.ClassLabel, list, dict)) or hasattr(kind, "feature")


def _explain(
    repo: str, error: Exception, config: str | None = None, split: str | None = None, further: bool = False
) -> DatasetError:
    """One line for what went wrong; the Hub's own texts are not passed on, as they may quote a request."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    choices = re.search(r"\[(.*)\]", str(error))
    known = choices.group(1).replace("'", "") if choices else ""
    if isinstance(error, GatedRepoError) or "gated dataset" in str(error):
        page = f"{constants.ENDPOINT}/datasets/{repo}"
        return DatasetError(f"dataset {repo!r} is gated: request access at {page}, then run `hf auth login`")
    if isinstance(error, RepositoryNotFoundError | datasets.exceptions.DatasetNotFoundError):
        return DatasetError(
            f"dataset {repo!r}: no such file here, and no such dataset on the Hub; check the spelling, or run "
            "`hf auth login` if it is private"
        )
    if isinstance(error, HFValidationError):
        return DatasetError(
            f"dataset {repo!r} is neither a file here nor a Hub id (user/name); samples:english needs no download"
        )
    if isinstance(error, HfHubHTTPError):
        return DatasetError(f"dataset {repo!r}: the Hub answered {error.response.status_code}; try again later")
    if is_silent(error):
        return DatasetError(
            f"dataset {repo!r}: the Hub ({constants.ENDPOINT}) did not answer within {seconds_to_wait():g} s; try "
            "again later, set HF_HUB_ETAG_TIMEOUT to more seconds, or use a file or samples:english"
        )
    if isinstance(error, (OfflineModeIsEnabled, ConnectionError, TimeoutError, _TransportError)):
        return DatasetError(
            f"dataset {repo!r}: the Hub ({constants.ENDPOINT}) cannot be reached; check the network and "
            "HF_HUB_OFFLINE, or use a file or samples:english"
        )
    if further and "Bad split" in str(error):
        return DatasetError(
            f"dataset {repo!r} has no split {split!r}, which alone is read here, but {known}; {AS_A_FILE}"
        )
    if further and "Config name is missing" in str(error):
        return DatasetError(
            f"dataset {repo!r} has several configurations ({known}), and none can be chosen here; {AS_A_FILE}"
        )
    if "Bad split" in str(error):
        return DatasetError(f"dataset {repo!r} has no split {split!r}; set calibration.split to one of {known}")
    if "Config name is missing" in str(error):
        return DatasetError(f"dataset {repo!r} has several configurations; set calibration.config to one of {known}")
    if "BuilderConfig" in str(error):
        return DatasetError(
            f"dataset {repo!r} has no configuration {config!r}; set calibration.config to one of {known}"
        )
    if "scripts are no longer supported" in str(error):
        return DatasetError(
            f"dataset {repo!r} can only be read by a script of its own, which is never run; use a Parquet version of it"
        )
    reason = lines[0] if lines else type(error).__name__
    return DatasetError(f"dataset {repo!r} cannot be read ({reason}); open its page on the Hub, or use another dataset")
