"""Compiled pair counts against counting one by one; chunks hold whole sequences."""

import numpy as np
import pytest

from analysis.counts import chunks
from analysis.counts.chunks import Chunk, Chunked, add_pairs
from traces.schema import SequenceTrace


@pytest.mark.parametrize(("experts", "top_k"), [(6, 2), (300, 3)])
def test_pairs_equal_a_naive_count_and_are_added_to_what_is_there(make_traces, experts: int, top_k: int) -> None:
    before, after = (Chunk(make_traces([30, 10], layers=4, experts=experts, top_k=top_k, seed=seed)) for seed in (0, 1))
    naive = np.ones((4, experts, experts), dtype=np.int64)
    for place in range(2):
        sequences = (before.traces[place].expert_ids_TLK, after.traces[place].expert_ids_TLK)
        for one, other in zip(*sequences, strict=True):
            for layer in range(4):
                for i in one[layer]:
                    for j in other[layer]:
                        naive[layer, i, j] += 1
    counts = np.ones_like(naive)
    add_pairs(before.ids_LTK, after.ids_LTK, counts)
    np.testing.assert_array_equal(counts, naive)


def test_chunks_hold_whole_sequences_and_flushing_counts_the_rest(make_traces, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_TOKENS", 10)
    seen: list[list[SequenceTrace]] = []

    class Collecting(Chunked):
        min_sequences = 2

        def _count(self, chunk: Chunk) -> None:
            seen.append(chunk.traces)
            assert chunk.offsets.tolist() == [0, *np.cumsum([each.num_tokens for each in chunk.traces])]
            assert [chunk.sequence_T.tolist().count(place) for place in range(len(chunk.traces))] == [
                each.num_tokens for each in chunk.traces
            ]

    collecting = Collecting()
    for trace in make_traces([20, 3, 4, 6, 2]):
        collecting.add(trace)
    collecting.flush()
    collecting.flush()
    assert [[each.num_tokens for each in traces] for traces in seen] == [[20, 3], [4, 6], [2]]
