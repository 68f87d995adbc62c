"""`tmerge merge`, `demo`, `check` and `inspect`: making a merge, and looking at one."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tmerge.cli.shared import (
    AdapterOption,
    BaseOption,
    DatasetOption,
    DeviceOption,
    DryOption,
    DtypeOption,
    HtmlOption,
    JsonOption,
    OutOption,
    RecipeArgument,
    ResumeOption,
    SaveOption,
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
from tmerge.cli.stopping import nothing_changed, same_command, stages_kept, when_stopped
from tmerge.errors import ProcessesError, TmergeError
from tmerge.processes import are_several, rank_of_this
from tmerge.version import DISTRIBUTION, VERSION, installs_tmerge

if TYPE_CHECKING:
    from tmerge.report import Relatedness, Report

__all__ = ["check", "demo", "inspect", "merge", "recipe"]


@app.command()
def merge(
    recipe: RecipeArgument = None,
    target: TargetOption = None,
    source: SourceOption = None,
    source_base: BaseOption = None,
    adapter: AdapterOption = None,
    what: WhatOption = None,
    dataset: DatasetOption = None,
    out: OutOption = Path("fused"),
    save: SaveOption = None,
    settings: SetOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    seed: SeedOption = None,
    plan: Annotated[str | None, typer.Option(help="Fuse from a finished run's transport: folder or Hub id.")] = None,
    push: Annotated[str | None, typer.Option(help="Push the result to this repo, as `tmerge push`.")] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push: make the repo private.")] = False,
    even_if_worse: Annotated[bool, typer.Option("--even-if-worse", help="With --push: whatever the verdict.")] = False,
    remote: Annotated[
        str | None,
        typer.Option(
            help="Run as a Hugging Face Job on this hardware, such as l4x1; needs --push and --remote-package."
        ),
    ] = None,
    remote_package: Annotated[
        str | None,
        typer.Option(help="What the job installs tmerge from: git+https://... of this project, or a wheel's URL."),
    ] = None,
    remote_timeout: Annotated[
        str | None, typer.Option(help="After which the Hub stops the job: 30m, 4h; 4h if left out.")
    ] = None,
    html: HtmlOption = None,
    resume: ResumeOption = False,
    dry_run: DryOption = False,
    json_output: JsonOption = False,
) -> None:
    """Merge a source into a target, score the result on held-out texts, and save it."""
    from tmerge.recipe import load_recipe

    if remote is None:
        _refuse_idle({"--remote-package": remote_package, "--remote-timeout": remote_timeout}, "--remote")
    if push is None:
        _refuse_idle({"--private": private, "--even-if-worse": even_if_worse}, "--push")
    overrides = {
        **pair_words(target, source, source_base, adapter, what, dataset),
        "device": device,
        "dtype": dtype,
        "seed": seed,
        "plan": plan,
        "save.form": save,
    }
    start = None
    if plan is not None and recipe is None:
        quiet_libraries()
        from tmerge.hub import find_run

        when_stopped(nothing_changed)
        start = find_run(plan).recipe()
    loaded = load_recipe(recipe, overrides, settings or (), start=start)
    if remote is not None:
        if are_several():
            raise ProcessesError("--remote starts one job, from one process: leave out torchrun or accelerate launch")
        if html is not None:
            raise TmergeError("--html draws a run of this machine; of a remote one: tmerge inspect REPO --html FILE")
        timeout = "4h" if remote_timeout is None else remote_timeout
        _run_remotely(loaded, remote, push, remote_package, timeout, dry_run, json_output)
        return
    if push is not None and not dry_run:
        from tmerge.hub.push import refuse_unready

        refuse_unready(push)
    report = _run(loaded, out, resume, dry_run, json_output and push is None, html)
    if push is not None and report is not None:
        from tmerge.cli.publishing import push_and_show

        document = push_and_show(out, push, private=private, even_if_worse=even_if_worse, show=not json_output)
        if json_output:
            print_json(report.to_dict() | {"pushed": document})


def _refuse_idle(options: dict[str, object], needs: str) -> None:
    """Refuse options that would do nothing, as what they belong to was left out."""
    if given := [name for name, value in options.items() if value]:
        raise TmergeError(f"{' and '.join(given)}: nothing comes of it without {needs}; add that, or leave it out")


@app.command()
def demo(
    out: OutOption = Path("fused"),
    settings: SetOption = None,
    device: DeviceOption = None,
    html: HtmlOption = None,
    resume: ResumeOption = False,
    dry_run: DryOption = False,
    json_output: JsonOption = False,
) -> None:
    """Merge Gemma 3 270M into SmolLM2-135M-Instruct on the built-in Indonesian samples; no network needed."""
    from tmerge.recipe import load_recipe

    _run(load_recipe("demo", {"device": device}, settings or ()), out, resume, dry_run, json_output, html)


@app.command()
def check(
    recipe: RecipeArgument = None,
    target: TargetOption = None,
    source: SourceOption = None,
    source_base: BaseOption = None,
    adapter: AdapterOption = None,
    what: WhatOption = None,
    dataset: DatasetOption = None,
    save: SaveOption = None,
    settings: SetOption = None,
    relatedness: Annotated[
        bool,
        typer.Option(
            "--relatedness", help="Also read both models' features, and say whether their neurons correspond."
        ),
    ] = False,
    json_output: JsonOption = False,
) -> None:
    """Hold two models against each other from their configs alone: what matches, and what a merge would take."""
    from tmerge.cli.show import show_check
    from tmerge.recipe import load_recipe

    overrides = pair_words(target, source, source_base, adapter, what, dataset) | {"save.form": save}
    loaded = load_recipe(recipe, overrides, settings or ())
    quiet_libraries()
    from tmerge.preflight.check import check as check_models
    from tmerge.preflight.flavors import with_flavors

    when_stopped(nothing_changed)
    result = with_flavors(check_models(loaded), loaded)
    measured = _relatedness(loaded, named=dataset) if relatedness else None
    if json_output:
        more = {} if measured is None else {"relatedness": measured.model_dump(mode="json")}
        print_json(result.to_dict() | more)
        return
    show_check(result)
    if measured is not None:
        from tmerge.report import relatedness_words

        typer.echo(relatedness_words(measured))


@app.command()
def recipe() -> None:
    """Show all keys of a recipe, with what they take, their defaults and what they are."""
    from tmerge.recipe import recipe_page

    typer.echo(recipe_page(), nl=False)


def _relatedness(recipe: Any, named: str | None) -> Relatedness:
    """Both models read, and their neurons matched twice; nothing is kept. On the dataset, where one was named."""
    from tmerge.stages.relatedness import measure_relatedness

    when_stopped(lambda: f"nothing is kept; to start again: {same_command()}")
    with tempfile.TemporaryDirectory() as folder, progress() as listener:
        return measure_relatedness(recipe, Path(folder) / "pair", on_dataset=named is not None, listener=listener)


@app.command()
def inspect(
    run: Annotated[str, typer.Argument(help="A run's or a comparison's folder, or a pushed run's Hub id.")] = "fused",
    json_output: JsonOption = False,
    html: HtmlOption = None,
) -> None:
    """Show a finished run's report, or a comparison; --html writes its pictures."""
    quiet_libraries()
    if (Path(run) / "compare.json").is_file():
        _inspect_comparison(Path(run), json_output, html)
        return
    from tmerge.hub import find_run

    when_stopped(nothing_changed)
    opened = find_run(run)
    report = opened.report()
    if html is not None:
        when_stopped(lambda: f"{html} is written whole or not at all; to start again: {same_command()}")
        _write_report_page(html, report, opened.record())
    if json_output:
        print_json(report.to_dict())
    elif html is None:
        from tmerge.cli.show import show_report

        show_report(report, run)


def _inspect_comparison(folder: Path, json_output: bool, html: Path | None) -> None:
    """What `tmerge compare` left in a folder."""
    from tmerge.comparison.result import read_comparison

    when_stopped(nothing_changed)
    comparison = read_comparison(folder / "compare.json")
    if html is not None:
        from tmerge.plots.comparison import comparison_page

        _write_page(html, comparison_page(comparison))
    if json_output:
        print_json(comparison.to_dict())
    elif html is None:
        from tmerge.cli.show import show_comparison

        show_comparison(comparison, folder)


def _run_remotely(
    recipe: Any, flavor: str, repo: str | None, package: str | None, timeout: str, dry_run: bool, json_output: bool
) -> None:
    """The recipe as a job on the Hub, followed to its end."""
    from tmerge.errors import RemoteError

    if repo is None or "/" not in repo:
        raise RemoteError("--remote leaves its result in a repo of yours; name it with --push user/fused")
    if package is None or not installs_tmerge(package):
        raise RemoteError(
            "say with --remote-package what the job installs tmerge from: git+https://... of this project, "
            f"{DISTRIBUTION}=={VERSION}, or the https:// address of its wheel"
        )
    quiet_libraries()
    from tmerge.cli.show import show_check
    from tmerge.hub.jobs import follow_job, start_job
    from tmerge.preflight.check import check as check_models
    from tmerge.preflight.flavors import with_flavors

    when_stopped(nothing_changed)
    # What cannot be merged is said here, before the job costs anything. The recipe's device is the job's, and this
    # machine need not have it.
    result = check_models(recipe.model_copy(update={"device": "auto"}))
    if dry_run:
        assumes = f"{result.estimate.assumes}; time and memory are those of this machine, not of {flavor}"
        result = replace(with_flavors(result, recipe), estimate=replace(result.estimate, assumes=assumes))
        print_json(result.to_dict()) if json_output else show_check(result)
        return
    # The same command again would start another job, so what is said on Ctrl-C is of the job alone.
    when_stopped(lambda: "whether a job had started already is shown by `hf jobs ps`")
    job = start_job(recipe, flavor, repo, package=package, timeout=timeout)
    when_stopped(
        lambda: f"the job goes on: {job.url}; its log: `hf jobs logs {job.job}`; to stop it: `hf jobs cancel {job.job}`"
    )
    typer.echo(f"[remote] job {job.job} on {flavor}: {job.url}", err=True)
    typer.echo(f"[remote] stopping this command does not stop it; `hf jobs cancel {job.job}` does", err=True)
    commit = follow_job(job, lambda line: typer.echo(line, err=True))
    if json_output:
        print_json({"job": job.job, "job_url": job.url, "repo": repo, "commit": commit})
    else:
        typer.echo(f"{repo} (private), commit {commit}; its verdict: tmerge inspect {repo}")


def _write_report_page(path: Path, report: Report, record: Any) -> None:
    """A run's pictures in one file."""
    from tmerge.plots import report_page

    _write_page(path, report_page(report, record))


def _write_page(path: Path, page: str) -> None:
    from tmerge.store import write_text

    if not path.name:
        raise TmergeError("--html names no file; give one")
    try:
        write_text(path, page)
    except OSError as error:
        raise TmergeError(f"{path} cannot be written: {error.strerror}; name another file after --html") from None
    typer.echo(f"wrote {path}", err=True)


def _refuse_page(path: Path, out: Path) -> None:
    """Say before a long run that its page could not be written after it; the run's own folder may be yet to come.

    Raises:
        TmergeError: It is a folder, or in a folder that is not there.
    """
    if path.is_dir():
        raise TmergeError(f"{path} is a folder; name a file after --html")
    folder = path.parent
    if not folder.is_dir() and folder.resolve() not in (out.resolve(), (out / "tmerge").resolve()):
        raise TmergeError(f"{path} cannot be written: there is no folder {folder}; name another file after --html")


def _run(recipe: Any, out: Path, resume: bool, dry_run: bool, json_output: bool, html: Path | None) -> Report | None:
    """What merge and demo share: the report, or None of a dry run."""
    quiet_libraries()
    from tmerge.cli.show import show_check, show_report
    from tmerge.errors import RunNotFoundError

    if resume and not (out / "tmerge").is_dir():
        raise RunNotFoundError(f"there is no run in {out} to resume; leave --resume away to begin one")
    if html is not None:
        _refuse_page(html, out)
    if dry_run:
        from tmerge.preflight.check import check as check_models
        from tmerge.preflight.flavors import with_flavors

        if rank_of_this():
            return None
        when_stopped(nothing_changed)
        result = with_flavors(check_models(recipe), recipe)
        if json_output:
            print_json(result.to_dict() | {"recipe": recipe.model_dump(mode="json")})
        else:
            show_check(result)
            typer.echo(recipe.to_yaml())
        return None
    from tmerge.processes import joined
    from tmerge.stages.merge import merge as run_merge

    when_stopped(lambda: stages_kept(out))
    with joined() as processes, progress(heard=processes.is_first) as listener:
        report = run_merge(recipe, out, listener=listener, processes=processes)
    if not processes.is_first:
        return None
    if html is not None:
        from tmerge.hub import find_run

        when_stopped(lambda: f"the merge is finished, in {out}; its pictures: tmerge inspect {out} --html {html}")
        _write_report_page(html, report, find_run(str(out)).record())
    if json_output:
        print_json(report.to_dict())
    else:
        show_report(report, out, html)
    return report
