"""An adapter carried between repos: pushed as one, its plan pushed alone and fused from by others; on the loopback."""

from __future__ import annotations

import json

import pytest

from tests.hub import Repo, WritableHub, run_client
from tests.pico import pico_model
from tests.pico_adapter import save_adapter
from tests.stages.test_task_vector import _deeper, _shaken, save_all

TOKEN = "hf_ASecretThatNobodyMayRead"

SCRIPT = """
import json, os
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from tests.hub.commands import command

os.chdir(os.environ["WORK"])
results = {}

def case(name, *words):
    results[name] = command(*words)

small = ["--set", "calibration.texts=100", "--set", "fusion.alpha=1", "--set", "evaluation.texts=8"]
small += ["--save", "adapter"]
pair = ["--target", "user/small", "--source-base", "user/big"]
case("first", "merge", *pair, "--adapter", "user/one", "--dataset", "samples:indonesian", *small, "--out", "first")
case("push", "push", "first", "--repo", "user/carried", "--even-if-worse")
case("over a model", "push", "first", "--repo", "user/carried", "--plan-only")
case("dry run", "push", "first", "--repo", "user/plan", "--plan-only", "--dry-run", "--json")
case("push plan", "push", "first", "--repo", "user/plan", "--plan-only", "--json")
case("inspect", "inspect", "user/plan", "--json")

words = ["--adapter", "user/two", "--dataset", "samples:malay", *small]
case("other", "merge", "--plan", "user/plan", *words, "--out", "other", "--json")
case("direct", "merge", *pair, *words, "--out", "direct", "--json")
case("matched on", "merge", "--plan", "user/plan", "--dataset", "samples:english", "--out", "refused")
from tmerge.calibration import sample_texts
with open("copied.txt", "w") as file:
    file.write("\\n".join(" ".join(text.split()) for text in sample_texts("english")))
case("copied", "merge", "--plan", "user/plan", "--dataset", "copied.txt", *small, "--out", "copied")
case("other rows", "merge", "--plan", "user/plan", "--dataset", "samples:malay", "--set", "calibration.rows=last",
     "--out", "rows")
case("again", "push", "other", "--repo", "user/plan-again", "--plan-only")
case("twice", "merge", "--plan", "user/plan-again", "--adapter", "user/one", "--dataset", "samples:thai",
     *small, "--out", "twice", "--json")
case("reproduce a plan", "reproduce", "user/plan", "--out", "reproduced")
case("reproduce", "reproduce", "user/carried", "--out", "reproduced", "--json")

assert not results["push"]["code"], results["first"]["err"] + results["push"]["err"]
ids = torch.arange(5, 45)[None]
base = AutoModelForCausalLM.from_pretrained("user/small", dtype=torch.float32)
with torch.inference_mode():
    before = base(ids).logits
    loaded = PeftModel.from_pretrained(base, "user/carried").eval()(ids).logits
results["moved"] = float((loaded - before).abs().max())
case("as a model", "evaluate", "user/small", "user/carried", "--dataset", "samples:indonesian", "--json")
print("RESULTS" + json.dumps(results))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    target = pico_model("llama")
    base = _shaken(_deeper(target), 0.02, 1)
    save_all(root, small=target, big=base)
    for seed, name in enumerate(("one", "two")):
        modules = ["q_proj", "v_proj", "down_proj"]
        adapter = save_adapter(root / "big", root / name, target_modules=modules, size=0.05, seed=seed)
        config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": "user/big"}
        (adapter / "adapter_config.json").write_text(json.dumps(config))
    hub = WritableHub(token=TOKEN)
    for name in ("small", "big", "one", "two"):
        (root / name / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
        hub.repos[f"user/{name}"] = Repo()
        hub.repos[f"user/{name}"].commit(root / name)
    with hub:
        yield hub


@pytest.fixture(scope="module")
def results(hub, tmp_path_factory):
    work = {"WORK": str(tmp_path_factory.mktemp("work"))}
    ended = run_client(hub, tmp_path_factory.mktemp("home"), SCRIPT, token=TOKEN, **work)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert TOKEN not in ended.stdout + ended.stderr
    return json.loads(ended.stdout.rpartition("RESULTS")[2])


def published(hub, repo):
    return hub.repos[repo].commits[hub.repos[repo].find("main")]


def printed(results, name):
    assert results[name]["code"] == 0, results[name]["err"]
    return json.loads(results[name]["out"])


def test_what_is_pushed_is_an_adapter_of_its_target(hub, results):
    assert results["push"]["code"] == 0, results["push"]["err"]
    files = published(hub, "user/carried")
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= files.keys()
    assert not {"config.json", "model.safetensors"} & files.keys()
    card = files["README.md"].decode()
    assert "base_model: user/small\n" in card and "base_model_relation: adapter\n" in card
    config = json.loads(files["adapter_config.json"])
    assert config["base_model_name_or_path"] == "user/small" and len(config["revision"]) == 40
    assert results["moved"] > 0.01
    # And it is read wherever a model is named.
    assert results["as a model"]["code"] == 0, results["as a model"]["err"]


def test_the_plan_alone_holds_no_model_and_serves_other_adapters_and_texts(hub, results):
    planned = printed(results, "dry run")
    assert planned["plan_only"] and "tmerge/transport.safetensors" in planned["files"]
    printed(results, "push plan")
    files = published(hub, "user/plan")
    assert files.keys() == planned["files"].keys() | {".gitattributes"}
    assert not [name for name in files if name.endswith(".safetensors") and not name.startswith("tmerge/")]
    card = files["README.md"].decode()
    assert (
        "tmerge merge --plan user/plan --source-base user/big --adapter user/lora --set fusion.projections=[q" in card
    )
    assert "holds that correspondence and no model" in card and "transport-plan" in card
    other, direct = printed(results, "other"), printed(results, "direct")
    assert other["evaluation"]["fused"]["value"] == pytest.approx(direct["evaluation"]["fused"]["value"], abs=1e-3)
    assert other["evaluation"]["base"] == direct["evaluation"]["base"]
    assert other["calibration"]["other_dataset"] == "samples:english"
    # The same from a plan of a merge that was made by a plan.
    assert printed(results, "twice")["calibration"]["other"] == other["calibration"]["other"] > 0
    assert printed(results, "inspect")["plan"] is None


def test_a_carried_adapter_is_reproduced_to_the_bit(results):
    document = printed(results, "reproduce")
    assert document["same"] and set(document["weights"]) == {"adapter_model.safetensors"}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("over a model", "holds a model, which a plan alone would take away"),
        ("matched on", "are among those that the plan of user/plan was matched on"),
        ("copied", "are among those that the plan of user/plan was matched on"),
        ("other rows", "calibration.rows is last, and the plan of user/plan was matched with tokens"),
        ("reproduce a plan", "holds no weights that a reproduction could be held against"),
    ],
)
def test_what_is_refused_is_one_line(results, name, words):
    refused = results[name]
    last = refused["err"].strip().splitlines()[-1]
    assert refused["code"] == 2 and words in last, refused["err"]
