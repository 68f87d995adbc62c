"""What all commands share: the app, their common options, and quiet libraries."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from tmerge.cli.stopping import raise_if_stopped
from tmerge.documents import json_text
from tmerge.version import VERSION

__all__ = [
    "AdapterOption",
    "BaseOption",
    "DatasetOption",
    "DeviceOption",
    "DryOption",
    "DtypeOption",
    "HtmlOption",
    "JsonOption",
    "OutOption",
    "RecipeArgument",
    "ResumeOption",
    "RunArgument",
    "SaveOption",
    "SeedOption",
    "SetOption",
    "SourceOption",
    "TargetOption",
    "WhatOption",
    "app",
    "pair_words",
    "print_json",
    "progress",
    "quiet_libraries",
]


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"tmerge {VERSION}")
        raise typer.Exit


app = typer.Typer(
    name="tmerge",
    help="Merge language models of different architectures by optimal transport, and know whether it helped.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", is_eager=True, callback=_show_version, help="Print the version."),
) -> None:
    pass


RecipeArgument = Annotated[str | None, typer.Argument(help="A recipe file, or a preset's name.")]
TargetOption = Annotated[str | None, typer.Option(help="Model that is changed: Hub id, folder or .gguf file.")]
SourceOption = Annotated[
    list[str] | None,
    typer.Option(help="Model that is read. Again for each of several that were made from --source-base."),
]
BaseOption = Annotated[str | None, typer.Option(help="The source before its fine-tuning, for task vectors.")]
AdapterOption = Annotated[
    list[str] | None,
    typer.Option(
        help="A LoRA of --source-base, PEFT repo or folder, which is carried; then --source can be left out. Again for "
        "each of several."
    ),
]
WhatOption = Annotated[
    str | None,
    typer.Option(
        help="Of the source: weights; task-vector, what it learned since --source-base (then the default); or "
        "reconstruct, what its neurons do."
    ),
]
SaveOption = Annotated[
    str | None,
    typer.Option(help="merged, a whole checkpoint; or adapter, a LoRA of the target with what is changed alone."),
]
DatasetOption = Annotated[str | None, typer.Option(help="samples:LANGUAGE, a Hub dataset, or a text file.")]
OutOption = Annotated[Path, typer.Option(help="The run's folder.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="section.key=value; all keys: `tmerge recipe`.")]
DeviceOption = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
DtypeOption = Annotated[str | None, typer.Option(help="auto, float32, bfloat16, float16.")]
SeedOption = Annotated[
    int | None, typer.Option(help="Of the split, the controls and the bootstrap.", min=0, max=4294967295)
]
HtmlOption = Annotated[Path | None, typer.Option(help="Write a self-contained page of pictures here.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Only continue: fail if there is nothing to continue.")]
DryOption = Annotated[bool, typer.Option("--dry-run", help="Check and show the plan; write nothing.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
RunArgument = Annotated[Path, typer.Argument(help="A run's folder.")]


@contextmanager
def progress(*, heard: bool = True) -> Iterator[Any]:
    """A listener that shows every step on stderr, and stops where a signal came that something has swallowed.

    Args:
        heard: Whether anything is shown: of several processes one speaks.
    """
    from tmerge.cli.steps import listening

    # A run looks for garbage whenever it lets a model go: not among the libraries, a third of a second each time.
    gc.freeze()
    with listening() as listener:

        def hear(step: Any) -> None:
            raise_if_stopped()
            if heard:
                listener(step)

        yield hear


def print_json(document: dict[str, Any]) -> None:
    """One strict JSON document on stdout."""
    typer.echo(json_text(document, indent=1, ensure_ascii=False))


def quiet_libraries() -> None:
    """Our own progress is shown; the libraries' bars and remarks would break its lines."""
    import huggingface_hub.utils
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # Told by its environment: a run on packaged texts never imports it, which takes a second.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()


def pair_words(
    target: str | None,
    source: Sequence[str] | None,
    source_base: str | None,
    adapter: Sequence[str] | None,
    what: str | None,
    dataset: str | None,
) -> dict[str, Any]:
    """What a command's options say of the pair, by the recipe's keys.

    A source or an adapter that is given more than once is one of several; a single source beside several adapters is
    their base, as it is beside one.
    """
    models, adapters, sources = list(source or ()), list(adapter or ()), list[dict[str, str]]()
    if len(models) > 1:
        sources, models = [{"source": model} for model in models], []
    if sources or len(adapters) > 1:
        sources, adapters = [*sources, *({"adapter": one} for one in adapters)], []
        if source_base is None and models:
            source_base = models.pop()
    return {
        "target": target,
        "source": models[0] if models else None,
        "source_base": source_base,
        "adapter": adapters[0] if adapters else None,
        "sources": sources or None,
        "fusion.what": what,
        "calibration.dataset": dataset,
    }
