"""The target, the fused model and the source answer a prompt, one after the other, heard while they speak.

One model is in memory at a time, for all visitors together, and never beside a merge (`RunStore.alone`). The thread
that speaks holds the locks, not the page that listens, and stops by itself when nobody listens any more.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from tmerge.errors import TmergeError
from tmerge.models import LoadedModel, give_back_memory, load_model
from tmerge.recipe import Recipe
from tmerge.ui.server.runs import RunStore

__all__ = ["MOST_CHARACTERS", "MOST_TOKENS", "ROLES", "PromptError", "Question", "Said", "Speaker"]

ROLES = ("target", "fused", "source")
MOST_CHARACTERS = 4000
MOST_TOKENS = 256

State = Literal["waiting", "loading", "speaking", "done", "stopped", "failed"]

# Seconds that a model may speak, that a speaker goes on though nobody listens, and to wait for another speaker.
_SPEAKING = 180.0
_UNHEARD = 15.0
_PATIENCE = 30.0
# Seconds between two looks of the page at what was said.
_PAUSE = 0.1

_log = logging.getLogger(__name__)


class PromptError(TmergeError):
    """The question cannot be put: no prompt, or numbers out of range."""


@dataclass(frozen=True)
class Question:
    """What the three models are asked.

    Attributes:
        prompt: Text.
        chat: Put it into the model's chat template, where it has one.
        tokens: Most new tokens of each answer.
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
    """

    state: State = "waiting"
    text: str = ""
    note: str = "waiting"


@dataclass
class _Talk:
    """One question on its way through the three models."""

    recipe: Recipe
    folder: Path
    question: Question
    said: dict[str, Said] = field(default_factory=lambda: {role: Said() for role in ROLES})
    version: int = 0
    stop: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)
    heard: float = field(default_factory=time.monotonic)

    def tell(self, role: str, **changes: Any) -> None:
        self.said = {**self.said, role: replace(self.said[role], **changes)}
        self.version += 1

    @property
    def unwanted(self) -> bool:
        return self.stop.is_set() or time.monotonic() - self.heard > _UNHEARD

    def end(self, state: State, note: str) -> None:
        """Of all models that have not spoken to their end."""
        for role, said in self.said.items():
            if said.state in ("waiting", "loading", "speaking"):
                self.tell(role, state=state, note=note if said.state == "waiting" else f"{said.note}, {note}")


class Speaker:
    """Has models answer, one at a time.

    Args:
        store: The app's runs, whose merges it waits for.
    """

    def __init__(self, store: RunStore) -> None:
        self._store = store
        self._one = threading.Lock()
        self._talks: dict[str, _Talk] = {}

    def ask(self, visitor: str, recipe: Recipe, folder: Path, question: Question) -> Iterator[dict[str, Said]]:
        """Put a question to the three models of a run.

        Args:
            visitor: Who may `stop` it.
            recipe: The run's, resolved.
            folder: The run's, which holds the fused model.
            question: What is asked.

        Yields:
            Role -> its answer so far, whenever there is more of it.

        Raises:
            PromptError: The question cannot be put.
        """
        talk = _Talk(recipe, folder, question.checked())
        self.stop(visitor)
        self._talks[visitor] = talk
        threading.Thread(target=self._work, args=(talk,), name="tmerge-speaker", daemon=True).start()
        seen = -1
        try:
            while True:
                talk.heard = time.monotonic()
                over = talk.over.is_set()
                if talk.version != seen:
                    seen = talk.version
                    yield talk.said
                if over:
                    return
                talk.over.wait(_PAUSE)
        finally:
            talk.stop.set()
            if self._talks.get(visitor) is talk:
                del self._talks[visitor]

    def stop(self, visitor: str) -> None:
        """End what a visitor has asked: between two tokens, and after a model that is being loaded is there."""
        talk = self._talks.get(visitor)
        if talk is not None:
            talk.stop.set()

    # -- the thread that speaks ----------------------------------------------------------------------------------

    def _work(self, talk: _Talk) -> None:
        try:
            if not self._turn(talk):
                return
            try:
                with self._store.alone(patience=1):
                    for role in ROLES:
                        if talk.unwanted:
                            return
                        _speak(talk, role)
            finally:
                self._one.release()
        except TmergeError as error:
            talk.end("failed", str(error))
        finally:
            talk.end("stopped", "stopped")
            talk.over.set()

    def _turn(self, talk: _Talk) -> bool:
        """Wait for those who speak now."""
        until = time.monotonic() + _PATIENCE
        while not self._one.acquire(timeout=_PAUSE):
            if talk.unwanted:
                return False
            if time.monotonic() > until:
                talk.end("failed", "the models are answering someone else; try again in a minute")
                return False
        return True


def _speak(talk: _Talk, role: str) -> None:
    """Load one model, have it answer, and let it go."""
    talk.tell(role, state="loading", note="loading the model")
    try:
        reference = str(talk.folder) if role == "fused" else getattr(talk.recipe, role)
        loaded = load_model(reference, dtype=talk.recipe.dtype, device=talk.recipe.device, widen=True)
        try:
            _answer(talk, role, loaded)
        finally:
            del loaded
            give_back_memory()
    except TmergeError as error:
        talk.tell(role, state="failed", note=str(error).replace(str(talk.folder), "the fused model"))
    except Exception:  # noqa: BLE001 - any model may fail in its own way: the log has it, the visitor its number
        number = secrets.token_hex(4)
        _log.exception("a model could not answer, fault %s", number)
        talk.tell(role, state="failed", note=f"this model could not answer; the server's log has it under {number}")


@torch.inference_mode()
def _answer(talk: _Talk, role: str, loaded: LoadedModel) -> None:
    question = talk.question
    # Typed as a module, whose attributes may be tensors.
    model: Any = loaded.model
    ids, how = _prompt_ids(loaded, question)
    room = getattr(model.config, "max_position_embeddings", None)
    tokens = question.tokens if room is None else min(question.tokens, room - ids.shape[1])
    if tokens < 1:
        raise PromptError(f"the prompt is {ids.shape[1]:,} tokens long, where this model reads {room:,}; shorten it")
    talk.tell(role, state="speaking", note=how)
    settings = GenerationConfig(
        max_new_tokens=tokens,
        do_sample=question.temperature > 0,
        **({"temperature": question.temperature, "top_k": 0} if question.temperature > 0 else {}),
        eos_token_id=model.generation_config.eos_token_id if model.generation_config else None,
        pad_token_id=loaded.pad_id,
    )
    heard = _Heard(talk, role, loaded, how)
    halt = _Halt(talk)
    # Of the CPU and of where the model is: on ZeroGPU torch names a GPU that this process must not touch.
    with torch.random.fork_rng(devices=[loaded.device] if loaded.device.type == "cuda" else []):
        torch.manual_seed(question.seed)
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
            streamer=heard,
            stopping_criteria=StoppingCriteriaList([halt]),
        )
    if halt.why is not None:
        talk.tell(role, state="stopped", note=f"{heard.words()}, {halt.why}")
    else:
        talk.tell(role, state="done", note=heard.words())


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

    def __init__(self, talk: _Talk, role: str, loaded: LoadedModel, how: str) -> None:
        self.talk, self.role, self.loaded, self.how = talk, role, loaded, how
        self.ids: list[int] = []
        self.prompt = True
        self.began = time.monotonic()

    def put(self, value: torch.Tensor) -> None:
        """Token ids, the prompt's first."""
        if self.prompt:
            self.prompt = False
            return
        self.ids += value.flatten().tolist()
        text = str(self.loaded.tokenizer.decode(self.ids, skip_special_tokens=True))
        # Half of a letter: the rest of its bytes is in the next token.
        self.talk.tell(self.role, text=text.rstrip("\ufffd"), note=self.words())

    def end(self) -> None:
        """Nothing is held back."""

    def words(self) -> str:
        """How it was asked, how many tokens it said, and how fast."""
        seconds = max(time.monotonic() - self.began, 1e-3)
        number = len(self.ids)
        return f"{number} token{'' if number == 1 else 's'} in {seconds:.1f} s, {self.how}"


class _Halt(StoppingCriteria):
    """Stops a model that its visitor wants silent, that nobody hears, or that takes too long."""

    def __init__(self, talk: _Talk) -> None:
        self.talk = talk
        self.until = time.monotonic() + _SPEAKING
        self.why: str | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """(1,) whether to stop."""
        if self.talk.unwanted:
            self.why = "stopped"
        elif time.monotonic() > self.until:
            self.why = f"stopped after {_SPEAKING:.0f} s"
        return torch.full((input_ids.shape[0],), self.why is not None, device=input_ids.device)
