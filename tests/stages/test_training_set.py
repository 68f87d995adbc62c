"""What a training reads of another dataset: as much as its steps can use, and by none of the merge's settings."""

from types import SimpleNamespace

import pytest

from tests.calibration.test_texts import write_jsonl, write_txt
from tests.pico import pico_tokenizer
from tests.stages.test_merge import recipe_for
from tmerge.calibration import TextSet, read_texts, sample_texts
from tmerge.comparison.inputs import ComparedData
from tmerge.errors import AdaptationError, DatasetError, TooFewTextsError
from tmerge.recipe import CalibrationSettings
from tmerge.stages import training_set
from tmerge.stages.training_set import TrainingSet

TARGET = SimpleNamespace(tokenizer=pico_tokenizer())
LINES = [f"Sentence number {number} of this small file." for number in range(120)]


def recipe(tmp_path, steps=2, **calibration):
    adaptation = {"steps": steps, "batch_size": 4, "accumulation": 2}
    return recipe_for(tmp_path, adaptation=adaptation, calibration={"texts": 20, **calibration})


@pytest.fixture(scope="module")
def calibrated() -> TextSet:
    return read_texts(CalibrationSettings(dataset="samples:english", texts=60, held_out=0.3), seed=0)


def of(tmp_path, dataset, calibrated, **asked):
    return TrainingSet.of_dataset(recipe(tmp_path, **asked), str(dataset), calibrated, TARGET)


@pytest.mark.parametrize(
    ("steps", "texts", "more"), [(2, 16, True), (14, 112, True), (15, 120, False), (99, 120, False)]
)
def test_the_steps_say_how_many_texts_are_read_and_not_the_merge(tmp_path, calibrated, steps, texts, more):
    write_txt(tmp_path / "data.txt", LINES)
    found = of(tmp_path, tmp_path / "data.txt", calibrated, steps=steps)
    assert len(found.texts) == len(set(found.texts)) == texts == found.data["texts"] == len(found.prompts)
    assert found.data["held_out"] == 0 and set(found.texts) <= set(LINES)
    assert len(found.notes) == more and list(found.notes) == found.data["notes"]
    if more:
        (note,) = found.notes
        assert note.startswith(
            f"data.txt has more texts than the training reads: {texts} of them, as {steps} steps of 8"
        )
        assert "raise adaptation.steps" in note


def test_held_out_texts_of_the_merge_are_none_of_them(tmp_path, calibrated):
    write_txt(tmp_path / "data.txt", [*calibrated.held_out, *LINES[:20]])
    found = of(tmp_path, tmp_path / "data.txt", calibrated, steps=2)
    assert len(found.texts) == 16 and set(found.texts) <= set(LINES) and len(found.notes) == 1
    write_txt(tmp_path / "data.txt", list(calibrated.held_out))
    with pytest.raises(AdaptationError, match="all its texts are held out by the run; give other texts"):
        of(tmp_path, tmp_path / "data.txt", calibrated)


def test_a_small_file_is_enough_and_one_that_is_too_small_asks_for_more_texts_alone(tmp_path, calibrated):
    write_txt(tmp_path / "data.txt", LINES[:9])
    assert sorted(of(tmp_path, tmp_path / "data.txt", calibrated).texts) == sorted(LINES[:9])
    write_txt(tmp_path / "data.txt", LINES[:3])
    with pytest.raises(TooFewTextsError, match=r"leaves 3 texts \(8 needed\): use a dataset with more texts$"):
        of(tmp_path, tmp_path / "data.txt", calibrated)


def test_what_cannot_be_chosen_here_is_not_named_as_the_remedy(tmp_path, calibrated):
    path = tmp_path / "data.jsonl"
    path.write_text('{"premise": "a", "choice": "b"}\n' * 30)
    with pytest.raises(DatasetError, match="save what is meant of it as a file") as caught:
        of(tmp_path, path, calibrated)
    assert "calibration." not in str(caught.value) and "\n" not in str(caught.value)


def test_every_prompt_with_its_answer_serves(tmp_path, calibrated):
    path = tmp_path / "data.csv"
    path.write_text("prompt,completion\n" + "".join(f"question {n},answer {n}\n" for n in range(40)))
    found = of(tmp_path, path, calibrated, steps=5)
    assert len(found.texts) == 40 and all(found.prompts)


def test_the_merges_split_configuration_and_column_are_not_another_datasets(tmp_path, calibrated, monkeypatch):
    asked = []

    def reading(settings, **words):
        asked.append((settings, words))
        return read_texts(settings, **words)

    monkeypatch.setattr(training_set, "read_texts", reading)
    monkeypatch.setattr("tmerge.comparison.inputs.read_texts", reading)
    write_jsonl(tmp_path / "data.jsonl", LINES)
    own = {"split": "validation", "column": "sentence"}
    of(tmp_path, tmp_path / "data.jsonl", calibrated, **own)
    compared = recipe(tmp_path, **own)
    compared = compared.model_copy(
        update={"compare": compared.compare.model_copy(update={"domains": {"one": str(tmp_path / "data.jsonl")}})}
    )
    data = ComparedData(compared, tmp_path, lambda step: None)
    data.identities = data.identify()
    assert len(data.domains["one"]) == 20
    for settings, words in asked:
        assert (settings.split, settings.config, settings.column) == ("train", None, None)
        assert words["whole"] is words["further"] is True
    assert len(asked) == 2
    # Rows of the calibration set's split are not taken for rows of this one.
    assert data.facts()["split"] == "train"
    assert "split" not in ComparedData(recipe(tmp_path), tmp_path, lambda step: None).facts()


def test_samples_are_read_as_well(tmp_path, calibrated):
    found = of(tmp_path, "samples:malay", calibrated, steps=100)
    assert len(found.texts) == len(set(sample_texts("malay"))) and not found.notes
