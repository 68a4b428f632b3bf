"""Pair counts as matrix products against counting one by one, in blocks of any size; chunks hold whole sequences."""

import numpy as np
import pytest

from analysis.counts import chunks
from analysis.counts.chunks import Chunk, Chunked, membership, pair_counts
from traces.schema import SequenceTrace


@pytest.mark.parametrize("block_bytes", [1, 900, 2**25])
def test_pair_counts_equal_a_naive_count_in_blocks_of_any_size(
    make_traces, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "BLOCK_BYTES", block_bytes)
    before, after = (make_traces([40], layers=4, seed=seed)[0].expert_ids_TLK for seed in (0, 1))
    naive = np.zeros((3, 4, 6, 6), dtype=np.int64)
    for one, other in zip(before, after, strict=True):
        for distance in range(3):
            for layer in range(4 - distance):
                for i in one[layer]:
                    for j in other[layer + distance]:
                        naive[distance, layer, i, j] += 1
    np.testing.assert_array_equal(pair_counts(before, after, 6, distances=2), naive)


def test_membership_marks_the_experts_of_every_layer() -> None:
    ids = np.array([[[2, 0], [1, 2]]], dtype=np.uint8)
    assert membership(ids, 3).tolist() == [[1, 0, 1, 0, 1, 1]]


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
