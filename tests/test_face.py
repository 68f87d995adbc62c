"""The face of the package: every name in ``__all__`` is one and the same callable, whatever was imported before."""

import subprocess
import sys
from importlib.machinery import PathFinder

import pytest

import tmerge
from tests import forked

# Each name is asked for twice, with all the others asked for in between, and by a from-import last.
_TWICE = """
names = list(tmerge.__all__)
first = {name: getattr(tmerge, name) for name in names}
second = {name: getattr(tmerge, name) for name in reversed(names)}
for name in names:
    scope = {}
    exec(f"from tmerge import {name}", scope)
    assert callable(first[name]), (name, first[name])
    assert first[name] is second[name] is scope[name], (name, first[name], second[name], scope[name])
"""

_ORDERS = {
    "nothing before": "import tmerge",
    "the homes first": "import tmerge.preflight.check, tmerge.preflight.estimate, tmerge.comparison.compare, tmerge",
    "names from their homes": "from tmerge.comparison.compare import compare\n"
    "from tmerge.preflight.check import check\nimport tmerge\n"
    "assert tmerge.check is check and tmerge.compare is compare",
    "everything first": "import pkgutil, importlib, tmerge, tmerge.cli.merging, tmerge.cli.training\n"
    "for found in pkgutil.iter_modules(tmerge.__path__):\n"
    "    if found.name != 'ui': importlib.import_module(f'tmerge.{found.name}')",
}


@pytest.mark.parametrize(
    "order",
    [
        pytest.param(order, marks=[] if name == "nothing before" else [pytest.mark.slow])
        for name, order in _ORDERS.items()
    ],
    ids=_ORDERS,
)
def test_every_name_is_the_same_callable_at_each_access(order):
    ended = forked.run(script=f"{order}\n{_TWICE}")
    assert ended.returncode == 0, ended.stderr


def test_no_module_bears_a_name_of_the_face():
    # Importing it would put the module in the name's place, for everybody.
    for name in tmerge.__all__:
        assert PathFinder.find_spec(f"tmerge.{name}", tmerge.__path__) is None, name


def test_all_is_what_is_there():
    # In a process of its own: here, submodules that tests have imported lie on the package as well.
    script = "import tmerge; print(*(name for name in dir(tmerge) if not name.startswith('_')))"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    offered = set(ended.stdout.split()) - {"annotations", "Any", "TYPE_CHECKING"}
    assert offered == set(tmerge.__all__) and len(tmerge.__all__) == len(set(tmerge.__all__))


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="no attribute 'chekc'"):
        tmerge.chekc  # noqa: B018 - the access is what is tried
