"""The Hub is asked for its hardware through the real client where a model is the Hub's, and does without its answer."""

import json

import pytest

from tests.hub import Repo, WritableHub, run_client
from tests.pico import save_pico

SCRIPT = """
import json, os
from tests.hub.commands import command, set_hub
from tmerge.preflight import hardware
results = {}
WORDS = ["check", "--target", "user/target", "--source", "user/source"]

def case(name, *words):
    hardware._listed.cache_clear()
    results[name] = command(*words)

case("shown", *WORDS)
case("json", *WORDS, "--json")
case("local", "check", "--target", os.environ["LOCAL"], "--source", os.environ["LOCAL"], "--json")
case("remote", "merge", *WORDS[1:], "--remote", "tiny", "--remote-package", "git+https://example.org/tmerge",
     "--push", "user/fused", "--dry-run", "--json")
set_hub(faults=[{"path": "/api/jobs/hardware", "method": "GET", "status": 500, "message": "no", "times": 9}])
case("refused", *WORDS, "--json")
set_hub(faults=[], job_hardware=[{"name": "odd"}])
case("unreadable", *WORDS, "--json")
print("RESULTS" + json.dumps(results))
"""


def hardware(name, ram, cost, label="minute", **accelerator):
    cards = {"type": "gpu", "model": "X", "quantity": "1", "manufacturer": "Y"}
    return {
        "name": name,
        "prettyName": name,
        "cpu": "4 vCPU",
        "ram": ram,
        "ephemeralStorage": "50 GB",
        "accelerator": {**cards, **accelerator} if accelerator else None,
        "unitCostMicroUSD": round(cost * 1e6),
        "unitCostUSD": cost,
        "unitLabel": label,
    }


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    hub = WritableHub(token="hf_flavors")
    for name, family in (("target", "llama"), ("source", "qwen2")):
        folder = save_pico(family, root / name)
        hub.repos[f"user/{name}"] = Repo()
        hub.repos[f"user/{name}"].commit(folder)
    hub.job_hardware = [
        hardware("four", "186 GB", 0.06, quantity="4", vram="96 GB"),
        hardware("one", "30 GB", 0.0135, vram="24 GB"),
        hardware("tiny", "0.1 GB", 0.0001),
        hardware("plain", "1.5 TB", 0.5, "hour"),
    ]
    with hub:
        ended = run_client(hub, tmp_path_factory.mktemp("home"), SCRIPT, LOCAL=str(root / "source"))
        assert ended.returncode == 0, ended.stderr[-3000:]
        asked = sum("/api/jobs/hardware" in line and "fails" not in line for line in hub.requests)
    return hub, json.loads(ended.stdout.rpartition("RESULTS")[2]), asked


def test_the_hub_says_what_there_is_and_what_it_costs(ran):
    hub, results, _ = ran
    found = json.loads(results["json"]["out"])["flavors"]
    # "tiny" has no room for the process itself; 0.5 dollars an hour are less than 0.0135 a minute.
    assert found["smallest"]["name"] == "plain" and found["smallest"]["dollars_an_hour"] == 0.5
    assert found["smallest"]["memory_bytes"] == 1_500_000_000_000
    card = {"name": "one", "price_class": "small card", "dollars_an_hour": 0.81, "cards": 1}
    assert card.items() <= found["with_card"].items() and found["with_card"]["card_bytes"] == 24_000_000_000
    assert found["is_live"] and found["source"] == hub.endpoint.removeprefix("http://")
    line = next(line for line in results["shown"]["out"].splitlines() if "flavor of Hugging Face Jobs" in line)
    assert "plain (CPU, $0.50 an hour); with a card one (small card, $0.81 an hour)" in line
    assert line.endswith(f"as {found['source']} listed them now")
    assert json.loads(results["remote"]["out"])["flavors"] == found


def test_without_the_hubs_answer_the_dated_table_counts(ran):
    for name in ("refused", "unreadable"):
        result = ran[1][name]
        found = json.loads(result["out"])["flavors"]
        assert result["code"] == 0 and not found["is_live"], name
        assert found["source"].endswith("jobs-pricing") and found["smallest"]["name"] == "cpu-basic", name


def test_a_check_of_local_models_asks_nobody(ran):
    _, results, asked = ran
    assert not json.loads(results["local"]["out"])["flavors"]["is_live"]
    assert asked == 4  # shown, json, remote and unreadable
