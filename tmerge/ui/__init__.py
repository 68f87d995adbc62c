"""The browser app: name two models, and see what a merge of them would be before anything heavy starts."""

from __future__ import annotations

import gradio as gr

from tmerge.check import check
from tmerge.errors import TmergeError
from tmerge.models import ModelReference
from tmerge.recipe import Recipe

__all__ = ["build", "check_card"]

_ROWS = (
    ("architecture", "architecture"),
    ("parameters", "parameters"),
    ("layers", "layers"),
    ("width", "hidden_size"),
    ("heads", "heads"),
    ("licence", "licence"),
)


def check_card(target: str, source: str) -> str:
    """`tmerge check` as Markdown, or the one line that says why not.

    Args:
        target: Model reference; from a browser only Hub ids and the demo models are read, never paths of this machine.
        source: Likewise.
    """
    try:
        for reference in (target.strip(), source.strip()):
            if ModelReference.parse(reference).path is not None:
                return f"**{_plain(reference)}** is a path; name a Hub id such as `HuggingFaceTB/SmolLM2-135M`."
        facts = check(Recipe(target=target.strip(), source=source.strip())).to_dict()
    except TmergeError as error:
        return f"**{_plain(str(error))}**"
    lines = ["| | target | source |", "|---|---|---|"]
    for label, key in _ROWS:
        lines.append(f"| {label} | {_plain(facts['target'][key])} | {_plain(facts['source'][key])} |")
    for name, shapes in facts["projections"]["matched"].items():
        lines.append(
            f"| projection {name} | {' x '.join(map(str, shapes['target']))} | "
            f"{' x '.join(map(str, shapes['source']))} |"
        )
    lines += ["", *(f"- {_plain(note)}" for note in facts["notes"])]
    estimate = facts["estimate"]
    lines.append(
        f"\nExpected here: {estimate['seconds']:.0f} s, {estimate['memory_bytes'] / 1e9:.1f} GB of memory, "
        f"{estimate['disk_bytes'] / 1e9:.1f} GB of disk ({_plain(estimate['assumes'])}). "
        "Run it with `tmerge merge`."
    )
    return "\n".join(lines)


def build() -> gr.Blocks:
    """The app, to be launched."""
    with gr.Blocks(title="tmerge") as app:
        gr.Markdown("# tmerge\nMerge a source language model into a target of another architecture.")
        with gr.Row():
            target = gr.Textbox("demo:smollm2-135m-instruct", label="Target: the model that is changed")
            source = gr.Textbox("demo:gemma-3-270m", label="Source: the model that is read")
        button = gr.Button("Check", variant="primary")
        result = gr.Markdown()
        button.click(check_card, [target, source], result, api_name="check")
    return app


def _plain(value: object) -> str:
    """Text from a repo, with nothing in it that Markdown or HTML would act on."""
    text = "not stated" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
    return "".join(f"&#{ord(letter)};" if letter in "<>&|`*_[]\"'\\" else letter for letter in text)
