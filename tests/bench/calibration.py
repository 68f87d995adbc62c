"""Relatedness, calibrated: what a figure means, from pairs whose true correspondence is known.

    python -m tests.bench.calibration NAME=PAIR ... [--strangers NAME=CHECK ...]

PAIR is a folder of `tests.bench.relatives` in which `tests.bench.transfer --texts english_train --only relatedness
all/alpha-1 oracle/all/alpha-1` was run; CHECK what `tmerge check --relatedness --json` printed of two models that share
nothing. They are added to tmerge/report/measured_pairs.json, in the place of what has their names there, and all of it
is drawn into docs/relatedness.png.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tmerge.plots.style import BAD, OWN
from tmerge.report.measured import MeasuredPair

ROOT = Path(__file__).parents[2]
KEPT, PICTURE = ROOT / "tmerge/report/measured_pairs.json", ROOT / "docs/relatedness.png"
ROWS = ("relatedness", "relatedness/weights", "all/alpha-1", "oracle/all/alpha-1")


def of_pair(name: str, folder: Path) -> MeasuredPair:
    """From the rows of a pair."""
    lines = (folder / "rows-english_train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = {row["row"]: row for row in map(json.loads, lines)}
    if missing := [row for row in ROWS if row not in rows]:
        raise SystemExit(f"{folder} lacks the rows {', '.join(missing)}")
    gains = (rows[row]["held_out"]["value"] for row in ROWS[2:])
    return _pair(name, rows["relatedness"], rows["relatedness/weights"], *gains)


def of_strangers(name: str, path: Path) -> MeasuredPair:
    """From what `check` said of them."""
    said = json.loads(path.read_text(encoding="utf-8"))["relatedness"]
    return _pair(name, said, said["weights"], None, None)


def _pair(
    name: str, related: dict[str, Any], weights: dict[str, Any], found: float | None, true: float | None
) -> MeasuredPair:
    return MeasuredPair(
        name=name,
        activations=round(related["value"], 4),
        ci95=tuple(round(end, 4) for end in related["ci95"]),
        permuted=round(related["permuted"], 4),
        weights=round(weights["paired"], 4),
        chance=round(weights["chance"], 4),
        found=None if found is None else round(found, 4),
        true=None if true is None else round(true, 4),
    )


def drawn(pairs: list[MeasuredPair]) -> Figure:
    """The share of the truth's gain over either figure."""
    figure = Figure(figsize=(9, 3.6), dpi=144, layout="constrained", facecolor="white")
    by_activations, by_weights = figure.subplots(1, 2, sharey=True)
    for axes, words in (
        (by_activations, "by activations, 95 % interval"),
        (by_weights, "by weights; ticks: by chance"),
    ):
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.08, 1.15), xlabel=f"relatedness {words}")
        axes.grid(alpha=0.3)
    by_activations.set_ylabel("gain, of what the truth carries")
    for pair in pairs:
        share, style = pair.share or 0.0, {"color": BAD if pair.true is None else OWN, "alpha": 0.75}
        marker = "x" if pair.true is None else "o"
        spread = [[pair.activations - pair.ci95[0]], [pair.ci95[1] - pair.activations]]
        by_activations.errorbar([pair.activations], [share], xerr=spread, fmt=marker, **style)
        by_weights.plot([pair.weights], [share], marker, **style)
        by_weights.plot([pair.chance], [-0.06], "|", **style)
    by_activations.plot([], [], "o", color=OWN, label="relatives")
    by_activations.plot([], [], "x", color=BAD, label="strangers, which have no truth")
    by_activations.legend(loc="lower right", framealpha=1)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pairs", nargs="*", default=[], metavar="NAME=PAIR")
    parser.add_argument("--strangers", nargs="*", default=[], metavar="NAME=CHECK")
    asked = parser.parse_args()
    known = (
        [MeasuredPair.model_validate_json(json.dumps(pair)) for pair in json.loads(KEPT.read_text())]
        if KEPT.exists()
        else []
    )
    read = {
        name: make(name, Path(path))
        for make, words in ((of_pair, asked.pairs), (of_strangers, asked.strangers))
        for name, _, path in (word.partition("=") for word in words)
    }
    pairs = sorted([*(pair for pair in known if pair.name not in read), *read.values()], key=lambda pair: pair.name)
    listed = ",\n ".join(json.dumps(pair.to_dict()) for pair in pairs)
    KEPT.write_text(f"[{listed}]\n", encoding="utf-8")
    FigureCanvasAgg(drawn(pairs)).print_png(PICTURE, metadata={"Software": None})


if __name__ == "__main__":
    main()
