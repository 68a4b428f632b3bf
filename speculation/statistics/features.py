"""The features of `statistics`: what tables and the sequence so far say about each expert, before it is chosen.

Beside the linear estimate and recent use there are votes: every earlier token of the sequence votes for the experts
that it was sent to at this layer, with a weight that rises with the number of experts that the two tokens share at the
steps before, in decoding order. It also votes with its residual, by which the linear estimate was wrong there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from speculation.features import bucketed, decayed_usage
from speculation.statistics.tables import StatisticsTables

ROWS = 256  # tokens scored at once; bounds memory, and results do not depend on it beyond rounding
DECAYS = (0.5, 0.8, 0.95, 0.99)  # of usage, per token
SLOW = (2, 3)  # the decays whose logarithm is a feature too
OVERLAP_DECAYS = (1.0, 0.9)  # per step: how fast a shared expert of a step further back counts less
FLOOR = 0.003  # of the estimate, before its log-odds are taken
USAGE_FLOOR = 0.01
VOTE_FLOOR = 0.02
NULL = 0.5  # the overlap, as a share of its maximum, of a vote for nobody that stands beside the real ones


class Kernel(NamedTuple):
    """A vote's weight: exp(sharpness * (overlap - 1) - fading * tokens ago), overlap from 0 to 1."""

    decay: int  # index in OVERLAP_DECAYS
    sharpness: float
    fading: float


KERNELS = (Kernel(0, 24.0, 0.005), Kernel(0, 12.0, 0.002), Kernel(1, 16.0, 0.005))
NUM_FEATURES = 5 + len(DECAYS) + len(SLOW) + 3 * len(KERNELS)
NUM_TOKEN_FEATURES = 2


class FeatureBlock(NamedTuple):
    """Features (T, E, F) of some tokens at one layer, the first of them being token `start`."""

    layer: int
    start: int
    features_TEF: Tensor


def sequence_features(
    tables: StatisticsTables, expert_ids_TLK: Tensor, token_ids_T: Tensor | None, horizon: int, window: int
) -> Iterator[FeatureBlock]:
    """All features of one whole sequence, layer by layer and in blocks of ROWS tokens.

    F is NUM_FEATURES, and NUM_TOKEN_FEATURES more (zeros below layer `horizon`) with token ids. Tokens vote that are at
    most `window` tokens back. Memory: a few vectors per token and layer of ids, and `window` overlaps per token.
    """
    tokens, layers, top_k = expert_ids_TLK.shape
    experts = tables.usage_LE.shape[1]
    # The steps of the token before, then this token's, in decoding order; expert E where there is none.
    before_TLK = torch.cat([torch.full_like(expert_ids_TLK[:1], experts), expert_ids_TLK[:-1]])
    path_TXK = torch.cat([before_TLK, expert_ids_TLK], dim=1)
    overlaps = [Overlap(start, min(start + ROWS, tokens), window) for start in range(0, tokens, ROWS)]
    for layer in range(layers):
        seen = layers + layer - horizon + 1
        for step in range(seen - 1 if layer else 0, seen):
            hot_TE = _hot(path_TXK[:, step], experts)
            for overlap in overlaps:
                overlap.extend(hot_TE)
        estimate_TE = estimates(tables, layer, horizon, path_TXK[:, :seen])
        chosen_TE = _hot(expert_ids_TLK[:, layer], experts)
        values_TX = torch.cat([chosen_TE, chosen_TE - estimate_TE], dim=1)
        usage_TRE = decayed_usage(chosen_TE[:, None], torch.tensor([0, tokens]), DECAYS)[:, 0]
        for overlap in overlaps:
            rows = slice(overlap.start, overlap.stop)
            columns = feature_columns(
                estimate_TE[rows],
                tables.usage_LE[layer].expand(overlap.stop - overlap.start, -1),
                _hot(before_TLK[rows, layer], experts),
                usage_TRE[rows].unbind(1),
                [votes_TX.split(experts, dim=1) for votes_TX in overlap.votes(values_TX, top_k)],
            )
            if token_ids_T is not None:
                columns += token_columns(tables, token_ids_T[rows], layer, known=layer >= horizon)
            yield FeatureBlock(layer, overlap.start, torch.stack(columns, dim=2))


def estimates(tables: StatisticsTables, layer: int, horizon: int, path_TXK: Tensor) -> Tensor:
    """The linear estimate (T, E) from the last of the steps given, as many as its table has."""
    linear_NXE = tables.linear[horizon - 1][layer]
    sources, rows, _ = linear_NXE.shape
    places_TNK = path_TXK[:, -sources:] + rows * torch.arange(sources)[:, None]
    return tables.usage_LE[layer] + F.embedding_bag(places_TNK.flatten(1), linear_NXE.flatten(0, 1), mode="sum")


def feature_columns(
    estimate_TE: Tensor,
    usage_TE: Tensor,
    previous_TE: Tensor,
    recent: tuple[Tensor, ...],
    votes: list[tuple[Tensor, ...]],
) -> list[Tensor]:
    """The NUM_FEATURES columns, each (T, E); `recent` by decay, `votes` by kernel: for experts, and for residuals."""
    odds_TE = torch.logit(estimate_TE, eps=FLOOR)
    share_TE = estimate_TE.clamp_min(FLOOR)
    share_TE = share_TE / share_TE.sum(dim=1, keepdim=True)
    entropy_T1 = -(share_TE * share_TE.log()).sum(dim=1, keepdim=True)
    columns = [estimate_TE, odds_TE, odds_TE * entropy_T1, usage_TE.log(), previous_TE, *recent]
    columns += [(recent[index] + USAGE_FLOOR).log() for index in SLOW]
    for chosen_TE, residual_TE in votes:
        columns += [chosen_TE, (chosen_TE + VOTE_FLOOR).log(), residual_TE]
    return columns


class Overlap:
    """How many experts each of some tokens shares with each earlier token within the window, decayed by step."""

    def __init__(self, start: int, stop: int, window: int) -> None:
        self.start, self.stop = start, stop
        self.first = max(0, start - window)
        ago_TC = torch.arange(start, stop)[:, None] - torch.arange(self.first, stop)
        self.ago_TC = ago_TC.float()
        self.hidden_TC = (ago_TC < 1) | (ago_TC > window)
        self.sums = [torch.zeros(ago_TC.shape) for _ in OVERLAP_DECAYS]
        self.steps = 0

    def extend(self, hot_TE: Tensor) -> None:
        """Adds the choices of one more step, given for all tokens of the sequence."""
        shared_TC = hot_TE[self.start : self.stop] @ hot_TE[self.first : self.stop].T
        for sums_TC, decay in zip(self.sums, OVERLAP_DECAYS, strict=True):
            sums_TC.mul_(decay).add_(shared_TC)
        self.steps += 1

    def votes(self, values_TX: Tensor, top_k: int) -> list[Tensor]:
        """For each kernel the weighted mean (T, X) of the earlier tokens' values and the null vote's zeros."""
        means = []
        for kernel in KERNELS:
            most = top_k * sum(OVERLAP_DECAYS[kernel.decay] ** step for step in range(self.steps))
            exponent_TC = self.sums[kernel.decay] * (kernel.sharpness / most) - kernel.fading * self.ago_TC
            weights_TC = (exponent_TC - kernel.sharpness).exp_().masked_fill_(self.hidden_TC, 0.0)
            total_T1 = weights_TC.sum(dim=1, keepdim=True) + math.exp((NULL - 1) * kernel.sharpness)
            means.append(weights_TC @ values_TX[self.first : self.stop] / total_T1)
        return means


def token_columns(tables: StatisticsTables, token_ids_T: Tensor, layer: int, *, known: bool) -> list[Tensor]:
    """The NUM_TOKEN_FEATURES columns, each (T, E): what the token's bucket says, and that times its trust."""
    if not known:
        return [torch.zeros(len(token_ids_T), tables.usage_LE.shape[1])] * NUM_TOKEN_FEATURES
    bucket_T = bucketed(token_ids_T, len(tables.token_trust_B))
    log_TE = tables.token_log_BLE[bucket_T, layer]
    return [log_TE, log_TE * tables.token_trust_B[bucket_T][:, None]]


def _hot(ids_TK: Tensor, experts: int) -> Tensor:
    """1.0 at each chosen expert, float32 (T, E); expert E is none."""
    return torch.zeros(len(ids_TK), experts + 1).scatter_(1, ids_TK, 1.0)[:, :experts]
