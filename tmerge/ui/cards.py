"""The app's cards as HTML: what `check` says of two models, and what went wrong. All text of others is escaped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tmerge.quantities import bytes_words, number_words
from tmerge.ui.limits import AppSettings, describe_limits
from tmerge.ui.safe import escape

__all__ = ["check_cards", "empty_card", "error_card", "limits_line", "note"]


def empty_card(title: str, line: str) -> str:
    """A card that says what will be here."""
    return f'<div class="card quiet"><p class="card-title">{escape(title)}</p><p>{escape(line)}</p></div>'


def error_card(title: str, line: str) -> str:
    """A card for what has to be mended, read out by a screen reader as it comes."""
    return (
        f'<div class="card bad" role="alert"><p class="card-title"><span aria-hidden="true">\u25b2</span> '
        f"{escape(title)}</p><p>{escape(line)}</p></div>"
    )


def note(line: str, *, bad: bool = False, keep: bool = False) -> str:
    """One line beside a field.

    Args:
        line: Empty for none.
        bad: Whether it says what has to be mended.
        keep: Whether an empty line keeps its height, so that nothing jumps when there is one.
    """
    if not line and not keep:
        return ""
    state = ' class="note bad" role="alert"' if bad and line else ' class="note" role="status"'
    return f"<p{state}>{escape(line) if line else '&nbsp;'}</p>"


def check_cards(facts: Mapping[str, Any], refused: str | None = None) -> str:
    """What `check` found, the two models side by side.

    Args:
        facts: `tmerge.preflight.check.Check.to_dict`.
        refused: Why this app does not run it, if it does not.
    """
    matched = facts["projections"]["matched"]
    models = "".join(_model_card(role, facts[role]) for role in ("target", "source"))
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{_shape(shapes["target"])}</td>'
        f"<td>{_shape(shapes['source'])}</td></tr>"
        for name, shapes in matched.items()
    )
    skipped = "".join(
        f"<li><b>{escape(name)}</b> is left out: {escape(why)}</li>"
        for name, why in facts["projections"]["skipped"].items()
    )
    left = "".join(
        f"<li>{role}: {escape(line)}</li>" for role in ("target", "source") for line in facts["left_alone"][role]
    )
    # What the licences ask has a card of its own.
    told = {*facts["licence"]["refusals"], *facts["licence"]["unknown"]}
    notes = "".join(f"<li>{escape(line)}</li>" for line in facts["notes"] if line not in told)
    listed = f'<ul class="notes">{notes}{skipped}{left}</ul>' if notes or skipped or left else ""
    estimate = facts["estimate"]
    fetched = estimate["download_bytes"]
    download = f"<div><dt>to fetch</dt><dd>{escape(bytes_words(fetched))}</dd></div>" if fetched else ""
    warning = error_card("Too large for this app", refused) if refused else ""
    return (
        f'{warning}<section class="check" aria-label="What a merge of these two would be">'
        f'<div class="pair">{models}</div>'
        '<div class="pair">'
        '<div class="card"><p class="card-title">Projections that meet</p>'
        '<table class="plain"><caption class="unseen">Sizes of the matched projections, output by input</caption>'
        '<thead><tr><th scope="col">name</th><th scope="col">target</th><th scope="col">source</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
        '<div class="card"><p class="card-title">Expected here</p><dl class="big">'
        f"<div><dt>time</dt><dd>{escape(estimate['time'])}</dd></div>"
        f"<div><dt>memory</dt><dd>{escape(bytes_words(estimate['memory_bytes']))}</dd></div>"
        f"<div><dt>disk</dt><dd>{escape(bytes_words(estimate['disk_bytes']))}</dd></div>{download}</dl>"
        f'<p class="small">{escape(estimate["assumes"])}</p>{listed}</div>'
        f"{_licence_card(facts['licence'])}</div></section>"
    )


def limits_line(settings: AppSettings) -> str:
    """What this app takes, in one line; empty where there are no limits."""
    listed = "; ".join(f"{name}: {value}" for name, value in describe_limits(settings))
    return f'<p class="small">This app takes at most: {escape(listed)}.</p>' if listed else ""


def _licence_card(licence: Mapping[str, Any]) -> str:
    """What the two licences make of the merge's, and what they ask of whoever publishes it."""
    name = licence["id"] if licence["name"] is None else f"{licence['id']} ({licence['name']})"
    against = "".join(f'<li class="against">{escape(line)}</li>' for line in licence["refusals"])
    asked = "".join(f"<li>{escape(line)}</li>" for line in (*licence["unknown"], *licence["duties"]))
    listed = f'<ul class="notes">{against}{asked}</ul>' if against or asked else ""
    return (
        f'<div class="card"><p class="role">licence of the merge</p><p class="card-title break">{escape(name)}</p>'
        f'<p class="small">{escape(licence["why"])}</p>{listed}</div>'
    )


def _model_card(role: str, model: Mapping[str, Any]) -> str:
    heads = (
        f"{model['heads']}"
        if model["heads"] == model["kv_heads"]
        else f"{model['heads']} ({model['kv_heads']} key/value)"
    )
    commit = str(model["commit"] or "")
    # A local file is known by its hash, a repo by its commit.
    version = commit[:15] if commit.startswith("sha256:") else commit[:10]
    facts = (
        ("architecture", escape(model["architecture"])),
        ("parameters", escape(number_words(model["parameters"]))),
        ("weights", escape(bytes_words(model["weight_bytes"]))),
        ("layers", escape(model["layers"])),
        ("width", escape(model["hidden_size"])),
        ("heads", escape(heads)),
        ("licence", escape(model["licence"])),
        ("version", f'<code class="version">{escape(version)}</code>'),
    )
    marks = "".join(
        f'<span class="mark">{word}</span>' for word, key in (("gated", "gated"), ("private", "private")) if model[key]
    )
    rows = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)
    does = "is changed" if role == "target" else "is read"
    return (
        f'<div class="card"><p class="role">{role} <span>{does}</span>{marks}</p>'
        f'<p class="card-title break">{escape(model["ref"])}</p><dl class="facts">{rows}</dl></div>'
    )


def _shape(sizes: list[int]) -> str:
    return " \u00d7 ".join(map(str, sizes))
