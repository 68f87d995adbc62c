"""A pair of relatives: two models of different shape whose true correspondence is known.

    python -m tests.bench.relatives --out FOLDER [--language indonesian] [--seed 0]
    python -m tests.bench.relatives --out FOLDER --width 384 --layers-gone 10 --neurons 1024 --healing-rate 1e-3
    python -m tests.bench.relatives --out FOLDER --width 288 --layers-gone 15 --neurons 768 --head-dim 32
    python -m tests.bench.relatives --out FOLDER --base demo:gemma-3-270m --layers-gone 4 --neurons 1536

``base/`` is SmolLM2-135M-Instruct, or another llama-like model; ``source/`` is the base adapted to a language;
``target/`` is the base with fewer layers, heads and MLP neurons, what is left in shuffled order, healed on English.
``truth.json`` says which base neuron every target neuron was (`tests.bench.surgery`).

A part that is there and finished is kept, and a training that was stopped goes on, so the command can be repeated.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from tests.bench.surgery import check_surgery, cut, plan
from tmerge.adaptation import adapt
from tmerge.calibration import sample_texts
from tmerge.calibration.texts import is_held_out, normalise
from tmerge.evaluation import score_texts
from tmerge.models import LoadedModel, load_model
from tmerge.models.saving import save_checkpoint
from tmerge.recipe import AdaptationSettings

BASE = "demo:smollm2-135m-instruct"
DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
LANGUAGES = ("indonesian", "thai", "malay", "cantonese")

LEARNING_RATE = 2e-4
# Paragraphs at most; texts over which the activity of MLP neurons is measured.
PROSE, ACTIVITY_TEXTS = 1500, 64
# The texts' split is the same for every pair, so that pairs can be compared.
SPLIT_SEED, HELD_OUT = 0, 0.25

log = logging.getLogger("relatives")
Split = tuple[list[str], list[str]]


@dataclass(frozen=True)
class Settings:
    """What decides a pair.

    Attributes:
        base: What source and target are made of.
        language: Of the source.
        seed: Of surgery and trainings.
        sft_steps: The source's optimiser steps.
        healing_steps: The target's.
        healing_rate: The target's learning rate.
        layers_gone: How many layers the target lacks.
        neurons: How many MLP neurons of each layer it keeps.
        width: How many neurons of the residual stream; None for all.
        groups_gone: How many key-value heads of each layer, with their query heads, it lacks.
        in_order: What is left keeps the base's order; else it is shuffled.
        head_dim: How many dimensions of each head stay, a divisor of the base's; None for all.
    """

    base: str = BASE
    language: str = "indonesian"
    seed: int = 0
    sft_steps: int = 103
    healing_steps: int = 150
    healing_rate: float = LEARNING_RATE
    layers_gone: int = 5
    neurons: int = 1152
    width: int | None = None
    groups_gone: int = 1
    in_order: bool = False
    head_dim: int | None = None


# -- texts ----------------------------------------------------------------------------------------------------------


def split(texts: Sequence[str]) -> Split:
    """Texts to train on and held-out ones, each once and in the order given."""
    distinct = list({normalise(text): text for text in reversed(texts) if text.strip()}.values())[::-1]
    sides: Split = ([], [])
    for text in distinct:
        sides[is_held_out(text, SPLIT_SEED, HELD_OUT)].append(text)
    return sides


def language_texts(language: str, data: Path) -> Split:
    """Texts of the source's language."""
    if language != "indonesian":
        return split(sample_texts(language))
    lines = _read(data / "id_gsd_dev.txt").split("\n")
    return split([line.strip() for line in lines] + _reviews(data, "indonesian"))


def english_texts(seed: int, data: Path) -> Split:
    """Texts to heal the target on, Python's documentation among them, and held-out ones, without it."""
    train, held_out = split(sample_texts("english") + _reviews(data, "english"))
    prose = list(dict.fromkeys(_prose()))
    return train + random.Random(f"prose {seed}").sample(prose, min(PROSE, len(prose))), held_out


def _reviews(data: Path, language: str) -> list[str]:
    lines = _read(data / "nusax_valid.jsonl").split("\n")
    return [json.loads(line)[language].strip() for line in lines if line.strip()]


def _prose() -> Iterator[str]:
    """Paragraphs of 200 to 800 characters of Python's documentation; shorter ones are joined to the next."""
    for topic in topics.values():
        text = ""
        for block in re.split(r"\n\s*\n|\n(?= *\* )", topic):
            words = " ".join(block.split()).removeprefix("* ")
            letters = sum(letter.isalpha() or letter == " " for letter in words)
            # Neither a heading, nor code, a grammar or a signature.
            if not re.match(r"[A-Z].*[.:]$", words) or letters < 0.88 * len(words) or re.search(r"::=|>>>|---", words):
                continue
            text = f"{text} {words}".strip()
            if len(text) >= 200:
                if len(text) <= 800:
                    yield text
                text = ""


def _read(path: Path) -> str:
    if not path.is_file():
        raise SystemExit(f"{path.name} is not in the folder of shared data; give its place by --data")
    return path.read_text(encoding="utf-8")


# -- the pair -------------------------------------------------------------------------------------------------------


def build(out: Path, settings: Settings, data: Path = DATA) -> dict[str, dict[str, float]]:
    """Make what is not there yet of a pair, and give bits per byte: model -> file of texts -> value."""
    texts = dict(zip(("train", "held_out"), language_texts(settings.language, data), strict=True))
    texts |= zip(("english_train", "english_held_out"), english_texts(settings.seed, data), strict=True)
    out.mkdir(parents=True, exist_ok=True)
    noted = out / "settings.json"
    if noted.exists() and Settings(**json.loads(noted.read_text(encoding="utf-8"))) != settings:
        raise SystemExit(f"{out} was begun with other settings: {noted.read_text(encoding='utf-8').strip()}")
    _write(noted, json.dumps(asdict(settings)))
    for name, kept in texts.items():
        _write(out / f"{name}.jsonl", "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in kept))
        log.info("%s: %d texts", name, len(kept))
    _part(out, "base", lambda: load_model(settings.base, dtype="float32", device="cpu"))
    _part(out, "source", lambda: _source(out, settings, texts["train"]))
    _part(out, "target", lambda: _target(out, settings, texts["english_train"]))
    scores = {}
    for model in ("base", "source", "target"):
        loaded = load_model(str(out / model), device="cpu")
        scores[model] = {
            name: score_texts(loaded, texts[name]).bits_per_byte for name in ("held_out", "english_held_out")
        }
    _write(out / "scores.json", json.dumps(scores, indent=1))
    return scores


def _source(out: Path, settings: Settings, texts: list[str]) -> LoadedModel:
    loaded = load_model(str(out / "base"), device="cpu")
    return _trained(loaded, texts, settings.sft_steps, LEARNING_RATE, settings.seed, out / "work_source")


def _target(out: Path, settings: Settings, texts: list[str]) -> LoadedModel:
    base, seed = load_model(str(out / "base"), device="cpu"), settings.seed
    chosen = random.Random(f"activity {seed}").sample(texts, min(ACTIVITY_TEXTS, len(texts)))
    ids = [base.tokenizer(text, return_tensors="pt")["input_ids"] for text in chosen]
    left: dict[str, Any] = {"layers": settings.layers_gone, "neurons": settings.neurons, "width": settings.width}
    left |= {"groups": settings.groups_gone, "in_order": settings.in_order, "head_dim": settings.head_dim}
    truth = plan(base.model, seed, texts=ids, **left)
    _write(out / "truth.json", json.dumps(truth))
    truth = json.loads((out / "truth.json").read_text(encoding="utf-8"))
    target = replace(base, model=cut(base.model, truth))
    log.info("surgery checked: order alone moves logits by %.2g", check_surgery(base, target.model, truth, seed))
    return _trained(target, texts, settings.healing_steps, settings.healing_rate, seed, out / "work_target")


def _trained(loaded: LoadedModel, texts: list[str], steps: int, rate: float, seed: int, work: Path) -> LoadedModel:
    settings = AdaptationSettings(objective="sft", steps=steps, batch_size=8, learning_rate=rate, max_tokens=256)
    report = adapt(
        loaded,
        texts,
        settings,
        seed=seed,
        work=work,
        progress=lambda done, of: log.info("%s %d/%d", work.name, done, of),
    )
    log.info("%s: loss %.3f -> %.3f", work.name, report.loss_curve[0][1], report.loss_curve[-1][1])
    return loaded


def _part(out: Path, name: str, make: Callable[[], LoadedModel]) -> None:
    """Make a model's folder, unless it is there: it gets its name when all is in it."""
    if (out / name / "config.json").is_file():
        return
    partial = out / f"{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    save_checkpoint(make(), partial)
    partial.rename(out / name)
    log.info("%s is finished", name)


def _write(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")


def main() -> None:
    """Build a pair and say how its models do."""
    parser = argparse.ArgumentParser(description="Build a pair of relatives whose true correspondence is known.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", default=Settings.base, help="a reference of the model that both are made of")
    parser.add_argument("--language", choices=LANGUAGES, default=Settings.language)
    counted = ("seed", "sft_steps", "healing_steps", "layers_gone", "neurons", "groups_gone", "width", "head_dim")
    for name, kind in (*((name, int) for name in counted), ("healing_rate", float)):
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=getattr(Settings, name))
    parser.add_argument("--in-order", action="store_true", help="what is left is not shuffled")
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of shared texts")
    asked = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    log.setLevel(logging.INFO)
    settings = Settings(**{field.name: getattr(asked, field.name) for field in fields(Settings)})
    sys.stdout.write(json.dumps(build(asked.out, settings, asked.data), indent=1) + "\n")


if __name__ == "__main__":
    main()
