"""A LoRA of a large relative carried into a smaller one, against rivals and against training; on held-out texts.

    python -m tests.bench.adapters --pair FOLDER [--steps 63] [--then 40] [--texts english_train] [--only NAME ...]
    python -m tests.bench.adapters --pair FOLDER --language javanese

FOLDER is what ``tests.bench.relatives`` wrote; of its source nothing is read. A LoRA of rank 16 on all projections of
the base is trained on FOLDER/train.jsonl and kept in FOLDER/adapters. Each row is one JSON line, kept in
FOLDER/adapters/rows.jsonl; a row that is there is not measured again. With a language it is trained and scored on
NusaX's texts in that, in FOLDER/adapters-LANGUAGE:

    found, truth      carried through the correspondence that was found, and through the true one
    permuted          carried through shuffled correspondences
    theseus, ...      as others carry it (`tests.bench.rivals`), told the true layers
    lora-N            a LoRA trained on the target itself, N steps
    found+N           N steps that begin with what was carried
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from tests.bench.pair import ALL, Pair
from tests.bench.relatives import DATA, split
from tests.bench.rivals import Rivals
from tmerge.evaluation import applied, difference, resamples, score_texts
from tmerge.fusion import TransportedNeurons, changed_together, module_change
from tmerge.fusion.low_rank import of_rank
from tmerge.models import LoadedModel, load_model, save_adapter
from tmerge.recipe import Shared, TaskVector

RANK, BATCH, TOKENS, RATE = 16, 8, 256, 1e-3
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def trained(loaded: LoadedModel, texts: Sequence[str], steps: int, seed: int, start: Path | None = None) -> PeftModel:
    """A LoRA of a model after so many steps; from nothing, or from one that is there."""
    torch.manual_seed(seed)
    model = nn.Module.float(loaded.model).requires_grad_(False)
    if start is None:
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=MODULES, task_type="CAUSAL_LM")
        peft_model = get_peft_model(model, config)
    else:
        peft_model = PeftModel.from_pretrained(model, str(start), is_trainable=True)
    learned = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(learned, lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    draw, order = random.Random(seed), list[str]()
    peft_model.train()
    for step in range(steps):
        while len(order) < BATCH:
            order += draw.sample(list(texts), len(texts))
        batch, order = order[:BATCH], order[BATCH:]
        read = loaded.tokenizer(batch, return_tensors="pt", padding=True, truncation=True, max_length=TOKENS)
        labels = read["input_ids"].masked_fill(read["attention_mask"] == 0, -100)
        loss = peft_model(**read, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 10 == 0 or step == steps - 1:
            sys.stderr.write(f"step {step + 1}/{steps}: loss {loss.item():.4f}\n")
    return peft_model.eval()


def texts_of(folder: Path) -> list[str]:
    """All that is trained on."""
    lines = (folder / "train.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line)["text"] for line in lines if line.strip()]


def adapter_of(pair: Path, steps: int, seed: int, language: str | None, data: Path) -> Path:
    """FOLDER/adapters with the pair's own files, in which the source is the base with the LoRA."""
    folder = pair / ("adapters" if language is None else f"adapters-{language}")
    if language is not None:
        folder.mkdir(exist_ok=True)
        lines = (data / "nusax_valid.jsonl").read_text(encoding="utf-8").split("\n")
        sides = split([json.loads(line)[language].strip() for line in lines if line.strip()])
        for name, texts in zip(("train", "held_out"), sides, strict=True):
            written = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
            (folder / f"{name}.jsonl").write_text(written, encoding="utf-8")
    if not (folder / "source/adapter_model.safetensors").is_file():
        folder.mkdir(exist_ok=True)
        for name in ("base", "target", *(path.name for path in pair.glob("*.json*"))):
            if not (folder / name).exists():
                (folder / name).symlink_to((pair / name).resolve())
        base = load_model(str(pair / "base"), dtype="float32")
        peft_model = trained(base, texts_of(folder), steps, seed)
        peft_model.peft_config["default"].base_model_name_or_path = str((pair / "base").resolve())
        peft_model.save_pretrained(folder / "source")
        (folder / "source/README.md").unlink(missing_ok=True)
    return folder


def rows_of(
    pair: Pair, texts: Sequence[str], steps: int, then: int, seed: int
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name -> items to be added, or a trained model."""
    settings = TaskVector(projections=ALL, top_k=1.0, alpha=1.0, stream=False)
    rivals, target = Rivals(pair), pair.models["target"]

    def found() -> list[TransportedNeurons]:
        return pair.carried("tokens", Shared(), settings, False).transported

    def saved() -> Path:
        folder, layers = pair.folder / "carried", pair.layouts["target"].layers
        # Source less base is rounded, so that its rank is all.
        carried = [replace(item, weight=of_rank(item.weight, RANK)) for item in found()]
        changes = (module_change(layers, items, 1.0) for items in changed_together(layers, carried))
        save_adapter(folder, changes, target.model, target.reference, target.commit)
        return folder

    def fresh(count: int, start: Path | None = None) -> Callable[[], LoadedModel]:
        def train() -> LoadedModel:
            own = load_model(str(pair.folder / "target"), dtype="float32")
            return replace(own, model=trained(own, texts, count, seed, start).merge_and_unload())

        return train

    yield "found", found
    yield "permuted", lambda: pair.carried("tokens", Shared(), settings, True).permuted
    yield "truth", lambda: pair.oracle(ALL, False, "task-vector")
    yield from rivals.ways().items()
    for count in dict.fromkeys((steps, then)):
        yield f"lora-{count}", fresh(count)
    yield f"found+{then}", lambda: fresh(then, saved())()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pair", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=63, help="of the base's LoRA, and of one of the target")
    parser.add_argument("--then", type=int, default=40, help="steps on top of what was carried, and from nothing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--language", help="of NusaX, in place of the pair's own")
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of shared texts")
    parser.add_argument("--texts", default="english_train", help="what the neurons are matched on")
    parser.add_argument("--rows", type=int, default=2000, help="token rows that they are matched on")
    parser.add_argument("--only", nargs="*", default=[], help="rows of these names")
    given = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    folder = adapter_of(given.pair, given.steps, given.seed, given.language, given.data)
    pair = Pair(folder, given.rows, given.texts)
    texts = {"held_out": pair.held_out, "english": pair.english}
    counts = {name: resamples(len(of), 2000, 0) for name, of in texts.items()}
    base = {name: score_texts(pair.models["target"], of) for name, of in texts.items()}
    kept = folder / "rows.jsonl"
    rows = {row["row"]: row for row in map(json.loads, kept.read_text().splitlines())} if kept.exists() else {}
    for role in ("target", "base", "source"):
        scores = {name: score_texts(pair.models[role], of).bits_per_byte for name, of in texts.items()}
        sys.stdout.write(json.dumps({role: scores}) + "\n")
    bits: dict[str, Any] = {}
    for name, build in rows_of(pair, texts_of(folder), given.steps, given.then, given.seed):
        if name in rows or (given.only and name not in given.only):
            continue
        began = time.perf_counter()
        made = build()
        seconds = time.perf_counter() - began
        if isinstance(made, LoadedModel):
            scores = {what: score_texts(made, of) for what, of in texts.items()}
        else:
            with applied(pair.layouts["target"].views, made, 1.0):
                scores = {what: score_texts(pair.models["target"], of) for what, of in texts.items()}
        del made
        gc.collect()
        bits[name] = scores["held_out"]
        row: dict[str, Any] = {"row": name, "seconds": round(seconds, 1)}
        for what, of in scores.items():
            row[what] = {"bits_per_byte": of.bits_per_byte, **difference(of, base[what], counts[what]).to_dict()}
        for other in ("truth", f"lora-{given.then}"):
            if other in bits and other != name:
                row[f"to {other}"] = difference(bits[name], bits[other], counts["held_out"]).to_dict()
        if "found" in bits and name != "found":
            row["found to it"] = difference(bits["found"], bits[name], counts["held_out"]).to_dict()
        with kept.open("a") as file:
            file.write(json.dumps(row) + "\n")
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
