"""Reconstruction where the source norms q and k and the target does not: by what the source's scores are made of."""

from __future__ import annotations

import json

import pytest
import torch

from tests.pico import pico_model
from tests.stages.test_reconstruct import IDS, distance, recipe_for
from tests.stages.test_task_vector import _shaken, save_all
from tmerge.fusion import StoredNeurons
from tmerge.preflight.check import check
from tmerge.stages.merge import advance


def _with_norms(llama, family="qwen3", gain=2.0):
    """A model of the same weights that norms q and k, with gains of about this size."""
    source = pico_model(family, head_dim=llama.config.head_dim)
    source.load_state_dict({**source.state_dict(), **llama.state_dict()})
    with torch.no_grad():
        for layer in source.model.layers:
            for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
                norm.weight.mul_(gain)
    return source


@torch.no_grad()
def _resized(model, q, k):
    """The same function where norms follow; a norm's own epsilon aside."""
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight *= q
        layer.self_attn.k_proj.weight *= k
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    target = pico_model("llama")
    source = _shaken(_with_norms(target), 0.1, 2)
    folder = tmp_path_factory.mktemp("models")
    save_all(folder / "plain", target=target, source=source)
    save_all(folder / "resized", target=target, source=_resized(source, 10.0, 0.3))
    return folder


def _recipe(folder):
    # Matched by activations, whose correlation does not depend on their size; weights are compared by theirs.
    return recipe_for(folder, transport={"weights": False}, evaluation={"controls": []}, fusion={"ridge": 0.01})


def test_the_size_that_the_sources_norms_take_away_changes_nothing(models, tmp_path):
    found = {}
    for name in ("plain", "resized"):
        advance(_recipe(models / name), tmp_path / name, until="save")
        found[name] = StoredNeurons(tmp_path / name / "tmerge/cache/transported")
    for one, other in zip(found["plain"], found["resized"], strict=True):
        assert (one.layer, one.projection) == (other.layer, other.projection)
        torch.testing.assert_close(one.weight, other.weight, rtol=2e-3, atol=1e-4)
    note = json.loads((tmp_path / "plain/tmerge/cache/reconstruct.json").read_text())["facts"]
    for name in ("q", "k"):
        assert all(after < before for before, after in note["errors"][name])
    source = models / "plain/source"
    assert distance(source, tmp_path / "plain", IDS) < 0.75 * distance(source, models / "plain/target", IDS)


def test_it_is_said(models):
    checked = check(_recipe(models / "plain"))
    assert (
        "q and k are fitted to what the source's norms make of them, as the target does not norm them" in checked.notes
    )
    assert not checked.skipped


def test_between_two_that_norm_nothing_is_said(tmp_path):
    source = pico_model("qwen3")
    save_all(tmp_path, target=source, source=source)
    checked = check(_recipe(tmp_path))
    assert not checked.skipped and not any("norm" in note for note in checked.notes)


def test_norms_behind_the_rotation_are_left_alone(tmp_path):
    save_all(tmp_path, target=pico_model("llama"), source=pico_model("hunyuan"))
    checked = check(_recipe(tmp_path))
    assert checked.skipped.keys() == {"q", "k"} and not {"q", "k"} & set(checked.projections)
    assert any(
        note.startswith("q and k are not reconstructed: the source norms them, rotated") for note in checked.notes
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3", "olmo2"])
def test_of_other_families_too(tmp_path, family):
    """Norms that are given heads before positions, or all heads at once."""
    target, source = pico_model("llama"), pico_model(family, rms_norm_eps=1e-9)
    fitted = {}
    for name, sizes in (("plain", (1.0, 1.0)), ("resized", (10.0, 2.0))):
        folder = save_all(tmp_path / name, target=target, source=_resized(source, *sizes))
        recipe = recipe_for(
            folder,
            transport={"weights": False},
            evaluation={"controls": []},
            fusion={"projections": ["q", "k"], "ridge": 0.01},
        )
        advance(recipe, tmp_path / name / "fused", until="reconstruct")
        fitted[name] = StoredNeurons(tmp_path / name / "fused/tmerge/cache/transported")
    for one, other in zip(fitted["plain"], fitted["resized"], strict=True):
        torch.testing.assert_close(one.weight, other.weight, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("normed", [False, True])
def test_a_target_with_norms_of_its_own_is_drawn_as_far_whatever_the_size(tmp_path, normed):
    """Of a size that its own norms take away: the source computes the same, and so does what is fitted to it."""
    target = _with_norms(pico_model("llama"))
    source = _shaken(target if normed else pico_model("llama"), 0.1, 2)
    for name, sizes in (("plain", (1.0, 1.0)), ("resized", (10.0, 0.1))):
        folder = save_all(tmp_path / name, target=target, source=_resized(source, *sizes))
        advance(_recipe(folder), tmp_path / name / "fused", until="save")
    one, other, before = (tmp_path / name for name in ("plain/fused", "resized/fused", "plain/target"))
    assert distance(one, other, IDS) < 1e-3 * distance(one, before, IDS)
