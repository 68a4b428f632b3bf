"""From counts to tables: a linear estimate of each choice from all that was seen before it, and what tokens favour.

Transitions of several layers can not simply be multiplied, since the layers tell the same story twice. The pair counts
say how much: they are the normal equations of least squares, solved here once per layer and horizon. So the estimate
is the best linear one of an expert's indicator from the indicators of the experts chosen before, from counts alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from speculation.predictor import MAX_HORIZON
from speculation.statistics.counts import StatisticsCounts

RIDGE = (
    200.0  # pseudo-observations that pull the estimate towards usage; recall on real traces is flat from 100 to 1000
)
TOKEN_SMOOTHING = 8.0  # pseudo-observations of a token, spread by usage


@dataclass
class StatisticsTables:
    """What predictions read; shapes as in the fields' names, N source steps of one horizon, furthest first.

    usage_LE: share of tokens that chose an expert. linear[h - 1] (L, N, E + 1, E): an expert's estimate is its usage
    plus the entries of the source experts; row E of a source stands for a step that is not known. token_log_BLE: log of
    a token bucket's share less that of usage; token_trust_B: how often it was seen, on a log scale from 0 to about 1.
    """

    usage_LE: Tensor
    linear: list[Tensor]
    token_log_BLE: Tensor
    token_trust_B: Tensor

    @classmethod
    def of(cls, counts: StatisticsCounts, top_k: int) -> Self:
        """Solves for the tables; float64 inside, float16 precision in the result, so that saving changes nothing."""
        usage_LE = counts.usage_LE()
        horizons = range(1, min(MAX_HORIZON, len(usage_LE), counts.reach) + 1)
        linear = [_linear(counts, usage_LE.double(), top_k, horizon).half().float() for horizon in horizons]
        seen_B11 = counts.tokens_BLE[:, :1].sum(dim=2, keepdim=True).double() / top_k
        share_BLE = (counts.tokens_BLE + TOKEN_SMOOTHING * usage_LE.double()) / (seen_B11 + TOKEN_SMOOTHING)
        token_log_BLE = (share_BLE / usage_LE.double()).log()
        token_trust_B = (seen_B11.flatten() + 1).log() / torch.tensor(1e4).log()
        return cls(usage_LE, linear, token_log_BLE.half().float(), token_trust_B.float())

    def state(self) -> dict[str, Tensor]:
        """The tables by name, the large ones as float16."""
        linear = {f"linear_{h}": table.half() for h, table in enumerate(self.linear, 1)}
        tokens = {"token_log_BLE": self.token_log_BLE.half(), "token_trust_B": self.token_trust_B}
        return {"usage_LE": self.usage_LE, **linear, **tokens}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        """Takes back what `state` gave."""
        horizons = sum(name.startswith("linear_") for name in state)
        linear = [state[f"linear_{horizon}"].float() for horizon in range(1, horizons + 1)]
        return cls(state["usage_LE"], linear, state["token_log_BLE"].float(), state["token_trust_B"])


def _linear(counts: StatisticsCounts, usage_LE: Tensor, top_k: int, horizon: int) -> Tensor:
    """The estimate's table (L, N, E + 1, E), N = reach - horizon + 1; rows sum to what a source's deviation adds."""
    layers, experts = usage_LE.shape
    distances = list(range(counts.reach, horizon - 1, -1))
    table = torch.zeros(layers, len(distances), experts + 1, experts)
    for layer in range(layers):
        gram = torch.empty(len(distances), experts, len(distances), experts, dtype=torch.float64)
        cross = torch.empty(len(distances), experts, experts, dtype=torch.float64)
        for row, far in enumerate(distances):
            cross[row] = _covariance(counts, usage_LE, layer, far)
            for column, near in enumerate(distances[row:], row):
                block_EE = _covariance(counts, usage_LE, (layer - near) % layers, far - near)
                gram[row, :, column] = block_EE
                gram[column, :, row] = block_EE.T
        sources = len(distances) * experts
        pull = RIDGE / max(counts.observed, 1) * top_k / experts
        matrix = gram.view(sources, sources) + pull * torch.eye(sources, dtype=torch.float64)
        weights_NEE = torch.linalg.solve(matrix, cross.view(sources, experts)).view(-1, experts, experts)
        means_NE = torch.stack([usage_LE[(layer - distance) % layers] for distance in distances])
        # A set adds its experts' rows less the row of an average set; an unknown step adds nothing.
        average_NE = torch.bmm(means_NE[:, None], weights_NEE)[:, 0]
        table[layer, :, :experts] = (weights_NEE - average_NE[:, None] / top_k).float()
    return table


def _covariance(counts: StatisticsCounts, usage_LE: Tensor, layer: int, distance: int) -> Tensor:
    """Covariance (E, E) of the indicators `distance` steps before `layer` and there, over the pairs that exist."""
    pairs_EE = counts.pairs_LDEE[layer, distance].double()
    top_k = usage_LE.sum(dim=1).mean()
    seen = (pairs_EE.sum() / top_k**2).clamp_min(1.0)
    return pairs_EE / seen - usage_LE[(layer - distance) % len(usage_LE)][:, None] * usage_LE[layer]
