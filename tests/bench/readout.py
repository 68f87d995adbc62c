"""How far a narrower target's own norm and head can come with the source's stream: the last block's goals, had in full.

    python -m tests.bench.readout --pair FOLDER [--texts 100]

FOLDER is of `tests.bench.relatives`. Bits per byte on its held-out texts, with the target's norm and head behind

* ``kept``: the source's stream in the neurons that the target has;
* ``logits``: the stream that gives the source's logits (`tmerge.fusion.logit_goal`), tokens counted on ``train``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tmerge.fusion.logit_goal import LogitGoal
from tmerge.models import LoadedModel, Readout, find_block_list, load_model
from tmerge.models.blocks import hidden_of


def texts(pair: Path, name: str) -> list[str]:
    return [json.loads(line)["text"] for line in (pair / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def ids_of(loaded: LoadedModel, text: str) -> Tensor:
    ids: Tensor = loaded.tokenizer(text, return_tensors="pt", truncation=True, max_length=256)["input_ids"]
    return ids


@torch.no_grad()
def stream(loaded: LoadedModel, ids: Tensor) -> Tensor:
    """(S, n) behind the last block."""
    heard: list[Tensor] = []
    last = list(find_block_list(loaded.model)[1])[-1]
    handle = last.register_forward_hook(lambda module, inputs, output: heard.append(hidden_of(output)[0]))
    loaded.base(input_ids=ids, use_cache=False)
    handle.remove()
    return heard[0].float()


@torch.no_grad()
def bits_per_byte(
    readout: Readout, source: LoadedModel, held_out: Sequence[str], goal: Callable[[Tensor], Tensor]
) -> float:
    """Of the held-out texts, from the target's readout of the goals that the source's streams give."""
    bits = 0.0
    for text in held_out:
        ids = ids_of(source, text)
        found = goal(stream(source, ids))[:-1]
        normed = readout.norm.gain * readout.norm.centred(found) / readout.norm.size(found) + readout.norm.shift
        made = normed @ readout.head.float().T
        logits = readout.scale * (made if readout.head_bias is None else made + readout.head_bias)
        bits -= float(logits.log_softmax(-1).gather(1, ids[0, 1:, None]).sum()) / math.log(2)
    return bits / sum(len(text.encode()) for text in held_out)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pair", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=100)
    asked = parser.parse_args()
    target, source = (
        load_model(str(asked.pair / name), dtype="float32", device="cpu") for name in ("target", "source")
    )
    mine, theirs = Readout.of(target), Readout.of(source)
    assert mine is not None and theirs is not None
    kept = torch.tensor(json.loads((asked.pair / "truth.json").read_text())["residual"])
    tokens = target.embedding_rows
    counts = torch.zeros(tokens, dtype=torch.int64)
    for text in texts(asked.pair, "train"):
        counts += torch.bincount(ids_of(target, text)[0], minlength=tokens)
    goal = LogitGoal.of(mine, theirs, torch.arange(tokens).expand(2, -1), counts)
    for name in ("held_out", "english_held_out"):
        held_out = texts(asked.pair, name)[: asked.texts]
        by_kept = bits_per_byte(mine, source, held_out, lambda hidden: hidden[:, kept])
        by_logits = bits_per_byte(mine, source, held_out, lambda hidden: goal.stream(hidden[:, kept], hidden))
        sys.stdout.write(
            json.dumps({"texts": name, "count": len(held_out), "kept": by_kept, "logits": by_logits}) + "\n"
        )


if __name__ == "__main__":
    main()
