"""A model that is read by blocks and has no room for a batch: all are read anew by halves, to the same."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from tests.adaptation.test_distillation import teacher_for
from tests.adaptation.test_training import TEXTS as TRAINED_ON
from tests.calibration.test_capture import everything
from tests.evaluation.test_choose import loaded
from tests.pico import pico_model, save_pico
from tmerge.adaptation.teacher import read_teacher
from tmerge.calibration import FeatureStore, capture
from tmerge.errors import NotEnoughMemoryError
from tmerge.evaluation import score_texts
from tmerge.models import load_model
from tmerge.models.loading import open_by_blocks
from tmerge.models.projections import PROJECTIONS, describe

# Pairs of one length, so that they are read together.
TEXTS = ["a cat sat", "the dog ran off", "a dog ran", "the cat sat up", "one two three four five six", "no", "so", ""]
# At the embeddings, before the first block; in the first block, and in the second; behind the last.
PLACES = ["embed_tokens", "layers.0", "layers.1.mlp", "norm"]


@pytest.fixture
def models(tmp_path):
    save_pico("llama", tmp_path / "m", layers=3)
    return load_model(str(tmp_path / "m"), widen=True), open_by_blocks(str(tmp_path / "m"), widen=True)


def crowded(one, place, most):
    """The texts of each call of a module, of which no more than so many fit."""
    sizes, module = [], one.base.get_submodule(place)
    forward = module.forward

    def crowd(first, *inputs, **named):
        sizes.append(len(first))
        if len(first) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(first, *inputs, **named)

    module.forward = crowd
    return sizes


@pytest.mark.parametrize("place", PLACES)
def test_scores(models, place):
    whole, by_blocks = models
    wanted, sizes, notes = score_texts(whole, TEXTS), crowded(by_blocks, place, 1), []
    scores = score_texts(by_blocks, TEXTS, note=notes.append)
    assert max(sizes) > 1 and sizes[-len(TEXTS) :] == [1] * len(TEXTS)
    assert len(notes) == 1 and notes[0].endswith("texts: read by halves")
    torch.testing.assert_close(scores.bits, wanted.bits, rtol=1e-6, atol=0)
    crowded(by_blocks, place, 0)
    with pytest.raises(NotEnoughMemoryError, match="out of memory on cpu while scoring"):
        score_texts(by_blocks, TEXTS)


@pytest.mark.parametrize("place", PLACES)
def test_features(models, tmp_path, place):
    def features(one, name, **words):
        folder, told = tmp_path / name, {"max_tokens": 48, "batch_tokens": 128, "key": "k"}
        report = capture(one, describe(one.model), TEXTS, PROJECTIONS, folder, **told, **words)
        return everything(FeatureStore(folder)), report

    whole, by_blocks = models
    wanted, _ = features(whole, "whole")
    sizes, notes, heard = crowded(by_blocks, place, 1), [], []
    found, report = features(by_blocks, "blocks", note=notes.append, progress=lambda *step: heard.append(step))
    assert max(sizes) > 1 and len(notes) == 1 and heard[-1] == (3, 3)
    # What was read before it broke off is not counted.
    assert report.batches == len(TEXTS) - 1 and report.padded_tokens == report.tokens
    for feature, rows in wanted.items():
        torch.testing.assert_close(found[feature], rows)


def test_a_teacher(models, tmp_path):
    whole, by_blocks = models
    student, told = loaded(pico_model("qwen2", seed=5)), []
    sizes, notes = crowded(by_blocks, "layers.1", 1), []
    for name, source in (("whole", whole), ("blocks", by_blocks)):
        encoded, asked, spans = teacher_for(student, source)
        open_source = lambda source=source: nullcontext(source)  # noqa: E731
        words = (student.tokenizer, TRAINED_ON[:4], encoded, spans, asked, tmp_path / name)
        told.append(read_teacher(open_source, *words, note=notes.append))
    assert max(sizes) > 1 and len(notes) == 1
    assert torch.equal(told[0].ids, told[1].ids)
    torch.testing.assert_close(told[0].chances, told[1].chances)
