"""What calibration costs beside the bare forward passes over the same batches, for the two demo models.

    python tests/bench/bench_capture.py [--texts 300] [--projections q,k,v,o] [--repeats 5] [--threads 1]

Prints one JSON document. Bare passes and captures take turns in one process, and each capture is compared with the bare
passes beside it, as the speed of a shared machine drifts. `ratio` is the whole capture, with tokenising, pooling and
writing to disk, over the bare passes; `forward_ratio` is its hooked forward passes over them, `processor_ratio` the
ratio in processor time. Beside other busy processes, threads wait for one another: use `--threads 1` there.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tmerge.calibration import bare_forward, capture, sample_languages, sample_texts
from tmerge.models import load_model
from tmerge.models.projections import describe

MODELS = {"target": "demo:smollm2-135m-instruct", "source": "demo:gemma-3-270m"}


def measure(reference: str, texts: list[str], asked: argparse.Namespace) -> dict[str, Any]:
    loaded = load_model(reference, dtype=asked.dtype, device=asked.device)
    architecture = describe(loaded.model)
    limits = {"max_tokens": asked.max_tokens, "batch_tokens": asked.batch_tokens}
    # Warm: caches, and the pages of the weights.
    bare_forward(loaded, texts[:32], **limits)
    bare, whole, forward, processor = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(asked.repeats):
            began = time.process_time()
            bare.append(bare_forward(loaded, texts, **limits))
            bare_processor = time.process_time() - began
            began = time.process_time()
            report = capture(
                loaded, architecture, texts, asked.projections.split(","), Path(folder) / "s", key="bench", **limits
            )
            processor.append((time.process_time() - began) / bare_processor)
            whole.append(report.seconds)
            forward.append(report.forward_seconds)
        size = sum(path.stat().st_size for path in (Path(folder) / "s").iterdir())
    ratios = [captured / alone for captured, alone in zip(whole, bare, strict=True)]
    return {
        "model": reference,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "tokens": report.tokens,
        "padded_tokens": report.padded_tokens,
        "batches": report.batches,
        "store_megabytes": round(size / 1e6, 1),
        "bare_seconds": round(median(bare), 3),
        "capture_seconds": round(median(whole), 3),
        "ratio": round(median(ratios), 3),
        "ratio_of_fastest": round(min(whole) / min(bare), 3),
        "ratio_min_max": [round(min(ratios), 3), round(max(ratios), 3)],
        "forward_ratio": round(median(f / alone for f, alone in zip(forward, bare, strict=True)), 3),
        "processor_ratio": round(median(processor), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--texts", type=int, default=300)
    parser.add_argument("--projections", default="q,k,v,o")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: as many as it takes")
    asked = parser.parse_args()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    texts = [text for language in sample_languages() for text in sample_texts(language)]
    # From every language alike.
    texts = texts[:: max(1, len(texts) // asked.texts)][: asked.texts]
    results = {role: measure(reference, texts, asked) for role, reference in MODELS.items()}
    threads = torch.get_num_threads()
    json.dump(
        {"texts": len(texts), "threads": threads, "projections": asked.projections, **results}, sys.stdout, indent=1
    )
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
