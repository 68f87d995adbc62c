"""Training after a merge, and of the baselines it is held against: same texts, same order, same steps.

The order of the texts is drawn from the seed alone, so every objective and every model of one tokenizer reads the
same tokens in the same steps. Weights train in float32 whatever they are stored in, since a step of 1e-6 is lost in
bfloat16, and go back to their dtype at the end; products run in bfloat16 where the device has it.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tmerge.adaptation.goals import FeatureGoals, FeatureWatch
from tmerge.adaptation.kept import teacher_path
from tmerge.adaptation.passes import PassTraining, StepShare
from tmerge.adaptation.residual import attach_residual, fold_residual
from tmerge.adaptation.teacher import Reading, read_teacher
from tmerge.adaptation.trainer import card_kept, make_trainer
from tmerge.calibration import Span
from tmerge.errors import AdaptationError, MissingExtraError, TokenizerError
from tmerge.fusion import Alpha, TransportedNeurons, fuse
from tmerge.models import (
    STREAM,
    Architecture,
    LoadedModel,
    describe,
    group_of,
    refuse_without_rows,
)
from tmerge.processes import ALONE, Processes
from tmerge.recipe import AdaptationSettings
from tmerge.version import DISTRIBUTION

__all__ = ["AdaptationReport", "adapt", "text_order", "training_libraries"]

_LORA_TARGETS = ("q", "k", "v", "o")


@dataclass(frozen=True)
class AdaptationReport:
    """What a training did.

    Attributes:
        steps: Optimiser steps.
        tokens: Tokens read by the model that was trained, padding excluded.
        resumed: Those of them that an earlier call had done.
        seconds: Wall time of this call; the teacher's forward passes included.
        loss_curve: (step, loss) of every step: the mean over the step's tokens.
        aligned: For distillation: the share of positions at which the source tells of the next token; else None.
        trained: Parameters that were trained.
    """

    steps: int
    resumed: int
    tokens: int
    seconds: float
    loss_curve: list[tuple[int, float]]
    aligned: float | None
    trained: int


def text_order(texts: int, wanted: int, seed: int) -> list[int]:
    """Which text is read when: shuffled epochs one after the other, `wanted` in all."""
    draw = random.Random(seed)
    order: list[int] = []
    while len(order) < wanted:
        epoch = list(range(texts))
        draw.shuffle(epoch)
        order += epoch
    return order[:wanted]


def adapt(
    loaded: LoadedModel,
    texts: Sequence[str],
    settings: AdaptationSettings,
    *,
    seed: int,
    work: Path,
    transported: Sequence[TransportedNeurons] | None = None,
    alpha: Alpha = 0.0,
    source: Callable[[], AbstractContextManager[LoadedModel]] | None = None,
    goals: FeatureGoals | None = None,
    prompts: Sequence[int] = (),
    progress: Callable[[int, int], None] | None = None,
    reading: Reading | None = None,
    note: Callable[[str], None] | None = None,
    processes: Processes = ALONE,
    batch_tokens: int = 2048,
) -> AdaptationReport:
    """Train a model in place; afterwards it is folded, plain, and in its own dtype again.

    Args:
        loaded: The target, unfused.
        texts: To train on.
        settings: The recipe's ``adaptation`` section.
        seed: Of the texts' order and the dropout of LoRA.
        work: Holds the training's checkpoints; a training that was stopped continues from there.
        transported: What the merge fuses; trained on top of it, frozen or (``residual: none``) fused beforehand.
        alpha: Its strength.
        source: Opens the source, for ``objective: distill``; once, for as long as it is read, and only if its outputs
            are not in `work`.
        goals: For ``transport_weight`` above 0: where the features are drawn to; over `texts`, in their order.
        prompts: For ``completions_only``: per text, the characters before its completion (`TextSet.prompts`).
        progress: Called with (steps done, all); may raise to stop.
        reading: Hears of the source's reading, and may raise likewise.
        note: Told that the texts of a pass, or of a batch of the source's, did not fit and are read by halves.
        processes: That train together, each of which calls this with a model of its own (`tmerge.adaptation.trainer`);
            `work` is a folder of all.
        batch_tokens: Most padded tokens of one of the source's forward passes.

    Raises:
        AdaptationError: Nothing to train on, a step's texts that cannot be shared out among the processes, or the loss
            is not finite.
        NotEnoughMemoryError: As `PassTraining.run`.
        ProcessLostError: One of several processes has ended.
        MissingExtraError: trl, or peft for LoRA, is not installed.
        TokenizerError: Distillation needs tokenizers that know where their tokens lie in the text.
    """
    began = time.perf_counter()
    sft, lora = training_libraries(settings)
    share = StepShare.of(settings, processes.count)  # before anything takes its time
    if processes.count > 1 and loaded.device.type == "cpu" and torch.cuda.is_available():
        raise AdaptationError(
            "where there are cards, several processes meet over them and cannot train on the processor; set device: "
            "auto, or begin them with CUDA_VISIBLE_DEVICES empty"
        )
    if processes.count > 1 and loaded.device.index is not None:
        raise AdaptationError(
            f"device is {loaded.device}, and of several processes each trains on a card of its own; set device: auto, "
            "and choose the cards with CUDA_VISIBLE_DEVICES"
        )
    encoded, spans = _encode(loaded, texts, settings)
    labels = _labels(loaded, encoded, spans, prompts) if settings.completions_only else encoded
    usable = [text for text, asked in enumerate(labels) if any(label >= 0 for label in asked[1:])]
    if not usable:
        what = "completion within adaptation.max_tokens" if settings.completions_only else "second token"
        raise AdaptationError(f"no text to train on has a {what}; give longer texts, or raise adaptation.max_tokens")
    teacher = None
    if settings.objective == "distill":
        if source is None:
            raise ValueError("objective distill needs a source")
        path = teacher_path(work)
        asked = (loaded.tokenizer, texts, encoded, spans, settings, path, processes, reading)
        teacher = read_teacher(source, *asked, batch_tokens=batch_tokens, note=note)
    order = text_order(len(usable), settings.steps * settings.batch_size * settings.accumulation, seed)
    read = [usable[index] for index in order]
    model, dtype, computed = loaded.model, loaded.dtype, loaded.model.dtype
    # A model that was loaded to be read asks for no gradients.
    model.float().requires_grad_(True)
    peft_config = None
    architecture = describe(model)
    layers = architecture.layers
    watch = None
    if settings.transport_weight:
        watch = _watch(architecture, goals, settings)
    if settings.lora_rank:
        names = sorted({views[name].module_name for views in layers for name in _LORA_TARGETS if name in views})
        peft_config = lora(r=settings.lora_rank, lora_alpha=2 * settings.lora_rank, target_modules=names)
    if transported:
        # With LoRA the base weights stand still, so a residual beside them and one within them are the same.
        # Nor is a residual held beside an embedding: where the head is tied to it, the head would not see it.
        beside = settings.residual == "frozen" and not settings.lora_rank
        apart: dict[bool, list[TransportedNeurons]] = {True: [], False: []}
        for item in transported:
            apart[beside and group_of(item.projection) != STREAM].append(item)
        fuse(architecture.views, apart[False], alpha)
        attach_residual(layers, apart[True], alpha)
    with card_kept(loaded.device):
        make = partial(
            make_trainer,
            sft,
            loaded,
            (encoded, labels),
            read,
            teacher,
            watch,
            settings,
            seed,
            work,
            peft_config,
            progress,
            processes,
        )
        try:
            passes = PassTraining(make, loaded, settings, watch, work, note, processes)
            trainer, checkpoint = passes.run(share)
            trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
            curve = [(entry["step"], float(entry["loss"])) for entry in trainer.state.log_history if "loss" in entry]
            if settings.lora_rank:
                trainer.model.merge_and_unload()
        finally:
            # After an error too: a caller's model must not stay dressed up. What continues is in `work`.
            fold_residual(model)
            if settings.gradient_checkpointing:
                model.gradient_checkpointing_disable()
            vars(model).pop("forward", None)  # trl's and accelerate's wrappers
    if not all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters()):
        # Its checkpoints lead nowhere else; a training with other settings reads nothing of them.
        if processes.is_first:
            shutil.rmtree(work, ignore_errors=True)
        raise AdaptationError(
            f"{loaded.reference}: the training diverged; lower adaptation.learning_rate "
            f"(now {settings.learning_rate:g})"
        )
    model.to(dtype=dtype)  # type: ignore[call-arg]
    if computed != dtype:  # it was widened when it was loaded
        model.to(dtype=computed)  # type: ignore[call-arg]
    model.eval().requires_grad_(False)
    processes.from_first(lambda: shutil.rmtree(work, ignore_errors=True))
    return AdaptationReport(
        steps=settings.steps,
        resumed=0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2]),
        tokens=sum(len(encoded[text]) for text in read),
        seconds=time.perf_counter() - began,
        loss_curve=curve,
        aligned=None if teacher is None else teacher.aligned_share,
        trained=trained,
    )


def training_libraries(settings: AdaptationSettings) -> tuple[Any, Any]:
    """The packages that a training needs: trl, and of peft LoraConfig where ``lora_rank`` asks for it, else None.

    Raises:
        MissingExtraError: One of them is not installed.
    """
    try:
        import trl

        if settings.lora_rank:
            import peft

            return trl, peft.LoraConfig
    except ImportError:
        raise MissingExtraError(f'training needs trl and peft: pip install "{DISTRIBUTION}[adapt]"') from None
    return trl, None


def _encode(
    loaded: LoadedModel, texts: Sequence[str], settings: AdaptationSettings
) -> tuple[list[list[int]], list[list[Span]]]:
    """Token ids with an end-of-text token, and where in the text each token lies."""
    tokenizer = loaded.tokenizer
    refuse_without_rows(loaded.reference.text, tokenizer, loaded.embedding_rows, texts)
    found = tokenizer(list(texts), return_offsets_mapping=tokenizer.is_fast, verbose=False)
    encoded, spans = [], []
    for row, ids in enumerate(found["input_ids"]):
        of_text = list(found["offset_mapping"][row]) if tokenizer.is_fast else []
        if tokenizer.eos_token_id is not None and (not ids or ids[-1] != tokenizer.eos_token_id):
            ids, of_text = [*ids, tokenizer.eos_token_id], [*of_text, (0, 0)]
        encoded.append(list(ids[: settings.max_tokens]))
        spans.append(of_text[: settings.max_tokens])
    return encoded, spans


def _labels(
    loaded: LoadedModel, encoded: Sequence[list[int]], spans: Sequence[list[Span]], prompts: Sequence[int]
) -> list[list[int]]:
    """Token ids where they belong to a completion or end the text, -100 elsewhere."""
    if not any(prompts):
        raise AdaptationError(
            "adaptation.completions_only needs prompts with completions (a chat column, or several columns as a+b); "
            "these are plain texts"
        )
    if not loaded.tokenizer.is_fast:
        raise TokenizerError(
            f"{loaded.reference}: completions_only needs to know where tokens lie in a text; this tokenizer is slow"
        )
    labels = []
    for ids, of_text, prompt in zip(encoded, spans, prompts, strict=True):
        # A special token at the end closes the completion; one before it belongs to the prompt's frame.
        last = len(ids) - 1
        kept = [
            end > max(start, prompt) or (end <= start and position == last)
            for position, (start, end) in enumerate(of_text)
        ]
        labels.append([token if asked else -100 for token, asked in zip(ids, kept, strict=True)])
    return labels


def _watch(architecture: Architecture, goals: FeatureGoals | None, settings: AdaptationSettings) -> FeatureWatch:
    """What measures the features, where it can."""
    if goals is None:
        raise ValueError("transport_weight needs goals")
    if settings.lora_rank or settings.gradient_checkpointing:
        what = "lora_rank" if settings.lora_rank else "gradient_checkpointing"
        raise AdaptationError(f"adaptation.transport_weight cannot be had together with {what}; set one of them to 0")
    return FeatureWatch(architecture, goals)
