"""Batches: every sequence once, within the budget, within a window, and little padding."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from collection.batching import cut_batches, padding_share


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=60),
    window=st.integers(1, 400),
    budget=st.integers(1, 200),
    size=st.none() | st.integers(1, 5),
)
def test_batches_hold_every_sequence_once_within_budget_and_window(
    lengths: list[int], window: int, budget: int, size: int | None
) -> None:
    batches = cut_batches(lengths, window=window, batch_tokens=budget, batch_size=size)
    assert sorted(position for batch in batches for position in batch) == list(range(len(lengths)))
    written, waiting = 0, set[int]()
    for batch in batches:
        assert batch == sorted(batch)
        padded = len(batch) * max(lengths[position] for position in batch)
        assert len(batch) == 1 or (padded <= budget if size is None else len(batch) <= size)
        waiting |= set(batch)
        assert len(waiting) == 1 or sum(lengths[position] for position in waiting) <= window
        while written in waiting:
            waiting.remove(written)
            written += 1
    assert written == len(lengths)


def test_sorting_by_length_leaves_little_padding() -> None:
    lengths = np.random.default_rng(0).integers(8, 513, 1000).tolist()
    batches = cut_batches(lengths, window=64 * 8192, batch_tokens=8192)
    unsorted = [list(range(first, first + 16)) for first in range(0, 992, 16)] + [list(range(992, 1000))]
    assert padding_share(lengths, batches) < 0.05 < 0.4 < padding_share(lengths, unsorted)
