"""Questions for the side processes, found there by their names; nothing heavy is imported."""

import os
import time
from pathlib import Path

from tmerge.errors import DatasetError


def here(_number=0):
    """Which process it is."""
    return os.getpid()


def slow(begun, seconds):
    """Says that it has begun, and takes its time."""
    Path(begun).write_text(str(os.getpid()))
    time.sleep(seconds)
    return os.getpid()


def mistaken():
    raise DatasetError("no such column; name another")


def at_fault():
    raise ZeroDivisionError("secret detail")


def lost():
    os._exit(9)


def held(recipe, settings):
    """What a check finds, once the file ``open`` is beside the target."""
    from tmerge.ui.parts.expected import _check

    while not Path(recipe.target).with_name("open").exists():
        time.sleep(0.05)
    return _check(recipe, settings)
