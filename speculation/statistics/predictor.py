"""statistics: counts of one pass, and what the sequence so far says, combined by logistic regression on held-back text.

The counts are plain sums (statistics_counts), from which a linear estimate is solved (statistics_tables); it and what
earlier tokens of the sequence vote for (statistics_features) are weighed per layer and horizon. Every eighth sequence
is kept back from the counts while the weights are fitted and counted afterwards, so that weights see counts of other
texts, as they will in use. The scores are log-odds of being chosen.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Self

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from groundwork.errors import ConfigurationError
from groundwork.progress import Progress, progress
from speculation.features import RoutingBatch, packed_batches
from speculation.live import LiveState
from speculation.predictor import MAX_HORIZON, Predictor, RoutingShape, register
from speculation.statistics.counts import StatisticsCounts
from speculation.statistics.features import NUM_FEATURES, NUM_TOKEN_FEATURES, sequence_features
from speculation.statistics.live import StatisticsLive
from speculation.statistics.tables import StatisticsTables
from traces.reader import TraceDataset
from traces.schema import SequenceTrace, TraceSpec

BATCH_TOKENS = 4096
HELD_BACK = 8  # every eighth sequence, but no more than
HELD_BACK_TOKENS = 1 << 14
FIT_VALUES = 1 << 26  # features held while fitting one horizon: 256 MiB


@register
class Statistics(Predictor):
    """Counted estimates and votes of earlier tokens, weighed per layer; `tokens` counts by token id as well.

    Tokens vote that are at most `window` tokens back. A model fitted with tokens has weights for text without ids too.
    """

    name = "statistics"
    score_scale = "log_odds"

    def __init__(self, tokens: bool = True, window: int = 1024) -> None:
        super().__init__()
        if window < 1:
            raise ConfigurationError(f"window {window}: must be at least 1")
        self.tokens, self.window = tokens, window
        self.uses = frozenset({"tokens"} if tokens else ())
        self.tables_: StatisticsTables | None = None
        self.combination_: dict[str, Tensor] = {}

    def options(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "window": self.window}

    def fit(self, dataset: TraceDataset, *, split: str = "train", hold_out: Collection[str] = ()) -> Self:
        self.shape_ = RoutingShape.of(dataset)
        self.tokens &= "tokens" in dataset.available
        self.uses = frozenset({"tokens"} if self.tokens else ())
        index = dataset.index
        order = dataset.order(split, hold_out=tuple(hold_out))
        total = sum(int(index.num_tokens_S[part].sum()) for part in order)
        every = max(HELD_BACK, math.ceil(total / HELD_BACK_TOKENS))
        held: list[SequenceTrace] = []
        counts = StatisticsCounts.zeros(self.shape_, self.tokens)
        stream = dataset.sequences(split, sorted(self.uses), hold_out=tuple(hold_out))
        bar: Progress[None] = progress(description=f"counting {split}", unit="tokens")
        with bar:
            for _, batch in packed_batches(_keep_back(stream, every, held), dataset.spec, BATCH_TOKENS):
                counts.add(batch)
                bar.update(batch.num_tokens)
        if not held:
            raise ConfigurationError(f"statistics: split {split} holds no sequence to count; collect more")
        return self.fit_counts(counts, held, dataset.spec)

    def fit_counts(self, counts: StatisticsCounts, held: list[SequenceTrace], spec: TraceSpec) -> Self:
        """Fits from counts, merged of parts or not, and sequences that they do not hold; adds those to the counts."""
        assert self.shape_ is not None
        self.tables_ = StatisticsTables.of(counts, self.shape_.top_k)
        for horizon in range(1, len(self.tables_.linear) + 1):
            self.combination_ |= self._fit_weights(held, spec, horizon)
        for _, batch in packed_batches(held, spec, BATCH_TOKENS):
            counts.add(batch)
        self.tables_ = StatisticsTables.of(counts, self.shape_.top_k)
        return self

    def _fit_weights(self, held: list[SequenceTrace], spec: TraceSpec, horizon: int) -> dict[str, Tensor]:
        """Weights (L, F + 1) of a horizon, the intercept last, for text without and with token ids."""
        assert self.shape_ is not None
        assert self.tables_ is not None
        layers, experts = self.shape_.num_layers, self.shape_.num_experts
        width = NUM_FEATURES + (NUM_TOKEN_FEATURES if self.tokens else 0)
        total = sum(len(sequence.expert_ids_TLK) for sequence in held)
        stride = max(1, math.ceil(total * layers * experts * width / FIT_VALUES))
        rows: list[list[Tensor]] = [[] for _ in range(layers)]
        chosen: list[list[Tensor]] = [[] for _ in range(layers)]
        for sequence in held:
            batch = RoutingBatch.from_sequences([sequence], spec)
            token_ids_T = batch.token_ids_T if self.tokens else None
            blocks = sequence_features(self.tables_, batch.expert_ids_TLK, token_ids_T, horizon, self.window)
            for layer, start, features_TEF in blocks:
                picked = slice(-start % stride, None, stride)
                ids_TK = batch.expert_ids_TLK[start : start + len(features_TEF), layer][picked]
                rows[layer].append(features_TEF[picked])
                chosen[layer].append(torch.zeros(len(ids_TK), experts).scatter_(1, ids_TK, 1.0))
        weights = {False: torch.zeros(layers, NUM_FEATURES + 1), True: torch.zeros(layers, width + 1)}
        for layer in range(layers):
            features_TEF, chosen_TE = torch.cat(rows[layer]), torch.cat(chosen[layer])
            rows[layer], chosen[layer] = [], []
            plain_X = weights[False][layer] = _logistic(features_TEF[..., :NUM_FEATURES], chosen_TE)
            if self.tokens and layer >= horizon:
                weights[True][layer] = _logistic(features_TEF, chosen_TE)
            else:
                weights[True][layer, :NUM_FEATURES], weights[True][layer, -1] = plain_X[:-1], plain_X[-1]
        names = {False: f"weights_{horizon}", **({True: f"token_weights_{horizon}"} if self.tokens else {})}
        return {name: weights[with_tokens] for with_tokens, name in names.items()}

    def weights(self, horizon: int, with_tokens: bool) -> Tensor:
        """The combination (L, F + 1) of a horizon, the intercept last."""
        return self.combination_[f"token_weights_{horizon}" if with_tokens else f"weights_{horizon}"]

    @torch.inference_mode()
    def predict_scores(self, batch: RoutingBatch, horizon: int = 1) -> Tensor:
        if self.tables_ is None:
            raise ValueError("statistics has not been fitted")
        self.check_horizon(batch, horizon)
        with_tokens = self.tokens and batch.token_ids_T is not None
        weights_LF = self.weights(horizon, with_tokens)
        scores_TLE = torch.empty(batch.num_tokens, batch.num_layers, batch.num_experts)
        for begin, end in zip(batch.offsets[:-1].tolist(), batch.offsets[1:].tolist(), strict=True):
            token_ids_T = batch.token_ids_T[begin:end] if with_tokens and batch.token_ids_T is not None else None
            blocks = sequence_features(self.tables_, batch.expert_ids_TLK[begin:end], token_ids_T, horizon, self.window)
            for layer, start, features_TEF in blocks:
                block_TE = features_TEF @ weights_LF[layer, :-1]
                block_TE += weights_LF[layer, -1] - block_TE.mean(dim=1, keepdim=True)
                scores_TLE[begin + start : begin + start + len(block_TE), layer] = block_TE
        return scores_TLE

    def start(self) -> LiveState:
        if self.shape_ is None or self.tables_ is None:
            raise ValueError("statistics has not been fitted")
        return StatisticsLive(self.shape_, self.tables_, self.window)

    def predict_next(self, state: LiveState, horizon: int = 1) -> Tensor:
        assert isinstance(state, StatisticsLive)
        token, _ = state.target(horizon)
        token_id = state.token_ids[token] if token < len(state.token_ids) else None
        weights_LF = self.weights(horizon, self.tokens and None not in state.token_ids)
        return torch.from_numpy(state.lane(horizon).scores(token_id, weights_LF.numpy()))

    def state(self) -> dict[str, Tensor]:
        assert self.tables_ is not None
        return {**self.tables_.state(), **self.combination_}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.tables_ = StatisticsTables.from_state(state)
        horizons = range(1, MAX_HORIZON + 1)
        names = [f"{kind}_{horizon}" for kind in ("weights", "token_weights") for horizon in horizons]
        self.combination_ = {name: state[name] for name in names if name in state}


def _keep_back(stream: Iterator[SequenceTrace], every: int, held: list[SequenceTrace]) -> Iterator[SequenceTrace]:
    """The sequences of a stream but the first and every `every`-th after it, which go to `held`."""
    for number, sequence in enumerate(stream):
        if number % every == 0:
            held.append(sequence)
        else:
            yield sequence


def _logistic(features_TEF: Tensor, chosen_TE: Tensor) -> Tensor:
    """Weights of the features less their mean over experts, and the intercept: float32 (F + 1,)."""
    width = features_TEF.shape[2]
    if chosen_TE.min() == chosen_TE.max():  # every expert is always chosen
        return torch.zeros(width + 1)
    features_XF = (features_TEF - features_TEF.mean(dim=1, keepdim=True)).flatten(0, 1)
    scale_F = features_XF.std(dim=0).clamp_min(1e-6)
    model = LogisticRegression(solver="newton-cholesky", max_iter=50)
    model.fit((features_XF / scale_F).numpy().astype(np.float64), chosen_TE.flatten().numpy())
    weights_F = torch.from_numpy(model.coef_[0]).float() / scale_F
    return torch.cat([weights_F, torch.from_numpy(model.intercept_).float()])
