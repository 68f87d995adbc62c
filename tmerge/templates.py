"""HTML from files: a template escapes whatever it is given, and what it asks for has to be there."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

__all__ = ["html_templates"]


def html_templates(package: str, **options: Any) -> Environment:
    """The templates in a package's folder ``templates``.

    Args:
        package: Such as ``tmerge.plots``.
        **options: More of ``jinja2.Environment``.

    Returns:
        An environment that escapes every value which is not marked as safe, and raises ``jinja2.UndefinedError`` where
        a template names what it was not given.
    """
    return Environment(
        loader=PackageLoader(package),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **options,
    )
