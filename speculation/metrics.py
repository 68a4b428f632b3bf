"""How good scores are: hits of the b best experts against the router's set, token by token, and summed.

With S the chosen set and top_b the b best scores: `top_n` asks whether the router's first choice is in top_n,
`recall@b` is |S n top_b| / K, `hit_at_1` whether top_1 is in S, `exact_set` whether top_K = S, `any_hit` whether S and
top_K meet. Equal scores rank by expert id, lower first, so that every run and machine ranks alike.
"""

from __future__ import annotations

from math import comb

import torch
from torch import Tensor

from speculation.features import RoutingBatch, multi_hot
from speculation.predictor import RoutingShape

TOP_N = (1, 3, 5, 10)
POSITIONS = (0, 1, 4, 16, 64, 256, 1024)  # first token of each range of positions within a sequence


def budgets(shape: RoutingShape) -> list[int]:
    """How many experts a predictor may name: K, K+1 and 2K, as far as there are experts."""
    return sorted({b for b in (shape.top_k, shape.top_k + 1, 2 * shape.top_k) if b <= shape.num_experts})


def metric_names(shape: RoutingShape, ordered: bool) -> list[str]:
    """The columns of `layer_sums`; `ordered` says whether experts are stored by falling weight, which top_n needs."""
    first = [f"top_{n}" for n in TOP_N if n <= shape.num_experts] if ordered else []
    return [*first, *(f"recall@{b}" for b in budgets(shape)), "hit_at_1", "exact_set", "any_hit"]


def ranked_experts(scores_TLE: Tensor) -> Tensor:
    """Expert ids from best to worst, int64 (T, L, E); raises ValueError on scores that are not numbers."""
    if torch.isnan(scores_TLE).any():
        raise ValueError(f"{int(torch.isnan(scores_TLE).sum())} of {scores_TLE.numel()} scores are NaN")
    return scores_TLE.sort(dim=2, descending=True, stable=True).indices


def token_values(scores_TLE: Tensor, batch: RoutingBatch, names: list[str]) -> Tensor:
    """What each token's scores are worth, float64 (T, L, M), a column for each of `names`."""
    ranked_TLE = ranked_experts(scores_TLE)
    top_k = batch.expert_ids_TLK.shape[2]
    found_TLE = multi_hot(batch.expert_ids_TLK, batch.num_experts).gather(2, ranked_TLE).cumsum(dim=2)
    first_TL = (ranked_TLE == batch.expert_ids_TLK[:, :, :1]).int().argmax(dim=2)
    columns = []
    for name in names:
        if name.startswith("top_"):
            column_TL = first_TL < int(name.removeprefix("top_"))
        elif name.startswith("recall@"):
            column_TL = found_TLE[:, :, int(name.removeprefix("recall@")) - 1] / top_k
        elif name == "hit_at_1":
            column_TL = found_TLE[:, :, 0]
        elif name == "exact_set":
            column_TL = found_TLE[:, :, top_k - 1] == top_k
        elif name == "any_hit":
            column_TL = found_TLE[:, :, top_k - 1] > 0
        else:
            raise ValueError(f"unknown metric {name}")
        columns.append(column_TL.double())
    return torch.stack(columns, dim=2)


def layer_sums(values_TLM: Tensor, batch: RoutingBatch) -> Tensor:
    """Sums of token values over each sequence, (S, L, M); divide by tokens for means."""
    sums_SLM = torch.zeros(len(batch.offsets) - 1, *values_TLM.shape[1:], dtype=torch.float64)
    return sums_SLM.index_add_(0, batch.sequence_of_token_T, values_TLM)


def position_sums(values_T: Tensor, batch: RoutingBatch) -> Tensor:
    """Sums of one value a token over each sequence's tokens in each range of POSITIONS, (S, P)."""
    position_T = torch.arange(batch.num_tokens) - batch.offsets[batch.sequence_of_token_T]
    range_T = torch.bucketize(position_T, torch.tensor(POSITIONS), right=True) - 1
    sums_X = torch.zeros((len(batch.offsets) - 1) * len(POSITIONS), dtype=torch.float64)
    sums_X.index_add_(0, batch.sequence_of_token_T * len(POSITIONS) + range_T, values_T)
    return sums_X.view(-1, len(POSITIONS))


def chance_values(shape: RoutingShape, names: list[str]) -> list[float]:
    """What a random ranking reaches in expectation, in the order of `names`."""
    experts, top_k = shape.num_experts, shape.top_k
    fixed = {
        "hit_at_1": top_k / experts,
        "exact_set": 1 / comb(experts, top_k),
        "any_hit": 1 - comb(experts - top_k, top_k) / comb(experts, top_k),
    }
    return [
        fixed[name] if name in fixed else int(name.replace("top_", "recall@").split("@")[1]) / experts for name in names
    ]
