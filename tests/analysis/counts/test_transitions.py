"""Transition counts against a naive count; conditional probabilities."""

import numpy as np
import pytest

from analysis.counts import chunks
from analysis.counts.transitions import TransitionCounts, conditional, transition_bits
from traces.reader import TraceDataset


def test_counts_equal_a_naive_count_and_never_cross_sequences(
    dataset: TraceDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CHUNK_TOKENS", 100)  # several chunks, with several sequences in each
    spec = dataset.spec
    counts = TransitionCounts(spec.num_layers, spec.num_experts)
    layers = np.zeros((spec.num_layers - 1, spec.num_experts, spec.num_experts), dtype=np.int64)
    tokens = np.zeros((spec.num_layers, spec.num_experts, spec.num_experts), dtype=np.int64)
    for trace in dataset.sequences():
        counts.add(trace)
        for place, token in enumerate(trace.expert_ids_TLK):
            for layer in range(spec.num_layers):
                for expert in token[layer]:
                    if layer:
                        layers[layer - 1, token[layer - 1], expert] += 1
                    if place:
                        tokens[layer, trace.expert_ids_TLK[place - 1, layer], expert] += 1
    np.testing.assert_array_equal(counts.across_layers_LEE, layers)
    np.testing.assert_array_equal(counts.across_tokens_LEE, tokens)


def test_rows_sum_to_one_and_are_unknown_for_experts_never_chosen(dataset: TraceDataset) -> None:
    counts = TransitionCounts(dataset.spec.num_layers, dataset.spec.num_experts + 1)
    for trace in dataset.sequences():
        counts.add(trace)
    probability = conditional(counts.across_layers_LEE)
    np.testing.assert_allclose(probability[:, :-1].sum(axis=-1), 1)
    assert np.isnan(probability[:, -1]).all()


def test_a_deterministic_step_tells_all_bits_and_one_layer_has_no_pairs() -> None:
    assert transition_bits(np.eye(8, dtype=np.int64)[None] * 5).tolist() == pytest.approx([3.0])
    assert TransitionCounts(1, 8).across_layers_LEE.shape == (0, 8, 8)
