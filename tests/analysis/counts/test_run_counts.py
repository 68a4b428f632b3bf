"""Counting side by side gives what every statistic counts alone, and one of them failing stops the pass."""

import numpy as np
import pytest

from analysis.counts import run_counts
from analysis.counts.cache import StackDistances
from analysis.counts.layer_information import LayerInformationCounts
from analysis.counts.run_counts import RunCounts
from analysis.counts.token_classes import TokenClassCounts
from traces.reader import TraceDataset


def test_statistics_counted_side_by_side_equal_those_counted_alone(
    dataset: TraceDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_counts, "BATCH_SEQUENCES", 7)
    together = RunCounts(dataset, seed=3).read(dataset)
    shape = (dataset.spec.num_layers, dataset.spec.num_experts)
    stacks, classes, layers = StackDistances(*shape), TokenClassCounts(*shape, seed=3), LayerInformationCounts(*shape)
    for trace in dataset.sequences("all", columns=("tokens",)):
        for counts in (stacks, classes, layers):
            counts.add(trace)
    np.testing.assert_array_equal(together.stacks.histogram_LD, stacks.histogram_LD)
    np.testing.assert_array_equal(together.token_classes.differences().q_CLE, classes.differences().q_CLE)
    assert together.token_classes.examples("digits", 0, 0) == classes.examples("digits", 0, 0)
    alone, found = layers.information(), together.layer_information.information()
    assert alone is not None
    assert found is not None
    np.testing.assert_array_equal(found.bits_LL, alone.bits_LL)
    assert together.quality.tokens == together.usage.tokens_D.sum() == dataset.num_tokens


def test_a_statistic_that_fails_stops_the_pass(dataset: TraceDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = RunCounts(dataset)

    def fail(trace: object) -> None:
        raise ArithmeticError("no such count")

    monkeypatch.setattr(counts.locality, "add", fail)
    with pytest.raises(ArithmeticError, match="no such count"):
        counts.read(dataset)
