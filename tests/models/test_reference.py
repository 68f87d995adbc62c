"""Reading model references."""

from __future__ import annotations

import pytest

from tmerge.errors import CheckpointError, ModelNotFoundError
from tmerge.models import ModelReference, trusts


@pytest.mark.parametrize(
    ("text", "repo", "revision", "name"),
    [
        ("user/name", "user/name", None, "name"),
        ("user/name@v1.0", "user/name", "v1.0", "name"),
        ("user/name@refs/pr/3", "user/name", "refs/pr/3", "name"),
        (" user/Na-me_1.5B ", "user/Na-me_1.5B", None, "Na-me_1.5B"),
        ("gpt2", "gpt2", None, "gpt2"),
    ],
)
def test_hub_ids(text, repo, revision, name):
    reference = ModelReference.parse(text)
    assert (reference.kind, reference.repo, reference.revision) == ("hub", repo, revision)
    assert (reference.name, reference.path, reference.demo) == (name, None, None)
    assert str(reference) == text.strip()


def test_what_exists_wins_over_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("user/name", "user/name@v1"):
        (tmp_path / folder).mkdir(parents=True)
        reference = ModelReference.parse(folder)
        assert (reference.kind, reference.repo) == ("folder", None)
        assert reference.name == folder.removeprefix("user/")
    assert ModelReference.parse("user/other").kind == "hub"
    assert ModelReference.parse(".").name == tmp_path.name


def test_a_gguf_file(tmp_path):
    (tmp_path / "Pico.Q8_0.gguf").touch()
    reference = ModelReference.parse(str(tmp_path / "Pico.Q8_0.gguf"))
    assert (reference.kind, reference.name) == ("gguf", "Pico.Q8_0")


def test_a_demo_model_needs_no_file():
    reference = ModelReference.parse("demo:gemma-3-270m")
    assert (reference.kind, reference.demo, reference.name) == ("gguf", "gemma-3-270m", "gemma-3-270m")


@pytest.mark.parametrize("text", ["./fused", "/nowhere/fused", "~/nowhere/fused", "pico.gguf", "a/b.gguf", "fused/"])
def test_a_path_that_is_not_there(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the checkout's own demo may lie in fused/
    with pytest.raises(ModelNotFoundError, match="no such file or folder"):
        ModelReference.parse(text)


@pytest.mark.parametrize("text", ["", "  ", "a/b/c", "user/name@", "user name/x", "user/", "http://x.y/z", "-x/y"])
def test_no_reference_at_all(text):
    with pytest.raises(ModelNotFoundError) as caught:
        ModelReference.parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pytorch_model.bin", "convert it to safetensors"),
        ("model.pt", "convert it to safetensors"),
        ("model.safetensors", "give its folder"),
        ("notes.txt", "not a model file"),
    ],
)
def test_files_of_another_kind(tmp_path, name, words):
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=words):
        ModelReference.parse(str(tmp_path / name))


@pytest.mark.parametrize(
    ("trusted", "reference", "expected"),
    [
        ("user/code", "user/code", True),
        ("user/code", "user/code@" + "1" * 40, True),
        ("user/code@main", "user/code@" + "1" * 40, True),
        ("user/code", "user/codes", False),
        ("user/code", "user/code-2@main", False),
        ("user/code@main", "stranger/code@main", False),
        # A folder is no revision of another one.
        ("./code", "./code@other", False),
        ("./code", "./code", True),
        ("demo:a", "demo:b", False),
    ],
)
def test_trust_goes_by_the_repo_and_not_by_its_revision(trusted, reference, expected):
    assert trusts((trusted,), reference) is expected
    assert not trusts((), reference)


def test_a_folder_that_looks_like_a_pinned_repo_is_not_trusted_as_that(tmp_path, monkeypatch):
    (tmp_path / "user/code@main").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not trusts(("user/code",), "user/code@main")
