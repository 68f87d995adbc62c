"""Speed of the entropic solver, its cost included, against others on the same features; one thread unless told.

    python -m tests.bench.solver                      sizes and eps, against POT's ``sinkhorn`` (torch)
    python -m tests.bench.solver --official RUN       the demo's features, against the official algorithm
    python -m tests.bench.solver --curves             over texts, width and eps

Each row is a JSON line. Times are the least of several, taken by turns. RUN is a finished run's folder whose
``tmerge/cache`` is still there. POT stops where its largest relative violation is 1e-6, as ours, in the same dtype
(or as near as float32 lets it come). "Official" is written here after what the paper's code does: log domain, the whole
matrix exponentiated in blocks of rows, each pair standardised anew, q, k and v solved each for the input that they
share, in float32, until the sum of absolute violations, looked at each tenth sweep, is below 1e-6 or rests.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ot
import torch
from torch import Tensor

from tmerge.calibration import FeatureStore
from tmerge.transport import correlation_cost, feature_keys, sinkhorn, standardise, working_dtype

SIZES = ((576, 640), (1536, 2048), (2048, 4096))
EPSILONS = (0.1, 0.03, 0.01)
TEXTS, CAUSES = 512, 6
REPEATS = 5
# Of the official algorithm: sweeps at most, between two looks, and rows that are exponentiated at once.
OFFICIAL_SWEEPS, OFFICIAL_LOOK, OFFICIAL_ROWS = 1000, 10, 512


def features(n: int, m: int, texts: int = TEXTS) -> tuple[Tensor, Tensor]:
    """(texts, n) and (texts, m) with some causes in common."""
    draw = torch.Generator().manual_seed(0)
    causes = torch.randn(texts, CAUSES, generator=draw)
    mixed = [
        causes @ torch.randn(CAUSES, size, generator=draw) + torch.randn(texts, size, generator=draw) for size in (n, m)
    ]
    return mixed[0], mixed[1]


def ours(target: Tensor, source: Tensor, epsilon: float, sweeps: int = 2000) -> Any:
    """From standardised features."""
    return sinkhorn(correlation_cost(target, source), epsilon, max_iterations=sweeps)


def pots(target: Tensor, source: Tensor, epsilon: float, threshold: float) -> Any:
    """From the same."""
    cost = correlation_cost(target, source)
    n, m = cost.shape
    a, b = cost.new_full((n,), 1 / n), cost.new_full((m,), 1 / m)
    return ot.sinkhorn(a, b, cost, epsilon, stopThr=threshold, numItermax=100_000)


def same_violation(target: Tensor, source: Tensor, epsilon: float) -> float:
    """POT's threshold, an absolute norm, at which its plan's largest relative violation is 1e-6 at most, as ours."""
    threshold, least = 1e-6 / source.shape[1] ** 0.5, float("inf")
    while True:
        plan = pots(target, source, epsilon, threshold).double()
        worst = max(float((plan.sum(side) * plan.shape[1 - side] - 1).abs().max()) for side in (0, 1))
        if worst <= 1e-6:
            return threshold
        if worst > 0.9 * least:  # float32 comes no nearer
            return 2 * threshold
        threshold, least = threshold / 2, worst


def official(target: Tensor, source: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Potentials of one pair, from features that are not standardised."""
    cost = correlation_cost(standardise(target), standardise(source))
    n, m = cost.shape
    f, g, last = torch.zeros(n), torch.zeros(m), float("inf")
    log_a, log_b = -torch.tensor(float(n)).log(), -torch.tensor(float(m)).log()
    for sweep in range(1, OFFICIAL_SWEEPS + 1):
        f = epsilon * (log_a - torch.cat([_sums(cost, g, epsilon, rows) for rows in _blocks(n)]))
        g = epsilon * (log_b - torch.cat([_sums(cost.T, f, epsilon, rows) for rows in _blocks(m)]))
        if sweep % OFFICIAL_LOOK == 0:
            sums = torch.cat([(f[rows, None] + g - cost[rows]).div(epsilon).exp().sum(1) for rows in _blocks(n)])
            violation = float((sums - 1 / n).abs().sum())
            if violation < 1e-6 or violation >= last:
                break
            last = violation
    return f, g


def _blocks(size: int) -> list[slice]:
    return [slice(start, start + OFFICIAL_ROWS) for start in range(0, size, OFFICIAL_ROWS)]


def _sums(cost: Tensor, potential: Tensor, epsilon: float, rows: slice) -> Tensor:
    return ((potential - cost[rows]) / epsilon).logsumexp(1)


def by_turns(ways: dict[str, Callable[[], Any]], repeats: int = REPEATS) -> dict[str, float]:
    """The least seconds of each."""
    least = dict.fromkeys(ways, float("inf"))
    for _ in range(repeats):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            least[name] = min(least[name], time.perf_counter() - began)
    return least


def against_pot() -> Iterator[dict[str, Any]]:
    for n, m in SIZES:
        for epsilon in EPSILONS:
            dtype = working_dtype(epsilon)
            target, source = (standardise(side, dtype) for side in features(n, m))
            single, threshold = [side.float() for side in (target, source)], same_violation(target, source, epsilon)
            seconds = by_turns(
                {
                    "float32 correlation": lambda single=single: correlation_cost(*single),
                    "correlation": lambda target=target, source=source: correlation_cost(target, source),
                    "ours": lambda given=(target, source, epsilon): ours(*given),
                    "pot": lambda given=(target, source, epsilon, threshold): pots(*given),
                }
            )
            result = ours(target, source, epsilon)
            yield {
                "problem": f"{n} x {m}",
                "epsilon": epsilon,
                "dtype": str(dtype),
                **{name: f"{1000 * value:.1f} ms" for name, value in seconds.items()},
                "pot / ours": round(seconds["pot"] / seconds["ours"], 2),
                "ours / correlation": round(seconds["ours"] / seconds["correlation"], 2),
                "sweeps": int(result.iterations),
                "marginal_error": float(result.marginal_error),
            }


def against_official(run: Path, pairs: int) -> Iterator[dict[str, Any]]:
    """A sample of the layer pairs, all sides of q, k, v and o; ours solves and standardises once what is shared."""
    stores = {role: FeatureStore(run / "tmerge/cache/features" / role) for role in ("target", "source")}
    layers = [(one, other) for one in stores["target"].layers for other in stores["source"].layers]
    sample = random.Random(0).sample(layers, pairs)
    for epsilon in (0.1, 0.01):
        dtype, theirs, own, worst, official_worst = working_dtype(epsilon), 0.0, 0.0, 0.0, 0.0
        for key in feature_keys(("q", "k", "v", "o")):
            times = 3 if key == "qkv.pre" else 1
            sides: dict[tuple[str, int], Tensor] = {}
            for role, place in (("target", 0), ("source", 1)):
                for layer in {pair[place] for pair in sample}:
                    sides[role, layer] = stores[role].get(layer, key).float()
            began = time.perf_counter()
            # Once for each layer, of which the sample has fewer pairs than all: counted at its share of all pairs.
            standard = {name: standardise(side, dtype) for name, side in sides.items()}
            share = pairs / len(layers) * (len(stores["target"].layers) + len(stores["source"].layers)) / len(sides)
            own += (time.perf_counter() - began) * share
            for one, other in sample:
                began = time.perf_counter()
                result = ours(standard["target", one], standard["source", other], epsilon)
                own += time.perf_counter() - began
                worst = max(worst, float(result.marginal_error))
                began = time.perf_counter()
                f, g = official(sides["target", one], sides["source", other], epsilon)
                theirs += (time.perf_counter() - began) * times
                cost = correlation_cost(
                    *(standardise(sides[name], torch.float64) for name in (("target", one), ("source", other)))
                )
                plan = (f[:, None].double() + g.double() - cost).div(epsilon).exp()
                violations = [(plan.sum(side) * plan.shape[1 - side] - 1).abs().max() for side in (0, 1)]
                official_worst = max(official_worst, *map(float, violations))
        yield {
            "epsilon": epsilon,
            "layer pairs": f"{pairs} of {len(layers)}",
            "ours": f"{own:.2f} s",
            "official": f"{theirs:.2f} s",
            "official / ours": round(theirs / own, 1),
            "worst relative violation": {"ours": worst, "official": official_worst},
        }


def curves() -> Iterator[dict[str, Any]]:
    """Seconds and sweeps as one thing grows: texts, width, and one over eps."""
    points = [("texts", 1024, 1024, texts, 0.1) for texts in (128, 512, 2048, 8192)]
    points += [("width", size, size, TEXTS, 0.1) for size in (512, 1024, 2048, 4096, 8192)]
    points += [("epsilon", 2048, 2048, TEXTS, epsilon) for epsilon in (0.3, 0.1, 0.05, 0.03, 0.02, 0.01, 0.005)]
    for grows, n, m, texts, epsilon in points:
        target, source = (standardise(side, working_dtype(epsilon)) for side in features(n, m, texts))
        seconds = by_turns(
            {
                "correlation": lambda target=target, source=source: correlation_cost(target, source),
                "whole": lambda target=target, source=source, epsilon=epsilon: ours(target, source, epsilon),
            },
            3,
        )
        result = ours(target, source, epsilon)
        size = n * m * (target.element_size() + 4)
        yield {
            "over": grows,
            "problem": f"{n} x {m}",
            "texts": texts,
            "epsilon": epsilon,
            **{name: f"{1000 * value:.1f} ms" for name, value in seconds.items()},
            "sweeps": int(result.iterations),
            "memory": f"{size / 1e6:.0f} MB",
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--official", type=Path, metavar="RUN")
    parser.add_argument("--pairs", type=int, default=12, help="of layers, with --official")
    parser.add_argument("--curves", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    rows = (
        against_official(asked.official, asked.pairs) if asked.official else curves() if asked.curves else against_pot()
    )
    for row in rows:
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
