from dataclasses import replace

import numpy as np
import pytest
import torch

from speculation.features import (
    SCAN_TOKENS,
    RoutingBatch,
    bucketed,
    decayed_usage,
    earlier_step,
    last_used,
    multi_hot,
    packed_batches,
    previous_token,
    weighted_hot,
)
from traces.reader import TraceDataset


def random_hot(tokens: int, experts: int = 5, seed: int = 0) -> torch.Tensor:
    ids = torch.rand(tokens, 2, experts, generator=torch.Generator().manual_seed(seed)).argsort(dim=2)[:, :, :2]
    return multi_hot(ids, experts)


def test_packing_keeps_order_lengths_and_values(dataset: TraceDataset) -> None:
    sequences = list(dataset.sequences("all", columns=("weights", "lookahead")))[:3]
    batch = RoutingBatch.from_sequences(sequences, dataset.spec)
    assert batch.sequence_lengths.tolist() == [sequence.num_tokens for sequence in sequences]
    assert batch.expert_ids_TLK[batch.offsets[1]].tolist() == sequences[1].expert_ids_TLK[0].tolist()
    assert batch.routing_weights_TLK is not None
    assert batch.lookahead_logits_THLE is not None
    assert batch.routing_weights_TLK.dtype == torch.float32
    assert batch.lookahead_logits_THLE.shape == (batch.num_tokens, 3, 4, 8)
    assert batch.router_logits_TLE is None
    assert batch.token_ids_T is not None
    assert batch.token_ids_T[0] == int(sequences[0].token_ids_T[0])


def test_batches_hold_whole_sequences_within_the_token_limit(dataset: TraceDataset) -> None:
    batches = list(packed_batches(dataset.sequences("all", columns=()), dataset.spec, 100))
    assert sum(len(group) for group, _ in batches) == dataset.num_sequences
    assert all(batch.num_tokens <= 100 for _, batch in batches)
    alone = list(packed_batches(dataset.sequences("all", columns=()), dataset.spec, 1))
    assert len(alone) == dataset.num_sequences


def test_unknown_token_ids_are_hashed_from_the_strings(dataset: TraceDataset) -> None:
    (sequence,) = dataset.read([0])
    count = sequence.num_tokens
    unknown = replace(sequence, token_ids_T=np.full(count, -1, dtype=np.int32), tokens_T=(["a", "b"] * count)[:count])
    ids = RoutingBatch.from_sequences([unknown], dataset.spec).token_ids_T
    assert ids is not None
    assert ids[0] == ids[2] != ids[1]
    assert ids.min() >= 0
    assert RoutingBatch.from_sequences([replace(unknown, tokens_T=[])], dataset.spec).token_ids_T is None


def test_weighted_hot_holds_each_experts_share_of_the_weight() -> None:
    ids = torch.tensor([[[2, 0]]])
    share = weighted_hot(ids, torch.tensor([[[1.5, 0.5]]]), 4)
    assert share.tolist() == [[[0.25, 0.0, 0.75, 0.0]]]


def test_previous_token_stops_at_sequence_starts() -> None:
    values = torch.arange(1, 6)
    assert previous_token(values, torch.tensor([0, 2, 5])).tolist() == [0, 1, 0, 3, 4]


@pytest.mark.parametrize("lengths", [[3], [1, SCAN_TOKENS + 5, 2], [SCAN_TOKENS, SCAN_TOKENS + 1]])
def test_decayed_usage_equals_its_definition_across_chunks_and_sequences(lengths: list[int]) -> None:
    offsets = torch.tensor([0, *np.cumsum(lengths).tolist()])
    hot, decays = random_hot(int(offsets[-1])), (0.0, 0.5, 0.99)
    expected = torch.zeros(len(hot), 2, 3, 5)
    for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        state = torch.zeros(2, 3, 5)
        for token in range(start, stop):
            expected[token] = state * (1 - torch.tensor(decays))[None, :, None]
            state = state * torch.tensor(decays)[None, :, None] + hot[token][:, None, :]
    torch.testing.assert_close(decayed_usage(hot, offsets, decays), expected, atol=1e-6, rtol=1e-5)


def test_last_used_counts_tokens_back_within_the_sequence() -> None:
    hot = torch.zeros(5, 1, 2)
    hot[0, 0, 0] = hot[1, 0, 1] = hot[3, 0, 1] = 1
    assert last_used(hot, torch.tensor([0, 3, 5]))[:, 0].tolist() == [[0, 0], [1, 0], [2, 1], [0, 0], [0, 1]]


def test_an_earlier_step_runs_on_into_the_token_before_and_stops_at_the_sequence() -> None:
    values = torch.arange(1, 11).view(5, 2)  # five tokens of two layers, the last token a sequence of its own
    offsets = torch.tensor([0, 4, 5])
    assert earlier_step(values, offsets, 1).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7], [0, 9]]
    assert earlier_step(values, offsets, 3).tolist() == [[0, 0], [0, 1], [2, 3], [4, 5], [0, 0]]
    assert earlier_step(values[..., None].expand(-1, -1, 2), offsets, 20).sum() == 0


def test_buckets_are_few_and_evenly_filled() -> None:
    counts = torch.bincount(bucketed(torch.arange(64_000), 64), minlength=64)
    assert len(counts) == 64
    assert counts.min() > 900
