"""`tmerge evaluate`, `adapt` and `compare`: scoring models, and training them with and without a merge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tmerge.cli.shared import (
    AdapterOption,
    BaseOption,
    DatasetOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    RecipeArgument,
    RunArgument,
    SeedOption,
    SetOption,
    SourceOption,
    TargetOption,
    WhatOption,
    app,
    pair_words,
    print_json,
    progress,
    quiet_libraries,
)
from tmerge.cli.stopping import same_command, stages_kept, when_stopped

__all__ = ["adapt", "compare", "evaluate"]


@app.command()
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Hub ids, folders, .gguf files; the first is the base.")],
    dataset: Annotated[str | None, typer.Option(help="Texts for bits per byte; all of them are scored.")] = None,
    texts: Annotated[int, typer.Option(help="At most so many texts.", min=8)] = 200,
    tasks: Annotated[str | None, typer.Option(help="Tasks or groups of lm-evaluation-harness, as a,b.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="task=FILE: a local file for a task's dataset.")] = None,
    limit: Annotated[int | None, typer.Option(help="Questions of each task at most.", min=1)] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    seed: SeedOption = None,
    json_output: JsonOption = False,
) -> None:
    """Score models on the same texts and tasks, each against the first with paired 95 % intervals."""
    from tmerge.errors import RecipeError

    named = [task.strip() for task in (tasks or "").split(",") if task.strip()]
    if dataset is None and not named:
        raise RecipeError("nothing to score on: name texts with --dataset, or tasks with --tasks")
    files = {}
    for word in data or ():
        task, separator, path = word.partition("=")
        if not separator:
            raise RecipeError(f"--data {word!r} is not of the form task=FILE")
        files[task] = Path(path)
    quiet_libraries()
    from tmerge.cli.show import show_evaluation
    from tmerge.comparison.evaluate import evaluate_models

    when_stopped(lambda: f"no score is kept; to start again: {same_command()}")
    with progress() as listener:
        result = evaluate_models(
            models,
            dataset=dataset,
            texts=texts,
            tasks=named,
            data=files,
            limit=limit,
            device=device or "auto",
            dtype=dtype or "auto",
            seed=seed or 0,
            listener=listener,
        )
    if json_output:
        print_json(result.to_dict())
    else:
        show_evaluation(result)


@app.command()
def adapt(
    run: RunArgument = Path("fused"),
    dataset: Annotated[str | None, typer.Option(help="To train on; the texts that the merge read if left out.")] = None,
    objective: Annotated[str | None, typer.Option(help="distill, from the source too (the default), or sft.")] = None,
    residual: Annotated[str | None, typer.Option(help="frozen, or none: what was transported trains too.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--lr", help="Peak; falls linearly to zero.")] = None,
    lora_rank: Annotated[int | None, typer.Option(help="LoRA on q k v o of this rank; 0 trains the weights.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the adapted model; RUN-adapted if left out.")] = None,
    settings: SetOption = None,
    json_output: JsonOption = False,
) -> None:
    """Train on top of a finished merge, with what was transported held fixed, and score the result."""
    asked = {"objective": objective, "residual": residual, "steps": steps, "learning_rate": learning_rate}
    words = {name: value for name, value in {**asked, "lora_rank": lora_rank}.items() if value is not None}
    words |= _section_words("adaptation", settings or ())
    quiet_libraries()
    from tmerge.cli.show import show_adapted
    from tmerge.processes import joined
    from tmerge.stages.adapt import adapt_run

    folder = out or run.with_name(f"{run.absolute().name}-adapted")
    when_stopped(lambda: _training_kept(folder))
    with joined() as processes, progress(heard=processes.is_first) as listener:
        report = adapt_run(run, folder, words, dataset=dataset, listener=listener, processes=processes)
    if not processes.is_first:
        return
    if json_output:
        print_json(report.to_dict())
    else:
        show_adapted(report, folder)


@app.command()
def compare(
    recipe: RecipeArgument = None,
    target: TargetOption = None,
    source: SourceOption = None,
    source_base: BaseOption = None,
    adapter: AdapterOption = None,
    what: WhatOption = None,
    dataset: DatasetOption = None,
    out: Annotated[Path, typer.Option(help="A folder for the merge, the rows and compare.json.")] = Path("compared"),
    settings: SetOption = None,
    device: DeviceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Base, fused, controls, alphas, and training with and without the merge, on the same texts for the same steps."""
    from tmerge.recipe import load_recipe

    overrides = {**pair_words(target, source, source_base, adapter, what, dataset), "device": device}
    loaded = load_recipe(recipe, overrides, settings or ())
    quiet_libraries()
    from tmerge.cli.show import show_comparison
    from tmerge.comparison.compare import compare as run_comparison
    from tmerge.processes import joined

    when_stopped(lambda: _rows_kept(out))
    with joined() as processes, progress(heard=processes.is_first) as listener:
        result = run_comparison(loaded, out, listener=listener, processes=processes)
    if not processes.is_first:
        return
    if json_output:
        print_json(result.to_dict())
    else:
        show_comparison(result, out)


def _training_kept(folder: Path) -> str:
    work = folder / "tmerge" / "cache" / "training"
    saved = sorted(work.glob("checkpoint-*/trainer_state.json"))
    if not saved and (work / "teacher.safetensors").is_file():
        return f"what the source predicts is kept in {folder}, and no step yet; to continue: {same_command()}"
    if not saved:
        return f"no checkpoint of the training had been saved; to start again: {same_command()}"
    return f"the training's last checkpoint is kept in {folder}; to continue: {same_command()}"


def _rows_kept(out: Path) -> str:
    rows = len(list((out / "rows").glob("*.json")))
    if not rows:
        return stages_kept(out / "merge")
    return f"the merge and {rows} finished rows are kept in {out}; to continue: {same_command()}"


def _section_words(section: str, settings: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """``--set section.key=value`` words of one section, values read as YAML."""
    from tmerge.errors import RecipeError
    from tmerge.recipe import parse_setting

    words = {}
    for word in settings:
        key, value = parse_setting(word)
        if not key.startswith(f"{section}."):
            raise RecipeError(f"--set {word!r}: only keys of {section} can be set here, as {section}.key=value")
        words[key.removeprefix(f"{section}.")] = value
    return words
