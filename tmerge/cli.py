"""The command line: parse, call, show. Progress goes to stderr, results to stdout.

Exit codes: 0 done, 2 the user's mistake or bad input, 1 a fault of ours, 130 interrupted.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tmerge.errors import Cancelled, TmergeError

__all__ = ["app", "main"]

app = typer.Typer(
    name="tmerge",
    help="Merge language models of different architectures by optimal transport, and know whether it helped.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipeArgument = Annotated[str | None, typer.Argument(help="A recipe file, or a preset's name.")]
TargetOption = Annotated[str | None, typer.Option(help="Model that is changed: Hub id, folder or .gguf file.")]
SourceOption = Annotated[str | None, typer.Option(help="Model that is read.")]
BaseOption = Annotated[str | None, typer.Option(help="The source before its fine-tuning, for task vectors.")]
DatasetOption = Annotated[str | None, typer.Option(help="samples:LANGUAGE, a Hub dataset, or a text file.")]
OutOption = Annotated[Path, typer.Option(help="The run's folder.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="section.key=value, any key of the recipe.")]
DeviceOption = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
DtypeOption = Annotated[str | None, typer.Option(help="auto, float32, bfloat16, float16.")]
SeedOption = Annotated[int | None, typer.Option(help="Of the split, the controls and the bootstrap.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Only continue: fail if there is nothing to continue.")]
DryOption = Annotated[bool, typer.Option("--dry-run", help="Check and show the plan; write nothing.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
RunArgument = Annotated[Path, typer.Argument(help="A run's folder.")]


@app.command()
def merge(
    recipe: RecipeArgument = None,
    target: TargetOption = None,
    source: SourceOption = None,
    source_base: BaseOption = None,
    dataset: DatasetOption = None,
    out: OutOption = Path("fused"),
    settings: SetOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    seed: SeedOption = None,
    plan: Annotated[str | None, typer.Option(help="Fuse from a finished run's transport: folder or Hub id.")] = None,
    resume: ResumeOption = False,
    dry_run: DryOption = False,
    json_output: JsonOption = False,
) -> None:
    """Merge a source into a target, score the result on held-out texts, and save it."""
    from tmerge.recipe import load_recipe

    overrides = {
        "target": target,
        "source": source,
        "source_base": source_base,
        "calibration.dataset": dataset,
        "device": device,
        "dtype": dtype,
        "seed": seed,
        "plan": plan,
    }
    if source_base is not None:
        overrides["fusion.what"] = "task-vector"
    start = None
    if plan is not None and recipe is None:
        _quiet_libraries()
        from tmerge.hub import find_run

        start = find_run(plan).recipe()
    _run(load_recipe(recipe, overrides, settings or (), start=start), out, resume, dry_run, json_output)


@app.command()
def demo(
    out: OutOption = Path("fused"),
    settings: SetOption = None,
    device: DeviceOption = None,
    resume: ResumeOption = False,
    dry_run: DryOption = False,
    json_output: JsonOption = False,
) -> None:
    """Merge Gemma 3 270M into SmolLM2-135M-Instruct on the built-in Indonesian samples; no network needed."""
    from tmerge.recipe import load_recipe

    _run(load_recipe("demo", {"device": device}, settings or ()), out, resume, dry_run, json_output)


@app.command()
def check(
    recipe: RecipeArgument = None,
    target: TargetOption = None,
    source: SourceOption = None,
    settings: SetOption = None,
    json_output: JsonOption = False,
) -> None:
    """Hold two models against each other from their configs alone: what matches, and what a merge would take."""
    from tmerge.recipe import load_recipe
    from tmerge.show import show_check

    loaded = load_recipe(recipe, {"target": target, "source": source}, settings or ())
    _quiet_libraries()
    from tmerge.check import check as check_models

    result = check_models(loaded)
    if json_output:
        _print_json(result.to_dict())
    else:
        show_check(result)


@app.command()
def inspect(
    run: Annotated[str, typer.Argument(help="A run's folder, or a pushed run's Hub id.")] = "fused",
    json_output: JsonOption = False,
    html: Annotated[Path | None, typer.Option(help="Write a self-contained page of pictures here.")] = None,
) -> None:
    """Show a finished run's report; --html writes its pictures."""
    from tmerge.run import write_text

    _quiet_libraries()
    from tmerge.hub import find_run

    opened = find_run(run)
    report = opened.report()
    if html is not None:
        from tmerge.plots import report_page

        page = report_page(report, opened.record())
        try:
            write_text(html, page)
        except OSError as error:
            raise TmergeError(f"{html} cannot be written: {error.strerror}; name another file after --html") from None
        typer.echo(f"wrote {html}", err=True)
    if json_output:
        _print_json(report)
    elif html is None:
        from tmerge.show import show_report

        show_report(report, run)


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
    _quiet_libraries()
    from tmerge.benchmark import evaluate_models
    from tmerge.show import listening, show_evaluation

    with listening() as listener:
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
        _print_json(result)
    else:
        show_evaluation(result)


@app.command()
def adapt(
    run: RunArgument = Path("fused"),
    dataset: Annotated[str | None, typer.Option(help="To train on; the run's calibration texts if left out.")] = None,
    objective: Annotated[str | None, typer.Option(help="sft, or distill from the source as well.")] = None,
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
    _quiet_libraries()
    from tmerge.adapted import adapt_run
    from tmerge.show import listening, show_adapted

    folder = out or run.with_name(f"{run.absolute().name}-adapted")
    with listening() as listener:
        report = adapt_run(run, folder, words, dataset=dataset, listener=listener)
    if json_output:
        _print_json(report)
    else:
        show_adapted(report, folder)


@app.command()
def compare(
    recipe: RecipeArgument = None,
    target: TargetOption = None,
    source: SourceOption = None,
    dataset: DatasetOption = None,
    out: Annotated[Path, typer.Option(help="A folder for the merge, the rows and compare.json.")] = Path("compared"),
    settings: SetOption = None,
    device: DeviceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Base, fused, controls, alphas, and training with and without the merge, on the same texts for the same steps."""
    from tmerge.recipe import load_recipe

    overrides = {"target": target, "source": source, "calibration.dataset": dataset, "device": device}
    loaded = load_recipe(recipe, overrides, settings or ())
    _quiet_libraries()
    from tmerge.compare import compare as run_comparison
    from tmerge.show import listening, show_comparison

    with listening() as listener:
        result = run_comparison(loaded, out, listener=listener)
    if json_output:
        _print_json(result)
    else:
        show_comparison(result, out)


def main() -> None:
    """The console script: one line for what a user can mend, a traceback for what they cannot."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        app(standalone_mode=False)
    except TmergeError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("stopped; finished stages are kept, and the same command continues", err=True)
        sys.exit(Cancelled.exit_code)
    except typer.Exit as ended:
        sys.exit(ended.exit_code)
    except typer.TyperException as error:
        # A usage error shows the command's usage with itself; the class it comes from has no public name.
        show = getattr(error, "show", None)
        if show is None:
            typer.echo(f"error: {error.format_message()}", err=True)
        else:
            show()
        sys.exit(error.exit_code)


def _stop(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _run(recipe: Any, out: Path, resume: bool, dry_run: bool, json_output: bool) -> None:
    """What merge and demo share."""
    _quiet_libraries()
    from tmerge.errors import RunNotFoundError
    from tmerge.show import listening, show_check, show_report

    if resume and not (out / "tmerge").is_dir():
        raise RunNotFoundError(f"there is no run in {out} to resume; leave --resume away to begin one")
    if dry_run:
        from tmerge.check import check as check_models

        result = check_models(recipe)
        if json_output:
            _print_json(result.to_dict() | {"recipe": recipe.model_dump(mode="json")})
        else:
            show_check(result)
            typer.echo(recipe.to_yaml())
        return
    from tmerge.pipeline import merge as run_merge

    with listening() as listener:
        report = run_merge(recipe, out, listener=listener)
    if json_output:
        _print_json(report)
    else:
        show_report(report, out)


def _section_words(section: str, settings: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """``--set section.key=value`` words of one section, values read as YAML."""
    import yaml

    from tmerge.errors import RecipeError

    words = {}
    for word in settings:
        key, separator, text = word.partition("=")
        if not separator or not key.startswith(f"{section}."):
            raise RecipeError(f"--set {word!r}: only keys of {section} can be set here, as {section}.key=value")
        words[key.removeprefix(f"{section}.")] = yaml.safe_load(text)
    return words


def _print_json(document: dict[str, Any]) -> None:
    typer.echo(json.dumps(document, indent=1, ensure_ascii=False))


def _quiet_libraries() -> None:
    """Our own progress is shown; the libraries' bars and remarks would break its lines."""
    import datasets
    import huggingface_hub.utils
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()


if __name__ == "__main__":
    main()
