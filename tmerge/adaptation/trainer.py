"""The trainer of an adaptation: trl's, over texts in a given order, in one process or in several.

Several processes train as torch's distributed data parallel does: each holds the model, reads its part of the texts of
every step, and takes the mean of all gradients. A step's texts, and how many there are, stay those of one process, and
the loss is the mean over all of their tokens, so that the weights are the same but for the order in which sums are
rounded (and for what a model that drops out draws).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tmerge.adaptation.distillation import distillation_loss
from tmerge.adaptation.goals import FeatureWatch
from tmerge.adaptation.passes import StepShare
from tmerge.adaptation.teacher import Teacher
from tmerge.models import LoadedModel
from tmerge.processes import Processes
from tmerge.recipe import AdaptationSettings

__all__ = ["card_kept", "make_trainer", "training_arguments"]

# A checkpoint of a large model is many gigabytes: few are written, and the last alone is kept.
_CHECKPOINTS = 4


def make_trainer(
    trl: Any,
    loaded: LoadedModel,
    texts: tuple[Sequence[list[int]], Sequence[list[int]]],
    read: Sequence[int],
    teacher: Teacher | None,
    watch: FeatureWatch | None,
    settings: AdaptationSettings,
    seed: int,
    work: Path,
    peft_config: Any,
    progress: Callable[[int, int], None] | None,
    processes: Processes,
    share: StepShare,
) -> Any:
    """Trl's SFTTrainer over the texts in the given order.

    Args:
        trl: The library.
        loaded: The model, in float32.
        texts: Token ids of each, and its labels.
        read: Which text is read when.
        teacher: What the source predicts, for ``objective: distill``.
        watch: What measures the features, for ``transport_weight``.
        settings: The recipe's ``adaptation`` section.
        seed: Of what is drawn.
        work: Holds the checkpoints.
        peft_config: Of LoRA, where it is asked for.
        progress: Called with (steps done, all).
        processes: That train together.
        share: Of this one in a step.
    """
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    encoded, labels = texts
    pads = DataCollatorForLanguageModeling(pad_token_id=loaded.pad_id)

    def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = pads([{name: example[name] for name in ("input_ids", "labels")} for example in examples])
        # Which text it is, for the teacher; it is no input of the model.
        return batch | {"text": torch.tensor([example["text"] for example in examples])}

    def told_loss(model: Any, inputs: dict[str, Any], texts: list[int], teacher: Teacher, items: Any) -> Any:
        asked = {name: value for name, value in inputs.items() if name != "labels"}
        logits = model(**asked, use_cache=False).logits
        return distillation_loss(logits, inputs["labels"], teacher, texts, settings, items)

    def drawn(texts: list[int], inputs: dict[str, Any]) -> Any:
        if watch is None:
            return 0.0
        # Calibration read the texts without the end-of-text token that training adds.
        asked = inputs["attention_mask"] * (inputs["input_ids"] != loaded.tokenizer.eos_token_id)
        # Over the passes of one step the mean, as the loss is.
        return settings.transport_weight * watch.distance(texts, asked) / share.passes

    class Told(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if progress is not None:
                progress(state.global_step, state.max_steps)

    class Trainer(trl.SFTTrainer):
        def __init__(self, **keywords: Any) -> None:
            super().__init__(**keywords)
            # The loss is over the tokens of all passes of a step, and of all processes, whatever the model's own
            # `forward` takes: of some, it would else be the mean of the passes' means.
            self.model_accepts_loss_kwargs = True

        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            texts = inputs.pop("text").tolist()
            if teacher is None:
                loss = super().compute_loss(model, dict(inputs), num_items_in_batch=num_items_in_batch)
            else:
                # Those tokens are counted over all processes, whose gradients are averaged.
                loss = told_loss(model, inputs, texts, teacher, num_items_in_batch) * processes.count
            return loss + drawn(texts, inputs)  # outputs are asked for in an evaluation only, and there is none

        def try_longest(self) -> None:
            """The dearest pass, on this process alone, beside as much as a step holds; only gradients remain of it.

            Raises:
                RuntimeError: Out of memory (`is_out_of_memory`).
            """
            if self.args.gradient_checkpointing:
                self.model.gradient_checkpointing_enable(self.args.gradient_checkpointing_kwargs)
            longest = sorted(dict.fromkeys(read), key=lambda text: len(encoded[text]))
            chosen = (longest * share.texts)[-share.texts :]
            rows = [{"input_ids": encoded[text], "labels": labels[text], "text": text} for text in chosen]
            inputs = self._prepare_inputs(collate(rows))
            texts = inputs.pop("text").tolist()
            trained = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
            # The optimiser's two moments, and what gradients are exchanged in.
            held = torch.empty(3 * trained, device=self.args.device)
            cards = [loaded.device] if loaded.device.type == "cuda" else []
            with torch.random.fork_rng(cards), self.compute_loss_context_manager():
                if teacher is None:
                    # Trl's own loss asks the other processes.
                    loss = self.model.train()(**inputs, use_cache=False).loss
                else:
                    loss = told_loss(self.model.train(), inputs, texts, teacher, None)
                loss = loss + drawn(texts, inputs)
            loss.backward()
            del held

    config = training_arguments(trl, loaded.device, share, settings, seed, work, processes)
    rows = [{"input_ids": encoded[text], "labels": labels[text], "text": text} for text in read]
    from transformers.trainer_callback import PrinterCallback

    trainer = Trainer(
        model=loaded.model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        data_collator=collate,
        processing_class=loaded.tokenizer,
        peft_config=peft_config,
        callbacks=[Told()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def training_arguments(
    trl: Any,
    device: torch.device,
    share: StepShare,
    settings: AdaptationSettings,
    seed: int,
    work: Path,
    processes: Processes,
) -> Any:
    """Trl's SFTConfig; the arguments are those of `make_trainer`, whose model lies on `device`."""
    with warnings.catch_warnings():
        # transformers is renaming gradient_checkpointing, which trl still asks for by its old name.
        warnings.simplefilter("ignore", FutureWarning)
        config = trl.SFTConfig(
            output_dir=str(work),
            max_steps=settings.steps,
            per_device_train_batch_size=share.texts,
            gradient_accumulation_steps=share.passes,
            # What is not trained is the same everywhere, the frozen residual with it.
            ddp_broadcast_buffers=False,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=round(settings.warmup * settings.steps),
            gradient_checkpointing=settings.gradient_checkpointing,
            bf16=has_bfloat16(device),
            use_cpu=device.type == "cpu",
            save_strategy="steps",
            save_steps=max(1, -(-settings.steps // _CHECKPOINTS)),
            save_total_limit=1,
            logging_steps=1,
            logging_nan_inf_filter=False,
            report_to=[],
            disable_tqdm=True,
            seed=seed,
            data_seed=seed,
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            dataloader_pin_memory=False,
            max_length=None,
        )
    # Of several cards that one process sees, transformers would use all, with a batch for each of them. This is what it
    # does itself for a model that lies on several; the cards are counted when they are first asked for.
    config._n_gpu = min(config.n_gpu, 1)
    if processes.count == 1 and device.type == "cuda" and device.index is not None:
        # transformers takes the first card for one process, and accelerate the current one, whichever was named. Both
        # have looked by now, and keep what they found.
        vars(config)["_setup_devices"] = config.distributed_state.device = device
        torch.cuda.set_device(device)
    return config


@contextmanager
def card_kept(device: torch.device) -> Iterator[None]:
    """While open a training may choose its card; what names none has the one of before again afterwards."""
    if device.type != "cuda":
        yield
        return
    from accelerate import PartialState

    card, shared = torch.cuda.current_device(), PartialState._shared_state
    before = shared.get("device", torch.device("cuda", card))
    try:
        yield
    finally:
        torch.cuda.set_device(card)
        if "device" in shared:
            shared["device"] = before


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported())
    return False
