"""What goes on from a merge goes on from the models that were merged: a folder or file that is another is refused."""

import shutil

import pytest

from tests.models.pico_gguf import save_pico_gguf
from tests.pico import save_pico
from tests.pico_adapter import save_adapter
from tmerge.errors import CheckpointError, ModelNotFoundError
from tmerge.models import Model
from tmerge.recipe import Recipe
from tmerge.stages.merged_models import SINCE_THE_MERGE, MergedModels
from tmerge.stages.step import Progress


def folder(path, seed):
    save_pico("llama", path / "model", layers=2, seed=seed)
    return path / "model"


def gguf(path, seed):
    return save_pico_gguf(path / "model.gguf", seed=seed)


def joined(path, seed):
    if not (path / "base").exists():
        save_pico("llama", path / "base", layers=2)
    return save_adapter(path / "base", path / "lora", seed=seed, target_modules=["q_proj"])


def base_of_an_adapter(path, seed):
    save_pico("llama", path / "base", layers=2, seed=seed)
    return path / "lora" if seed else save_adapter(path / "base", path / "lora", target_modules=["q_proj"])


@pytest.mark.parametrize("role", ["target", "source"])
@pytest.mark.parametrize("write", [folder, gguf, joined, base_of_an_adapter])
def test_what_has_changed_is_refused_before_and_after_it_is_loaded(tmp_path, role, write):
    reference = str(write(tmp_path, 0))
    save_pico("llama", tmp_path / "other", layers=2)
    names = {"target": str(tmp_path / "other"), "source": str(tmp_path / "other"), role: reference}
    recipe = Recipe.from_mapping({**names, "dtype": "float32"})
    commits = {each: Model(name).commit for each, name in names.items()}

    def models():
        return MergedModels(recipe, commits, Progress("adapt", lambda step: None), SINCE_THE_MERGE)

    models().refuse_changed("target", "source")
    assert models().load(role).commit == commits[role]
    write(tmp_path, 1)
    for use in (models().refuse_changed, models().load, models().read):
        with pytest.raises(CheckpointError, match="changed since it was merged .* run the merge again") as caught:
            use(role)
        assert "\n" not in str(caught.value) and reference in str(caught.value) and caught.value.exit_code == 2
    with pytest.raises(CheckpointError, match="changed since it was merged"), models().reading(role):
        pass


def test_an_adapter_beside_its_base_is_part_of_the_source(tmp_path):
    lora = joined(tmp_path, 0)
    words = {"target": str(tmp_path / "base"), "source": str(tmp_path / "base"), "adapter": str(lora)}
    recipe = Recipe.from_mapping({**words, "dtype": "float32"})
    commits = {"target": Model(words["target"]).commit, "source": Model(words["source"], adapter=str(lora)).commit}
    models = MergedModels(recipe, commits, Progress("adapt", lambda step: None), SINCE_THE_MERGE)
    models.refuse_changed("source")
    joined(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"base \+ .*lora' changed since it was merged"):
        models.refuse_changed("source")
    shutil.rmtree(lora)
    with pytest.raises(ModelNotFoundError, match="lora"):
        models.refuse_changed("source")


def test_of_a_hub_model_nobody_is_asked(tmp_path):
    recipe = Recipe.from_mapping({"target": f"user/small@{'1' * 40}", "source": f"user/large@{'2' * 40}"})
    commits = {"target": "1" * 40, "source": "2" * 40}
    models = MergedModels(recipe, commits, Progress("adapt", lambda step: None), SINCE_THE_MERGE)
    models.refuse_changed("target", "source")
