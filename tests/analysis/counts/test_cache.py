"""Stack distances against caches that are played through one by one, for every size."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.counts.cache import StackDistances, static_hit_rate_LC
from traces.schema import SequenceTrace


def played(sequences: list[np.ndarray], layer: int, size: int) -> float:
    """Return the hits of one layer's cache that drops the least recently used, looked up token by token."""
    hits = lookups = 0
    for ids in sequences:
        held: list[int] = []  # most recently used first
        for token in ids[:, layer].tolist():
            hits += sum(expert in held for expert in token)
            lookups += len(token)
            held = (token + [expert for expert in held if expert not in token])[:size]
    return hits / lookups


def traces_of(sequences: list[np.ndarray]) -> list[SequenceTrace]:
    return [
        SequenceTrace("a", n, "", np.zeros(len(ids), np.int32), [], np.zeros(len(ids), np.uint8), ids)
        for n, ids in enumerate(sequences)
    ]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 25), min_size=1, max_size=5), st.integers(2, 7), st.integers(1, 3), st.integers(0, 2**16)
)
def test_hits_equal_those_of_a_cache_of_every_size(lengths: list[int], experts: int, top_k: int, seed: int) -> None:
    top_k = min(top_k, experts)
    rng = np.random.default_rng(seed)
    sequences = [
        np.argsort(rng.random((tokens, 2, experts)) * np.arange(1, experts + 1), axis=-1)[..., :top_k].astype(np.uint8)
        for tokens in lengths
    ]
    stacks = StackDistances(2, experts)
    for trace in traces_of(sequences):
        stacks.add(trace)
    hits = stacks.hit_rate_LC()
    assert stacks.histogram_LD.sum() == 2 * top_k * sum(lengths)
    for layer in range(2):
        for size in range(top_k, experts + 1):
            np.testing.assert_allclose(hits[layer, size], played(sequences, layer, size))


def test_more_experts_than_a_byte_counts_are_kept_apart() -> None:
    ids = np.arange(300, dtype=np.uint16).reshape(300, 1, 1)
    stacks = StackDistances(1, 300)
    for trace in traces_of([np.concatenate([ids, ids])]):
        stacks.add(trace)
    assert stacks.histogram_LD[0].tolist() == [300, *[0] * 299, 300]


def test_the_order_and_the_chunks_of_sequences_do_not_matter(make_traces, monkeypatch: pytest.MonkeyPatch) -> None:
    traces = make_traces([30, 4, 50, 12])
    histograms = []
    for order, tokens in ((traces, 8192), (traces[::-1], 8192), (traces, 1)):
        monkeypatch.setattr("analysis.counts.chunks.CHUNK_TOKENS", tokens)
        stacks = StackDistances(3, 6)
        for trace in order:
            stacks.add(trace)
        histograms.append(stacks.histogram_LD)
    np.testing.assert_array_equal(histograms[0], histograms[1])
    np.testing.assert_array_equal(histograms[0], histograms[2])


def test_a_cache_that_never_changes_hits_the_shares_it_holds() -> None:
    np.testing.assert_allclose(static_hit_rate_LC(np.array([[0.1, 0.6, 0.3]])), [[0, 0.6, 0.9, 1.0]])
