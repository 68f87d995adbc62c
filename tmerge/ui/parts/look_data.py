"""What the Look tab reads of a finished run: its report, its record tensor by tensor, its plans in order."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open
from torch import Tensor

from tmerge.comparison.result import Comparison, read_comparison
from tmerge.documents import parse_json
from tmerge.errors import RunNotFoundError
from tmerge.plots import Entries, Order, plan_entries, plan_orders
from tmerge.report import Report
from tmerge.run import Run
from tmerge.transport import TransportRecord

__all__ = ["Looked", "entries_of", "looked_at", "orders_of"]

# Tensors larger than this are read again when they are needed again.
_KEPT_VALUES = 100_000


@dataclass(frozen=True)
class Looked:
    """A finished run as it is looked at.

    Attributes:
        folder: The run's.
        report: report.json.
        record: Its transport; its tensors are read on demand.
        comparison: Of the merge with trainings, where the run is one.
    """

    folder: Path
    report: Report
    record: TransportRecord
    comparison: Comparison | None = None


class _StoredTensors(dict[str, Tensor]):
    """A record's tensors, each read when it is first asked for: of a large pair they are gigabytes."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def __missing__(self, name: str) -> Tensor:
        try:
            with safe_open(self._path, "pt") as stored:
                tensor = stored.get_tensor(name)
        except OSError:
            raise RunNotFoundError("the run's folder is gone; run the merge again") from None
        if tensor.numel() <= _KEPT_VALUES:
            self[name] = tensor
        return tensor


@functools.lru_cache(maxsize=4)
def looked_at(folder: Path) -> Looked:
    """The finished run in a folder; the last few stay in memory.

    Raises:
        ComparisonError: The comparison that its merge is of cannot be read.
        RunNotFoundError: It is not finished, or gone.
    """
    run = Run(folder)
    report = run.report()
    try:
        with safe_open(run.transport_path, "pt") as stored:
            facts = parse_json((stored.metadata() or {})["tmerge"])
    except (OSError, KeyError, ValueError):
        raise RunNotFoundError("this run has no transport plans to look at; run the merge again") from None
    compared = folder.parent / "compare.json"
    comparison = read_comparison(compared) if compared.is_file() else None
    return Looked(folder, report, TransportRecord(facts, _StoredTensors(run.transport_path)), comparison)


@functools.lru_cache(maxsize=4)
def entries_of(folder: Path, key: str, row: int, column: int) -> Entries | None:
    """The sparse plan of a layer pair; None where it was not kept."""
    record = looked_at(folder).record
    pairs = record.pairs(key)
    return plan_entries(record.plans(key), pairs.index((row, column))) if (row, column) in pairs else None


@functools.lru_cache(maxsize=4)
def orders_of(folder: Path, key: str, row: int, column: int, order: Order) -> tuple[np.ndarray, np.ndarray]:
    """The order of a kept pair's neurons on both sides, (n,) and (n',): found once, then zoomed into."""
    entries = entries_of(folder, key, row, column)
    assert entries is not None  # asked for after `entries_of`
    return plan_orders(entries, order)
