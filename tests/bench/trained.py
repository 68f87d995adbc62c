"""Strangers, trained: one target and one source, the same texts, steps and seeds, by every objective there is to try.

    python -m tests.bench.trained --out FOLDER [--data DATA] [--language thai] [--seeds 0 1 2] [--only ROW ...]

The demo's pair, SmolLM2-135M-Instruct from Gemma 3 270M, on the texts of `tests.bench.relatives`.

    sft                next tokens alone
    pieces, first-piece, uld
                       our distillation with each `distill_loss`
    alm                approximate likelihood matching (arXiv 2503.20083), without its debiasing: the likelihood of each
                       stretch of text at whose ends both tokenizers end a token is drawn to the source's
    sft+transport, pieces+transport
                       features drawn to what the plans carry (`adaptation.transport_weight`)

trl's GOLDTrainer refuses this pair: across tokenizers it reads none but byte-level ones, and Gemma's is not. ``uld`` is
its loss, at the positions that both tokenizers have in common.

What is finished is kept, with the bits of every text; the table is of means over the seeds, paired by text.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional

from tests.bench.relatives import DATA, HELD_OUT, language_texts
from tmerge.adaptation import adapt, feature_goals, trainer
from tmerge.adaptation import teacher as teachers
from tmerge.adaptation.pieces import ToldPosition, common_positions, inner_positions
from tmerge.adaptation.teacher import Teacher
from tmerge.calibration import FeatureStore, TextSet, complete_ends
from tmerge.evaluation import Scores, difference, resamples, score_texts
from tmerge.models import LoadedModel, load_model
from tmerge.recipe import AdaptationSettings, Recipe
from tmerge.run import Run
from tmerge.stages.merge import advance
from tmerge.transport import TransportRecord

TARGET, SOURCE = "demo:smollm2-135m-instruct", "demo:gemma-3-270m"
# So that a stretch that is as unlikely as it could be weighs as much as a token does in a cross-entropy.
ALM_TEMPERATURE = ALM_WEIGHT = 100.0
# Of the feature terms, beside a cross-entropy of 1.
TRANSPORT_WEIGHT = 0.5
ROWS = ("sft", "pieces", "first-piece", "uld", "alm", "sft+transport", "pieces+transport")


def stretches(
    model: LoadedModel, sequences: Sequence[list[int]], positions: Sequence[Sequence[ToldPosition]], *_: object
) -> list[teachers._Told]:
    """In the place of a teacher's likeliest tokens: log p of the text since the position before; 0 at the first."""
    told = []
    for ids, asked in zip(sequences, positions, strict=True):
        tokens = torch.tensor([ids])
        with torch.inference_mode():
            logits = model.model(input_ids=tokens, use_cache=False).logits[0].float()
        known = functional.log_softmax(logits[:-1], -1).gather(1, tokens[0, 1:, None])[:, 0]
        until = functional.pad(known.cumsum(0), (1, 0))
        at = until[[position.source for position in asked]]
        count = len(asked)
        likelihoods = functional.pad(at.diff(), (1, 0))
        told.append(teachers._Told(torch.ones(count, dtype=torch.int64), torch.zeros(count).int(), likelihoods))
    return told


def likelihood_matching(
    logits: Tensor,
    labels: Tensor,
    teacher: Teacher,
    texts: Sequence[int],
    settings: AdaptationSettings,
    items: Any = None,
) -> Tensor:
    """Cross-entropy, and the binary cross-entropy of each stretch's likelihood to the power 1/100 with the source's."""
    known = -functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none")
    asked = labels[:, 1:] != -100
    loss = -(known * asked).sum()
    for row, text in enumerate(texts):
        first, last = int(teacher.starts[text]), int(teacher.starts[text + 1])
        # One number for each position.
        positions, theirs = teacher.positions[first:last], teacher.chances[first:last]
        inside = positions < labels.shape[1]
        at = functional.pad((known[row] * asked[row]).cumsum(0), (1, 0))[positions[inside]]
        if len(at) > 1:
            mine, source = ((part / ALM_TEMPERATURE - 1e-6) for part in (at.diff(), theirs[inside][1:].to(at)))
            matched = source.exp() * mine + -source.expm1() * torch.log(-torch.expm1(mine))
            loss = loss - ALM_WEIGHT * settings.distill_weight * matched.sum()
    count = asked.sum() if items is None else torch.as_tensor(items, device=logits.device)
    return loss / count


@contextmanager
def matching_likelihoods() -> Iterator[None]:
    """While open, distillation is ALM."""
    with patch.object(trainer, "distillation_loss", likelihood_matching), patch.object(teachers, "_read", stretches):
        yield


class Bench:
    """The pair, its texts, and what a training makes of a fresh target."""

    def __init__(self, out: Path, data: Path, steps: int, language: str) -> None:
        self.out, self.steps = out, steps
        train, self.held_out = language_texts(language, data)
        path = out / "texts.jsonl"
        texts = [*train, *self.held_out]
        path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
        recipe = Recipe.from_mapping(
            {
                "target": TARGET,
                "source": SOURCE,
                # The same split.
                "calibration": {"dataset": str(path), "texts": 2000, "held_out": HELD_OUT, "max_tokens": 256},
                "fusion": {"alpha": 0.1},
                "evaluation": {"controls": []},
            }
        )
        advance(recipe, out / "merge", until="fuse")
        self.run = Run.open(out / "merge", recipe)
        # Those that the features are of, so that all rows train on the same.
        self.texts = TextSet.load(self.run.texts_path).texts
        assert set(self.texts) == set(train)

    def settings(self, **words: Any) -> AdaptationSettings:
        return AdaptationSettings(steps=self.steps, batch_size=8, learning_rate=2e-4, max_tokens=256, **words)

    def trained(self, row: str, seed: int) -> LoadedModel:
        kind, _, transport = row.partition("+")
        words: dict[str, Any] = {"objective": "sft" if kind == "sft" else "distill"}
        if kind != "sft":
            # For likelihoods nothing is carried either.
            words["distill_loss"] = "uld" if kind == "alm" else kind
        goals = None
        if transport:
            words["transport_weight"] = TRANSPORT_WEIGHT
            stores = [FeatureStore(self.run.features(role)) for role in ("target", "source")]
            goals = feature_goals(TransportRecord.load(self.run.transport_path), *stores)
        target = load_model(TARGET, dtype="float32")
        with matching_likelihoods() if kind == "alm" else nullcontext():
            adapt(
                target,
                self.texts,
                self.settings(**words),
                seed=seed,
                work=self.out / f"work-{row}-{seed}",
                source=(lambda: nullcontext(load_model(SOURCE, dtype="float32"))) if kind != "sft" else None,
                goals=goals,
            )
        return target


def told_shares(texts: Sequence[str]) -> dict[str, float]:
    """Of the target's tokens but each text's last: how many end where the source's does, and how many within one."""
    target, source = (
        load_model(name).tokenizer(list(texts), return_offsets_mapping=True)["offset_mapping"]
        for name in (TARGET, SOURCE)
    )
    common = [
        common_positions(complete_ends(mine), complete_ends(theirs))
        for mine, theirs in zip(target, source, strict=True)
    ]
    inner = [inner_positions(*each) for each in zip(common, target, source, strict=True)]
    tokens = sum(len(spans) - 1 for spans in target)
    return {"both end": sum(map(len, common)) / tokens, "within the source's": sum(map(len, inner)) / tokens}


def table(rows: list[dict[str, Any]], say: Callable[[str], object]) -> None:
    """Each row's mean over its seeds, and what it is ahead of SFT by."""
    of: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        of.setdefault(row["row"], []).append(row)
    sizes = torch.tensor(rows[0]["bytes"], dtype=torch.float64)

    def mean(name: str) -> Scores:
        return Scores(torch.tensor([row["bits"] for row in of[name]]).double().mean(0), sizes, 0, 0.0)

    counts = resamples(len(sizes), 2000, 0)
    for name, seeds in of.items():
        each = [sum(row["bits"]) / float(sizes.sum()) for row in seeds]
        line = {"row": name, "mean": round(sum(each) / len(each), 4), "seeds": [round(value, 4) for value in each]}
        if name != "sft" and "sft" in of:
            line["to sft"] = difference(mean(name), mean("sft"), counts).to_dict()
        line["seconds"] = [row["seconds"] for row in seeds]
        say(json.dumps(line))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of shared texts")
    parser.add_argument("--language", default="indonesian")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS))
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    kept = asked.out / "rows.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    bench = Bench(asked.out, asked.data, asked.steps, asked.language)
    for seed in asked.seeds:
        for name in asked.only:
            if any((row["row"], row["seed"]) == (name, seed) for row in rows):
                continue
            began = time.perf_counter()
            model = bench.trained(name, seed)
            seconds = round(time.perf_counter() - began, 1)
            scores = score_texts(model, bench.held_out)
            sizes, bits = scores.bytes.tolist(), scores.bits.tolist()
            rows.append({"row": name, "seed": seed, "seconds": seconds, "bits": bits, "bytes": sizes})
            with kept.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            sys.stdout.write(f"{name} {seed}: {scores.bits_per_byte:.4f} in {seconds} s\n")
            sys.stdout.flush()
    say = sys.stdout.write
    say(json.dumps(told_shares(bench.texts)) + "\n")
    table(rows, lambda line: say(line + "\n"))


if __name__ == "__main__":
    main()
