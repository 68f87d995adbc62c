"""Pictures of a run: plotly figures from its report and its transport record, and one page that holds them all."""

from __future__ import annotations

from tmerge.plots.blocks import Blocks, Entries, Order, plan_blocks, plan_entries, structure_order
from tmerge.plots.charts import norm_ratios, scores, timing, top_mass
from tmerge.plots.heatmaps import feature_transport, layer_coupling, layer_flow, strongest_pairs
from tmerge.plots.page import report_page
from tmerge.plots.style import TEMPLATES, feature_name

__all__ = [
    "TEMPLATES",
    "Blocks",
    "Entries",
    "Order",
    "feature_name",
    "feature_transport",
    "layer_coupling",
    "layer_flow",
    "norm_ratios",
    "plan_blocks",
    "plan_entries",
    "report_page",
    "scores",
    "strongest_pairs",
    "structure_order",
    "timing",
    "top_mass",
]
