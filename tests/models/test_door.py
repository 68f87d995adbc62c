"""A checkpoint's JSON files with values that no model has: one line that names file, key and value, at once."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.pico import save_pico
from tmerge.errors import CheckpointError, TmergeError, TokenizerError, UnsupportedModelError
from tmerge.models import Model, load_model, read_facts

DEEP = '{"a":' * 50_000 + "1" + "}" * 50_000


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return save_pico("llama", tmp_path_factory.mktemp("models") / "pico", chat=True)


@pytest.fixture
def folder(stored, tmp_path):
    return shutil.copytree(stored, tmp_path / "pico")


def _edit(path, **changes):
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


def _line(call, error):
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert isinstance(caught.value, TmergeError) and "\n" not in message and ";" in message
    return message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pad_token_id": 384}, r"pad_token_id 384, and ids go up to 383 \(vocab_size\); set it to one of them"),
        ({"num_attention_heads": 0}, "num_attention_heads 0, and it is a count from 1"),
        ({"num_attention_heads": -4}, "num_attention_heads -4"),
        ({"num_key_value_heads": 0}, "num_key_value_heads 0"),
        ({"head_dim": 0}, "head_dim 0"),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers 10,000,000, and it is a count from 1 to 1,000"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0"),
        ({"intermediate_size": 0}, "intermediate_size 0"),
        ({"text_config": {}}, "has a text_config, and a llama model has no such part; take it out"),
        ({"quantization_config": {}}, "is stored quantised"),
        ({"hidden_size": 10**12}, "hidden_size 1,000,000,000,000"),
        ({"vocab_size": 10**30}, "vocab_size a number of over 15 digits"),
        ({"vocab_size": 0}, "vocab_size 0"),
        ({"dtype": 3}, "dtype 3, and text is expected"),
        ({"dtype": ["float32"]}, r"dtype \['float32'\]"),
        ({"model_type": ["llama"]}, r"model_type \['llama'\], and text is expected"),
        ({"auto_map": ["x"]}, r"auto_map \['x'\], and an object is expected"),
        ({"auto_map": "x.y"}, "auto_map 'x.y'"),
        ({"text_config": [1]}, r"text_config \[1\], and an object is expected"),
        ({"text_config": {"n_layer": 10**7}}, "n_layer 10,000,000"),
        ({"architectures": "x" * 99}, "architectures 'x{38}…, and a list is expected"),
        # Said by transformers, and not cut at its first line.
        ({"num_hidden_layers": "2"}, "'num_hidden_layers': TypeError: Field 'num_hidden_layers' expected int, got str"),
        ({"tie_word_embeddings": "yes"}, "Field 'tie_word_embeddings' expected bool, got str"),
        ({"layer_types": ["a", "b"]}, "The `layer_types` entries must be in"),
        ({"rope_scaling": {"type": "foo"}}, "cannot be built from its config: KeyError: 'foo'"),
        ({"hidden_act": "nope"}, "cannot be built from its config: KeyError: 'nope'"),
    ],
)
def test_a_config_with_values_that_no_model_has(folder, changes, words):
    _edit(folder / "config.json", **changes)
    for call in (
        lambda: read_facts(str(folder)),
        lambda: load_model(str(folder), device="cpu"),
        lambda: Model(str(folder), device="cpu", memory="blocks").open(),
    ):
        with pytest.raises(UnsupportedModelError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value) and repr(str(folder)) in str(caught.value)


@pytest.mark.parametrize("content", ["[]", "null", DEEP, "[" * 200 + "]" * 200, '"text"', "{"])
@pytest.mark.parametrize(
    "name", ["generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
)
def test_a_small_file_that_is_no_object(folder, name, content):
    (folder / name).write_text(content)
    error = CheckpointError if name == "generation_config.json" else TokenizerError
    for call in (lambda: read_facts(str(folder)), lambda: load_model(str(folder), device="cpu")):
        line = _line(call, error)
        assert f"its {name} " in line and "download it again" in line and len(line) < 500


def test_a_generation_config_that_transformers_cannot_use(folder):
    _edit(folder / "generation_config.json", pad_token_id=[])
    for call in (lambda: read_facts(str(folder)), lambda: load_model(str(folder), device="cpu")):
        assert "transformers cannot use its generation_config.json: '<' not supported" in _line(call, CheckpointError)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_config_or_index_without_end(folder, name):
    if name != "config.json":
        (folder / "model.safetensors").unlink()
    (folder / name).write_text(DEEP)
    assert name in _line(lambda: read_facts(str(folder)), CheckpointError)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("tokenizer_config.json", {"tokenizer_class": 3}, "tokenizer_class 3, and text is expected"),
        ("tokenizer_config.json", {"model_max_length": "x"}, "model_max_length 'x', and a number is expected"),
        ("tokenizer_config.json", {"added_tokens_decoder": []}, "added_tokens_decoder []"),
        ("added_tokens.json", {"a": "b"}, "a 'b', and a whole number is expected"),
    ],
)
def test_a_tokenizers_settings_of_the_wrong_kind(folder, name, changes, words):
    _edit(folder / name, **changes)
    assert f"its {name} has {words}" in _line(lambda: read_facts(str(folder)), TokenizerError)


@pytest.mark.parametrize("content", ["[]", "null", DEEP, "{}", '{"model": 7}', "{"])
def test_a_tokenizer_that_is_none(folder, content):
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError) as caught:
        load_model(str(folder), device="cpu")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_card_without_end_has_no_licence(folder):
    (folder / "README.md").write_text("---\n" + "[" * 5000 + "\n---\n")
    assert read_facts(str(folder)).licence is None
