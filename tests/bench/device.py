"""What merging takes on an accelerator, against what the accelerator can do: a table as Markdown, then as JSON.

    python -m tests.bench.device [--device auto] [--out results.json] [--small]

The ceilings are what the same device reaches in one large product, in one copy on it, and in one copy to it. Every part
is held against the ceiling that bounds it:

- a forward pass in bfloat16 of random weights in the shape of a llama: products; and what capturing adds to it;
- the transport of the demo pair, all its layers and projections, from its own features; and of layers in the shape of
  Llama 3.2 1B and 3.1 8B, from features of a few hidden causes: the kernel is read twice in each sweep that a problem
  needs (those that go on for the slowest of a batch do not count);
- one such problem beside POT's `ot.sinkhorn` on the same tensors there, to the same violation of the marginals;
- fusion in that shape: random bfloat16 weights, which lie where a checkpoint's do, meet dense maps there and are
  written into a target there: products, and what is copied to the device.

Of each part the peak of the device's memory; on a CPU the process's, which does not fall from part to part. ``--small``
is for trying it on a CPU.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ot
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.pico import pico_tokenizer
from tmerge.calibration import FeatureStore, bare_forward, capture, sample_languages, sample_texts
from tmerge.errors import MissingExtraError
from tmerge.fusion import COLUMN_PROJECTIONS, TransportedNeurons, fuse, transport_neurons
from tmerge.models import PROJECTIONS, LoadedModel, ModelReference, describe, load_model, pick_device
from tmerge.models.device import wait_for
from tmerge.transport import FeaturePlans, correlation_cost, feature_keys, sinkhorn, solve_features, standardise

DEMO = ("demo:smollm2-135m-instruct", "demo:gemma-3-270m")
EPSILON = 0.1


@dataclass(frozen=True)
class Shape:
    """Of a llama's layers.

    Attributes:
        width: Of the residual stream.
        keys: Outputs of k, and of v.
        inner: Of the MLP.
        layers: How many.
    """

    width: int
    keys: int
    inner: int
    layers: int

    def of(self, projection: str) -> tuple[int, int]:
        """(out, in)."""
        inputs = {"down": self.inner}.get(projection, self.width)
        outputs = {"k": self.keys, "v": self.keys, "gate": self.inner, "up": self.inner}.get(projection, self.width)
        return outputs, inputs


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        side: Of the matrices of the ceilings.
        tokens: Of a forward pass.
        texts: Of the demo pair.
        demo_layers: Of the demo pair's layers one in so many.
        target: A target's shape.
        source: A source's.
    """

    side: int
    tokens: int
    texts: int
    demo_layers: int
    target: Shape
    source: Shape


FULL = Size(8192, 8192, 256, 1, Shape(2048, 512, 8192, 16), Shape(4096, 1024, 14336, 32))
SMALL = Size(512, 512, 12, 10, Shape(128, 64, 256, 2), Shape(256, 64, 384, 3))


@dataclass
class Bench:
    """Takes rows as they are measured.

    Attributes:
        device: Where.
        size: How much.
        ceilings: FLOP/s by dtype, bytes/s by ``copy`` and ``to it``.
        rows: What was measured, in numbers and in words.
    """

    device: torch.device
    size: Size
    ceilings: dict[str, float] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def part(self, what: str, work: Callable[[], dict[str, Any]]) -> None:
        """Measure a part; `work` gives its numbers, with the words of the table as ``words``."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        row = {"what": what, **work()}
        self.rows.append(row | {"peak_bytes": self._peak()})
        sys.stderr.write(f"{what}: {row['words']}\n")

    def _peak(self) -> int:
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        if self.device.type == "mps":
            return int(torch.mps.driver_allocated_memory())
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def fastest(self, work: Callable[[], object], times: int = 5) -> float:
        """Seconds of the fastest call, after a first that warms up."""
        return min([self.seconds(work) for _ in range(times + 1)][1:])

    def seconds(self, work: Callable[[], object]) -> float:
        """Of one call, all that the device was given included."""
        wait_for(self.device)
        began = time.perf_counter()
        work()
        wait_for(self.device)
        return time.perf_counter() - began

    def share(self, reached: float, ceiling: str) -> str:
        """What was reached a second, in words, with its share of a ceiling."""
        unit = "FLOP/s" if ceiling in ("bfloat16", "float32") else "B/s"
        return f"{reached / 1e12:.3g} T{unit}, {reached / self.ceilings[ceiling]:.0%} of {ceiling}"


def measure_ceilings(bench: Bench) -> dict[str, Any]:
    """FLOP/s of a product, bytes/s of a copy on the device (read and written) and to it."""
    side, found = bench.size.side, bench.ceilings
    for dtype in (torch.bfloat16, torch.float32):
        left = torch.randn(side, side, device=bench.device).to(dtype)
        found[str(dtype).removeprefix("torch.")] = 2 * side**3 / bench.fastest(lambda left=left: left @ left)
    values = torch.ones(side * side, device=bench.device)
    found["copy"] = 2 * values.nbytes / bench.fastest(values.clone)
    here = torch.ones(side * side)
    # On a CPU nothing is moved, so that what is copied is the ceiling there too.
    found["to it"] = here.nbytes / bench.fastest(lambda: here.to(bench.device, copy=True))
    words = ", ".join(f"{value / 1e12:.3g} {name}" for name, value in found.items())
    return {"words": f"{words} (T/s)", **found}


def random_llama(shape: Shape, device: torch.device) -> LoadedModel:
    """A llama of random weights in bfloat16."""
    heads = {"num_attention_heads": shape.width // 64, "num_key_value_heads": shape.keys // 64}
    sizes = {"hidden_size": shape.width, "intermediate_size": shape.inner, "num_hidden_layers": shape.layers, **heads}
    config = LlamaConfig(**sizes, vocab_size=32768, tie_word_embeddings=True)
    with device:
        made = LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)
    reference = ModelReference.parse("random/llama")
    return LoadedModel(reference, "sha256:0", made, pico_tokenizer(), None, device, torch.bfloat16)


def forward(bench: Bench, folder: Path) -> dict[str, Any]:
    """A forward pass, and with capturing around it."""
    loaded, tokens = random_llama(bench.size.target, bench.device), bench.size.tokens
    architecture = describe(loaded.model)
    texts = ["one two three four five six seven eight " * 4] * max(2, tokens // 64)
    limits = {"max_tokens": 64, "batch_tokens": tokens}
    bare_forward(loaded, texts, **limits)
    bare, captured, read = [], [], 0
    for _ in range(3):
        bare.append(bare_forward(loaded, texts, **limits))
        report = capture(loaded, architecture, texts, PROJECTIONS, folder / "random", key="bench", **limits)
        captured.append(report.seconds)
        read = report.tokens
    # The products with weights; those of attention are few at 64 tokens a text.
    weights = sum(view.in_features * view.out_features for view in architecture.projections())
    reached, ratio = 2 * weights * read / min(bare), min(captured) / min(bare)
    words = f"{min(bare):.3f} s for {read} tokens, {bench.share(reached, 'bfloat16')}; with capture {ratio:.2f} times"
    return {"words": words, "seconds": min(bare), "flops": reached, "capture_over_bare": ratio}


def solved(bench: Bench, pairs: Sequence[Callable[[], FeaturePlans]]) -> dict[str, Any]:
    """What transports take; each sweep reads a kernel of float32 twice."""
    problems, swept, seconds, read = 0, [], 0.0, 0.0
    for solve in pairs:
        plans: list[FeaturePlans] = []
        seconds += bench.seconds(lambda solve=solve, plans=plans: plans.append(solve()))
        iterations = plans[0].iterations
        problems, swept = problems + iterations.numel(), [*swept, iterations.flatten()]
        read += float(iterations.sum()) * 2 * 4 * plans[0].f.shape[-1] * plans[0].g.shape[-1]
    rate, median = read / seconds, int(torch.cat(swept).median())
    words = f"{seconds:.2f} s for {problems} problems, {median} sweeps each; {bench.share(rate, 'copy')}"
    return {"words": words, "seconds": seconds, "problems": problems, "sweeps": median, "bytes_per_second": rate}


def demo_pair(bench: Bench, folder: Path) -> dict[str, Any]:
    """Both demo models' features, read there, and their transport."""
    texts = [text for language in sample_languages() for text in sample_texts(language)]
    texts = texts[:: max(1, len(texts) // bench.size.texts)][: bench.size.texts]
    stores = []
    for number, name in enumerate(DEMO):
        try:
            loaded = load_model(name, device=bench.device, widen=True)
        except MissingExtraError as error:
            return {"words": str(error)}
        limits = {"max_tokens": 64, "batch_tokens": 2048}
        place = folder / f"demo-{number}"
        capture(loaded, describe(loaded.model), texts, PROJECTIONS, place, key="bench", **limits)
        stores.append(FeatureStore(place))
        del loaded  # its memory is none of the transport's
    target, source = stores

    def solve(key: str) -> FeaturePlans:
        return solve_features(
            key,
            lambda layer: target.get(layer, key),
            lambda layer: source.get(layer, key),
            target.layers[:: bench.size.demo_layers],
            source.layers[:: bench.size.demo_layers],
            epsilon=EPSILON,
            device=bench.device,
        )

    return solved(bench, [lambda key=key: solve(key) for key in feature_keys(PROJECTIONS)])


def features(width: int, layer: int, rows: int = 512) -> Tensor:
    """(rows, width) of six causes that all layers and both models have in common."""
    causes = torch.randn(rows, 6, generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(width + layer)
    return causes @ torch.randn(6, width, generator=draw) + 2 * torch.randn(rows, width, generator=draw)


def shaped(bench: Bench, widths: tuple[int, int], layers: tuple[int, int]) -> dict[str, Any]:
    """Layers of such widths; drawn beforehand, as a store has them."""
    held = [[features(width, layer) for layer in range(count)] for width, count in zip(widths, layers, strict=True)]
    target, source = (of.__getitem__ for of in held)
    rows, columns = map(range, layers)
    words = {"epsilon": EPSILON, "device": bench.device}
    return solved(bench, [lambda: solve_features("q.post", target, source, rows, columns, **words)])


def beside_pot(bench: Bench) -> dict[str, Any]:
    """One problem, its cost included, by tmerge and by POT."""
    widths = bench.size.target.width, bench.size.source.width
    target, source = (standardise(features(width, 0)).to(bench.device) for width in widths)
    own = bench.fastest(lambda: sinkhorn(correlation_cost(target, source), EPSILON))
    a, b = (torch.full((width,), 1 / width, device=bench.device) for width in widths)

    def pot() -> int:
        # POT looks at the norm of the columns' violation, and tmerge at the largest relative to a column's.
        words = {"stopThr": 1e-6 / widths[1] ** 0.5, "numItermax": 1000, "log": True, "warn": False}
        return int(ot.sinkhorn(a, b, correlation_cost(target, source), EPSILON, **words)[1]["niter"])

    theirs, sweeps = bench.fastest(pot), (int(sinkhorn(correlation_cost(target, source), EPSILON).iterations), pot())
    words = (
        f"{own * 1e3:.1f} ms in {sweeps[0]} sweeps; POT {theirs * 1e3:.1f} ms in {sweeps[1]}, "
        f"{theirs / own:.1f} times as long"
    )
    return {"words": words, "seconds": own, "pot_seconds": theirs, "sweeps": sweeps[0], "pot_sweeps": sweeps[1]}


def fusion(bench: Bench, selected: int | None) -> dict[str, Any]:
    """All projections of all layers, a source layer each; some neurons of each are selected, or all."""
    source, loaded = bench.size.source, random_llama(bench.size.target, bench.device)
    layers = describe(loaded.model).layers
    weights = {name: torch.randn(source.of(name)).to(torch.bfloat16) for name in PROJECTIONS}
    sides = {(own, other): torch.rand(own, other) for own, other in _sides(bench.size.target, source)}
    maps = {sizes: drawn / drawn.sum(1, keepdim=True) for sizes, drawn in sides.items()}
    carrying, operations, moved, items = 0.0, 0, 0, []

    def carry(layer: int, name: str) -> None:
        view, weight = layers[layer][name], weights[name]
        outputs, inputs = weight.shape
        by_columns = name in COLUMN_PROJECTIONS
        neurons = torch.arange(view.in_features if by_columns else view.out_features)[:selected]
        out_map, in_map = maps[view.out_features, outputs], maps[view.in_features, inputs].T
        # Widened here, as the fusion does with what it reads of a checkpoint.
        given = (weight.float(), None, out_map, in_map, name, neurons)
        items.append(TransportedNeurons(layer, name, neurons, transport_neurons(*given, bench.device)[0], None))

    for layer, views in enumerate(layers):
        for name, view in views.items():
            carrying += bench.seconds(lambda layer=layer, name=name: carry(layer, name))
            outputs, inputs = weights[name].shape
            count = len(items[-1].neurons)
            if name in COLUMN_PROJECTIONS:
                operations += 2 * count * outputs * (inputs + view.out_features)
                moved += 4 * (outputs * inputs + view.out_features * outputs + count * inputs)
            else:
                operations += 2 * count * inputs * (outputs + view.in_features)
                moved += 4 * (outputs * inputs + count * outputs + inputs * view.in_features)
    writing = bench.seconds(lambda: fuse(layers, items, 0.1))
    written = sum(2 * item.weight.numel() for item in items)
    words = (
        f"carrying {carrying:.2f} s, {bench.share(operations / carrying, 'float32')}, "
        f"{bench.share(moved / carrying, 'to it')}; writing {written / 1e6:.0f} MB {writing:.2f} s"
    )
    return {
        "words": words,
        "seconds": carrying + writing,
        "flops": operations / carrying,
        "moved_bytes_per_second": moved / carrying,
        "writing_seconds": writing,
    }


def _sides(target: Shape, source: Shape) -> set[tuple[int, int]]:
    return {(own, other) for name in PROJECTIONS for own, other in zip(target.of(name), source.of(name), strict=True)}


def table(bench: Bench, name: str) -> str:
    """Markdown."""
    rows = [f"| {row['what']} | {row['words']} | {row['peak_bytes'] / 1e9:.2f} GB |" for row in bench.rows]
    return "\n".join([f"| on {name}, torch {torch.__version__} | | peak memory |", "|---|---|---|", *rows])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path, help="where the JSON is written too")
    asked = parser.parse_args(arguments)
    device = pick_device(asked.device)
    if device.type == "cpu" and asked.device == "auto":
        sys.stdout.write("there is no accelerator here; --device cpu --small tries this without one\n")
        return
    size = SMALL if asked.small else FULL
    bench, target, source = Bench(device, size), size.target, size.source
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    with tempfile.TemporaryDirectory() as folder:
        bench.part("ceilings", lambda: measure_ceilings(bench))
        bench.part("bfloat16 forward", lambda: forward(bench, Path(folder)))
        bench.part("transport of the demo pair", lambda: demo_pair(bench, Path(folder)))
        for widths, layers in (
            ((target.width, source.width), (target.layers, source.layers)),
            # An MLP's neurons: a row of the problems, as they are large.
            ((target.inner, source.inner), (1, min(4, source.layers))),
        ):
            what = f"transport, {layers[0]} x {layers[1]} layers of {widths[0]} and {widths[1]}"
            bench.part(what, lambda widths=widths, layers=layers: shaped(bench, widths, layers))
        bench.part(f"one problem of {target.width} x {source.width}", lambda: beside_pot(bench))
        for selected in (128, None):
            neurons = "all neurons" if selected is None else f"{selected} neurons each"
            bench.part(f"fusion, {neurons}", lambda selected=selected: fusion(bench, selected))
    found = {"device": name, "torch": torch.__version__, "small": asked.small, "rows": bench.rows}
    if asked.out is not None:
        asked.out.write_text(json.dumps(found, indent=1) + "\n")
    sys.stdout.write(f"{table(bench, name)}\n\n{json.dumps(found)}\n")


if __name__ == "__main__":
    main()
