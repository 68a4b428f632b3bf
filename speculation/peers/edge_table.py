"""edge_table: how often each expert follows a pair of experts chosen one and two steps before; counts alone.

The idea is that of EdgeMoE (2308.14352): profile once which experts are activated together along the layers, and at
run time look the next layer's experts up by those of the two layers below. The paper gives speed-ups of top-1 models
and no recall of a top-K one to mirror; the nearest published figure is the best lookup rule of speculative-moe on
Mixtral-8x7B, 42.2 top-1 and 56.2 top-2 (a leaky token-wise split).

Ours averages the rows of all K * K pairs, shrinks each row towards the one-step row of its nearer expert where the
pair is rare or unseen, serves horizons 1 to 3 from a table each, and lets the path run on into the token before below
layer 0. Where E * E rows a layer would exceed `table_mb` in all, pairs share rows by a hash; fitting takes some five
times that. Back-off and a count for every pair can only help it, and it is fitted on the same sequences as everything
beside it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from groundwork.errors import ConfigurationError
from groundwork.progress import Progress, progress
from speculation.features import RoutingBatch, bucketed, earlier_step, multi_hot, packed_batches
from speculation.predictor import MAX_HORIZON, Predictor, RoutingShape, register
from traces.reader import TraceDataset

BATCH_TOKENS = 4096
SMOOTHING = 8.0  # pseudo-observations in each row, as in markov


@register
class EdgeTable(Predictor):
    """Mean of the pairs' rows; steps without two steps before them get their layer's frequencies."""

    name = "edge_table"
    score_scale = "shares"

    def __init__(self, table_mb: float = 64.0) -> None:
        super().__init__()
        if not table_mb > 0:
            raise ConfigurationError(f"table_mb {table_mb}: must be above 0")
        self.table_mb = table_mb

    def options(self) -> dict[str, Any]:
        return {"table_mb": self.table_mb}

    def fit(self, dataset: TraceDataset, *, split: str = "train", hold_out: Collection[str] = ()) -> Self:
        self.check_columns(dataset, "the traces")
        shape = RoutingShape.of(dataset)
        counts = _Counts(shape, self._rows(shape))
        bar: Progress[None] = progress(description=f"counting {split}", unit="tokens")
        with bar:
            stream = dataset.sequences(split=split, columns=(), hold_out=tuple(hold_out))
            for _, batch in packed_batches(stream, dataset.spec, BATCH_TOKENS):
                counts.add(batch)
                bar.update(batch.num_tokens)
        self.shape_ = shape
        usage_LE = counts.usage_LE.double() + 1e-6
        self.frequency_LE_ = (usage_LE / usage_LE.sum(dim=1, keepdim=True)).float()
        single_HLEE, prior_LE = counts.single_HLEE.double(), self.frequency_LE_.double()[:, None]
        observed = single_HLEE.sum(dim=3, keepdim=True)
        self.single_HLEE_ = ((single_HLEE + SMOOTHING * prior_LE) / (observed + SMOOTHING)).float()
        total_HLR = counts.pairs_HLRE.sum(dim=3) + SMOOTHING
        self.backoff_HLR_ = SMOOTHING / total_HLR
        # Half precision: a row is an estimate from few observations, and memory is what limits this table.
        self.pairs_HLRE_ = (counts.pairs_HLRE / total_HLR[..., None]).half()
        return self

    def predict_scores(self, batch: RoutingBatch, horizon: int = 1) -> Tensor:
        self.check_horizon(batch, horizon)
        tokens, layers, top_k = batch.expert_ids_TLK.shape
        pairs_LRE, single_LEE = self.pairs_HLRE_[horizon - 1], self.single_HLEE_[horizon - 1]
        near_TLK, pair_TLX, known_TL = _sources(batch, horizon, pairs_LRE.shape[1])
        scores = []
        for layer in range(layers):
            pair_TX = pair_TLX[:, layer]
            seen_TE = F.embedding_bag(pair_TX, pairs_LRE[layer].float(), mode="mean")
            # What each pair's row leaves over goes to the one-step row of its nearer expert.
            left_TK = self.backoff_HLR_[horizon - 1, layer][pair_TX].view(tokens, top_k, top_k).sum(dim=2) / top_k**2
            backed_TE = F.embedding_bag(near_TLK[:, layer], single_LEE[layer], mode="sum", per_sample_weights=left_TK)
            scores.append(torch.where(known_TL[:, layer, None], seen_TE + backed_TE, self.frequency_LE_[layer]))
        return torch.stack(scores, dim=1)

    def state(self) -> dict[str, Tensor]:
        return {
            "frequency_LE": self.frequency_LE_,
            "single_HLEE": self.single_HLEE_,
            "backoff_HLR": self.backoff_HLR_,
            "pairs_HLRE": self.pairs_HLRE_,
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.frequency_LE_ = state["frequency_LE"]
        self.single_HLEE_ = state["single_HLEE"]
        self.backoff_HLR_ = state["backoff_HLR"]
        self.pairs_HLRE_ = state["pairs_HLRE"]

    def _rows(self, shape: RoutingShape) -> int:
        """Rows of a layer's table of one horizon: one per pair, fewer where the limit says so."""
        row_bytes = 2 * shape.num_experts * shape.num_layers * min(MAX_HORIZON, shape.num_layers)
        return max(1, min(shape.num_experts**2, int(self.table_mb * 2**20) // row_bytes))


class _Counts:
    """Selections after each pair and after each single expert, by horizon and layer; int32 (H, L, R, E)."""

    def __init__(self, shape: RoutingShape, rows: int) -> None:
        layers, experts = shape.num_layers, shape.num_experts
        horizons = min(MAX_HORIZON, layers)
        self.usage_LE = torch.zeros(layers, experts, dtype=torch.int64)
        self.single_HLEE = torch.zeros(horizons, layers, experts, experts, dtype=torch.int32)
        self.pairs_HLRE = torch.zeros(horizons, layers, rows, experts, dtype=torch.int32)

    def add(self, batch: RoutingBatch) -> None:
        """Counts whole sequences; float32 products stay exact for batches below 2**24 tokens."""
        horizons, layers, rows, experts = self.pairs_HLRE.shape
        hot_TLE = multi_hot(batch.expert_ids_TLK, experts)
        self.usage_LE += hot_TLE.sum(dim=0).long()
        for horizon in range(1, horizons + 1):
            near_TLE = earlier_step(hot_TLE, batch.offsets, horizon)
            self.single_HLEE[horizon - 1] += torch.einsum("tli,tlj->lij", near_TLE, hot_TLE).int()
            _, pair_TLX, known_TL = _sources(batch, horizon, rows)
            for layer in range(layers):
                known_T = known_TL[:, layer]
                target_TK = batch.expert_ids_TLK[known_T, layer]
                cell_TXK = pair_TLX[known_T, layer][:, :, None] * experts + target_TK[:, None, :]
                found = torch.bincount(cell_TXK.flatten(), minlength=rows * experts)
                self.pairs_HLRE[horizon - 1, layer] += found.view(rows, experts).int()


def _sources(batch: RoutingBatch, horizon: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """The experts `horizon` steps before (T, L, K), the rows of their pairs (T, L, K * K), and where both exist."""
    near_TLK = earlier_step(batch.expert_ids_TLK, batch.offsets, horizon)
    far_TLK = earlier_step(batch.expert_ids_TLK, batch.offsets, horizon + 1)
    present_TL = torch.ones(batch.expert_ids_TLK.shape[:2], dtype=torch.bool)
    known_TL = earlier_step(present_TL, batch.offsets, horizon + 1)
    pair_TLX = (near_TLK[..., :, None] * batch.num_experts + far_TLK[..., None, :]).flatten(2)
    if rows < batch.num_experts**2:
        pair_TLX = bucketed(pair_TLX, rows)
    return near_TLK, pair_TLX, known_TL
