"""A reconstruction that runs out of memory: read by halves, from the block on that it had come to."""

from __future__ import annotations

import importlib

import pytest
import torch

from tests.launched import begun
from tests.stages.test_reconstruct import models, recipe_for  # noqa: F401
from tmerge.errors import NotEnoughMemoryError
from tmerge.stages.merge import merge

stage = importlib.import_module("tmerge.stages.reconstruct")


def _merged(models, folder, monkeypatch, most, at_block):  # noqa: F811
    """A run in which no more than so many tokens fit at once from a block on; what was tried, and what was said."""
    reconstruct, tried, heard = stage.reconstruct, [], []

    def crowded(passage, *words, take, **named):
        tried.append((passage.batch_tokens, len(named["finished"])))

        def taken(block):
            take(block)
            if passage.batch_tokens > most and at_block == 1:
                raise torch.OutOfMemoryError("CUDA out of memory")

        if passage.batch_tokens > most and at_block == 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return reconstruct(passage, *words, take=taken, **named)

    monkeypatch.setattr(stage, "reconstruct", crowded)
    report = merge(recipe_for(models, evaluation={"controls": []}), folder, listener=heard.append)
    return report, tried, [step.what for step in heard if step.stage == "note" and "halves" in step.what]


@pytest.mark.parametrize("at_block", [0, 1])
def test_it_is_read_by_halves(models, tmp_path, monkeypatch, at_block):  # noqa: F811
    report, tried, said = _merged(models, tmp_path / "crowded", monkeypatch, 512, at_block)
    assert tried == [(2048, 0), (1024, at_block), (512, 2 * at_block)] and len(said) == 1
    wanted = merge(recipe_for(models, evaluation={"controls": []}), tmp_path / "whole")
    assert report.evaluation.fused.value == pytest.approx(wanted.evaluation.fused.value, abs=1e-4)


def test_what_never_fits_is_the_end(models, tmp_path, monkeypatch):  # noqa: F811
    with pytest.raises(NotEnoughMemoryError, match="the reconstruction does not fit"):
        _merged(models, tmp_path / "crowded", monkeypatch, 1, 0)


@pytest.mark.slow
def test_two_processes_of_which_one_lacks_it_read_by_halves_together(models, tmp_path):  # noqa: F811
    recipe = recipe_for(models, evaluation={"controls": ["permuted"]})
    wanted = merge(recipe, tmp_path / "alone")
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    words = ["merge", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "together")]
    launcher = begun(words, module="tests.crowded")
    said = launcher.communicate(timeout=300)[1]
    assert launcher.returncode == 0, said
    assert said.count("no room for so many texts at once: what is reconstructed on is read by halves") == 1
    report = merge(recipe, tmp_path / "together")  # finished: read again
    assert report.evaluation.fused.value == pytest.approx(wanted.evaluation.fused.value, abs=1e-3)
    controls = [one.evaluation.controls["permuted"].value for one in (report, wanted)]
    assert controls[0] == pytest.approx(controls[1], abs=1e-3)
