"""The model card's pictures, as PNG: a repo's page shows no interactive figure.

Drawn on white, so that they read on a light and on a dark page alike. The same report and record give the same bytes.
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tmerge.plots.style import BAD, GOOD, NEUTRAL
from tmerge.report import Report, score_rows
from tmerge.store import replacing
from tmerge.transport import TransportRecord

__all__ = ["COUPLING_PNG", "SCORES_PNG", "coupling_still", "scores_still", "write_stills"]

SCORES_PNG, COUPLING_PNG = "scores.png", "coupling.png"
_DPI = 144


def write_stills(folder: Path, report: Report, record: TransportRecord) -> list[Path]:
    """Draw both pictures into a folder, each under a temporary name first."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in ((SCORES_PNG, scores_still(report)), (COUPLING_PNG, coupling_still(record))):
        with replacing(folder / name) as temporary:
            # Without the name of what drew it, the bytes do not change with its version alone.
            FigureCanvasAgg(figure).print_png(temporary, metadata={"Software": None})
        written.append(folder / name)
    return written


def scores_still(report: Report) -> Figure:
    """Differences to the unchanged target in bits per byte, with their paired 95 % intervals."""
    rows = [(row, row.difference) for row in score_rows(report) if row.difference is not None]
    figure = Figure(figsize=(7.5, 1.1 + 0.4 * len(rows)), dpi=_DPI, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    for place, (row, change) in enumerate(rows):
        value, low, high = change.value, change.low, change.high
        colour = NEUTRAL if not row.is_result or low <= 0 <= high else GOOD if high < 0 else BAD
        axes.plot([low, high], [place, place], color=colour, linewidth=2.5, solid_capstyle="butt")
        axes.plot([value], [place], "o", color=colour, markersize=6)
    axes.axvline(0, color="#555555", linewidth=1, linestyle=":")
    axes.set_yticks(range(len(rows)), [row.label for row, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(
        f"difference to the target in bits per byte, {report.evaluation.texts} held-out texts (left is better)"
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure


def coupling_still(record: TransportRecord) -> Figure:
    """Effective layer coupling sqrt(P_pre P_post) of every fused projection, as shares of each target layer's row."""
    names = record.projections
    across = min(4, len(names))
    down = -(-len(names) // across)
    width, height = 0.6 + 2.3 * across, 0.7 + 2.4 * down
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    # Margins in inches, and room for the numbers beside each panel: to work them out takes longer than to draw.
    grid = figure.subplots(
        down,
        across,
        squeeze=False,
        gridspec_kw={
            "left": 0.65 / width,
            "right": 1 - 0.45 / width,
            "bottom": 0.6 / height,
            "top": 1 - 0.35 / height,
            "wspace": 0.55,
            "hspace": 0.3,
        },
    )
    for axes in grid.flat:
        axes.set_visible(False)
    image = None
    for axes, name in zip(grid.flat, names, strict=False):
        coupling = record.tensors[f"effective.{name}"]
        shares = coupling / coupling.sum(1, keepdim=True).clamp_min(1e-300)
        axes.set_visible(True)
        image = axes.imshow(100 * shares.numpy(), cmap="viridis", aspect="auto", vmin=0, interpolation="nearest")
        axes.set_title(name, fontsize=10)
        axes.tick_params(labelsize=8)
        figure.colorbar(image, ax=axes, format="%g%%", pad=0.04).ax.tick_params(labelsize=7)
    figure.supxlabel("source layer", fontsize=9)
    figure.supylabel("target layer", fontsize=9)
    return figure
