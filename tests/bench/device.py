"""What merging takes on an accelerator, against what the accelerator can do: a table, as Markdown.

    python -m tests.bench.device [--device auto] [--width 2048] [--layers 16] [--tokens 8192]

Random weights in the shape of a llama of that width; transport between features of a few hidden causes, in the widths
of Llama 3.2 1B's and 3.1 8B's streams. The ceilings are what the same device reaches in one product of 8192 by 8192 and
in one copy. POT is `ot.sinkhorn` on the same tensors, to the same violation of the marginals.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import ot
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.pico import pico_tokenizer
from tmerge.calibration import bare_forward, capture
from tmerge.fusion import TransportedNeurons, fuse
from tmerge.models import LoadedModel, ModelReference, describe, pick_device
from tmerge.models.device import wait_for
from tmerge.transport import correlation_cost, sinkhorn, solve_features, standardise


def fastest(device: torch.device, work: Callable[[], object], times: int = 5) -> float:
    """Seconds of the fastest call, after a first that warms up."""
    seconds = []
    for _ in range(times + 1):
        wait_for(device)
        began = time.perf_counter()
        work()
        wait_for(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def ceilings(device: torch.device, side: int) -> dict[str, float]:
    """FLOP/s of a product in bfloat16 and in float32, bytes/s of a copy."""
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        left = torch.randn(side, side, device=device).to(dtype)
        found[str(dtype).removeprefix("torch.")] = 2 * side**3 / fastest(device, lambda left=left: left @ left)
    values = torch.ones(side * side, device=device)
    found["copy"] = 2 * values.nbytes / fastest(device, lambda: values.clone())
    return found


def features(width: int, layer: int, rows: int = 512) -> Tensor:
    """(rows, width) of six causes that all layers and both models have in common."""
    causes = torch.randn(rows, 6, generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(width + layer)
    return causes @ torch.randn(6, width, generator=draw) + 2 * torch.randn(rows, width, generator=draw)


def model(device: torch.device, width: int, layers: int) -> LoadedModel:
    """A llama of random weights in bfloat16."""
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": max(1, width // 256)}
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, **heads}
    config = LlamaConfig(**sizes, vocab_size=32768, tie_word_embeddings=True)
    with device:
        made = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    reference = ModelReference.parse("random/llama")
    return LoadedModel(reference, "sha256:0", made, pico_tokenizer(), None, device, torch.bfloat16)


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--side", type=int, default=8192)
    asked = parser.parse_args()
    device = pick_device(asked.device)
    if device.type == "cpu" and asked.device == "auto":
        sys.stdout.write("there is no accelerator here; --device cpu measures without one\n")
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    rows: list[tuple[str, str]] = []
    most = ceilings(device, asked.side)
    rows += [
        (f"ceiling, {kind}", f"{value / 1e12:.2f} T{'B' if kind == 'copy' else 'FLOP'}/s")
        for kind, value in most.items()
    ]

    loaded = model(device, asked.width, asked.layers)
    architecture = describe(loaded.model)
    texts = ["one two three four five six seven eight " * 4] * max(2, asked.tokens // 64)
    limits = {"max_tokens": 64, "batch_tokens": asked.tokens}
    bare_forward(loaded, texts, **limits)
    bare = min(bare_forward(loaded, texts, **limits) for _ in range(3))
    values = sum(view.in_features * view.out_features for view in architecture.projections())
    with tempfile.TemporaryDirectory() as folder:
        place, projections = Path(folder) / "s", ["q", "k", "v", "o"]
        reports = [capture(loaded, architecture, texts, projections, place, key="bench", **limits) for _ in range(3)]
    reached = 2 * values * reports[0].tokens / bare
    rows.append(
        (
            "bfloat16 forward",
            f"{bare:.3f} s, {reached / 1e12:.2f} TFLOP/s, {reached / most['bfloat16']:.0%} of the ceiling",
        )
    )
    rows.append(("capture over bare forward", f"{min(report.seconds for report in reports) / bare:.2f}"))

    for target_layers, target_width, source_layers, source_width in ((30, 576, 18, 640), (16, 2048, 32, 4096)):
        began = time.perf_counter()
        plans = solve_features(
            "q.post",
            lambda layer, width=target_width: features(width, layer),
            lambda layer, width=source_width: features(width, 100 + layer),
            range(target_layers),
            range(source_layers),
            epsilon=0.1,
            device=device,
        )
        seconds = time.perf_counter() - began
        size = f"{target_layers} x {source_layers} layers of {target_width} and {source_width}"
        rows.append((f"transport, {size}", f"{seconds:.2f} s, {int(plans.iterations.float().median())} sweeps"))

    target, source = (standardise(features(width, 0)).to(device) for width in (2048, 4096))
    cost = correlation_cost(target, source)
    own = fastest(device, lambda: sinkhorn(correlation_cost(target, source), 0.1))
    a, b = (torch.full((size,), 1 / size, device=device) for size in cost.shape)
    theirs = fastest(device, lambda: ot.sinkhorn(a, b, correlation_cost(target, source), 0.1, stopThr=1e-6 / 4096**0.5))
    rows.append(
        (
            "one problem of 2048 x 4096, eps 0.1",
            f"{own * 1e3:.1f} ms; POT {theirs * 1e3:.1f} ms, {theirs / own:.1f} times",
        )
    )

    items = [
        TransportedNeurons(
            layer, "q", torch.arange(view.out_features), torch.zeros(view.out_features, view.in_features), None
        )
        for layer, views in enumerate(architecture.layers)
        for view in [views["q"]]
    ]
    rows.append(
        (
            f"fusing q of {asked.layers} layers",
            f"{fastest(device, lambda: fuse(architecture.layers, items, 0.1)):.3f} s",
        )
    )
    if device.type == "cuda":
        rows.append(("peak memory", f"{torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB"))
    table = [
        f"| on {name}, torch {torch.__version__} | |",
        "|---|---|",
        *(f"| {what} | {value} |" for what, value in rows),
    ]
    sys.stdout.write("\n".join(table) + "\n" + json.dumps(dict(rows)) + "\n")


if __name__ == "__main__":
    main()
