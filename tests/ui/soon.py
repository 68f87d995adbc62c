"""Takes the place of `multiprocessing`'s context in `tmerge.child`: processes come of one that has imported torch.

A new interpreter takes seconds to import it, once a run. `tests/test_child.py` and what is served by `tests.ui.apart`
start processes as the app does.
"""

import multiprocessing
import os
from typing import Any

from tests import forked

Pipe = multiprocessing.Pipe


def Process(*, target: Any, args: tuple[Any, ...], **options: Any) -> Any:
    """As ``multiprocessing.Process``."""
    # The one that is forked from may have been there before the environment was changed.
    return forked.FORKING.Process(target=_begin, args=(dict(os.environ), target, args), **options)


def _begin(environment: dict[str, str], target: Any, args: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    target(*args)
