"""What goes to the Hugging Face Hub with a merge."""

from __future__ import annotations

from tmerge.hub.card import card_text, write_card

__all__ = ["card_text", "write_card"]
