"""ensemble: several predictors stacked by logistic regression per layer and horizon, with calibrated confidence.

A member enters with its log-odds and the probability that they mean. The weights are fitted on
`validation_fit`, which no member was trained on, against membership of the set; so a score is a log-odds, its sigmoid
the probability that the expert is in the set. Stacking: Wolpert 1992.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from groundwork.errors import ConfigurationError
from groundwork.progress import Progress, log, progress
from speculation.calibration import logistic
from speculation.features import RoutingBatch, multi_hot, packed_batches
from speculation.live import LiveState
from speculation.predictor import (
    MAX_HORIZON,
    OPTIONAL_COLUMNS,
    Predictor,
    RoutingShape,
    create,
    load_predictor,
    register,
)
from traces.reader import TraceDataset

BATCH_TOKENS = 4096
FIT_VALUES = 1 << 26  # features held while fitting one horizon: 256 MiB
COUNTED_MEMBERS = ("statistics", "markov")  # where none are given; fitted on the train split


@register
class Ensemble(Predictor):
    """Predictors of one model stacked; `members` are folders, or what `options` gave for members stored inside."""

    name = "ensemble"
    score_scale = "log_odds"

    def __init__(self, members: Sequence[str | Path | Mapping[str, Any]] = ()) -> None:
        super().__init__()
        self.members = [_member(member) for member in members]
        self.weights_: dict[int, Tensor] = {}  # by horizon (L, 2 M + 1), the intercept last
        self.set_weights_: dict[int, Tensor] = {}  # by horizon (L, 2)
        self._declare()

    def options(self) -> dict[str, Any]:
        described = [
            {"predictor": member.name, "options": member.options(), "uses": sorted(member.uses)}
            for member in self.members
        ]
        return {"members": described}

    def fit(self, dataset: TraceDataset, *, split: str = "validation_fit", hold_out: Collection[str] = ()) -> Self:
        """Fits the weights on `split`; where no members were given, fits the counted ones on the train split first."""
        self.shape_ = RoutingShape.of(dataset)
        if not self.members:
            self.members = [create(name).fit(dataset, hold_out=hold_out) for name in COUNTED_MEMBERS]
            self._declare()
        for member in self.members:
            member.check_shape(dataset, str(member.folder_ or member.name))
        self.check_columns(dataset, "the traces")
        if split == "validation_fit" and not dataset.order(split, hold_out=tuple(hold_out)):
            log("ensemble: split validation_fit is empty in these traces; the weights are fitted on validation_stop")
            split = "validation_stop"
        if not dataset.order(split, hold_out=tuple(hold_out)):
            raise ConfigurationError(f"ensemble: split {split} holds no sequence to fit on; collect more")
        for horizon in range(1, min(MAX_HORIZON, self.shape_.num_layers) + 1):
            try:
                self._fit_horizon(dataset, split, tuple(hold_out), horizon)
            except ConfigurationError:
                if horizon == 1:
                    raise
                break  # a member, as lookahead logits of one horizon, can not look further ahead
        return self

    def _fit_horizon(self, dataset: TraceDataset, split: str, hold_out: tuple[str, ...], horizon: int) -> None:
        assert self.shape_ is not None
        layers, experts = self.shape_.num_layers, self.shape_.num_experts
        index = dataset.index
        total = sum(int(index.num_tokens_S[part].sum()) for part in dataset.order(split, hold_out=hold_out))
        stride = max(1, math.ceil(total * layers * experts * 2 * len(self.members) / FIT_VALUES))
        features: list[Tensor] = []
        chosen: list[Tensor] = []
        columns = sorted(frozenset(self.sees(dataset.available)) & OPTIONAL_COLUMNS)
        stream = dataset.sequences(split, columns, hold_out=hold_out)
        bar: Progress[None] = progress(description=f"stacking, {horizon} ahead", unit="tokens")
        with bar:
            for _, batch in packed_batches(stream, dataset.spec, BATCH_TOKENS):
                features.append(self._features(batch, horizon)[::stride])
                chosen.append(multi_hot(batch.expert_ids_TLK, experts)[::stride])
                bar.update(batch.num_tokens)
        features_TLEF, chosen_TLE = torch.cat(features), torch.cat(chosen)
        weights = [
            logistic(features_TLEF[:, layer].flatten(0, 1), chosen_TLE[:, layer].flatten()) for layer in range(layers)
        ]
        self.weights_[horizon] = torch.stack(weights)
        scores_TLE = self._combine(features_TLEF, horizon)
        exact_TL = chosen_TLE.gather(2, self._best(scores_TLE)).amin(dim=2)
        joint_TL = self._log_joint(scores_TLE)
        sets = [logistic(joint_TL[:, layer, None], exact_TL[:, layer]) for layer in range(layers)]
        self.set_weights_[horizon] = torch.stack(sets)

    def _features(self, batch: RoutingBatch, horizon: int) -> Tensor:
        """Log-odds and probability of each member's scores, (T, L, E, 2 M)."""
        odds = [member.log_odds(member.predict_scores(batch, horizon)) for member in self.members]
        return torch.stack([*odds, *(each.sigmoid() for each in odds)], dim=-1)

    def _combine(self, features_XLEF: Tensor, horizon: int) -> Tensor:
        weights_LF = self.weights_[horizon]
        return torch.einsum("xlef,lf->xle", features_XLEF, weights_LF[:, :-1]) + weights_LF[:, -1:]

    @torch.inference_mode()
    def predict_scores(self, batch: RoutingBatch, horizon: int = 1) -> Tensor:
        self.check_horizon(batch, horizon)
        if horizon not in self.weights_:
            raise ConfigurationError(
                f"--horizon {horizon}: this ensemble was fitted for {max(self.weights_, default=0)}"
            )
        return self._combine(self._features(batch, horizon), horizon)

    def probabilities(self, scores_TLE: Tensor, horizon: int = 1) -> Tensor:
        """P(in the set) of this ensemble's scores, which are log-odds of just that."""
        return torch.sigmoid(scores_TLE)

    def set_confidence(self, scores_TLE: Tensor, horizon: int = 1) -> Tensor:
        """P(the K best are exactly the set), float32 (T, L)."""
        weights_L2 = self.set_weights_[horizon]
        return torch.sigmoid(self._log_joint(scores_TLE) * weights_L2[:, 0] + weights_L2[:, 1])

    def start(self) -> LiveState:
        assert self.shape_ is not None
        return EnsembleLive(self.shape_, [member.start() for member in self.members])

    @torch.inference_mode()
    def predict_next(self, state: LiveState, horizon: int = 1) -> Tensor:
        assert isinstance(state, EnsembleLive)
        pairs = zip(self.members, state.members, strict=True)
        odds_ME = torch.stack([member.log_odds(member.predict_next(each, horizon)) for member, each in pairs])
        weights_F = self.weights_[horizon][state.target(horizon)[1]]
        return weights_F[:-1] @ torch.cat([odds_ME, odds_ME.sigmoid()]) + weights_F[-1]

    def state(self) -> dict[str, Tensor]:
        tensors = {f"weights_{horizon}": weights for horizon, weights in self.weights_.items()}
        tensors |= {f"set_weights_{horizon}": weights for horizon, weights in self.set_weights_.items()}
        for number, member in enumerate(self.members):
            tensors |= {f"members.{number}.{name}": tensor for name, tensor in member.state().items()}
        return tensors

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for number, member in enumerate(self.members):
            prefix = f"members.{number}."
            member.shape_ = self.shape_
            member.load_state({name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)})
        horizons = [horizon for horizon in range(1, MAX_HORIZON + 1) if f"weights_{horizon}" in state]
        self.weights_ = {horizon: state[f"weights_{horizon}"] for horizon in horizons}
        self.set_weights_ = {horizon: state[f"set_weights_{horizon}"] for horizon in horizons}
        self._declare()

    def _declare(self) -> None:
        """Requires and uses what the members do."""
        self.requires = frozenset({"ids"}).union(*(member.requires for member in self.members))
        self.uses = frozenset().union(*(member.uses for member in self.members)) - self.requires

    def _best(self, scores_TLE: Tensor) -> Tensor:
        assert self.shape_ is not None
        return scores_TLE.topk(self.shape_.top_k, dim=2).indices

    def _log_joint(self, scores_TLE: Tensor) -> Tensor:
        """Log of the probability that the K best are in the set and the others are not, were they independent."""
        assert self.shape_ is not None
        ranked_TLE = scores_TLE.sort(dim=2, descending=True).values
        signed = torch.cat([ranked_TLE[..., : self.shape_.top_k], -ranked_TLE[..., self.shape_.top_k :]], dim=2)
        return torch.nn.functional.logsigmoid(signed).sum(dim=2)


class EnsembleLive(LiveState):
    """The record of a sequence, kept by every member too."""

    def __init__(self, shape: RoutingShape, members: list[LiveState]) -> None:
        super().__init__(shape)
        self.members = members

    def begin_token(self, token_id: int | None = None) -> None:
        super().begin_token(token_id)
        for member in self.members:
            member.begin_token(token_id)

    def _observed(self) -> None:
        for member in self.members:
            member.observe(*self.last())


def _member(member: str | Path | Mapping[str, Any]) -> Predictor:
    """A member from its folder, or from its description, empty."""
    if isinstance(member, Mapping):
        made = create(member["predictor"], **member["options"])
        made.uses = frozenset(member["uses"])
        return made
    return load_predictor(member)
