"""`tmerge app` and `space`: the browser app, here or as a Space."""

from __future__ import annotations

import os
import socket
from typing import Annotated

import typer

from tmerge.cli.shared import JsonOption, app, print_json, quiet_libraries
from tmerge.cli.stopping import nothing_changed, raise_if_stopped, same_command, when_stopped
from tmerge.errors import MissingExtraError, PortTakenError, PushError
from tmerge.version import DISTRIBUTION

__all__ = ["serve", "space"]


@app.command("app")
def serve(
    port: Annotated[
        int | None, typer.Option(help="To listen on; the first free one from 7860 on if left out.", min=1, max=65535)
    ] = None,
) -> None:
    """Open the browser app: choose a pair, watch the merge, look at its transport, try the result, push it."""
    if port is not None:
        _refuse_taken(port)
    quiet_libraries()
    try:
        from tmerge.ui import launch
    except ImportError as error:
        if error.name != "gradio":
            raise
        raise MissingExtraError(f'the app needs gradio; install it with: pip install "{DISTRIBUTION}[app]"') from None
    when_stopped(lambda: f"the app is closed; to open it again: {same_command()}")
    try:
        launch(port, raise_if_stopped=raise_if_stopped)
    except OSError as error:
        raise _taken(port, error) from None


def _refuse_taken(port: int) -> None:
    """Look before the libraries are imported, which takes a quarter of a minute."""
    with socket.socket() as probe:
        # As Gradio does: a port that was let go a moment ago is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), port))
        except OSError as error:
            raise _taken(port, error) from None


def _taken(port: int | None, error: OSError) -> PortTakenError:
    if port is None:
        return PortTakenError(f"no port is free: {error}")
    why = error.strerror or error
    return PortTakenError(f"port {port} cannot be listened on ({why}); name another with --port, or leave it away")


@app.command()
def space(
    repo: Annotated[str, typer.Option(help="user/space; made if it is not there.")] = "",
    hardware: Annotated[str, typer.Option(help="cpu or zerogpu.")] = "cpu",
    private: Annotated[bool, typer.Option("--private", help="Make the Space private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List files and sizes; upload nothing.")] = False,
    json_output: JsonOption = False,
) -> None:
    """Deploy the app as a Space of yours, or bring one up to date."""
    if not repo:
        raise PushError("name the Space to deploy to: tmerge space --repo user/space")
    from tmerge.hub.space import deploy_space, plan_space
    from tmerge.quantities import bytes_words, count_words

    when_stopped(nothing_changed)
    planned = plan_space(repo, hardware)
    if dry_run:
        if json_output:
            print_json(planned.to_dict())
            return
        width = max(len(name) for name in planned.files)
        for name, size in planned.files.items():
            typer.echo(f"{name:<{width}}  {size:>9,} bytes")
        typer.echo(
            f"{count_words(len(planned.files), 'file')}, {bytes_words(planned.total_bytes)}, for {repo} on {hardware}"
        )
        return
    quiet_libraries()
    when_stopped(lambda: f"{repo} has all of this deployment or nothing of it; to deploy it: {same_command()}")
    deployed = deploy_space(planned, private=private, listener=lambda what: typer.echo(f"[space] {what}", err=True))
    if json_output:
        print_json({"repo": deployed.repo, "url": deployed.url, "commit": deployed.commit})
        return
    typer.echo(deployed.url)
    typer.echo(f"commit {deployed.commit}")
