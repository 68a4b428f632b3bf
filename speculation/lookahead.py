"""gate_lookahead: the target layer's own router, applied early to a hidden state some layers below; learns nothing.

The idea is that of mixtral-offloading (2312.17238), DAOP (2501.10375), AdapMoE (2408.10284), HOBBIT (2411.01433) and
Fate (2502.12224): residual streams change slowly, so layer l's router reads much of its answer from layer l-h's input.
Published one layer ahead on Mixtral-8x7B: 84 (DAOP), 86 (AdapMoE), 96 for the first choice (HOBBIT); Fate names 79 % of
the experts of Qwen1.5-MoE and DeepSeekMoE, 97 % when it fetches more than K. Ours ranks by the logits in the traces,
taken while collecting under the target layer's norm or the source layer's (`--lookahead_norm`). Nothing is fitted, so
what differs from the published figures is the model and the text.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Self

import torch
from torch import Tensor

from groundwork.errors import ConfigurationError
from speculation.counted import Repeat
from speculation.features import RoutingBatch
from speculation.predictor import Predictor, RoutingShape, register
from traces.reader import TraceDataset


@register
class GateLookahead(Predictor):
    """The lookahead logits of the horizon asked for; layers without a layer that far below repeat the token before."""

    name = "gate_lookahead"
    requires = frozenset({"ids", "lookahead"})

    def fit(self, dataset: TraceDataset, *, split: str = "train", hold_out: Collection[str] = ()) -> Self:
        self.check_columns(dataset, "the traces")
        self.shape_ = RoutingShape.of(dataset)
        return self

    def predict_scores(self, batch: RoutingBatch, horizon: int = 1) -> Tensor:
        self.check_horizon(batch, horizon)
        lookahead_THLE = batch.lookahead_logits_THLE
        if lookahead_THLE is None:
            raise ConfigurationError(
                "gate_lookahead: these sequences were read without lookahead logits; "
                "read them with sequences(..., columns=('lookahead',))"
            )
        if lookahead_THLE.shape[1] < horizon:
            raise ConfigurationError(
                f"--horizon {horizon}: the traces hold lookahead logits of {lookahead_THLE.shape[1]} horizons; "
                f"collect them again with --store weights,lookahead --lookahead {horizon}"
            )
        low_THE = Repeat().predict_scores(batch, horizon)[:, :horizon]
        return torch.cat([low_THE, lookahead_THLE[:, horizon - 1, horizon:]], dim=1)
