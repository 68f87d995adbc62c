"""`tmerge push` and `reproduce`: a run onto the Hub, and a published one again here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tmerge.cli.shared import DeviceOption, JsonOption, RunArgument, app, print_json, progress, quiet_libraries
from tmerge.cli.stopping import nothing_changed, same_command, stages_kept, when_stopped
from tmerge.errors import ReproductionError

__all__ = ["push", "push_and_show", "reproduce"]


@app.command()
def push(
    run: RunArgument = Path("fused"),
    repo: Annotated[str, typer.Option(help="user/name, or name for your own; made if it is not there.")] = "",
    private: Annotated[bool, typer.Option("--private", help="Make the repo private.")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to write to; made if it is not there.")] = None,
    even_if_worse: Annotated[
        bool, typer.Option("--even-if-worse", help="Push a model that is worse than its target; its card says so.")
    ] = False,
    plan_only: Annotated[
        bool, typer.Option("--plan-only", help="The transport alone, for others to fuse from with --plan; no model.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List files and sizes and print the card.")] = False,
    json_output: JsonOption = False,
) -> None:
    """Push a run: checkpoint, tokenizer, card, recipe, report, transport plan and figures. Never its cache."""
    from tmerge.errors import PushError

    if not repo:
        raise PushError("name the repo to push to: tmerge push --repo user/fused")
    quiet_libraries()
    from tmerge.cli.show import show_push_plan
    from tmerge.hub import plan_push

    if dry_run:
        when_stopped(nothing_changed)
        planned = plan_push(run, repo, even_if_worse=even_if_worse, plan_only=plan_only)
        print_json(planned.to_dict()) if json_output else show_push_plan(planned)
        return
    document = push_and_show(
        run,
        repo,
        private=private,
        create_pr=create_pr,
        revision=revision,
        even_if_worse=even_if_worse,
        plan_only=plan_only,
        show=not json_output,
    )
    if json_output:
        print_json(document)


def push_and_show(run: Path, repo: str, *, show: bool, **options: Any) -> dict[str, Any]:
    """Push with its steps on stderr; the address and the commit go to stdout if they are to be shown."""
    from tmerge.hub import plan_push
    from tmerge.hub import push as push_run

    # One commit: the repo has all of it or nothing.
    when_stopped(lambda: f"{run} is kept, and {repo} has all of it or nothing of it; to push it: {same_command()}")
    asked = {name: options[name] for name in ("even_if_worse", "plan_only") if name in options}
    for warning in plan_push(run, repo, **asked).warnings:
        typer.echo(f"note: {warning}", err=True)
    pushed = push_run(run, repo, **options, listener=lambda what: typer.echo(f"[push] {what}", err=True))
    if show:
        typer.echo(pushed.url)
        typer.echo(f"commit {pushed.commit}")
    return {"repo": pushed.repo, "url": pushed.url, "commit": pushed.commit, "pull_request": pushed.pull_request}


@app.command()
def reproduce(
    run: Annotated[str, typer.Argument(help="A pushed run (user/name, @revision), or a run's folder.")],
    out: Annotated[Path, typer.Option(help="Where the reproduction goes.")] = Path("reproduced"),
    device: DeviceOption = None,
    trust_remote_code: Annotated[
        list[str] | None,
        typer.Option(help="A reference whose repo may run its own code, which the run's recipe lets run. Repeatable."),
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Run a published recipe again at its commits, and compare the published weights with what comes out."""
    quiet_libraries()
    from tmerge.comparison.reproduce import difference_words
    from tmerge.comparison.reproduce import reproduce as reproduce_run

    when_stopped(lambda: stages_kept(out))
    with progress() as listener:
        trusted = trust_remote_code or ()
        result = reproduce_run(run, out, device=device, trust_remote_code=trusted, listener=listener)
    if json_output:
        print_json(result.to_dict())
    elif result.same:
        for name, digests in result.weights.items():
            typer.echo(f"{name}  sha256 {digests.here}")
        typer.echo(
            f"The same weights as those published as {result.reference} and as its report names them, bit by bit; "
            f"they are in {result.folder}"
        )
    if not result.same:
        raise ReproductionError(
            f"the weights differ from those of {result.reference}; {difference_words(result)}; what came out here "
            f"is in {result.folder}"
        )
