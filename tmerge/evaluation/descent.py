"""Descent: does the merge point where the calibration loss falls?

For each fused projection and layer, the cosine of the merge's direction D with the negative gradient of the target's
mean loss per token on calibration texts, over the selected neurons:

    cos(D, -G),  D = transported - own (or the task vector),  G = dL/dW

Above zero, a small step along the merge lowers the loss. The same cosine of random directions says how large it gets
by chance: among d numbers, about 1 / sqrt(d) in standard deviation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tmerge.calibration import Room, batch_limit, encode, length_batches, padded
from tmerge.errors import NotEnoughMemoryError
from tmerge.fusion import COLUMN_PROJECTIONS, TransportedNeurons, generator_for, read_neurons
from tmerge.models import LoadedModel, Projection, read_logits
from tmerge.models.device import out_of_memory_as

__all__ = ["Descent", "descent_cosines"]


@dataclass(frozen=True)
class Descent:
    """Cosines of one projection, one a fused layer.

    Attributes:
        layers: Target layers.
        transported: Cosine of the merge's direction.
        noise: Mean cosine of random directions.
        noise_error: Standard deviation of one random direction's cosine, measured over `draws` of them.
        draws: Random directions a layer.
    """

    layers: list[int]
    transported: list[float]
    noise: list[float]
    noise_error: list[float]
    draws: int

    def to_dict(self) -> dict[str, Any]:
        """As the report holds it, with the mean over layers and its standard error."""
        values = torch.tensor(self.transported, dtype=torch.float64)
        random = torch.tensor(self.noise, dtype=torch.float64)
        return {
            "layers": self.layers,
            "cosine": self.transported,
            "noise": self.noise,
            "noise_sd": self.noise_error,
            "draws": self.draws,
            "mean": float(values.mean()),
            "standard_error": _standard_error(values),
            "noise_mean": float(random.mean()),
            "noise_standard_error": _standard_error(random),
        }


def descent_cosines(
    loaded: LoadedModel,
    layers: Sequence[dict[str, Projection]],
    transported: Sequence[TransportedNeurons],
    texts: Sequence[str],
    *,
    seed: int,
    max_tokens: int,
    batch_tokens: int,
    draws: int = 16,
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> dict[str, Descent]:
    """Hold the merge's direction against the descent direction, projection by projection.

    Args:
        loaded: The unfused target.
        layers: Its projections.
        transported: What the merge would fuse.
        texts: Calibration texts for the gradient.
        seed: Of the random directions.
        max_tokens: Longer texts are cut.
        batch_tokens: Most padded tokens of a pass.
        draws: Random directions a projection and layer.
        progress: Called with (texts done, all); may raise to stop.
        note: Told that a batch did not fit and is read by halves.

    Returns:
        projection -> its cosines.

    Raises:
        NotEnoughMemoryError: The backward pass of one text did not fit.
    """
    gradients = _gradients(loaded, layers, transported, texts, max_tokens, batch_tokens, progress, note)
    descents: dict[str, Descent] = {}
    for transported_neurons, gradient in zip(transported, gradients, strict=True):
        descent = descents.setdefault(transported_neurons.projection, Descent([], [], [], [], draws))
        weight = transported_neurons.weight
        if not transported_neurons.is_difference:
            weight = (
                weight
                - read_neurons(
                    layers[transported_neurons.layer][transported_neurons.projection], transported_neurons.neurons
                ).cpu()
            )
        down = -gradient.flatten()
        generator = generator_for(seed, "descent", transported_neurons.layer, transported_neurons.projection)
        random = torch.stack([_cosine(torch.randn(down.shape, generator=generator), down) for _ in range(draws)])
        descent.layers.append(transported_neurons.layer)
        descent.transported.append(float(_cosine(weight.flatten(), down)))
        descent.noise.append(float(random.mean()))
        descent.noise_error.append(float(random.std()))
    return descents


def _gradients(
    loaded: LoadedModel,
    layers: Sequence[dict[str, Projection]],
    transported: Sequence[TransportedNeurons],
    texts: Sequence[str],
    max_tokens: int,
    batch_tokens: int,
    progress: Callable[[int, int], None] | None,
    note: Callable[[str], None] | None,
) -> list[Tensor]:
    """Gradient of the summed loss for each item's neurons, float32 on the CPU, in the items' order."""
    model = loaded.model
    views = [layers[transported_neurons.layer][transported_neurons.projection] for transported_neurons in transported]
    wanted = {id(view.module.get_parameter("weight")) for view in views}
    encoded = [ids for ids in encode(loaded, texts, max_tokens).ids if len(ids) > 1]
    lengths = [len(ids) for ids in encoded]
    batches = length_batches(lengths, batch_limit(loaded.device, batch_tokens))
    sums = [torch.zeros(transported_neurons.weight.shape) for transported_neurons in transported]
    asked = {parameter: parameter.requires_grad for parameter in model.parameters()}
    training = model.training
    model.eval()
    done = 0

    def run(batch: list[int]) -> None:
        # What a pass that broke off has left goes too.
        model.zero_grad(set_to_none=True)
        _add_gradients(model, [encoded[text] for text in batch], loaded.device)

    def add() -> None:
        # After every batch and in float32: in bfloat16 many small gradients would be lost in the sum.
        for transported_neurons, view, total in zip(transported, views, sums, strict=True):
            gradient, chosen = view.gradient(), transported_neurons.neurons
            assert gradient is not None  # its parameter was asked for, and every projection runs
            columns = transported_neurons.projection in COLUMN_PROJECTIONS
            total += (gradient[:, chosen] if columns else gradient[chosen]).float().cpu()

    lacking = out_of_memory_as(
        lambda: NotEnoughMemoryError(
            f"{loaded.reference}: out of memory on {loaded.device} in the descent control's backward pass of one text; "
            "lower calibration.max_tokens, or set evaluation.descent=0"
        )
    )
    try:
        for parameter in asked:
            parameter.requires_grad_(id(parameter) in wanted)
        with lacking:
            # The passes with a gradient have less room than any other.
            for batch, _ in Room().fitting(batches, lengths, run, loaded, note):
                add()
                done += len(batch)
                if progress is not None:
                    progress(done, len(encoded))
    finally:
        model.zero_grad(set_to_none=True)
        for parameter, had in asked.items():
            parameter.requires_grad_(had)
        model.train(training)
    return sums


def _add_gradients(model: torch.nn.Module, sequences: list[list[int]], device: torch.device) -> None:
    """Of the cross-entropy, summed over all tokens but each sequence's first; padding on the right is not read."""
    ids, mask = padded(sequences, 0)
    read = [(row, position) for row, sequence in enumerate(sequences) for position in range(len(sequence) - 1)]
    rows, positions = torch.tensor(read, dtype=torch.int64).T.contiguous().to(device)
    ids, mask = ids.to(device), None if mask is None else mask.to(device)

    def add(stretch: slice, logits: Tensor) -> None:
        following = ids[rows[stretch], positions[stretch] + 1]
        functional.cross_entropy(logits.float(), following, reduction="sum").backward()

    read_logits(model, ids, mask, rows, positions, add, backward=True)


def _cosine(left: Tensor, right: Tensor) -> Tensor:
    return functional.cosine_similarity(left.double(), right.double(), dim=0)


def _standard_error(values: Tensor) -> float | None:
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else None
