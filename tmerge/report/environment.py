"""What a run ran in: the libraries that decide its numbers, and the memory it took."""

from __future__ import annotations

import importlib.metadata
import resource
import sys
from functools import cache

from tmerge.version import VERSION

__all__ = ["library_versions", "peak_memory"]


def peak_memory() -> int:
    """Peak resident bytes of this process so far; Linux counts them in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def library_versions() -> dict[str, str]:
    """Of Python and the libraries that decide the numbers."""
    names = ("torch", "transformers", "tokenizers", "datasets", "safetensors", "numpy", "scipy")
    versions = {"python": ".".join(map(str, sys.version_info[:3])), "tmerge": VERSION}
    return versions | {name: _version(name) for name in names}


@cache
def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
