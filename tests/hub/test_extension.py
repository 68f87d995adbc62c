"""``hf tmerge``: the console script in the form that the Hub's own command line looks for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def test_hf_finds_tmerge(tmp_path):
    script = Path(sys.executable).with_name("hf-tmerge")
    hf = shutil.which("hf", path=str(script.parent))
    if not script.is_file() or hf is None:
        pytest.skip("the package is not installed with its console scripts beside this Python")
    # As `hf extensions install` leaves it.
    extension = tmp_path / ".local/share/hf/extensions/hf-tmerge"
    extension.mkdir(parents=True)
    manifest = {
        "owner": "user",
        "repo": "hf-tmerge",
        "repo_id": "user/hf-tmerge",
        "short_name": "tmerge",
        "executable_path": str(script),
        "type": "python",
        "installed_at": "2026-01-01T00:00:00+00:00",
    }
    (extension / "manifest.json").write_text(json.dumps(manifest))
    environment = {**os.environ, "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}

    def run(*words):
        return subprocess.run([hf, *words], env=environment, capture_output=True, text=True, timeout=120)

    shown = run("tmerge", "--help")
    assert shown.returncode == 0 and "reproduce" in shown.stdout and "push" in shown.stdout, shown.stderr
    refused = run("tmerge", "inspect", "nothing-here")
    assert refused.returncode == 2 and refused.stderr.startswith("error: nothing-here is not a run of tmerge")
