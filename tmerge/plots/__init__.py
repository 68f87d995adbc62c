"""Pictures of a run: plotly figures from its report and its transport record, and one page that holds them all."""

from __future__ import annotations

from tmerge.plots.blocks import (
    Blocks,
    Entries,
    Order,
    plan_blocks,
    plan_entries,
    plan_orders,
    structure_order,
    window_blocks,
)
from tmerge.plots.charts import fit_errors, norm_ratios, scores, timing, top_mass
from tmerge.plots.heatmaps import (
    Side,
    feature_transport,
    kept_layers,
    layer_coupling,
    layer_flow,
    pair_place,
    strongest_pairs,
)
from tmerge.plots.page import report_page
from tmerge.plots.picture import picture
from tmerge.plots.style import TEMPLATES, feature_name
from tmerge.plots.zoom import View, map_figure, neurons_figure, neurons_view, plan_view, stretch

__all__ = [
    "TEMPLATES",
    "Blocks",
    "Entries",
    "Order",
    "Side",
    "View",
    "feature_name",
    "feature_transport",
    "fit_errors",
    "kept_layers",
    "layer_coupling",
    "layer_flow",
    "map_figure",
    "neurons_figure",
    "neurons_view",
    "norm_ratios",
    "pair_place",
    "picture",
    "plan_blocks",
    "plan_entries",
    "plan_orders",
    "plan_view",
    "report_page",
    "scores",
    "stretch",
    "strongest_pairs",
    "structure_order",
    "timing",
    "top_mass",
    "window_blocks",
]
