"""Entropy, effective number and Gini against their definitions; focus on planted and on shuffled data sets."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.counts.specialisation import effective_number, entropy_bits, focus, gini
from analysis.counts.usage import UsageCounts
from traces.schema import SequenceTrace

COUNTS = st.lists(st.integers(0, 50), min_size=2, max_size=12).filter(any)


@given(COUNTS)
def test_measures_of_evenness_equal_their_definitions(counts: list[int]) -> None:
    share = np.array(counts) / sum(counts)
    bits = -sum(each * np.log2(each) for each in share if each > 0)
    assert entropy_bits(share) == pytest.approx(bits)
    assert effective_number(share) == pytest.approx(2**bits)
    differences = sum(abs(a - b) for a in share for b in share)
    assert gini(share) == pytest.approx(differences / (2 * len(counts) * share.sum()), abs=1e-12)


def test_even_use_and_use_of_one_expert_are_the_ends_of_the_scales() -> None:
    even, one = np.full(8, 1 / 8), np.eye(8)[3]
    assert [float(measure(even)) for measure in (entropy_bits, effective_number, gini)] == pytest.approx([3, 8, 0])
    assert [float(measure(one)) for measure in (entropy_bits, effective_number, gini)] == pytest.approx([0, 1, 7 / 8])
    assert gini(np.zeros(4)) == 0


def counted(traces: list[SequenceTrace], permutations: int = 200, seed: int = 0) -> UsageCounts:
    usage = UsageCounts(3, 6, [each.dataset for each in traces], permutations=permutations, seed=seed)
    for trace in traces:
        usage.add(trace)
    return usage


def test_focus_is_the_favourite_data_sets_part_with_data_sets_weighed_alike(make_traces) -> None:
    traces = make_traces([30] * 24, datasets=("a", "a", "b"))  # twice as many of one
    found = focus(counted(traces))
    assert found is not None
    for layer in range(3):
        for expert in range(6):
            parts = []
            for name in ("a", "b"):
                ids = np.concatenate([each.expert_ids_TLK[:, layer].ravel() for each in traces if each.dataset == name])
                parts.append((ids == expert).mean())
            assert found.focus_LE[layer, expert] == pytest.approx(max(parts) / sum(parts))
            assert found.favourite_LE[layer, expert] == int(np.argmax(parts))


def test_a_planted_expert_is_focused_beyond_chance_and_an_unused_one_is_unknown(make_traces) -> None:
    traces = make_traces([30] * 40, experts=5)
    for trace in traces:
        if trace.dataset == "code":
            trace.expert_ids_TLK[::2, 1] = (3, 4)
        trace.expert_ids_TLK[trace.expert_ids_TLK == 0] = 5
    found = focus(counted(traces))
    assert found is not None
    assert found.q_LE[1, 3] < 0.05
    assert found.favourite_LE[1, 3] == 0
    assert np.isnan(found.focus_LE[:, 0]).all()
    assert np.isnan(found.q_LE[:, 0]).all()


def test_under_shuffled_labels_focus_is_called_significant_about_as_often_as_promised(make_traces) -> None:
    p = []
    for seed in range(12):
        found = focus(counted(make_traces([12] * 30, seed=seed), permutations=99, seed=seed))
        assert found is not None
        p.append(found.p_LE)
    p_values = np.array(p)
    assert 0.02 < (p_values <= 0.1).mean() < 0.2  # 216 p-values, those of a layer dependent
    assert 0.35 < (p_values <= 0.5).mean() < 0.65


def test_one_data_set_has_no_focus(make_traces) -> None:
    assert focus(counted(make_traces([9] * 3, datasets=("code",)))) is None
