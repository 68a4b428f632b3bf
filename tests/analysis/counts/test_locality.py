"""Reuse and working sets against sets of Python; what independence says is what independent tokens do."""

import numpy as np
import pytest

from analysis.counts import chunks
from analysis.counts.locality import DISTANCES, WINDOWS, LocalityCounts
from traces.schema import SequenceTrace

LENGTHS = [30, 1, 9, 70, 5]


def counted(traces: list[SequenceTrace], layers: int = 3, experts: int = 6) -> LocalityCounts:
    counts = LocalityCounts(layers, experts)
    for trace in traces:
        counts.add(trace)
    return counts


@pytest.mark.parametrize("experts", [6, 70, 200])
def test_reuse_and_working_set_equal_those_of_sets(make_traces, experts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_TOKENS", 40)
    traces = make_traces(LENGTHS, experts=experts, top_k=3)
    counts = counted(traces, experts=experts)
    reuse, working_set = counts.reuse_RL(), counts.working_set_WL()
    sets = [[[set(layer.tolist()) for layer in token] for token in trace.expert_ids_TLK] for trace in traces]
    for row, distance in enumerate(DISTANCES):
        for layer in range(3):
            parts = [
                len(tokens[place][layer] & tokens[place + distance][layer]) / 3
                for tokens in sets
                for place in range(len(tokens) - distance)
            ]
            assert counts.pairs_R[row] == len(parts)
            assert reuse[row, layer] == pytest.approx(np.mean(parts) if parts else np.nan, nan_ok=True)
    for row, window in enumerate(WINDOWS):
        for layer in range(3):
            sizes = [
                len(set().union(*(token[layer] for token in tokens[place : place + window])))
                for tokens in sets
                for place in range(len(tokens) - window + 1)
            ]
            assert counts.windows_W[row] == len(sizes)
            assert working_set[row, layer] == pytest.approx(np.mean(sizes) if sizes else np.nan, nan_ok=True)


def test_independent_tokens_do_what_independence_says_and_lingering_ones_more(make_traces) -> None:
    independent = counted(make_traces([200] * 20, linger=0.0))
    chance = independent.independent_reuse_L()
    np.testing.assert_allclose(independent.reuse_RL()[:10], np.broadcast_to(chance, (10, 3)), atol=0.03)
    expected = independent.independent_working_set_WL()
    np.testing.assert_allclose(independent.working_set_WL()[:7], expected[:7], atol=0.05)
    lingering = counted(make_traces([200] * 20, linger=0.9))
    assert (lingering.reuse_RL()[0] > lingering.independent_reuse_L() + 0.2).all()
    assert (lingering.working_set_WL()[3] < lingering.independent_working_set_WL()[3] - 0.5).all()


def test_the_order_of_sequences_does_not_matter(make_traces) -> None:
    traces = make_traces(LENGTHS)
    np.testing.assert_array_equal(counted(traces).reuse_RL(), counted(traces[::-1]).reuse_RL())
    np.testing.assert_array_equal(counted(traces).working_set_WL(), counted(traces[::-1]).working_set_WL())
