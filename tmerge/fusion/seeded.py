"""Random numbers that depend on what they are for, and on nothing that was drawn before them."""

from __future__ import annotations

import hashlib

import torch

__all__ = ["generator_for"]


def generator_for(seed: int, *purpose: object) -> torch.Generator:
    """A generator of its own for every purpose, so that none depends on the order of the others.

    Args:
        seed: Of the run.
        purpose: What it is for; the same words give the same numbers.
    """
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
