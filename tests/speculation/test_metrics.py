import math

import pytest
import torch

from speculation.features import RoutingBatch
from speculation.metrics import (
    budgets,
    chance_values,
    layer_sums,
    metric_names,
    position_sums,
    ranked_experts,
    token_values,
)
from speculation.predictor import RoutingShape


def batch_of(ids: torch.Tensor, lengths: list[int], experts: int) -> RoutingBatch:
    return RoutingBatch(ids, None, None, None, None, torch.tensor([0, *torch.tensor(lengths).cumsum(0)]), experts)


def test_metrics_of_a_known_ranking_are_those_of_the_definition() -> None:
    batch = batch_of(torch.tensor([[[4, 1]], [[0, 5]]]), [1, 1], 6)
    scores = torch.tensor([[[1.0, 5, 0, 6, 4, 2]], [[9.0, 0, 0, 1, 2, 8]]])  # ranks 3 1 4 5 0 2 and 0 5 4 3 1 2
    names = metric_names(RoutingShape(1, 6, 2), ordered=True)
    first, second = (dict(zip(names, row, strict=True)) for row in token_values(scores, batch, names)[:, 0].tolist())
    assert first == {
        "top_1": 0, "top_3": 1, "top_5": 1, "recall@2": 0.5, "recall@3": 1, "recall@4": 1,
        "hit_at_1": 0, "exact_set": 0, "any_hit": 1,
    }  # fmt: skip
    assert set(second.values()) == {1.0}


def test_sums_are_kept_apart_by_sequence_and_layer() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(7, 3, 5, generator=generator).argsort(dim=2)[:, :, :2]
    scores = torch.rand(7, 3, 5, generator=generator)
    names = metric_names(RoutingShape(3, 5, 2), ordered=True)
    both, second = batch_of(ids, [3, 4], 5), batch_of(ids[3:], [4], 5)
    packed = layer_sums(token_values(scores, both, names), both)
    alone = layer_sums(token_values(scores[3:], second, names), second)
    assert packed.shape == (2, 3, len(names))
    assert torch.equal(packed[1], alone[0])


def test_equal_scores_rank_by_expert_id_even_in_long_rows() -> None:
    assert ranked_experts(torch.zeros(2, 1, 300))[1, 0].tolist() == list(range(300))
    assert ranked_experts(torch.tensor([[[0.0, 1.0, 0.0, 1.0]]]))[0, 0].tolist() == [1, 3, 0, 2]


def test_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="1 of 4 scores are NaN"):
        ranked_experts(torch.tensor([[[0.0, math.nan, 0.0, 1.0]]]))


def test_budgets_and_ranks_beyond_the_number_of_experts_are_left_out() -> None:
    shape = RoutingShape(1, 3, 2)
    assert budgets(shape) == [2, 3]
    assert metric_names(shape, ordered=True)[:2] == ["top_1", "top_3"]
    assert not any(name.startswith("top_") for name in metric_names(shape, ordered=False))


def test_chance_is_what_random_scores_reach() -> None:
    shape = RoutingShape(1, 6, 2)
    names = metric_names(shape, ordered=True)
    generator = torch.Generator().manual_seed(1)
    ids = torch.rand(20000, 1, 6, generator=generator).argsort(dim=2)[:, :, :2]
    scores = torch.rand(20000, 1, 6, generator=generator)
    found = token_values(scores, batch_of(ids, [20000], 6), names)[:, 0].mean(dim=0)
    assert found.tolist() == pytest.approx(chance_values(shape, names), abs=0.015)


def test_values_are_summed_by_the_position_of_their_token() -> None:
    batch = batch_of(torch.zeros(2055, 1, 2, dtype=torch.long), [5, 2050], 4)
    found = position_sums(torch.ones(2055, dtype=torch.float64), batch)
    assert found.tolist() == [[1, 3, 1, 0, 0, 0, 0], [1, 3, 12, 48, 192, 768, 1026]]
