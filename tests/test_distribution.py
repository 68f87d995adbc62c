"""The distribution's name: pip calls it by another than the package has, and everything that names it agrees."""

import re
from pathlib import Path

from tmerge.report import library_versions
from tmerge.version import DISTRIBUTION, VERSION

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


def test_the_spaces_lie_within_the_package():
    # Through a link, which the sdist and the wheel hold as files.
    assert (ROOT / "tmerge/hub/spaces").resolve() == ROOT / "spaces"
