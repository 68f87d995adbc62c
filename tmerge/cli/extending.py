"""`tmerge extension`: make ``hf tmerge ...`` work with this installation."""

from __future__ import annotations

import json
import shutil
import sys
from datetime import datetime, timezone
from pathlib import Path

import typer

from tmerge.cli.shared import app
from tmerge.cli.stopping import same_command, when_stopped
from tmerge.errors import MissingExtraError
from tmerge.store import write_text

__all__ = ["extension"]

_NAME = "hf-tmerge"
# Where the Hub's command line looks for its extensions (huggingface_hub.cli.extensions.EXTENSIONS_ROOT).
_ROOT = Path("~/.local/share/hf/extensions")


@app.command()
def extension(remove: bool = typer.Option(False, "--remove", help="Take it away again.")) -> None:
    """Make `hf tmerge ...` work: tell the Hub's own command line of this installation."""
    when_stopped(lambda: f"this may be half done; to finish it: {same_command()}")
    folder = _ROOT.expanduser() / _NAME
    if remove:
        shutil.rmtree(folder, ignore_errors=True)
        typer.echo("hf tmerge is gone; tmerge itself stays")
        return
    # The one beside this Python: another installation's on the path may be of another environment.
    beside = str(Path(sys.executable).parent)
    script = shutil.which(_NAME, path=beside) or shutil.which(_NAME)
    if script is None:
        raise MissingExtraError(f"this installation has no command {_NAME}; install the package: pip install -e .")
    manifest = {
        # The Hub's command line looks for updates on GitHub, where nobody can have an account of this name.
        "owner": "_local_",
        "repo": _NAME,
        "repo_id": f"_local_/{_NAME}",
        "short_name": "tmerge",
        "executable_path": script,
        "type": "python",
        "installed_at": datetime.now(timezone.utc).isoformat(),
        "description": "Merge language models of different architectures",
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "manifest.json", json.dumps(manifest, indent=2))
    typer.echo("hf tmerge works now, for example: hf tmerge push --help")
