"""The Space's entry."""

from __future__ import annotations

import sys

from tmerge.errors import MissingExtraError

if __name__ == "__main__":
    try:
        from tmerge.ui import launch
    except ImportError as error:
        if error.name != "gradio":
            raise
        sys.exit(str(MissingExtraError('the app needs gradio; install it with: pip install "tmerge[app]"')))
    launch()
