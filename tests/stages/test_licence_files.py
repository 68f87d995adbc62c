"""The licence files of what was merged into a target go with the merge, each in a folder of its model."""

import shutil

import pytest
from transformers import AutoModelForCausalLM

from tests.pico import save_pico
from tests.pico_adapter import save_adapter
from tests.stages.test_merge import recipe_for
from tests.stages.test_task_vector import recipe_for as vector_recipe
from tmerge.hub.published import STALE, left_behind, published_files
from tmerge.models import ModelReference, source_licence_files
from tmerge.models.finding import find_place
from tmerge.recipe import Recipe
from tmerge.run import Run
from tmerge.stages.merge import merge


def folder_with(path, **texts):
    """A model's folder, with licence files of these texts."""
    for name, text in texts.items():
        (path / name).parent.mkdir(exist_ok=True)
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
    adapt_run(tmp_path / "fused", tmp_path / "trained", {"steps": 1, "batch_size": 1, "accumulation": 1})
    assert (tmp_path / "trained/licenses/source/LICENSE").read_text() == "of the source"


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


@pytest.mark.parametrize(
    ("reference", "folder"), [("meta-llama/Llama-3.1-8B@main", "meta-llama--Llama-3.1-8B"), ("gpt2", "gpt2")]
)
def test_a_repo_gives_its_whole_name(reference, folder):
    from tmerge.models.licence_files import _folder_of

    assert _folder_of(ModelReference.parse_repo(reference), set()) == folder
    assert _folder_of(ModelReference.parse_repo(reference), {folder}) == f"{folder}-2"
