"""A model answers a prompt, heard while it speaks; in a process of its own (`tmerge.child`), whose end lets go of it.

A process is asked of one run's models alone. It keeps each for the next question while as much memory as they take is
free beside them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from tmerge.errors import NotEnoughMemoryError, TmergeError
from tmerge.models import LoadedModel, available_memory, give_back_memory, load_model

__all__ = ["MOST_CHARACTERS", "MOST_TOKENS", "SPEAKING_SECONDS", "PromptError", "Question", "Said", "answer"]

MOST_CHARACTERS = 4000
MOST_TOKENS = 256
SPEAKING_SECONDS = 180.0
"""That a model may speak: it ends by itself at the next token."""

State = Literal["waiting", "loading", "speaking", "done", "stopped", "failed"]


class PromptError(TmergeError):
    """The question cannot be put: no prompt, or numbers out of range."""


@dataclass(frozen=True)
class Question:
    """What a model is asked.

    Attributes:
        prompt: Text.
        chat: Put it into the model's chat template, where it has one.
        tokens: Most new tokens of the answer.
        temperature: 0 for the likeliest token each time.
        seed: Of the draws, the same for each model.
    """

    prompt: str
    chat: bool = True
    tokens: int = 64
    temperature: float = 0.0
    seed: int = 0

    def checked(self) -> Question:
        """The same question.

        Raises:
            PromptError: It cannot be put.
        """
        if not self.prompt.strip():
            raise PromptError("there is no prompt: write one, or take one that is offered")
        if len(self.prompt) > MOST_CHARACTERS:
            raise PromptError(f"the prompt has {len(self.prompt):,} characters; {MOST_CHARACTERS:,} are read at most")
        if not 1 <= self.tokens <= MOST_TOKENS:
            raise PromptError(f"{self.tokens} new tokens cannot be asked for; choose from 1 to {MOST_TOKENS}")
        if not 0 <= self.temperature <= 2:
            raise PromptError(f"the temperature is {self.temperature:g}; choose from 0 to 2")
        if not 0 <= self.seed < 2**32:
            raise PromptError(f"the seed is {self.seed}; choose from 0 to {2**32 - 1}")
        return self


@dataclass(frozen=True)
class Said:
    """One model's answer so far.

    Attributes:
        state: How far it is.
        text: What it said.
        note: In words: how it was asked and how fast it spoke, or why it did not.
        tokens: How many the text is of; a token may be no text yet.
    """

    state: State = "waiting"
    text: str = ""
    note: str = "waiting"
    tokens: int = 0

    def replaces(self, earlier: object) -> bool:
        """As `tmerge.child.Message`: all that was said so far is in the last of them."""
        return True


# (reference, dtype, device) -> the model, the one that was asked last at the end.
_kept: dict[tuple[str, str, str], LoadedModel] = {}


def answer(reference: str, dtype: str, device: str, question: Question, *, listener: Callable[[Said], None]) -> Said:
    """Have a model answer.

    Args:
        reference: As `tmerge.models.load_model`.
        dtype: Likewise.
        device: Likewise.
        question: A checked one.
        listener: Hears the answer so far, at each token; may raise, which ends it.

    Returns:
        The whole answer.

    Raises:
        PromptError: This model cannot be asked that.
        TmergeError: As `tmerge.models.load_model`.
    """
    loaded = _model(reference, dtype, device)
    # Before anything of the prompt: the chat template and the tokenizer are the model's, and may take any time.
    listener(Said("speaking", "", "reading the prompt"))
    try:
        return _answered(loaded, question, listener)
    finally:
        if sum(each.model.get_memory_footprint() for each in _kept.values()) > available_memory(loaded.device):
            _let_go()


def _model(reference: str, dtype: str, device: str) -> LoadedModel:
    key = reference, dtype, device
    loaded = _kept.pop(key, None)
    while loaded is None:
        try:
            loaded = load_model(reference, dtype=dtype, device=device, widen=True)
        except NotEnoughMemoryError:
            if not _kept:
                raise
            _let_go()
    _kept[key] = loaded
    return loaded


def _let_go() -> None:
    _kept.clear()
    give_back_memory()


@torch.inference_mode()
def _answered(loaded: LoadedModel, question: Question, listener: Callable[[Said], None]) -> Said:
    # Typed as a module, whose attributes may be tensors.
    model: Any = loaded.model
    ids, how = _prompt_ids(loaded, question)
    room = getattr(model.config, "max_position_embeddings", None)
    tokens = question.tokens if room is None else min(question.tokens, room - ids.shape[1])
    if tokens < 1:
        raise PromptError(f"the prompt is {ids.shape[1]:,} tokens long, where this model reads {room:,}; shorten it")
    listener(Said("speaking", "", how))
    settings = GenerationConfig(
        max_new_tokens=tokens,
        max_time=SPEAKING_SECONDS,
        do_sample=question.temperature > 0,
        **({"temperature": question.temperature, "top_k": 0} if question.temperature > 0 else {}),
        eos_token_id=model.generation_config.eos_token_id if model.generation_config else None,
        pad_token_id=loaded.pad_id,
    )
    heard = _Heard(loaded, how, listener)
    torch.manual_seed(question.seed)
    model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings, streamer=heard)
    if heard.seconds > SPEAKING_SECONDS:
        said = heard.said("stopped")
        return replace(said, note=f"{said.note}, stopped after {SPEAKING_SECONDS:.0f} s")
    return heard.said("done")


def _prompt_ids(loaded: LoadedModel, question: Question) -> tuple[torch.Tensor, str]:
    """(1, T) token ids of the prompt, and in words how it was put."""
    tokenizer = loaded.tokenizer
    if question.chat and tokenizer.chat_template:
        messages = [{"role": "user", "content": question.prompt}]
        try:
            encoded: Any = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except Exception as error:  # noqa: BLE001 - a template is its authors' program, and fails as it likes
            raise PromptError(f"its chat template does not take this prompt ({type(error).__name__})") from None
        return _with_rows(encoded["input_ids"], loaded), "chat template"
    ids = tokenizer(question.prompt, return_tensors="pt")["input_ids"]
    if ids.shape[1] == 0:
        raise PromptError("its tokenizer makes nothing of this prompt; write another")
    return _with_rows(ids, loaded), "plain text, it has no chat template" if question.chat else "plain text"


def _with_rows(ids: torch.Tensor, loaded: LoadedModel) -> torch.Tensor:
    """The ids, where the model has a row of its embedding for each."""
    if int(ids.max()) >= loaded.embedding_rows:
        token = loaded.tokenizer.convert_ids_to_tokens(int(ids.max()))
        raise PromptError(f"it was never trained on the token {token!r}, which this prompt becomes; write another")
    return ids.to(loaded.device)


class _Heard(BaseStreamer):
    """What a model says, all of it decoded anew at each token.

    ``TextIteratorStreamer`` waits for the space after a word, so a language without spaces is heard at the end only.
    """

    def __init__(self, loaded: LoadedModel, how: str, listener: Callable[[Said], None]) -> None:
        self._loaded, self._how, self._listener = loaded, how, listener
        self._ids: list[int] = []
        self._prompt = True
        self._began = time.monotonic()

    def put(self, value: torch.Tensor) -> None:
        """Token ids, the prompt's first."""
        if self._prompt:
            self._prompt = False
            return
        self._ids += value.flatten().tolist()
        self._listener(self.said("speaking"))

    def end(self) -> None:
        """Nothing is held back."""

    @property
    def seconds(self) -> float:
        """Since it was asked."""
        return max(time.monotonic() - self._began, 1e-3)

    def said(self, state: State) -> Said:
        """All of it, with how it was asked, how many tokens it said, and how fast."""
        text = str(self._loaded.tokenizer.decode(self._ids, skip_special_tokens=True))
        number = len(self._ids)
        note = f"{number} token{'' if number == 1 else 's'} in {self.seconds:.1f} s, {self._how}"
        # Half of a letter: the rest of its bytes is in the next token.
        return Said(state, text.rstrip("\ufffd"), note, number)
