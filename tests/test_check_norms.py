"""Carrying weights of a source that norms q and k, or o and down, into a target that does not."""

from __future__ import annotations

import pytest

from tests.pico import save_pico
from tmerge.errors import UnsupportedModelError
from tmerge.models import PROJECTIONS
from tmerge.preflight.check import check
from tmerge.recipe import Recipe


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for family in ("llama", "qwen3", "gemma2", "olmo2"):
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
    assert remark.startswith("q and k are carried as large as before the source's norm")
    assert not any("norm" in note for note in _check(models, "llama", "qwen3", fusion={"scale": "row-norm"}).notes)


@pytest.mark.parametrize(("target", "source"), [("qwen3", "llama"), ("qwen3", "qwen3"), ("llama", "llama")])
def test_else_nothing_is(models, target, source):
    checked = _check(models, target, source, transport={"structure": "shared"})
    assert not checked.skipped and not any("norms" in note for note in checked.notes)


def test_where_nothing_else_is_wanted_it_is_refused(models):
    with pytest.raises(UnsupportedModelError, match="the source norms what it gives"):
        _check(models, "llama", "qwen3", transport={"structure": "shared"}, fusion={"projections": ["q", "k"]})


@pytest.mark.parametrize(
    ("source", "said"), [("gemma2", "o and down are left alone"), ("olmo2", "q, k, o and down are left alone")]
)
def test_a_source_that_norms_what_it_adds(models, source, said):
    everything = {"transport": {"structure": "shared"}, "fusion": {"projections": list(PROJECTIONS)}}
    checked = _check(models, "llama", source, **everything)
    assert [note for note in checked.notes if "left alone: the source" in note][0].startswith(said)
    assert set(checked.skipped) >= {"o", "down"} and not set(checked.skipped) & {"v", "gate", "up"}
    same = _check(models, source, source, **everything)
    assert not same.skipped and not any("norms" in note for note in same.notes)


def test_of_one_the_remark_is_in_the_singular(models):
    checked = _check(models, "llama", "gemma2")
    assert any(note.startswith("o is carried as large as before the source's norm") for note in checked.notes)


def test_a_reconstruction_reads_the_stream_that_o_and_down_write_to(models):
    checked = _check(models, "llama", "gemma2", fusion={"what": "reconstruct"})
    assert not set(checked.skipped) & {"o", "down"} and not any("norms" in note for note in checked.notes)
