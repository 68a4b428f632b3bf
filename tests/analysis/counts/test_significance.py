"""Shuffled counts against counting every permutation anew; q-values against the procedure as it is written."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.counts import significance
from analysis.counts.significance import ShuffledCounts, benjamini_hochberg


def test_shuffled_counts_equal_those_of_a_second_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(significance, "BATCH_SEQUENCES", 4)
    monkeypatch.setattr(significance, "BLOCK_NUMBERS", 40)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 11)
    counts_SN = rng.integers(0, 9, (11, 2, 4))
    shuffled = ShuffledCounts(labels.tolist(), 3, (2, 4), permutations=7, seed=5)
    for counts in counts_SN:
        shuffled.add(counts, 30)
    blocks = list(shuffled.blocks())
    assert len(blocks) > 1
    again = np.random.default_rng(5)
    for found in np.concatenate(blocks):
        permuted = again.permutation(labels)
        np.testing.assert_array_equal(found, [counts_SN[permuted == label].sum(axis=0) for label in range(3)])


def test_fewer_permutations_are_made_where_memory_would_not_hold_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(significance, "NULL_BYTES", 4 * 2 * 10 * 33)
    assert ShuffledCounts([0, 1], 2, (10,), permutations=1000, seed=0).permutations == 33
    assert ShuffledCounts([0, 1], 2, (10_000,), permutations=1000, seed=0).permutations == 20
    assert ShuffledCounts([0, 0], 1, (10,), permutations=1000, seed=0).permutations == 0


def test_more_sequences_than_labels_are_refused() -> None:
    shuffled = ShuffledCounts([0, 1], 2, (1,), permutations=3, seed=0)
    for _ in range(2):
        shuffled.add(np.ones(1, dtype=np.int64), 1)
    with pytest.raises(ValueError, match="than the 2 announced"):
        shuffled.add(np.ones(1, dtype=np.int64), 1)


@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=30), st.floats(0.01, 0.5))
def test_rejecting_q_below_alpha_is_the_step_up_procedure(p: list[float], alpha: float) -> None:
    q = benjamini_hochberg(np.array(p))
    ordered = sorted(p)
    passing = [rank for rank, each in enumerate(ordered, start=1) if each <= alpha * rank / len(p) * (1 - 1e-9)]
    cut = ordered[passing[-1] - 1] if passing else -1.0
    for each, found in zip(p, q, strict=True):
        if each <= cut:
            assert found <= alpha
        elif found < alpha * (1 - 1e-6):
            raise AssertionError((each, found, cut))


def test_unknown_p_values_stay_unknown_and_do_not_count_as_tests() -> None:
    q = benjamini_hochberg(np.array([0.01, np.nan, 0.04]))
    assert q[0] == pytest.approx(0.02)
    assert np.isnan(q[1])
    assert np.isnan(benjamini_hochberg(np.array([np.nan]))).all()
