"""What changes a target, on an accelerator that is not there: fusing, fitting, and what a training is drawn to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from tests.device.fake import DEVICE, fake_device, fake_pico
from tests.pico import pico_model
from tmerge.adaptation.distillation import distillation_loss
from tmerge.adaptation.goals import FeatureGoals, FeatureWatch
from tmerge.fusion import TransportedNeurons, fuse, norm_ratio
from tmerge.fusion.addition import ADDING, Addition, additions_of
from tmerge.fusion.logit_goal import _sums
from tmerge.fusion.ridge import Linear, Regression
from tmerge.models import LastNorm, LoadedModel, Projection, Readout, describe
from tmerge.models.blocks import BlockCall
from tmerge.processes import ALONE
from tmerge.recipe import AdaptationSettings

FAMILIES = ["llama", "gpt2", "gemma3", "phi3", "falcon"]


def _projections(described: Sequence[dict[str, Projection]], loaded: LoadedModel) -> list[dict[str, Projection]]:
    """Of the fake model, from those of a real one: fake weights are of no kind that is described."""
    return [
        {name: replace(view, module=loaded.model.get_submodule(view.module_name)) for name, view in views.items()}
        for views in described
    ]


@pytest.mark.parametrize("is_difference", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_neurons_are_written_there_unawaited(family, is_difference):
    described, neurons = describe(pico_model(family)).layers, torch.tensor([0, 3, 2])
    with fake_device() as waits:
        layers = _projections(described, fake_pico(family))
        items = []
        for name, view in layers[1].items():
            by_columns = name in ADDING
            shape = (view.out_features, 3) if by_columns else (3, view.in_features)
            bias = torch.randn(shape[0]) if view.has_bias else None
            items.append(TransportedNeurons(1, name, neurons, torch.randn(shape), bias, is_difference))
        fuse(layers, items, 0.5)
        assert waits.count == 0
        # Of the target's own norm alone the processor has to know.
        assert norm_ratio(layers[1]["down"], items[-1]) == 1.0 and waits.moves == 1


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_regression_is_summed_there_unawaited_and_its_fits_come_back(has_bias):
    with fake_device() as waits, torch.no_grad():
        layers = [
            Linear(torch.randn(rows, 8, device=DEVICE), torch.randn(rows, device=DEVICE) if has_bias else None)
            for rows in (5, 3)
        ]
        sums, others = (Regression(8, [5, 3], has_bias=has_bias, device=DEVICE) for _ in range(2))
        for of in (sums, others):
            for _ in range(4):
                wanted = [torch.randn(20, rows, device=DEVICE) for rows in (5, 3)]
                of.add(torch.randn(20, 8, device=DEVICE), wanted, torch.rand(20, device=DEVICE))
        assert waits.count == 0
        fits = sums.solve(layers, [1.0, 0.1], 2, kept_away=others, processes=ALONE)
        assert [tuple(fit.weight.shape) for fit in fits] == [(5, 8), (3, 8)]
        assert all(fit.weight.device.type == "cpu" and (fit.bias is not None) == has_bias for fit in fits)


def _readout(width: int, rows: int, device: torch.device) -> Readout:
    norm = LastNorm(torch.randn(width, device=device), torch.randn(width, device=device), True)
    return Readout(torch.randn(rows, width, device=device), torch.randn(rows, device=device), norm, 1.0)


@pytest.mark.parametrize("source", [DEVICE, torch.device("cpu")], ids=["both", "target"])
def test_what_the_last_goal_is_made_of_is_summed_there(source):
    with fake_device() as waits, torch.no_grad():
        ids, readouts = torch.arange(50), (_readout(6, 50, DEVICE), _readout(9, 50, source))
        sums = _sums(*readouts, ids, ids, torch.rand(50, dtype=torch.float64), ALONE)
        assert [tuple(of.shape) for of in sums] == [(6, 6), (6, 9), (6,)]
        # Of a source elsewhere the constants go there and back.
        assert {of.device for of in sums} == {DEVICE} and waits.count == (0 if source == DEVICE else 2)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_how_a_block_adds_is_told_by_a_few_looks(family):
    described = describe(pico_model(family)).layers
    with fake_device() as waits, torch.no_grad():
        loaded, calls = fake_pico(family), []
        block = loaded.base.layers[0]
        forward = block.forward
        block.forward = lambda *given, **named: calls.append((given, named)) or forward(*given, **named)
        loaded.base(input_ids=torch.zeros(2, 5, dtype=torch.int64).to(DEVICE), use_cache=False)
        del block.forward
        views = _projections(described, loaded)[0]
        waits.reads = 0
        additions = additions_of(loaded, 0, BlockCall(block, *calls[0], forward), views, ADDING)
        normed = family == "gemma3"
        assert all((addition.gain is not None) == normed for addition in additions.values())
        # Whether each norm is one; by what a block's parts are multiplied, and whether that is so.
        assert waits.count == (2 if normed else 0) + 2


def test_the_output_for_an_addition_is_made_unawaited():
    with fake_device() as waits:
        addition = Addition(tap=None, scale=0.5, gain=torch.randn(7, device=DEVICE))
        wanted, outputs = torch.randn(4, 3), torch.tensor([0, 2, 5])
        for device in ("cpu", DEVICE):
            waits.moves = 0
            output, weights = addition.output_for(wanted.to(device), outputs, torch.randn(4, 7, device=DEVICE))
            assert output.device == weights.device == torch.device(device) and waits.reads == 0
        assert waits.moves == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_distance_from_goals_is_measured_there_unawaited(family):
    real = pico_model(family)
    names = {module: name for name, module in real.named_modules()}
    architecture = describe(real)
    taps = architecture.taps(["q", "up"])
    with fake_device() as waits:
        loaded = fake_pico(family)
        features = {(tap.layer, tap.key): tap.features for tap in taps}
        goals = {at: torch.randn(9, width) for at, width in features.items()}
        watch = FeatureWatch(
            architecture, FeatureGoals(goals, {at: torch.ones(width) for at, width in features.items()}, ("q", "up"))
        )
        watch._taps = [replace(tap, module=loaded.model.get_submodule(names[tap.module])) for tap in taps]
        ids = torch.zeros(3, 5, dtype=torch.int64).to(DEVICE)
        with watch.watching():
            for _ in range(2):
                loaded.base(input_ids=ids, use_cache=False)
                waits.reads = 0
                distance = watch.distance([4, 0, 7], torch.ones(3, 5, dtype=torch.int64).to(DEVICE))
                assert distance.device == DEVICE and distance.shape == () and waits.count == 0


@dataclass
class _Told:
    """A teacher of nine positions in two texts, all told by four ids."""

    starts = (0, 4, 9)

    @property
    def positions(self) -> Tensor:
        return torch.arange(9) % 4

    def at(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(chosen), 4, dtype=torch.int64), torch.rand(len(chosen), 4)


@pytest.mark.parametrize("kind", ["pieces", "uld"])
def test_a_distillations_loss_waits_for_its_labels_alone(kind):
    settings = AdaptationSettings(objective="distill", distill_loss=kind)
    with fake_device() as waits:
        logits = torch.randn(2, 6, 40, device=DEVICE, requires_grad=True)
        labels = torch.zeros(2, 6, dtype=torch.int64).to(DEVICE)
        loss = distillation_loss(logits, labels, _Told(), [1, 0], settings)
        assert loss.device == DEVICE and loss.shape == () and waits.reads == 0 and waits.moves == 1
