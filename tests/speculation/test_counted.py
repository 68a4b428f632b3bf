from pathlib import Path

import pytest
import torch

from groundwork.errors import ConfigurationError
from speculation.counted import Frequency, Markov, Repeat, RoutingCounts, count_routing
from speculation.features import RoutingBatch, packed_batches
from speculation.predictor import RoutingShape
from traces.reader import TraceDataset

SHAPE = RoutingShape(3, 4, 2)


def batch_of(ids: list[list[list[int]]], lengths: list[int]) -> RoutingBatch:
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    return RoutingBatch(torch.tensor(ids), None, None, None, None, offsets, 4)


def counted(batch: RoutingBatch) -> RoutingCounts:
    counts = RoutingCounts.zeros(SHAPE)
    counts.add(batch)
    return counts


TWO_SEQUENCES = batch_of(
    [[[0, 1], [2, 3], [0, 2]], [[0, 2], [2, 1], [0, 3]], [[3, 1], [0, 1], [2, 3]]],
    [2, 1],
)


def test_counts_are_those_of_the_definition() -> None:
    counts = counted(TWO_SEQUENCES)
    assert counts.usage_LE.tolist() == [[2, 2, 1, 1], [1, 2, 2, 1], [2, 0, 2, 2]]
    assert counts.transitions_HLEE[0, 1, 0].tolist() == [0, 1, 2, 1]  # from expert 0 of layer 0 to layer 1
    assert counts.transitions_HLEE[1, 2, 0].tolist() == [2, 0, 1, 1]  # from expert 0 of layer 0 to layer 2
    assert counts.transitions_HLEE[0, 0].sum() == 0  # nothing lies below layer 0
    assert counts.previous_PEE[0, 1].tolist() == [1, 0, 1, 0]  # the second sequence has no token before
    assert counts.previous_PEE[0, 3].sum() == 0


def test_counts_of_parts_add_up_to_the_counts_of_the_whole(dataset: TraceDataset) -> None:
    whole, parts = count_routing(dataset), RoutingCounts.zeros(RoutingShape.of(dataset))
    for _, batch in packed_batches(dataset.sequences("train", columns=()), dataset.spec, 50):
        part = RoutingCounts.zeros(RoutingShape.of(dataset))
        part.add(batch)
        parts.merge(part)
    for name, value in vars(whole).items():
        assert torch.equal(value, getattr(parts, name)), name


def test_counts_survive_saving_and_refuse_another_shape(tmp_path: Path) -> None:
    counts = counted(TWO_SEQUENCES)
    counts.save(tmp_path / "baselines.safetensors")
    loaded = RoutingCounts.load(tmp_path / "baselines.safetensors", SHAPE)
    assert torch.equal(loaded.transitions_HLEE, counts.transitions_HLEE)
    with pytest.raises(ConfigurationError, match=r"usage_LE is \(3, 4\), wanted \(3, 5\)"):
        RoutingCounts.load(tmp_path / "baselines.safetensors", RoutingShape(3, 5, 2))
    (tmp_path / "baselines.safetensors").write_bytes(b"torn")
    with pytest.raises(ConfigurationError, match="missing or damaged"):
        RoutingCounts.load(tmp_path / "baselines.safetensors", SHAPE)


def test_frequency_gives_every_token_the_shares_of_its_layer() -> None:
    scores = Frequency().fit_counts(counted(TWO_SEQUENCES), SHAPE).predict_scores(TWO_SEQUENCES)
    torch.testing.assert_close(scores[0], scores[2])
    torch.testing.assert_close(scores[0, 2], torch.tensor([1 / 3, 0, 1 / 3, 1 / 3]), atol=1e-5, rtol=0)


def test_repeat_ranks_the_previous_tokens_experts_in_order_then_the_most_recently_used() -> None:
    batch = batch_of([[[1, 0]] * 3, [[2, 3]] * 3, [[3, 1]] * 3, [[0, 1]] * 3], [4])
    scores = Repeat().predict_scores(batch)
    assert scores[0].abs().sum() == 0
    assert scores[1, 0].argsort(descending=True, stable=True).tolist() == [1, 0, 2, 3]
    assert scores[3, 0].argsort(descending=True, stable=True).tolist() == [3, 1, 2, 0]


def test_markov_follows_the_transitions_from_the_layer_below_and_backs_off_to_frequency() -> None:
    # Layer 1 copies layer 0 in 200 tokens; expert 3 was never seen below.
    ids = [[[token % 2, 2]] * 3 for token in range(200)]
    counts = counted(batch_of(ids, [200]))
    markov = Markov().fit_counts(counts, SHAPE)
    scores = markov.predict_scores(batch_of([[[0, 2]] * 3, [[1, 2]] * 3, [[3, 2]] * 3], [3]))
    assert scores[0, 1, 0] > scores[0, 1, 1]
    assert scores[1, 1, 1] > scores[1, 1, 0]
    torch.testing.assert_close(scores.sum(dim=2), torch.ones(3, 3))
    frequency = counts.frequency_LE()
    torch.testing.assert_close(scores[0, 0], frequency[0])  # no token before, no layer below
    below = markov.below_HLEE_[0, 1]
    torch.testing.assert_close(below[3], frequency[1])  # never seen: all smoothing
    assert scores[1, 0, 1] > scores[1, 0, 0]  # layer 0 follows the token before: 0 is followed by 1
