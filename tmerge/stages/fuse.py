"""Carrying the source's weights through the plans: the selected neurons, and the run's record of its transport."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tmerge.evaluation import control_generator
from tmerge.fusion import TransportedNeurons, carry
from tmerge.models import Model
from tmerge.recipe import Recipe, Reconstruction
from tmerge.recorded import RecordedRun
from tmerge.run import Run
from tmerge.stages.neurons import Neurons
from tmerge.stages.notes import FuseNote
from tmerge.stages.scoring import load
from tmerge.stages.source_weights import SourceWeights
from tmerge.stages.step import Progress
from tmerge.stages.transport import Features, record_of, transport_of

__all__ = ["Fuse", "shared_vocabulary"]

_NEARLY_ALL = 0.9


@dataclass(frozen=True)
class Fuse:
    """The stage ``fuse``. Alpha enters only when the neurons are written, so that another alpha can start from here.

    Attributes:
        recipe: Of the run.
        target: Whose neurons are selected.
        source: The weights that are carried.
        source_base: Those of the source before its fine-tuning, where what it learned since is carried.
        features: What the transport was solved from.
        solved: The key of the stage that solved it.
        recorded: A recorded transport, which is used instead.
        run: Where the run's own record of its transport goes.
        neurons: Where the selected neurons go, and those of the permuted control.
    """

    recipe: Recipe
    target: Model
    source: SourceWeights
    source_base: SourceWeights | None
    features: Features
    solved: str
    recorded: RecordedRun | None
    run: Run
    neurons: Neurons

    name = "fuse"
    note = FuseNote

    def inputs(self) -> dict[str, Any]:
        """What decides the neurons."""
        return {
            "transport": self.solved,
            "fusion": self.recipe.fusion.model_dump(mode="json", exclude={"alpha", "alphas"}),
            "base": None if self.source_base is None else self.source_base.model.commit,
            "seed": self.recipe.seed,
            "permuted": "permuted" in self.recipe.evaluation.controls,
        }

    def do(self, key: str, progress: Progress) -> FuseNote:
        """Carry the weights, and keep what was carried."""
        fusion, seed = self.recipe.fusion, self.recipe.seed
        assert not isinstance(fusion, Reconstruction)  # it has a stage of its own
        vocabulary = None
        if fusion.carries_stream:
            vocabulary = shared_vocabulary(
                (self.target.tokenizer, self.source.model.tokenizer), (_rows(self.target), _rows(self.source.model))
            )
            if vocabulary is None:
                progress.note("the two vocabularies differ: embeddings stay the target's, norms are carried")
        transport = transport_of(self.recipe, self.features, self.recorded)

        def shuffle(layer: int, feature: str, neurons: int) -> Tensor:
            return torch.randperm(neurons, generator=control_generator(seed, "permuted", layer, feature))

        load(self.target, progress)
        transported, permuted = self.neurons.write(key)

        def keep(items: Sequence[TransportedNeurons], shuffled: Sequence[TransportedNeurons]) -> None:
            transported.add(items)
            permuted.add(shuffled)

        carried = carry(
            self.target.views,
            self.source.read(progress),
            transport,
            fusion,
            source_base=None if self.source_base is None else self.source_base.read(progress),
            shuffle=shuffle if "permuted" in self.recipe.evaluation.controls else None,
            vocabulary=vocabulary,
            keep=keep,
            progress=progress.counting("transporting weights", "layers"),
        )
        transported.finish()
        permuted.finish()
        commits = self.target.commit, self.source.model.commit
        record_of(self.recipe, transport, self.features, commits, carried.tensors).save(self.run.transport_path)
        return FuseNote.model_validate(
            {
                "norm_ratios": carried.norm_ratios,
                "layers": {name: list(found.target_layers) for name, found in transport.layer_maps.items()},
                "biases": carried.biases,
                "stream": sorted(carried.stream),
                "eta": dict(transport.eta),
                "layer_plans_converged": transport.layer_plans_converged,
            }
        )


def shared_vocabulary(
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase], rows: tuple[int, int]
) -> Tensor | None:
    """Tokens that are in both models' tokenizers and have a row in both models' embeddings.

    Args:
        tokenizers: The target's and the source's.
        rows: Of their embeddings.

    Returns:
        (2, V) int64, each token's id in the target and in the source, ascending in the target's: a vocabulary that
        was trimmed, extended or put in another order is still one. None where they are not nearly all of the
        smaller vocabulary: then the two have words in common as any two have.
    """
    target_ids, source_ids = (tokenizer.get_vocab() for tokenizer in tokenizers)
    common = sorted((index, source_ids[token]) for token, index in target_ids.items() if token in source_ids)
    kept = [pair for pair in common if pair[0] < rows[0] and pair[1] < rows[1]]
    if not kept or len(kept) < _NEARLY_ALL * min(len(target_ids), len(source_ids)):
        return None
    return torch.tensor(kept).T.contiguous()


def _rows(model: Model) -> int:
    return int(model.facts.config.get_text_config().vocab_size)
