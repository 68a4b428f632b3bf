"""Pairs within tokens and windows against counting one by one; independent choices have a lift of 1."""

import numpy as np
import pytest

from analysis.counts import chunks
from analysis.counts.coactivation import (
    WINDOW,
    CoactivationCounts,
    expected_window,
    expected_within,
    lift,
    window_bits,
    within_bits,
)
from traces.schema import SequenceTrace

LENGTHS = [40, 1, 17, 25, 3, 16]


def counted(traces: list[SequenceTrace], layers: int = 3, experts: int = 6) -> CoactivationCounts:
    counts = CoactivationCounts(layers, experts)
    for trace in traces:
        counts.add(trace)
    return counts


@pytest.mark.parametrize("chunk_tokens", [8192, 30])
def test_counts_equal_a_naive_count_and_never_cross_sequences(
    make_traces, chunk_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CHUNK_TOKENS", chunk_tokens)
    traces = make_traces(LENGTHS)
    within, window = np.zeros((3, 6, 6), dtype=np.int64), np.zeros((3, 6, 6), dtype=np.int64)
    for trace in traces:
        ids = trace.expert_ids_TLK
        for token in range(len(ids)):
            for layer in range(3):
                for i in ids[token, layer]:
                    for j in ids[token, layer]:
                        within[layer, i, j] += 1
                    for later in range(token + 1, min(token + WINDOW + 1, len(ids))):
                        for j in ids[later, layer]:
                            window[layer, i, j] += 1
    counts = counted(traces)
    np.testing.assert_array_equal(counts.within_LEE, within)
    np.testing.assert_array_equal(counts.window_LEE, window)
    assert counts.tokens == sum(LENGTHS)


def test_the_order_of_sequences_does_not_matter(make_traces) -> None:
    traces = make_traces(LENGTHS)
    forwards, backwards = counted(traces), counted(traces[::-1])
    np.testing.assert_array_equal(forwards.within_LEE, backwards.within_LEE)
    np.testing.assert_array_equal(forwards.window_LEE, backwards.window_LEE)


def test_the_yardsticks_keep_the_totals_and_within_a_token_the_empty_diagonal(make_traces) -> None:
    counts = counted(make_traces([60] * 4, top_k=3))
    expected = expected_within(counts.within_LEE)
    pairs = counts.within_LEE * (1 - np.eye(6, dtype=np.int64))
    np.testing.assert_allclose(expected.sum(axis=-1), pairs.sum(axis=-1), rtol=1e-6)
    assert not np.diagonal(expected, axis1=1, axis2=2).any()
    window = expected_window(counts.window_LEE)
    for axis in (-1, -2):
        np.testing.assert_allclose(window.sum(axis=axis), counts.window_LEE.sum(axis=axis))


def test_indifferent_choices_have_a_lift_of_one_and_lose_no_bits() -> None:
    """Also where experts are used unevenly: each token draws two of six in turn, by weight."""
    rng = np.random.default_rng(0)
    weights = np.array([0.35, 0.25, 0.15, 0.1, 0.1, 0.05])
    keys = np.log(weights) + rng.gumbel(size=(60_000, 6))
    ids = np.argsort(-keys, axis=-1)[:, None, :2].astype(np.uint8)
    trace = SequenceTrace("a", 0, "", np.zeros(60_000, np.int32), [], np.zeros(60_000, np.uint8), ids)
    counts = counted([trace], layers=1)
    within = lift(counts.within_LEE, expected_within(counts.within_LEE))
    assert np.isnan(np.diagonal(within, axis1=1, axis2=2)).all()
    np.testing.assert_allclose(within[~np.isnan(within)], 1, atol=0.2)  # two draws in turn are not quite independent
    np.testing.assert_allclose(lift(counts.window_LEE, expected_window(counts.window_LEE)), 1, atol=0.02)
    assert within_bits(counts.within_LEE)[0] < 0.01
    assert window_bits(counts.window_LEE)[0] < 1e-4


def test_experts_that_always_go_together_stand_out(make_traces) -> None:
    ids = np.tile(np.array([[[0, 1]], [[2, 3]], [[4, 5]]], dtype=np.uint8), (20, 1, 1))
    trace = SequenceTrace("a", 0, "", np.zeros(60, np.int32), [], np.zeros(60, np.uint8), ids)
    counts = counted([trace], layers=1)
    found = lift(counts.within_LEE, expected_within(counts.within_LEE))[0]
    assert found[0, 1] == pytest.approx(5)  # one partner where five were possible
    assert found[0, 2] == 0
    assert within_bits(counts.within_LEE)[0] == pytest.approx(np.log2(5))
