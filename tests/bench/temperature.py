"""How sure models are, and what that costs: bits per byte with logits divided by temperatures, entropy, hits.

    python -m tests.bench.temperature --pair PAIR --run RUN [--temperatures 1 1.5 2 3]

PAIR is a folder of `tests.bench.relatives`, RUN a reconstruction of its target with the control ``source_base``, whose
cache is there yet. Texts are scored from their second token on, as nothing is put before them.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch.nn import functional

from tmerge.fusion import StoredNeurons, fuse
from tmerge.models import LoadedModel, describe, load_model

LONGEST = 512


def figures(loaded: LoadedModel, texts: Sequence[str], temperatures: Sequence[float]) -> dict[str, object]:
    """Bits per byte at each temperature; entropy in bits a token and the share of tokens that were likeliest, at 1."""
    bits, size, hits, entropy, count = torch.zeros(len(temperatures)).double(), 0, 0, 0.0, 0
    for text in texts:
        ids = torch.tensor([loaded.tokenizer(text)["input_ids"][:LONGEST]])
        with torch.inference_mode():
            logits = loaded.model(ids).logits[0, :-1].float()
        for place, temperature in enumerate(temperatures):
            bits[place] += functional.cross_entropy(logits / temperature, ids[0, 1:], reduction="sum") / math.log(2)
        logs = logits.log_softmax(-1)
        entropy -= float((logs.exp() * logs).sum()) / math.log(2)
        hits += int((logits.argmax(-1) == ids[0, 1:]).sum())
        count, size = count + len(logits), size + len(text.encode())
    by_temperature = {f"{one:g}": round(float(value) / size, 4) for one, value in zip(temperatures, bits, strict=True)}
    return {"bits_per_byte": by_temperature, "entropy": round(entropy / count, 3), "hits": round(hits / count, 4)}


def models(pair: Path, run: Path) -> Iterator[tuple[str, LoadedModel]]:
    """The pair's, and the target as each of the two fits leaves it."""
    for name in ("base", "source", "target"):
        yield name, load_model(str(pair / name), dtype="float32")
    for name, folder in (("reconstructed", "transported"), ("toward the base", "source_base")):
        target = load_model(str(pair / "target"), dtype="float32")
        fuse(describe(target.model).layers, StoredNeurons(run / "tmerge/cache" / folder), 1.0)
        yield name, target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pair", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1, 1.5, 2, 3])
    asked = parser.parse_args()
    texts = {}
    for name in ("held_out", "english_held_out"):
        lines = (asked.pair / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        texts[name] = [json.loads(line)["text"] for line in lines]
    for name, loaded in models(asked.pair, asked.run):
        for of, some in texts.items():
            sys.stdout.write(
                json.dumps({"model": name, "texts": of, **figures(loaded, some, asked.temperatures)}) + "\n"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
