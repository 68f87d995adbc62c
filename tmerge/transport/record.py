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
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, safe_open
from torch import Tensor

from tmerge.documents import json_text, parse_json
from tmerge.errors import PlanError, RunNotFoundError
from tmerge.models import feature_key
from tmerge.store import Pieces, write_tensors
from tmerge.transport.result import FeatureLayers, FeatureMap, LayerMap, Transport, Wanted
from tmerge.transport.sparse import SparsePlans, mass_of_top, sparsify
from tmerge.transport.statistics import FeatureStatistics, Statistics

__all__ = ["PlanRecorder", "TransportRecord", "recorded_layer_maps", "recorded_transport"]

_FIELDS = ("mean", "deviation", "magnitude")

Part = Mapping[str, Mapping[str, Tensor]]
"""Feature key -> what is recorded of its maps to one target layer, by name."""


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
        write_tensors(path, dict(sorted(self.tensors.items())), {"tmerge": json_text(self.facts, sort_keys=True)})

    @classmethod
    def load(cls, path: Path) -> TransportRecord:
        """Read a file that `save` wrote.

        Raises:
            RunNotFoundError: It is not there, or not one of ours.
        """
        try:
            with safe_open(path, "pt") as stored:
                facts = parse_json((stored.metadata() or {})["tmerge"])
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
        target_width, source_width = (
            self.tensors[f"statistics.{role}.{key}.mean"].shape[1] for role in ("target", "source")
        )
        return target_width, source_width

    def pairs(self, key: str) -> list[tuple[int, int]]:
        """The kept layer pairs of a feature key, as (row of L, column of M)."""
        return [(int(row), int(column)) for row, column in self.tensors[f"pairs.{key}"].tolist()]

    def plans(self, key: str) -> SparsePlans:
        """The sparse plans of a feature key's kept pairs, in the order of `pairs`.

        Raises:
            RunNotFoundError: They are damaged.
        """
        shape = self.widths(key)
        plans = SparsePlans(
            self.tensors[f"plan.{key}.offsets"],
            self.tensors[f"plan.{key}.columns"],
            self.tensors[f"plan.{key}.values"],
            self.tensors[f"plan.{key}.beyond"],
            shape,
        )
        if not plans.is_sound(len(self.tensors[f"pairs.{key}"])):
            raise RunNotFoundError(f"the recorded plans of {key} are damaged; run the merge again, or fetch them again")
        return plans


def write_part(part: Part, path: Path) -> None:
    """Keep a layer's part for another process, which reads it by `read_part`."""
    write_tensors(path, {f"{key}/{name}": tensor for key, tensors in part.items() for name, tensor in tensors.items()})


def read_part(path: Path) -> Part:
    """What `write_part` kept."""
    part: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(path).items():
        key, _, field = name.partition("/")
        part.setdefault(key, {})[field] = tensor
    return part


class PlanRecorder:
    """Gathers what a run's record keeps of a transport, layer by layer, so that no dense plan has to outlive its layer.

    Args:
        transport: What is recorded; of one that was recorded before, its tensors are kept as they are.
        folder: Where it is gathered, for who has many layers: one that is there, and stays until the record is
            written. In memory if None.
    """

    def __init__(self, transport: Transport, folder: Path | None = None) -> None:
        self._transport = transport
        self._pieces = Pieces(folder)
        self._entries: dict[str, Tensor] = {}

    def part(self, maps: Iterable[FeatureMap]) -> Part:
        """What is kept of a target layer's maps; may be called from threads."""
        if self._transport.recorded is not None:
            return {}
        by_key: dict[str, list[FeatureMap]] = {}
        for feature_map in maps:
            by_key.setdefault(feature_map.key, []).append(feature_map)
        return {key: self._sparse(key, group) for key, group in by_key.items()}

    def _sparse(self, key: str, group: Sequence[FeatureMap]) -> dict[str, Tensor]:
        layers = self._transport.layers[key]
        sparse = sparsify([feature_map.plan for feature_map in group], [feature_map.survives for feature_map in group])
        pairs = [
            (layers.target_layers.index(feature_map.target_layer), layers.source_layers.index(feature_map.source_layer))
            for feature_map in group
        ]
        recorded = {
            f"pairs.{key}": torch.tensor(pairs, dtype=torch.int32),
            f"mass.{key}": torch.stack([mass_of_top(feature_map.plan) for feature_map in group]),
            f"plan.{key}.offsets": sparse.offsets,
            f"plan.{key}.columns": sparse.columns,
            f"plan.{key}.values": sparse.values,
            f"plan.{key}.beyond": sparse.beyond,
        }
        potentials = [feature_map.potentials for feature_map in group if feature_map.potentials is not None]
        if potentials:
            recorded |= {f"f.{key}": torch.stack([f for f, _ in potentials])}
            recorded |= {f"g.{key}": torch.stack([g for _, g in potentials])}
        return recorded

    def add(self, part: Part) -> None:
        """Take in the part of the next target layer; from one thread, in the layers' order."""
        for key, tensors in part.items():
            offsets, beyond = f"plan.{key}.offsets", f"plan.{key}.beyond"
            moved = dict(tensors)
            if key in self._entries:
                entries = self._entries[key]
                moved |= {offsets: tensors[offsets][1:] + entries, beyond: tensors[beyond] + entries}
            self._entries[key] = moved[offsets][-1]
            for name, tensor in moved.items():
                self._pieces.add(name, tensor)

    def tensors(self) -> dict[str, Tensor]:
        """All of it, by the record's names."""
        if self._transport.recorded is not None:
            return dict(self._transport.recorded)
        return _layer_tensors(self._transport) | self._pieces.joined()


def _layer_tensors(transport: Transport) -> dict[str, Tensor]:
    """Costs, layer plans, layer maps and feature statistics."""
    tensors: dict[str, Tensor] = {}
    for key, layers in transport.layers.items():
        tensors[f"cost.{key}"] = layers.cost
        tensors[f"layer_plan.{key}"] = layers.plan
        for role, numbers, statistics in (
            ("target", layers.target_layers, transport.statistics.target),
            ("source", layers.source_layers, transport.statistics.source),
        ):
            tensors[f"layers.{role}.{key}"] = torch.tensor(numbers, dtype=torch.int32)
            for field in _FIELDS:
                rows = [getattr(statistics[layer, key], field) for layer in numbers]
                tensors[f"statistics.{role}.{key}.{field}"] = torch.stack(rows)
    for projection, layer_map in transport.layer_maps.items():
        tensors[f"effective.{projection}"] = layer_map.effective
        tensors[f"kept.{projection}.layers"] = layer_map.kept.to(torch.int32)
        tensors[f"kept.{projection}.weights"] = layer_map.weights
    return tensors


def recorded_transport(
    record: TransportRecord, projections: Sequence[str], *, eta: Mapping[str, float], layer_plans_converged: bool
) -> Transport:
    """A transport from what a run recorded of it: no feature is needed, and plans have the values of 16 bits.

    Args:
        record: The run's transport.safetensors.
        projections: To be carried.
        eta: Feature key -> eta in use, as the run's report has it.
        layer_plans_converged: Likewise.

    Raises:
        PlanError: A projection was not solved.
    """
    structure = record.facts.get("structure", "none")
    partial = structure != "none"
    layers = {key: _recorded_layers(record, key) for key in record.keys}
    plans = {key: record.plans(key) for key in record.keys}
    plan_numbers = {key: {pair: index for index, pair in enumerate(record.pairs(key))} for key in record.keys}

    def build(layer: int, wanted: Wanted) -> dict[tuple[str, int], FeatureMap]:
        maps = {}
        survives: Tensor | None
        for key, source_layer in wanted:
            of = layers[key]
            plan_number = plan_numbers[key][of.target_layers.index(layer), of.source_layers.index(source_layer)]
            plan, survives = (plans[key].sparse(plan_number), None) if partial else plans[key].read(plan_number)
            # As `literal` takes it, entries of n * Q are n times too large.
            maps[key, source_layer] = FeatureMap(key, layer, source_layer, plan / plan.shape[0], survives, partial)
        return maps

    return Transport(
        structure=structure,
        layers=layers,
        layer_maps=recorded_layer_maps(record, projections),
        build=build,
        matched=partial,
        measure=lambda: _recorded_statistics(record, layers),
        eta=eta,
        layer_plans_converged=layer_plans_converged,
        recorded={name: tensor for name, tensor in record.tensors.items() if not name.startswith("neurons.")},
    )


def recorded_layer_maps(record: TransportRecord, projections: Sequence[str]) -> dict[str, LayerMap]:
    """Every projection's layer map, as it was recorded.

    Raises:
        PlanError: A projection was not solved.
    """
    missing = [name for name in projections if name not in record.projections]
    if missing:
        raise PlanError(
            f"the plan holds no {', '.join(missing)}, only {', '.join(record.projections)}: choose among these in "
            "fusion.projections, or merge without --plan"
        )
    layer_maps = {}
    for name in projections:
        target, source = _layer_numbers(record, feature_key(name, "post"))
        kept = record.tensors[f"kept.{name}.layers"].long()
        effective, weights = record.tensors[f"effective.{name}"], record.tensors[f"kept.{name}.weights"]
        layer_maps[name] = LayerMap(target, source, effective, kept, weights)
    return layer_maps


def _layer_numbers(record: TransportRecord, key: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    target, source = (tuple(record.tensors[f"layers.{role}.{key}"].tolist()) for role in ("target", "source"))
    return target, source


def _recorded_layers(record: TransportRecord, key: str) -> FeatureLayers:
    target, source = _layer_numbers(record, key)
    return FeatureLayers(target, source, record.tensors[f"cost.{key}"], record.tensors[f"layer_plan.{key}"])


def _recorded_statistics(record: TransportRecord, layers: Mapping[str, FeatureLayers]) -> Statistics:
    target, source = (
        {
            (layer, key): FeatureStatistics(
                *(record.tensors[f"statistics.{role}.{key}.{field}"][row] for field in _FIELDS)
            )
            for key, of in layers.items()
            for row, layer in enumerate(of.target_layers if role == "target" else of.source_layers)
        }
        for role in ("target", "source")
    )
    return Statistics(target, source)
