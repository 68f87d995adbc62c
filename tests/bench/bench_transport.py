"""Speed of the feature transport for the demo pair: all layer pairs, both sides, on real features.

    python tests/bench/bench_transport.py [--texts 925] [--projections q,k,v,o] [--device cpu]

Prints one JSON document. Features come from the two demo models on the built-in samples of all languages.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

from tmerge.calibration import FeatureStore, capture, sample_languages, sample_texts
from tmerge.models import describe, load_model
from tmerge.transport import feature_keys, solve_features


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--texts", type=int, default=925)
    parser.add_argument("--projections", default="q,k,v,o")
    parser.add_argument("--epsilon", type=float, default=0.1)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    projections = asked.projections.split(",")
    texts = [text for language in sample_languages() for text in sample_texts(language)][: asked.texts]
    with tempfile.TemporaryDirectory() as folder:
        stores = {}
        for role, reference in (("target", "demo:smollm2-135m-instruct"), ("source", "demo:gemma-3-270m")):
            model = load_model(reference)
            place = Path(folder) / role
            capture(
                model,
                describe(model.model),
                texts,
                projections,
                place,
                max_tokens=64,
                batch_tokens=2048,
                key="bench",
            )
            stores[role] = FeatureStore(place)
        seconds, iterations, violations, problems = {}, [], [], 0
        for key in feature_keys(projections):
            began = time.perf_counter()
            plans = solve_features(
                key,
                lambda layer, key=key: stores["target"].get(layer, key),
                lambda layer, key=key: stores["source"].get(layer, key),
                stores["target"].layers,
                stores["source"].layers,
                epsilon=asked.epsilon,
                device=torch.device(asked.device),
            )
            seconds[key] = round(time.perf_counter() - began, 2)
            iterations.append(plans.iterations.reshape(-1))
            violations.append(float(plans.marginal_error.max()))
            problems += plans.iterations.numel()
    swept = torch.cat(iterations)
    json.dump(
        {
            "texts": len(texts),
            "problems": problems,
            "seconds": round(sum(seconds.values()), 2),
            "seconds_by_feature": seconds,
            "iterations": {"median": int(swept.median()), "max": int(swept.max())},
            "worst_marginal_violation": max(violations),
        },
        sys.stdout,
        indent=1,
    )
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
