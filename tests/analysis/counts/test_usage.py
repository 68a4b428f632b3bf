"""Usage counts against a naive count, and the permutation test on data with and without an effect."""

import numpy as np
import pytest
from scipy import stats

from analysis.counts.usage import UsageCounts, information_bits
from traces.reader import TraceDataset


def counted(dataset: TraceDataset, labels: list[str] | None = None, permutations: int = 50) -> UsageCounts:
    spec = dataset.spec
    usage = UsageCounts(
        spec.num_layers,
        spec.num_experts,
        labels or [info.dataset for info in dataset.index],
        permutations=permutations,
    )
    for trace in dataset.sequences():
        usage.add(trace)
    return usage


def test_counts_equal_a_naive_count(dataset: TraceDataset) -> None:
    usage = counted(dataset)
    naive = np.zeros_like(usage.counts_DLE)
    for trace in dataset.sequences():
        for token in trace.expert_ids_TLK:
            for layer, experts in enumerate(token):
                for expert in experts:
                    naive[usage.datasets.index(trace.dataset), layer, expert] += 1
    np.testing.assert_array_equal(usage.counts_DLE, naive)
    assert usage.tokens_D.sum() == dataset.num_tokens
    np.testing.assert_allclose(usage.share_LE().sum(axis=1), 1)


def test_differences_weigh_every_data_set_alike_and_cancel_out(dataset: TraceDataset) -> None:
    usage = counted(dataset)
    np.testing.assert_allclose(usage.difference_DLE().sum(axis=0), 0, atol=1e-12)
    favoured = [
        usage.difference_DLE()[usage.datasets.index(name), :, d].min() for d, name in enumerate(dataset.datasets)
    ]
    assert min(favoured) > 0.05  # data set d of the fixture favours expert d


def test_information_is_zero_when_independent_and_one_bit_when_one_of_two_is_determined() -> None:
    assert information_bits(np.array([[10, 30], [20, 60]])) == pytest.approx(0)
    assert information_bits(np.array([[50, 0], [0, 50]])) == pytest.approx(1)
    assert information_bits(np.zeros((3, 2, 2), dtype=np.int64)).tolist() == [0, 0, 0]


def test_information_exceeds_shuffled_labels_where_data_sets_differ(dataset: TraceDataset) -> None:
    information = counted(dataset).mutual_information()
    assert information is not None
    assert (information.bits_L > information.shuffled_high_L).all()
    assert information.p_value_L.tolist() == [1 / 51] * dataset.spec.num_layers


def test_information_lies_within_shuffled_labels_where_there_is_no_effect(dataset: TraceDataset) -> None:
    """Sequences of one data set only, split in two at random."""
    spec = dataset.spec
    traces = list(dataset.sequences(only=["code"]))
    usage = UsageCounts(spec.num_layers, spec.num_experts, [("code", "tables")[i % 2] for i in range(len(traces))])
    for number, trace in enumerate(traces):
        object.__setattr__(trace, "dataset", ("code", "tables")[number % 2])
        usage.add(trace)
    information = usage.mutual_information()
    assert information is not None
    assert (information.p_value_L > 0.01).all()


def test_one_data_set_gives_no_information_and_an_unannounced_one_is_refused(dataset: TraceDataset) -> None:
    assert UsageCounts(3, 8, ["code"] * 9).mutual_information() is None
    with pytest.raises(ValueError, match="was not announced"):
        counted(dataset, ["only this"] * 60)
    with pytest.raises(ValueError, match="more sequences"):
        counted(dataset, dataset.datasets)


def test_differences_are_found_where_data_sets_differ_and_each_p_is_that_of_a_second_pass(
    dataset: TraceDataset,
) -> None:
    usage = counted(dataset, permutations=99)
    differences = usage.differences()
    assert differences is not None
    for d, name in enumerate(dataset.datasets):
        row = usage.datasets.index(name)
        assert (differences.q_DLE[row, :, d] < 0.05).all()  # data set d of the fixture favours expert d
    rng = np.random.default_rng(0)
    labels = np.array([usage.datasets.index(info.dataset) for info in dataset.index])
    ids = [trace.expert_ids_TLK[:, 2] for trace in dataset.sequences()]
    shuffled = []
    for _ in range(99):
        permuted = rng.permutation(labels)
        shares = []
        for label in range(3):
            chosen = np.concatenate([ids[s].ravel() for s in np.flatnonzero(permuted == label)])
            shares.append(np.bincount(chosen, minlength=8) / len(chosen))
        shuffled.append(shares[1] - np.mean(shares, axis=0))
    freedom = 4 + 6 / np.maximum(stats.kurtosis(shuffled), 0.05)
    away = np.abs(differences.difference_DLE[1, 2] - np.mean(shuffled, axis=0)) / np.std(shuffled, axis=0, ddof=1)
    expected = 2 * stats.t.sf(away * np.sqrt(freedom / (freedom - 2)), np.minimum(freedom, 98))
    np.testing.assert_allclose(differences.p_DLE[1, 2], expected)


def test_data_sets_of_few_sequences_are_counted_but_neither_compared_nor_part_of_the_mean(make_traces) -> None:
    traces = make_traces([20] * 30, datasets=("a", "b"))
    few = make_traces([20] * 7, datasets=("few",), seed=1)
    alone, together = (
        UsageCounts(3, 6, [trace.dataset for trace in each], permutations=30) for each in (traces, traces + few)
    )
    for trace in traces:
        alone.add(trace)
    for trace in few + traces:
        together.add(trace)
    assert together.sequences_D.tolist() == [15, 15, 7]
    expected, found = alone.differences(), together.differences()
    assert expected is not None
    assert found is not None
    np.testing.assert_array_equal(found.difference_DLE[:2], expected.difference_DLE)
    np.testing.assert_array_equal(found.q_DLE[:2], expected.q_DLE)
    assert np.isnan(found.p_DLE[2]).all()
    assert np.abs(found.difference_DLE[2]).max() > 0
    assert UsageCounts(3, 6, ["a"] * 20 + ["few"] * 7).differences() is None


def test_without_an_effect_differences_are_as_often_significant_as_promised(make_traces) -> None:
    p = []
    for seed in range(12):
        traces = make_traces([12] * 30, linger=0.9, seed=seed)
        usage = UsageCounts(3, 6, [trace.dataset for trace in traces], permutations=99, seed=seed)
        for trace in traces:
            usage.add(trace)
        differences = usage.differences()
        assert differences is not None
        p.append(differences.p_DLE)
        assert (differences.q_DLE < 0.05).mean() < 0.15
    for alpha in (0.1, 0.5):
        assert (np.array(p) <= alpha).mean() == pytest.approx(alpha, rel=0.4)


def test_the_order_of_sequences_does_not_change_counts(dataset: TraceDataset) -> None:
    spec = dataset.spec
    traces = list(dataset.sequences())
    backwards = UsageCounts(spec.num_layers, spec.num_experts, [trace.dataset for trace in traces[::-1]])
    for trace in traces[::-1]:
        backwards.add(trace)
    np.testing.assert_array_equal(backwards.counts_DLE, counted(dataset).counts_DLE)
