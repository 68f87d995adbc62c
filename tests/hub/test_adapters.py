"""Adapters on the Hub, through the real client, against a Hub on the loopback interface."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.hub import LoopbackHub, Repo, run_client
from tests.pico import save_pico
from tests.pico_adapter import merged_by_peft, save_adapter
from tmerge.models.adapter import joined_commit

SCRIPT = """
import json
import huggingface_hub
import huggingface_hub.constants as constants
from tmerge.errors import TmergeError
from tmerge.models import Model

results = {}

def case(name, *named, **options):
    try:
        model = Model(*named, device="cpu", **options)
        facts = model.facts
        adapter = facts.adapter
        results[name] = {
            "commit": model.commit, "adapter": adapter.commit, "base": adapter.base_commit, "licence": adapter.licence,
            "of_base": facts.licence, "ref": adapter.reference.text, "pinned": model.pinned,
            "pinned_base": model.pinned_base,
            "sum": float(sum(p.double().sum() for p in model.load().model.parameters())),
        }
    except TmergeError as error:
        results[name] = {"error": type(error).__name__, "message": str(error)}

case("alone", "user/lora")
case("beside", "user/pico@v1", adapter="user/lora@first")
case("base named", "user/orphan", base="user/pico@v1")
case("base of a model", "user/pico", base="user/pico@v1")
case("base that is none", "user/orphan", base="/tmp")
case("pickles", "user/pickles")
case("path", "user/path")
case("base gone", "user/orphan")
case("no adapter", "user/pico", adapter="user/pico")
case("no repo", "user/pico", adapter="user/nothing")
case("both", "user/both")
huggingface_hub.snapshot_download("user/whole")
constants.HF_HUB_OFFLINE = True
case("offline", "user/lora")
case("offline both", "user/both")
case("offline and whole", "user/whole")
case("offline and not here", "user/pico", adapter="user/other")
print("RESULTS" + json.dumps(results))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    old, new = (save_pico("llama", root / name, seed=seed) for name, seed in (("old", 1), ("new", 2)))
    (old / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    adapter = save_adapter(old, root / "adapter", target_modules=["q_proj", "down_proj"])
    (adapter / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    expected = sum(values.double().sum().item() for values in merged_by_peft(old, adapter).state_dict().values())
    pico = Repo()
    commits = {"base": pico.commit(old, "v1")}
    pico.commit(new, "main")

    def variant(name, pickled=False, **keys):
        folder = root / name
        shutil.copytree(adapter, folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | keys))
        if pickled:
            (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
        return folder

    lora = Repo()
    commits["adapter"] = lora.commit(
        variant("lora", base_model_name_or_path="user/pico", revision="v1"), "main", "first"
    )
    repos = {"user/pico": pico, "user/lora": lora}
    for name, folder in {
        "pickles": variant("pickles", pickled=True, base_model_name_or_path="user/pico"),
        # A folder that is here: of another's adapter it is not what is meant.
        "path": variant("path", base_model_name_or_path=str(old)),
        "orphan": variant("orphan", base_model_name_or_path="user/nothing"),
    }.items():
        repos[f"user/{name}"] = Repo()
        repos[f"user/{name}"].commit(folder)
    both = variant("both", base_model_name_or_path="user/pico")
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(old / name, both / name)
    # The second is fetched by others, and never seen with the Hub at hand.
    repos["user/both"], repos["user/whole"] = Repo(), Repo()
    for name in ("user/both", "user/whole"):
        repos[name].commit(both)
    with LoopbackHub(repos) as server:
        done = run_client(server, root / "home", SCRIPT)
    assert "RESULTS" in done.stdout, done.stderr[-3000:]
    return json.loads(done.stdout.partition("RESULTS")[2]), commits, expected


@pytest.mark.parametrize("case", ["alone", "beside", "offline"])
def test_base_and_adapter_are_read_at_the_commits_that_are_recorded(hub, case):
    results, commits, expected = hub
    found = results[case]
    assert (found["adapter"], found["base"]) == (commits["adapter"], commits["base"])
    assert found["commit"] == joined_commit(commits["base"], commits["adapter"])
    assert found["sum"] == pytest.approx(expected, rel=1e-6)
    assert (found["licence"], found["of_base"]) == ("cc-by-nc-4.0", "apache-2.0")
    pinned = f"user/pico@{commits['base']}" if case == "beside" else f"user/lora@{commits['adapter']}"
    assert found["pinned"] == pinned
    assert found["pinned_base"] == (None if case == "beside" else f"user/pico@{commits['base']}")


def test_an_adapter_is_joined_to_the_base_that_is_named_for_it(hub):
    results, commits, expected = hub
    found = results["base named"]
    assert found["base"] == commits["base"] and found["sum"] == pytest.approx(expected, rel=1e-6)
    assert found["pinned_base"] == f"user/pico@{commits['base']}"


@pytest.mark.parametrize(
    ("case", "error", "words"),
    [
        ("pickles", "CheckpointError", "has its weights as pickles only (adapter_model.bin)"),
        ("path", "CheckpointError", "which is no model that can be found from here; give the base as --source-base"),
        ("base gone", "ModelNotFoundError", "'user/orphan' is an adapter, and of its base 'user/nothing'"),
        ("base of a model", "CheckpointError", "is a model and no adapter, and bases joins it to 'user/pico@v1'; drop"),
        # Never a path: a recipe of a stranger's may name one.
        ("base that is none", "ModelNotFoundError", "'/tmp' is neither a folder or .gguf file here nor a Hub id"),
        ("both", "CheckpointError", "'user/both' holds an adapter (adapter_config.json) beside a model (config.json)"),
        ("offline both", "CheckpointError", "'user/both' holds an adapter (adapter_config.json) beside a model"),
        ("offline and whole", "CheckpointError", "'user/whole' holds an adapter (adapter_config.json) beside a model"),
        ("no adapter", "CheckpointError", "'user/pico' has no adapter_config.json, so it is no PEFT adapter"),
        ("no repo", "ModelNotFoundError", "'user/nothing': no such folder here, and no such repo on the Hub"),
        ("offline and not here", "ModelNotFoundError", "'user/other' is not in the local cache"),
    ],
)
def test_what_cannot_be_joined_is_said_in_a_line(hub, case, error, words):
    found = hub[0][case]
    assert found["error"] == error and words in found["message"] and "\n" not in found["message"]
