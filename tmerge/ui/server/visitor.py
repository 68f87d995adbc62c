"""Who asks, for the limits: an unguessable mark made of the visitor's address, never the address itself."""

from __future__ import annotations

import hashlib
import os
import secrets

import gradio as gr

__all__ = ["visitor_of"]

_SALT = secrets.token_bytes(16)


def visitor_of(request: gr.Request) -> str:
    """A mark that is the same for all pages of one visitor while the app runs, and says nothing outside of it."""
    name = getattr(request, "username", None) or (request.client.host if request.client else "")
    if os.environ.get("SPACE_ID"):
        # Behind the Space's proxy every request has one address. What the visitor sends comes first in this list,
        # what the proxy adds comes last, and only that is to be trusted.
        forwarded = str(request.headers.get("x-forwarded-for") or "")
        name = getattr(request, "username", None) or forwarded.rpartition(",")[2].strip() or name
    return hashlib.sha256(_SALT + str(name).encode()).hexdigest()[:16]
