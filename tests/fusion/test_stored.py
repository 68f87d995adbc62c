"""Transported neurons on disk: as they were, in order, and no more of them in memory than are looked at."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from tests.fusion.test_merge import _everything
from tests.pico import pico_model
from tmerge.errors import RunNotFoundError
from tmerge.evaluation import applied, noise, shrink
from tmerge.fusion import NeuronWriter, StoredNeurons, TransportedNeurons
from tmerge.models import describe


def written(folder, items):
    """Items, written layer by layer."""
    writer = NeuronWriter(folder, "key")
    for layer in dict.fromkeys(item.layer for item in items):
        writer.add([item for item in items if item.layer == layer])
    return writer.finish()


def test_transported_neurons_come_back_as_they_were(tmp_path):
    items = _everything(pico_model("llama-bias", layers=12))
    items[3] = TransportedNeurons(0, items[3].projection, items[3].neurons, items[3].weight, None, True)
    # A column's transported weight may be a transposed view; the file must hold its values all the same.
    turned = items[6].weight.T.contiguous().T
    assert not turned.is_contiguous()
    items[6] = TransportedNeurons(0, "down", items[6].neurons, turned, items[6].bias)
    back = written(tmp_path / "transported", items)
    assert len(list((tmp_path / "transported").glob("*.safetensors"))) == 12
    # Layer 10 after layer 9, and q k v o gate up down within a layer.
    assert [(item.layer, item.projection) for item in back] == [(item.layer, item.projection) for item in items]
    assert back[-1].projection == items[-1].projection and len(back[2:4]) == 2
    for mine, theirs in zip(items, StoredNeurons(tmp_path / "transported"), strict=True):
        assert mine.neurons.equal(theirs.neurons) and mine.weight.equal(theirs.weight)
        assert mine.is_difference is theirs.is_difference
        assert (mine.bias is None) == (theirs.bias is None)
        assert mine.bias is None or mine.bias.equal(theirs.bias)


def test_nothing_transported_is_kept_as_nothing(tmp_path):
    writer = NeuronWriter(tmp_path / "none", "key")
    writer.add([])
    writer.finish()
    assert list(StoredNeurons(tmp_path / "none")) == []


def test_what_was_not_finished_is_not_read_and_is_written_anew(tmp_path):
    items = _everything(pico_model("llama", layers=2))
    NeuronWriter(tmp_path / "some", "key").add(items)
    with pytest.raises(RunNotFoundError, match="no transported neurons any more"):
        StoredNeurons(tmp_path / "some")
    assert len(written(tmp_path / "some", items[:1])) == 1
    assert sorted(path.name for path in (tmp_path / "some").iterdir()) == ["000-00000.safetensors", "index.json"]


@pytest.mark.parametrize("layers", [2, 8])
@pytest.mark.parametrize("what", ["fused", "shrink", "noise"])
def test_what_is_fused_and_its_controls_are_in_memory_one_at_a_time(
    tmp_path, monkeypatch, quick_collection, what, layers
):
    model = pico_model("llama", layers=layers)
    architecture = describe(model)
    items = written(tmp_path / "transported", _everything(model))
    seen: list[weakref.ref[torch.Tensor]] = []
    most = 0
    plain = StoredNeurons.__getitem__

    def counted(self, place):
        nonlocal most
        item = plain(self, place)
        seen.append(weakref.ref(item.weight))
        gc.collect()
        most = max(most, sum(weight() is not None for weight in seen))
        return item

    monkeypatch.setattr(StoredNeurons, "__getitem__", counted)
    views = architecture.layers
    chosen = {"fused": items, "shrink": shrink(views, items), "noise": noise(views, items, 0)}
    with applied(views, chosen[what], 0.3):
        pass
    # The one being read, and the one before, which a loop's variable still names.
    assert len(seen) == len(items) == 7 * layers and most <= 2
