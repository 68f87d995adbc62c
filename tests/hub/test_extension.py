"""``hf tmerge``: the console script in the form that the Hub's own command line looks for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_hf_finds_tmerge(tmp_path):
    script = Path(sys.executable).with_name("hf-tmerge")
    hf = shutil.which("hf", path=str(script.parent))
    if not script.is_file() or hf is None:
        pytest.skip("the package is not installed with its console scripts beside this Python")
    environment = {**os.environ, "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}

    def run(*words):
        return subprocess.run([hf, *words], env=environment, capture_output=True, text=True, timeout=120)

    words = [script.with_name("tmerge"), "extension"]
    registered = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert registered.returncode == 0, registered.stderr
    assert "hf tmerge" in run("extensions", "list").stdout
    shown = run("tmerge", "--help")
    assert shown.returncode == 0 and "reproduce" in shown.stdout and "push" in shown.stdout, shown.stderr
    refused = run("tmerge", "inspect", "nothing-here")
    assert refused.returncode == 2 and refused.stderr.startswith("error: nothing-here is not a run of tmerge")
    subprocess.run([*words, "--remove"], env=environment, check=True)
    assert run("tmerge", "--help").returncode != 0
