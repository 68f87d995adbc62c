"""Inputs that no one writes on purpose: a right result or one line, never a traceback, never a hang."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import string
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.models.pico_gguf import save_pico_gguf
from tests.pico import save_pico
from tmerge.calibration import read_texts
from tmerge.calibration.batches import encode
from tmerge.errors import RecipeError, TmergeError
from tmerge.evaluation import score_texts
from tmerge.models import Model, load_model, read_facts
from tmerge.models.reference import ModelReference
from tmerge.recipe import CalibrationSettings, Recipe
from tmerge.recipe.strict_yaml import load_yaml

pytestmark = pytest.mark.slow

SECONDS = 20


def often(examples: int) -> Any:
    """So many draws: the same each time, or with TMERGE_FUZZ=anew others; a failure says what brings it back."""
    return settings(
        max_examples=examples,
        derandomize=os.environ.get("TMERGE_FUZZ") != "anew",
        database=None,
        deadline=None,
        print_blob=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


@contextmanager
def one_line_or_right(seconds: int = SECONDS) -> Iterator[None]:
    """A refusal is an error of ours on one line; and nothing hangs."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"no answer in {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    except TmergeError as error:
        assert "\n" not in str(error) and len(str(error)) < 1500, str(error)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["auto", "", "0", "-1", "nan", "weights", "task-vector", "reconstruct", "tokens", "a" * 300]),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def _keys() -> dict[str, list[str]]:
    whole = Recipe.from_mapping({"target": "a", "source": "b"}).model_dump(mode="json")
    return {name: list(value) if isinstance(value, dict) else [] for name, value in whole.items()}


KEYS = _keys()


@st.composite
def recipes(draw: Any) -> dict[str, Any]:
    """A mapping with a recipe's keys and values of any kind, some of them right."""
    recipe: dict[str, Any] = {"target": "a", "source": "b"}
    for name in draw(st.lists(st.sampled_from(sorted(KEYS)), max_size=4)):
        if KEYS[name] and draw(st.booleans()):
            inner = draw(st.lists(st.sampled_from([*KEYS[name], "unknown"]), max_size=3))
            recipe[name] = {key: draw(values) for key in inner}
        else:
            recipe[name] = draw(values)
    return recipe


@often(6000)
@given(recipes())
def test_recipes(recipe: dict[str, Any]) -> None:
    with one_line_or_right():
        read = Recipe.from_mapping(recipe)
        # What is taken is written and read back as it is.
        assert Recipe.from_mapping(load_yaml(read.to_yaml(), "recipe")) == read


@often(2000)
@given(st.text(alphabet=string.printable + "é\x00\u2028", max_size=200) | recipes().map(yaml.safe_dump))
def test_recipes_as_text(text: str) -> None:
    with one_line_or_right():
        data = load_yaml(text, "recipe")
        if isinstance(data, dict):
            Recipe.from_mapping(data)


@pytest.mark.parametrize("opening", ["[", "{a: ", "- ", "? ", "a: |\n  "])
def test_a_recipe_without_end(opening: str) -> None:
    with one_line_or_right(), pytest.raises(RecipeError):
        Recipe.from_mapping(load_yaml("a: " + opening * 3000, "recipe"))


@often(2000)
@given(st.text(max_size=400))
def test_references(text: str) -> None:
    with one_line_or_right():
        ModelReference.parse(text)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("models")
    save_pico("llama-tied", folder / "pico", chat=True)
    save_pico_gguf(folder / "pico.gguf")
    return folder


def _load(reference: Path) -> None:
    """All that is done with a model before anything is computed, and then one number of it."""
    read_facts(str(reference))
    loaded = load_model(str(reference), device="cpu")
    scores = score_texts(loaded, ["The cat sat on the mat."])
    assert all(map(math.isfinite, scores.bits))
    Model(str(reference), device="cpu", memory="blocks").open()


@st.composite
def damages(draw: Any) -> Callable[[bytes], bytes]:
    """Truncated, bits flipped, a piece written over or repeated."""
    kind, at = draw(st.sampled_from(["cut", "flip", "over", "twice"])), draw(st.floats(0, 1))
    count, junk = draw(st.integers(1, 8)), draw(st.binary(min_size=1, max_size=16))

    def damage(content: bytes) -> bytes:
        # Most of a file is weights, and most of what goes wrong is before them.
        position = int(at**4 * (len(content) - 1))
        if kind == "cut":
            return content[:position]
        if kind == "flip":
            spoilt = bytearray(content)
            for number in range(count):
                spoilt[(position + number * 37) % len(spoilt)] ^= 1 << number
            return bytes(spoilt)
        if kind == "over":
            return content[:position] + junk + content[position + len(junk) :]
        return content[:position] + content[position : position + 64] + content[position:]

    return damage


@often(500)
@given(damages(), st.sampled_from(["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]))
def test_damaged_json(stored: Path, damage: Callable[[bytes], bytes], name: str) -> None:
    _damaged(stored, damage, name)


@often(500)
@given(damages())
def test_damaged_safetensors(stored: Path, damage: Callable[[bytes], bytes]) -> None:
    _damaged(stored, damage, "model.safetensors")


def _damaged(stored: Path, damage: Callable[[bytes], bytes], name: str) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = shutil.copytree(stored / "pico", Path(temporary, "pico"))
        (folder / name).write_bytes(damage((folder / name).read_bytes()))
        with one_line_or_right():
            _load(folder)


@often(400)
@given(damages())
def test_damaged_gguf(stored: Path, damage: Callable[[bytes], bytes]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary, "pico.gguf")
        path.write_bytes(damage((stored / "pico.gguf").read_bytes()))
        with one_line_or_right():
            _load(path)


_MORE_KEYS = ["auto_map", "text_config", "quantization_config", "torch_dtype", "rope_scaling", "sliding_window"]


@often(1500)
@given(st.data())
def test_lying_settings(stored: Path, data: st.DataObject) -> None:
    """JSON that is JSON, with any value under any of its keys."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = shutil.copytree(stored / "pico", Path(temporary, "pico"))
        name = data.draw(st.sampled_from(["config.json"] * 4 + ["generation_config.json", "tokenizer_config.json"]))
        settings_of = json.loads((folder / name).read_text())
        for key in data.draw(st.lists(st.sampled_from([*settings_of, *_MORE_KEYS]), min_size=1, max_size=2)):
            settings_of[key] = data.draw(values)
        (folder / name).write_text(json.dumps(settings_of))
        with one_line_or_right():
            _load(folder)


hostile = st.one_of(
    st.text(max_size=80),
    st.text(alphabet="\x00\x01\x1b\u200b\u202e\ufeff\ud800\udfff\U000e0001", max_size=30),
    st.sampled_from(["a" * 20_000, "\n" * 500, "<s></s><pad>", "\u0e01" * 3000, "{{ 7*7 }}", "<|assistant|>"]),
    st.just("\U0001f3f3\ufe0f\u200d\U0001f308" * 200),
)


@often(300)
@given(st.lists(hostile, max_size=8))
def test_hostile_texts(stored: Path, texts: list[str]) -> None:
    loaded = _loaded(stored)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary, "texts.jsonl")
        rows = [*texts, *(f"text {number}" for number in range(40))]
        path.write_text("\n".join(json.dumps({"text": text}) for text in rows))
        with one_line_or_right():
            read = read_texts(CalibrationSettings(dataset=str(path), texts=60), seed=0)
            encoded = encode(loaded, read.texts, 64)
            assert max(max(ids, default=0) for ids in encoded.ids) < loaded.embedding_rows
            assert all(map(math.isfinite, score_texts(loaded, list(read.texts)).bits))


_LOADED: list[Any] = []


def _loaded(stored: Path) -> Any:
    if not _LOADED:
        torch.manual_seed(0)
        _LOADED.append(load_model(str(stored / "pico"), device="cpu"))
    return _LOADED[0]
