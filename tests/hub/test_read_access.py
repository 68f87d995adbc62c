"""Loading from the Hub, through the real client, against a Hub on the loopback interface."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from tests.hub import STOP_THE_HUB, LoopbackHub, Repo, run_client
from tests.pico import save_pico

TOKEN = "hf_TheSecretOfThisTest"

# One process for all cases: importing torch and transformers costs seconds.
SCRIPT = """
import json, os, time
import huggingface_hub
import huggingface_hub.constants as constants
from huggingface_hub import get_session
from pathlib import Path
from tmerge.errors import TmergeError
from tmerge.models import load_model, load_tokenizer, model_commit, read_facts, save_checkpoint
from tmerge.models.finding import find_place

results = {}

def case(name, call):
    try:
        results[name] = call()
    except TmergeError as error:
        results[name] = {"error": type(error).__name__, "message": str(error)}

def loaded(reference, **options):
    model = load_model(reference, device="cpu", **options)
    return {
        "commit": model.commit,
        "licence": model.licence,
        "dtype": str(model.dtype),
        "name_or_path": model.model.config._name_or_path,
        "class": type(model.model).__name__,
        "sum": float(sum(p.double().sum() for p in model.model.parameters())),
        "ids": model.tokenizer("hello")["input_ids"],
    }

def facts(reference):
    found = read_facts(reference)
    return {
        "commit": found.commit, "parameters": found.parameters, "weight_bytes": found.weight_bytes,
        "licence": found.licence, "gated": found.gated, "private": found.private, "layers": found.layers,
        "hidden_size": found.hidden_size, "model_type": found.model_type,
    }

def saved(reference, folder):
    return [str(path) for path in save_checkpoint(load_model(reference, device="cpu"), Path(folder))]

case("main", lambda: loaded("user/pico"))
case("tag", lambda: loaded("user/pico@v1"))
case("branch with a slash", lambda: loaded("user/pico@refs/pr/1"))
case("override", lambda: loaded("user/pico", place=find_place("user/pico", "OLD_COMMIT")))
case("commit alone", lambda: {"commit": model_commit("user/pico@v1")})
case("sharded", lambda: loaded("user/sharded"))
case("private with a token", lambda: facts("user/private"))
case("facts", lambda: facts("user/pico"))
case("facts sharded", lambda: facts("user/sharded"))
case("tokenizer", lambda: {"ids": load_tokenizer("user/pico")("hello")["input_ids"]})
case("saved", lambda: saved("user/pico", "OUT_FOLDER"))
case("own code refused", lambda: loaded("user/code"))
case("own code", lambda: loaded("user/code", trust_remote_code=True))
started = time.monotonic()
for name in ("nothing", "gated", "broken", "pickles", "ggufs", "adapter", "truncated", "headless"):
    case(name, lambda: loaded(f"user/{name}"))
case("facts gated", lambda: facts("user/gated"))
case("facts pickles", lambda: facts("user/pickles"))
case("facts headless", lambda: facts("user/headless"))
case("packed", lambda: loaded("user/packed"))
case("facts packed", lambda: facts("user/packed"))
case("facts with a value head", lambda: {"side": [str(part) for part in read_facts("user/valued").side]})
case("weights of the valued", lambda: {"sum": loaded("user/valued")["sum"]})
case("unknown revision", lambda: loaded("user/pico@v9"))
case("no tokenizer", lambda: loaded("user/mute"))

case("facts partly", lambda: facts("user/partly"))
for name in PARTLY_FILES:
    huggingface_hub.hf_hub_download("user/partly", name)

right = os.environ.pop("HF_TOKEN")
os.environ["HF_TOKEN"] = "hf_wrong"
case("wrong token", lambda: facts("user/pico"))
os.environ["HF_TOKEN"] = right

constants.HF_HUB_OFFLINE = True
case("offline cached", lambda: loaded("user/pico@v1"))
case("offline sharded", lambda: loaded("user/sharded"))
case("offline facts", lambda: facts("user/pico"))
case("offline facts with a value head", lambda: {"side": [str(part) for part in read_facts("user/valued").side]})
case("offline facts packed", lambda: facts("user/packed"))
case("offline facts without all shards", lambda: facts("user/partly"))
case("offline", lambda: loaded("user/other"))
constants.HF_HUB_OFFLINE = False

# STOP
case("down cached", lambda: loaded("user/pico@v1"))
case("down", lambda: loaded("user/other"))
results["seconds"] = time.monotonic() - started
print("RESULTS" + json.dumps(results))
"""

MODELING = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture(scope="module")
def hub_results(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    card = "---\nlicense: other\nlicense_name: pico-licence\n---\n# Pico\n"
    old = save_pico("llama", root / "old", seed=1)
    (old / "README.md").write_text(card)
    new = save_pico("llama", root / "new", seed=2, dtype=torch.bfloat16)
    (new / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    pico = Repo()
    commits = {"old": pico.commit(old, "v1", "refs/pr/1"), "new": pico.commit(new, "main")}

    def variant(name, drop=(), add=None, source=old, **access):
        folder = root / name
        shutil.copytree(source, folder)
        for file in drop:
            (folder / file).unlink()
        for file, content in (add or {}).items():
            (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
        repo = Repo(**access)
        repo.commit(folder)
        return repo

    weights = (old / "model.safetensors").read_bytes()
    own = json.loads((old / "config.json").read_text()) | {
        "model_type": "own",
        "auto_map": {"AutoConfig": "modeling.OwnConfig", "AutoModelForCausalLM": "modeling.OwnForCausalLM"},
    }
    headless = save_pico("llama", root / "whole", seed=3)
    from safetensors.torch import load_file, save_file

    tensors = load_file(headless / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, headless / "model.safetensors", metadata={"format": "pt"})
    tensors["lm_head.weight"] = torch.zeros(384, 64)
    packed = tensors | {"lm_head.weight": torch.zeros(384, 64, dtype=torch.int8), "lm_head.SCB": torch.ones(384)}
    valued = tensors | {"v_head.summary.weight": torch.ones(1, 64)}
    odd = {}
    for name, held in (("packed", packed), ("valued", valued)):
        save_file(held, root / f"{name}.safetensors", metadata={"format": "pt"})
        odd[name] = (root / f"{name}.safetensors").read_bytes()
    sharded = save_pico("llama", root / "sharded", seed=4, max_shard_size="50KB")
    repos = {
        "user/pico": pico,
        "user/sharded": Repo(),
        "user/partly": Repo(),
        "user/headless": Repo(),
        "user/private": variant("private", access="private"),
        "user/gated": variant("gated", access="gated"),
        "user/broken": variant("broken", access="broken"),
        "user/pickles": variant("pickles", drop=["model.safetensors"], add={"pytorch_model.bin": b"\x80\x02"}),
        "user/ggufs": variant("ggufs", drop=["config.json", "model.safetensors"], add={"pico-Q8_0.gguf": b"GGUF"}),
        "user/adapter": variant("adapter", drop=["config.json"], add={"adapter_config.json": "{}"}),
        "user/truncated": variant("truncated", add={"model.safetensors": weights[:-100]}),
        "user/mute": variant("mute", drop=["tokenizer.json", "tokenizer_config.json"]),
        "user/packed": variant("packed", add={"model.safetensors": odd["packed"]}),
        "user/valued": variant("valued", add={"model.safetensors": odd["valued"]}),
        "user/code": variant("code", add={"config.json": json.dumps(own), "modeling.py": MODELING}),
    }
    commits["sharded"] = repos["user/sharded"].commit(sharded)
    repos["user/partly"].commit(sharded)
    # The index and one shard of several.
    partly = ["model.safetensors.index.json", min(path.name for path in sharded.glob("*.safetensors"))]
    repos["user/headless"].commit(headless)
    with LoopbackHub(repos, token=TOKEN) as hub:
        script = SCRIPT.replace("OLD_COMMIT", commits["old"]).replace("OUT_FOLDER", str(root / "out"))
        script = script.replace("PARTLY_FILES", repr(partly))
        script = script.replace("# STOP", STOP_THE_HUB)
        done = run_client(hub, root / "home", script, token=TOKEN)
    assert "RESULTS" in done.stdout, done.stderr[-3000:]
    results = json.loads(done.stdout.partition("RESULTS")[2])

    def total(folder):
        return sum(t.double().sum().item() for path in folder.glob("*.safetensors") for t in load_file(path).values())

    sums = {"old": total(old), "new": total(new), "sharded": total(sharded)}
    return {"cases": results, "commits": commits, "sums": sums, "root": root, "output": done.stdout + done.stderr}


@pytest.mark.parametrize(
    ("case", "which", "licence", "dtype"),
    [
        ("main", "new", "apache-2.0", "torch.bfloat16"),
        ("tag", "old", "pico-licence", "torch.float32"),
        ("branch with a slash", "old", "pico-licence", "torch.float32"),
        ("override", "old", "pico-licence", "torch.float32"),
        ("sharded", "sharded", None, "torch.float32"),
        ("offline cached", "old", "pico-licence", "torch.float32"),
        ("offline sharded", "sharded", None, "torch.float32"),
        ("down cached", "old", "pico-licence", "torch.float32"),
    ],
)
def test_the_asked_revision_is_what_is_loaded(hub_results, case, which, licence, dtype):
    found = hub_results["cases"][case]
    assert found["commit"] == hub_results["commits"][which]
    # The same float64 sum over the same values, in another order.
    assert found["sum"] == pytest.approx(hub_results["sums"][which], rel=1e-9)
    assert (found["licence"], found["dtype"]) == (licence, dtype)
    assert found["name_or_path"] == ("user/sharded" if which == "sharded" else "user/pico")
    assert found["ids"]


def test_a_commit_is_found_without_loading(hub_results):
    assert hub_results["cases"]["commit alone"]["commit"] == hub_results["commits"]["old"]


@pytest.mark.parametrize("case", ["facts", "facts sharded", "private with a token", "offline facts"])
def test_facts_come_without_the_weights(hub_results, case):
    found = hub_results["cases"][case]
    root = hub_results["root"]
    folder = {"facts": "new", "offline facts": "new", "facts sharded": "sharded"}.get(case, "private")
    sizes = sum(path.stat().st_size for path in (root / folder).glob("*.safetensors"))
    width = 2 if folder == "new" else 4
    assert (found["model_type"], found["layers"], found["hidden_size"]) == ("llama", 2, 64)
    assert (found["gated"], found["private"]) == (False, case.startswith("private"))
    # Stored size, headers included; offline it is what the weights alone take.
    exact = found["parameters"] * width
    assert found["weight_bytes"] == (exact if case == "offline facts" else sizes)
    assert 0 < sizes - exact < 8192


@pytest.mark.parametrize("case", ["facts with a value head", "offline facts with a value head"])
def test_a_side_head_of_a_repo_is_named_from_its_headers(hub_results, case):
    assert hub_results["cases"][case] == {"side": ["a value head (v_head.summary.weight)"]}


def test_facts_without_the_hub_do_not_need_the_weights(hub_results):
    """A shard that is not in the cache is found missing when the model is loaded."""
    cases = hub_results["cases"]
    assert cases["offline facts without all shards"]["parameters"] == cases["facts partly"]["parameters"]


@pytest.mark.parametrize(
    ("case", "error", "words"),
    [
        ("nothing", "ModelNotFoundError", ["user/nothing", "no such repo", "hf auth login"]),
        ("gated", "GatedModelError", ["user/gated", "request access at", "hf auth login"]),
        ("facts gated", "GatedModelError", ["user/gated", "request access at"]),
        ("broken", "ModelNotFoundError", ["503", "try again later"]),
        ("unknown revision", "ModelNotFoundError", ["user/pico@v9", "no revision 'v9'"]),
        ("pickles", "CheckpointError", ["pytorch_model.bin", "convert it to safetensors"]),
        ("facts pickles", "CheckpointError", ["pytorch_model.bin", "convert it to safetensors"]),
        ("ggufs", "CheckpointError", ["hf download user/ggufs pico-Q8_0.gguf"]),
        ("adapter", "CheckpointError", ["adapter", "merge_and_unload"]),
        ("truncated", "CheckpointError", ["model.safetensors", "truncated", "download"]),
        ("headless", "CheckpointError", ["lm_head.weight"]),
        ("facts headless", "CheckpointError", ["'user/headless' lacks 1 of the weights", "lm_head.weight"]),
        ("packed", "CheckpointError", ["'user/packed' stores quantised weights as I8 (lm_head.weight)"]),
        ("facts packed", "CheckpointError", ["'user/packed' stores quantised weights as I8 (lm_head.weight)"]),
        ("offline facts packed", "CheckpointError", ["'user/packed' stores quantised weights as I8 (lm_head.weight)"]),
        ("no tokenizer", "TokenizerError", ["user/mute", "no tokenizer files"]),
        ("own code refused", "UnsupportedModelError", ["trust_remote_code: [user/code]"]),
        ("wrong token", "GatedModelError", ["user/pico", "does not accept this token", "hf auth login"]),
        ("offline", "ModelNotFoundError", ["user/other", "HF_HUB_OFFLINE", "hf download user/other"]),
        ("down", "ModelNotFoundError", ["user/other", "cannot be reached", "network"]),
    ],
)
def test_each_failure_is_one_line_with_its_remedy(hub_results, case, error, words):
    found = hub_results["cases"][case]
    assert found.get("error") == error, found
    assert "\n" not in found["message"]
    for word in words:
        assert word in found["message"]


def test_an_unreachable_hub_is_not_waited_for(hub_results):
    """The client's own retries take 23 s per file; all the failing cases together took 2 s on two busy cores."""
    assert hub_results["cases"]["seconds"] < 20


def test_own_code_runs_where_it_is_trusted(hub_results):
    assert hub_results["cases"]["own code"]["class"] == "OwnForCausalLM"


def test_the_token_is_nowhere(hub_results):
    """Neither printed nor in an error nor in a file, though it was sent with every request."""
    assert TOKEN not in hub_results["output"]
    files = [path for path in hub_results["root"].rglob("*") if path.is_file()]
    assert [path for path in files if path.parent.name == "out"]
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
