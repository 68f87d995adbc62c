"""What pages are made of, from files.

A template escapes whatever it is given, and what it asks for has to be there; style sheets and scripts are sent as they
are.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

__all__ = ["html_templates", "static_text"]


def html_templates(*packages: str, **options: Any) -> Environment:
    """The templates in packages' folders ``templates``.

    Args:
        *packages: Such as ``tmerge.plots``; of two files of one name, the first one's counts.
        **options: More of ``jinja2.Environment``.

    Returns:
        An environment that escapes every value which is not marked as safe, and raises ``jinja2.UndefinedError`` where
        a template names what it was not given.
    """
    return Environment(
        loader=ChoiceLoader([PackageLoader(package) for package in packages]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **options,
    )


def static_text(package: str, name: str) -> str:
    """A file of a package's folder ``static``: a style sheet, a script or markup that no value is put into.

    Args:
        package: Such as ``tmerge.plots``.
        name: Such as ``page.css``.
    """
    return (resources.files(package) / "static" / name).read_text(encoding="utf-8")
