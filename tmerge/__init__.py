"""tmerge: merge language models of different architectures by optimal transport, and know whether it helped.

from tmerge import load_recipe, merge
report = merge(load_recipe("demo"), "fused")
print(report.verdict)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tmerge.comparison.compare import compare
    from tmerge.preflight.check import check
    from tmerge.recipe import Recipe, load_recipe
    from tmerge.run import Run
    from tmerge.stages.merge import Step, merge

__all__ = ["Recipe", "Run", "Step", "check", "compare", "load_recipe", "load_run", "merge"]

# No module of this package bears one of these names: importing it would put the module in the name's place.
_HOMES = {
    "Recipe": "recipe",
    "Run": "run",
    "Step": "stages.merge",
    "check": "preflight.check",
    "compare": "comparison.compare",
    "load_recipe": "recipe",
    "merge": "stages.merge",
}


def load_run(folder: str = "fused") -> Run:
    """A finished run's folder: `Run.report`, `Run.recipe`, `Run.transport_path`."""
    from pathlib import Path

    from tmerge.run import Run

    run = Run(Path(folder))
    run.report()
    return run


def __getattr__(name: str) -> Any:
    """Load torch and transformers only when something that needs them is asked for: `tmerge --help` is quick."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"tmerge.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'tmerge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
