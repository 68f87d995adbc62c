"""What the words of a command line have wrong, in one line with the help that mends it."""

from __future__ import annotations

from collections.abc import Sequence

import typer
from pydantic import ValidationError

from tmerge.cli.shared import app
from tmerge.cli.stopping import program
from tmerge.validation import value_due

__all__ = ["usage_words"]


def usage_words(error: typer.TyperException, words: Sequence[str]) -> str:
    """Typer's complaint and what to do: ``no such option: --sett (Possible options: --set); see tmerge merge --help``.

    Args:
        error: Typer's; its classes have no public names.
        words: Of the command line, without the program's.
    """
    said = " ".join(error.format_message().split()).rstrip(".")
    cause = error.__cause__
    if isinstance(cause, ValidationError):
        # A value's, in pydantic's words: what comes before is the option's name.
        due = value_due(cause.errors(include_url=False)[0])
        said = said if due is None else f"{said.partition(': ')[0]}: give {due}"
    commands = [command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands]
    named = [word for word in words[:1] if word in commands]
    stop = "" if said.endswith("?") else ";"
    return f"{said[:1].lower()}{said[1:]}{stop} see {' '.join([*program(), *named])} --help"
