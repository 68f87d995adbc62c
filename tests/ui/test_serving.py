"""`tmerge app`: it serves the app, and says in one line why it cannot."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="the app extra is not installed")

ROOT = Path(__file__).parents[2]


def start(*words, **environment):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GRADIO")}
    return subprocess.Popen(
        [sys.executable, "-m", "tmerge.cli", "app", *map(str, words)],
        cwd=ROOT,
        env={**inherited, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def taken():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_the_app_is_served_on_the_port_until_it_is_interrupted(taken):
    port = next(port for port in range(taken + 1, taken + 50) if _is_free(port))
    process = start("--port", port, PYTHONUNBUFFERED="1")
    try:
        # The last that Gradio says before it waits: an interrupt within its launch is lost in there.
        for line in process.stdout:
            if "public link" in line:
                break
        assert process.poll() is None, process.communicate()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/config", timeout=60) as answer:
            assert "tmerge" in json.load(answer)["title"]
    finally:
        process.send_signal(signal.SIGINT)
        try:
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert "Traceback" not in said, said
    assert process.returncode == 130 and said.strip().splitlines()[-1].startswith("stopped; the app is closed")


@pytest.mark.slow
def test_a_taken_port_is_one_line(taken):
    process = start("--port", taken)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2
    line = said.strip().splitlines()[-1]
    assert line.startswith(f"error: port {taken} cannot be listened on") and "--port" in line
    assert "Traceback" not in said


def test_without_gradio_one_line_says_what_to_install(tmp_path):
    (tmp_path / "gradio.py").write_text("raise ImportError('no gradio', name='gradio')\n")
    process = start(PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2
    assert (
        said.strip().splitlines()[-1] == 'error: the app needs gradio; install it with: pip install "tmerge-llm[app]"'
    )


def _is_free(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def test_an_interrupt_that_is_swallowed_while_the_app_starts_ends_it():
    from tmerge.ui import launch

    asked = []

    def raise_if_stopped():
        asked.append(True)
        raise KeyboardInterrupt  # it came before

    with pytest.raises(KeyboardInterrupt):
        launch(raise_if_stopped=raise_if_stopped)
    assert asked == [True]
