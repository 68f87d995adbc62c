"""The distribution's name: pip calls it by another than the package has, and everything that names it agrees."""

import re
from pathlib import Path

import pytest

from tmerge.report import library_versions
from tmerge.version import DISTRIBUTION, VERSION, installs_tmerge

ROOT = Path(__file__).parents[1]


def test_the_project_has_the_name_and_the_version_of_the_code():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'name = "{DISTRIBUTION}"' in project and DISTRIBUTION != "tmerge"
    assert 'dynamic = ["version"]' in project and 'attr = "tmerge.version.VERSION"' in project
    assert library_versions()["tmerge"] == VERSION and re.fullmatch(r"\d+\.\d+\.\d+", VERSION)


def test_nobody_is_told_to_install_another_projects_package():
    told, command = [], re.compile(r"""pip install (?:--\S+ )*["']?(tmerge[^\s"'`\[=]*|\{DISTRIBUTION\})""")
    for path in [*ROOT.glob("*.md"), ROOT / "app.py", *(ROOT / "tmerge").rglob("*.py"), *(ROOT / "spaces").rglob("*")]:
        if path.is_file():
            told += command.findall(path.read_text("utf-8"))
    assert len(told) >= 4 and set(told) <= {DISTRIBUTION, "{DISTRIBUTION}"}


def test_no_requirement_names_another_projects_package():
    named, requirement = [], re.compile(r"(?<![\w./-])tmerge *(?:[=<>~!]=|\[|@ *(?:git|https))")
    places = [*ROOT.glob("*.*"), ROOT / "Makefile", *(ROOT / "docs").rglob("*"), *(ROOT / "tmerge").rglob("*")]
    for path in [*places, *(ROOT / "spaces").rglob("*")]:
        if path.suffix in (".md", ".py", ".toml", ".txt", ".yaml", ".yml", "") and path.is_file():
            text = path.read_text("utf-8")
            named += [(path.name, line) for line in text.splitlines() if requirement.search(line)]
    assert not named and requirement.search("such as ``tmerge==0.1.0``") and requirement.search("'tmerge[app]'")


def test_the_spaces_lie_within_the_package():
    # Through a link, which the sdist and the wheel hold as files.
    assert (ROOT / "tmerge/hub/spaces").resolve() == ROOT / "spaces"


@pytest.mark.parametrize(
    ("package", "taken"),
    [
        ("tmerge-llm[app]==0.1.0", True),
        ("git+https://example.org/tmerge", True),
        ("tmerge-llm @ https://example.org/tmerge_llm-0.1.0-py3-none-any.whl", True),
        ("tmerge==0.1.0", False),
        ("tmerge", False),
        ("tmerge-llm", False),
        ("tmerge-llm==0.1.0 evil==1", False),
        ("git+http://example.org/tmerge", False),
        ("other @ https://example.org/other", False),
        ("--index-url https://example.org", False),
    ],
)
def test_a_job_installs_this_project_alone(package, taken):
    assert installs_tmerge(package) is taken
