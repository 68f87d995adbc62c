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
from tmerge.ui.parts.form import section_of
from tmerge.ui.parts.safe import render
from tmerge.ui.parts.style import markup
from tmerge.ui.server.aside import Aside
from tmerge.ui.server.changes import always
from tmerge.ui.server.limits import UPLOAD_PREFIX, AppSettings, refuse_dataset_path
from tmerge.ui.server.search import dataset_facts, file_facts

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
        """Those that `shown` is about."""
        named = [self.kind, self.language, self.dataset, self.config, self.split, self.column]
        return [*named, self.hub_rows, self.upload_rows]

    def shown(self, draft: Mapping[str, Any]) -> dict[Any, Any]:
        """Field -> what it shows for a recipe's mapping."""
        section, dataset = _section(draft)
        kind, words = kind_of(dataset), _words(section)
        language = dataset.removeprefix(SAMPLES_PREFIX) if kind == _SAMPLES else None
        known = language in sample_languages()
        return {
            self.kind: kind,
            self.language: gr.Dropdown(value=language if known else None, visible=kind == _SAMPLES),
            self.dataset: dataset if kind == _HUB else None,
            self.config: words["config"],
            self.split: words["split"] or "train",
            self.column: gr.Dropdown(value=words["column"], visible=kind != _SAMPLES),
            self.hub_rows: gr.Group(visible=kind == _HUB),
            self.upload_rows: gr.Group(visible=kind == _UPLOAD),
        }

    def look_into(
        self,
        aside: Aside,
        settings: AppSettings,
        draft: Mapping[str, Any],
        upload: str | None,
        *,
        wanted: Callable[[], bool] = always,
    ) -> dict[Any, Any]:
        """What the texts hold, as a line, and what there is to choose as configuration, split and column.

        Args:
            aside: Where the rows are read.
            settings: Whether paths are refused.
            draft: The recipe's mapping.
            upload: Path of the uploaded file.
            wanted: As for `Aside.ask`.

        Raises:
            StillAskingError: It is not known yet.
            SupersededError: It is not wanted any more.
        """
        section, dataset = _section(draft)
        kind, words, name = kind_of(dataset), _words(section), dataset.removeprefix(UPLOAD_PREFIX)
        try:
            # What the recipe's own complaint is about is said at the field.
            if kind == _HUB:
                refuse_dataset_path(dataset, settings)
            there = kind == _HUB or (kind == _UPLOAD and upload is not None and upload_name(upload) == name)
        except TmergeError:
            there = False
        if not there or not name:
            return {self.found: note("")}
        try:
            if kind == _HUB:
                split = words["split"] or "train"
                facts = aside.ask(dataset_facts, dataset, words["config"], split, words["column"], wanted=wanted)
            else:
                facts = aside.ask(file_facts, upload, name, words["column"], wanted=wanted)
        except TmergeError as error:
            return {self.found: note(str(error), bad=True)}
        found = render("choose.html", "texts_found", facts=facts) if facts.column else note(facts.why, bad=True)
        return {
            self.found: found,
            self.config: gr.Dropdown(choices=facts.configs),
            self.split: gr.Dropdown(choices=facts.splits or ["train"]),
            self.column: gr.Dropdown(choices=facts.columns),
        }


def build_texts(settings: AppSettings) -> TextsPart:
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
        config = _box("config", "Configuration", "Where it has several", min_width=120)
        split = _box("split", "Split", "Part of it", value="train", min_width=120)
    with gr.Group(visible=False) as upload_rows:
        file = gr.File(file_types=list(FILE_SUFFIXES), label="File of texts", height=140, elem_id="texts-file")
        hint = render("choose.html", "upload_hint", suffixes=FILE_SUFFIXES, most=settings.max_upload_bytes)
        markup(hint)
    about_column = "Found by itself where there is no doubt; several are joined as a+b"
    column = _box("column", "Text column", about_column, visible=False)
    found = markup(note(""), elem_id="texts-found")
    return TextsPart(kind, language, dataset, config, split, column, file, hub_rows, upload_rows, found)


def _box(name: str, label: str, info: str, *, value: str | None = None, **options: Any) -> gr.Dropdown:
    """A field about a data set: what is found is offered, and anything can be typed."""
    choices = [value] if value else []
    return gr.Dropdown(
        choices, value=value, label=label, info=info, allow_custom_value=True, elem_id=f"texts-{name}", **options
    )


def kind_of(dataset: str) -> str:
    """Which of `KINDS` a recipe's dataset is."""
    if dataset.startswith(SAMPLES_PREFIX):
        return _SAMPLES
    return _UPLOAD if dataset.startswith(UPLOAD_PREFIX) else _HUB


def holds_texts(part: TextsPart) -> list[tuple[Any, Callable[[Mapping[str, Any], Any], bool]]]:
    """The part's components that write into the recipe, each with whether a value of it is what a mapping holds."""

    def word(key: str, default: str = "") -> Callable[[Mapping[str, Any], Any], bool]:
        def holds(draft: Mapping[str, Any], value: Any) -> bool:
            section, dataset = _section(draft)
            return kind_of(dataset) != _HUB or str(value or default).strip() == str(section.get(key) or default).strip()

        return holds

    def language(draft: Mapping[str, Any], value: Any) -> bool:
        name = _section(draft)[1].removeprefix(SAMPLES_PREFIX)
        return name not in sample_languages() or value == name

    return [
        (part.kind, lambda draft, value: value == kind_of(_section(draft)[1])),
        (part.language, language),
        (part.dataset, word("dataset")),
        (part.config, word("config")),
        (part.split, word("split", "train")),
        (part.column, word("column")),
    ]


def _section(draft: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """The calibration section, and its dataset; "" is one that is still to be named."""
    section = section_of(draft, "calibration")
    dataset = section.get("dataset", "samples:english")
    return section, dataset if isinstance(dataset, str) else ""


def _words(section: Mapping[str, Any]) -> dict[str, str | None]:
    return {key: str(section[key]) if section.get(key) else None for key in ("config", "split", "column")}


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
