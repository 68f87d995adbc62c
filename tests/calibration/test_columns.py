"""Which column is the text, and conversations through a chat template."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any

import pytest

from tests.pico import pico_tokenizer
from tmerge.calibration.columns import Column, Renderer, choose_column
from tmerge.errors import DatasetError

CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": " Hi. "}]
SHARE = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": " Hi. "}]
WRITTEN = "<|user|>\nHello</s>\n<|assistant|>\n Hi. </s>"
JOINED = "user: Hello\nassistant: Hi."


def choose(row: dict[str, Any], wanted: str | None = None) -> Column:
    return choose_column(wanted, list(row), [row], "'d'")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"id": 1, "review": "r"}, "review"),
        ({"title": "t", "text": "x"}, "text"),
        ({"Title": "t", "Sentence": "x"}, "Sentence"),
        ({"source": "s", "messages": CHAT}, "messages"),
        ({"text": "x", "conversations": SHARE}, "conversations"),
        ({"instruction": "i", "input": "", "output": "o"}, "instruction+input+output"),
        ({"instruction": "i", "output": "o", "id": "x"}, "instruction+output"),
        ({"prompt": "p", "completion": "c"}, "prompt+completion"),
        ({"question": "q", "answer": "a", "level": "1"}, "question+answer"),
        ({"n": 1, "turns": CHAT}, "turns"),
    ],
)
def test_a_column_is_found_where_there_is_one(row: dict[str, Any], expected: str) -> None:
    assert str(choose(row)) == expected


@pytest.mark.parametrize(
    "row",
    [
        {"premise": "a", "choice1": "b"},
        {"a": CHAT, "b": CHAT},
        # Neither nothing nor an object can be named: only what would do is.
        {"premise": "a", "choice1": "b", "meta": {"x": 1}, "none": None, "n": 3},
    ],
)
def test_a_column_is_not_guessed(row: dict[str, Any]) -> None:
    with pytest.raises(
        DatasetError, match=f"set calibration.column to one of {', '.join(list(row)[:2])}, or to several as a\\+b"
    ):
        choose(row)
    with pytest.raises(DatasetError, match="none can be chosen here: save what is meant of it as a file") as caught:
        choose_column(None, list(row), [row], "'d'", further=True)
    assert "calibration." not in str(caught.value)


@pytest.mark.parametrize("row", [{"id": 1}, {"messages": [1, 2]}, {"text": 3, "n": {"a": 1}}, {"text": None}])
def test_where_no_column_holds_text_each_is_named_with_what_it_holds(row: dict[str, Any]) -> None:
    kinds = ", ".join(f"{name} ({'empty' if held is None else type(held).__name__})" for name, held in row.items())
    with pytest.raises(DatasetError, match=re.escape(f"no column holds text: {kinds}; use another dataset")):
        choose_column(None, tuple(row), [row], "'d'")


def test_a_column_that_is_named_is_taken() -> None:
    row = {"text": "x", "other": "y", "chat": CHAT, "n": 3, "a+b": "z"}
    assert choose(row, "other") == Column(("other",))
    assert choose(row, "chat") == Column(("chat",), "chat")
    assert choose(row, "other+text") == Column(("other", "text"))
    assert choose(row, "a+b") == Column(("a+b",))
    for wanted, message in {
        "txet": r"no column 'txet'; did you mean 'text'\? \(columns: text, other, chat, n, a\+b\)",
        "zzz": r"no column 'zzz'; its columns are text, other",
        "text+zzz": r"no column 'zzz'",
        "n": r"column 'n' holds int, not text",
        "text+chat": r"column 'chat' holds a list of messages, which cannot be joined",
    }.items():
        with pytest.raises(DatasetError, match=message):
            choose(row, wanted)


def test_a_column_that_is_empty_at_first_can_be_named() -> None:
    assert choose_column("b", ["a", "b"], [{"a": "x", "b": None}], "'d'") == Column(("b",))
    assert choose_column(None, ["a", "b"], [{"a": None}, {"a": "x"}], "'d'") == Column(("a",))


@pytest.mark.parametrize(
    "value",
    [
        CHAT,
        SHARE,
        {"role": ["user", "assistant"], "content": ["Hello", " Hi. "]},
        [{"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "image"}]}, CHAT[1]],
    ],
)
def test_conversations_go_through_the_chat_template(value: Any) -> None:
    column = choose({"messages": value})
    assert column.kind == "chat"
    render = Renderer(column, "'d'", pico_tokenizer(chat=True))
    assert render({"messages": value}, "line 1") == WRITTEN
    assert render.notes() == ["conversations were written with the target's chat template"]
    assert render({"messages": []}, 2) == render({"messages": None}, "line 3") == ""
    with pytest.raises(DatasetError, match="line 4: column 'messages' holds str, not a list of messages"):
        render({"messages": "no"}, "line 4")


@pytest.mark.parametrize("tokenizer", [None, pico_tokenizer()])
def test_without_a_template_messages_are_joined(tokenizer: Any) -> None:
    render = Renderer(Column(("messages",), "chat"), "'d'", tokenizer)
    assert render({"messages": SHARE}, "line 1") == JOINED
    assert "no chat template" in render.notes()[0]


def test_a_conversation_that_the_template_refuses_is_joined_and_counted() -> None:
    tokenizer = pico_tokenizer(chat=True)
    tokenizer.chat_template = (
        "{{ bos_token }}{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}"
        "{{ messages[0]['content'] }}"
    )
    render = Renderer(Column(("messages",), "chat"), "'d'", tokenizer)
    # Each model's tokenizer adds its own BOS, so the template's is left out.
    assert render({"messages": CHAT}, "line 1") == "Hello"
    assert render({"messages": CHAT[::-1]}, "line 2") == "assistant: Hi.\nuser: Hello"
    assert render.notes()[1].startswith("1 conversations that the target's chat template refuses")


DATED = (
    "{{ bos_token }}{% if strftime_now is defined %}{% set day = strftime_now('%d %b %Y') %}{% endif %}"
    "Today: {{ day }}, {{ strftime_now('%B %-d, %Y') }}\n"
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content']|trim }}<|eot_id|>{% endfor %}"
)


def test_a_template_that_names_the_day_writes_the_same_text_on_every_day() -> None:
    tokenizer = pico_tokenizer(chat=True)
    tokenizer.chat_template = DATED
    render = Renderer(Column(("messages",), "chat"), "'d'", tokenizer)
    written = "Today: 26 Jul 2024, July 26, 2024\n<|user|>Hello<|eot_id|><|assistant|>Hi.<|eot_id|>"
    assert render({"messages": CHAT}, "line 1") == written
    assert render.notes() == [
        "conversations were written with the target's chat template; where it names the day, that is 26 July 2024"
    ]
    # It is the clock's template otherwise.
    today = datetime.now().strftime("%d %b %Y")
    assert f"Today: {today}" in tokenizer.apply_chat_template(CHAT, tokenize=False)


@pytest.mark.parametrize("template", [DATED, None])
@pytest.mark.parametrize("answer", ["d", "e", "id", "Hi", "user", " Yes, and more. "])
def test_an_answer_begins_where_the_template_writes_it(template: str | None, answer: str) -> None:
    tokenizer = pico_tokenizer(chat=True)
    tokenizer.chat_template = template
    render = Renderer(Column(("messages",), "chat"), "'d'", tokenizer)
    asked = {"role": "user", "content": f"Say {answer}"}
    said = {"role": "assistant", "content": answer}
    for behind in ([], [{"role": "user", "content": f"Thanks for {answer}"}]):
        row = {"messages": [asked, {"role": "assistant", "content": "no"}, asked, said, *behind]}
        text = render(row, "line 1")
        before = render.prompt(row, text)
        assert text[before:].startswith(answer.strip())
        assert text[:before].endswith("<|assistant|>" if template else "assistant: ")
        assert text[:before].count("Say") == 2
    assert render.prompt({"messages": [asked]}, "x") == 0


def test_an_answer_in_a_column_of_its_own_ends_the_text() -> None:
    render = Renderer(Column(("prompt", "completion")), "'d'")
    row = {"prompt": "Say yes: yes", "completion": " yes "}
    text = render(row, "line 1")
    assert text[render.prompt(row, text) :] == "yes" and text.count("yes") == 3
    assert render.prompt({"prompt": "Say", "completion": None}, "Say") == 0


def test_texts_of_several_columns_are_lines() -> None:
    render = Renderer(Column(("instruction", "input", "output")), "'d'")
    assert render({"instruction": " do ", "input": "", "output": "done"}, "line 1") == "do\ndone"
    assert render({"instruction": None}, "line 2") == ""
    assert render.notes() == []
    with pytest.raises(DatasetError, match=r"dataset 'd', line 3: column 'output' holds int, not text"):
        render({"instruction": "a", "output": 3}, "line 3")
