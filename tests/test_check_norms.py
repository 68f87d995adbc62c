"""Carrying weights of a source that norms q and k into a target that does not."""

from __future__ import annotations

import pytest

from tests.pico import save_pico
from tmerge.errors import UnsupportedModelError
from tmerge.preflight.check import check
from tmerge.recipe import Recipe


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for family in ("llama", "qwen3"):
        save_pico(family, folder / family)
    return folder


def _check(models, target, source, **sections):
    return check(Recipe.from_mapping({"target": str(models / target), "source": str(models / source), **sections}))


def test_where_neurons_are_matched_they_are_left_alone(models):
    base = {"source_base": str(models / "qwen3"), "fusion": {"what": "task-vector"}}
    for sections in ({"transport": {"structure": "shared"}}, base):
        checked = _check(models, "llama", "qwen3", **sections)
        assert checked.skipped.keys() == {"q", "k"} and {"v", "o"} <= set(checked.projections)
        (remark,) = [note for note in checked.notes if "norms" in note]
        assert remark.startswith("q and k are left alone: the source norms what they give") and "\n" not in remark


def test_where_features_are_averaged_it_is_said(models):
    checked = _check(models, "llama", "qwen3")
    assert checked.projections == ["q", "k", "v", "o"] and not checked.skipped
    (remark,) = [note for note in checked.notes if "norm" in note]
    assert remark.startswith("q and k are carried as large as they are before the source's norm")
    assert not any("norm" in note for note in _check(models, "llama", "qwen3", fusion={"scale": "row-norm"}).notes)


@pytest.mark.parametrize(("target", "source"), [("qwen3", "llama"), ("qwen3", "qwen3"), ("llama", "llama")])
def test_else_nothing_is(models, target, source):
    checked = _check(models, target, source, transport={"structure": "shared"})
    assert not checked.skipped and not any("norms" in note for note in checked.notes)


def test_where_nothing_else_is_wanted_it_is_refused(models):
    with pytest.raises(UnsupportedModelError, match="the source norms what it gives"):
        _check(models, "llama", "qwen3", transport={"structure": "shared"}, fusion={"projections": ["q", "k"]})
