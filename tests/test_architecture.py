"""The order of docs/architecture.md: a part of the package imports only from those before it, in no circle."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tmerge"
ORDER = (
    *("version", "errors", "quantities", "processes", "documents", "validation", "hub_client", "templates", "store"),
    *("recipe", "run"),
    *("models", "calibration", "transport", "fusion", "evaluation", "adaptation"),
    *("preflight", "report", "recorded", "hub", "stages", "child", "answers"),
    *("comparison", "plots"),
    *("cli", "ui"),
)

# Within the app: what stands behind the tabs, what they share, what they are made of, and they.
UI_ORDER = ("server", "context", "parts", "tabs")


def _part(module):
    return module.split(".")[1]


def _imported(path):
    """Parts that a file imports when it is imported itself; a function may import more when it is called."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tmerge."):
            yield _part(node.module)
        elif isinstance(node, ast.Import):
            yield from (_part(name.name) for name in node.names if name.name.startswith("tmerge."))


@pytest.mark.parametrize("part", ORDER)
def test_a_part_imports_only_from_those_before_it(part):
    files = [PACKAGE / f"{part}.py"] if (PACKAGE / f"{part}.py").is_file() else sorted((PACKAGE / part).rglob("*.py"))
    assert files
    before = {*ORDER[: ORDER.index(part)], part}
    for path in files:
        assert set(_imported(path)) <= before, path.name


@pytest.mark.parametrize("part", UI_ORDER)
def test_the_app_is_laid_in_the_same_way(part):
    folder = PACKAGE / "ui"
    before = UI_ORDER[: UI_ORDER.index(part) + 1]
    for path in [folder / f"{part}.py"] if part == "context" else sorted((folder / part).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tmerge.ui."):
                assert node.module.split(".")[2] in before, path.name


def test_every_part_has_its_place():
    parts = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert parts - {"__init__", "__main__"} == set(ORDER)
