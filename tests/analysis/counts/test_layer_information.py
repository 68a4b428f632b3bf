"""Information between layers: what is certain, what is nothing, and what the control takes away."""

import numpy as np
import pytest

from analysis.counts import chunks, layer_information
from analysis.counts.layer_information import LayerInformation, LayerInformationCounts
from analysis.counts.usage import information_bits
from traces.schema import SequenceTrace


def counted(traces: list[SequenceTrace], layers: int = 3, experts: int = 6) -> LayerInformation:
    counts = LayerInformationCounts(layers, experts)
    for trace in traces:
        counts.add(trace)
    information = counts.information()
    assert information is not None
    return information


def test_observed_information_equals_that_of_naively_counted_pairs(
    make_traces, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CHUNK_TOKENS", 50)
    traces = make_traces([30, 8, 21, 40], layers=4)
    found = counted(traces, layers=4)
    for lower in range(4):
        for higher in range(4):
            if higher <= lower:
                assert np.isnan(found.observed_LL[lower, higher])
                continue
            table = np.zeros((6, 6), dtype=np.int64)
            for trace in traces:
                for token in trace.expert_ids_TLK:
                    for i in token[lower]:
                        for j in token[higher]:
                            table[i, j] += 1
            assert found.observed_LL[lower, higher] == pytest.approx(float(information_bits(table)))
    assert found.tokens == 99


def test_layers_without_a_relation_have_none_once_the_control_is_subtracted(make_traces) -> None:
    found = counted(make_traces([25] * 40, linger=0.0))
    upper = ~np.isnan(found.observed_LL)
    assert (found.observed_LL[upper] > 5e-4).all()  # finite text alone gives this much
    assert (found.bits_LL[upper] < found.observed_LL[upper] / 2).mean() > 0.6
    assert abs((found.observed_LL - found.control_LL)[upper].mean()) < 1e-3


def test_a_layer_that_repeats_another_tells_all_there_is_to_tell(make_traces) -> None:
    traces = make_traces([50] * 20, layers=2, top_k=1, linger=0.0)
    for trace in traces:
        trace.expert_ids_TLK[:, 1] = (trace.expert_ids_TLK[:, 0] + 1) % 6
    assert counted(traces, layers=2).bits_LL[0, 1] == pytest.approx(np.log2(6), abs=0.03)


def test_distance_is_bounded_by_the_bytes_of_its_tables(make_traces, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_information, "TABLE_BYTES", 8 * 5 * 36 * 2)
    monkeypatch.setattr(chunks, "CHUNK_TOKENS", 20)
    counts = LayerInformationCounts(5, 6)
    assert counts.distance == 2
    for trace in make_traces([10] * 8, layers=5):
        counts.add(trace)
    found = counts.information()
    assert found is not None
    assert found.tokens == found.control_tokens == 80  # all chunks, of two sequences each
    assert np.isnan(found.bits_LL[0, 3])
    assert np.isfinite(found.bits_LL[0, 2])


def test_one_sequence_has_no_control_and_one_layer_no_information(make_traces) -> None:
    found = counted(make_traces([30]))
    assert found.control_tokens == 0
    np.testing.assert_array_equal(found.bits_LL, found.observed_LL)
    assert LayerInformationCounts(1, 6).information() is None
