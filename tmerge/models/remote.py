"""Model files on the Hub: found, fetched into the Hub's own cache, and every failure said in one line.

Nothing here reads, keeps or prints a token: ``huggingface_hub`` takes the user's own, and the text of its errors
is not passed on.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)

from tmerge.errors import CheckpointError, GatedModelError, ModelNotFoundError, NotEnoughDiskError, TmergeError
from tmerge.hub_client import hub_client, is_silent, seconds_to_wait
from tmerge.models.adapter_config import ADAPTER_CONFIG
from tmerge.models.checkpoint import (
    INDEX_FILE,
    WEIGHTS_FILE,
    StoredTensor,
    card_licence,
    explain_no_safetensors,
    folder_licence,
    is_tokenizer_file,
    read_index,
)
from tmerge.models.reference import ModelReference

__all__ = [
    "Snapshot",
    "download_bytes",
    "fetch",
    "fetch_weights",
    "hub_errors",
    "open_repo",
    "remote_headers",
    "stated_licence",
    "weight_bytes",
]

_CONFIG = "config.json"

# The HTTP library under the Hub's client has changed before: its error class is taken from where it is sure to be.
_TransportError: type[Exception] = HfHubHTTPError.__mro__[1]


@dataclass(frozen=True)
class Snapshot:
    """A repo at one commit, and what the Hub says of it beside its files.

    Attributes:
        reference: What the user asked for.
        commit: Full hash; everything is taken at it, so that a repo that changes meanwhile is never mixed.
        folder: Where the Hub's cache has the commit's files, as far as they are fetched.
        files: Sizes by name; None when the Hub cannot be reached, and the cache is all there is.
        gated: Whether access has to be asked for.
        private: Whether only its owners see it.
        licence: As the repo's card states it, where the Hub could be asked.
    """

    reference: ModelReference
    commit: str
    folder: Path
    files: dict[str, int] | None
    gated: bool = False
    private: bool = False
    licence: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What ``from_pretrained`` has to be told to read this very commit."""
        return {"revision": self.commit, "local_files_only": self.files is None}


@contextlib.contextmanager
def hub_errors(reference: ModelReference) -> Iterator[None]:
    """Turn the Hub client's errors into ours, each with its remedy.

    Raises:
        ModelNotFoundError: No such repo or revision, or the Hub cannot be reached.
        GatedModelError: No access to the repo.
        NotEnoughDiskError: The download does not fit.
    """
    try:
        yield
    except TmergeError:
        raise
    except HFValidationError:
        raise ModelNotFoundError(
            f"{reference.text!r} is neither a folder or .gguf file here nor a Hub id (user/name)"
        ) from None
    except GatedRepoError:
        raise GatedModelError(
            f"{reference.text!r} is gated: request access at {constants.ENDPOINT}/{reference.repo}, "
            "then run `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise ModelNotFoundError(
            f"{reference.text!r}: no such folder here, and no such repo on the Hub; check the spelling, or run "
            "`hf auth login` if the repo is private"
        ) from None
    except RevisionNotFoundError:
        raise ModelNotFoundError(
            f"{reference.text!r}: the repo has no revision {reference.revision!r}; "
            f"its branches and commits are at {constants.ENDPOINT}/{reference.repo}/commits/main"
        ) from None
    except LocalEntryNotFoundError as error:
        raise _unreachable(reference, error) from None
    except EntryNotFoundError:
        raise CheckpointError(f"{reference.text!r}: the repo lacks a file that its checkpoint needs") from None
    except HfHubHTTPError as error:
        raise _refused(reference, error.response.status_code) from None
    except OfflineModeIsEnabled as error:
        raise _unreachable(reference, error) from None
    except _TransportError as error:
        raise _unreachable(reference, error) from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise NotEnoughDiskError(
                f"{reference.text!r}: the disk is full; make room, or set HF_HOME to another disk"
            ) from None
        raise


def _unreachable(reference: ModelReference, error: BaseException) -> TmergeError:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, HfHubHTTPError):
            return _refused(reference, cause.response.status_code)
        if isinstance(cause, OfflineModeIsEnabled):
            break
        cause = cause.__cause__
    if cause is not None or constants.HF_HUB_OFFLINE:
        return ModelNotFoundError(
            f"{reference.text!r} is not in the local cache and HF_HUB_OFFLINE is set; unset it, or download the model "
            f"first: hf download {reference.repo}"
        )
    if is_silent(error):
        return ModelNotFoundError(
            f"{reference.text!r}: no such folder here, and the Hub ({constants.ENDPOINT}) did not answer within "
            f"{seconds_to_wait():g} s; try again later, set HF_HUB_ETAG_TIMEOUT to more seconds, or check HF_ENDPOINT "
            "and the proxy"
        )
    return ModelNotFoundError(
        f"{reference.text!r}: no such folder here, and the Hub ({constants.ENDPOINT}) cannot be reached; check the "
        "network, HF_ENDPOINT and the proxy, or give a folder or a .gguf file"
    )


def _refused(reference: ModelReference, status: int) -> TmergeError:
    if status == 401:
        return GatedModelError(f"{reference.text!r}: the Hub does not accept this token; renew it with `hf auth login`")
    if status == 403:
        return GatedModelError(
            f"{reference.text!r}: the Hub refuses access (403); the token needs read access to it: `hf auth login`"
        )
    if status == 429:
        return ModelNotFoundError(f"{reference.text!r}: too many requests to the Hub (429); wait, or `hf auth login`")
    return ModelNotFoundError(f"{reference.text!r}: the Hub answered {status}; try again later")


def open_repo(reference: ModelReference, revision: str | None = None, config: str | None = None) -> Snapshot:
    """Find a repo at a revision and fetch its config; when the Hub cannot be reached, from the cache.

    Args:
        reference: A ``hub`` reference.
        revision: Taken instead of the reference's.
        config: Name of the file that tells what is there; by default ``config.json`` of a model, or, where there is
            none, ``adapter_config.json`` of an adapter. It may lie in a folder of the repo.

    Raises:
        TmergeError: As `hub_errors`; CheckpointError when the repo has no such file.
    """
    wanted = revision or reference.revision
    snapshot, listed = _opened(reference, wanted, config)
    if listed not in (None, snapshot.commit) and wanted != snapshot.commit:
        # Pushed to between the two requests: what was listed is of another commit than what was fetched. It is asked
        # for by that commit, and once only: a proxy may list commits by names of its own.
        snapshot, _ = _opened(reference, snapshot.commit, config)
    return snapshot


def _opened(reference: ModelReference, wanted: str | None, config: str | None) -> tuple[Snapshot, str | None]:
    """A repo as it is found now, and the commit that its files were listed of; None where nothing tells."""
    assert reference.repo is not None
    with hub_errors(reference):
        # Asked once and without the client's half minute of retries: without a network the cache is next.
        unreachable: Exception | None = None
        try:
            info = hub_client().model_info(
                reference.repo, revision=wanted, files_metadata=True, timeout=seconds_to_wait()
            )
        except (OfflineModeIsEnabled, _TransportError) as error:
            if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
                raise
            info, unreachable = None, error
        files = None if info is None else {entry.rfilename: entry.size or 0 for entry in info.siblings or []}
        wanted_names = (_CONFIG, ADAPTER_CONFIG) if config is None else (config,)
        names = [name for name in wanted_names if files is None or name in files]
        if not names:
            raise _no_config(reference, list(files or ()), wanted_names)
        folder: Path | None = None
        for name in names if files is None else names[:1]:
            try:
                # By the revision's own name, which the cache then knows for a time without network.
                path = Path(hf_hub_download(reference.repo, name, revision=wanted, local_files_only=files is None))
                folder = path.parents[len(Path(name).parents) - 1]
                break
            except LocalEntryNotFoundError:
                if unreachable is None:
                    raise
        if folder is None:
            assert unreachable is not None  # or it would have been fetched
            raise unreachable from None
    commit = folder.name  # .../snapshots/<commit>/config.json
    if info is None:
        return Snapshot(reference, commit, folder, None), None
    card = info.card_data.to_dict() if info.card_data else {}
    snapshot = Snapshot(reference, commit, folder, files, bool(info.gated), bool(info.private), card_licence(card))
    return snapshot, info.sha


def _no_config(reference: ModelReference, names: list[str], wanted: tuple[str, ...]) -> CheckpointError:
    if wanted == (ADAPTER_CONFIG,):
        return CheckpointError(
            f"{reference.text!r} has no {ADAPTER_CONFIG}, so it is no PEFT adapter; name the repo or folder that has "
            "one"
        )
    if ggufs := [name for name in names if name.endswith(".gguf")]:
        return CheckpointError(
            f"{reference.text!r} holds GGUF files; download one and give its path: "
            f"hf download {reference.repo} {ggufs[0]}"
        )
    return CheckpointError(f"{reference.text!r} has no config.json, so it is not a transformers model")


def fetch(snapshot: Snapshot, name: str) -> Path | None:
    """One file of the repo, or None if it has no such file, or none that can be had without a network."""
    assert snapshot.reference.repo is not None
    if snapshot.files is not None and name not in snapshot.files:
        return None
    with hub_errors(snapshot.reference):
        try:
            return Path(hf_hub_download(snapshot.reference.repo, name, **snapshot.options))
        except LocalEntryNotFoundError:
            # The Hub has listed it, and cannot be reached now: going on without it would lose it unseen.
            if snapshot.files is not None:
                raise
            return None
        except EntryNotFoundError:
            return None


def fetch_weights(snapshot: Snapshot) -> list[Path]:
    """All safetensors files of the checkpoint, fetched.

    Raises:
        TmergeError: As `hub_errors`; CheckpointError when the repo has none (pickles are not opened).
    """
    reference = snapshot.reference
    assert reference.repo is not None
    # In the order in which transformers looks.
    if (whole := fetch(snapshot, WEIGHTS_FILE)) is not None:
        return [whole]
    if (index := fetch(snapshot, INDEX_FILE)) is not None:
        shards = read_index(index)
        with hub_errors(reference):
            return [Path(hf_hub_download(reference.repo, shard, **snapshot.options)) for shard in shards]
    if snapshot.files is None:
        raise _unreachable(reference, OfflineModeIsEnabled() if constants.HF_HUB_OFFLINE else ConnectionError())
    raise explain_no_safetensors(reference.text, list(snapshot.files))


def weight_bytes(snapshot: Snapshot) -> int | None:
    """Size of the checkpoint's weights without fetching them, or None when the Hub cannot be reached.

    Raises:
        CheckpointError: The repo has no safetensors.
    """
    return None if snapshot.files is None else sum(snapshot.files[name] for name in _weight_names(snapshot))


def download_bytes(snapshot: Snapshot) -> int | None:
    """What loading the model would still fetch; None when the Hub cannot be reached.

    Raises:
        CheckpointError: The repo has no safetensors.
    """
    if snapshot.files is None:
        return None
    names = {*_weight_names(snapshot), INDEX_FILE, "generation_config.json", *filter(is_tokenizer_file, snapshot.files)}
    assert snapshot.reference.repo is not None
    return sum(
        snapshot.files[name]
        for name in names & set(snapshot.files)
        if not isinstance(try_to_load_from_cache(snapshot.reference.repo, name, revision=snapshot.commit), str)
    )


def remote_headers(snapshot: Snapshot) -> dict[str, StoredTensor] | None:
    """Every stored tensor's dtype and shape, from the headers of the repo's safetensors alone.

    Returns:
        Tensor name to its entry; None when the Hub cannot be reached.

    Raises:
        TmergeError: As `hub_errors`; CheckpointError when the repo has no safetensors, or a header cannot be read.
    """
    if snapshot.files is None:
        return None
    repo, text = snapshot.reference.repo, snapshot.reference.text
    assert repo is not None
    with hub_errors(snapshot.reference):
        try:
            metadata = hub_client().get_safetensors_metadata(repo, revision=snapshot.commit)
        except NotASafetensorsRepoError:
            raise explain_no_safetensors(text, list(snapshot.files)) from None
        except SafetensorsParsingError:
            raise CheckpointError(
                f"{text!r}: a safetensors file of the repo has a header that cannot be read"
            ) from None
    return {
        name: StoredTensor.of(tensor)
        for file in metadata.files_metadata.values()
        for name, tensor in file.tensors.items()
    }


def _weight_names(snapshot: Snapshot) -> list[str]:
    """The checkpoint's weights files."""
    files = snapshot.files or {}
    if WEIGHTS_FILE in files:
        return [WEIGHTS_FILE]
    if INDEX_FILE in files:
        # Repos also hold other copies of the weights (original/, consolidated): only the index's shards count.
        stem = WEIGHTS_FILE.removesuffix(".safetensors")
        return [name for name in files if name.startswith(f"{stem}-") and name.endswith(".safetensors")]
    raise explain_no_safetensors(snapshot.reference.text, list(files))


def stated_licence(folder: Path, snapshot: Snapshot | None) -> str | None:
    """The licence that a folder's card states, or a repo's; None where it states none.

    Args:
        folder: Of what is here of it.
        snapshot: Of the repo; None for a folder.
    """
    if snapshot is None:
        return folder_licence(folder / "README.md")
    # The card is fetched although the Hub has told the licence: without a network it is all that tells it again.
    readme = fetch(snapshot, "README.md")
    return snapshot.licence or (None if readme is None else folder_licence(readme))
