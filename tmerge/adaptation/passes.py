"""A training in passes of as many texts as there is memory for.

A step's texts stay what the recipe says; what does not fit is read in passes of half as many, and more of them. One
process finds out as it trains. Of several, one that runs out of memory in the midst of a step leaves the others waiting
for its gradients, so all of them try the dearest pass first, each by itself, and agree.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tmerge.adaptation.goals import FeatureWatch
from tmerge.adaptation.kept import last_checkpoint
from tmerge.errors import AdaptationError, NotEnoughMemoryError
from tmerge.models import LoadedModel, give_back_memory
from tmerge.models.device import is_out_of_memory
from tmerge.processes import Processes
from tmerge.quantities import count_words
from tmerge.recipe import AdaptationSettings

__all__ = ["PassTraining", "StepShare"]


@dataclass(frozen=True)
class StepShare:
    """What one process reads in an optimiser step.

    Attributes:
        texts: Of one forward and backward pass.
        passes: How many.
    """

    texts: int
    passes: int

    @classmethod
    def of(cls, settings: AdaptationSettings, processes: int) -> StepShare:
        """As many texts a step in all as one process reads, in passes that are no larger than its own.

        Args:
            settings: The recipe's ``adaptation`` section.
            processes: How many train together.

        Raises:
            AdaptationError: A step's texts cannot be shared out evenly.
        """
        step = settings.batch_size * settings.accumulation
        if step % processes:
            raise AdaptationError(
                f"a step of {step} texts (adaptation.batch_size times accumulation) cannot be shared out evenly among "
                f"{processes} processes; set adaptation.batch_size to a multiple of {processes}, or begin fewer"
            )
        texts = max(size for size in range(1, settings.batch_size + 1) if step // processes % size == 0)
        return cls(texts, step // processes // texts)

    @property
    def smaller(self) -> StepShare:
        """The same texts in passes of half as many, or of fewer where they have no half."""
        every = self.texts * self.passes
        texts = max(size for size in range(1, self.texts // 2 + 1) if every % size == 0)
        return StepShare(texts, every // texts)


@dataclass(frozen=True)
class PassTraining:
    """What is trained, and how.

    Attributes:
        make: A share of each step -> the trainer (`make_trainer`); anew each time, as a pass that broke off has left
            parts of gradients.
        loaded: The model.
        settings: The recipe's ``adaptation`` section.
        watch: What measures the features, for ``transport_weight``.
        work: Holds the checkpoints.
        note: Told that a step is read in smaller passes.
        processes: That train together.
    """

    make: Callable[[StepShare], Any]
    loaded: LoadedModel
    settings: AdaptationSettings
    watch: FeatureWatch | None
    work: Path
    note: Callable[[str], None] | None
    processes: Processes

    def run(self, share: StepShare) -> tuple[Any, Path | None]:
        """Train to the end.

        Args:
            share: Of each step, if there is room.

        Returns:
            The trainer that has trained, and the checkpoint from which it went on.

        Raises:
            NotEnoughMemoryError: Not one text fits; or memory ran out where what was trained by then is not kept, or
                where other processes wait.
        """
        trainer = self.make(share)
        if self.processes.count > 1:
            while not all(self.processes.gathered(self._tries(trainer))):
                trainer, share = self._smaller(trainer, share)
        while True:
            checkpoint = self.processes.from_first(lambda: last_checkpoint(self.work))
            if self._trains(trainer, checkpoint):
                return trainer, checkpoint
            # Weights that have moved are not to be had again without a checkpoint.
            has_moved = trainer.state.global_step > 0 and last_checkpoint(self.work) is None
            if self.processes.count > 1 or has_moved:
                raise self._no_room(share)
            trainer, share = self._smaller(trainer, share)

    def _smaller(self, trainer: Any, share: StepShare) -> tuple[Any, StepShare]:
        """Another trainer, of smaller passes."""
        if share.texts == 1:
            raise self._no_room(share)
        if self.settings.lora_rank:
            trainer.model.unload()
        del trainer
        vars(self.loaded.model).pop("forward", None)
        self.loaded.model.zero_grad(set_to_none=True)
        give_back_memory()
        share = share.smaller
        if self.note is not None:
            self.note(
                f"{self.loaded.device} has no room for so many texts in a pass: {share.texts} at a time, as many in a "
                "step"
            )
        return self.make(share), share

    def _trains(self, trainer: Any, checkpoint: Path | None) -> bool:
        """Train, and say whether memory sufficed."""

        def train() -> None:
            with self.processes.meeting_elsewhere("the training"), warnings.catch_warnings():
                # torch renames what accelerate and transformers still pass to it by its old name.
                warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

        return self._fits(train)

    def _tries(self, trainer: Any) -> bool:
        """Whether there is room for the dearest pass."""
        fits = self._fits(trainer.try_longest)
        self.loaded.model.zero_grad(set_to_none=True)
        give_back_memory()
        return fits

    def _fits(self, run: Callable[[], None]) -> bool:
        try:
            with self.watch.watching() if self.watch else nullcontext():
                run()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    def _no_room(self, share: StepShare) -> NotEnoughMemoryError:
        batch_size = self.settings.batch_size
        fewer = f"lower adaptation.batch_size (now {batch_size}) and raise adaptation.accumulation, "
        return NotEnoughMemoryError(
            f"{self.loaded.reference}: {count_words(share.texts, 'text')} at a time cannot be trained on in the memory "
            f"of {self.loaded.device}; {fewer if share.texts > 1 else ''}lower adaptation.max_tokens, or set "
            "adaptation.gradient_checkpointing or adaptation.lora_rank"
        )
