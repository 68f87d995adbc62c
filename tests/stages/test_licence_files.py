"""The licence files of what was merged into a target go with the merge, each in a folder of its model."""

import json
import shutil

import pytest
from transformers import AutoModelForCausalLM

from tests.pico import save_pico
from tests.pico_adapter import save_adapter
from tests.stages.test_merge import recipe_for
from tests.stages.test_task_vector import recipe_for as vector_recipe
from tmerge.hub.published import STALE, left_behind, published_files
from tmerge.models import ModelReference, source_licence_files
from tmerge.models.checkpoint import licence_names
from tmerge.models.finding import find_place
from tmerge.recipe import Recipe
from tmerge.run import Run
from tmerge.stages.merge import merge


def folder_with(path, **texts):
    """A model's folder, with licence files of these texts."""
    for name, text in texts.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    folder_with(save_pico("llama", folder / "target", layers=2), LICENSE="of the target")
    source = save_pico("qwen2", folder / "source", layers=2, seed=1, hidden_size=48, intermediate_size=80)
    folder_with(source, LICENSE="of the source", NOTICE="who made it")
    return folder


def test_a_sources_files_go_into_a_folder_of_their_own_and_to_the_repo(models, tmp_path):
    out = tmp_path / "fused"
    report = merge(recipe_for(models), out)
    assert (out / "LICENSE").read_text() == "of the target"
    assert (out / "licenses/source/LICENSE").read_text() == "of the source"
    assert (out / "licenses/source/NOTICE").read_text() == "who made it"
    said = "what was merged into it go with it: licenses/source/LICENSE, licenses/source/NOTICE"
    assert any(note.endswith(said) for note in report.notes)
    assert "licenses/source/NOTICE" in (out / "README.md").read_text()
    files = published_files(Run(out))
    assert {"LICENSE", "licenses/source/LICENSE", "licenses/source/NOTICE"} <= files.keys()
    assert left_behind(Run(out), {name: 0 for name in (*files, "README.md")}) == [] and "licenses/*" in STALE
    assert not any("licenses" in name for name in published_files(Run(out), plan_only=True))
    AutoModelForCausalLM.from_pretrained(out)
    # One that is gone is written again.
    (out / "licenses/source/NOTICE").unlink()
    merge(recipe_for(models), out)
    assert (out / "licenses/source/NOTICE").is_file()


def test_they_go_with_what_is_trained_on_top(models, tmp_path):
    pytest.importorskip("trl", reason="the adapt extra is not installed")
    from tmerge.stages.adapt import adapt_run

    merge(recipe_for(models), tmp_path / "fused")
    report = adapt_run(tmp_path / "fused", tmp_path / "trained", {"steps": 1, "batch_size": 1, "accumulation": 1})
    assert (tmp_path / "trained/licenses/source/LICENSE").read_text() == "of the source"
    # Said once, of the files that lie there.
    own, sources = [note for note in report.notes if "licence files" in note]
    assert own.startswith("the target's licence files lie beside") and "licenses/source/LICENSE" in sources


def test_they_go_with_an_adapter_and_of_a_base_too(tmp_path):
    base = folder_with(save_pico("llama", tmp_path / "base", layers=2), LICENSE="of the base")
    save_pico("llama", tmp_path / "target", layers=2, seed=1)
    lora = folder_with(save_adapter(base, tmp_path / "lora", target_modules=["q_proj"]), NOTICE="of the adapter")
    data = vector_recipe(tmp_path, fusion={"alpha": 1.0, "stream": False}).model_dump(mode="json")
    data |= {"source": str(base), "adapter": str(lora), "source_base": None, "save": {"form": "adapter"}}
    merge(Recipe.from_mapping(data), tmp_path / "fused")
    assert (tmp_path / "fused/adapter_config.json").is_file()
    found = {path.parent.name: path.read_text() for path in (tmp_path / "fused/licenses").glob("*/*")}
    assert found == {"base": "of the base", "lora": "of the adapter"}


def test_each_model_once_and_none_in_the_place_of_another(tmp_path):
    def place(name, **texts):
        folder = save_pico("llama", tmp_path / name, layers=1)
        return find_place(str(folder_with(folder, **texts)))

    target, plain = place("target", LICENSE="t"), place("plain")
    one, other = place("a/model", LICENSE="one"), place("b/model", LICENSE="other")
    found = source_licence_files(target, [one, other, one, target, plain])
    assert {name: path.read_text() for name, path in found.items()} == {
        "licenses/model/LICENSE": "one",
        "licenses/model-2/LICENSE": "other",
    }
    # A source that is a merge passes on what it was made of; the target's own stay where they are.
    shutil.copytree(tmp_path / "a/model", tmp_path / "merge")
    (tmp_path / "merge/licenses/x--y").mkdir(parents=True)
    (tmp_path / "merge/licenses/x--y/LICENSE").write_text("of x")
    (tmp_path / "merge/licenses/x--y/weights.bin").write_text("none")
    merged = find_place(str(tmp_path / "merge"))
    assert list(source_licence_files(target, [merged])) == ["licenses/merge/LICENSE", "licenses/x--y/LICENSE"]
    assert list(source_licence_files(merged, [one])) == ["licenses/model/LICENSE"]


def test_a_run_of_before_that_passed_some_over_is_saved_again_with_them(models, tmp_path):
    out = tmp_path / "fused"
    merge(recipe_for(models), out)
    shutil.rmtree(out / "licenses")
    (out / "LICENSE").unlink()
    # As the note was when none of them were looked for.
    path = out / "tmerge/cache/save.json"
    noted = json.loads(path.read_text())
    del noted["facts"]["source_licence_files"], noted["facts"]["licence_files"]
    path.write_text(json.dumps(noted))
    steps = []
    merge(recipe_for(models), out, listener=steps.append)
    assert {step.stage for step in steps} == {"save"}
    assert {"LICENSE", "licenses/source/LICENSE", "licenses/source/NOTICE"} <= published_files(Run(out)).keys()
    # One that a source has no longer does not make it be written anew.
    shutil.copytree(models, tmp_path / "models")
    here, there = recipe_for(tmp_path / "models"), tmp_path / "other"
    merge(here, there)
    (tmp_path / "models/source/NOTICE").unlink()
    steps.clear()
    merge(here, there, listener=steps.append)
    assert not steps and (there / "licenses/source/NOTICE").is_file()


def test_a_folder_of_licences_goes_with_them(tmp_path):
    """As REUSE has it, or with one file for the code and one for the weights."""
    texts = {"LICENSE": "own", "LICENSES/MIT.txt": "mit", "licences/LICENSE": "of part", "licences/Apache-2.0": "ap"}
    others = {"licences/run.py": "none", "LICENSES/deep/MIT.txt": "none", "docs/LICENSE": "none"}
    for name in ("source", "target"):
        folder_with(save_pico("llama", tmp_path / name, layers=2), **texts, **others)
    source, target = find_place(str(tmp_path / "source")), find_place(str(tmp_path / "target"))
    listed = {path: len(text) for path, text in (texts | others).items()} | {"LICENSES/LICENSE-large": 2**21}
    assert sorted(texts) == licence_names(tmp_path / "source", None) == licence_names(tmp_path / "none", listed)
    found = {name: path.read_text() for name, path in source_licence_files(target, [source]).items()}
    folder = "licenses/source"
    expected = {"LICENSE": "own", "MIT.txt": "mit", "LICENSE-2": "of part", "Apache-2.0": "ap"}
    assert found == {f"{folder}/{name}": text for name, text in expected.items()}
    # The target's are with its others, and go to the repo; and all of them into a merge of that one.
    out = tmp_path / "fused"
    merge(recipe_for(tmp_path), out)
    own = {"LICENSE": "own", "licenses/MIT.txt": "mit", "licenses/LICENSE": "of part", "licenses/Apache-2.0": "ap"}
    assert {name: (out / name).read_text() for name in (own | found)} == own | found
    assert own.keys() | found.keys() <= published_files(Run(out)).keys()
    again = source_licence_files(target, [find_place(str(out))])
    assert len(again) == len(own) + len(found) and "licenses/source/Apache-2.0" in again


@pytest.mark.parametrize(
    ("reference", "folder"), [("meta-llama/Llama-3.1-8B@main", "meta-llama--Llama-3.1-8B"), ("gpt2", "gpt2")]
)
def test_a_repo_gives_its_whole_name(reference, folder):
    from tmerge.models.licence_files import _folder_of

    assert _folder_of(ModelReference.parse_repo(reference), set()) == folder
    assert _folder_of(ModelReference.parse_repo(reference), {folder}) == f"{folder}-2"
