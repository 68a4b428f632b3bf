"""Two runs compared: the same, in other order, partly the same, without a common text, and of other shapes."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from analysis.counts import comparison as counts
from analysis.counts.comparison import Comparison, compare
from analysis.counts.divergence import jensen_shannon_bits
from traces.reader import TraceDataset
from traces.schema import SequenceTrace

Write = Callable[..., TraceDataset]


@pytest.fixture(scope="module")
def sequences(dataset: TraceDataset) -> list[SequenceTrace]:
    return list(dataset.sequences(columns=("weights", "tokens")))


def rerouted(sequence: SequenceTrace, num_experts: int) -> SequenceTrace:
    """The same text, its experts' numbers moved by one."""
    return replace(sequence, expert_ids_TLK=(sequence.expert_ids_TLK + 1) % num_experts)


def quick(first: TraceDataset, second: TraceDataset) -> Comparison:
    return compare(first, second, permutations=50, resamples=50)


def test_a_run_agrees_with_itself_in_everything(dataset: TraceDataset) -> None:
    found = quick(dataset, dataset)
    assert found.all_matched
    assert found.agreement is not None
    certain = {"value": 1.0, "low": 1.0, "high": 1.0}
    for part in (found.agreement, *found.agreement["by_layer"], *found.agreement["by_dataset"].values()):
        assert part["shared"] == part["exact_set"] == part["first_choice"] == certain
        assert part["weight_distance"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert set(found.agreement["by_dataset"]) == set(dataset.datasets)
    assert found.agreement["tokens"] == dataset.num_tokens
    for divergence in (found.divergence, found.divergence_of_pairs):
        assert divergence is not None
        assert not divergence.bits_L.any()
        assert (divergence.q_value_L == 1).all()
        assert divergence.exchanged_reach == 0


@pytest.mark.parametrize("group_bytes", [1, 500, counts.GROUP_BYTES])
def test_a_run_in_another_order_with_other_texts_between_is_counted_as_a_slow_count(
    dataset: TraceDataset,
    sequences: list[SequenceTrace],
    write_run: Write,
    monkeypatch: pytest.MonkeyPatch,
    group_bytes: int,
) -> None:
    monkeypatch.setattr(counts, "GROUP_BYTES", group_bytes)
    experts = dataset.spec.num_experts
    first = write_run(dataset.spec, sequences[:30])
    order = np.random.default_rng(0).permutation(50)[:35] + 10
    second = write_run(dataset.spec, [rerouted(sequences[place], experts) for place in order])
    common = [place for place in order.tolist() if place < 30]
    found = quick(first, second)
    assert (found.matched_sequences, found.sequences) == (len(common), (30, 35))
    assert not found.all_matched

    naive_RLE = np.zeros((2, dataset.spec.num_layers, experts), dtype=np.int64)
    for run, places in enumerate((range(30), order)):
        for place in places:
            ids_TLK = (sequences[place].expert_ids_TLK.astype(int) + run) % experts
            for layer in range(dataset.spec.num_layers):
                naive_RLE[run, layer] += np.bincount(ids_TLK[:, layer].ravel(), minlength=experts)
    np.testing.assert_array_equal(np.stack(found.counts), naive_RLE)
    assert found.divergence is not None
    np.testing.assert_allclose(found.divergence.bits_L, jensen_shannon_bits(*naive_RLE))

    shared = [
        len({*own} & {(expert + 1) % experts for expert in own}) / dataset.spec.top_k
        for place in common
        for token in sequences[place].expert_ids_TLK.tolist()
        for own in token
    ]
    assert found.agreement is not None
    assert found.agreement["shared"]["value"] == pytest.approx(np.mean(shared))
    assert found.agreement["first_choice"]["value"] == 0
    assert found.agreement["tokens"] == sum(sequences[place].num_tokens for place in common)
    whole = quick(second, first)  # the other way round
    assert whole.agreement is not None
    assert whole.agreement["shared"]["value"] == pytest.approx(np.mean(shared))


def test_runs_without_a_common_text_are_compared_by_usage_alone(
    dataset: TraceDataset, sequences: list[SequenceTrace], write_run: Write
) -> None:
    found = quick(write_run(dataset.spec, sequences[:30]), write_run(dataset.spec, sequences[30:]))
    assert (found.matched_sequences, found.agreement, found.divergence_of_pairs) == (0, None, None)
    assert found.expected_shared_L is None
    assert found.divergence is not None
    assert (found.divergence.p_value_L > 0.02).all()  # one run cut in two: no layer differs beyond chance


def test_runs_of_other_shapes_are_counted_each_for_itself(
    dataset: TraceDataset, make_run: Callable[..., object]
) -> None:
    for other in ({"layers": 2}, {"experts": 16}):
        found = quick(dataset, TraceDataset(make_run(**other)))  # type: ignore[arg-type]
        assert found.divergence is None
        assert found.agreement is None
        assert [len(each) for each in found.effective_experts()] == [3, other.get("layers", 3)]
        assert all(each.min() >= 1 and each.max() <= 16 for each in found.effective_experts())


def test_runs_of_another_k_share_what_the_smaller_set_holds(
    dataset: TraceDataset, sequences: list[SequenceTrace], write_run: Write
) -> None:
    spec = replace(dataset.spec, top_k=1, weights_normalized=None)
    weights = [each.routing_weights_TLK for each in sequences]
    firsts = [
        replace(each, expert_ids_TLK=each.expert_ids_TLK[..., :1], routing_weights_TLK=own[..., :1])
        for each, own in zip(sequences, weights, strict=True)
        if own is not None
    ]
    found = quick(dataset, write_run(spec, firsts))
    assert found.agreement is not None
    assert found.agreement["shared"]["value"] == found.agreement["first_choice"]["value"] == 1
    assert "exact_set" not in found.agreement
    assert 0.1 < found.agreement["weight_distance"]["value"] < 0.5
