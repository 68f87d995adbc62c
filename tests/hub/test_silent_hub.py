"""A Hub that takes connections and never answers: whatever is asked of it ends, in one line."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time

import pytest

SCRIPT = """
import json, time
from tmerge import hub_client
from tmerge.calibration.remote import remote_commit
from tmerge.errors import TmergeError
from tmerge.hub.failures import pushing
from tmerge.models.reference import ModelReference
from tmerge.models.remote import open_repo
from tmerge.preflight.hardware import offered

hub_client._WRITING_SECONDS = 1.0
said = {}

def case(name, call):
    began = time.monotonic()
    try:
        said[name] = str(call())
    except TmergeError as error:
        said[name] = str(error)
    said[name + " seconds"] = time.monotonic() - began

def pushed():
    with pushing("user/fused"):
        hub_client.hub_client(token="hf_x").create_repo("user/fused")

case("model", lambda: open_repo(ModelReference.parse("user/pico")))
case("dataset", lambda: remote_commit("user/texts"))
case("hardware", lambda: offered(ask=True).is_live)
case("push", pushed)
print(json.dumps(said))
"""


@pytest.fixture
def silent(tmp_path):
    """The environment of a client of such a Hub."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        unset = ("HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_DOWNLOAD_TIMEOUT")
        inherited = {name: value for name, value in os.environ.items() if name not in unset}
        own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_ETAG_TIMEOUT": "1"}
        yield inherited | own


def called(words, environment):
    began = time.monotonic()
    words = [sys.executable, *words]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=120)
    return done, time.monotonic() - began


def test_a_check_ends_in_one_line_that_names_the_hub(silent):
    done, seconds = called(["-m", "tmerge", "check", "--target", "user/pico", "--source", "user/other"], silent)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert f"the Hub ({silent['HF_ENDPOINT']}) did not answer within 1 s" in done.stderr
    assert "HF_HUB_ETAG_TIMEOUT" in done.stderr and seconds < 60


def test_all_that_is_asked_ends(silent):
    done, _ = called(["-c", SCRIPT], silent)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert "did not answer within 1 s" in said["model"]
    assert f"the Hub ({silent['HF_ENDPOINT']}) did not answer within 1 s" in said["dataset"]
    # It was asked, and the table that ships stands for its answer.
    assert said["hardware"] == "False" and said["hardware seconds"] > 0.9
    assert f"the connection to the Hub ({silent['HF_ENDPOINT']}) was lost" in said["push"]
    assert all(value < 20 for name, value in said.items() if name.endswith(" seconds")), said
