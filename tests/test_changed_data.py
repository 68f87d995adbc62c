"""A local file is known by its contents: what depends on one that has changed is done anew, and it is said."""

import hashlib
import json
import shutil
from dataclasses import replace

import pytest

from tests.pico import save_pico
from tests.stages.test_merge import recipe_for
from tmerge.calibration import dataset_identity, read_texts, sample_texts
from tmerge.comparison.compare import compare
from tmerge.comparison.evaluate import evaluate_models
from tmerge.comparison.reproduce import reproduce
from tmerge.errors import CheckpointError, DatasetError, OutputExistsError
from tmerge.models import load_model, load_tokenizer
from tmerge.models.finding import find_place
from tmerge.recipe import CalibrationSettings
from tmerge.stages.merge import merge


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_pico("llama", folder / "target", layers=2)
    save_pico("gpt2", folder / "source", layers=2, seed=1)
    return folder


@pytest.fixture(scope="module")
def finished(pair, tmp_path_factory):
    """A run on two local files: its own texts, and others to match on."""
    folder = tmp_path_factory.mktemp("data")
    write(folder / "texts.txt", sample_texts("indonesian")[:60])
    write(folder / "other.txt", sample_texts("english")[:40])
    recipe = recipe_on(pair, folder)
    merge(recipe, folder / "fused")
    return folder


@pytest.fixture
def run(finished, pair, tmp_path):
    """A copy of it that a test may change, as (folder, recipe)."""
    # The data lie where the recipe names them, so they are put back afterwards.
    before = {name: (finished / name).read_bytes() for name in ("texts.txt", "other.txt")}
    shutil.copytree(finished / "fused", tmp_path / "fused")
    yield tmp_path / "fused", recipe_on(pair, finished)
    for name, data in before.items():
        (finished / name).write_bytes(data)


def recipe_on(pair, folder):
    calibration = {"dataset": str(folder / "texts.txt"), "match_on": str(folder / "other.txt"), "texts": 60}
    return recipe_for(pair, calibration=calibration)


def write(path, lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def again(recipe, folder):
    """The same command once more: (report, stages at work, notes about data)."""
    steps = []
    report = merge(recipe, folder, listener=steps.append).to_dict()
    notes = [step.what for step in steps if step.stage == "note" and ".txt" in step.what]
    return report, {step.stage for step in steps} - {"note"}, notes


def test_the_report_records_the_files_contents(finished):
    report = json.loads((finished / "fused/tmerge/report.json").read_text())
    assert report["calibration"]["file_sha256"] == sha256(finished / "texts.txt")
    assert report["calibration"]["other_sha256"] == sha256(finished / "other.txt")


def test_unchanged_files_are_not_read_again(run):
    folder, recipe = run
    assert again(recipe, folder)[1:] == (set(), [])


@pytest.mark.parametrize("name", ["texts.txt", "other.txt"])
def test_what_depends_on_a_changed_file_is_done_anew_and_it_is_said(run, finished, name):
    folder, recipe = run
    before = json.loads((folder / "tmerge/report.json").read_text())
    write(finished / name, sample_texts("malay")[:60])
    report, stages, notes = again(recipe, folder)
    assert {"texts", "target", "source", "transport", "fuse", "evaluate", "save"} <= stages
    assert len(notes) == 1 and name in notes[0] and "changed since" in notes[0] and "done anew" in notes[0]
    key = "file_sha256" if name == "texts.txt" else "other_sha256"
    assert report["calibration"][key] == sha256(finished / name) != before["calibration"][key]
    # The neurons are matched on the one, and the verdict is on the other.
    assert (report["weights"] != before["weights"]) == (name == "other.txt")
    assert (report["evaluation"]["base"] != before["evaluation"]["base"]) == (name == "texts.txt")
    assert again(recipe, folder) == (report, set(), [])


def test_a_file_that_is_gone_leaves_what_was_read_of_it(run, finished):
    folder, recipe = run
    (finished / "texts.txt").unlink()
    report, stages, notes = again(recipe, folder)
    assert stages == set() and report == json.loads((folder / "tmerge/report.json").read_text())
    assert len(notes) == 1 and "no such file" in notes[0] and "is kept" in notes[0]


@pytest.mark.parametrize("name", ["texts.txt", "other.txt"])
@pytest.mark.parametrize(("change", "words"), [("other", "have changed since"), ("gone", "is not here")])
def test_reproduce_names_the_file_and_not_the_processor(run, finished, tmp_path, name, change, words):
    folder, _ = run
    if change == "gone":
        (finished / name).unlink()
    else:
        write(finished / name, sample_texts("malay")[:60])
    with pytest.raises(DatasetError, match=words) as caught:
        reproduce(str(folder), tmp_path / "again")
    assert name in str(caught.value) and "\n" not in str(caught.value) and caught.value.exit_code == 2
    assert not (tmp_path / "again").exists()


@pytest.mark.slow
def test_a_comparison_scores_a_changed_domain_anew(pair, tmp_path):
    domain = tmp_path / "domain.txt"
    write(domain, sample_texts("malay")[:40])
    recipe = recipe_for(
        pair, compare={"rows": [], "alphas": [], "domains": {"Malay": str(domain)}}, evaluation={"descent": 4}
    )
    steps = []

    def row_of(name):
        steps.clear()
        result = compare(recipe, tmp_path / "c", listener=steps.append)
        assert result.data[str(domain)] == f"sha256:{sha256(domain)}"
        return next(row for row in result.rows if row.name == name).domains["Malay"].value

    first = row_of("base")
    assert row_of("base") == first and not [step for step in steps if step.stage == "compare"]
    write(domain, sample_texts("thai")[:40])
    assert row_of("base") != first
    assert any("domain.txt" in step.what and "done anew" in step.what for step in steps if step.stage == "note")
    # The merge itself does not read the domain.
    assert not [step for step in steps if step.stage == "fuse"]


@pytest.mark.parametrize("section", ["domains", "task_data"])
def test_a_missing_file_of_a_comparison_is_said_before_the_merge(pair, tmp_path, section):
    recipe = recipe_for(pair, compare={"rows": [], "alphas": [], section: {"xcopa_id": str(tmp_path / "none.jsonl")}})
    with pytest.raises(DatasetError, match="none.jsonl.*no such file"):
        compare(recipe, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def changing(path, lines, whole):
    """The function, and then the file is another."""

    def called(*words, **options):
        result = whole(*words, **options)
        write(path, lines)
        return result

    return called


@pytest.mark.slow
def test_a_domain_that_changes_during_the_merge_is_refused(pair, tmp_path, monkeypatch):
    domain = tmp_path / "domain.txt"
    write(domain, sample_texts("malay")[:40])
    recipe = recipe_for(
        pair, compare={"rows": [], "alphas": [], "domains": {"Malay": str(domain)}}, evaluation={"descent": 4}
    )
    with monkeypatch.context() as patched:
        patched.setattr("tmerge.comparison.compare.merge", changing(domain, sample_texts("thai")[:40], merge))
        with pytest.raises(DatasetError, match=r"domain .*domain\.txt' changed since this comparison began") as caught:
            compare(recipe, tmp_path / "c")
    assert "\n" not in str(caught.value) and not list((tmp_path / "c/rows").iterdir())
    result = compare(recipe, tmp_path / "c")
    assert result.data[str(domain)] == f"sha256:{sha256(domain)}"


@pytest.mark.slow
@pytest.mark.parametrize("when", ["merge", "tasks"])
def test_a_task_file_that_changes_during_the_comparison_is_refused(pair, tmp_path, monkeypatch, when):
    data, scored = tmp_path / "task.jsonl", []
    write(data, ["one"])

    def tasks(model, names, **options):
        scored.append(names)
        return {}

    monkeypatch.setattr(
        "tmerge.comparison.inputs.run_tasks", changing(data, ["two"], tasks) if when == "tasks" else tasks
    )
    if when == "merge":
        monkeypatch.setattr("tmerge.comparison.compare.merge", changing(data, ["two"], merge))
    words = {"rows": [], "alphas": [], "tasks": ["xcopa_id"], "task_data": {"xcopa_id": str(data)}}
    recipe = recipe_for(pair, compare=words, evaluation={"descent": 4})
    with pytest.raises(DatasetError, match=r"task file .*task\.jsonl' changed since this comparison began"):
        compare(recipe, tmp_path / "c")
    assert len(scored) == (when == "tasks") and not list((tmp_path / "c/rows").iterdir())


def test_a_file_that_is_written_to_while_it_is_read_is_refused(tmp_path):
    data = tmp_path / "data.txt"
    write(data, sample_texts("malay")[:60])
    settings = CalibrationSettings(dataset=str(data), texts=60)
    with pytest.raises(DatasetError, match=r"'data\.txt' changed while it was read"):
        read_texts(settings, seed=0, progress=lambda done, total: done == 1 and write(data, ["another"]))


@pytest.mark.slow
def test_a_row_is_made_anew_where_its_source_is_another_by_now(pair, tmp_path):
    save_pico("gpt2", tmp_path / "further", layers=2, seed=2)
    recipe = recipe_for(
        pair, compare={"rows": [], "alphas": [], "sources": [str(tmp_path / "further")]}, evaluation={"descent": 4}
    )
    values = []
    for seed in (2, 3):
        save_pico("gpt2", tmp_path / "further", layers=2, seed=seed)
        rows = compare(recipe, tmp_path / "c").rows
        values.append(next(row.value for row in rows if row.name.startswith("fused with")))
    assert values[0] != values[1]


@pytest.mark.slow
def test_a_training_set_that_changed_is_refused_by_its_name(finished, tmp_path):
    pytest.importorskip("trl", reason="the adapt extra is not installed")
    from tmerge.stages.adapt import adapt_run

    data, words = tmp_path / "data.txt", {"steps": 2, "batch_size": 2, "max_tokens": 40}
    write(data, sample_texts("malay")[:40])
    report = adapt_run(finished / "fused", tmp_path / "trained", words, dataset=str(data)).to_dict()
    assert report["adaptation"]["data"]["file_sha256"] == sha256(data)
    write(data, sample_texts("thai")[:40])
    with pytest.raises(OutputExistsError, match=r"begun before data\.txt changed"):
        adapt_run(finished / "fused", tmp_path / "trained", words, dataset=str(data))
    with pytest.raises(OutputExistsError, match="is not this training"):
        adapt_run(finished / "fused", tmp_path / "trained", {**words, "steps": 3}, dataset="samples:malay")


def test_an_evaluation_says_what_its_files_were(pair, tmp_path):
    data = tmp_path / "data.txt"
    write(data, sample_texts("malay")[:64])
    result = evaluate_models([str(pair / "target")], dataset=str(data), texts=16)
    assert result.data == {str(data): f"sha256:{sha256(data)}"}


def test_samples_are_known_by_their_texts(monkeypatch):
    before = dataset_identity("samples:thai")
    assert before == dataset_identity(" samples:thai ") != dataset_identity("samples:malay")
    monkeypatch.setattr("tmerge.calibration.identity.sample_texts", lambda language: ["another"])
    assert dataset_identity("samples:thai") != before


@pytest.mark.slow
def test_rows_are_of_the_commits_that_were_merged_and_another_commit_has_others(pair, tmp_path, monkeypatch):
    # Two models as if they were of the Hub, where a repo's main can move at any time.
    now, loaded = ["a" * 40], []

    def found(reference, revision, trust_remote_code, adapter, base, **_):
        place = find_place(reference)
        place.__dict__["commit"] = revision or now[0]
        place.__dict__["_digest"] = lambda: place.commit
        return place

    def load(reference, *, place, **options):
        loaded.append(place.commit)
        return replace(load_model(reference, **options), commit=place.commit)

    def moving(*words, **options):
        report = merge(*words, **options)
        now[0] = "c" * 40
        return report

    monkeypatch.setattr("tmerge.models.model.find_place", found)
    monkeypatch.setattr("tmerge.models.model.load_model", load)
    monkeypatch.setattr("tmerge.models.model.load_tokenizer", lambda reference, **options: load_tokenizer(reference))
    monkeypatch.setattr("tmerge.comparison.compare.merge", moving)
    recipe = recipe_for(pair, compare={"rows": [], "alphas": []}, evaluation={"descent": 4, "controls": []})
    made = []
    for commit in ("a" * 40, "b" * 40):
        now[0], loaded[:] = commit, []
        report = compare(recipe, tmp_path / "c")
        assert report.target.commit == report.source.commit == commit and set(loaded) == {commit}
        made.append({path.name for path in (tmp_path / "c/rows").iterdir()} - set().union(*made))
    assert [len(names) for names in made] == [3, 3]


@pytest.mark.slow
def test_a_model_that_changes_during_the_merge_is_refused(tmp_path, monkeypatch):
    save_pico("llama", tmp_path / "target", layers=2)
    save_pico("gpt2", tmp_path / "source", layers=2, seed=1)

    def changing_model(*words, **options):
        report = merge(*words, **options)
        save_pico("llama", tmp_path / "target", layers=2, seed=5)
        return report

    monkeypatch.setattr("tmerge.comparison.compare.merge", changing_model)
    recipe = recipe_for(tmp_path, compare={"rows": [], "alphas": []}, evaluation={"descent": 4, "controls": []})
    with pytest.raises(CheckpointError, match="target' changed since this comparison began") as caught:
        compare(recipe, tmp_path / "c")
    assert "\n" not in str(caught.value) and not list((tmp_path / "c/rows").iterdir())
