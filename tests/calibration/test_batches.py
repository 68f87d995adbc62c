"""Batches of texts of like length."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tmerge.calibration import length_batches


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(64, 2048))
def test_every_text_is_read_once_and_no_batch_is_too_large(lengths: list[int], limit: int) -> None:
    batches = length_batches(lengths, limit)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        sizes = [lengths[index] for index in batch]
        assert sizes == sorted(sizes)
        assert len(batch) == 1 or len(batch) * sizes[-1] <= limit
        # At most an eighth of a batch is padding.
        assert sizes[-1] - sizes[0] <= sizes[-1] // 8
    assert batches == length_batches(list(lengths), limit)


def test_texts_of_one_length_fill_a_batch() -> None:
    assert length_batches([4] * 10, 16) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert length_batches([100, 7, 7], 64) == [[1, 2], [0]]
    assert length_batches([], 64) == []
