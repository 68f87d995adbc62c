"""transport.safetensors: what a run keeps of its transport, enough to draw it and to fuse from it again.

| tensor | shape | what |
|---|---|---|
| ``cost.KEY`` | (L, M) | ``<C, Q>`` of every layer pair, Eq. 10 |
| ``layer_plan.KEY`` | (L, M) | P, Eq. 11-12 |
| ``effective.PROJ`` | (L, M) | sqrt(P_pre P_post), Eq. 13 |
| ``kept.PROJ.layers``, ``.weights`` | (L, k) | source layers kept per target layer (as columns of M), strongest first |
| ``layers.target.KEY``, ``layers.source.KEY`` | (L,), (M,) | the models' own layer numbers of the rows and columns |
| ``pairs.KEY`` | (K, 2) | the kept layer pairs, as (row of L, column of M) |
| ``f.KEY``, ``g.KEY`` | (K, n), (K, n') | their potentials; not where the structure is shared and nothing is iterated |
| ``plan.KEY.offsets``, ``.columns``, ``.values`` | (K n + 1,), (E,), (E,) | sparse plans by rows: n * Q in float16 |
| ``plan.KEY.beyond`` | (B,) | those of the E that did not survive, the largest of a row or column left empty |
| ``mass.KEY`` | (K, len(MASS_AT)) | share of a row's mass in its top entries, mean over 256 rows (Figure 3) |
| ``neurons.PROJ`` | (L, k) | selected neurons, A.5 |
| ``statistics.target.KEY.FIELD`` | (L, n) | mean, deviation, magnitude over the calibration set |
| ``statistics.source.KEY.FIELD`` | (M, n') | likewise |

KEY is a feature such as ``q.post`` or ``qkv.pre``; PROJ one of q k v o gate up down.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, safe_open, save_file
from torch import Tensor

from tmerge.documents import json_text
from tmerge.errors import RunNotFoundError

__all__ = ["MASS_AT", "SparsePlans", "TransportRecord", "mass_of_top", "sparsify"]

_MASS_ROWS = 256
MASS_AT = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""Numbers of entries at which a row's captured mass is recorded; past the row's length it is 1."""


@dataclass(frozen=True)
class SparsePlans:
    """Some plans of one shape (n, n'), each row's kept entries one after the other.

    Attributes:
        offsets: (K * n + 1,) int64, where each row begins in `columns` and `values`.
        columns: (E,) int16, or int32 where n' needs it.
        values: (E,) float16, n * Q, so that a row of the whole plan sums to 1.
        beyond: (B,) int64, sorted: entries that did not survive the top-entries rule. A row or column of which
            nothing survived is transported through its largest entry, so that one is stored as well.
        shape: (n, n').
    """

    offsets: Tensor
    columns: Tensor
    values: Tensor
    beyond: Tensor
    shape: tuple[int, int]

    def dense(self, index: int) -> Tensor:
        """Plan number `index` as (n, n') float32, entries of n * Q, zeros where nothing survived."""
        plan, mask = self.read(index)
        return torch.where(mask, plan, 0.0)

    def sparse(self, index: int) -> Tensor:
        """Plan number `index` as (n, n') sparse float32, entries of n * Q, with what survived."""
        n, m = self.shape
        rows, columns, values, survived = self._entries(index)
        places = torch.stack([rows[survived], columns[survived]])
        return torch.sparse_coo_tensor(places, values[survived], (n, m), check_invariants=False).coalesce()

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """Plan number `index` with all its stored entries, (n, n') float32 of n * Q, and which of them survived."""
        n, m = self.shape
        rows, columns, values, survived = self._entries(index)
        plan, mask = torch.zeros(n, m), torch.zeros(n, m, dtype=torch.bool)
        plan[rows, columns] = values
        mask[rows, columns] = survived
        return plan, mask

    def _entries(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows, columns, values and whether they survived, of the E entries of one plan."""
        n = self.shape[0]
        offsets = self.offsets[index * n : (index + 1) * n + 1]
        start, stop = int(offsets[0]), int(offsets[-1])
        rows, columns = torch.repeat_interleave(torch.arange(n), offsets.diff()), self.columns[start:stop].long()
        survived = torch.ones(stop - start, dtype=torch.bool)
        first, last = torch.searchsorted(self.beyond, torch.tensor([start, stop])).tolist()
        survived[self.beyond[first:last] - start] = False
        return rows, columns, self.values[start:stop].float(), survived


def sparsify(plans: list[Tensor], masks: list[Tensor | None]) -> SparsePlans:
    """Gather the masked entries of plans Q (n, n') of one shape, as n * Q in float16; of sparse plans all entries."""
    counts, columns, values, survived = [], [], [], []
    for plan, mask in zip(plans, masks, strict=True):
        if mask is None:
            (rows, places), entries = plan.indices(), plan.values()
            remaining = torch.ones(len(rows), dtype=torch.bool)
        else:
            rows, places = (mask | _largest_of_empty(plan, mask)).nonzero(as_tuple=True)
            entries, remaining = plan[rows, places], mask[rows, places]
        counts.append(torch.bincount(rows, minlength=plan.shape[0]))
        columns.append(places.to(torch.int16 if plan.shape[1] <= torch.iinfo(torch.int16).max else torch.int32))
        values.append((entries * plan.shape[0]).to(torch.float16))
        survived.append(remaining)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cat(counts).cumsum(0)])
    beyond = (~torch.cat(survived)).nonzero().flatten()
    n, m = plans[0].shape
    return SparsePlans(offsets, torch.cat(columns), torch.cat(values), beyond, (n, m))


def _largest_of_empty(plan: Tensor, mask: Tensor) -> Tensor:
    """(n, n') bool: the largest entry of every row and of every column of which the mask keeps nothing."""
    largest = torch.zeros_like(mask)
    rows, columns = (~mask.any(1)).nonzero().flatten(), (~mask.any(0)).nonzero().flatten()
    largest[rows, plan[rows].argmax(1)] = True
    largest[plan[:, columns].argmax(0), columns] = True
    return largest


def mass_of_top(plan: Tensor) -> Tensor:
    """Share of each row's mass in its largest entries, mean over rows, at the numbers in `MASS_AT` (Figure 3).

    Args:
        plan: (n, n'); of more than 256 rows, evenly spaced ones are read, 256 at most.

    Returns:
        (len(MASS_AT),) float32, rising to 1. A row without an entry, of a neuron without a counterpart, has no mass.
    """
    rows = plan.index_select(0, torch.arange(0, plan.shape[0], -(-plan.shape[0] // _MASS_ROWS)))
    rows = rows.to_dense() if rows.is_sparse else rows
    ordered = np.sort(rows.abs().numpy(), axis=1)[:, ::-1]
    ordered = ordered[ordered[:, 0] > 0]
    if not len(ordered):
        return torch.ones(len(MASS_AT))
    share = np.cumsum(ordered, axis=1, dtype=np.float64)
    share /= share[:, -1:]
    return torch.tensor([share[:, min(k, plan.shape[1]) - 1].mean() for k in MASS_AT], dtype=torch.float32)


class TransportRecord:
    """A transport.safetensors, being gathered or read back.

    Attributes:
        tensors: Name to tensor, named as in this module's table.
        facts: What goes beside them: models, commits, epsilon, eta, projections (JSON values).
    """

    def __init__(self, facts: Mapping[str, Any], tensors: dict[str, Tensor] | None = None) -> None:
        self.facts = dict(facts)
        self.tensors = {} if tensors is None else tensors

    def save(self, path: Path) -> None:
        """Write to a temporary name, then rename."""
        temporary = path.with_name(path.name + ".part")
        tensors = {name: tensor.contiguous() for name, tensor in sorted(self.tensors.items())}
        save_file(tensors, temporary, metadata={"tmerge": json_text(self.facts, sort_keys=True)})
        # safetensors makes files for their owner alone; a run's folder is to be shared like any other.
        temporary.chmod(0o644)
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: Path) -> TransportRecord:
        """Read a file that `save` wrote.

        Raises:
            RunNotFoundError: It is not there, or not one of ours.
        """
        try:
            with safe_open(path, "pt") as stored:
                facts = json.loads((stored.metadata() or {})["tmerge"])
            return cls(facts, load_file(path))
        except (OSError, SafetensorError, KeyError, json.JSONDecodeError):
            raise RunNotFoundError(f"{path}: no transport plans to read; run `tmerge merge` there first") from None

    @property
    def projections(self) -> list[str]:
        """Fused projections, in the recipe's order."""
        return list(self.facts["projections"])

    @property
    def keys(self) -> list[str]:
        """Feature keys, in the order they were solved."""
        return list(self.facts["keys"])

    def widths(self, key: str) -> tuple[int, int]:
        """Neurons of a feature key in the target (n) and in the source (n')."""
        mine, theirs = (self.tensors[f"statistics.{role}.{key}.mean"].shape[1] for role in ("target", "source"))
        return mine, theirs

    def pairs(self, key: str) -> list[tuple[int, int]]:
        """The kept layer pairs of a feature key, as (row of L, column of M)."""
        return [(int(row), int(column)) for row, column in self.tensors[f"pairs.{key}"].tolist()]

    def plans(self, key: str) -> SparsePlans:
        """The sparse plans of a feature key's kept pairs, in the order of `pairs`."""
        shape = self.widths(key)
        return SparsePlans(
            self.tensors[f"plan.{key}.offsets"],
            self.tensors[f"plan.{key}.columns"],
            self.tensors[f"plan.{key}.values"],
            self.tensors[f"plan.{key}.beyond"],
            shape,
        )
