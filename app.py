"""The Space's entry."""

from __future__ import annotations

import sys

from tmerge.errors import MissingExtraError, TmergeError
from tmerge.version import DISTRIBUTION

if __name__ == "__main__":
    try:
        from tmerge.ui import launch
    except ImportError as error:
        if error.name != "gradio":
            raise
        sys.exit(str(MissingExtraError(f'the app needs gradio; install it with: pip install "{DISTRIBUTION}[app]"')))
    try:
        launch()
    except TmergeError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
