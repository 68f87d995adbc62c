"""The Hub's client, whose every request ends: ``huggingface_hub`` waits for ever where it is told of no limit.

The limits hold for all that is asked through the library in this process, by transformers and datasets too, wherever
they set none of their own.
"""

from __future__ import annotations

import functools
from typing import Any

from huggingface_hub import HfApi, constants, set_client_factory
from huggingface_hub.utils import _http

__all__ = ["hub_client", "is_silent", "seconds_to_wait"]

# A commit of many large files is answered when all of it is done.
_WRITING_SECONDS = 600.0


def hub_client(endpoint: str | None = None, token: str | bool | None = None) -> HfApi:
    """What asks the Hub.

    Args:
        endpoint: Of the Hub; None for the user's own.
        token: In place of the user's own; False for none.
    """
    _limit_requests()
    return HfApi(endpoint, token=token, library_name="tmerge")


def seconds_to_wait() -> float:
    """For the Hub to connect, or to go on with an answer: ``HF_HUB_ETAG_TIMEOUT``, 10 where it is not set."""
    return float(constants.HF_HUB_ETAG_TIMEOUT)


def is_silent(error: BaseException | None) -> bool:
    """Whether the Hub was reached, or waited for, and said nothing within that time."""
    while error is not None:
        # The HTTP library under the Hub's client has changed before: its class is known by name.
        if any(kind.__name__ == "TimeoutException" for kind in type(error).__mro__):
            return True
        error = error.__cause__ or error.__context__
    return False


@functools.cache
def _limit_requests() -> None:
    make = _http._GLOBAL_CLIENT_FACTORY

    def limited() -> Any:
        client = make()
        hooks = client.event_hooks
        client.event_hooks = {**hooks, "request": [*hooks.get("request", ()), _limit]}
        return client

    set_client_factory(limited)


def _limit(request: Any) -> None:
    """End a request that says nothing of it; what it says stays."""
    waits = seconds_to_wait()
    answers = waits if request.method in ("GET", "HEAD") else _WRITING_SECONDS
    said = request.extensions.get("timeout") or {}
    limits = {"connect": waits, "read": answers, "write": answers}
    own = {kind: value for kind, value in said.items() if value is not None}
    request.extensions["timeout"] = {**said, **limits, **own}
