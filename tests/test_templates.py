"""HTML comes from template files: they escape, refuse what they were not given, and go with the package."""

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
from jinja2 import UndefinedError, nodes

from tmerge.templates import html_templates

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "tmerge").rglob("templates/*"))
# Our own, and plotly's: what stands in scripts and styles, and pictures that are HTML already.
TRUSTED = {"book", "figure", "plotly", "script", "style"}


def page(folder, template, **values):
    """What a template gives that is the only one of a new package in that folder."""
    (folder / "templates").mkdir()
    (folder / "__init__.py").touch()
    (folder / "templates" / "a.html").write_text(template, encoding="utf-8")
    return html_templates(folder.name).get_template("a.html").render(**values)


@pytest.fixture
def package(tmp_path, monkeypatch, request):
    """An empty folder that is imported by its name, another for each test."""
    folder = tmp_path / f"package_of_{request.node.name}"
    folder.mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_what_is_given_is_escaped(package):
    given = page(package, '<p title="{{ text }}">{{ text }}</p>', text="\"'<b>&amp;")
    assert given == '<p title="&#34;&#39;&lt;b&gt;&amp;amp;">&#34;&#39;&lt;b&gt;&amp;amp;</p>'


def test_what_is_not_given_is_refused(package):
    with pytest.raises(UndefinedError, match="'text' is undefined"):
        page(package, "{{ text }}")


def test_every_template_goes_with_the_package():
    shipped = re.search(r"^tmerge = \[(.*)\]$", (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)[1]
    patterns = re.findall(r'"([^"]+)"', shipped)
    assert len(FILES) > 5
    for path in FILES:
        name = path.relative_to(ROOT / "tmerge").as_posix()
        assert any(fnmatch(name, pattern) for pattern in patterns), name


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_nothing_is_taken_as_safe_but_what_is_ours(path):
    found = html_templates("tmerge.plots").parse(path.read_text(encoding="utf-8"))
    safe = [node for node in found.find_all(nodes.Filter) if node.name == "safe"]
    assert {node.node.name for node in safe} <= TRUSTED
    assert not list(found.find_all(nodes.ScopedEvalContextModifier))
