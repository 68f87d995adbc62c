"""The numbers behind the pictures as CSV, at full resolution whatever the picture shows of them."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from tmerge.comparison.result import Comparison
from tmerge.models import feature_key
from tmerge.plots.blocks import Entries
from tmerge.plots.heatmaps import Side, kept_layers
from tmerge.report import Descent, Measured, Report, score_rows
from tmerge.transport import MASS_AT, TransportRecord

__all__ = [
    "coupling_data",
    "descent_data",
    "flow_data",
    "losses_data",
    "mass_data",
    "neurons_data",
    "norms_data",
    "plan_data",
    "rows_data",
    "scores_data",
]


def coupling_data(record: TransportRecord, projection: str, which: Side = "effective") -> str:
    """Every layer pair's weight (`tmerge.plots.layer_coupling`), and what of it is fused."""
    key = feature_key(projection, "post" if which == "effective" else which)
    weights = record.tensors[f"effective.{projection}" if which == "effective" else f"layer_plan.{key}"].double()
    kept = {
        (layer, source): (rank, share)
        for layer, sources in kept_layers(record, projection).items()
        for rank, (source, share) in enumerate(sources, start=1)
    }
    target, source = (record.tensors[f"layers.{role}.{key}"].tolist() for role in ("target", "source"))
    rows = (
        (row, column, f"{weight:.8g}", f"{weight * weights.numel():.6g}", *_kept_cells(kept.get((row, column))))
        for row, line in zip(target, weights.tolist(), strict=True)
        for column, weight in zip(source, line, strict=True)
    )
    return _csv(("target_layer", "source_layer", "weight", "times_even_share", "kept_rank", "percent_fused"), rows)


def flow_data(record: TransportRecord, projection: str) -> str:
    """The kept source layers of every target layer."""
    rows = (
        (layer, rank, source, f"{share:.6g}")
        for layer, sources in kept_layers(record, projection).items()
        for rank, (source, share) in enumerate(sources, start=1)
    )
    return _csv(("target_layer", "rank", "source_layer", "percent_fused"), rows)


def plan_data(entries: Entries) -> str:
    """Every stored entry of a feature plan; of the whole plan, a target neuron's shares sum to 1."""
    n = entries.shape[0]
    rows = zip(
        entries.rows.tolist(), entries.columns.tolist(), (f"{share:.4g}" for share in entries.mass * n), strict=True
    )
    return _csv(("target_neuron", "source_neuron", "share_of_target_neuron"), rows)


def mass_data(record: TransportRecord) -> str:
    """Mass in the top k entries of a row, by feature, mean over the kept layer pairs (Figure 3)."""
    rows = (
        (key, record.widths(key)[1], k, f"{100 * share:.6g}")
        for key in record.keys
        for k, share in zip(MASS_AT, record.tensors[f"mass.{key}"].double().mean(dim=0).tolist(), strict=True)
        if k <= record.widths(key)[1]
    )
    return _csv(("feature", "source_neurons", "k", "percent_of_mass"), rows)


def norms_data(report: Report) -> str:
    """Norm ratio and number of selected neurons of every layer and projection."""
    rows = (
        (name, layer, "" if ratio is None else f"{ratio:.8g}", item.neurons, item.of)
        for name, item in report.fusion.projections.items()
        for layer, ratio in zip(item.layers, item.norm_ratio, strict=True)
    )
    return _csv(("projection", "target_layer", "norm_ratio", "selected_neurons", "of"), rows)


def fit_data(report: Report) -> str:
    """Squared error of every layer and projection of a reconstruction, as a share of what was wanted."""
    fit = report.fusion.fit
    assert fit is not None  # the caller asks
    rows = (
        (name, layer, *("" if error is None else f"{error:.8g}" for error in pair))
        for name, item in report.fusion.projections.items()
        for layer, pair in zip(item.layers, fit.errors[name], strict=True)
    )
    return _csv(("projection", "target_layer", "error_before", "error_after"), rows)


def neurons_data(record: TransportRecord, projection: str) -> str:
    """The selected neurons of every layer."""
    layers = record.tensors[f"layers.target.{feature_key(projection, 'post')}"].tolist()
    chosen = record.tensors[f"neurons.{projection}"].tolist()
    rows = ((layer, neuron) for layer, line in zip(layers, chosen, strict=True) for neuron in line)
    return _csv(("target_layer", "neuron"), rows)


def scores_data(report: Report) -> str:
    """Held-out bits per byte of every model and control, with paired differences to the target."""
    rows = (
        (row.name, row.score.value, *row.score.ci95, *_difference_cells(row.difference)) for row in score_rows(report)
    )
    return _csv(("model", "bits_per_byte", "low", "high", "difference", "difference_low", "difference_high"), rows)


def descent_data(descent: Descent) -> str:
    """Cosines with the descent direction by projection and layer."""
    rows = (
        (name, *values)
        for name, item in descent.projections.items()
        for values in zip(item.layers, item.cosine, item.noise, item.noise_sd, strict=True)
    )
    return _csv(("projection", "target_layer", "cosine", "noise_mean", "noise_sd"), rows)


def rows_data(comparison: Comparison) -> str:
    """A comparison's rows: held-out bits per byte with paired differences to the base, and what they took."""
    rows = (
        (row.name, row.value, *row.ci95, *_difference_cells(row.difference), row.tokens, row.steps, row.seconds)
        for row in comparison.rows
    )
    header = ("row", "bits_per_byte", "low", "high", "difference", "difference_low", "difference_high")
    return _csv((*header, "tokens", "steps", "seconds"), rows)


def losses_data(comparison: Comparison) -> str:
    """Training loss of every trained row and seed, over steps."""
    rows = ((row.name, seed.seed, *point) for row in comparison.rows for seed in row.seeds for point in seed.loss)
    return _csv(("row", "seed", "step", "loss"), rows)


def _difference_cells(change: Measured | None) -> tuple[object, ...]:
    return ("", "", "") if change is None else (change.value, *change.ci95)


def _kept_cells(kept: tuple[int, float] | None) -> tuple[object, object]:
    return ("", "") if kept is None else (kept[0], f"{kept[1]:.6g}")


def _csv(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()
