"""The Choose tab: two models, the texts, the settings, the recipe; and what a merge of them would be.

The recipe's YAML is what counts. Every field writes into it, and every change of it writes into the fields.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from tmerge.errors import TmergeError
from tmerge.models.demo import DEMO_MODELS
from tmerge.models.reference import DEMO_PREFIX
from tmerge.recipe import preset_names
from tmerge.ui.context import AppContext
from tmerge.ui.parts.cards import empty_card, heading, limits_line
from tmerge.ui.parts.expected import SETTLED_SECONDS, expected_cards
from tmerge.ui.parts.fields import SETTINGS, Setting
from tmerge.ui.parts.form import (
    form_values,
    from_preset,
    holds_value,
    preset_of,
    read_yaml,
    typed_value,
    with_adapter,
    with_value,
    write_yaml,
)
from tmerge.ui.parts.job import build_job
from tmerge.ui.parts.problem import EDITOR, problem, problem_box, problem_of
from tmerge.ui.parts.settings import SettingFields
from tmerge.ui.parts.starting import Holds, ready_recipe, wire_start
from tmerge.ui.parts.style import markup
from tmerge.ui.parts.texts import KINDS, TextsPart, build_texts, holds_texts, look_into, shown, upload_name
from tmerge.ui.parts.ways import begin_with, build_ways
from tmerge.ui.server.changes import Changes, always, answering_the_last
from tmerge.ui.server.limits import UPLOAD_PREFIX
from tmerge.ui.server.search import Choice, HubSearch, offered

__all__ = ["build_choose"]

_log = logging.getLogger(__name__)

_DEMO = [(f"{name} (built in)", f"{DEMO_PREFIX}{name}") for name in DEMO_MODELS]
_HINT = "Type to search the Hub: user/name, or user/name@revision"
_ADAPTER_HINT = "A LoRA: what it changes is carried, and of the source its base alone is read. Type to search"
# Nobody else is kept waiting by one visitor's typing or checking; the answers come from elsewhere anyway.
_LIGHT: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": 16}


def build_choose(app: AppContext, begin: Mapping[str, Any] | None = None) -> None:
    """Lay the tab out and wire it. Call it inside its `gr.Tab`.

    Args:
        app: What the tabs share.
        begin: The recipe's keys that the form begins with; the built-in demo if None.
    """
    search = HubSearch(private=not app.settings.public)
    begin = dict(begin or from_preset("demo"))
    good = gr.State(begin)
    upload = gr.State(None)
    # Kept by the browser, not by the server: signing in loads the page anew.
    kept = gr.BrowserState("", storage_key="tmerge-recipe")

    ways = build_ways(app)
    settings = SettingFields(begin)
    with gr.Row(equal_height=False, elem_classes="fields wide"):
        target = _model_field("target", "Target: the model that is changed", begin)
        source = _model_field("source", "Source: the model that is read", begin)
        adapter = _adapter_field(begin)
        settings.make("source_base")
    preset = gr.Dropdown(
        preset_names(),
        value=preset_of(begin),
        label="Preset",
        info="The paper's pairs and settings, or the built-in demo; empty where the recipe is none of them",
    )
    texts = build_texts(search, app.settings)
    with gr.Row(equal_height=False, elem_classes="fields"):
        settings.make("fusion.what", "fusion.alpha", "calibration.texts", "fusion.projections")
    markup(heading(2, "What this merge would be"), elem_classes="section")
    expected = markup(
        empty_card("Checking the two models", "from their configs alone; nothing heavy starts before you say so"),
        elem_id="expected",
    )
    # In the place of the old answer while there is no recipe to answer for.
    unread = "Mend it where its mistake is named, to see what this merge would be."
    markup(empty_card("The recipe cannot be read", unread), elem_id="unread")
    settings.make_others()
    fields = list(settings.all)
    with gr.Accordion("Recipe (YAML)", open=False, elem_id="recipe"):
        code = gr.Code(
            write_yaml(begin),
            language="yaml",
            label="The recipe that will run; edit it here or in the form",
            lines=10,
            max_lines=30,
            interactive=True,
            show_line_numbers=False,
            buttons=["copy", "download"],
            elem_id=EDITOR,
        )
        take = gr.UploadButton(
            "Upload a recipe", file_types=[".yaml", ".yml"], size="sm", elem_id="upload-recipe", variant="secondary"
        )
    box = problem_box()
    other = gr.Button("Open the run that is in the way", visible=False, elem_id="open-other")
    with gr.Row(equal_height=True):
        relate = gr.Button("Ask only whether they are related", size="lg", elem_id="relate", scale=1, min_width=240)
        start = gr.Button("Start the merge", variant="primary", size="lg", elem_id="start", scale=3, min_width=240)
    markup(limits_line(app.settings))
    build_job(app, good, upload)

    # Everything that a change of the recipe writes into.
    written: list[Any] = [target, source, adapter, *texts.fields, *fields]

    def fill(draft: Mapping[str, Any]) -> list[Any]:
        named = [str(draft.get(role) or "") for role in ("target", "source", "adapter")]
        return [*named, *shown(draft), *form_values(draft)]

    def complaint(draft: Mapping[str, Any], uploaded: str | None, at: Sequence[str] | None = None) -> str:
        try:
            ready_recipe(app, draft, uploaded)
        except TmergeError as error:
            return problem_of(error, at)
        return problem()

    def replaced(draft: dict[str, Any], uploaded: str | None, at: Sequence[str] | None = None) -> list[Any]:
        return [write_yaml(draft), draft, complaint(draft, uploaded, at), *fill(draft)]

    def edited(text: str, before: dict[str, Any], uploaded: str | None) -> list[Any]:
        try:
            draft = read_yaml(text or "")
        except TmergeError as error:
            return [gr.skip(), problem_of(error, [EDITOR], unread=True), *(gr.skip() for _ in written)]
        return [
            draft,
            complaint(draft, uploaded, [EDITOR]),
            *(fill(draft) if draft != before else (gr.skip() for _ in written)),
        ]

    def writer(change: Callable[[dict[str, Any], Any], dict[str, Any]], *, decides: bool = False) -> Any:
        """A field's change, written into the recipe, and into what the other fields show where it `decides` that."""
        others = len(fields) if decides else 0

        def write(value: Any, draft: dict[str, Any], uploaded: str | None) -> list[Any]:
            try:
                changed = change(draft, value)
            except TmergeError as error:
                return [gr.skip(), gr.skip(), problem_of(error, unread=True), *(gr.skip() for _ in range(others))]
            if changed == draft:
                return [gr.skip(), gr.skip(), complaint(draft, uploaded), *(gr.skip() for _ in range(others))]
            shown = form_values(changed) if decides else []
            return [write_yaml(changed), changed, complaint(changed, uploaded), *shown]

        return write

    state, into = [good, upload], [code, good, box]
    # Or what is typed while the change before it is being written would be lost.
    for field, key in ((target, "target"), (source, "source")):
        gr.on([field.input, field.select, field.blur], writer(_named(key)), [field, *state], into, **_in_turn())
        names = gr.State(_DEMO)
        field.key_up(_finder(search), names, [field, names], trigger_mode="multiple", **_quiet())
    gr.on(
        [adapter.input, adapter.select, adapter.blur],
        writer(lambda draft, value: with_adapter(draft, _stripped(value)), decides=True),
        [adapter, *state],
        [*into, *fields],
        **_in_turn(),
    )
    found = gr.State(list[Choice]())
    adapter.key_up(_adapter_finder(search), [found, good], [adapter, found], trigger_mode="multiple", **_quiet())
    for setting, field in zip(SETTINGS, fields, strict=True):
        # Typed letters are heard at once, what came in by other ways when the field is left.
        heard = [field.input, field.blur] if isinstance(field, gr.Textbox) else [field.input]
        gr.on(
            heard,
            writer(_set(setting), decides=setting.decides),
            [field, *state],
            [*into, *fields] if setting.decides else into,
            **_in_turn(),
        )
    for field, key in (
        (texts.dataset, "calibration.dataset"),
        (texts.config, "calibration.config"),
        (texts.split, "calibration.split"),
        (texts.column, "calibration.column"),
    ):
        gr.on([field.input, field.select, field.blur], writer(_named(key)), [field, *state], into, **_in_turn())
    _wire_kinds(texts, upload, good, into, complaint)

    code.input(edited, [code, good, upload], [good, box, *written], **_in_turn())
    everything = [code, good, box, *written]
    gr.on(app.proposed.change, replaced, [app.proposed, upload], everything, **_in_turn())
    for way, button in ways:
        button.click(lambda uploaded, way=way: replaced(begin_with(way), uploaded), upload, everything, **_in_turn())
    preset.input(
        lambda name, uploaded: replaced(from_preset(name), uploaded), [preset, upload], everything, **_in_turn()
    )

    def taken(path: str, uploaded: str | None) -> list[Any]:
        try:
            with Path(path).open(encoding="utf-8") as file:
                draft = read_yaml(file.read(50_000))
        except (TmergeError, OSError, UnicodeDecodeError) as error:
            line = str(error) if isinstance(error, TmergeError) else "the file is not UTF-8 text"
            return [
                gr.skip(),
                gr.skip(),
                problem(line, bad=True, at=[EDITOR], unread=None),
                *(gr.skip() for _ in written),
            ]
        return replaced(draft, uploaded, [EDITOR])

    take.upload(taken, [take, upload], everything, **_in_turn())

    # What is expected follows the recipe, whoever changed it; while it is asked for, the old answer stays.
    changes, looks = Changes(SETTLED_SECONDS), Changes(SETTLED_SECONDS)
    expects, looked = partial(expected_cards, app), partial(_looked, app)
    gr.on(
        [good.change],
        answering_the_last(changes, expects, 1),
        [good, upload],
        expected,
        trigger_mode="multiple",
        show_progress="minimal",
        **_LIGHT,
    )
    gr.on(
        [good.change, upload.change],
        answering_the_last(looks, looked, 4),
        [good, upload],
        [texts.found, texts.config, texts.split, texts.column],
        trigger_mode="multiple",
        **_quiet(),
    )

    roles = {"target": target, "source": source, "adapter": adapter}
    held: list[tuple[Any, Holds]] = [(field, _holds_model(role)) for role, field in roles.items()]
    held += [*holds_texts(texts), *zip(fields, map(_holds_setting, SETTINGS), strict=True)]
    wire_start(app, start, relate, other, box, good, upload, code, texts.file, held)
    app.load(answering_the_last(changes, expects, 1, pause=False), [good, upload], expected)
    good.change(write_yaml, good, kept, trigger_mode="always_last", **_quiet())
    good.change(preset_of, good, preset, trigger_mode="always_last", **_quiet())

    def restored(text: Any, draft: dict[str, Any], uploaded: str | None) -> list[Any]:
        """The recipe that this browser had before the page was loaded anew."""
        try:
            before = read_yaml(text) if isinstance(text, str) and text else draft
        except TmergeError:
            before = draft
        return replaced(before, uploaded) if before != draft else [gr.skip() for _ in everything]

    app.load(restored, [kept, good, upload], everything)


def _looked(
    app: AppContext, draft: Mapping[str, Any], upload: str | None, wanted: Callable[[], bool] = always
) -> list[Any]:
    line, offered = look_into(app.aside, app.settings, draft, upload, wanted)
    return [line, *offered]


def _wire_kinds(texts: TextsPart, upload: gr.State, good: gr.State, into: list[Any], complaint: Any) -> None:
    """Samples, Hub dataset or upload: each choice writes the recipe's dataset."""

    def changed(draft: dict[str, Any], dataset: str, uploaded: str | None) -> list[Any]:
        section = draft.get("calibration")
        kept = {k: v for k, v in (section if isinstance(section, dict) else {}).items() if k not in _OF_A_DATASET}
        draft = {**draft, "calibration": {"dataset": dataset, **kept}}
        return [write_yaml(draft), draft, complaint(draft, uploaded)]

    def chosen(
        kind: str, language: str | None, dataset: str | None, draft: dict[str, Any], uploaded: str | None
    ) -> Any:
        named = {
            KINDS[0]: f"samples:{language or 'english'}",
            KINDS[1]: dataset or "",
            KINDS[2]: UPLOAD_PREFIX + (upload_name(uploaded) if uploaded else ""),
        }[kind]
        written = changed(draft, named, uploaded)
        return [*written, *shown(written[1])]

    texts.kind.input(
        chosen, [texts.kind, texts.language, texts.dataset, good, upload], [*into, *texts.fields], **_in_turn()
    )
    texts.language.input(
        lambda language, draft, uploaded: changed(draft, f"samples:{language}", uploaded),
        [texts.language, good, upload],
        into,
        **_in_turn(),
    )

    def uploaded_file(path: str | None, draft: dict[str, Any]) -> list[Any]:
        try:
            name = upload_name(path) if path else ""
        except TmergeError as error:
            return [None, gr.skip(), gr.skip(), problem_of(error, ["texts-file"])]
        return [path, *changed(draft, UPLOAD_PREFIX + name, path)]

    gr.on([texts.file.upload, texts.file.clear], uploaded_file, [texts.file, good], [upload, *into], **_in_turn())


_OF_A_DATASET = ("dataset", "config", "split", "column")


def _quiet() -> dict[str, Any]:
    return {"show_progress": "hidden", **_LIGHT}


def _in_turn() -> dict[str, Any]:
    """For what changes the recipe: one after the other, or two quick changes would each start from the old one.

    By default a second change is dropped, unheard, while the first is being taken in: here the last one is, after it.
    """
    return {**_quiet(), "concurrency_limit": 1, "concurrency_id": "recipe", "trigger_mode": "always_last"}


def _stripped(value: Any) -> str:
    return str(value or "").strip()


def _named(key: str) -> Callable[[dict[str, Any], Any], dict[str, Any]]:
    return lambda draft, value: with_value(draft, key, _stripped(value))


def _set(setting: Setting) -> Callable[[dict[str, Any], Any], dict[str, Any]]:
    return lambda draft, value: with_value(draft, setting.key, typed_value(setting, value))


def _holds_setting(setting: Setting) -> Holds:
    return lambda draft, value: holds_value(setting, draft, value)


def _holds_model(role: str) -> Holds:
    return lambda draft, value: _stripped(value) == _stripped(draft.get(role))


def _finder(search: HubSearch) -> Callable[..., Any]:
    def find(before: list[Choice], event: gr.KeyUpData, request: gr.Request) -> list[Any]:
        typed = str(event.input_value or "")
        now = offered(search, "model", typed, before) if search.settled(request.session_hash, typed) else None
        if now is None:
            return [gr.skip(), gr.skip()]
        return [gr.Dropdown(choices=now[0], info=now[1] or _HINT), now[0]]

    return find


def _adapter_finder(search: HubSearch) -> Callable[..., Any]:
    """As `_finder`, among the adapters of the source that is named."""

    def find(before: list[Choice], draft: dict[str, Any], event: gr.KeyUpData, request: gr.Request) -> list[Any]:
        typed, base = str(event.input_value or ""), str(draft.get("source") or "").partition("@")[0]
        of = "" if base.startswith(DEMO_PREFIX) or base.count("/") != 1 or Path(base).exists() else base
        now = offered(search, "adapter", typed, before, of) if search.settled(request.session_hash, typed) else None
        if now is None:
            return [gr.skip(), gr.skip()]
        return [gr.Dropdown(choices=now[0], info=now[1] or _ADAPTER_HINT), now[0]]

    return find


def _adapter_field(begin: Mapping[str, Any]) -> gr.Dropdown:
    return gr.Dropdown(
        [],
        value=str(begin.get("adapter") or ""),
        label="Adapter of the source, if it is what you want to carry",
        info=_ADAPTER_HINT,
        allow_custom_value=True,
        filterable=True,
        elem_id="adapter-model",
        min_width=280,
    )


def _model_field(role: str, label: str, begin: Mapping[str, Any]) -> gr.Dropdown:
    return gr.Dropdown(
        _DEMO,
        value=begin[role],
        label=label,
        info=_HINT,
        allow_custom_value=True,
        filterable=True,
        elem_id=f"{role}-model",
        min_width=280,
    )
