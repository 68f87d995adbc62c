"""The Choose tab: two models, the texts, the settings, the recipe; and what a merge of them would be.

The recipe's YAML is what counts. Every field writes into it, and every change of it writes into the fields.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from tmerge.calibration import SAMPLES_PREFIX
from tmerge.errors import TmergeError
from tmerge.models.demo import DEMO_MODELS
from tmerge.models.reference import DEMO_PREFIX
from tmerge.recipe import preset_names
from tmerge.ui.context import QUIET, AppContext
from tmerge.ui.parts.cards import empty_card, limits_line, note
from tmerge.ui.parts.expected import STILL, expected_cards
from tmerge.ui.parts.fields import Setting
from tmerge.ui.parts.following import follow
from tmerge.ui.parts.form import (
    from_preset,
    holds_value,
    preset_of,
    read_yaml,
    typed_value,
    with_adapter,
    with_dataset,
    with_value,
    write_yaml,
)
from tmerge.ui.parts.job import build_job
from tmerge.ui.parts.problem import EDITOR, problem, problem_box
from tmerge.ui.parts.settings import SettingFields
from tmerge.ui.parts.starting import Holds, build_start, ready_recipe
from tmerge.ui.parts.style import editor, markup
from tmerge.ui.parts.texts import KINDS, build_texts, holds_texts, upload_name
from tmerge.ui.parts.ways import Way, begin_with, build_ways
from tmerge.ui.server.limits import UPLOAD_PREFIX
from tmerge.ui.server.search import Choice, HubSearch, Kind, offered

__all__ = ["build_choose"]

_DEMO = [(f"{name} (built in)", f"{DEMO_PREFIX}{name}") for name in DEMO_MODELS]
# For all visitors together.
_SEARCHES = ThreadPoolExecutor(4, "tmerge-search")
_HINT = "Type to search the Hub: user/name, or user/name@revision"
_ADAPTER_HINT = "A LoRA: what it changes is carried, and of the source its base alone is read. Type to search"
# For what changes the recipe: one after the other, or two quick changes would each start from the old one. By default a
# second change is dropped, unheard, while the first is being taken in: here the last one is, after it.
_IN_TURN = {**QUIET, "concurrency_limit": 1, "concurrency_id": "recipe", "trigger_mode": "always_last"}

# What a handler changes: component -> its new value, or an update of it.
_Changes = dict[Any, Any]


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
        target = _model_field("target", "Target: the model that is changed", begin, _DEMO)
        source = _model_field("source", "Source: the model that is read", begin, _DEMO)
        label = "Adapter of the source, if it is what you want to carry"
        adapter = _model_field("adapter", label, begin, [], _ADAPTER_HINT)
        settings.make("source_base")
    preset = gr.Dropdown(
        preset_names(),
        value=preset_of(begin),
        label="Preset",
        info="The paper's pairs and settings, or the built-in demo; empty where the recipe is none of them",
    )
    texts = build_texts(app.settings)
    with gr.Row(equal_height=False, elem_classes="fields"):
        settings.make("fusion.what", "fusion.alpha", "calibration.texts", "fusion.projections")
    markup("<h2>What this merge would be</h2>", elem_classes="section")
    expected = markup(
        empty_card("Checking the two models", "from their configs alone; nothing heavy starts before you say so"),
        elem_id="expected",
    )
    # In the place of the old answer while there is no recipe to answer for.
    unread = "Mend it where its mistake is named, to see what this merge would be."
    markup(empty_card("The recipe cannot be read", unread), elem_id="unread")
    settings.make_others()
    with gr.Accordion("Recipe (YAML)", open=False, elem_id="recipe"):
        label = "The recipe that will run; edit it here or in the form"
        code = editor(write_yaml(begin), language="yaml", label=label, lines=10, name=EDITOR)
        take = gr.UploadButton(
            "Upload a recipe", file_types=[".yaml", ".yml"], size="sm", elem_id="upload-recipe", variant="secondary"
        )
    box = problem_box()
    models = {"target": target, "source": source, "adapter": adapter}
    held: list[tuple[Any, Holds]] = [(field, _holds_model(role)) for role, field in models.items()]
    held += [*holds_texts(texts), *((field, partial(holds_value, setting)) for setting, field in settings.made.items())]
    build_start(app, box, good, upload, code, texts.file, held)
    markup(limits_line(app.settings))
    build_job(app, good, upload)

    # What a field's change writes into, what it may decide, and all that another recipe does.
    recipe, fields = [code, good, box], list(settings.made.values())
    everything = [*recipe, *models.values(), *texts.fields, *fields]

    def complaint(draft: Mapping[str, Any], uploaded: str | None, at: Sequence[str] | None = None) -> str:
        try:
            ready_recipe(app, draft, uploaded)
        except TmergeError as error:
            return problem(error, at)
        return problem()

    def written(draft: dict[str, Any], uploaded: str | None, at: Sequence[str] | None = None) -> _Changes:
        return {code: write_yaml(draft), good: draft, box: complaint(draft, uploaded, at)}

    def filled(draft: Mapping[str, Any]) -> _Changes:
        named = {field: str(draft.get(role) or "") for role, field in models.items()}
        return {**named, **texts.shown(draft), **settings.shown(draft)}

    def replaced(draft: dict[str, Any], uploaded: str | None, at: Sequence[str] | None = None) -> _Changes:
        return written(draft, uploaded, at) | filled(draft)

    def edited(text: str, before: dict[str, Any], uploaded: str | None) -> _Changes:
        try:
            draft = read_yaml(text or "")
        except TmergeError as error:
            return {box: problem(error, [EDITOR], unread=True)}
        return {good: draft, box: complaint(draft, uploaded, [EDITOR])} | (filled(draft) if draft != before else {})

    def writes(
        field: Any, change: Callable[[dict[str, Any], Any], dict[str, Any]], *ways: str, decides: bool = False
    ) -> None:
        """Write a field's changes, heard in these ways, into the recipe, and into the settings where it `decides`."""

        def write(value: Any, draft: dict[str, Any], uploaded: str | None) -> _Changes:
            try:
                changed = change(draft, value)
            except TmergeError as error:
                return {box: problem(error, unread=True)}
            if changed == draft:
                return {box: complaint(draft, uploaded)}
            return written(changed, uploaded) | (settings.shown(changed) if decides else {})

        outputs = [*recipe, *fields] if decides else recipe
        gr.on([getattr(field, way) for way in ways], write, [field, good, upload], outputs, **_IN_TURN)

    # Typed letters are heard at once, what came in by other ways when the field is left: or what is typed while the
    # change before it is being written would be lost.
    typed = ("input", "select", "blur")
    for role in ("target", "source"):
        writes(models[role], partial(_named, role), *typed)
    writes(adapter, lambda draft, value: with_adapter(draft, _stripped(value)), *typed, decides=True)
    for name in ("dataset", "config", "split", "column"):
        writes(getattr(texts, name), partial(_named, f"calibration.{name}"), *typed)
    writes(texts.language, lambda draft, value: with_dataset(draft, f"{SAMPLES_PREFIX}{value}"), "input")
    for setting, field in settings.made.items():
        heard = ("input", "blur") if isinstance(field, gr.Textbox) else ("input",)
        writes(field, partial(_set, setting), *heard, decides=setting.decides)

    def chosen(
        kind: str, language: str | None, dataset: str | None, draft: dict[str, Any], uploaded: str | None
    ) -> _Changes:
        named = {
            KINDS[0]: f"{SAMPLES_PREFIX}{language or 'english'}",
            KINDS[1]: dataset or "",
            KINDS[2]: UPLOAD_PREFIX + (upload_name(uploaded) if uploaded else ""),
        }[kind]
        changed = with_dataset(draft, named)
        return written(changed, uploaded) | texts.shown(changed)

    of_texts = [texts.kind, texts.language, texts.dataset, good, upload]
    texts.kind.input(chosen, of_texts, [*recipe, *texts.fields], **_IN_TURN)

    def uploaded_file(path: str | None, draft: dict[str, Any]) -> _Changes:
        try:
            name = upload_name(path) if path else ""
        except TmergeError as error:
            return {upload: None, box: problem(error, ["texts-file"])}
        return {upload: path} | written(with_dataset(draft, UPLOAD_PREFIX + name), path)

    gr.on([texts.file.upload, texts.file.clear], uploaded_file, [texts.file, good], [upload, *recipe], **_IN_TURN)

    searched: list[tuple[Any, Kind]] = [(target, "model"), (source, "model"), (adapter, "adapter")]
    for field, kind in [*searched, (texts.dataset, "dataset")]:
        names: gr.State = gr.State(list[Choice](field.choices))
        find = _finder(search, kind, field, names)
        field.key_up(find, [names, good], [field, names], trigger_mode="multiple", **QUIET)

    code.input(edited, [code, good, upload], everything, **_IN_TURN)
    app.proposed.change(replaced, [app.proposed, upload], everything, **_IN_TURN)

    def begun(way: Way, uploaded: str | None) -> _Changes:
        return replaced(begin_with(way), uploaded)

    def preset_taken(name: str, uploaded: str | None) -> _Changes:
        return replaced(from_preset(name), uploaded)

    for way, button in ways:
        button.click(partial(begun, way), upload, everything, **_IN_TURN)
    preset.input(preset_taken, [preset, upload], everything, **_IN_TURN)

    def taken(path: str, uploaded: str | None) -> _Changes:
        try:
            with Path(path).open(encoding="utf-8") as file:
                draft = read_yaml(file.read(50_000))
        except (TmergeError, OSError, UnicodeDecodeError) as error:
            line = str(error) if isinstance(error, TmergeError) else "the file is not UTF-8 text"
            return {box: problem(line, bad=True, at=[EDITOR], unread=None)}
        return replaced(draft, uploaded, [EDITOR])

    take.upload(taken, [take, upload], everything, **_IN_TURN)

    # What is expected follows the recipe, whoever changed it; while it is asked for, the old answer stays.
    follow(
        app,
        [good.change],
        lambda draft, _, wanted: {expected: expected_cards(app, draft, wanted)},
        [good, upload],
        [expected],
        {expected: STILL},
        shows_progress=True,
    )
    follow(
        app,
        [good.change, upload.change],
        partial(texts.look_into, app.aside, app.settings),
        [good, upload],
        [texts.found, texts.config, texts.split, texts.column],
        {texts.found: note("Still asking what these texts hold.")},
    )

    good.change(write_yaml, good, kept, trigger_mode="always_last", **QUIET)
    good.change(preset_of, good, preset, trigger_mode="always_last", **QUIET)

    def restored(text: Any, draft: dict[str, Any], uploaded: str | None) -> _Changes:
        """The recipe that this browser had before the page was loaded anew."""
        try:
            before = read_yaml(str(text or ""))
        except TmergeError:
            return gr.skip()
        return replaced(before, uploaded) if before and before != draft else gr.skip()

    app.page.load(restored, [kept, good, upload], everything, **QUIET)


def _stripped(value: Any) -> str:
    return str(value or "").strip()


def _named(key: str, draft: dict[str, Any], value: Any) -> dict[str, Any]:
    return with_value(draft, key, _stripped(value))


def _set(setting: Setting, draft: dict[str, Any], value: Any) -> dict[str, Any]:
    return with_value(draft, setting.key, typed_value(setting, value))


def _holds_model(role: str) -> Holds:
    return lambda draft, value: _stripped(value) == _stripped(draft.get(role))


def _finder(search: HubSearch, kind: Kind, field: gr.Dropdown, names: gr.State) -> Callable[..., Awaitable[_Changes]]:
    """What a field offers as it is typed in; of adapters, those of the source that is named."""
    hint = field.info

    async def find(before: list[Choice], draft: dict[str, Any], event: gr.KeyUpData, request: gr.Request) -> _Changes:
        typed, base = str(event.input_value or ""), str(draft.get("source") or "").partition("@")[0]
        of = base if kind == "adapter" and base.count("/") == 1 and not Path(base).exists() else ""
        if not await search.settled(request.session_hash, typed):
            return gr.skip()
        # In threads of their own: a Hub that is slow to answer keeps nobody from starting a run.
        found = asyncio.get_running_loop().run_in_executor(_SEARCHES, offered, search, kind, typed, before, of)
        choices, line = await found
        return {field: gr.Dropdown(choices=choices, info=line or hint), names: choices}

    return find


def _model_field(
    role: str, label: str, begin: Mapping[str, Any], choices: Sequence[Choice], hint: str = _HINT
) -> gr.Dropdown:
    return gr.Dropdown(
        choices,
        value=str(begin.get(role) or ""),
        label=label,
        info=hint,
        allow_custom_value=True,
        filterable=True,
        elem_id=f"{role}-model",
        min_width=280,
    )
