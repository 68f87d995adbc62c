"""The form's fields for the recipe's settings: a few in sight, all others in one fold, by the recipe's sections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr

from tmerge.ui.parts.fields import FIRST, GROUPS, STEP, Setting
from tmerge.ui.parts.form import form_values
from tmerge.ui.parts.style import markup

__all__ = ["SettingFields"]


class SettingFields:
    """Makes each field where the page has it.

    Attributes:
        made: Setting -> its field, so far.
    """

    def __init__(self, begin: Mapping[str, Any]) -> None:
        """Args: the recipe's mapping that the fields begin with."""
        self._values = form_values(begin)
        self.made: dict[Setting, Any] = {}

    def make(self, *keys: str) -> None:
        """Lay out some of `FIRST`, by their keys, within the row that is open."""
        for setting in FIRST:
            if setting.key in keys:
                self.made[setting] = _field(setting, self._values[setting])

    def make_others(self) -> None:
        """Lay out `GROUPS`, in a fold."""
        with gr.Accordion("All settings", open=False, elem_id="settings"):
            for group, settings in GROUPS.items():
                markup(f"<h3>{group}</h3>")
                with gr.Row(equal_height=False, elem_classes="fields"):
                    for setting in settings:
                        self.made[setting] = _field(setting, self._values[setting])

    def shown(self, draft: Mapping[str, Any]) -> dict[Any, Any]:
        """Field -> what it shows for a recipe's mapping."""
        values = form_values(draft)
        return {field: values[setting] for setting, field in self.made.items()}


def _field(setting: Setting, value: Any) -> Any:
    shared: dict[str, Any] = {
        "label": setting.label,
        "info": setting.description,
        "elem_id": setting.element,
        "min_width": 220,
    }
    if setting.kind == "choice":
        return gr.Dropdown(setting.named_choices, value=value, **shared)
    if setting.kind == "several":
        return gr.CheckboxGroup(list(setting.choices), value=value, **shared)
    if setting.kind == "switch":
        return gr.Checkbox(value, **shared)
    if setting.kind == "whole":
        return gr.Number(value, precision=0, **shared)
    if setting.kind == "number":
        return gr.Number(value, step=STEP, **shared)
    return gr.Textbox(value, max_lines=1, **shared)
