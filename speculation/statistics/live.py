"""`statistics` one step at a time: sums that grow with each observed choice, equal to the batch scores up to rounding.

A lane serves one horizon. Per observed step it costs K rows of overlap counts, per prediction one gather of the linear
table's rows and one product of the votes' weights with the window; both grow with the sequence up to the window.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from speculation.features import bucketed
from speculation.live import LiveState
from speculation.predictor import RoutingShape
from speculation.statistics.features import (
    DECAYS,
    FLOOR,
    KERNELS,
    NULL,
    NUM_FEATURES,
    NUM_TOKEN_FEATURES,
    OVERLAP_DECAYS,
    SLOW,
    USAGE_FLOOR,
    VOTE_FLOOR,
)
from speculation.statistics.tables import StatisticsTables

Floats = NDArray[np.float32]
KEPT = 256  # tokens beyond the window before the oldest are dropped

_DECAY_R1 = np.array(DECAYS, dtype=np.float32)[:, None]
_OVERLAP_DECAY_G1 = np.array(OVERLAP_DECAYS, dtype=np.float32)[:, None]
_KIND_J = np.array([kernel.decay for kernel in KERNELS])
_SHARPNESS_J = np.array([kernel.sharpness for kernel in KERNELS], dtype=np.float32)
_FADING_J1 = np.array([kernel.fading for kernel in KERNELS], dtype=np.float32)[:, None]
_NULL_J = np.exp((NULL - 1) * _SHARPNESS_J)


class StatisticsLive(LiveState):
    """The record of a sequence, and a lane for each horizon asked for; a horizon's first call replays the record."""

    def __init__(self, shape: RoutingShape, tables: StatisticsTables, window: int) -> None:
        super().__init__(shape)
        self.tables, self.window = tables, window
        self.lanes: dict[int, Lane] = {}

    def _observed(self) -> None:
        for lane in self.lanes.values():
            lane.observe(self.expert_ids[-1].numpy())

    def lane(self, horizon: int) -> Lane:
        """The lane of a horizon, up to date."""
        if horizon not in self.lanes:
            self.lanes[horizon] = Lane(self.shape, self.tables, horizon, self.window)
            for ids_K in self.expert_ids:
                self.lanes[horizon].observe(ids_K.numpy())
        return self.lanes[horizon]


class Lane:
    """What one horizon needs of a sequence; columns of the windowed arrays are earlier tokens, oldest first.

    values_LXC: choices (X = 0 .. E - 1) and residuals (X = E .. 2E - 1) of each token. own_GC: experts that the token
    in progress shares with each earlier one so far; carried_GC: the same for the token before it and each earlier
    one's.
    """

    def __init__(self, shape: RoutingShape, tables: StatisticsTables, horizon: int, window: int) -> None:
        if not 1 <= horizon <= len(tables.linear):
            raise ValueError(f"horizon {horizon}: must be 1 to {len(tables.linear)}")
        layers, experts = shape.num_layers, shape.num_experts
        self.shape, self.horizon, self.window = shape, horizon, window
        self.usage_LE: Floats = tables.usage_LE.numpy()
        self.log_usage_LE: Floats = np.log(self.usage_LE)
        linear_LNXE: Floats = tables.linear[horizon - 1].numpy()
        self.sources = linear_LNXE.shape[1]
        self.linear_LXE = linear_LNXE.reshape(layers, -1, experts)
        self.offset_N1 = (experts + 1) * np.arange(self.sources)[:, None]
        self.token_log_BLE: Floats = tables.token_log_BLE.numpy()
        self.token_trust_B: Floats = tables.token_trust_B.numpy()
        self.steps = 0
        self.path_XK = np.full((3 * layers + 3, shape.top_k), experts)  # the steps before, at least 2L of them
        self.path_end = layers  # row of the next step; a token of unknown steps stands before the first
        self.recent_LRE: Floats = np.zeros((layers, len(DECAYS), experts), dtype=np.float32)
        self.previous_LE: Floats = np.zeros((layers, experts), dtype=np.float32)
        capacity = min(window, 64) + KEPT
        self.values_LXC: Floats = np.zeros((layers, 2 * experts, capacity), dtype=np.float32)
        self.own_GC: Floats = np.zeros((len(OVERLAP_DECAYS), capacity), dtype=np.float32)
        self.carried_GC: Floats = np.zeros_like(self.own_GC)
        self.token = 0  # the column of the token in progress
        self.estimated: dict[int, Floats] = {}  # by step, until it is observed
        self.columns_FE: Floats = np.zeros((NUM_FEATURES + NUM_TOKEN_FEATURES, experts), dtype=np.float32)
        self.ago_C: Floats = np.arange(capacity, 0, -1, dtype=np.float32)
        # Scale of the exponent after n steps of overlap: the sharpness over the most that can be shared.
        self.scale_NJ1: Floats = np.stack(
            [
                _SHARPNESS_J
                / (shape.top_k * np.array([sum(OVERLAP_DECAYS[k] ** i for i in range(n)) for k in _KIND_J]))
                for n in range(1, 2 * layers + 1)
            ]
        ).astype(np.float32)[..., None]

    def estimate(self, step: int) -> Floats:
        """The linear estimate (E,) of a step at most `horizon` after the last observed one."""
        if step not in self.estimated:
            layer = step % self.shape.num_layers
            end = self.path_end - self.steps + step - self.horizon + 1
            places_X = (self.path_XK[end - self.sources : end] + self.offset_N1).ravel()
            self.estimated[step] = self.linear_LXE[layer].take(places_X, axis=0).sum(axis=0) + self.usage_LE[layer]
        return self.estimated[step]

    def observe(self, ids_K: NDArray[np.int64]) -> None:
        """Takes the choice of the next step."""
        layers, experts = self.shape.num_layers, self.shape.num_experts
        layer, token = self.steps % layers, self.token
        estimate_E = self.estimate(self.steps)
        values_XC = self.values_LXC[layer]
        self.own_GC[:, :token] = self.own_GC[:, :token] * _OVERLAP_DECAY_G1 + values_XC[ids_K, :token].sum(axis=0)
        values_XC[:, token] = 0
        values_XC[ids_K, token] = 1
        values_XC[experts:, token] = values_XC[:experts, token] - estimate_E
        self.previous_LE[layer] = values_XC[:experts, token]
        recent_RE = self.recent_LRE[layer]
        recent_RE *= _DECAY_R1
        recent_RE[:, ids_K] += 1 - _DECAY_R1
        del self.estimated[self.steps]
        if self.path_end == len(self.path_XK):
            self.path_XK[: 2 * layers] = self.path_XK[-2 * layers :]
            self.path_end = 2 * layers
        self.path_XK[self.path_end] = ids_K
        self.path_end += 1
        self.steps += 1
        if self.steps % layers == 0:
            self._end_token()

    def scores(self, token_id: int | None, weights_LF: Floats) -> Floats:
        """Log-odds (E,) for the step `horizon` after the last observed one."""
        layers, experts = self.shape.num_layers, self.shape.num_experts
        step = self.steps - 1 + self.horizon
        layer = step % layers
        estimate_E = self.estimate(step)
        sums_GC, tokens = self._overlaps(step)
        first = max(0, tokens - self.window)
        exponent_JC = sums_GC[_KIND_J, first:tokens] * self.scale_NJ1[layers + layer - self.horizon]
        exponent_JC -= _FADING_J1 * self.ago_C[len(self.ago_C) - tokens + first :]
        exponent_JC -= _SHARPNESS_J[:, None]
        np.exp(exponent_JC, out=exponent_JC)
        exponent_JC /= (exponent_JC.sum(axis=1) + _NULL_J)[:, None]
        votes_JX = exponent_JC @ self.values_LXC[layer, :, first:tokens].T

        columns_FE = self.columns_FE
        share_E = np.maximum(estimate_E, FLOOR)
        clipped_E = np.minimum(share_E, 1 - FLOOR)
        share_E = share_E / share_E.sum()
        columns_FE[0] = estimate_E
        np.log(clipped_E / (1 - clipped_E), out=columns_FE[1])
        np.multiply(columns_FE[1], -(share_E @ np.log(share_E)), out=columns_FE[2])
        columns_FE[3] = self.log_usage_LE[layer]
        columns_FE[4] = self.previous_LE[layer]
        at = 5 + len(DECAYS)
        columns_FE[5:at] = self.recent_LRE[layer]
        np.log(self.recent_LRE[layer, SLOW[0] : SLOW[-1] + 1] + USAGE_FLOOR, out=columns_FE[at : at + len(SLOW)])
        at += len(SLOW)
        columns_FE[at:NUM_FEATURES:3] = votes_JX[:, :experts]
        np.log(votes_JX[:, :experts] + VOTE_FLOOR, out=columns_FE[at + 1 : NUM_FEATURES : 3])
        columns_FE[at + 2 : NUM_FEATURES : 3] = votes_JX[:, experts:]
        weights_F = weights_LF[layer]
        used = len(weights_F) - 1
        if used > NUM_FEATURES:
            self._token_columns(token_id, layer)
        scores_E: Floats = weights_F[:-1] @ columns_FE[:used]
        scores_E += weights_F[-1] - scores_E.mean()
        return scores_E

    def _overlaps(self, step: int) -> tuple[Floats, int]:
        """Overlaps (G, C) of the tokens before the step's with its token, and how many tokens those are."""
        layers, done = self.shape.num_layers, self.steps % self.shape.num_layers
        if step // layers == self.steps // layers:
            return self.own_GC[:, : self.token] + _OVERLAP_DECAY_G1**done * self.carried_GC[:, : self.token], self.token
        # The step belongs to the token after the one in progress: neighbours of what is shared so far.
        shifted_GC = np.zeros((len(OVERLAP_DECAYS), self.token + 1), dtype=np.float32)
        shifted_GC[:, 1:] = self.own_GC[:, : self.token]
        return shifted_GC, self.token + 1

    def _token_columns(self, token_id: int | None, layer: int) -> None:
        if layer < self.horizon or token_id is None:
            self.columns_FE[NUM_FEATURES:] = 0
            return
        bucket = int(bucketed(torch.tensor(token_id), len(self.token_trust_B)))
        self.columns_FE[NUM_FEATURES] = self.token_log_BLE[bucket, layer]
        self.columns_FE[NUM_FEATURES + 1] = self.columns_FE[NUM_FEATURES] * self.token_trust_B[bucket]

    def _end_token(self) -> None:
        """Turns what the finished token shares into what the next one's predecessor shares, and makes room."""
        self.carried_GC[:, 1 : self.token + 1] = self.own_GC[:, : self.token]
        self.carried_GC[:, 0] = 0
        self.own_GC[:] = 0
        self.token += 1
        if self.token + 1 < self.values_LXC.shape[2]:
            return
        kept = min(self.window, self.token)
        capacity = kept + max(KEPT, min(kept, self.window - kept + KEPT))
        dropped = self.token - kept
        for name in ("values_LXC", "carried_GC", "own_GC"):
            old = getattr(self, name)
            new = np.zeros((*old.shape[:-1], capacity), dtype=np.float32)
            new[..., :kept] = old[..., dropped : self.token]
            setattr(self, name, new)
        self.ago_C = np.arange(capacity, 0, -1, dtype=np.float32)
        self.token = kept
