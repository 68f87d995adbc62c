"""Runs that were recorded and ship with the app: full pages to look at before anyone waits. Their weights do not ship.

A folder of ``tmerge/ui/examples`` holds what a run's ``tmerge/`` holds (recipe.yaml, report.json, and the transport,
compressed), what the three models answered to the prompts that were offered, and how it was made. ``python -m
tests.bench.examples`` writes one.
"""

from __future__ import annotations

import lzma
import tempfile
import threading
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from tmerge.report import Report
from tmerge.run import Run
from tmerge.transport import TransportRecord
from tmerge.ui.server.visitor_run import CouplingRow, StageProgress, VisitorRun

__all__ = ["EXAMPLES", "Answer", "Example", "Examples", "Talk", "example_id", "shipped_report"]

_PACKAGE = "tmerge.ui"
_FOLDER = "examples"
_PREFIX = "example-"

EXAMPLES = ("relatives", "strangers")
"""Names of those that ship."""


class _Shipped(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Answer(_Shipped):
    """What one model said to a prompt, and how it was asked."""

    text: str
    note: str


class Talk(_Shipped):
    """A prompt, and each role's answer."""

    prompt: str
    said: dict[str, Answer]


class Example(_Shipped):
    """What is told of a recorded run beside its report.

    Attributes:
        title: In a few words.
        made: How, with which models, on which machine: sentences.
        talks: Prompts and answers.
    """

    title: str
    made: str
    talks: tuple[Talk, ...]


def shipped_report(name: str) -> Report:
    """The report of a recorded run, without unpacking the rest."""
    return Report.model_validate_json((resources.files(_PACKAGE) / _FOLDER / name / "report.json").read_bytes())


def example_id(name: str) -> str:
    """What takes the place of a run's id in a link."""
    return _PREFIX + name


class Examples:
    """The recorded runs, each unpacked when it is first looked at; they go with `close`."""

    def __init__(self) -> None:
        self._home = tempfile.TemporaryDirectory(prefix="tmerge-examples-")
        self._runs: dict[str, VisitorRun] = {}
        self._one = threading.Lock()

    def get(self, run_id: str) -> VisitorRun | None:
        """The recorded run of an id; None where it is not of one."""
        name = run_id.removeprefix(_PREFIX)
        if not run_id.startswith(_PREFIX) or name not in EXAMPLES:
            return None
        with self._one:
            if name not in self._runs:
                self._runs[name] = self._opened(name)
            return self._runs[name]

    def close(self) -> None:
        """Remove what was unpacked."""
        with self._one:
            self._runs.clear()
            self._home.cleanup()

    def _opened(self, name: str) -> VisitorRun:
        folder = Path(self._home.name) / name
        (folder / "tmerge").mkdir(parents=True, exist_ok=True)
        shipped = resources.files(_PACKAGE) / _FOLDER / name
        for file in ("recipe.yaml", "report.json"):
            (folder / "tmerge" / file).write_bytes((shipped / file).read_bytes())
        packed = (shipped / "transport.safetensors.xz").read_bytes()
        (folder / "tmerge/transport.safetensors").write_bytes(lzma.decompress(packed))
        example = Example.model_validate_json((shipped / "example.json").read_bytes())
        run = Run(folder)
        report = run.report()
        seen = VisitorRun(example_id(name), run.recipe(), folder, "", "done", report=report, example=example)
        began = 0.0
        for stage in report.stages:
            ended = began + stage.seconds
            seen.stages[stage.name] = StageProgress(began, done=1, ended=ended)
            began = ended
        seen.started, seen.ended, seen.version = 0.0, began, 1
        seen.log.append(f"recorded: {example.made}")
        seen.rows = _rows(TransportRecord.load(run.transport_path))
        return seen


def _rows(record: TransportRecord) -> list[CouplingRow]:
    """The transport costs as they came in, feature by feature."""
    rows: list[CouplingRow] = []
    for key in record.keys:
        costs: Any = record.tensors[f"cost.{key}"].tolist()
        layers = record.tensors[f"layers.target.{key}"].tolist()
        rows += [CouplingRow(key, layer, tuple(row)) for layer, row in zip(layers, costs, strict=True)]
    return rows
