"""What the Hub can answer to a push or a job, each as one line with its remedy.

No token is read, kept or quoted: what the server says of a refusal is passed on only after the token, should it be in
there, has been struck out.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tmerge.errors import NotEnoughDiskError, PushError, RemoteError, TmergeError

__all__ = ["no_token", "pushing", "running_jobs"]

# The HTTP library under the Hub's client has changed before: its error class is taken from where it is sure to be.
_TransportError: type[Exception] = HfHubHTTPError.__mro__[1]

_QUOTA_WORDS = ("storage", "quota", "limit reached", "too large", "upgrade")
_AGAIN = "nothing here was changed, and the same command continues"


def no_token(what: str) -> PushError:
    """Nobody is signed in."""
    return PushError(f"{what}: nobody is signed in to the Hub; run `hf auth login` (or set HF_TOKEN) and try again")


@contextmanager
def pushing(repo: str, token: str | None = None) -> Iterator[None]:
    """Turn the Hub client's errors while writing to a repo into ours.

    Raises:
        PushError: With what is wrong and what to do.
        NotEnoughDiskError: The disk is full.
    """
    try:
        yield
    except TmergeError:
        raise
    except HFValidationError:
        raise PushError(f"{repo!r} is no name of a repo; give user/name") from None
    except LocalTokenNotFoundError:
        raise no_token(repo) from None
    except OfflineModeIsEnabled:
        raise PushError(f"{repo}: HF_HUB_OFFLINE is set, so nothing can be pushed; unset it") from None
    except RevisionNotFoundError:
        raise PushError(f"{repo} has no such branch to write to; check --revision") from None
    except RepositoryNotFoundError:
        raise PushError(
            f"{repo}: no such repo that this account may write to; check the name, or sign in with `hf auth login`"
        ) from None
    except HfHubHTTPError as error:
        raise _refused(repo, error.response.status_code, error.server_message or "", token) from None
    except (_TransportError, ConnectionError, TimeoutError) as error:
        raise _told_by_xet(repo, error, token) or _lost(repo) from None
    except PermissionError as error:
        # hf_xet's own class for a token that its store does not take. One of the disk names a file.
        if error.filename is not None:
            raise
        raise _refused(repo, 401, str(error), token) from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise NotEnoughDiskError(f"{repo}: the disk is full; make room, then push again") from None
        raise
    except RuntimeError as error:
        # The client wraps what stops the upload of a large file; the reason is beneath.
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, HfHubHTTPError):
                raise _refused(repo, cause.response.status_code, cause.server_message or "", token) from None
            if isinstance(cause, (_TransportError, ConnectionError, TimeoutError)):
                raise _told_by_xet(repo, cause, token) or _lost(repo) from None
            cause = cause.__cause__
        # hf_xet, which carries large files, has no class of its own for what stopped it.
        if "pload" in str(error) or type(error).__module__.startswith("hf_xet"):
            raise PushError(f"{repo}: the upload stopped ({_struck(str(error), token)}); {_AGAIN}") from None
        raise
    except ValueError as error:
        said = _struck(str(error), token)
        if "metadata" in said:
            raise PushError(f"{repo}: the Hub does not take the card's metadata ({said}); mend the card") from None
        if "LFS batch" in said:
            raise PushError(f"{repo}: the Hub does not take a large file ({said}); mend that, then: {_AGAIN}") from None
        raise


def _told_by_xet(repo: str, error: BaseException, token: str | None) -> PushError | None:
    """What the Hub answered, where hf_xet says it within the words of a lost connection."""
    answer = re.search(r"\((\d{3})\b([^)]*)\)", str(error))
    return _refused(repo, int(answer[1]), answer[2], token) if answer else None


def _lost(repo: str) -> PushError:
    return PushError(f"{repo}: the connection to the Hub ({constants.ENDPOINT}) was lost; {_AGAIN}")


def _refused(repo: str, status: int, words: str, token: str | None) -> PushError:
    said = _struck(words, token)
    reason = f" ({said})" if said else ""
    if status == 401:
        return PushError(f"{repo}: the Hub does not accept this token; renew it with `hf auth login`")
    if status in (402, 413) or (status == 403 and any(word in said.lower() for word in _QUOTA_WORDS)):
        return PushError(f"{repo}: the account's storage or quota is used up{reason}; make room, then: {_AGAIN}")
    if status == 403:
        return PushError(
            f"{repo}: this account or token may not write there{reason}; sign in with a token that has write access "
            "(`hf auth login`), or choose another --repo"
        )
    if status == 409:
        return PushError(f"{repo}: the name is taken by another repo{reason}; choose another --repo")
    if status == 412:
        return PushError(f"{repo}: somebody has written to it meanwhile (412); look at what is there, then: {_AGAIN}")
    if status == 429:
        return PushError(f"{repo}: too many requests to the Hub (429); wait a while: {_AGAIN}")
    if status >= 500:
        return PushError(f"{repo}: the Hub answered {status}{reason}; try again later: {_AGAIN}")
    return PushError(f"{repo}: the Hub refused it with {status}{reason}")


@contextmanager
def running_jobs(flavor: str, token: str | None = None) -> Iterator[None]:
    """Turn the Hub client's errors while asking for a job into ours.

    Raises:
        RemoteError: With what is wrong and what to do.
    """
    try:
        yield
    except TmergeError:
        raise
    except LocalTokenNotFoundError:
        raise RemoteError("nobody is signed in to the Hub; run `hf auth login` (or set HF_TOKEN)") from None
    except OfflineModeIsEnabled:
        raise RemoteError("HF_HUB_OFFLINE is set, so no job can be started; unset it") from None
    except HfHubHTTPError as error:
        status, said = error.response.status_code, _struck(error.server_message or "", token)
        reason = f" ({said})" if said else ""
        if status == 401:
            raise RemoteError("the Hub does not accept this token; renew it with `hf auth login`") from None
        if status == 402:
            raise RemoteError(
                f"a job on {flavor} needs credit on your account{reason}; see {constants.ENDPOINT}/settings/billing"
            ) from None
        if status == 403:
            raise RemoteError(
                f"this account or token may not start jobs{reason}; sign in with a token that may (`hf auth login`)"
            ) from None
        if status == 429:
            raise RemoteError("too many requests to the Hub (429); wait a while and try again") from None
        raise RemoteError(f"the Hub refused the job on {flavor} with {status}{reason}") from None
    except (_TransportError, ConnectionError, TimeoutError):
        raise RemoteError(
            f"the connection to the Hub ({constants.ENDPOINT}) was lost; a job that had started goes on: see "
            f"{constants.ENDPOINT}/settings/jobs"
        ) from None


def _struck(text: str, token: str | None) -> str:
    """What a server said, on one line and without the token."""
    for secret in (token, get_token()):
        if secret:
            text = text.replace(secret, "***")
    return " ".join(text.split())[:300].rstrip(".;, ")
