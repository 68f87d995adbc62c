"""Which column of a dataset holds the text, and how a row becomes one text."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import TemplateError

from tmerge.calibration.files import AS_A_FILE
from tmerge.errors import DatasetError

__all__ = ["Column", "Renderer", "choose_column"]

_TEXT_NAMES = ("text", "content", "sentence", "document", "body", "article", "raw_content", "passage")
_CHAT_NAMES = ("messages", "conversations", "conversation", "chat", "dialogue", "dialog")
_PAIRS = (
    ("instruction", "input", "output"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("query", "response"),
)
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}

# What stands for an answer where it is asked at which character a template writes it.
_PLACEHOLDER = "\N{WHITE SQUARE}answer\N{WHITE SQUARE}"
# The day that Llama 3's template names where it is told none. Written before a template, it hides the clock from it, or
# the same conversation would be another text every day, and on another side of the split.
_DAY = {"d": "26", "m": "07", "Y": "2024", "y": "24", "b": "Jul", "B": "July", "a": "Fri", "A": "Friday", "j": "208"}
_DAY |= {"H": "12", "I": "12", "M": "00", "S": "00", "p": "PM", "-d": "26", "-m": "7"}
_CLOCK_NAME = "strftime_now"
_CLOCK = (
    "{%- macro "
    + _CLOCK_NAME
    + "(format) %}{{ format"
    + "".join(f"|replace('%{code}', '{value}')" for code, value in _DAY.items())
    + " }}{%- endmacro %}"
)


@dataclass(frozen=True)
class Column:
    """What is read of each row.

    Attributes:
        names: The column, or several whose texts are joined by a newline, empty ones left out.
        kind: ``chat`` holds a list of messages, ``text`` a string.
    """

    names: tuple[str, ...]
    kind: Literal["text", "chat"] = "text"

    def __str__(self) -> str:
        return "+".join(self.names)


def choose_column(
    wanted: str | None,
    columns: Sequence[str],
    examples: Sequence[Mapping[str, Any]],
    where: str,
    *,
    further: bool = False,
) -> Column:
    """Decide what is read of each row.

    What is not asked for is found in this order: a chat column by its usual name (``messages``, ``conversations``);
    a text column by its usual name (``text``, ``content``, ``sentence``, ...); a prompt and its answer
    (``instruction`` + ``input`` + ``output``, ``prompt`` + ``completion``, ``question`` + ``answer``, ...), joined by a
    newline; the only column of strings. Never a guess between two.

    Args:
        wanted: The recipe's ``column``: a name, or several as ``instruction+output``; None to find it.
        columns: All columns of the dataset, as far as they are known.
        examples: Some rows, to see what the columns hold.
        where: The dataset, for the error.
        further: As `read_texts`: the error names no key.

    Raises:
        DatasetError: There is no such column, it holds no text, or there is more than one candidate.
    """
    listed = ", ".join(columns) or "none"
    if wanted is not None:
        names = (wanted,) if wanted in columns else tuple(name.strip() for name in wanted.split("+"))
        for name in names:
            if name not in columns:
                close = difflib.get_close_matches(name, columns, 1, cutoff=0.5)
                hint = f"did you mean {close[0]!r}? (columns: {listed})" if close else f"its columns are {listed}"
                raise DatasetError(f"dataset {where}: no column {name!r}; {hint}")
        kinds = [_kind(name, examples) for name in names]
        if kinds == ["chat"]:
            return Column(names, "chat")
        for name, kind in zip(names, kinds, strict=True):
            if kind not in ("text", "empty"):
                held = "a list of messages, which cannot be joined" if kind == "chat" else f"{kind}, not text"
                raise DatasetError(f"dataset {where}: column {name!r} holds {held}; its columns are {listed}")
        return Column(names)
    kinds_of = {name: _kind(name, examples) for name in columns}
    by_name = {name.lower(): name for name in reversed(columns)}
    for name in _CHAT_NAMES:
        if name in by_name and kinds_of[by_name[name]] == "chat":
            return Column((by_name[name],), "chat")
    for name in _TEXT_NAMES:
        if name in by_name and kinds_of[by_name[name]] == "text":
            return Column((by_name[name],))
    for pair in _PAIRS:
        if all(kinds_of.get(by_name.get(name, "")) in ("text", "empty") for name in pair):
            return Column(tuple(by_name[name] for name in pair))
    for kind in ("text", "chat"):
        candidates = [name for name, held in kinds_of.items() if held == kind]
        if len(candidates) == 1:
            return Column((candidates[0],), "chat" if kind == "chat" else "text")
    usable = [str(name) for name, held in kinds_of.items() if held in ("text", "chat")]
    if not usable:
        held = ", ".join(f"{name} ({held})" for name, held in kinds_of.items()) or "none"
        raise DatasetError(f"dataset {where}: no column holds text: {held}; use another dataset, or write one of text")
    remedy = f"set calibration.column to one of {', '.join(usable)}, or to several as a+b"
    if further:
        remedy = f"of {', '.join(usable)} none can be chosen here: {AS_A_FILE}"
    raise DatasetError(f"dataset {where}: no one column is the text; {remedy}")


def _kind(name: str, examples: Sequence[Mapping[str, Any]]) -> str:
    """``text``, ``chat``, ``empty`` (nothing seen), or the name of the type that the column holds."""
    for row in examples:
        value = row.get(name)
        if isinstance(value, str):
            return "text"
        if value is not None and (messages := _messages(value)) is not None:
            if messages:
                return "chat"
        elif value is not None:
            return type(value).__name__
    return "empty"


def _messages(value: Any) -> list[tuple[str, str]] | None:
    """(role, content) pairs; None for anything that is no conversation."""
    if isinstance(value, Mapping) and value and all(isinstance(column, (list, tuple)) for column in value.values()):
        # Arrow keeps a list of structs as a struct of lists in some datasets.
        value = [dict(zip(value, fields, strict=False)) for fields in zip(*value.values(), strict=False)]
    if not isinstance(value, (list, tuple)):
        return None
    messages = []
    for entry in value:
        if not isinstance(entry, Mapping):
            return None
        role, content = ("role", "content") if "role" in entry else ("from", "value")
        if role not in entry or content not in entry:
            return None
        speaker = str(entry[role])
        messages.append((_ROLES.get(speaker, speaker), _content(entry[content])))
    return messages


def _content(content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, (list, tuple)):
        # Parts of a multimodal message: only the written ones can be read here.
        texts = [part.get("text") for part in content if isinstance(part, Mapping)]
        return "\n".join(text for text in texts if isinstance(text, str))
    return ""


class Renderer:
    """Makes one text of each row.

    A conversation goes through the chat template of one tokenizer, the target's, so that both models read the same
    characters. The template's beginning-of-text token is left out: each model's tokenizer adds its own. Without a
    template, or where it refuses a conversation (roles out of turn), the messages are joined as ``role: content``.

    Args:
        column: What is read.
        where: The dataset, for errors.
        tokenizer: The target's; only asked for a chat column.
    """

    def __init__(self, column: Column, where: str, tokenizer: Any | None = None) -> None:
        self.column = column
        self.where = where
        self.tokenizer = tokenizer if _chat_template(tokenizer) else None
        self.joined = 0

    def __call__(self, row: Mapping[str, Any], where: str) -> str:
        """The row's text, stripped; empty where the row has none.

        Args:
            row: Column names to values.
            where: The row is, for the error.

        Raises:
            DatasetError: The column holds something else than text in this row.
        """
        if self.column.kind == "chat":
            text = self._conversation(row.get(self.column.names[0]), where)
        else:
            parts = [self._string(row.get(name), name, where) for name in self.column.names]
            text = "\n".join(part for part in parts if part)
        # A lone surrogate, as JSON can carry, is no character and no tokenizer takes it.
        return text.encode("utf-8", "replace").decode("utf-8").strip()

    def prompt(self, row: Mapping[str, Any], text: str) -> int:
        """Characters before what answers a prompt in a row: the last of several columns, the assistant's last message.

        Args:
            row: As it was rendered.
            text: What it was rendered as.

        Returns:
            0 where the row is one text.
        """
        if self.column.kind == "text":
            last = row.get(self.column.names[-1]) if len(self.column.names) > 1 else None
            # It ends the text.
            return len(text) - len(last.strip()) if isinstance(last, str) and last.strip() else 0
        messages = _messages(row.get(self.column.names[0]) or []) or []
        answers = [place for place, (role, content) in enumerate(messages) if role == "assistant" and content.strip()]
        if not answers:
            return 0
        place = answers[-1]
        written, _ = self._written([*messages[:place], ("assistant", _PLACEHOLDER), *messages[place + 1 :]])
        before, found, _ = written.partition(_PLACEHOLDER)
        if found and text.startswith(before):
            return len(text) - len(text[len(before) :].lstrip())
        # A template that writes the beginning by what answers it.
        return max(text.rfind(messages[place][1].strip()), 0)

    def notes(self) -> list[str]:
        """What a reader of the report should know."""
        if self.column.kind != "chat":
            return []
        if self.tokenizer is None:
            return ["the target has no chat template: conversations were joined as lines of role: content"]
        refused = f"{self.joined} conversations that the target's chat template refuses were joined as role: content"
        dated = "; where it names the day, that is 26 July 2024" if _CLOCK_NAME in self._template else ""
        said = f"conversations were written with the target's chat template{dated}"
        return [said, *([refused] if self.joined else [])]

    def _string(self, value: Any, name: str, where: str) -> str:
        if value is None:
            return ""
        if not isinstance(value, str):
            raise self._wrong(name, value, where, "text")
        return value.strip()

    def _wrong(self, name: str, value: Any, where: str, expected: str) -> DatasetError:
        return DatasetError(
            f"dataset {self.where}, {where}: column {name!r} holds {type(value).__name__}, not {expected}; "
            "name another column, or mend the row"
        )

    def _conversation(self, value: Any, where: str) -> str:
        messages = [] if value is None else _messages(value)
        if messages is None:
            raise self._wrong(self.column.names[0], value, where, "a list of messages")
        if not any(content.strip() for _, content in messages):
            return ""
        text, joined = self._written(messages)
        self.joined += joined and self.tokenizer is not None
        return text

    @property
    def _template(self) -> str:
        return _chat_template(self.tokenizer)

    def _written(self, messages: Sequence[tuple[str, str]]) -> tuple[str, bool]:
        """A conversation as one text, and whether its messages were joined, without the template."""
        if self.tokenizer is not None:
            chat = [{"role": role, "content": content} for role, content in messages]
            template = self._template
            # A template that asks for the time in a condition of its own finds the macro as it would the function.
            clock = _CLOCK if _CLOCK_NAME in template else ""
            try:
                text = self.tokenizer.apply_chat_template(chat, chat_template=clock + template, tokenize=False)
                return text.removeprefix(self.tokenizer.bos_token or "").strip(), False
            except (TemplateError, ValueError, TypeError, KeyError):
                pass
        return "\n".join(f"{role}: {content.strip()}" for role, content in messages), True


def _chat_template(tokenizer: Any | None) -> str:
    """A tokenizer's own; empty where it has none, or several without saying which is for plain conversations."""
    if not getattr(tokenizer, "chat_template", None):
        return ""
    try:
        return str(tokenizer.get_chat_template())  # type: ignore[union-attr]
    except ValueError:
        return ""
