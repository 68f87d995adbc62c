"""docs/models.md says what the tables say."""

from pathlib import Path

from tmerge.models.page import models_page


def test_the_page_is_what_the_tables_say():
    written = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    assert written == models_page(), "docs/models.md is out of date: python -m tmerge.models.page > docs/models.md"
    for words in (
        "| q | `q_proj` |",
        "phi3 (`qkv_proj`)",
        "a value head",
        "`rope.scaling.type`",
        "llama",
        "1 to 1,000",
    ):
        assert words in written
