"""Single tokens as rows: where two tokenizations agree, and that what is read is what the model computes there."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from torch.testing import assert_close
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from tests.pico import pico_model, pico_tokenizer
from tmerge.calibration import FeatureStore, capture, common_ends, sample_texts, token_positions
from tmerge.errors import CheckpointError, TokenizerError
from tmerge.models import LoadedModel, ModelReference
from tmerge.models.projections import PROJECTIONS, describe

LIMITS = (48, 40)
# Of every length, and with characters of several bytes, which the pico tokenizer reads as several tokens.
TEXTS = [*sample_texts("indonesian")[:12], *sample_texts("english")[:12], "naïve café 你好, สวัสดี!", "a", "a b", ""]


@cache
def _trained_words() -> str:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    # As SentencePiece has it: a word begins with the space before it.
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>"], show_progress=False)
    tokenizer.train_from_iterator(sample_texts("indonesian")[:60] + sample_texts("english")[:60], trainer)
    return tokenizer.to_str()


def word_tokenizer(*, bos: bool = True) -> PreTrainedTokenizerFast:
    """Another tokenizer than the pico one: other merges, other pieces, and a BOS of its own."""
    tokenizer = Tokenizer.from_str(_trained_words())
    if bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


def ends(wanted: int = 80, *, seed: int = 0, texts: list[str] = TEXTS) -> tuple[tuple[int, ...], ...]:
    return common_ends(pico_tokenizer(), word_tokenizer(), texts, limits=LIMITS, wanted=wanted, seed=seed)


def real_tokens(tokenizer: Any, text: str, limit: int) -> list[tuple[int, int, int]]:
    """(place, begin, end) of the tokens that stand for characters, one text at a time."""
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"][:limit]
    return [(place, begin, end) for place, (begin, end) in enumerate(offsets) if end > begin]


# -- which positions --------------------------------------------------------------------------------------------------


def test_no_token_ends_within_a_character_that_the_next_one_writes_on():
    # "é" is two bytes; the first is a part of one token, and the second of the next, which goes on to "b".
    vocabulary = {token: number for number, token in enumerate(["x", "a", "Ã", "©", "b", "aÃ", "©b"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "Ã"), ("©", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert fast("xaéb", return_offsets_mapping=True)["offset_mapping"] == [(0, 1), (1, 3), (2, 4)]
    assert token_positions(fast, ["xaéb"], [[4]], 8) == [[2]]
    texts = ["xaéb"] * 16
    assert common_ends(fast, fast, texts, limits=(8, 8), wanted=32, seed=0) == ((4,),) * 16
    # Nor where the text is cut.
    with pytest.raises(TokenizerError):
        common_ends(fast, fast, texts, limits=(2, 2), wanted=32, seed=0)


def test_a_token_of_both_ends_at_every_place() -> None:
    chosen = ends(10_000)
    for tokenizer, limit in zip((pico_tokenizer(), word_tokenizer()), LIMITS, strict=True):
        positions = token_positions(tokenizer, TEXTS, chosen, limit)
        for text, wanted, found in zip(TEXTS, chosen, positions, strict=True):
            assert len(found) == len(wanted) and list(wanted) == sorted(set(wanted)) and found == sorted(found)
            tokens = {place: end for place, _, end in real_tokens(tokenizer, text, limit)}
            assert [tokens[place] for place in found] == list(wanted)
            # Of several tokens that end at a character, the last: only then has the model read all of it.
            assert all(tokens.get(place + 1) != end for place, end in zip(found, wanted, strict=True))
    # With so many wanted, there is no other place: every common end but those of a first token.
    for text, wanted in zip(TEXTS, chosen, strict=True):
        mine, theirs = (real_tokens(*of) for of in ((pico_tokenizer(), text, 48), (word_tokenizer(), text, 40)))
        common = {end for _, _, end in mine[1:]} & {end for _, _, end in theirs[1:]}
        assert set(wanted) == common, text
    # And the two do read a text differently.
    assert real_tokens(pico_tokenizer(), TEXTS[0], 48) != real_tokens(word_tokenizer(), TEXTS[0], 48)
    assert 100 < sum(map(len, chosen)) < sum(len(real_tokens(pico_tokenizer(), text, 48)) for text in TEXTS)


@pytest.mark.parametrize("bos", [False, True])
def test_the_first_token_is_left_out(bos: bool) -> None:
    """With a BOS before it as well: it is the first that stands for something."""
    texts = ["The cat sat on the mat."] * 3
    tokenizer = pico_tokenizer(bos=bos)
    chosen = common_ends(tokenizer, tokenizer, texts, limits=(48, 48), wanted=10_000, seed=0)
    first = real_tokens(tokenizer, texts[0], 48)[0]
    for wanted, positions in zip(chosen, token_positions(tokenizer, texts, chosen, 48), strict=True):
        assert len(wanted) == len(real_tokens(tokenizer, texts[0], 48)) - 1
        assert first[2] not in wanted and first[0] not in positions
        assert min(positions) == first[0] + 1 == 1 + bos


def test_the_choice_is_the_seeds_and_is_spread_over_the_texts() -> None:
    every = ends(10_000)
    chosen, again, other = ends(80), ends(80), ends(80, seed=1)
    assert chosen == again and chosen != other
    for wanted, all_of_them in zip(chosen, every, strict=True):
        # 80 of 28 texts: three of each, or all that it has.
        assert set(wanted) <= set(all_of_them) and len(wanted) == min(3, len(all_of_them))
    assert [len(wanted) for wanted in chosen[-3:]] == [0, 0 if len(every[-2]) == 0 else 1, 0]
    # Both ends of a text are read, not its beginning alone.
    positions = [end / len(text) for text, wanted in zip(TEXTS, chosen, strict=True) for end in wanted]
    assert min(positions) < 0.3 and max(positions) > 0.7


def test_limits_are_each_models_own() -> None:
    texts = [TEXTS[0] * 4] * 4  # enough positions in all
    for limits in ((12, 200), (200, 12)):
        chosen = common_ends(pico_tokenizer(), word_tokenizer(), texts, limits=limits, wanted=1000, seed=0)
        short, limit = ((pico_tokenizer(), 12), (word_tokenizer(), 12))[limits[0] > limits[1]]
        assert max(chosen[0]) <= real_tokens(short, texts[0], limit)[-1][2]
        for tokenizer, own in zip((pico_tokenizer(), word_tokenizer()), limits, strict=True):
            assert max(token_positions(tokenizer, texts, chosen, own)[0]) < own


def test_many_texts_are_read_in_parts() -> None:
    texts = [f"text number {index} of many" for index in range(600)]
    tokenizer = pico_tokenizer()
    chosen = common_ends(tokenizer, tokenizer, texts, limits=(48, 48), wanted=600, seed=0)
    assert len(chosen) == 600 and all(len(wanted) == 1 for wanted in chosen)
    one = token_positions(tokenizer, texts[550:551], chosen[550:551], 48)
    assert token_positions(tokenizer, texts, chosen, 48)[550] == one[0]


def test_a_tokenizer_that_does_not_know_where_its_tokens_lie_is_refused() -> None:
    slow = ByT5Tokenizer()
    for pair in ((slow, pico_tokenizer()), (pico_tokenizer(), slow)):
        with pytest.raises(TokenizerError, match=r"calibration\.rows: tokens needs; set calibration\.rows: texts$"):
            common_ends(*pair, TEXTS, limits=LIMITS, wanted=80, seed=0)


# -- what is read there --------------------------------------------------------------------------------------------


def loaded_pico(family: str, tokenizer: Any) -> LoadedModel:
    reference = ModelReference("pico", "folder", path=Path("pico"))
    return LoadedModel(reference, "sha256:0", pico_model(family), tokenizer, None, torch.device("cpu"), torch.float32)


def plain_rows(loaded: LoadedModel, chosen: Any, limit: int) -> dict[tuple[int, str], Tensor]:
    """One text at a time, unpadded: every feature of the token whose characters end where they should."""
    rows: dict[tuple[int, str], list[Tensor]] = {}
    wanted: list[int] = []
    handles = []
    for tap in describe(loaded.model).taps(PROJECTIONS):

        def hook(module: Any, inputs: Any, output: Any, tap: Any = tap) -> None:
            rows.setdefault((tap.layer, tap.key), []).append(tap.read(inputs, output, batch=1)[0, wanted])

        handles.append(tap.module.register_forward_hook(hook))
    with torch.no_grad():
        for text, of_text in zip(TEXTS, chosen, strict=True):
            if of_text:
                last = {end: place for place, _, end in real_tokens(loaded.tokenizer, text, limit)}
                wanted[:] = [last[end] for end in of_text]
                ids = loaded.tokenizer(text)["input_ids"][:limit]
                loaded.model(input_ids=torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return {place: torch.cat(parts) for place, parts in rows.items()}


# OPT flattens its tokens before its MLP; falcon's projections are parts of one module.
@pytest.mark.parametrize("family", ["llama", "opt", "falcon-new"])
def test_rows_are_the_features_of_those_tokens(family: str, tmp_path: Path) -> None:
    chosen = ends(80)
    for side, tokenizer in enumerate((pico_tokenizer(), word_tokenizer())):
        loaded = loaded_pico(family, tokenizer)
        expected = plain_rows(loaded, chosen, LIMITS[side])
        for batch_tokens in (1, 128, 100_000):
            folder = tmp_path / f"{side}-{batch_tokens}"
            report = capture(
                loaded,
                describe(loaded.model),
                TEXTS,
                PROJECTIONS,
                folder,
                max_tokens=LIMITS[side],
                batch_tokens=batch_tokens,
                key="k",
                ends=chosen,
            )
            store = FeatureStore(folder)
            assert store.texts == sum(map(len, chosen)) and report.texts == len(TEXTS)
            assert {(layer, key) for layer in store.layers for key in store.keys(layer)} == expected.keys()
            for (layer, key), wanted in expected.items():
                # float32 forward passes of other batch shapes differ in their last bits, and layers carry that on.
                assert_close(store.get(layer, key), wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "falcon-new", "gemma3"])
def test_a_short_models_tokens_are_stored_as_they_are(family: str, tmp_path: Path, monkeypatch: Any) -> None:
    loaded, chosen = loaded_pico(family, pico_tokenizer()), ends(80)
    loaded.model.to(torch.bfloat16)
    words: dict[str, Any] = {"max_tokens": LIMITS[0], "batch_tokens": 128, "key": "k", "ends": chosen}
    capture(loaded, describe(loaded.model), TEXTS, PROJECTIONS, tmp_path / "short", **words)
    module = sys.modules[capture.__module__]
    monkeypatch.setattr(module, "_stored_dtype", lambda loaded, tap: torch.float32)
    capture(loaded, describe(loaded.model), TEXTS, PROJECTIONS, tmp_path / "long", **words)
    short, long = FeatureStore(tmp_path / "short"), FeatureStore(tmp_path / "long")
    for layer in long.layers:
        for key in long.keys(layer):
            assert short.get(layer, key).equal(long.get(layer, key))
    sizes = [sum(path.stat().st_size - 128 for path in (tmp_path / name).glob("*.npy")) for name in ("short", "long")]
    assert sizes[1] == 2 * sizes[0]


def test_both_models_rows_are_of_the_same_characters(tmp_path: Path) -> None:
    chosen = ends(80)
    stores = []
    for name, tokenizer, limit in zip("ab", (pico_tokenizer(), word_tokenizer()), LIMITS, strict=True):
        loaded = loaded_pico("llama", tokenizer)
        options: dict[str, Any] = {"max_tokens": limit, "batch_tokens": 256, "key": "k", "ends": chosen}
        capture(loaded, describe(loaded.model), TEXTS, ["q"], tmp_path / name, **options)
        stores.append(FeatureStore(tmp_path / name))
    assert stores[0].texts == stores[1].texts == sum(map(len, chosen))


def test_a_token_that_is_not_finite_names_its_text(tmp_path: Path) -> None:
    loaded, chosen = loaded_pico("llama", pico_tokenizer()), ends(80)
    text = next(place for place, wanted in enumerate(chosen) if place > 5 and wanted)
    (read,) = token_positions(loaded.tokenizer, TEXTS[text : text + 1], chosen[text : text + 1], LIMITS[0])
    token = loaded.tokenizer(TEXTS[text])["input_ids"][read[0]]
    with torch.no_grad():
        loaded.model.model.embed_tokens.weight[token] = torch.nan
    with pytest.raises(CheckpointError, match=r"layer \d+ is not finite for text (\d+), in float32") as caught:
        capture(
            loaded,
            describe(loaded.model),
            TEXTS,
            ["q"],
            tmp_path / "s",
            max_tokens=LIMITS[0],
            batch_tokens=1,
            key="k",
            ends=chosen,
        )
    named = int(str(caught.value).split("for text ")[1].split(",")[0])
    # A text that is read at that token or, in later layers, behind it.
    (positions,) = token_positions(loaded.tokenizer, TEXTS[named : named + 1], chosen[named : named + 1], LIMITS[0])
    assert token in loaded.tokenizer(TEXTS[named])["input_ids"][: positions[-1] + 1]


def test_tokenizers_that_hardly_agree_are_refused() -> None:
    with pytest.raises(TokenizerError, match="in the same place only 0 times in 3 texts, where 16 are needed"):
        common_ends(pico_tokenizer(), word_tokenizer(), ["a", "b", ""], limits=LIMITS, wanted=80, seed=0)


def test_the_last_common_end_of_every_text():
    tokenizers = pico_tokenizer(), word_tokenizer()
    last = common_ends(*tokenizers, TEXTS, limits=LIMITS, wanted=None, seed=0)
    every = common_ends(*tokenizers, TEXTS, limits=LIMITS, wanted=100_000, seed=0)
    assert last == tuple(found[-1:] for found in every) and any(last)
