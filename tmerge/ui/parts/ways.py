"""The three ways into a merge, at the top of the Choose tab, each with a recorded run to look at where there is one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from tmerge.quantities import duration_words
from tmerge.ui.context import AppContext
from tmerge.ui.parts.form import from_preset, with_value
from tmerge.ui.parts.returning import open_again
from tmerge.ui.parts.safe import render
from tmerge.ui.parts.style import markup
from tmerge.ui.server.examples import example_id, shipped_report

__all__ = ["WAYS", "Way", "begin_with", "build_ways"]


@dataclass(frozen=True)
class Way:
    """One way in.

    Attributes:
        name: Of its button's element.
        title: What is done.
        line: For whom, and what to expect.
        button: What it is begun with.
        preset: Whose settings it takes.
        named: Whether it takes the preset's models too; otherwise they are to be named.
        form: How it writes the result: ``save.form``.
        example: Name of the recorded run of it; None where there is none.
    """

    name: str
    title: str
    line: str
    button: str
    preset: str
    named: bool = False
    form: str = "merged"
    example: str | None = None


WAYS = (
    Way(
        "relatives",
        "Merge relatives",
        "Your target was pruned or distilled from the source's family: their neurons correspond, and what the source "
        "learned in fine-tuning is carried over through that, without training.",
        "Name two relatives",
        "relatives",
        example="relatives",
    ),
    Way(
        "adapter",
        "Carry an adapter",
        "You have a LoRA of a large model, and a small model of the same family. Only the large base is read; you get "
        "a LoRA of the small one, or the merged model.",
        "Name an adapter",
        "relatives",
        form="adapter",
    ),
    Way(
        "strangers",
        "Compare strangers",
        "Any two architectures, as in the paper. It rarely helps, and often a control gains as much: the report says "
        "so before you publish.",
        "Use the built-in pair",
        "demo",
        named=True,
        example="strangers",
    ),
)
_MODELS = ("target", "source", "source_base", "adapter")


def begin_with(way: Way) -> dict[str, Any]:
    """The recipe's mapping that a way begins with."""
    draft = from_preset(way.preset)
    if not way.named:
        draft |= {**dict.fromkeys(_MODELS[:2], ""), **dict.fromkeys(_MODELS[2:])}
    return with_value(draft, "save.form", way.form) if way.form != "merged" else draft


def build_ways(app: AppContext) -> list[tuple[Way, gr.Button]]:
    """Lay the ways out; what their buttons write into is the caller's.

    Returns:
        Each way and its button.
    """
    buttons: list[tuple[Way, gr.Button]] = []
    with gr.Row(elem_id="ways", equal_height=True):
        for way in WAYS:
            with gr.Column(min_width=260, elem_classes="card"):
                markup(render("cards.html", "way", title=way.title, line=way.line, told=_told(way)))
                with gr.Row():
                    buttons.append((way, gr.Button(way.button, min_width=120, size="sm", elem_id=f"way-{way.name}")))
                    if way.example is not None:
                        see = gr.Button("See a run", min_width=120, size="sm", elem_id=f"see-{way.example}")
                        open_again(app, see, gr.State(example_id(way.example)), tab="look")
    return buttons


def _told(way: Way) -> str:
    """What the recorded run found, and how long it took."""
    if way.example is None:
        return ""
    report = shipped_report(way.example)
    change = report.evaluation.difference
    seconds = sum(stage.seconds for stage in report.stages)
    return (
        f"The recorded run: {change.value:+.2f} bits per byte [{change.low:+.2f}, {change.high:+.2f}], "
        f"{report.verdict}; it took {duration_words(seconds)}."
    )
