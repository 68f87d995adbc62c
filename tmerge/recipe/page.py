"""All keys of a recipe, as a page: written from the recipe's own schema, so that it cannot say anything else."""

from __future__ import annotations

import json
from collections.abc import Iterator

from tmerge.recipe.fusion import TaskVector
from tmerge.recipe.recipe import Recipe
from tmerge.recipe.schema import Keys, SectionFacts, entries_of, kind_words, sections_of, top_level

__all__ = ["recipe_page"]

_HEAD = """# The recipe

Everything that decides a run is one YAML file. Each key can also be set on the command line: `--set section.key=value`.
Unknown keys, keys given twice and values of another kind are refused. `tmerge recipe` prints this page, and the
`tmerge/recipe.yaml` of a finished run has every key of what it chose written out.

Two sections are of one of several kinds, each with keys and defaults of its own: `fusion` by `fusion.what`, and
`transport` by `transport.structure`. A task vector and a reconstruction also bring, where the
recipe does not say otherwise:
"""


def recipe_page() -> str:
    """Markdown: a table for the top level, and one for each kind of section, of key, value, default and meaning."""
    beside = ", ".join(
        f"`{section}.{key}: {value}`" for section, values in TaskVector.beside.items() for key, value in values.items()
    )
    parts = [f"{_HEAD}{beside}.\n", "## Top level\n", _table(top_level(Recipe))]
    for name, entry in entries_of(Recipe).items():
        parts += [f"## {name}, each\n", f"{entry.description}\n", _table(entry.keys)]
    for section in sections_of(Recipe).values():
        parts += [f"## {section.name}\n", *_kinds(section)]
    return "\n".join(parts)


def _kinds(section: SectionFacts) -> Iterator[str]:
    for number, (value, kind) in enumerate(section.kinds.items()):
        if section.chooser is not None:
            yield f"### {section.name}.{section.chooser}: {value}{' (the default)' if number == 0 else ''}\n"
        yield f"{kind.description}\n"
        yield _table(kind.keys)


def _table(keys: Keys) -> str:
    rows = ["| key | value | default | |", "|---|---|---|---|"]
    for name, key in keys.items():
        default = f"`{json.dumps(key['default'], ensure_ascii=False)}`" if "default" in key else "must be given"
        cells = (f"`{name}`", kind_words(key), default, key.get("description", ""))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"
