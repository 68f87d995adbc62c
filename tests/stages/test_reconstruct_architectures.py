"""Reconstruction of models with biases, of other tokenizers, and of blocks that do more than add."""

import json

import pytest
from safetensors.torch import load_file

from tests.pico import pico_model, pico_tokenizer, save_pico
from tests.stages.test_reconstruct import IDS, distance, recipe_for
from tests.stages.test_task_vector import _deeper, _shaken, save_all
from tmerge.errors import UnsupportedModelError
from tmerge.stages.merge import advance


def test_rows_are_tokens_that_both_models_end_in_the_same_place(tmp_path):
    """One model under two tokenizers, the source's with a token before every text: all else is a place further on."""
    for name in ("target", "source"):
        save_pico("llama", tmp_path / name)
    pico_tokenizer(tmp_path / "source", bos=True)
    recipe = recipe_for(tmp_path, evaluation={"controls": []})
    advance(recipe, tmp_path / "fused", until="reconstruct")
    note = json.loads((tmp_path / "fused/tmerge/cache/reconstruct.json").read_text())["facts"]
    for name in ("q", "k", "v"):
        # What the first block reads of a token is its embedding, wherever it stands.
        assert note["errors"][name][0][0] < 1e-6
    # Attention saw one token more.
    assert note["errors"]["o"][0][0] > 1e-4


@pytest.mark.slow
def test_biases_are_fitted_where_there_are_any(tmp_path):
    target = pico_model("llama-bias")
    save_all(tmp_path, target=target, source=_shaken(target, 0.15, 3))
    recipe = recipe_for(tmp_path, evaluation={"controls": ["shrink"]})
    advance(recipe, tmp_path / "fused", until="save")
    here, before = (load_file(tmp_path / path / "model.safetensors") for path in ("fused", "target"))
    biases = [name for name in before if name.endswith("proj.bias")]
    assert biases and all(not here[name].equal(before[name]) for name in biases)
    note = json.loads((tmp_path / "fused/tmerge/cache/reconstruct.json").read_text())["facts"]
    assert set(note["biases"].values()) == {"fitted"}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3", "olmo2", "granite"])
def test_what_a_block_norms_or_scales_before_it_adds_it_is_fitted_too(tmp_path, family):
    target = pico_model(family)
    save_all(tmp_path, target=target, source=_shaken(_deeper(target, family), 0.15, 3))
    recipe = recipe_for(tmp_path, evaluation={"controls": []})
    advance(recipe, tmp_path / "fused", until="save")
    note = json.loads((tmp_path / "fused/tmerge/cache/reconstruct.json").read_text())["facts"]
    for name in ("o", "down"):
        assert all(0 < after < before for before, after in note["errors"][name]), name
    source, ids = tmp_path / "source", IDS
    assert distance(source, tmp_path / "fused", ids) < 0.75 * distance(source, tmp_path / "target", ids)


@pytest.mark.slow
def test_a_block_that_norms_the_sum_is_one_line(tmp_path):
    for name in ("target", "source"):
        save_pico("openai-gpt", tmp_path / name, seed=1)
    recipe = recipe_for(tmp_path)
    with pytest.raises(
        UnsupportedModelError,
        match=r"source: block 0 .* does more to the residual stream .* set fusion.projections: \[q",
    ) as caught:
        advance(recipe, tmp_path / "fused", until="reconstruct")
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
