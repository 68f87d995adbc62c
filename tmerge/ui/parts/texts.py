"""The part of the Choose tab that names the calibration texts: built-in samples, a Hub dataset, or an upload."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from tmerge.calibration import SAMPLES_PREFIX, sample_languages
from tmerge.calibration.files import FILE_SUFFIXES
from tmerge.errors import DatasetError, TmergeError
from tmerge.ui.parts.cards import note
from tmerge.ui.parts.safe import render
from tmerge.ui.parts.style import markup
from tmerge.ui.server.aside import Aside
from tmerge.ui.server.changes import always
from tmerge.ui.server.limits import UPLOAD_PREFIX, AppSettings, refuse_dataset_path
from tmerge.ui.server.search import Choice, DatasetFacts, HubSearch, dataset_facts, file_facts, offered

__all__ = ["KINDS", "TextsPart", "build_texts", "holds_texts", "kind_of", "upload_name"]

KINDS = ("Built-in samples", "Hub dataset", "Upload")
_SAMPLES, _HUB, _UPLOAD = KINDS


@dataclass(frozen=True)
class TextsPart:
    """The components, which `tmerge.ui.tabs.choose` keeps in step with the recipe."""

    kind: gr.Radio
    language: gr.Dropdown
    dataset: gr.Dropdown
    config: gr.Dropdown
    split: gr.Dropdown
    column: gr.Dropdown
    file: gr.File
    hub_rows: gr.Group
    upload_rows: gr.Group
    found: gr.HTML

    @property
    def fields(self) -> list[Any]:
        """Those that `shown` gives values for, in its order."""
        return [
            self.kind,
            self.language,
            self.dataset,
            self.config,
            self.split,
            self.column,
            self.hub_rows,
            self.upload_rows,
        ]


def build_texts(search: HubSearch, settings: AppSettings) -> TextsPart:
    """Lay the part out; what its fields do to the recipe is wired by the caller."""
    kind = gr.Radio(
        KINDS,
        value=_SAMPLES,
        label="Calibration texts",
        info="Both models read them; what their activations have in common on them is the transport",
    )
    language = gr.Dropdown(
        [(name.capitalize(), name) for name in sample_languages()],
        value="indonesian",
        label="Language of the samples",
        info="Sentences that come with tmerge; no network is needed",
        elem_id="texts-language",
    )
    with gr.Group(visible=False) as hub_rows, gr.Row():
        dataset = _box("dataset", "Hub dataset", "Type to search", min_width=240)
        config = _box("config", "Configuration", "Where it has several")
        split = _box("split", "Split", "Part of it", value="train")
    with gr.Group(visible=False) as upload_rows:
        file = gr.File(file_types=list(FILE_SUFFIXES), label="File of texts", height=140, elem_id="texts-file")
        hint = render("choose.html", "upload_hint", suffixes=FILE_SUFFIXES, most=settings.max_upload_bytes)
        markup(hint)
    column = gr.Dropdown(
        [],
        value=None,
        label="Text column",
        info="Found by itself where there is no doubt; several are joined as a+b",
        allow_custom_value=True,
        visible=False,
        elem_id="texts-column",
    )
    found = markup(note(""), elem_id="texts-found")

    names = gr.State([])

    def offer(before: list[Choice], event: gr.KeyUpData, request: gr.Request) -> list[Any]:
        typed = str(event.input_value or "")
        now = offered(search, "dataset", typed, before) if search.settled(request.session_hash, typed) else None
        if now is None:
            return [gr.skip(), gr.skip()]
        return [gr.Dropdown(choices=now[0], info=now[1] or "Type to search"), now[0]]

    dataset.key_up(
        offer,
        names,
        [dataset, names],
        show_progress="hidden",
        trigger_mode="multiple",
        concurrency_limit=16,
        api_visibility="private",
    )
    return TextsPart(kind, language, dataset, config, split, column, file, hub_rows, upload_rows, found)


def _box(name: str, label: str, info: str, *, value: str | None = None, min_width: int = 120) -> gr.Dropdown:
    """A field of a Hub dataset: what is found is offered, and anything can be typed."""
    return gr.Dropdown(
        [value] if value else [],
        value=value,
        label=label,
        info=info,
        allow_custom_value=True,
        min_width=min_width,
        elem_id=f"texts-{name}",
    )


def kind_of(dataset: str) -> str:
    """Which of `KINDS` a recipe's dataset is."""
    if dataset.startswith(SAMPLES_PREFIX):
        return _SAMPLES
    return _UPLOAD if dataset.startswith(UPLOAD_PREFIX) else _HUB


def shown(draft: Mapping[str, Any]) -> list[Any]:
    """What the part's `fields` show for a recipe's mapping."""
    section, dataset = _section(draft)
    kind = kind_of(dataset)
    language = dataset.removeprefix(SAMPLES_PREFIX) if kind == _SAMPLES else None
    known = language in sample_languages()
    words = {key: str(section[key]) if section.get(key) else None for key in ("config", "split", "column")}
    return [
        kind,
        gr.Dropdown(value=language if known else None, visible=kind == _SAMPLES),
        dataset if kind == _HUB else None,
        words["config"],
        words["split"] or "train",
        gr.Dropdown(value=words["column"], visible=kind != _SAMPLES),
        gr.Group(visible=kind == _HUB),
        gr.Group(visible=kind == _UPLOAD),
    ]


def holds_texts(part: TextsPart) -> list[tuple[Any, Callable[[Mapping[str, Any], Any], bool]]]:
    """The part's components that write into the recipe, each with whether a value of it is what a mapping holds."""

    def word(key: str, default: str = "") -> Callable[[Mapping[str, Any], Any], bool]:
        def holds(draft: Mapping[str, Any], value: Any) -> bool:
            section, dataset = _section(draft)
            return kind_of(dataset) != _HUB or str(value or default).strip() == str(section.get(key) or default).strip()

        return holds

    def kind(draft: Mapping[str, Any], value: Any) -> bool:
        return value == kind_of(_section(draft)[1])

    def language(draft: Mapping[str, Any], value: Any) -> bool:
        name = _section(draft)[1].removeprefix(SAMPLES_PREFIX)
        return name not in sample_languages() or value == name

    return [
        (part.kind, kind),
        (part.language, language),
        (part.dataset, word("dataset")),
        (part.config, word("config")),
        (part.split, word("split", "train")),
        (part.column, word("column")),
    ]


def _section(draft: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """The calibration section, and its dataset; "" is one that is still to be named."""
    section = draft.get("calibration")
    section = section if isinstance(section, dict) else {}
    dataset = section.get("dataset", "samples:english")
    return section, dataset if isinstance(dataset, str) else ""


def upload_name(path: str) -> str:
    """A file's own name with nothing in it that a path, YAML or a page would act on.

    Raises:
        DatasetError: It is not a kind of file that is read.
    """
    name = Path(path).name
    stem, suffix = Path(name).stem, Path(name).suffix.lower()
    if suffix not in FILE_SUFFIXES:
        raise DatasetError(f"{name!r} is not a kind of file that is read; upload {', '.join(FILE_SUFFIXES)}")
    return (re.sub(r"[^\w.-]+", "-", stem).strip("-.")[:60] or "texts") + suffix


def look_into(
    aside: Aside,
    settings: AppSettings,
    draft: Mapping[str, Any],
    upload: str | None,
    wanted: Callable[[], bool] = always,
) -> tuple[str, list[Any]]:
    """What the texts hold, as a line, and updates of configuration, split and column.

    Args:
        aside: Where the rows are read.
        settings: Whether paths are refused.
        draft: The recipe's mapping.
        upload: Path of the uploaded file.
        wanted: As for `Aside.ask`.

    Raises:
        SupersededError: It is not wanted any more.
    """
    same = [gr.skip(), gr.skip(), gr.skip()]
    section, dataset = _section(draft)
    words = {key: str(section[key]) if section.get(key) else None for key in ("config", "split", "column")}
    kind = kind_of(dataset)
    if kind == _SAMPLES or dataset in ("", UPLOAD_PREFIX):
        return note(""), same
    try:
        if kind == _HUB:
            refuse_dataset_path(dataset, settings)
    except TmergeError:
        return note(""), same  # likewise
    try:
        if kind == _UPLOAD:
            name = dataset.removeprefix(UPLOAD_PREFIX)
            if upload is None or upload_name(upload) != name:
                return note(""), same  # the recipe's own complaint, said at the field
            facts = aside.ask(file_facts, upload, name, words["column"], wanted=wanted)
        else:
            split = words["split"] or "train"
            facts = aside.ask(dataset_facts, dataset, words["config"], split, words["column"], wanted=wanted)
    except TmergeError as error:
        return note(str(error), bad=True), same
    choices = [
        gr.Dropdown(choices=facts.configs),
        gr.Dropdown(choices=facts.splits or ["train"]),
        gr.Dropdown(choices=facts.columns),
    ]
    return _found_line(facts), choices


def _found_line(facts: DatasetFacts) -> str:
    if not facts.column:
        return note(facts.why, bad=True)
    return render("choose.html", "texts_found", facts=facts)
