"""What is read as a calibration set: from samples and files, de-duplicated, and split by hash."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pico import pico_tokenizer
from tmerge.calibration import (
    SAMPLES_PREFIX,
    TextSet,
    is_held_out,
    other_texts,
    read_texts,
    sample_languages,
    sample_texts,
)
from tmerge.calibration.files import read_file
from tmerge.calibration.texts import normalise
from tmerge.errors import DatasetError, TooFewTextsError
from tmerge.recipe import CalibrationSettings

LINES = [f"Sentence number {number} of this small file." for number in range(120)]


def write_txt(path: Path, lines: list[str]) -> None:
    path.write_text("\n".join(lines), encoding="utf-8")


def write_jsonl(path: Path, lines: list[str]) -> None:
    path.write_text("\n".join(json.dumps({"id": i, "text": line}) for i, line in enumerate(lines)), encoding="utf-8")


def write_json(path: Path, lines: list[str]) -> None:
    path.write_text(json.dumps([{"text": line, "label": 1} for line in lines], indent=1), encoding="utf-8")


def write_csv(path: Path, lines: list[str]) -> None:
    path.write_text("id,text\n" + "\n".join(f'{i},"{line}"' for i, line in enumerate(lines)), encoding="utf-8")


def write_tsv(path: Path, lines: list[str]) -> None:
    path.write_text("id\ttext\n" + "\n".join(f"{i}\t{line}" for i, line in enumerate(lines)), encoding="utf-8")


def write_parquet(path: Path, lines: list[str]) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": lines, "n": list(range(len(lines)))}), path)


WRITERS: dict[str, Callable[[Path, list[str]], None]] = {
    "txt": write_txt,
    "jsonl": write_jsonl,
    "json": write_json,
    "csv": write_csv,
    "tsv": write_tsv,
    "parquet": write_parquet,
}


def read(dataset: Path | str, *, seed: int = 0, chat_tokenizer: Any = None, **settings: Any) -> TextSet:
    return read_texts(CalibrationSettings(dataset=str(dataset), **settings), seed=seed, chat_tokenizer=chat_tokenizer)


def all_texts(found: TextSet) -> set[str]:
    return {*found.texts, *found.held_out}


@pytest.mark.parametrize("kind", list(WRITERS))
def test_every_kind_of_file_gives_the_same_texts(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"data.{kind}"
    WRITERS[kind](path, LINES)
    found = read(path)
    assert all_texts(found) == set(LINES)
    assert not {*found.texts} & {*found.held_out}
    # The name without its folders, which are of this machine.
    assert (found.dataset, found.column, found.revision, found.split) == (path.name, "text", None, None)
    assert (found.read, found.empty, found.duplicates) == (120, 0, 0)
    reference = tmp_path / "reference.txt"
    write_txt(reference, LINES)
    assert found.sha256 == read(reference).sha256


def test_empty_and_duplicate_texts_are_dropped_and_counted(tmp_path: Path) -> None:
    composed, spaced = "Café " + LINES[0], "  " + LINES[1].replace(" ", "   ") + "\t"
    extra = ["", "   ", composed, unicodedata.normalize("NFD", composed), spaced, LINES[2]]
    write_jsonl(tmp_path / "data.jsonl", LINES + extra)
    found = read(tmp_path / "data.jsonl")
    assert (found.read, found.empty, found.duplicates) == (126, 2, 3)
    assert len(all_texts(found)) == 121
    # Texts are compared without their white space, and kept as written but for the ends.
    assert len(all_texts(found) & {LINES[1], spaced.strip()}) == 1
    assert all(text == text.strip() for text in all_texts(found))


def test_a_lone_surrogate_is_no_text_that_breaks_a_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join([*(json.dumps({"text": line}) for line in LINES), '{"text": "half \\ud83d face"}']))
    found = read(path)
    assert "half ? face" in all_texts(found)
    found.save(tmp_path / "texts.json")
    pico_tokenizer()(list(found.texts))


def test_as_many_texts_as_asked_drawn_with_the_seed(tmp_path: Path) -> None:
    write_txt(tmp_path / "data.txt", LINES + [""] * 100)
    found, again, other = (read(tmp_path / "data.txt", texts=60, seed=seed) for seed in (1, 1, 2))
    assert len(all_texts(found)) == 60
    assert found == again
    assert all_texts(found) != all_texts(other)
    # From everywhere in the file, not from its top.
    places = sorted(LINES.index(text) for text in all_texts(found))
    assert places[0] < 15 and places[-1] > 105


def test_reading_ends_on_a_stream_of_empty_rows(tmp_path: Path) -> None:
    write_txt(tmp_path / "data.txt", [""] * 3000)
    with pytest.raises(TooFewTextsError, match=r"820 rows read, 820 empty"):
        read(tmp_path / "data.txt", texts=16)


@given(
    st.lists(st.text(min_size=1), min_size=1, max_size=20),
    st.text(min_size=1),
    st.integers(0, 5),
    st.floats(0.05, 0.85),
)
def test_a_texts_side_depends_on_nothing_but_itself(others: list[str], text: str, seed: int, share: float) -> None:
    side = is_held_out(text, seed, share)
    assert side is is_held_out(f"  {text}\n", seed, share)
    assert side is is_held_out(unicodedata.normalize("NFC", text), seed, share)
    for other in others:
        is_held_out(other, seed, share)
        assert is_held_out(text, seed, share) is side
    # A larger share never takes a text back.
    assert is_held_out(text, seed, min(1.0, share + 0.1)) or not side


@given(st.permutations(LINES), st.integers(60, 120))
def test_the_split_of_a_file_does_not_depend_on_its_order_or_length(
    tmp_path_factory: pytest.TempPathFactory, order: list[str], count: int
) -> None:
    path = tmp_path_factory.mktemp("split") / "data.txt"
    write_txt(path, order[:count])
    found = read(path, held_out=0.4)
    write_txt(path, LINES)
    whole = read(path, held_out=0.4)
    assert set(found.texts) <= set(whole.texts)
    assert set(found.held_out) <= set(whole.held_out)


def test_the_share_is_that_of_the_recipe() -> None:
    texts = [f"text {number}" for number in range(4000)]
    for share in (0.05, 0.2, 0.5):
        held = sum(is_held_out(text, 3, share) for text in texts) / len(texts)
        # Four standard deviations of a binomial.
        assert abs(held - share) < 4 * (share * (1 - share) / len(texts)) ** 0.5
    sides = [is_held_out(text, 0, 0.5) for text in texts]
    assert sides != [is_held_out(text, 1, 0.5) for text in texts]


@pytest.mark.parametrize(
    ("count", "settings", "message"),
    [
        (12, {"held_out": 0.5}, r"^dataset 'data\.txt': 12 rows read, 0 empty, 0 duplicates; that leaves .* needed\)"),
        (120, {"texts": 20}, r"held out \(8 needed\): raise calibration\.texts \(now 20\)"),
        (40, {"held_out": 0.01}, r"held out \(8 needed\): use a dataset with more texts, or .*held_out \(now 0\.01\)"),
        (40, {"held_out": 0.89}, r"to calibrate on \(16 needed\)"),
    ],
)
def test_too_few_texts(count: int, settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_txt(tmp_path / "data.txt", LINES[:count])
    with pytest.raises(TooFewTextsError, match=message) as caught:
        read(tmp_path / "data.txt", **settings)
    assert "\n" not in str(caught.value)


def test_a_text_set_is_kept_and_read_back(tmp_path: Path) -> None:
    write_txt(tmp_path / "data.txt", LINES)
    found = read(tmp_path / "data.txt")
    found.save(tmp_path / "texts.json")
    assert TextSet.load(tmp_path / "texts.json") == found
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.txt", "texts.json"]
    recorded = json.loads(json.dumps(found.to_dict()))
    assert recorded["texts"] == len(found.texts) and recorded["held_out"] == len(found.held_out)
    assert recorded["sha256"] == found.sha256 and LINES[0] not in json.dumps(recorded)
    assert str(tmp_path) not in json.dumps(recorded)


@pytest.mark.parametrize("damage", ["", "{", "[1]", '{"texts": []}'])
def test_damaged_texts_are_not_continued_with(damage: str, tmp_path: Path) -> None:
    write_txt(tmp_path / "data.txt", LINES)
    path = tmp_path / "texts.json"
    read(tmp_path / "data.txt").save(path)
    whole = path.read_text(encoding="utf-8")
    path.write_text(damage or whole.replace("number 7 ", "number 8 "), encoding="utf-8")
    with pytest.raises(DatasetError, match=r"texts\.json: the kept texts are damaged"):
        TextSet.load(path)
    path.unlink()
    with pytest.raises(DatasetError, match="start the run again"):
        TextSet.load(path)


def test_progress_counts_texts(tmp_path: Path) -> None:
    write_txt(tmp_path / "data.txt", LINES)
    seen: list[tuple[int, int]] = []
    read_texts(
        CalibrationSettings(dataset=str(tmp_path / "data.txt"), texts=50),
        seed=0,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(number, 50) for number in range(1, 51)]


@pytest.mark.parametrize("language", ["cantonese", "english", "indonesian", "malay", "thai"])
def test_samples_are_many_and_distinct(language: str) -> None:
    assert language in sample_languages()
    texts = sample_texts(language)
    assert len(texts) >= 100
    assert len({normalise(text) for text in texts}) == len(texts)
    found = read(f"{SAMPLES_PREFIX}{language}")
    assert found.dataset == f"samples:{language}"
    assert all_texts(found) == set(texts)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [("samples:indonesia", "did you mean samples:indonesian"), ("samples:", "there are cantonese, english")],
)
def test_unknown_samples(dataset: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        read(dataset)


def test_a_configuration_is_for_the_hub_only() -> None:
    with pytest.raises(DatasetError, match="'fr', but 'samples:english' is no Hub dataset"):
        read("samples:english", config="fr")


def test_neurons_can_be_matched_on_other_texts():
    settings = CalibrationSettings(dataset="samples:thai", texts=80, match_on="samples:english")
    texts = read_texts(settings, seed=0)
    other = other_texts(settings, texts.held_out, seed=0)
    english = set(sample_texts("english"))
    assert other["other_dataset"] == "samples:english" and len(other["other"]) == 80
    assert set(other["other"]) <= english and not english & set(texts.texts + texts.held_out)
    both = replace(texts, **other)
    # What is scored, chosen on and trained on stays the dataset's own.
    assert (both.texts, both.held_out, both.sha256) == (texts.texts, texts.held_out, texts.sha256)
    assert texts.matched_on == texts.texts and both.matched_on == other["other"] and both.to_dict()["other"] == 80


def test_neurons_are_never_matched_on_what_is_held_out_or_chooses():
    """Whose own texts they are, or another file that holds some of them."""
    settings = CalibrationSettings(dataset="samples:english", match_on="samples:english")
    texts = read_texts(settings, seed=0, choosing=0.2)
    apart = set(texts.held_out) | set(texts.choosing)
    assert len(apart) > 20
    assert set(other_texts(settings, apart, seed=0)["other"]) == set(texts.texts)
    with pytest.raises(
        TooFewTextsError, match=r"match_on 'samples:english' has 3 texts beside those that are held out"
    ):
        other_texts(settings, [f" {text}  " for text in sample_texts("english")[3:]], seed=0)


def test_the_number_of_a_bad_row_is_the_files(tmp_path: Path) -> None:
    """Rows are read in an order of their own; the number is where an editor goes, blank lines counted."""
    lines = [line for n in range(40) for line in (json.dumps({"text": f"text {n}"}), *[""] * (n % 3))]
    lines.insert(25, '{"text": 7}')
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(DatasetError, match="'a.jsonl', line 26: column 'text' holds int, not text"):
        read_texts(CalibrationSettings(dataset=str(tmp_path / "a.jsonl"), texts=1000, column="text"), seed=3)
    rows = [{"text": f"text {n}"} for n in range(40)] + [{"text": 7}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with pytest.raises(DatasetError, match="'a.json', entry 41: column 'text' holds int, not text"):
        read_texts(CalibrationSettings(dataset=str(tmp_path / "a.json"), texts=1000, column="text"), seed=3)


def test_the_number_of_a_bad_row_of_a_table(tmp_path: Path) -> None:
    rows = "".join(f'{n},"over\ntwo lines {n}"\n' for n in range(3))
    (tmp_path / "a.csv").write_text(f"id,text\n{rows}\n9,last\n")
    assert [row.where for row in read_file(tmp_path / "a.csv")] == ["line 2", "line 4", "line 6", "line 9"]


def test_a_set_that_serves_one_purpose_may_fall_on_one_side(tmp_path):
    """As a file of texts that were held out elsewhere, by the same hash."""
    settings = CalibrationSettings(dataset="samples:english", texts=64, held_out=0.35)
    held_out = read_texts(settings, seed=0).held_out
    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in held_out), encoding="utf-8")
    same = settings.model_copy(update={"dataset": str(path)})
    with pytest.raises(TooFewTextsError, match="0 to calibrate on"):
        read_texts(same, seed=0)
    whole = read_texts(same, seed=0, whole=True)
    assert not whole.texts and sorted(whole.held_out) == sorted(held_out)
    path.write_text(json.dumps({"text": held_out[0]}) + "\n", encoding="utf-8")
    with pytest.raises(TooFewTextsError, match=r"leaves 1 texts \(8 needed\)"):
        read_texts(same, seed=0, whole=True)
