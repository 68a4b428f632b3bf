"""Predictors that count: frequency, repeat and markov, all from one streaming pass of mergeable counts.

They are the baselines beside every figure, so they get every budget right: `repeat` fills budgets above K with the most
recently used experts, `markov` smooths each transition row with the layer's frequencies.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import safetensors.torch
import torch
from torch import Tensor

from groundwork import atomic
from groundwork.errors import ConfigurationError
from groundwork.progress import Progress, progress
from speculation.features import RoutingBatch, last_used, multi_hot, packed_batches, previous_token
from speculation.live import LiveState
from speculation.predictor import MAX_HORIZON, Predictor, RoutingShape, read_tensors, register
from traces.reader import TraceDataset

BASELINES_FILE = "baselines.safetensors"
BATCH_TOKENS = 4096
SMOOTHING = (
    8.0  # pseudo-observations of a source expert, spread by frequency; recall on real traces is flat from 1 to 30
)


@dataclass
class RoutingCounts:
    """Usage and transition counts of a split, int64; counts of parts add up to the counts of the whole.

    usage_LE: tokens routed to each expert. transitions_HLEE[h-1, l, i, j]: tokens with i chosen at layer l-h and j at
    l. previous_PEE[l, i, j]: tokens with i chosen at layer l by the token before and j now, for the P layers that a
    horizon can leave without a layer below.
    """

    usage_LE: Tensor
    transitions_HLEE: Tensor
    previous_PEE: Tensor

    @classmethod
    def zeros(cls, shape: RoutingShape) -> RoutingCounts:
        """No observation yet."""
        layers, experts = shape.num_layers, shape.num_experts
        horizons = min(MAX_HORIZON, layers)
        return cls(
            torch.zeros(layers, experts, dtype=torch.int64),
            torch.zeros(horizons, layers, experts, experts, dtype=torch.int64),
            torch.zeros(horizons, experts, experts, dtype=torch.int64),
        )

    def add(self, batch: RoutingBatch) -> None:
        """Counts whole sequences; float32 products stay exact for batches below 2**24 tokens."""
        hot_LTE = multi_hot(batch.expert_ids_TLK, batch.num_experts).transpose(0, 1).contiguous()
        self.usage_LE += hot_LTE.sum(dim=1).long()
        for horizon in range(1, len(self.transitions_HLEE) + 1):
            below_LET = hot_LTE[:-horizon].transpose(1, 2)
            self.transitions_HLEE[horizon - 1, horizon:] += (below_LET @ hot_LTE[horizon:]).long()
        layers = len(self.previous_PEE)
        before_PTE = previous_token(hot_LTE[:layers].transpose(0, 1), batch.offsets).transpose(0, 1)
        self.previous_PEE += (before_PTE.transpose(1, 2) @ hot_LTE[:layers]).long()

    def merge(self, other: RoutingCounts) -> None:
        """Adds the counts of another part of the data."""
        self.usage_LE += other.usage_LE
        self.transitions_HLEE += other.transitions_HLEE
        self.previous_PEE += other.previous_PEE

    def frequency_LE(self) -> Tensor:
        """Each expert's share of its layer's selections, float32, uniform where nothing was seen."""
        usage_LE = self.usage_LE.double() + 1e-6
        return (usage_LE / usage_LE.sum(dim=1, keepdim=True)).float()

    def save(self, path: Path) -> None:
        """Writes the counts, as int32 where they fit."""
        tensors = {name: _narrow(value) for name, value in vars(self).items()}
        atomic.write_bytes(path, safetensors.torch.save(tensors))

    @classmethod
    def load(cls, path: Path, shape: RoutingShape) -> RoutingCounts:
        """Reads the counts; raises ConfigurationError when the file is missing, damaged or of another shape."""
        tensors = read_tensors(path)
        empty = cls.zeros(shape)
        for name, expected in vars(empty).items():
            found = tuple(tensors[name].shape) if name in tensors else "missing"
            if found != tuple(expected.shape):
                raise ConfigurationError(
                    f"{path}: tensor {name} is {found}, wanted {tuple(expected.shape)} for {shape}; "
                    "train the predictor again"
                )
        return cls(*(tensors[name].long() for name in vars(empty)))


def count_routing(dataset: TraceDataset, split: str = "train", hold_out: Collection[str] = ()) -> RoutingCounts:
    """Counts a split in one streaming pass; memory is that of the counts and one batch."""
    counts = RoutingCounts.zeros(RoutingShape.of(dataset))
    stream = dataset.sequences(split=split, columns=(), hold_out=tuple(hold_out))
    bar: Progress[None] = progress(description=f"counting {split}", unit="tokens")
    with bar:
        for _, batch in packed_batches(stream, dataset.spec, BATCH_TOKENS):
            counts.add(batch)
            bar.update(batch.num_tokens)
    return counts


def baselines_from(counts: RoutingCounts, shape: RoutingShape) -> dict[str, Predictor]:
    """The three counted predictors, fitted with counts made elsewhere."""
    return {cls.name: cls().fit_counts(counts, shape) for cls in (Frequency, Repeat, Markov)}


class CountedPredictor(Predictor):
    """A predictor whose whole state follows from RoutingCounts."""

    score_scale = "shares"

    def fit(self, dataset: TraceDataset, *, split: str = "train", hold_out: Collection[str] = ()) -> Self:
        self.check_columns(dataset, "the traces")
        return self.fit_counts(count_routing(dataset, split, hold_out), RoutingShape.of(dataset))

    def fit_counts(self, counts: RoutingCounts, shape: RoutingShape) -> Self:
        """Fits from counts already made."""
        self.shape_ = shape
        return self


@register
class Frequency(CountedPredictor):
    """How often each layer uses each expert: the same scores for every token."""

    name = "frequency"

    def fit_counts(self, counts: RoutingCounts, shape: RoutingShape) -> Self:
        self.frequency_LE_ = counts.frequency_LE()
        return super().fit_counts(counts, shape)

    def predict_scores(self, batch: RoutingBatch, horizon: int = 1) -> Tensor:
        self.check_horizon(batch, horizon)
        return self.frequency_LE_.expand(batch.num_tokens, -1, -1)

    def predict_next(self, state: LiveState, horizon: int = 1) -> Tensor:
        return self.frequency_LE_[state.target(horizon)[1]]

    def state(self) -> dict[str, Tensor]:
        return {"frequency_LE": self.frequency_LE_}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.frequency_LE_ = state["frequency_LE"]


@register
class Repeat(CountedPredictor):
    """The previous token's experts at that layer in stored order, then the most recently used; nothing is learned."""

    name = "repeat"

    def predict_scores(self, batch: RoutingBatch, horizon: int = 1) -> Tensor:
        self.check_horizon(batch, horizon)
        age_TLE = last_used(multi_hot(batch.expert_ids_TLK, batch.num_experts), batch.offsets)
        scores_TLE = torch.where(age_TLE > 0, 1.0 / age_TLE.clamp_min(1), 0.0)
        places = batch.expert_ids_TLK.shape[2]
        bonus_K = torch.arange(places, 0, -1, dtype=torch.float32)
        ordered_TLE = torch.zeros_like(scores_TLE).scatter_(
            2, batch.expert_ids_TLK, bonus_K.expand(batch.expert_ids_TLK.shape)
        )
        return scores_TLE + previous_token(ordered_TLE, batch.offsets)

    def start(self) -> LiveState:
        assert self.shape_ is not None
        return RepeatLive(self.shape_)

    def predict_next(self, state: LiveState, horizon: int = 1) -> Tensor:
        assert isinstance(state, RepeatLive)
        token, layer = state.target(horizon)
        last_E = state.last_LE[layer]
        scores_E = torch.where(last_E >= 0, 1.0 / (token - last_E), 0.0)
        if token:
            scores_E[state.expert_ids[(token - 1) * state.shape.num_layers + layer]] += state.bonus_K
        return scores_E


class RepeatLive(LiveState):
    """The record of a sequence, and the token that last used each expert of each layer; -1 for none."""

    def __init__(self, shape: RoutingShape) -> None:
        super().__init__(shape)
        self.last_LE = torch.full((shape.num_layers, shape.num_experts), -1.0)
        self.bonus_K = torch.arange(shape.top_k, 0, -1, dtype=torch.float32)

    def _observed(self) -> None:
        token, layer = divmod(self.num_steps - 1, self.shape.num_layers)
        self.last_LE[layer, self.expert_ids[-1]] = token


@register
class Markov(CountedPredictor):
    """Transition counts from the layer h below, smoothed with frequency; layers without one follow the token before.

    An expert's score is the mean of its smoothed transition probabilities from the K source experts.
    """

    name = "markov"

    def fit_counts(self, counts: RoutingCounts, shape: RoutingShape) -> Self:
        frequency_LE = counts.frequency_LE()
        self.frequency_LE_ = frequency_LE
        self.below_HLEE_ = _smoothed(counts.transitions_HLEE, frequency_LE)
        self.previous_PEE_ = _smoothed(counts.previous_PEE, frequency_LE[: len(counts.previous_PEE)])
        return super().fit_counts(counts, shape)

    def predict_scores(self, batch: RoutingBatch, horizon: int = 1) -> Tensor:
        self.check_horizon(batch, horizon)
        top_k = batch.expert_ids_TLK.shape[2]
        hot_LTE = multi_hot(batch.expert_ids_TLK, batch.num_experts).transpose(0, 1) / top_k
        before_HTE = previous_token(hot_LTE[:horizon].transpose(0, 1), batch.offsets).transpose(0, 1)
        first_T = torch.zeros(batch.num_tokens, dtype=torch.bool)
        first_T[batch.offsets[:-1]] = True
        low_HTE = torch.where(
            first_T[None, :, None], self.frequency_LE_[:horizon, None, :], before_HTE @ self.previous_PEE_[:horizon]
        )
        high_LTE = hot_LTE[:-horizon] @ self.below_HLEE_[horizon - 1, horizon:]
        return torch.cat([low_HTE, high_LTE]).transpose(0, 1).contiguous()

    def predict_next(self, state: LiveState, horizon: int = 1) -> Tensor:
        token, layer = state.target(horizon)
        if layer >= horizon:
            return self.below_HLEE_[horizon - 1, layer].index_select(0, state.expert_ids[-1]).mean(dim=0)
        if token == 0:
            return self.frequency_LE_[layer]
        before_K = state.expert_ids[(token - 1) * state.shape.num_layers + layer]
        return self.previous_PEE_[layer].index_select(0, before_K).mean(dim=0)

    def state(self) -> dict[str, Tensor]:
        return {
            "frequency_LE": self.frequency_LE_,
            "below_HLEE": self.below_HLEE_,
            "previous_PEE": self.previous_PEE_,
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.frequency_LE_ = state["frequency_LE"]
        self.below_HLEE_ = state["below_HLEE"]
        self.previous_PEE_ = state["previous_PEE"]


def _smoothed(transitions_LEE: Tensor, frequency_LE: Tensor) -> Tensor:
    """Rows of P(target | source expert) with SMOOTHING pseudo-observations of the target layer's frequency, float32."""
    counts = transitions_LEE.double()
    prior = frequency_LE.double()[..., None, :]
    return ((counts + SMOOTHING * prior) / (counts.sum(dim=-1, keepdim=True) + SMOOTHING)).float()


def _narrow(counts: Tensor) -> Tensor:
    return counts.int() if int(counts.max()) < 2**31 else counts
